"""What S4D is measured by besides training: transfer functions, equal modes, time of kernels."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from stiefel.nn import (
    S4D,
    hippo_legs,
    legs_normal,
    s4d_init,
    transfer_function,
    vandermonde_kernel,
)
from stiefel.papers.paper import Scale
from stiefel.papers.sequence_digits import Report, digits

PARTS = 3
# Lengths at which the kernels are timed, and rounds.
LENGTHS = (256, 1024, 4096)
TIMINGS = 3


def transfer_errors(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """max |G_N(iω) - 1/(iω + 1)| over the band for every order, with B/2 and with B."""
    band = config["band"]
    omega = torch.linspace(-band, band, config["points"], dtype=torch.float64)
    exact = 1 / (1j * omega + 1)
    errors: dict[str, list[float]] = {"half": [], "whole": []}
    for done, n in enumerate(config["orders"]):
        spectrum, v, _ = legs_normal(n)
        inputs = v.mH @ hippo_legs(n)[1].to(v.dtype)
        every = torch.ones(n, dtype=torch.float64)
        for name, factor in (("half", 0.5), ("whole", 1.0)):
            found = transfer_function(spectrum, factor * inputs, v[0].clone(), omega, every)
            errors[name].append(float((found - exact).abs().max()))
        report((done + 1) / len(config["orders"]), f"order {n}")
    return errors


def mode_difference(seed: int) -> float:
    """Largest |difference| between convolution, single steps and three parts, real sequences."""
    generator = torch.Generator().manual_seed(seed)
    pixels = digits(seed)[0][2][:8]
    weights = torch.randn(1, 32, generator=generator)
    u = pixels @ weights
    worst = 0.0
    with torch.no_grad():
        for init in ("legs", "lin", "inv", "real"):
            for disc in ("zoh", "bilinear"):
                layer = S4D(32, 64, init=init, disc=disc, generator=generator, dtype=u.dtype).eval()
                whole, _ = layer(u)
                layer.setup_step()
                for parts in (u.shape[1], PARTS):
                    state, outputs = None, []
                    for part in u.tensor_split(parts, dim=1):
                        if parts == PARTS:
                            y, state = layer(part, state)
                        else:
                            y, state = layer.step(part[:, 0], state)
                            y = y[:, None]
                        outputs.append(y)
                    worst = max(worst, float((torch.cat(outputs, 1) - whole).abs().max()))
    return worst


def plain_kernel(a: Tensor, b: Tensor, c: Tensor, dt: Tensor, length: int) -> Tensor:
    """The two lines of the paper, ZOH: every power of every mode, then a sum over modes."""
    table = torch.exp((dt * a)[..., None] * torch.arange(length))
    return 2 * torch.einsum("hn,hnl->hl", c * b * (torch.exp(dt * a) - 1) / a, table).real


def kernel_times(scale: Scale, seed: int) -> dict[str, Any]:
    """CPU milliseconds of both kernels, in turn, medians; and their errors in float32.

    The ratios (``speedup …``) are those at the largest length.
    """
    channels, state, lengths = (8, 16, (64, 256)) if scale is Scale.SMOKE else (64, 64, LENGTHS)
    generator = torch.Generator().manual_seed(seed)
    a = s4d_init("lin", state)[0].to(torch.complex64).repeat(channels, 1)
    shape = (channels, state // 2)
    b, c = (torch.randn(shape, dtype=a.dtype, generator=generator) for _ in range(2))
    dt = 1e-3 * 100 ** torch.rand(channels, 1, generator=generator)
    leaves = [x.requires_grad_() for x in (a, b, c, dt)]

    def block(length: int, x: Sequence[Tensor] = leaves) -> Tensor:
        return vandermonde_kernel(x[0], x[1], x[2][None], x[3], length)[0]

    def plain(length: int, x: Sequence[Tensor] = leaves) -> Tensor:
        return plain_kernel(x[0], x[1], x[2], x[3], length)

    def backward(make: Callable[[int], Tensor], length: int) -> None:
        torch.autograd.grad(make(length).square().sum(), leaves)

    def forward(make: Callable[[int], Tensor], length: int) -> None:
        with torch.no_grad():
            make(length)

    result: dict[str, Any] = {"lengths": [float(length) for length in lengths]}
    for direction, run in (("forward", forward), ("both", backward)):
        for name, make in (("plain", plain), ("block", block)):
            result[f"{direction} {name}"] = []
            run(make, lengths[0])  # the first call of a kind costs more: not timed
        for length in lengths:
            times: dict[str, list[float]] = {"plain": [], "block": []}
            for _ in range(TIMINGS):
                for name, make in (("plain", plain), ("block", block)):
                    start = time.thread_time()
                    run(make, length)
                    times[name].append(time.thread_time() - start)
            for name, values in times.items():
                result[f"{direction} {name}"].append(1e3 * median(values))
        slow, fast = (result[f"{direction} {name}"][-1] for name in ("plain", "block"))
        result[f"speedup {direction}"] = slow / fast
    with torch.no_grad():
        double = [x.to(torch.complex128 if x.is_complex() else torch.float64) for x in leaves]
        exact = plain(lengths[-1], double)
        for name, make in (("plain", plain), ("block", block)):
            result[f"error {name}"] = float((make(lengths[-1]) - exact).abs().max())
    return result
