"""How the diagonal of S4D starts, and how continuous systems become steps.

Source: Gu et al., arXiv 2206.11893, sections 3 (discretisation) and 4 (initialisations); shapes and
constants follow the authors' code.
"""

from __future__ import annotations

import math
import operator

import torch
from jaxtyping import Complex, Complex128, Shaped
from torch import Tensor

from stiefel.linalg.hippo import legs_normal

INITS = ("legs", "lin", "inv", "real", "random")
DISCRETISATIONS = ("zoh", "bilinear")
# What the authors' code does to the imaginary part of B.
OFFICIAL_CLIP = 2.0
# Stands for A = 0, where (Ā - 1)/A is dt; any number small beside 1/dt would do.
_ALMOST_ZERO = 1e-30


def s4d_init(
    kind: str,
    d_state: int,
    *,
    scale_real: float | int = 1.0,
    scale_imag: float | int = 1.0,
    official_clip: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Complex128[Tensor, " modes"], Complex128[Tensor, " modes"]]:
    """Diagonal A and input vector B, ``d_state / 2`` entries each: one of every conjugate pair.

    ===========  ==================================================================
    ``legs``     eigenvalues of the normal part of HiPPO-LegS, B = V* B_LegS
    ``lin``      -1/2 + iπn
    ``inv``      -1/2 + i (N/π) (N/(2n+1) - 1)
    ``real``     -(n+1)
    ``random``   -1/2 + i exp(standard normal): the ablation
    ===========  ==================================================================

    B is 1 except for ``legs``. Sorted by increasing imaginary part (``real``: by n).

    Args:
        d_state: N, the full state size, even.
        scale_real, scale_imag: factors on the real and imaginary parts of A.
        official_clip: clamp Im B to [-2, 2] like the authors' code. That result depends on the
            arbitrary phases of eigenvectors (here: first component positive).
        generator: for ``random``.

    Raises:
        ValueError: unknown ``kind``; ``d_state`` odd or below 2; ``scale_real`` not positive;
            ``scale_imag`` not finite.
    """
    if kind not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {kind!r}")
    d_state = check_state_size(d_state)
    if not (scale_real > 0 and math.isfinite(scale_real)):
        raise ValueError(f"scale_real must be positive (A must be stable), got {scale_real}")
    if not math.isfinite(scale_imag):
        raise ValueError(f"scale_imag must be finite, got {scale_imag}")
    modes = d_state // 2
    n = torch.arange(modes, dtype=torch.float64)
    real, imaginary = torch.full_like(n, -0.5), torch.zeros_like(n)
    b = torch.ones(modes, dtype=torch.complex128)
    if kind == "legs":
        spectrum, v, p = legs_normal(d_state)
        imaginary = spectrum[modes:].imag
        b = (v.mH @ (math.sqrt(2) * p).to(v.dtype))[modes:]
    elif kind == "lin":
        imaginary = math.pi * n
    elif kind == "inv":
        imaginary = (d_state / math.pi * (d_state / (2 * n + 1) - 1)).flip(0)
    elif kind == "real":
        real = -(n + 1)
    else:
        device = generator.device if generator is not None else "cpu"
        draw = torch.randn(modes, generator=generator, dtype=torch.float64, device=device)
        imaginary = draw.exp().sort().values.cpu()
    if official_clip:
        b = torch.complex(b.real, b.imag.clamp(-OFFICIAL_CLIP, OFFICIAL_CLIP))
    return torch.complex(scale_real * real, scale_imag * imaginary), b


def check_state_size(d_state: int) -> int:
    """Raise ``ValueError`` unless ``d_state`` is even and at least 2."""
    d_state = operator.index(d_state)
    if d_state < 2 or d_state % 2:
        raise ValueError(
            f"d_state must be even and at least 2 (conjugate pairs are stored once), got {d_state}"
        )
    return d_state


def check_discretisation(disc: str) -> None:
    """Raise ``ValueError`` for an unknown rule."""
    if disc not in DISCRETISATIONS:
        raise ValueError(f"disc must be one of {', '.join(DISCRETISATIONS)}, got {disc!r}")


def discretize(
    a: Complex[Tensor, "*#shape"],
    b: Complex[Tensor, "*#shape"],
    dt: Shaped[Tensor, "*#shape"],
    disc: str = "zoh",
) -> tuple[Complex[Tensor, "*shape"], Complex[Tensor, "*shape"]]:
    """(log Ā, B̄) of the step x_t = Ā x_{t-1} + B̄ u_t.

    ``zoh``: Ā = exp(dt A), B̄ = (Ā - 1)/A · B, exact for inputs that are constant over a step.
    ``bilinear``: Ā = (1 + dt A/2)/(1 - dt A/2), B̄ = dt B/(1 - dt A/2).

    Raises:
        ValueError: unknown ``disc``.
    """
    check_discretisation(disc)
    z = dt * a
    if disc == "zoh":
        a = torch.where(a == 0, _ALMOST_ZERO, a)
        return z, b * torch.expm1(dt * a) / a
    ratio = (1 + z / 2) / (1 - z / 2)
    # A real pole at exactly -2/dt gives Ā = 0, whose logarithm would turn 0 · log into NaN.
    ratio = torch.where(ratio == 0, torch.finfo(ratio.real.dtype).tiny, ratio)
    return torch.log(ratio), dt * b / (1 - z / 2)
