"""Trajectories as examples: input slices, target slices, times, equation; normalised by the input.

Statistics of the target never enter: they are not known when a prediction is made.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.nn.lemon.checks import check_finite, visible

# Sheet: constants of the authors' normalisation and metric.
STD_EPS = 1e-6
NORM_EPS = 1e-7
# An input without variance would blow its targets up: its scale is at least this part of its size.
LEAST_SCALE = 1e-3

Index = slice | Tensor | Sequence[int]


@dataclass(frozen=True)
class OperatorData:
    """Examples of an evolution operator, in physical units.

    ``data[rows]`` takes samples (int, slice, list or tensor of indices), ``len(data)`` counts them.

    Raises:
        TypeError: fields that are not floating point.
        ValueError: shapes that do not belong together, no samples, NaN or infinities.
    """

    u_in: Tensor
    """``[n, T_in, n_x, channels]``, what is seen."""
    t_in: Tensor
    """``[n, T_in]``, its times."""
    u_out: Tensor
    """``[n, T_out, n_x, channels]``, what is asked for."""
    t_out: Tensor
    """``[n, T_out]``, its times."""
    tokens: Tensor
    """``[n, L]`` integers, the equations."""
    pad: int = 0
    """The token that fills equations up."""

    def __post_init__(self) -> None:
        for name in ("u_in", "u_out"):
            u = getattr(self, name)
            if not u.is_floating_point():
                raise TypeError(f"{name} must be real floating point, got {u.dtype}")
            if u.ndim != 4 or 0 in u.shape:
                raise ValueError(
                    f"{name} must have shape [samples, times, points, channels] with at least one "
                    f"of each, got {tuple(u.shape)}"
                )
            check_finite(name, u)
        if self.u_in.shape[2:] != self.u_out.shape[2:]:
            raise ValueError(
                f"u_in and u_out must agree in points and channels, got "
                f"{tuple(self.u_in.shape)} and {tuple(self.u_out.shape)}"
            )
        wanted = {
            "t_in": self.u_in.shape[:2],
            "t_out": self.u_out.shape[:2],
            "tokens": (self.u_in.shape[0], self.tokens.shape[-1]),
        }
        for name, shape in wanted.items():
            if tuple(getattr(self, name).shape) != tuple(shape):
                raise ValueError(
                    f"{name} must have shape {tuple(shape)}, got {tuple(getattr(self, name).shape)}"
                )
        if len(self.u_out) != len(self.u_in):
            raise ValueError(f"{len(self.u_in)} inputs but {len(self.u_out)} targets")

    def __len__(self) -> int:
        return len(self.u_in)

    def __getitem__(self, rows: int | Index) -> OperatorData:
        rows = slice(rows, rows + 1 or None) if isinstance(rows, int) else rows
        parts = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name != "pad"}
        return replace(self, **parts)

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What ``PROSE.forward`` takes: u, t_in, t_out, tokens."""
        return self.u_in, self.t_in, self.t_out, self.tokens

    @property
    def target(self) -> Tensor:
        """``u_out``."""
        return self.u_out

    def to(self, device: torch.device | str) -> OperatorData:
        """All tensors on ``device``."""
        return replace(
            self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)[:-1]}
        )

    def normalised(self) -> tuple[OperatorData, Tensor, Tensor]:
        """Inputs and targets in units of the inputs; with mean and scale, see :func:`normalise`."""
        u_in, mean, scale = normalise(self.u_in)
        return replace(self, u_in=u_in, u_out=(self.u_out - mean) / scale), mean, scale

    def noisy(self, level: float | int, generator: torch.Generator | None = None) -> OperatorData:
        """With noise of relative size ``level`` on the inputs, see :func:`add_noise`."""
        return replace(self, u_in=add_noise(self.u_in, level, generator)) if level else self

    @classmethod
    def cat(cls, parts: Sequence[OperatorData]) -> OperatorData:
        """Samples of several data sets; shorter equations are padded.

        Raises:
            ValueError: nothing to join, or grids, times or paddings that differ.
        """
        if not parts:
            raise ValueError("parts must hold at least one data set")
        shapes = {(p.u_in.shape[1:], p.u_out.shape[1:], p.pad) for p in parts}
        if len(shapes) > 1:
            raise ValueError(
                "data sets must agree in times, points, channels and pad, got "
                + " and ".join(sorted(str((tuple(a), tuple(b), pad)) for a, b, pad in shapes))
            )
        longest = max(p.tokens.shape[1] for p in parts)
        joined = {
            f.name: torch.cat([getattr(p, f.name) for p in parts])
            for f in fields(cls)
            if f.name not in ("tokens", "pad")
        }
        tokens = torch.cat([p.padded(longest).tokens for p in parts])
        return cls(**joined, tokens=tokens, pad=parts[0].pad)

    def padded(self, length: int) -> OperatorData:
        """Equations filled up to ``length`` tokens.

        Raises:
            ValueError: one is longer.
        """
        missing = length - self.tokens.shape[1]
        if missing < 0:
            raise ValueError(f"length is {length} but tokens have {self.tokens.shape[1]} columns")
        tokens = torch.nn.functional.pad(self.tokens, (0, missing), value=self.pad)
        return replace(self, tokens=tokens)


def operator_data(
    sample: Any,
    inputs: slice | Sequence[int] | None = None,
    targets: slice | Sequence[int] | None = None,
    *,
    pad: int = 0,
) -> OperatorData:
    """Split trajectories into what is seen and what is asked for.

    Args:
        sample: What ``pde.sample`` returns, or anything with ``u`` ``[n, nt, n_x]`` (or with a last
            axis of channels), ``t`` ``[nt]`` and ``tokens`` ``[n, L]``.
        inputs: Which times are seen: every second of the first half if None.
        targets: Which are asked for: every second of the second half if None.
        pad: The padding token.

    Raises:
        ValueError: shapes that do not belong together, NaN or infinities, no times chosen.
    """
    u, t, tokens = (torch.as_tensor(getattr(sample, name)) for name in ("u", "t", "tokens"))
    u = u[..., None] if u.ndim == 3 else u
    if u.ndim != 4 or t.shape != u.shape[1:2]:
        raise ValueError(
            "u must have shape [n, nt, n_x] or [n, nt, n_x, channels] with t of shape [nt], got "
            f"{tuple(u.shape)} and {tuple(t.shape)}"
        )
    half = u.shape[1] // 2
    seen = slice(0, half, 2) if inputs is None else inputs
    asked = slice(half, None, 2) if targets is None else targets
    t = t.to(u.dtype).expand(len(u), -1)
    return OperatorData(u[:, seen], t[:, seen], u[:, asked], t[:, asked], tokens.long(), pad)


def normalise(
    u: Float[Tensor, "n times points channels"],
) -> tuple[Float[Tensor, "n times points channels"], Tensor, Tensor]:
    """(u − mean) / scale for each sample and channel, over times and points.

    scale is the standard deviation + 1e-6, but at least 1e-3 of the root mean square: an input
    that hardly varies would blow up the targets, which are divided by the same number. An input
    that is 0 throughout has scale 1.

    Returns:
        u normalised, mean and scale ``[n, 1, 1, channels]``.

    Warns:
        UserWarning: some sample needed the bound.
    """
    mean = u.mean((1, 2), keepdim=True)
    std = (u - mean).square().mean((1, 2), keepdim=True).sqrt() + STD_EPS
    size = u.square().mean((1, 2), keepdim=True).sqrt()
    least = torch.where(size > 0, LEAST_SCALE * size, 1.0)
    scale = torch.maximum(std, least)
    if visible(u) and bool((std < least).any()):
        count = int((std < least).flatten(1).any(1).sum())
        warnings.warn(
            f"{count} of {len(u)} inputs hardly vary in space and time; their scale is bounded "
            f"below by {LEAST_SCALE:g} of their size",
            stacklevel=2,
        )
    return (u - mean) / scale, mean, scale


def add_noise(
    u: Float[Tensor, "n times points channels"],
    level: float | int,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "n times points channels"]:
    """u + level · ‖u‖ z / ‖z‖ for each sample, z normal.

    Raises:
        ValueError: a negative or infinite level.
    """
    if not 0 <= level < float("inf"):
        raise ValueError(f"level must be finite and ≥ 0, got {level}")
    z = torch.randn(u.shape, generator=generator, dtype=u.dtype).to(u.device)
    dims = (1, 2, 3)
    norm = torch.linalg.vector_norm
    ratio = norm(u, dim=dims, keepdim=True) / norm(z, dim=dims, keepdim=True)
    return u + level * ratio * z


def relative_l2(prediction: Tensor, target: Tensor) -> Float[Tensor, " n"]:
    """‖prediction − target‖ / (‖target‖ + 1e-7) of each sample, over all its other axes.

    Args:
        prediction, target: ``[n, …]``, at least two axes.

    Returns:
        ``[n]``.

    Raises:
        ValueError: shapes that differ, or no axes beside the samples.
    """
    if prediction.shape != target.shape or target.ndim < 2:
        raise ValueError(
            f"prediction and target must have one shape [n, …], got {tuple(prediction.shape)} "
            f"and {tuple(target.shape)}"
        )
    difference = (prediction - target).flatten(1).norm(dim=1)
    return difference / (target.flatten(1).norm(dim=1) + NORM_EPS)
