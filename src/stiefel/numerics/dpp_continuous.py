"""Projection DPPs on an interval or the line, exact and without candidates (arXiv 2312.14057).

The m points of the projection DPP of polynomials of degree < m are, for classical weights, the
eigenvalues of a random symmetric tridiagonal matrix: O(m²) a draw, no rejection. For products of
several variables there is no such matrix; there :func:`stiefel.numerics.sample_dpp` draws from
candidates.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

from stiefel.numerics.least_squares_arrays import as_generator
from stiefel.numerics.least_squares_polynomials import orthonormal_polynomials, recurrence


class JacobiDPP:
    """Polynomials of degree < m under the law Beta(a, b) on [0, 1].

    Args:
        m: Dimension of the space and points a draw, ≥ 1.
        a: Exponent: the law has density ∝ x^(a−1) (1 − x)^(b−1), a > 0.
        b: The other one, > 0.
    """

    family = "jacobi"

    def __init__(self, m: int, a: float | int = 1.0, b: float | int = 1.0) -> None:
        recurrence(m, "jacobi", a, b)  # raises what is not allowed
        self.m, self.a, self.b = int(m), float(a), float(b)

    def sample(self, r: int = 1, generator: Any = None) -> Float[np.ndarray, "r m"]:
        """r independent draws of m points, ascending.

        Raises:
            ValueError: r < 1.
        """
        if r < 1:
            raise ValueError(f"r must be ≥ 1, got {r}")
        return _eigenvalues(*self._matrix(r, as_generator(generator)))

    def features(self, x: Any) -> Float[np.ndarray, "*shape m"]:
        """The orthonormal functions φ(x), shape of x and m."""
        return orthonormal_polynomials(x, self.m, self.family, a=self.a, b=self.b)

    def kernel(self, x: Any) -> Float[np.ndarray, "*shape"]:
        """k(x, x) = ‖φ(x)‖², the inverse Christoffel function."""
        return np.asarray(np.square(self.features(x)).sum(axis=-1))

    def weights(self, x: Any) -> Float[np.ndarray, "*shape"]:
        """w = m / k(x, x), with which least squares at the points is to be weighted."""
        return np.asarray(self.m / self.kernel(x))

    def _matrix(self, r: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Diagonals (r, m) and off-diagonals (r, m − 1), from canonical moments."""
        m, a, b = self.m, self.a, self.b
        k = np.arange(1, m + 1)
        odd = rng.beta(m - k + a, m - k + b, size=(r, m))
        even = rng.beta(m - k[:-1], m - k[:-1] - 1 + a + b, size=(r, m - 1))
        before = np.pad(even, ((0, 0), (1, 0)))
        first = (1 - before) * odd  # ξ_{2k−1}
        second = (1 - odd[:, :-1]) * even  # ξ_{2k}
        return first + np.pad(second, ((0, 0), (1, 0))), np.sqrt(first[:, :-1] * second)

    def __repr__(self) -> str:
        return f"JacobiDPP(m={self.m}, a={self.a:g}, b={self.b:g})"


class LegendreDPP(JacobiDPP):
    """Polynomials of degree < m under the uniform law on [−1, 1]."""

    family = "legendre"

    def __init__(self, m: int) -> None:
        super().__init__(m)

    def sample(self, r: int = 1, generator: Any = None) -> Float[np.ndarray, "r m"]:
        """r independent draws of m points in [−1, 1], ascending."""
        return 2 * super().sample(r, generator) - 1

    def __repr__(self) -> str:
        return f"LegendreDPP(m={self.m})"


class HermiteDPP(JacobiDPP):
    """Polynomials of degree < m under the standard normal law."""

    family = "hermite"

    def __init__(self, m: int) -> None:
        super().__init__(m)

    def _matrix(self, r: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        freedom = 2 * np.arange(self.m - 1, 0, -1)
        diagonal = rng.standard_normal((r, self.m))
        return diagonal, np.sqrt(rng.chisquare(freedom, size=(r, self.m - 1)) / 2)

    def __repr__(self) -> str:
        return f"HermiteDPP(m={self.m})"


def _eigenvalues(diagonal: np.ndarray, off: np.ndarray) -> np.ndarray:
    from scipy.linalg import eigvalsh_tridiagonal

    pairs = zip(diagonal, off, strict=True)
    return np.stack([eigvalsh_tridiagonal(d, e) for d, e in pairs])
