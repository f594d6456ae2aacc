"""Leading singular values and vectors, principal components and least squares from a sketch.

Source: arXiv 1910.06151, sections 4 and 6; Frieze, Kannan and Vempala (2004).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from stiefel.numerics.sampled.bounds import ErrorBound, Guaranteed, gram_factor
from stiefel.numerics.sampled.checks import check_count, check_positive, numbers_at
from stiefel.numerics.sampled.sketching import ROWS, Sketch, as_sampled, sketch

ROWS_PER_DIRECTION = 20
"""Rows drawn for each of k directions unless told otherwise (sheet, practical defaults)."""
# Neighbouring eigenvalues closer than this part of the larger: their vectors may be anything.
SMALLEST_GAP = 0.05


class GapWarning(UserWarning):
    """Eigenvalues so close that their vectors cannot be told apart."""


@dataclass(frozen=True, eq=False)
class LowRank(Guaranteed):
    """Singular values and right singular vectors; unpacks as ``sigma, V``.

    The bound is on ‖A − A Q Qᴴ‖_F², Q an orthonormal basis of V, above that of the best rank k.
    """

    sigma: Float[np.ndarray, " k"]
    V: Shaped[np.ndarray, "d k"]
    sketch: Sketch

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter((self.sigma, self.V))

    def __getitem__(self, item: int) -> np.ndarray:
        return (self.sigma, self.V)[item]

    def __len__(self) -> int:
        return 2


@dataclass(frozen=True, eq=False)
class Components(Guaranteed):
    """Eigenvalues of AᴴA and their vectors; unpacks as ``eigenvalues, vectors``.

    The bound is on the error of each eigenvalue.
    """

    eigenvalues: Float[np.ndarray, " k"]
    vectors: Shaped[np.ndarray, "d k"]
    gaps: Float[np.ndarray, " k"]
    """(λ_j − λ_{j+1}) / λ_j; below 0.05 vector j (and j + 1) is not identifiable."""

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter((self.eigenvalues, self.vectors))

    def __getitem__(self, item: int) -> np.ndarray:
        return (self.eigenvalues, self.vectors)[item]

    def __len__(self) -> int:
        return 2


@dataclass(frozen=True, eq=False)
class Solution(Guaranteed):
    """A least-squares solution; NumPy takes it as the array ``x``. The bound is on ‖x̂ − x‖."""

    x: Shaped[np.ndarray, " d"]
    sigma: Float[np.ndarray, " k"]
    """Singular values that were inverted."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        found = np.asarray(self.x, dtype=dtype)
        return found.copy() if copy else found


def rows_for(k: int, r: Any) -> int:
    """r, or what is usual for k directions."""
    return ROWS_PER_DIRECTION * k if r is None else check_count(r, "r")


def lowrank(
    SA: Any,
    k: int | np.integer,
    r: int | np.integer | None = None,
    c: int | np.integer | None = None,
    orthonormal: bool = True,
    generator: Any = None,
    *,
    sketch_of: Sketch | None = None,
) -> LowRank:
    """k leading singular values and right singular vectors of A, in O(r d + r c min(r, c)).

    C = W s Zᴴ is the sketch's small matrix; σ_j = s_j, V = Rᴴ W_k / s_k. Whatever the draws,

        ‖A − A Q Qᴴ‖_F² ≤ ‖A − A_k‖_F² + 2 √k (‖RᴴR − AᴴA‖_F + ‖C Cᴴ − R Rᴴ‖_F)

    for Q an orthonormal basis of V; the bound reported puts in what holds of both errors.

    Args:
        SA: :class:`SampledMatrix` ``(n, d)``; anything it is built from works, at one pass a call.
        k: Directions, 1 … min(r, c).
        r: Rows drawn; None: 20 k.
        c: Columns drawn; None: all up to 512 columns, else r.
        orthonormal: Make V orthonormal by QR; else |VᴴV − I| is about 1/√r.
        generator: NumPy generator, ``torch.Generator``, seed or None.
        sketch_of: A sketch of A that is at hand, in place of r, c, generator.

    Raises:
        ValueError: k < 1, k > min(r, c), or the sketch has fewer than k directions.
    """
    k = check_count(k, "k")
    drawn = sketch_of or sketch(SA, rows_for(k, r), c, generator)
    least = min(drawn.C.shape)
    if k > least:
        raise ValueError(f"k must be at most min(r, c) = {least}, got {k}")
    W, values = drawn.spectrum
    if k > len(values):
        raise ValueError(
            f"k = {k} directions were asked for, but the rows that were drawn have rank "
            f"{len(values)}: lower k or raise r"
        )
    sigma = np.sqrt(values[:k])
    V = drawn.R.conj().T @ (W[:, :k] / sigma)
    if orthonormal:
        V = _orthonormal(V)
    worst = 2 * math.sqrt(k) * (drawn.row_error + drawn.column_error)
    guarantee = ErrorBound(
        worst, float(values[:k].sum()), drawn.delta, len(drawn.rows),
        f"squared residual above the best rank {k}", "V = 0",
    )  # fmt: skip
    return LowRank(sigma, V, drawn, guarantee=guarantee)


def pca_topk(
    SA: Any,
    k: int | np.integer,
    r: int | np.integer | None = None,
    c: int | np.integer | None = None,
    generator: Any = None,
) -> Components:
    """k largest eigenvalues of AᴴA and their vectors, orthonormal.

    Nothing is centred: build ``SampledMatrix(A, center=mean)`` for principal components. Each
    eigenvalue is off by at most the errors of RᴴR and C Cᴴ together (Weyl); the bound reported is
    vacuous where that reaches the smallest of them.

    Args, Raises:
        As :func:`lowrank`.

    Warns:
        GapWarning: neighbouring eigenvalues within 5 %: their vectors are not identifiable.
    """
    found = lowrank(SA, k, r, c, generator=generator)
    drawn = found.sketch
    _, values = drawn.spectrum
    following = np.append(values, 0.0)[1 : int(k) + 1]
    gaps = 1 - following / values[: int(k)]
    close = np.flatnonzero(gaps < SMALLEST_GAP)
    if close.size:
        pairs = ", ".join(f"{j + 1} and {j + 2}" for j in close)
        warnings.warn(
            f"eigenvalues {pairs} are within {SMALLEST_GAP:.0%} of one another: "
            "their vectors are not identifiable, only the space they span",
            GapWarning,
            stacklevel=2,
        )
    guarantee = ErrorBound(
        drawn.row_error + drawn.column_error, float(values[int(k) - 1]), drawn.delta,
        len(drawn.rows), "each eigenvalue", "answering 0 for the smallest",
    )  # fmt: skip
    return Components(values[: int(k)], found.V, gaps, guarantee=guarantee)


def lowrank_solve(
    SA: Any,
    b: Any,
    k: int | np.integer | None = None,
    sigma: float | int | None = None,
    r: int | np.integer | None = None,
    c: int | np.integer | None = None,
    generator: Any = None,
    *,
    sketch_of: Sketch | None = None,
) -> Solution:
    """x = A_k⁺ b: least squares in the k leading directions, on the rows that were drawn.

    The sketch and b, scaled alike, are projected on the directions found by :func:`lowrank` and
    solved there. b is read only at the rows drawn, so that n does not matter.

    Args:
        SA: :class:`SampledMatrix` ``(n, d)``; anything it is built from works, at one pass a call.
        b: ``(n,)``.
        k: Directions; give this or ``sigma``.
        sigma: Keep the directions whose singular value is at least this.
        r: Rows drawn; None: 20 k, or 500 with ``sigma``.
        c, generator, sketch_of: As :func:`lowrank`.

    Raises:
        ValueError: neither or both of k and sigma, sigma ≤ 0 or above every singular value found,
            b of another length, NaN or infinities at the rows drawn; as :func:`lowrank`.
    """
    if (k is None) == (sigma is None):
        raise ValueError(f"give k or sigma, got k={k} and sigma={sigma}")
    SA = as_sampled(SA)
    if sigma is not None:
        sigma = check_positive(sigma, "sigma")
        drawn = sketch_of or sketch(SA, ROWS if r is None else r, c, generator)
        k = int((drawn.spectrum[1] >= sigma**2).sum())
        if k == 0:
            raise ValueError(
                f"sigma = {sigma:g} is above every singular value found, the largest is "
                f"{math.sqrt(drawn.spectrum[1][0]):g}"
            )
    else:
        drawn = sketch_of or sketch(SA, rows_for(check_count(k, "k"), r), c, generator)
    found = lowrank(SA, k, sketch_of=drawn)  # pyrefly: ignore
    y = drawn.scale * numbers_at(b, drawn.rows, SA.shape[0], "b")
    z = np.linalg.lstsq(drawn.R @ found.V, y, rcond=None)[0]
    x = found.V @ z
    return Solution(x, found.sigma, guarantee=_solution_bound(drawn, found, y, x))


def _solution_bound(drawn: Sketch, found: LowRank, y: np.ndarray, x: np.ndarray) -> ErrorBound:
    """A bound on ‖x̂ − x‖, x = A_k⁺ b; infinite where the k-th gap may close.

    Between the k-th and the next eigenvalue of RᴴR, g apart, let f(t) rise from 0, a quarter of g
    above the lower one, to 1/t, as far below the upper one. With ε = ‖RᴴR − AᴴA‖_F ≤ g/4,
    x̂ = f(RᴴR) Rᴴy and x = f(AᴴA) Aᴴb. Where f has slope at most L, ‖f(RᴴR) − f(AᴴA)‖_F ≤ L ε.
    ‖Rᴴy − Aᴴb‖ ≤ ‖A‖_F ‖b‖/√(r δ/2) by Chebyshev; ‖b‖² is estimated by its mean ‖y‖².
    """
    value, r, share = math.inf, len(drawn.rows), drawn.delta / 2
    _, values = drawn.spectrum
    k = len(found.sigma)
    gap = float(values[k - 1]) - (float(values[k]) if k < len(values) else 0.0)
    error = gram_factor(r, share) * drawn.fro2
    # Of drawn columns only the span is bounded, not what is inverted in it.
    if not drawn.sampled_columns and drawn.sampling == "l2" and error <= gap / 4:
        start = float(values[k - 1]) - gap / 4
        slope = max(1 / start**2, 2 / (start * gap))
        image = float(np.linalg.norm(drawn.R.conj().T @ y))
        off = math.sqrt(drawn.fro2 / (r * share)) * float(np.linalg.norm(y))
        value = slope * error * image + off / start
    return ErrorBound(value, float(np.linalg.norm(x)), drawn.delta, r, "‖x̂ − x‖", "x = 0")


def _orthonormal(V: np.ndarray) -> np.ndarray:
    """QR with the signs of V kept."""
    Q, T = np.linalg.qr(V)
    diagonal = np.diagonal(T)
    size = np.abs(diagonal)
    return Q * np.where(size > 0, diagonal / np.where(size > 0, size, 1.0), 1.0)
