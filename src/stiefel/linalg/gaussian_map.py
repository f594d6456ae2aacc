"""How the length of a random signal changes from layer to layer, and the gain that keeps it.

A layer x ← g W φ(x) with W random orthogonal (or Gaussian of variance 1/n) takes the mean square q
of a wide layer's entries to g² E φ(√q z)², z standard normal; a small perturbation grows by
g² E φ'(√q z)². Both expectations are integrals over half lines, so a kink of φ at 0 costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

Activation = str | nn.Module | Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "leaky_relu": nn.functional.leaky_relu,
    "elu": nn.functional.elu,
    "selu": nn.functional.selu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "softplus": nn.functional.softplus,
    "sigmoid": torch.sigmoid,
    "softsign": nn.functional.softsign,
    "erf": torch.erf,
    "hardtanh": nn.functional.hardtanh,
}
# Gaussian weight beyond is 1e-25.
_REACH = 10.5
_PANELS, _NODES = 24, 16
# Lengths between which a fixed point is looked for.
_SMALLEST_LENGTH, _LARGEST_LENGTH = 1e-12, 1e12
# Length of a signal so short that φ is its tangents at 0, left and right.
_AT_REST = 1e-30
# |g² E φ² / q − 1| at both ends up to which the map counts as keeping every length.
_NEUTRAL = 1e-9


def as_activation(phi: Activation) -> Callable[[Tensor], Tensor]:
    """The function behind a name, a module or a function.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor callable.
    """
    if isinstance(phi, str):
        if phi not in ACTIVATIONS:
            raise ValueError(f"phi must be one of {', '.join(ACTIVATIONS)}, got {phi!r}")
        return ACTIVATIONS[phi]
    if not callable(phi):
        raise TypeError(f"phi must be a name or a callable, got {type(phi).__name__}")
    return phi


def length_map(
    phi: Activation, q: Float[Tensor, "*#batch"], g: Float[Tensor, "*#batch"] | float | int = 1.0
) -> Tensor:
    """One layer of the length map, g² E φ(√q z)², elementwise.

    q and g broadcast; differentiable in both (q > 0).

    Source: arXiv 1312.6120, section 4 (nonlinear networks).
    """
    z, weight = (x.to(q.device, q.dtype) for x in _normal())
    image = as_activation(phi)(q.sqrt().unsqueeze(-1) * z)
    return g**2 * (image.square() * weight).sum(-1)


def slope(phi: Activation, q: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """E φ'(√q z)², elementwise: by how much a perturbation's mean square grows at gain 1."""
    function = as_activation(phi)
    z, weight = (x.to(q.device, q.dtype) for x in _normal())
    with torch.enable_grad():
        x = (q.detach().sqrt().unsqueeze(-1) * z).requires_grad_()
        (derivative,) = torch.autograd.grad(function(x).sum(), x)
    return (derivative.square() * weight).sum(-1)


def q_fixed_point(phi: Activation, g: Float[Tensor, "*batch"] | float | int) -> Tensor:
    """The length q∞ at which deep layers settle: q∞ = g² E φ(√q∞ z)².

    0 where every length dies out. Differentiable in g (implicitly, through the fixed point).

    Args:
        phi: Activation: a name ("tanh", "relu", …), an ``nn.Module`` or a function of tensors.
        g: Gain, > 0; a number or a tensor of gains.

    Returns:
        Float64 tensor with the shape of ``g``.

    Raises:
        ValueError: g is not positive and finite; lengths grow without bound; every length is a
            fixed point (linear at g = 1, ReLU at √2).

    Source: arXiv 1312.6120, section 4: tanh has q∞ > 0 from g = 1 on.
    """
    gain = torch.as_tensor(g, dtype=torch.float64)
    if not bool((gain.isfinite() & (gain > 0)).all()):
        raise ValueError(f"g must be positive and finite, got {g}")
    with torch.no_grad():
        q, dies, neutral, grows = _settle(phi, gain)
    if bool(neutral.any()):
        raise ValueError(
            f"at g = {g} this activation keeps every length: no fixed point is singled out"
        )
    if bool(grows.any()):
        raise ValueError(f"at g = {g} lengths grow without bound under this activation")
    one = q.clone().requires_grad_()
    with torch.enable_grad():
        (rate,) = torch.autograd.grad(length_map(phi, one, gain.detach()).sum(), one)
    # A Newton step from the root changes nothing but carries the derivative with respect to g.
    root = q + (length_map(phi, q, gain) - q) / torch.where(dies, 1.0, 1 - rate)
    return torch.where(dies, torch.zeros_like(root), root)


def _settle(phi: Activation, gain: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The length at which layers of each gain settle; where it is 0, arbitrary, or infinite."""
    low = torch.full_like(gain, math.log(_SMALLEST_LENGTH))
    high = torch.full_like(gain, math.log(_LARGEST_LENGTH))
    at_low, at_high = (_excess(phi, end, gain) for end in (low, high))
    neutral = (at_low.abs() < _NEUTRAL) & (at_high.abs() < _NEUTRAL)
    for _ in range(60):  # halves ln q: from a range of 55 to below rounding
        middle = (low + high) / 2
        above = _excess(phi, middle, gain) > 0
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return ((low + high) / 2).exp(), at_low <= 0, neutral, at_high >= 0


def critical_gain(phi: Activation) -> float:
    """The gain at the edge of chaos: the smallest at which perturbations no longer die out.

    There g² E φ'(√q z)² = 1 at the length q where deep layers settle. 1 for tanh and linear layers,
    √2 for ReLU.

    Args:
        phi: Activation: a name ("tanh", "relu", …), an ``nn.Module`` or a function of tensors.

    Raises:
        ValueError: an unknown name, or no gain in 0.01..100 is critical (a constant, say).

    Source: arXiv 1312.6120, section 4 and its appendix on the critical gain.
    """
    function = as_activation(phi)
    zero = torch.zeros((), dtype=torch.float64)
    rest = float(slope(function, zero + _AT_REST))
    # With φ(0) = 0 the signal dies out up to the gain at which its perturbations do: it is one.
    if abs(float(function(zero))) < 1e-12 and rest > 0:
        gain = 1 / math.sqrt(rest)
        lengths = torch.logspace(-12, 12, 241, dtype=torch.float64).log()
        if bool((_excess(function, lengths, zero + gain) > _NEUTRAL).any()):
            raise ValueError(
                f"small signals are at the edge at g = {gain:.4g}, but longer ones grow without "
                "bound there: this activation has no edge of chaos without biases"
            )
        return gain
    gains = torch.logspace(-2, 2, 401, dtype=torch.float64)
    chaotic = _growth(function, gains) >= 1
    if not bool(chaotic.any()) or bool(chaotic[0]):
        raise ValueError("no gain between 0.01 and 100 is critical for this activation")
    first = int(chaotic.nonzero()[0, 0])
    low, high = gains[first - 1], gains[first]
    for _ in range(50):
        middle = (low + high) / 2
        above = bool(_growth(function, middle) >= 1)
        low, high = (low, middle) if above else (middle, high)
    return float((low + high) / 2)


def _growth(phi: Activation, gain: Tensor) -> Tensor:
    """Growth of perturbations where each gain settles; NaN where lengths grow without bound."""
    q, _, _, grows = _settle(phi, gain)
    return torch.where(grows, torch.nan, gain**2 * slope(phi, q))


def _excess(phi: Activation, log_q: Tensor, gain: Tensor) -> Tensor:
    """g² E φ² / q − 1: positive below the fixed point."""
    return length_map(phi, log_q.exp(), gain) / log_q.exp() - 1


@lru_cache(maxsize=1)
def _normal() -> tuple[Tensor, Tensor]:
    """Nodes and weights for E f(z), panels of Gauss–Legendre that meet at 0; weights sum to 1."""
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    edges = np.linspace(-_REACH, _REACH, 2 * _PANELS + 1)
    half = (edges[1] - edges[0]) / 2
    z = (edges[:-1, None] + half * (nodes + 1)).ravel()
    density = np.tile(half * weights, 2 * _PANELS) * np.exp(-(z**2) / 2)
    return torch.from_numpy(z), torch.from_numpy(density / density.sum())
