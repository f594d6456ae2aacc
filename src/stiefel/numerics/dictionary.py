"""Online orthogonal dictionary learning by stochastic Frank–Wolfe (arXiv 2103.01484).

A stream of vectors y = D x with D orthogonal and x sparse. The analysis matrix A ≈ Dᵀ, up to the
order and the signs of its rows, maximises F(A) = E‖A y‖_p^p, p > 2: of two vectors of one length
the sparser has the larger high-order norm. F is convex, so its maximum over the spectral-norm ball
lies at an extreme point, which is an orthogonal matrix: relaxing the constraint costs nothing.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.linalg import dct_matrix, haar, newton_schulz, polar

Oracle = Literal["svd", "newton-schulz"]

# The powers of the paper's rate O(ln t / t^(1/4)): moves γ = t^(-3/4), averaging ρ = t^(-1/2).
STEP_POWER, AVERAGING_POWER = 0.75, 0.5
# Six steps with a large slope at 0 bring singular values into [0.68, 1.20], four with slope 0 at 1
# end there to rounding.
_TRIPLES = [(3.4445, -4.7750, 2.0315)] * 6 + [(15 / 8, -10 / 8, 3 / 8)] * 4
# Where the maximiser is not unique (centred samples, fewer samples than dimensions) the one closest
# to A is taken: this part of A, in the precision's units, stands far above rounding and below
# everything else. Without it rounding decides, and the null space of A jumps from step to step.
_TIE = 1e3
# An oracle may miss this part of the nuclear norm.
INEXACT = 1e-3


class NoGradientWarning(UserWarning):
    """A mini-batch is zero (or its powers underflow): the dictionary was left as it was."""


class DictionaryState(NamedTuple):
    """What the method remembers: two matrices and a number, however long the stream."""

    A: Any
    """Analysis matrix ``[..., n, n]`` in the spectral-norm ball; its polar factor is orthogonal."""
    G: Any
    """Averaged gradient ``[..., n, n]``."""
    t: Any
    """Steps taken: an integer, or a tensor without dimensions."""


def start_dictionary(
    n: int,
    init: str | Float[Tensor, "*batch n n"] = "random",
    *,
    batch: Sequence[int] = (),
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> DictionaryState:
    """The state before the first batch: A₀ orthogonal, G₀ = 0, t = 0.

    Args:
        n: length of the vectors, ≥ 1.
        init: ``"random"`` (Haar), ``"dct"`` (the one-dimensional DCT-II) or a matrix, of which the
            closest orthogonal one is taken.
        batch: leading dimensions: so many dictionaries learn side by side. A given matrix brings
            its own.
        generator: of the random start.
        dtype: float32 or float64; a given matrix is converted.
        device: of the state; by default the generator's or the matrix's.

    Raises:
        ValueError: ``n`` below 1, unknown ``init``, a matrix of another size or not finite.
        TypeError: ``dtype`` is neither float32 nor float64.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    if isinstance(init, Tensor):
        if init.shape[-2:] != (n, n):
            raise ValueError(f"init must be [..., {n}, {n}], got shape {tuple(init.shape)}")
        if not bool(init.isfinite().all()):
            raise ValueError("init must be finite, got NaN or Inf")
        a = polar(init.to(device=device or init.device, dtype=dtype))
    elif init == "random":
        draws = [haar(n, generator=generator, dtype=dtype) for _ in range(math.prod(batch))]
        a = torch.stack(draws).reshape(*batch, n, n)
    elif init == "dct":
        a = dct_matrix(n, dtype=dtype).expand(*batch, n, n).clone()
    else:
        raise ValueError(f"init must be 'random', 'dct' or a matrix, got {init!r}")
    a = a if device is None else a.to(device)
    return DictionaryState(a, torch.zeros_like(a), 0)


def power_gradient(
    A: Float[Tensor, "*batch n n"], Y: Float[Tensor, "*batch n B"], p: float | int = 3
) -> Float[Tensor, "*batch n n"]:
    """Gradient of F(A) = (1/B) Σ‖A y‖_p^p over a mini-batch: (p/B) (|Z|^(p-2) ∘ Z) Yᵀ, Z = A Y.

    The gradient of a batch is the mean of its parts' gradients, weighted by their sizes: in data
    parallel work each rank calls this, the mean goes into :func:`fw_update` everywhere.

    Args:
        A: analysis matrices.
        Y: samples as columns.
        p: order of the norm, above 2.

    Raises:
        ValueError: ``p`` ≤ 2 or not finite, an empty batch, NaN or Inf in ``Y``, or powers that
            overflow.
        TypeError: ``A`` and ``Y`` differ in dtype, or it is neither float32 nor float64.
    """
    check_order(p)
    if torch.compiler.is_compiling():
        return _gradient(A, Y, p)
    if A.dtype != Y.dtype or A.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"A and Y must both be float32 or both float64, got {A.dtype} and {Y.dtype}"
        )
    if Y.shape[-1] == 0:
        raise ValueError(f"Y must hold at least one sample, got shape {tuple(Y.shape)}")
    if not bool(Y.isfinite().all()):
        raise ValueError("Y must be finite, got NaN or Inf")
    return _finite(_gradient(A, Y, p))


def _gradient(A: Tensor, Y: Tensor, p: float | int) -> Tensor:
    z = A @ Y
    size = z.abs() if p == 3 else z.square() if p == 4 else z.abs().pow(p - 2)
    return (size * z) @ Y.mT * (p / Y.shape[-1])


def _finite(g: Tensor) -> Tensor:
    if not bool(g.isfinite().all()):
        raise ValueError(
            "the gradient must be finite, got NaN or Inf: powers of Y overflow; "
            "divide all data by one number (the result does not depend on it)"
        )
    return g


def linear_oracle(
    G: Float[Tensor, "*batch n n"], method: Oracle = "svd"
) -> Float[Tensor, "*batch n n"]:
    """argmax of ⟨S, G⟩ over ‖S‖₂ ≤ 1: the polar factor of G, where ⟨S, G⟩ is the nuclear norm.

    ``"newton-schulz"`` is matrix products only. Its result is taken where it is proven to reach
    (1 - 0.001)‖G‖_*: ‖G‖_* ≤ ⟨S, G⟩ + √n‖G - S SᵀG‖_F, as SᵀG is positive semidefinite and S in
    the ball. Elsewhere (a wide spectrum) the decomposition takes over. For a singular ``G`` the
    maximiser is not unique: the decomposition returns an orthogonal one, Newton–Schulz one that is
    zero on the null space.

    Raises:
        ValueError: unknown ``method``.
    """
    if method == "svd":
        u, _, vh = torch.linalg.svd(G, full_matrices=False)
        return u @ vh
    if method != "newton-schulz":
        raise ValueError(f"polar must be 'svd' or 'newton-schulz', got {method!r}")
    n = G.shape[-1]
    s = newton_schulz(G, len(_TRIPLES), _TRIPLES)
    # Rounding may leave the ball by a few units in the last place.
    s = s / (1 + n * torch.finfo(s.dtype).eps)
    missed = math.sqrt(n) * torch.linalg.matrix_norm(G - s @ (s.mT @ G))
    unproven = ~(missed <= INEXACT * (s * G).sum((-2, -1)))
    if bool(unproven.any()):
        exact = linear_oracle(G[unproven], "svd")
        s[unproven] = exact
    return s


def fw_update(
    state: tuple[Any, Any, Any],
    g: Float[Tensor, "*batch n n"],
    *,
    step_power: float | int = STEP_POWER,
    averaging_power: float | int = AVERAGING_POWER,
    polar: Oracle = "svd",
) -> DictionaryState:
    """One Frank–Wolfe step from a stochastic gradient; the arguments of :func:`fw_step`.

    G ← (1 - ρ)G + ρ g,  S = argmax ⟨S, G⟩ over the ball,  A ← A + γ(S - A), with
    ρ = t^(-averaging_power) and γ = t^(-step_power), t = 1, 2, …

    If G is singular, S is the maximiser closest to A. A dictionary whose gradient is zero is left
    as it is; if all are, so is t, with a :class:`NoGradientWarning`.
    """
    check_power(step_power, "step_power")
    check_power(averaging_power, "averaging_power")
    A, G, t = state
    if torch.compiler.is_compiling():
        return advance(state, g, step_power, averaging_power, polar)[0]
    moves = g.flatten(-2).abs().amax(-1) > 0
    if not bool(moves.any()):
        warn_no_gradient()
        return DictionaryState(A, G, t)
    new, _ = advance(state, g, step_power, averaging_power, polar)
    if bool(moves.all()):
        return new
    keep = moves[..., None, None]
    return DictionaryState(torch.where(keep, new.A, A), torch.where(keep, new.G, G), new.t)


def advance(
    state: tuple[Any, Any, Any],
    g: Tensor,
    step_power: float | int,
    averaging_power: float | int,
    method: Oracle,
) -> tuple[DictionaryState, Tensor]:
    """The step without checks; also the free estimate of the gap, ⟨S - A, G⟩ before the move."""
    A, G, t = state
    t = t + 1
    G = torch.lerp(G, g, _rate(t, averaging_power, G))
    tie = _TIE * torch.finfo(G.dtype).eps * torch.linalg.matrix_norm(G, keepdim=True)
    move = linear_oracle(torch.addcmul(G, tie, A), method) - A
    gap = (move * G).sum((-2, -1))
    return DictionaryState(A + _rate(t, step_power, A) * move, G, t), gap


def _rate(t: Any, power: float | int, like: Tensor) -> Any:
    if isinstance(t, Tensor):
        return t.to(like.dtype) ** -power
    return float(t) ** -power


def fw_step(
    state: tuple[Any, Any, Any],
    Y: Float[Tensor, "*batch n B"],
    p: float | int = 3,
    *,
    step_power: float | int = STEP_POWER,
    averaging_power: float | int = AVERAGING_POWER,
    polar: Oracle = "svd",
) -> DictionaryState:
    """Learn from one mini-batch: :func:`power_gradient`, then :func:`fw_update`.

    Pure: nothing is modified in place. Works on any device, over leading dimensions (one dictionary
    each) and, with ``polar="svd"`` and ``t`` a tensor, in one graph under ``torch.compile``;
    compiled code does not check values.

    Args:
        state: ``(A, G, t)`` of :func:`start_dictionary` or of the step before.
        Y: ``[..., n, B]``, samples as columns, in the state's dtype. Multiplying all batches by
            one number changes nothing.
        p: order of the norm, above 2. 3 ends closer on sparse codes, 4 learns dense ones
            (30 % non-zero) and noisy ones many times faster.
        step_power: γ = t^(-step_power), in [0, 1].
        averaging_power: ρ = t^(-averaging_power), in [0, 1]; 0 keeps no average.
        polar: ``"svd"`` or ``"newton-schulz"``, see :func:`linear_oracle`.

    Returns:
        The state after the step. A is orthogonal after the first, then only in the ball: for an
        orthogonal transform take :func:`stiefel.linalg.polar` of it.

    Raises:
        ValueError: an argument out of range, an empty batch, NaN or Inf.
        TypeError: dtypes that differ or are not supported.

    Source: arXiv 2103.01484, stochastic Frank–Wolfe over the convex hull of the orthogonal group.
    """
    state = DictionaryState(*state)
    g = power_gradient(state.A, Y, p)
    return fw_update(state, g, step_power=step_power, averaging_power=averaging_power, polar=polar)


def frank_wolfe_gap(
    A: Float[Tensor, "*batch n n"], Y: Float[Tensor, "*batch n B"], p: float | int = 3
) -> Float[Tensor, "*batch"]:
    """‖∇F(A)‖_* - ⟨A, ∇F(A)⟩ ≥ 0 on the samples ``Y``, zero exactly at stationary points.

    The most that a linear model of F can still gain in the ball. Errors as
    :func:`power_gradient`; ``A`` must lie in the ball for the sign to hold.
    """
    g = power_gradient(A, Y, p)
    return torch.linalg.svdvals(g).sum(-1) - (A * g).sum((-2, -1))


def recovery_error(
    A: Float[Tensor, "*batch n n"], D: Float[Tensor, "*#batch n n"]
) -> Float[Tensor, "*batch"]:
    """1 - (1/n) Σᵢⱼ ((polar(A) D)ᵢⱼ)⁴, from 0 (Dᵀ up to order and signs) to 1 - 1/n.

    Args:
        A: analysis matrices, projected here.
        D: the true orthogonal dictionaries, atoms as columns.

    Raises:
        ValueError: NaN or Inf.
    """
    if not bool(D.isfinite().all()):
        raise ValueError("D must be finite, got NaN or Inf")
    return 1 - (polar(A) @ D).pow(4).sum((-2, -1)) / A.shape[-1]


def check_order(p: Any) -> None:
    """Raise ``ValueError`` unless p is a finite number above 2."""
    if isinstance(p, bool) or not isinstance(p, Real) or not 2 < float(p) < math.inf:
        raise ValueError(
            f"p must be a finite number above 2, got {p!r}: at p = 2 every orthogonal matrix is "
            "as good as any other"
        )


def check_power(value: Any, name: str) -> None:
    """Raise ``ValueError`` unless ``value`` is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise ValueError(f"{name} must be a number in [0, 1], got {value!r}")


def warn_no_gradient() -> None:
    """Say that a batch changed nothing."""
    warnings.warn(
        "the batch is all zero, or so small that its powers underflow: nothing was learned from it",
        NoGradientWarning,
        stacklevel=3,
    )
