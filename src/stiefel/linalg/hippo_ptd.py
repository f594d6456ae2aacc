"""HiPPO-LegS perturbed and diagonalised, and what its transfer function does to each frequency.

With P = B/√2, E = t P Pᵀ and B times 1 - t/2, for every output C and with τ = t/(2 - t):

    G_t(s) = G(s) / (1 + τ Π(s)),   Π(s) = Π_{k<n} (s - k)/(s + k + 1),   |Π(iω)| = |ω|/√(ω² + n²)

by the Sherman-Morrison formula from Pᵀ(sI - A)⁻¹P = (1 - Π(s))/2. So |G_t/G - 1| ≤ t/(2 - 2t)
at every frequency and order, while t = 1 (S4D-LegS with B/2) has spikes up to ω ≈ n²/π.

Source: Yu et al., arXiv 2310.01698; closed forms derived here.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Complex128, Float, Float64
from torch import Tensor

from stiefel.linalg.diagonalize import check_t, ptd_diagonalize
from stiefel.linalg.hippo import hippo_legs, legs_normal


def hippo_ptd(
    n: int,
    kind: str = "legs",
    t: float | int = 0.1,
    scale_B: bool = True,
) -> tuple[
    Complex128[Tensor, " modes"],
    Complex128[Tensor, " modes"],
    Complex128[Tensor, "n modes"],
    Float64[Tensor, " modes"],
]:
    """Start of a diagonal state space: HiPPO-LegS plus t P Pᵀ, diagonalised in float64.

    Returns:
        λ ``[modes]`` by increasing imaginary part, one of each conjugate pair and every real one;
        B̃ = V⁻¹ B ``[modes]``; V ``[n, modes]``, the columns kept, so that a real output C becomes
        C̃ = C V; weights ``[modes]``: 2 for a pair, 1 for a real eigenvalue, in
        y = Re Σ w C̃ x. There are n/2 modes unless eigenvalues are real (n < 16 or t ≤ 0.001).

    Args:
        n: order, at least 1.
        kind: ``"legs"``.
        t: in (0, 1]; 1 is the normal part that S4D starts from.
        scale_B: B times 1 - t/2, which makes G exact at frequency 0 and keeps the error uniformly
            below t/(2 - 2t).

    Raises:
        ValueError: ``n`` below 1, ``t`` out of range, unknown ``kind``.
        TypeError: ``n`` is not an integer.
        IllConditionedError: ``t`` is too small for this order.
    """
    if kind != "legs":
        raise ValueError(f"kind must be legs, got {kind!r}")
    a, b = hippo_legs(n)
    found = ptd_diagonalize(a, low_rank="legs", t=t)
    if scale_B:
        b = (1 - t / 2) * b
    inputs = torch.linalg.solve(found.V, b.to(found.V.dtype))
    kept = found.weights > 0
    return found.eigenvalues[kept], inputs[kept], found.V[:, kept], found.weights[kept]


def blaschke(n: int, omega: Float[Tensor, "*points"]) -> Complex128[Tensor, "*points"]:
    """Π(iω) = Π_{k<n} (iω - k)/(iω + k + 1), of modulus |ω|/√(ω² + n²).

    Raises:
        ValueError: ``n`` below 1, or omega not finite.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if not bool(omega.isfinite().all()):
        raise ValueError("omega must be finite, got NaN or infinite entries")
    s = 1j * omega.to(torch.float64)
    product = torch.ones_like(s)
    # No partial product under- or overflows: after k factors the modulus is |ω|/√(ω² + k²).
    for k in range(n):
        product = product * ((s - k) / (s + k + 1))
    return product


def legs_transfer(
    n: int, omega: Float[Tensor, "*points"], t: float | int = 0.0
) -> Complex128[Tensor, "*points"]:
    """G_t(iω) of LegS perturbed by t P Pᵀ, B times 1 - t/2, read out by its first coordinate.

    Without perturbation that is G = 1/(1 + iω) for every n. ``t = 1`` is S4D-LegS with B/2.

    Args:
        n: order.
        omega: angular frequencies in radians per unit of time, any shape.
        t: in [0, 1].

    Raises:
        ValueError: ``n`` below 1, ``t`` out of range, omega not finite.
    """
    if t != 0:
        check_t(t)
    product = blaschke(n, omega)
    return 1 / ((1 + 1j * omega.to(torch.float64)) * (1 + t / (2 - t) * product))


def spike_frequencies(n: int, dt: float | int) -> Float64[Tensor, " spikes"]:
    """Where S4D-LegS of order n resonates, in radians per sample, ascending.

    The imaginary parts of its eigenvalues times ``dt``. The last one of all n/2 is the highest
    spike, at about dt n²/π. Those from π on are left out: a sequence sampled with this step cannot
    hold them.

    Raises:
        ValueError: ``n`` below 1, ``dt`` not positive and finite.
    """
    if not (dt > 0 and math.isfinite(dt)):
        raise ValueError(f"dt must be positive and finite, got {dt}")
    theta = legs_normal(n)[0].imag * dt
    return theta[(theta > 0) & (theta < math.pi)]


def fourier_noise(
    x: Float[Tensor, "*shape"],
    theta: float | int,
    amplitude: float | int,
    generator: torch.Generator | None = None,
    *,
    dim: int = -1,
) -> Float[Tensor, "*shape"]:
    """x plus a sinusoid of one frequency, with a random phase for every sequence.

    Args:
        x: sequences; time is dimension ``dim``.
        theta: radians per sample.
        amplitude: of the sinusoid, in the units of x.
        generator: for the phases.

    Raises:
        ValueError: theta or amplitude not finite, or x has no dimension to be time.
    """
    if not (math.isfinite(theta) and math.isfinite(amplitude)):
        raise ValueError(f"theta and amplitude must be finite, got {theta} and {amplitude}")
    if x.ndim == 0:
        raise ValueError("x must have a dimension for time, got a single number")
    shape, time = list(x.shape), [1] * x.ndim
    length, shape[dim], time[dim] = shape[dim], 1, shape[dim]
    device = generator.device if generator is not None else torch.device("cpu")
    phase = torch.rand(shape, generator=generator, dtype=torch.float64, device=device)
    steps = torch.arange(length, dtype=torch.float64, device=x.device).reshape(time)
    wave = torch.sin(theta * steps + 2 * math.pi * phase.to(x.device))
    return x + amplitude * wave.to(x.dtype)
