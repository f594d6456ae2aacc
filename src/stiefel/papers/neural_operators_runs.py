"""The trainings behind the card of neural operators.

A network is trained on one grid and tested on all of them. Errors are relative L². At the paper's
scale the data are the authors' Navier–Stokes fields (forcing to vorticity), two files of
``STIEFEL_DATA``; else Burgers' equation.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stiefel.nn.operators import InputOutputInterpolation, convert, quadrature, relative_l2
from stiefel.papers.neural_operators_burgers import trajectories
from stiefel.papers.neural_operators_networks import LinearAttention, build
from stiefel.papers.paper import Scale, UnavailableError

Report = Callable[[float, str], None]
Fields = tuple[Tensor, Tensor, Tensor, Tensor]

VARIABLE = "STIEFEL_DATA"
# As published with the authors' package: dicts of "x" and "y", [count, 128, 128] and 1024².
FILES = ("nsforcing_train_128.pt", "nsforcing_test_1024.pt")
FINEST = 512
DECAY = 1e-4
# Training and test functions come from streams of their own.
TEST_STREAM = 10_000

LAPTOP: dict[str, Any] = {
    "data": "burgers", "device": "cpu", "ndim": 1, "width": 24, "modes": 16, "epochs": 20,
    "batch": 20, "rate": 6e-3, "train": 300, "test": 100, "base": 64,
    "sizes": [32, 64, 128, 256, 512],
}  # fmt: skip
SMOKE = {**LAPTOP, "width": 8, "modes": 8, "epochs": 2, "train": 40, "test": 10}
# Widths, modes and batch of the paper's FNO; the rest of the recipe stays.
PAPER = {
    **LAPTOP, "data": "navier-stokes", "device": "cuda", "ndim": 2, "width": 62, "modes": 64,
    "epochs": 300, "batch": 16, "rate": 1e-3, "train": 10_000, "test": 1000, "base": 128,
    "sizes": [64, 128, 256, 512, 1024],
}  # fmt: skip


def settings(scale: Scale) -> dict[str, Any]:
    """What all trainings of one scale have in common.

    Raises:
        UnavailableError: no CUDA device or no files at paper scale; names all that is missing.
    """
    if scale is not Scale.PAPER:
        return dict(SMOKE if scale is Scale.SMOKE else LAPTOP)
    missing = [] if torch.cuda.is_available() else ["a CUDA device"]
    folder = os.environ.get(VARIABLE)
    if not folder:
        missing.append(f"Navier–Stokes fields: set {VARIABLE} to a folder with {', '.join(FILES)}")
    else:
        missing += [str(Path(folder) / f) for f in FILES if not (Path(folder) / f).is_file()]
    if missing:
        raise UnavailableError(f"the paper scale needs {'; and '.join(missing)}")
    return dict(PAPER)


def fields(config: Mapping[str, Any]) -> Fields:
    """Training inputs and outputs, test inputs and outputs, ``[count, 1, *grid]``, float32."""
    if config["data"] == "navier-stokes":
        return navier_stokes(Path(os.environ[VARIABLE]), config["train"], config["test"])
    return burgers(config["seed"], config["train"], config["test"])


@lru_cache(maxsize=2)
def burgers(seed: int, train: int, test: int) -> Fields:
    """Initial and final values on 512 points; every seed has its own functions."""
    found = []
    for count, stream in ((train, seed), (test, TEST_STREAM + seed)):
        pair = trajectories(count, stream, points=FINEST)
        found += [torch.from_numpy(values).float()[:, None] for values in pair]
    return found[0], found[1], found[2], found[3]


def navier_stokes(folder: Path, train: int, test: int) -> Fields:
    """Forcing and vorticity, training on 128² and test on 1024²; forcing has mean 0, variance 1.

    Raises:
        ValueError: a file does not hold ``x`` and ``y`` of one shape, or too few of them.
    """
    found: list[Tensor] = []
    for name, count in zip(FILES, (train, test), strict=True):
        content = torch.load(folder / name, map_location="cpu", weights_only=True)
        x, y = (content.get(key) for key in ("x", "y"))
        if x is None or y is None or x.shape != y.shape or x.ndim != 3 or len(x) < count:
            raise ValueError(f"{folder / name} must hold x and y, [{count} or more, n, n]")
        found += [x[:count, None].float(), y[:count, None].float()]
    mean, std = found[0].mean(), found[0].std()
    return (found[0] - mean) / std, found[1], (found[2] - mean) / std, found[3]


def on(x: Tensor, points: int) -> Tensor:
    """The same functions on a coarser grid, of which every axis has so many points."""
    step = x.shape[-1] // points
    return x[(..., *(slice(None, None, step) for _ in x.shape[2:]))]


def fit(
    net: nn.Module, data: tuple[Tensor, Tensor], sizes: list[int], config: Mapping[str, Any],
    report: Report,
) -> None:  # fmt: skip
    """Train on grids drawn from ``sizes``, batch by batch; leaves the network in eval mode."""
    inputs = {n: on(data[0], n).to(config["device"]) for n in sizes}
    outputs = {n: on(data[1], n).to(config["device"]) for n in sizes}
    generator = torch.Generator().manual_seed(config["seed"])
    epochs, count = config["epochs"], len(data[0])
    optimizer = torch.optim.AdamW(net.parameters(), lr=config["rate"], weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config["rate"], epochs=epochs, steps_per_epoch=-(-count // config["batch"])
    )
    loss = torch.zeros(())
    for epoch in range(epochs):
        for rows in torch.randperm(count, generator=generator).split(config["batch"]):
            n = sizes[int(torch.randint(len(sizes), (), generator=generator))]
            loss = relative_l2(net(inputs[n][rows]), outputs[n][rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        report((epoch + 1) / epochs, f"training error {loss.item():.3f}")
    net.eval()


@torch.no_grad()
def errors(net: nn.Module, data: tuple[Tensor, Tensor], config: Mapping[str, Any]) -> list[float]:
    """Mean relative error over the test functions, for every grid."""
    found = []
    for n in config["sizes"]:
        total = 0.0
        parts = max(1, 2**22 // n ** config["ndim"])  # large fields a few at a time
        for u, exact in zip(*(on(x, n).split(parts) for x in data), strict=True):
            y = net(u.to(config["device"])).cpu()
            total += float(relative_l2(y, exact, reduction="sum"))
        found.append(total / len(data[0]))
    return found


def trained(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Train one network at the base grid; errors on all grids, of the CNN also converted.

    config: :data:`LAPTOP` or the like, and ``model`` and ``seed``.
    """
    data, base = fields(config), config["base"]
    net = build(config["model"], config["width"], config["seed"], config["ndim"], config["modes"])
    net.to(config["device"])
    fit(net, data[:2], [base], config, report)
    test = data[2:]
    found: dict[str, Any] = {"plain": errors(net, test, config)}
    if config["model"] == "fno":
        return found
    converted = convert(net, base)
    nets = {
        "converted": converted,
        "official": convert(net, base, interpolation="official"),
        "interpolated": InputOutputInterpolation(net, (base,) * config["ndim"]),
    }
    for name, other in nets.items():
        found[name] = errors(other, test, config)
    with torch.no_grad():
        x = on(test[0][:100], base).to(config["device"])
        found["identity"] = float((converted(x) - net(x)).abs().max())
        x, y = on(test[0][:1], 4 * base), on(test[1][:1], 4 * base)
        answers = {name: f(x.to(config["device"])).cpu() for name, f in (
            ("plain", net), ("converted", converted))}  # fmt: skip
    # Of fields on a plane the first row is drawn.
    lines = {"input": x, "truth": y, **answers}
    found["field"] = {k: v.reshape(-1, v.shape[-1])[0].tolist() for k, v in lines.items()}
    return found


def other(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """:func:`u_net`, :func:`sums` or :func:`attention`, as ``config["run"]`` says."""
    runs = {"unet": u_net, "unet mixed": u_net, "linear": sums, "softmax": attention}
    return runs[config["run"]](config, report)


def u_net(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """A U-Net trained at the base grid, converted in several ways, or trained on several grids.

    config: as :func:`trained`, and ``grids``: one or several to train on. With several the network
    is converted first.
    """
    data, base = fields(config), config["base"]
    test = data[2:]
    net = build("unet", 0, config["seed"])
    if len(config["grids"]) > 1:
        net = convert(net, base)
        fit(net, data[:2], config["grids"], config, report)
        return {"trained": errors(net, test, config)}
    fit(net, data[:2], config["grids"], config, report)
    return {
        "plain": errors(net, test, config),
        "converted": errors(convert(net, base), test, config),
        "linear": errors(convert(net, base, resample="linear"), test, config),
        "official": errors(convert(net, base, interpolation="official"), test, config),
        "interpolated": errors(InputOutputInterpolation(net, base), test, config),
    }


def attention(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Softmax attention trained at the base grid, tested where the points are not uniform.

    Errors without and with quadrature weights, on the uniform grid of 64 points and on subsets of
    the finest grid: three with clustered points, and every eighth but for a part that has all.
    """
    data, base = fields(config), config["base"]
    test = data[2:]
    net = build("softmax", config["width"], config["seed"])
    fit(net, data[:2], [base], config, report)
    operator = convert(net, base)
    found: dict[str, Any] = {"points": [], "plain": [], "weighted": [], "weight ratio": []}
    for index in point_sets(config["seed"], base):
        x = index.to(torch.float64) / FINEST
        w = quadrature("circle", x).float()
        u, exact = test[0][..., index], test[1][..., index]
        found["points"].append(len(index))
        found["weight ratio"].append(float(w.max() / w.min()))
        with torch.no_grad():
            plain = operator(u, x=x.float())
            weighted = operator(u, x=x.float(), weights=w)
        found["plain"].append(float(relative_l2(plain, exact, w)))
        found["weighted"].append(float(relative_l2(weighted, exact, w)))
    return found


def sums(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Linear attention trained at the base grid; its integral as an average, and as a plain sum.

    The sum has the factor of the base grid, 1 / 64: there both are the same.
    """
    data = fields(config)
    net = build("linear", config["width"], config["seed"])
    fit(net, data[:2], [config["base"]], config, report)
    found = {"weighted": errors(net, data[2:], config)}
    for layer in net.modules():
        if isinstance(layer, LinearAttention):
            layer.count = config["base"]
    return {**found, "summed": errors(net, data[2:], config)}


def point_sets(seed: int, base: int) -> list[Tensor]:
    """Sorted indices into the finest grid: uniform, three clustered, one refined in a part."""
    generator = torch.Generator().manual_seed(seed)
    every = FINEST // base
    sets = [torch.arange(0, FINEST, every)]
    for depth in (0.5, 0.7, 0.8):
        # x + a sin 2πx / 2π has the density 1 / (1 + a cos 2πx): up to (1 + a) / (1 − a).
        t = (torch.arange(2 * base) + torch.rand((), generator=generator)) / (2 * base)
        x = t + depth * torch.sin(2 * math.pi * t) / (2 * math.pi)
        sets.append((x * FINEST).round().long().remainder(FINEST).unique())
    dense = torch.arange(FINEST // 4, FINEST // 2)
    sets.append(torch.cat((sets[0], dense)).unique())
    return sets
