"""Images read pixel by pixel, and the sequence models that classify them.

At laptop scale the 1,797 digits of scikit-learn, 64 steps each; at the authors' scale sequential
CIFAR-10, 1,024 steps of three colours, read from ``cifar-10-batches-bin`` in ``STIEFEL_DATA``.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stiefel.data import MissingDataError, table
from stiefel.nn import S4DModel, s4d_init, ssm_param_groups
from stiefel.papers.paper import Scale, UnavailableError

Report = Callable[[float, str], None]
Split = tuple[Tensor, Tensor, Tensor, Tensor]

VARIABLE = "STIEFEL_DATA"
CIFAR_TRAIN = tuple(f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6))
CIFAR_TEST = ("cifar-10-batches-bin/test_batch.bin",)
CIFAR_RECORD = 1 + 3 * 32 * 32
TEST_DIGITS = 500

# Sheet of the paper's authors' rates: AdamW at 1e-2, dt, A and B at 1e-3 without decay, cosine.
LAPTOP = {
    "data": "digits", "device": "cpu", "width": 32, "state": 32, "layers": 2, "dropout": 0.0,
    "epochs": 6, "batch": 50, "lr": 1e-2, "ssm_lr": 1e-3, "decay": 0.01, "dt": [4e-3, 0.4],
    "last_norm": False, "train": None,
}  # fmt: skip
SMOKE = {**LAPTOP, "width": 8, "state": 8, "layers": 1, "epochs": 1, "train": 150}
PAPER = {
    **LAPTOP, "data": "cifar10", "device": "cuda", "width": 256, "state": 64, "layers": 4,
    "dropout": 0.1, "epochs": 100, "dt": [1e-3, 0.1], "decay": 0.05,
}  # fmt: skip


def settings(scale: Scale) -> dict[str, Any]:
    """What all trainings of one scale have in common.

    Raises:
        UnavailableError: no CUDA device or no CIFAR-10 at paper scale; names all that is missing.
    """
    if scale is not Scale.PAPER:
        return dict(SMOKE if scale is Scale.SMOKE else LAPTOP)
    missing = [] if torch.cuda.is_available() else ["a CUDA device"]
    folder = os.environ.get(VARIABLE)
    wanted = (*CIFAR_TRAIN, *CIFAR_TEST)
    if not folder:
        missing.append(f"CIFAR-10: set {VARIABLE} to a folder with {', '.join(wanted)}")
    else:
        missing += [str(Path(folder) / f) for f in wanted if not (Path(folder) / f).is_file()]
    if missing:
        raise UnavailableError(f"the paper scale needs {'; and '.join(missing)}")
    return dict(PAPER)


def digits(seed: int) -> tuple[Split, str]:
    """Digits as ``[n, 64, 1]`` in [-1, 1]: 1,297 to train on, 500 stratified ones to test.

    Returns:
        Training sequences and classes, test sequences and classes; checksum of the table.

    Raises:
        UnavailableError: scikit-learn, which holds them, is not installed.
    """
    try:
        content = table("digits")
    except MissingDataError as error:
        raise UnavailableError(str(error)) from error
    x, y = (content.x / 8 - 1).float()[..., None], content.y
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=generator)
    test = stratified(y[order], TEST_DIGITS)
    return (x[order[~test]], y[order[~test]], x[order[test]], y[order[test]]), content.sha256


def stratified(y: Tensor, count: int) -> Tensor:
    """Marks ``count`` entries, of every class its share (to within one), the first ones each."""
    classes, sizes = y.unique(return_counts=True)
    exact = sizes.double() * count / len(y)
    share = exact.floor().long()
    share[(exact - share).argsort(descending=True)[: count - int(share.sum())]] += 1
    chosen = torch.zeros(len(y), dtype=torch.bool)
    for label, size in zip(classes, share, strict=True):
        chosen[(y == label).nonzero()[: int(size), 0]] = True
    return chosen


def cifar10(folder: Path) -> tuple[Split, str]:
    """CIFAR-10 as sequences ``[n, 1024, 3]`` in [-1, 1]: the 50,000 and the 10,000.

    Raises:
        ValueError: a file is not a whole number of records.
    """
    parts: list[Tensor] = []
    digest = hashlib.sha256()
    for files in (CIFAR_TRAIN, CIFAR_TEST):
        raw = np.concatenate([np.fromfile(folder / file, np.uint8) for file in files])
        if not len(raw) or len(raw) % CIFAR_RECORD:
            raise ValueError(
                f"{folder / files[0]} and its like hold {len(raw)} bytes, "
                f"not a multiple of {CIFAR_RECORD}"
            )
        digest.update(raw.tobytes())
        rows = torch.from_numpy(raw).reshape(-1, CIFAR_RECORD)
        pixels = rows[:, 1:].reshape(-1, 3, 1024).mT
        parts += [pixels.float() / 127.5 - 1, rows[:, 0].long()]
    return (parts[0], parts[1], parts[2], parts[3]), digest.hexdigest()


class RecurrentClassifier(nn.Module):
    """The practical baseline: a GRU of the same width and depth, mean pooling, linear map."""

    def __init__(self, channels: int, classes: int, width: int, layers: int) -> None:
        super().__init__()
        self.rnn = nn.GRU(channels, width, layers, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, u: Tensor) -> Tensor:
        """``[n, classes]`` of ``[n, length, channels]``."""
        return self.head(self.rnn(u)[0].mean(1))


def build(config: Mapping[str, Any], channels: int, classes: int, seed: int) -> nn.Module:
    """The model that ``config["model"]`` names, its weights drawn from ``seed``."""
    if config["model"] == "gru":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return RecurrentClassifier(channels, classes, config["width"], config["layers"])
    start: Any = config["init"]
    if config["half_input"]:
        a, b = s4d_init(start, config["state"])
        start = (a, b / 2)
    return S4DModel(
        channels,
        classes,
        config["width"],
        config["layers"],
        config["state"],
        config["dropout"],
        generator=torch.Generator().manual_seed(seed),
        init=start,
        disc=config["disc"],
        dt_min=config["dt"][0],
        dt_max=config["dt"][1],
        last_norm=config["last_norm"],
        lr=0.0 if config["frozen"] else None,
        dtype=torch.float32,
    )


def train(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Train one model; its test accuracy, the mean loss of every epoch, checksum of the data."""
    if config["data"] == "cifar10":
        split, checksum = cifar10(Path(os.environ[VARIABLE]))
    else:
        split, checksum = digits(config["seed"])
    x, y, test_x, test_y = split
    x, y = x[: config["train"]], y[: config["train"]]
    seed = 1000 * config["seed"] + config["repeat"]
    model = build(config, x.shape[2], 10, seed).to(config["device"])
    groups = ssm_param_groups(model, config["lr"], config["ssm_lr"], config["decay"])
    optimizer = torch.optim.AdamW(groups, lr=config["lr"])
    batches = -(-len(x) // config["batch"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config["epochs"] * batches)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for epoch in range(config["epochs"]):
        total = 0.0
        for index in torch.randperm(len(x), generator=generator).split(config["batch"]):
            inputs, targets = (t[index].to(config["device"]) for t in (x, y))
            loss = nn.functional.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(index)
        losses.append(total / len(x))
        report((epoch + 1) / config["epochs"], f"loss {losses[-1]:.2f}")
    model.eval()
    right = 0
    with torch.no_grad():
        for inputs, targets in zip(test_x.split(250), test_y.split(250), strict=True):
            found = model(inputs.to(config["device"])).argmax(1).cpu()
            right += int((found == targets).sum())
    return {"accuracy": right / len(test_y), "losses": losses, "sha256": checksum}
