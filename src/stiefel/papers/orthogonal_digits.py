"""Circular convolutions trained with a penalty, attacked, certified, and measured at larger sizes.

At laptop scale three layers on the 1,797 digits of scikit-learn; at the authors' scale a VGG-like
net on CIFAR-10, read from ``cifar-10-batches-bin`` in ``STIEFEL_DATA``.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stiefel.data import MissingDataError, table
from stiefel.nn import certified_lipschitz
from stiefel.papers.orthogonal_kernels import size_errors
from stiefel.papers.paper import Scale, UnavailableError
from stiefel.papers.sequence_digits import CIFAR_TEST, CIFAR_TRAIN, VARIABLE, cifar10, stratified
from stiefel.regularize import OrthogonalityPenalty

Report = Callable[[float, str], None]
Split = tuple[Tensor, Tensor, Tensor, Tensor]

# (in, out, stride) of the convolutions; every kernel is 3 × 3, the image ends at 2 × 2.
LAPTOP = {
    "data": "digits", "device": "cpu", "layers": [[1, 16, 1], [16, 32, 2], [32, 64, 2]],
    "epochs": 12, "batch": 64, "lr": 3e-3, "temperature": 10.0, "test": 600, "train": None,
    "attack_steps": 20, "attack_radii": [0.1, 0.3, 0.5], "autoattack": None,
    "certified_radii": [0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3],
}  # fmt: skip
SMOKE = {**LAPTOP, "epochs": 1, "train": 128, "test": 60, "attack_steps": 2}
PAPER = {
    **LAPTOP, "data": "cifar10", "device": "cuda",
    "layers": [
        [3, 64, 1], [64, 96, 1], [96, 128, 2], [128, 192, 1], [192, 256, 2], [256, 320, 1],
        [320, 512, 2], [512, 640, 1], [640, 512, 2],
    ],
    "epochs": 200, "batch": 128, "lr": 1e-3, "test": None, "attack_radii": [36 / 255, 0.5],
    "certified_radii": [0.05, 0.1, 36 / 255, 0.25, 0.5], "autoattack": 36 / 255,
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
    attack = PAPER["autoattack"] if importlib.util.find_spec("autoattack") else None
    return {**PAPER, "autoattack": attack}


def drawn_from(config: Mapping[str, Any]) -> int:
    """The seed of split, start and order of one training."""
    return 1000 * config["seed"] + config["repeat"]


def images(config: Mapping[str, Any]) -> tuple[Split, str]:
    """Images ``[n, C, h, w]`` in [0, 1] and classes, training and test part; checksum of the data.

    Digits: ``config["test"]`` stratified ones to test, drawn from seed and repeat.

    Raises:
        UnavailableError: scikit-learn, which holds the digits, is not installed.
        ValueError: a CIFAR-10 file is not a whole number of records.
    """
    if config["data"] == "cifar10":
        (x, y, test_x, test_y), checksum = cifar10(Path(os.environ[VARIABLE]))
        x, test_x = ((s.mT.reshape(-1, 3, 32, 32) + 1) / 2 for s in (x, test_x))
        return (x, y, test_x, test_y), checksum
    try:
        content = table("digits")
    except MissingDataError as error:
        raise UnavailableError(str(error)) from error
    x, y = (content.x / 16).float().reshape(-1, 1, 8, 8), content.y
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(drawn_from(config)))
    test = stratified(y[order], config["test"])
    return (x[order[~test]], y[order[~test]], x[order[test]], y[order[test]]), content.sha256


class MaxMin(nn.Module):
    """Larger and smaller of the two halves of the channels: keeps every norm."""

    def forward(self, x: Tensor) -> Tensor:
        """``[n, channels, …]`` to the same shape."""
        a, b = x.chunk(2, dim=1)
        return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], dim=1)


def build(config: Mapping[str, Any], size: int, classes: int, seed: int) -> nn.Sequential:
    """Circular 3 × 3 convolutions with bias and MaxMin, then a linear layer; Xavier start."""
    parts: list[nn.Module] = []
    channels = 0
    for inputs, channels, stride in config["layers"]:
        parts += [
            nn.Conv2d(inputs, channels, 3, stride, padding=1, padding_mode="circular"),
            MaxMin(),
        ]
        size //= stride
    parts += [nn.Flatten(), nn.Linear(channels * size * size, classes)]
    generator = torch.Generator().manual_seed(seed)
    for part in parts:
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(part.weight, generator=generator)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    return nn.Sequential(*parts)


def kernel_penalty(model: nn.Module, lam: float) -> Callable[[], Tensor]:
    """λ Σ ‖WWᵀ − I‖²_F of the flattened weights, on the smaller side: the older, weaker notion."""
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]

    def total() -> Tensor:
        parts = []
        for layer in layers:
            w = layer.weight.flatten(1)
            gram = w @ w.mT if len(w) <= w.shape[1] else w.mT @ w
            parts.append((gram - torch.eye(len(gram), device=w.device)).square().sum())
        return lam * torch.stack(parts).sum()

    return total


def margins(logits: Tensor, y: Tensor) -> Tensor:
    """Logit of the right class less the largest other one, ``[n]``."""
    own = logits.gather(1, y[:, None])[:, 0]
    return own - logits.scatter(1, y[:, None], -torch.inf).amax(1)


def attacked(model: nn.Module, x: Tensor, y: Tensor, radius: float, steps: int) -> Tensor:
    """Smallest margin ``[n]`` that projected gradient descent on the margin meets within a ball.

    Steps of 2.5·radius/steps along the normalised gradient, from the image itself, no clipping to
    the range of pixels: that is the ball of the certificate. A margin, as cross-entropy saturates.
    """
    moved = torch.zeros_like(x)
    least = torch.full((len(x),), torch.inf, device=x.device)
    for _ in range(steps):
        moved.requires_grad_()
        found = margins(model(x + moved), y)
        least = torch.minimum(least, found.detach())
        (slope,) = torch.autograd.grad(found.sum(), moved)
        length = slope.flatten(1).norm(dim=1).clamp(min=1e-12).reshape(-1, 1, 1, 1)
        moved = moved.detach() - 2.5 * radius / steps * slope / length
        length = moved.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
        moved = moved * (radius / length.clamp(min=max(radius, 1e-12)))
    with torch.no_grad():
        return torch.minimum(least, margins(model(x + moved), y))


def train(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Train one net; its accuracies clean, attacked and certified, and the errors of its kernels.

    ``config["regulariser"]`` is ``"none"``, ``"kernel"`` or ``"lorth"``, times ``config["lam"]``.
    """
    (x, y, test_x, test_y), checksum = images(config)
    device = config["device"]
    x, y = (t[: config["train"]].to(device) for t in (x, y))
    seed = drawn_from(config)
    model = build(config, x.shape[-1], 10, seed).to(device)
    lam, kind = config["lam"], config["regulariser"]
    penalty: Callable[[], Tensor] | None = None
    if kind == "lorth":
        penalty = OrthogonalityPenalty(model, lam)
    elif kind == "kernel":
        penalty = kernel_penalty(model, lam)
    batches = -(-len(x) // config["batch"])
    optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config["epochs"] * batches)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(config["epochs"]):
        for index in torch.randperm(len(x), generator=generator).split(config["batch"]):
            index = index.to(device)
            logits = config["temperature"] * model(x[index])
            loss = nn.functional.cross_entropy(logits, y[index])
            if penalty is not None:
                loss = loss + penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        report(0.7 * (epoch + 1) / config["epochs"], f"loss {float(loss.detach()):.2f}")
    model.eval().requires_grad_(False)
    found = robustness(model, test_x.to(device), test_y.to(device), config)
    report(0.9, f"accuracy {found['accuracy']:.3f}")
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    errors = [size_errors(m.weight.double(), m.stride[0], config["sizes"]) for m in layers]
    return {**found, "layers": errors, "sha256": checksum}


def robustness(
    model: nn.Sequential, x: Tensor, y: Tensor, config: Mapping[str, Any]
) -> dict[str, Any]:
    """Parts of the images that are right: clean, under attack, with a certificate; per radius.

    No image changes its class within margin / (√2 · Lipschitz constant): how often the attack
    refutes that is counted over all its radii.
    """
    lipschitz = certified_lipschitz(model, tuple(x.shape[1:]), known={MaxMin: 1.0})
    parts = list(zip(x.split(1000), y.split(1000), strict=True))
    with torch.no_grad():
        clean = torch.cat([margins(model(a), b) for a, b in parts])
    result: dict[str, Any] = {
        "accuracy": _part(clean > 0),
        "lipschitz": lipschitz,
        "certified": [
            _part(clean > math.sqrt(2) * lipschitz * radius) for radius in config["certified_radii"]
        ],
        "attacked": [],
        "certified but broken": 0.0,
    }
    for radius in config["attack_radii"]:
        found = [attacked(model, a, b, radius, config["attack_steps"]) for a, b in parts]
        least, safe = torch.cat(found), clean > math.sqrt(2) * lipschitz * radius
        result["attacked"].append(_part(least > 0))
        result["certified but broken"] += float((safe & (least <= 0)).sum())
    if config["autoattack"]:
        result["autoattack"] = autoattack(model, x, y, config["autoattack"])
    return result


def autoattack(model: nn.Module, x: Tensor, y: Tensor, radius: float) -> float:
    """Accuracy under the standard AutoAttack in the Euclidean norm, where it is installed."""
    from autoattack import AutoAttack  # pyrefly: ignore

    found = AutoAttack(model, norm="L2", eps=radius, version="standard", device=x.device)
    moved = found.run_standard_evaluation(x, y, bs=500)
    with torch.no_grad():
        parts = zip(moved.split(1000), y.split(1000), strict=True)
        return _part(torch.cat([margins(model(a), b) > 0 for a, b in parts]))


def _part(right: Tensor) -> float:
    return float(right.double().mean())
