"""What the Poincaré ResNet card measures: signals, trainings, means, attacked and foreign images.

At laptop scale the 1,797 digits of scikit-learn; at the authors' scale CIFAR-10, read from
``cifar-10-batches-bin`` in ``STIEFEL_DATA``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from stiefel.data import MissingDataError, photograph
from stiefel.nn.poincare import (
    PoincareBall,
    PoincareLinear,
    PoincareResNet,
    dist,
    expmap0,
    frechet_mean,
    midpoint,
    tangent_add,
)
from stiefel.papers.paper import Scale, UnavailableError
from stiefel.papers.sequence_digits import VARIABLE, Split, cifar10, digits
from stiefel.papers.sequence_digits import settings as data_settings

Report = Callable[[float, str], None]

C = 0.1  # the authors' curvature everywhere
# Adam and cosine as in the sheet: 3e-3 for the perceptron, 1e-2 for the network.
LAPTOP: dict[str, dict[str, Any]] = {
    "perceptron": {"width": 64, "epochs": 10, "batch": 64, "lr": 3e-3, "train": None},
    "network": {
        "data": "digits", "device": "cpu", "channels": [8, 16], "depths": [2, 1], "epochs": 5,
        "batch": 64, "lr": 1e-2, "decay": 0.0, "train": None,
    },
    "means": {"points": 1000, "dim": 16, "radii": [0.1, 0.4, 1.0, 2.0], "draws": 10},
}  # fmt: skip
SMOKE: dict[str, dict[str, Any]] = {
    "perceptron": {**LAPTOP["perceptron"], "epochs": 1, "train": 192},
    "network": {**LAPTOP["network"], "channels": [4], "depths": [1], "epochs": 1, "train": 128},
    "means": {**LAPTOP["means"], "points": 100, "draws": 1},
}
PAPER: dict[str, dict[str, Any]] = {
    **LAPTOP,
    "network": {
        "data": "cifar10", "device": "cuda", "channels": [8, 16, 32], "depths": [3, 3, 3],
        "epochs": 500, "batch": 128, "lr": 1e-3, "decay": 1e-4, "train": None,
    },
}  # fmt: skip
# FGSM steps on inputs in [-1, 1]; the sheet looks at the second and the fourth.
STEPS = (0.0, 0.05, 0.1, 0.2, 0.3)
FOREIGN = 500


def settings(scale: Scale) -> dict[str, Any]:
    """Of perceptron, network and means.

    Raises:
        UnavailableError: no CUDA device or no CIFAR-10 at paper scale; names all that is missing.
    """
    if scale is Scale.PAPER:
        data_settings(scale)
        return dict(PAPER)
    return dict(SMOKE if scale is Scale.SMOKE else LAPTOP)


def perceptron(depth: int, width: int, init: str, seed: int, classes: int | None) -> nn.Sequential:
    """``depth`` Poincaré layers with ReLU on tangent vectors; one more to the classes, if any."""
    ball, generator = PoincareBall(C), torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [PoincareLinear(width, width, ball, init=init, generator=generator), nn.ReLU()]
    if classes is not None:
        layers.append(PoincareLinear(width, classes, ball, init=init, generator=generator))
    return nn.Sequential(*layers)


def signal(seed: int, depths: list[int], init: str) -> list[float]:
    """Mean length of the tangent vectors of 500 digits after each of ``depths`` layers."""
    x = (digits(seed)[0][2][..., 0] + 1) / 2  # as the sheet: pixels in [0, 1]
    found = []
    with torch.no_grad():
        for layer, module in enumerate([None, *perceptron(max(depths), 64, init, seed, None)]):
            x = x if module is None else module(x)
            if layer % 2 == 0 and layer // 2 in depths:
                found.append(float(x.norm(dim=1).mean()))
    return found


def train_perceptron(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Train one perceptron on digits; accuracy on 500 test images, mean loss of every epoch."""
    split, checksum = digits(config["seed"])
    x, y, test_x, test_y = split
    x, test_x = ((t[..., 0] + 1) / 2 for t in (x, test_x))
    x, y = x[: config["train"]], y[: config["train"]]
    model = perceptron(config["depth"], config["width"], config["init"], config["seed"], 10)
    optimizer = torch.optim.Adam(model.parameters(), config["lr"])
    losses = _fit(model, optimizer, (x, y), config, report)
    return {"accuracy": _accuracy(model, test_x, test_y), "losses": losses, "sha256": checksum}


def _fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: tuple[Tensor, Tensor],
    config: Mapping[str, Any],
    report: Report,
) -> list[float]:
    x, y = data
    batches = len(x) // config["batch"]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config["epochs"] * batches)
    generator = torch.Generator().manual_seed(config["seed"])
    losses = []
    for epoch in range(config["epochs"]):
        total, order = 0.0, torch.randperm(len(x), generator=generator)
        for index in order[: batches * config["batch"]].split(config["batch"]):
            loss = nn.functional.cross_entropy(model(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() / batches
        losses.append(total)
        report((epoch + 1) / config["epochs"], f"loss {total:.2f}")
    return losses


def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        right = [
            (model(a).argmax(1) == b).sum() for a, b in zip(x.split(250), y.split(250), strict=True)
        ]
    return float(sum(right)) / len(y)


class EuclideanBlock(nn.Module):
    """The twin of a Poincaré residual block."""

    def __init__(self, in_ch: int, out_ch: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(in_ch, out_ch, 3, stride, 1),
            nn.BatchNorm2d(out_ch),
            nn.ReLU(),
            nn.Conv2d(out_ch, out_ch, 3, 1, 1),
            nn.BatchNorm2d(out_ch),
        )
        same = stride == 1 and in_ch == out_ch
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_ch, out_ch, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, in_ch, H, W]`` to the same with ``out_ch``."""
        return (self.body(x) + self.shortcut(x)).relu()


def network(config: Mapping[str, Any], classes: int, in_ch: int) -> nn.Module:
    """A Poincaré ResNet started as ``config["init"]`` says, or its Euclidean twin."""
    channels, depths, seed = config["channels"], config["depths"], config["seed"]
    if config["init"] != "euclidean":
        generator = torch.Generator().manual_seed(seed)
        return PoincareResNet(
            classes, channels, depths, in_ch, C, init=config["init"], generator=generator
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = [
            nn.Conv2d(in_ch, channels[0], 3, 1, 1),
            nn.BatchNorm2d(channels[0]),
            nn.ReLU(),
        ]
        width = channels[0]
        for group, (out_ch, depth) in enumerate(zip(channels, depths, strict=True)):
            for index in range(depth):
                layers.append(EuclideanBlock(width, out_ch, 2 if group and not index else 1))
                width = out_ch
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]
        return nn.Sequential(*layers)


def images(config: Mapping[str, Any]) -> tuple[Split, str]:
    """Digits ``[n, 1, 8, 8]`` or CIFAR-10 ``[n, 3, 32, 32]`` in [-1, 1], and a checksum."""
    if config["data"] == "digits":
        split, checksum = digits(config["seed"])
    else:
        split, checksum = cifar10(Path(os.environ[VARIABLE]))
    x, y, test_x, test_y = split
    side = round(x.shape[1] ** 0.5)
    return (
        x.mT.unflatten(2, (side, side)), y, test_x.mT.unflatten(2, (side, side)), test_y,
    ), checksum  # fmt: skip


def foreign(count: int, side: int, channels: int, seed: int) -> Tensor:
    """Crops of a photograph, ``[count, channels, side, side]`` in [-1, 1]: not what was learned.

    Raises:
        UnavailableError: the photograph, or Pillow to read it, is not there.
    """
    try:
        pixels = photograph("china").pixels
    except MissingDataError as error:
        raise UnavailableError(str(error)) from error
    picture = pixels.float().movedim(-1, 0) / 127.5 - 1
    if channels == 1:
        picture = picture.mean(0, keepdim=True)
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (
        torch.randint(n - side + 1, (count,), generator=generator) for n in picture.shape[1:]
    )
    return torch.stack(
        [picture[:, r : r + side, k : k + side] for r, k in zip(rows, columns, strict=True)]
    )


def attacked(model: nn.Module, x: Tensor, y: Tensor, step: float) -> Tensor:
    """Images moved by ``step`` along the sign of their gradient (FGSM), within [-1, 1]."""
    moved = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(moved), y), moved)
    return (x + step * gradient.sign()).clamp(-1, 1)


def auroc(own: Tensor, other: Tensor) -> float:
    """Probability that a score of ``own`` is above one of ``other``; ties count half."""
    difference = own[:, None] - other[None]
    return float((difference > 0).double().mean() + (difference == 0).double().mean() / 2)


def train_network(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Train one network; accuracy under FGSM, and AUROC of foreign images by energy."""
    (x, y, test_x, test_y), checksum = images(config)
    place = config["device"]
    x, y = x[: config["train"]].to(place), y[: config["train"]].to(place)
    test_x, test_y = test_x.to(place), test_y.to(place)
    model = network(config, 10, x.shape[1]).to(place)
    optimizer = torch.optim.Adam(model.parameters(), config["lr"], weight_decay=config["decay"])
    losses = _fit(model, optimizer, (x, y), config, report)
    model.eval()
    accuracy = []
    for step in STEPS:
        right = [
            (model(attacked(model, a, b, step)).argmax(1) == b).sum()
            for a, b in zip(test_x.split(250), test_y.split(250), strict=True)
        ]
        accuracy.append(float(sum(right)) / len(test_y))
    others = foreign(FOREIGN, x.shape[-1], x.shape[1], config["seed"]).to(place)
    with torch.no_grad():
        own, other = (model(z[:FOREIGN]).logsumexp(1) for z in (test_x, others))
    return {
        "accuracy": accuracy, "losses": losses, "auroc": auroc(own, other), "sha256": checksum,
    }  # fmt: skip


def karcher(u: Tensor, tol: float = 1e-6) -> Tensor:
    """log₀ of the Fréchet mean by the usual iteration: along the mean of all log_mu."""
    mean = torch.zeros(1, u.shape[1], dtype=u.dtype)
    for _ in range(1000):
        step = tangent_add(-mean, u, C).mean(0, keepdim=True)
        mean = tangent_add(mean, step, C)
        if float(step.norm()) < tol:
            return mean[0]
    raise RuntimeError("Karcher's iteration did not converge in 1,000 steps")


def means(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Distance of midpoint and Fréchet mean over the mean radius, for every radius.

    Points are exp₀ of vectors with independent normal entries, scaled to a mean distance from the
    origin; the mean over several draws.
    """
    generator = torch.Generator().manual_seed(config["seed"])
    gaps = []
    for done, radius in enumerate(config["radii"]):
        total = 0.0
        for _ in range(config["draws"]):
            points = cloud(config["points"], config["dim"], radius, generator)[1]
            total += float(dist(midpoint(points, C), frechet_mean(points, C), C))
        gaps.append(total / config["draws"] / radius)
        report((done + 1) / len(config["radii"]), f"radius {radius:g}")
    return {"gap": gaps}


def cloud(
    points: int, dim: int, radius: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Normal tangent vectors and the points they stand for, ``radius`` from the origin in mean."""
    u = torch.randn(points, dim, generator=generator, dtype=torch.float64)
    u *= radius / 2 / u.norm(dim=1).mean()  # the distance to exp₀(u) is 2|u|
    return u, expmap0(u, C)


def mean_times(config: Mapping[str, Any], seed: int) -> list[float]:
    """CPU time of Karcher's iteration over that of the midpoint, for every radius; medians."""
    generator, ratios = torch.Generator().manual_seed(seed), []
    for radius in config["radii"]:
        u, points = cloud(config["points"], config["dim"], radius, generator)
        tasks = {"midpoint": lambda p=points: midpoint(p, C), "karcher": lambda v=u: karcher(v)}
        times: dict[str, list[float]] = {name: [] for name in tasks}
        for _ in range(5):
            for name, task in tasks.items():
                start = time.thread_time()
                task()
                times[name].append(time.thread_time() - start)
        ratios.append(median(times["karcher"]) / median(times["midpoint"]))
    return ratios
