"""Perturb, then diagonalise: eigenvectors that can be used, for a matrix that has none.

A highly non-normal matrix has eigenvectors whose condition number κ(V) overflows any floating-point
format, and ``eig`` returns them without a word. A + E with a small E has good ones:

    A + E = V diag(λ) V⁻¹,   κ(V) = ‖V‖ ‖V⁻¹‖ (unit columns),   ‖E‖/‖A‖ the backward error

Sources: Yu et al., arXiv 2310.01698 (PTD); for random E, Banks et al., arXiv 1906.11819.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Complex128, Float64, Shaped
from torch import Tensor

from stiefel.linalg._checks import check_finite
from stiefel.linalg.hippo import hippo_legs
from stiefel.linalg.perturbation_search import search_perturbation

METHODS = ("structured", "random", "optimize")
# B̃ = V⁻¹ B and C̃ = C V lose about κ units in the last place: at 1e8 float32 has nothing left.
MAX_KAPPA = 1e8
# Relative sizes of a random E where none is asked for: as E itself (larger ones make LegS
# unstable), and as the start of a search.
RANDOM_REL, SEARCH_REL = 1e-4, 1e-3
# Imaginary parts below this part of ‖A‖ count as zero.
REAL_TOLERANCE = 1e-9


class IllConditionedError(RuntimeError):
    """The eigenvectors are too close to dependent for what is to be computed with them."""


class PTDResult(NamedTuple):
    """A + E = V diag(λ) V⁻¹."""

    eigenvalues: Complex128[Tensor, " n"]
    """λ by increasing imaginary part (then real part)."""
    V: Complex128[Tensor, "n n"]
    """Eigenvectors, columns of norm 1."""
    V_inv: Complex128[Tensor, "n n"]
    E: Shaped[Tensor, "n n"]
    """The perturbation, float64 or, for complex A, complex128."""
    kappa: float
    """‖V‖ ‖V⁻¹‖ in the spectral norm."""
    backward_error: float
    """‖E‖ / ‖A‖ in the spectral norm: how far away the matrix is that was diagonalised."""
    weights: Float64[Tensor, " n"]
    """How often an eigenvalue counts in a real part: for real A 2 for Im λ > 0 (it stands for its
    conjugate too), 1 for real ones, 0 for Im λ < 0; for complex A all 1."""
    residual: float
    """‖V diag(λ) V⁻¹ - (A + E)‖ / ‖A‖: rounding in the factors themselves."""


def ptd_diagonalize(
    A: Shaped[Tensor, "rows columns"],
    *,
    method: str = "structured",
    rel: float | int | None = None,
    t: float | int = 0.1,
    gamma: float | int = 1e3,
    low_rank: Tensor | str | None = None,
    stable: bool = True,
    max_iter: int = 300,
    generator: torch.Generator | None = None,
    max_kappa: float | int = MAX_KAPPA,
) -> PTDResult:
    """Eigenvalues and well-conditioned eigenvectors of a matrix close to A; in float64 throughout.

    ``"structured"``: E = t P P* for A = (normal) - P P*; P is ``low_rank``. Where P P* completes A
    to a matrix whose numerical range is in the left half plane, A + E is stable for every t ≤ 1.

    ``"random"``: a Gaussian E of spectral norm ``rel`` ‖A‖, complex if A is. κ falls like 1/rel,
    but eigenvalues move a long way: for LegS of order 64 only rel ≤ 1e-3 keeps them stable.

    ``"optimize"``: minimises κ(V) + γ ‖E‖/‖A‖ by gradient descent through ``eig`` (the paper), from
    E = t P P* if ``low_rank`` is given, otherwise from a random E. With ``stable`` a barrier keeps
    eigenvalues to the left, which the paper's objective does not. It looks at κ and ‖E‖ only, not
    at what the system x' = (A + E) x + B u does.

    Args:
        A: ``[n, n]``, any floating-point or complex dtype. Not differentiated.
        rel: ‖E‖/‖A‖ in (0, 1]: of ``"random"`` (1e-4 by default); of the start of ``"optimize"``
            without ``low_rank`` (1e-3); for ``"structured"`` it replaces ``t``.
        t: in (0, 1], the part of P P* that is added.
        gamma: price of the backward error in ``"optimize"``.
        low_rank: P ``[n]`` or ``[n, r]``, or ``"legs"`` for P = B/√2 of HiPPO-LegS.
        stable: refuse results with an eigenvalue on or right of the imaginary axis.
        max_iter: steps of ``"optimize"``.
        generator: for the random E.
        max_kappa: largest condition number allowed; ``inf`` allows all that can be inverted.

    Raises:
        ValueError: A not square, empty or not finite; unknown ``method``; ``rel``, ``t``, ``gamma``
            or ``max_iter`` out of range; ``"structured"`` without ``low_rank``, or one that does
            not fit.
        TypeError: A holds integers; a complex ``low_rank`` or ``"legs"`` does not go with A.
        IllConditionedError: κ(V) above ``max_kappa``.
        RuntimeError: an eigenvalue with Re λ ≥ 0, and ``stable`` is asked for.
    """
    a = _checked(A)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    check_t(t)
    if rel is not None and not 0 < rel <= 1:
        raise ValueError(f"rel must be in (0, 1], got {rel}")
    if not (gamma > 0 and math.isfinite(gamma)):
        raise ValueError(f"gamma must be positive and finite, got {gamma}")
    if not max_kappa >= 1:
        raise ValueError(f"max_kappa must be at least 1, got {max_kappa}")
    norm = float(torch.linalg.matrix_norm(a, 2))
    p = None if low_rank is None else _low_rank(low_rank, a)
    if method == "structured" and p is None:
        raise ValueError(
            'method="structured" needs low_rank: P with A + P P* normal, or "legs"; '
            'for a matrix without such structure use method="optimize" or "random"'
        )
    if method == "random" or p is None:
        size = rel or (RANDOM_REL if method == "random" else SEARCH_REL)
        e = _gaussian(a, size * norm, generator)
    else:
        e = p @ p.mH
        e = e * (t if rel is None else rel * norm / float(torch.linalg.matrix_norm(e, 2)))
    if method == "optimize":
        e = search_perturbation(a, e, float(gamma), stable, max_iter)
    return _factorized(a, e, norm, stable, float(max_kappa))


def check_t(t: float | int) -> None:
    """Raise ``ValueError`` unless ``t`` is in (0, 1]."""
    if not 0 < t <= 1:
        raise ValueError(f"t must be in (0, 1], got {t}")


def _checked(a: Tensor) -> Tensor:
    """A without history, in double precision on its device."""
    if not (a.is_floating_point() or a.is_complex()):
        raise TypeError(f"A must be floating point or complex, got {a.dtype}")
    if a.ndim != 2 or a.shape[0] != a.shape[1] or not a.shape[0]:
        raise ValueError(f"A must be square [n, n], n ≥ 1, got shape {tuple(a.shape)}")
    check_finite(a, "A")
    return a.detach().to(torch.complex128 if a.is_complex() else torch.float64)


def _low_rank(low_rank: Tensor | str, a: Tensor) -> Tensor:
    """P as ``[n, r]`` in the dtype of A."""
    n = a.shape[0]
    if isinstance(low_rank, str):
        if low_rank != "legs":
            raise ValueError(f'low_rank must be a tensor or "legs", got {low_rank!r}')
        if a.is_complex():
            raise TypeError('low_rank="legs" goes with the real matrix LegS, got a complex A')
        return (hippo_legs(n)[1] / math.sqrt(2))[:, None].to(a.device)
    p = low_rank.detach()
    if p.is_complex() and not a.is_complex():
        raise TypeError("low_rank is complex but A is real: A + t P P* would have no pairs")
    if p.ndim not in (1, 2) or p.shape[0] != n or not p.numel():
        raise ValueError(f"low_rank must be [{n}] or [{n}, r], got shape {tuple(p.shape)}")
    check_finite(p, "low_rank")
    if not bool(p.any()):
        raise ValueError("low_rank must not be zero")
    return p.reshape(n, -1).to(a)


def _gaussian(a: Tensor, size: float, generator: torch.Generator | None) -> Tensor:
    """Independent normal entries, scaled to spectral norm ``size``."""
    device = generator.device if generator is not None else torch.device("cpu")
    e = torch.randn(a.shape, dtype=a.dtype, generator=generator, device=device).to(a.device)
    return e * (size / torch.linalg.matrix_norm(e, 2))


def _factorized(a: Tensor, e: Tensor, norm: float, stable: bool, max_kappa: float) -> PTDResult:
    spectrum, v = torch.linalg.eig(a + e)
    rightmost = float(spectrum.real.max())
    if stable and not rightmost < 0:
        raise RuntimeError(
            f"A + E has an eigenvalue with real part {rightmost:.3g}: the system is unstable. "
            "Take a smaller perturbation or another method; stable=False allows it"
        )
    values = torch.linalg.svdvals(v)
    kappa = float(values[0] / values[-1])  # inf where the last one is zero
    if not kappa <= max_kappa or math.isinf(kappa):
        raise IllConditionedError(
            f"the eigenvectors have condition number {kappa:.1e}, at most {max_kappa:.3g} is "
            "allowed: take a larger perturbation"
        )
    # Sorted by imaginary part, then real part; LAPACK's pairs of a real matrix are exact.
    order = spectrum.real.argsort(stable=True)
    order = order[spectrum.imag[order].argsort(stable=True)]
    spectrum, v = spectrum[order], v[:, order]
    inverse = torch.linalg.inv(v)
    weights = torch.ones_like(spectrum.real)
    if not a.is_complex():
        real = spectrum.imag.abs() <= REAL_TOLERANCE * norm
        weights = torch.where(real, 1.0, 1.0 + spectrum.imag.sign())
    wrong = (v * spectrum) @ inverse - (a + e)
    scale = norm if norm > 0 else 1.0
    return PTDResult(
        eigenvalues=spectrum,
        V=v,
        V_inv=inverse,
        E=e,
        kappa=kappa,
        backward_error=float(torch.linalg.matrix_norm(e, 2)) / scale,
        weights=weights,
        residual=float(torch.linalg.matrix_norm(wrong, 2)) / scale,
    )
