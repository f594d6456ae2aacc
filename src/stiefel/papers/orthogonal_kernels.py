"""What convolution kernels reach: the least L_orth from random starts, and errors against size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stiefel.nn import conv_singular_values, lorth, lorth_alpha, orthogonal_conv_exists

Report = Callable[[float, str], None]


def size_errors(kernel: Tensor, stride: int, sizes: Sequence[int]) -> dict[str, Any]:
    """L_orth of a kernel beside the errors of its layer at output sizes N, from singular values.

    ``frobenius`` is ‖𝒦𝒦ᵀ − I‖_F and ``spectral`` ‖𝒦𝒦ᵀ − I‖₂, or their twins for columns; ``bound``
    is √(α L_orth); ``low`` and ``high`` are the extreme singular values.
    """
    result: dict[str, Any] = {
        "lorth": float(lorth(kernel, stride)),
        "sizes": list(sizes),
        "frobenius": [],
        "spectral": [],
    }
    low, high = math.inf, 0.0
    for n in sizes:
        values = conv_singular_values(kernel, n * stride, stride)
        off = values.square() - 1
        result["frobenius"].append(float(off.norm()))
        result["spectral"].append(float(off.abs().max()))
        low, high = min(low, float(values.min())), max(high, float(values.max()))
    alpha = lorth_alpha(kernel.shape, stride)
    return {**result, "bound": math.sqrt(alpha * result["lorth"]), "low": low, "high": high}


def minimise(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Least L_orth that Adam reaches from Xavier starts; one value per architecture and start.

    ``config``: ``architectures`` (M, C, k, S), ``starts`` (seeds), ``steps``, ``lr`` (cosine to 0),
    ``device``. In float64; all starts of an architecture are one stack.
    """
    reached, spans = [], []
    total = len(config["architectures"])
    for done, (m, c, k, s) in enumerate(config["architectures"]):
        x = torch.stack([_xavier((m, c, k, k), start) for start in config["starts"]])
        # Kernels of all starts are the groups of one layer.
        x = x.to(config["device"]).flatten(0, 1).requires_grad_()
        count = len(config["starts"])
        optimizer = torch.optim.Adam([x], lr=config["lr"])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config["steps"])
        for _ in range(config["steps"]):
            optimizer.zero_grad()
            lorth(x, s, groups=count).backward()
            optimizer.step()
            schedule.step()
        kernels = x.detach().cpu().unflatten(0, (count, m))
        reached.append([float(lorth(kernel, s)) for kernel in kernels])
        spans.append([_span(kernel, s) for kernel in kernels])
        report((done + 1) / total, f"{m}, {c}, {k}, {s}: {min(reached[-1]):.1e}")
    reports = [orthogonal_conv_exists(*a) for a in config["architectures"]]
    return {
        "reached": reached,
        "sigma": spans,
        "minimum": [r.minimum for r in reports],
        "exists": [r.exists for r in reports],
        "case": [r.case for r in reports],
    }


def _xavier(shape: tuple[int, ...], seed: int) -> Tensor:
    empty = torch.empty(shape, dtype=torch.float64)
    return nn.init.xavier_uniform_(empty, generator=torch.Generator().manual_seed(seed))


def _span(kernel: Tensor, stride: int) -> list[float]:
    values = conv_singular_values(kernel, 8 * stride, stride)
    return [float(values.min()), float(values.max())]
