"""The authors' scale: CIFAR-10, CIFAR-100 and SVHN, a narrow ResNet-18, on a CUDA device.

The same three measurements as :mod:`stiefel.papers.cluttered_mlp`, and the two-phase table. The
folder ``STIEFEL_DATA`` holds what the data sets' own pages offer, unpacked:
``cifar-10-batches-bin/data_batch_1.bin`` to ``5``, ``cifar-100-binary/train.bin`` and
``train_32x32.mat``. Two random thirds of the training part are fitted, one third is the test.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stiefel.init import ShrinkPerturb, TrainAccuracy, gradient_balance, shrink_perturb_
from stiefel.papers.paper import UnavailableError

Report = Callable[[float, str], None]
Data = tuple[Tensor, Tensor]

VARIABLE = "STIEFEL_DATA"
CIFAR10 = tuple(f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6))
FILES = {
    "cifar10": CIFAR10,
    "cifar100": ("cifar-100-binary/train.bin",),
    "svhn": ("train_32x32.mat",),
}
CLASSES = {"cifar10": 10, "cifar100": 100, "svhn": 10}
WIDTHS = (16, 32, 64, 128)
LR = 1e-3
BATCH = 128
# A linear layer never reaches 99 %; its loss is flat long before.
LINEAR_EPOCHS = 50
PIXELS = 3 * 32 * 32


def require() -> None:
    """Raise ``UnavailableError`` naming all that is missing: data files, a CUDA device."""
    missing = [] if torch.cuda.is_available() else ["a CUDA device"]
    folder = os.environ.get(VARIABLE)
    wanted = [file for files in FILES.values() for file in files]
    if not folder:
        missing.append(f"data: set {VARIABLE} to a folder with {', '.join(wanted)}")
    else:
        missing += [str(Path(folder) / f) for f in wanted if not (Path(folder) / f).is_file()]
    if missing:
        raise UnavailableError(f"the paper scale needs {'; and '.join(missing)}")


def read(name: str, folder: Path) -> Data:
    """All training images of one data set: bytes [n, 3, 32, 32] and classes [n].

    Raises:
        ValueError: a file has not the size or the content that the format asks for.
    """
    paths = [folder / file for file in FILES[name]]
    if name == "svhn":
        from scipy.io import loadmat

        content = loadmat(paths[0])
        images = np.ascontiguousarray(content["X"].transpose(3, 2, 0, 1))
        classes = content["y"].ravel().astype(np.int64) % 10  # the digit 0 is class 10 there
    else:
        labels = 1 if name == "cifar10" else 2  # coarse and fine
        record = labels + PIXELS
        raw = np.concatenate([np.fromfile(path, np.uint8) for path in paths])
        if not len(raw) or len(raw) % record:
            raise ValueError(f"{paths[0]} holds {len(raw)} bytes, not a multiple of {record}")
        rows = raw.reshape(-1, record)
        images = rows[:, labels:].reshape(-1, 3, 32, 32)
        classes = rows[:, labels - 1].astype(np.int64)
    if images.shape[1:] != (3, 32, 32) or classes.max() >= CLASSES[name]:
        raise ValueError(f"{paths[0]} does not hold {name}")
    return torch.from_numpy(images), torch.from_numpy(classes)


def load(config: Mapping[str, Any]) -> tuple[Data, Data, str]:
    """Training and test part on the device, in [−1, 1], split by the seed; checksum of all."""
    images, classes = read(config["data"], Path(os.environ[VARIABLE]))
    generator = torch.Generator().manual_seed(config["seed"])
    order = torch.randperm(len(classes), generator=generator)
    cut = len(order) * 2 // 3
    device = config["device"]
    parts = []
    for rows in (order[:cut], order[cut:]):
        x = images[rows].to(device, torch.float32) / 127.5 - 1
        parts.append((x, classes[rows].to(device)))
    return parts[0], parts[1], hashlib.sha256(images.numpy().tobytes()).hexdigest()


class Block(nn.Module):
    """Two 3 × 3 convolutions with batch normalisation and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, inputs, h, w] → [batch, outputs, h / stride, w / stride]."""
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


def network(config: Mapping[str, Any]) -> nn.Module:
    """``"resnet"``: ResNet-18 of 16 to 128 channels; ``"mlp"``: 100-100; ``"linear"``."""
    classes, kind = CLASSES[config["data"]], config["network"]
    layers: list[nn.Module]
    if kind == "resnet":
        layers = [
            nn.Conv2d(3, WIDTHS[0], 3, 1, 1, bias=False),
            nn.BatchNorm2d(WIDTHS[0]),
            nn.ReLU(),
        ]
        inputs = WIDTHS[0]
        for stage, width in enumerate(WIDTHS):
            layers += [Block(inputs, width, 2 if stage else 1), Block(width, width, 1)]
            inputs = width
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    elif kind == "mlp":
        layers = [nn.Flatten(), nn.Linear(PIXELS, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU()]
        layers.append(nn.Linear(100, classes))
    else:
        layers = [nn.Flatten(), nn.Linear(PIXELS, classes)]
    return nn.Sequential(*layers).to(config["device"])


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Percent of right answers, in evaluation mode."""
    model.eval()
    pairs = zip(data[0].split(1000), data[1].split(1000), strict=True)
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in pairs)
    return 100 * right / len(data[1])


def _keeper(config: Mapping[str, Any], shrink: float, perturb: float) -> ShrinkPerturb:
    torch.manual_seed(config["seed"])
    return ShrinkPerturb(
        partial(network, config),
        partial(torch.optim.Adam, lr=LR),
        shrink,
        perturb,
        TrainAccuracy(config.get("target", 0.99)),
        max_epochs=config["max_epochs"],
        batch_size=BATCH,
        generator=torch.Generator().manual_seed(config["seed"]),
    )


def online(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """As :func:`stiefel.papers.cluttered_mlp.online`, one network after the other."""
    (x, y), test, sha256 = load(config)
    rounds, size = config["rounds"], config["round_size"]
    result: dict[str, Any] = {"accuracy": [], "steps": [], "sha256": [sha256]}
    for which, (shrink, perturb, _) in enumerate(config["starts"]):
        keeper, scores, steps = _keeper(config, shrink, perturb), [], 0
        for turn in range(rounds):
            seen = (turn + 1) * size
            steps += keeper.fit_round((x[:seen], y[:seen])).steps
            scores.append(accuracy(keeper.model, test))
            done = which + (turn + 1) / rounds
            report(done / len(config["starts"]), f"λ = {shrink}: {scores[-1]:.1f} %")
        result["accuracy"].append([scores])
        result["steps"].append([steps])
    return result


def balance(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """As :func:`stiefel.papers.cluttered_mlp.balance`, with one network."""
    (x, y), _, _ = load(config)
    half = config["half"]
    keeper = _keeper(config, 1.0, 0.0)
    keeper.fit_round((x[:half], y[:half]))
    result: dict[str, list[float]] = {"ratio": [], "old": []}

    def batches(first: int) -> Callable[[], Any]:
        part = slice(first, first + half)
        return lambda: zip(x[part].split(1000), y[part].split(1000), strict=True)

    for shrink, perturb in config["starts"]:
        model = copy.deepcopy(keeper.model)
        # Statistics stay comparable: the ratio is measured with those of the batches.
        shrink_perturb_(model, shrink, perturb, generator=torch.Generator().manual_seed(1))
        model.train()
        ratio = gradient_balance(model, F.cross_entropy, batches(0), batches(half))
        with torch.no_grad():
            right = sum(int((model(a).argmax(1) == b).sum()) for a, b in batches(0)())
        result["ratio"].append(ratio)
        result["old"].append(100 * right / half)
    report(1.0, f"{half} images")
    return result


def logistic(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """The convex control: a linear layer, fresh and warm, a fixed number of epochs a round."""
    epochs = min(config["max_epochs"], LINEAR_EPOCHS)
    config = {**config, "network": "linear", "max_epochs": epochs}
    starts = [[0.0, 1.0, 1], [1.0, 0.0, 1]]
    scores = online({**config, "starts": starts}, report)["accuracy"]
    return {"fresh": scores[0][0], "warm": scores[1][0]}


def two_phase(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Half the data, then all: test accuracy from a fresh and from a warm start (table 1)."""
    (x, y), test, _ = load(config)
    if config["network"] == "linear":
        config = {**config, "max_epochs": min(config["max_epochs"], LINEAR_EPOCHS)}
    keeper = _keeper(config, 1.0, 0.0)
    keeper.fit_round((x[: len(x) // 2], y[: len(y) // 2]))
    keeper.fit_round((x, y))
    fresh = _keeper(config, 0.0, 1.0)
    fresh.fit_round((x, y))
    report(1.0, f"{config['data']} {config['network']}")
    return {"fresh": accuracy(fresh.model, test), "warm": accuracy(keeper.model, test)}
