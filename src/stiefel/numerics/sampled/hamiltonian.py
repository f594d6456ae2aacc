"""Evolution of a state under a low-rank Hamiltonian from a few of its rows.

Source: arXiv 1910.06151, section 6 (Hamiltonian simulation).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Complex

from stiefel.numerics.least_squares_arrays import as_generator
from stiefel.numerics.sampled.bounds import DELTA, ErrorBound, Guaranteed
from stiefel.numerics.sampled.checks import as_numbers
from stiefel.numerics.sampled.sketching import ROWS, Sketch, as_sampled, sketch
from stiefel.numerics.sampled.transform import svt

# |H − Hᴴ| on the rows drawn may be this part of the largest entry there.
_HERMITIAN = 1e-8
# Rows that are compared with their columns, at most.
_CHECKED = 512


@dataclass(frozen=True, eq=False)
class Evolution(Guaranteed):
    """exp(iHt) b; NumPy takes it as the array ``state``. The bound is on the error of the state."""

    state: Complex[np.ndarray, " n"]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        found = np.asarray(self.state, dtype=dtype)
        return found.copy() if copy else found


def hamiltonian_simulation(
    H: Any,
    b: Any,
    t: float | int,
    r: int | np.integer = ROWS,
    c: int | np.integer | None = None,
    generator: Any = None,
) -> Evolution:
    """exp(iHt) b = cos(Ht) b + i H g(H²) b, g(x) = sin(t√x)/√x, both by singular value transform.

    cos and g are even functions of H, so that r rows of H give them; the product with H takes r
    more. Norm is kept up to the error only. Fit for ‖H‖_F t well below √r.

    Args:
        H: Hermitian :class:`SampledMatrix` ``(n, n)``; anything it is built from works.
        b: ``(n,)``, real or complex.
        t: Time, any sign.
        r, c, generator: As :func:`sketch`; r rows are drawn twice.

    Raises:
        ValueError: H not square, or not Hermitian in the rows drawn; b of another length; t or b
            not finite; r < 1.
    """
    H, b = as_sampled(H), as_numbers(b, "b")
    n, d = H.shape
    if n != d:
        raise ValueError(f"H must be square, got shape {H.shape}")
    if b.shape != (n,):
        raise ValueError(f"b must be ({n},), got shape {b.shape}")
    if not math.isfinite(t):
        raise ValueError(f"t must be finite, got {t}")
    t, rng = float(t), as_generator(generator)
    drawn = sketch(H, r, c, rng)
    check_hermitian(drawn, "H")
    # Slopes of cos(t√x), g and their f̄ are largest at 0: from their series.
    a = abs(t)
    even = svt(drawn, lambda x: np.cos(t * np.sqrt(x)), 1.0, lipschitz=(a**2 / 2, a**4 / 24))
    odd = svt(
        drawn, lambda x: t * np.sinc(t * np.sqrt(x) / np.pi), t, lipschitz=(a**3 / 6, a**5 / 120)
    )
    v = odd.matmul(b)
    again = sketch(H, r, drawn.R.shape[1], rng)  # H v = Hᴴ v ≈ Rᴴ (S v), of rows that v ignores
    product = again.R.conj().T @ (again.scale * v[again.rows])
    state = even.matmul(b) + 1j * product
    size = float(np.linalg.norm(b))
    norm = math.sqrt(float(drawn.spectrum[1][0]) + drawn.column_error + drawn.row_error)
    off = math.sqrt(H.fro2 / (len(again.rows) * DELTA)) * float(np.linalg.norm(v))
    guarantee = ErrorBound(
        (even.bound + norm * odd.bound) * size + off, float(np.linalg.norm(state - b)), 2 * DELTA,
        len(drawn.rows), "the state", "leaving it as it was",
    )  # fmt: skip
    return Evolution(state, guarantee=guarantee)


def check_hermitian(drawn: Sketch, name: str) -> None:
    """Raise ``ValueError`` if rows drawn differ from the conjugates of their columns."""
    rows, first = np.unique(drawn.rows, return_index=True)
    rows, first = rows[:_CHECKED], first[:_CHECKED]
    block = drawn.R[np.ix_(first, rows)] / drawn.scale[first, None]
    worst = float(np.abs(block - block.conj().T).max())
    if worst > _HERMITIAN * float(np.abs(block).max()):
        raise ValueError(
            f"{name} must be Hermitian, but entries differ by {worst:.3g} across its diagonal"
        )
