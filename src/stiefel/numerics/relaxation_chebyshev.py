"""ChebCB: the cost of every ω learned as a polynomial of a context (arXiv 2310.02246, section 3).

The iteration count of each ω is fitted by Chebyshev polynomials in the context c, and an ω is
played the more rarely the worse it is predicted to be (inverse-gap weighting). The memory is the
normal equations of each ω, so that a round costs the same after a million of them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from stiefel.numerics.bandits import SMALLEST_SCALE, Contextual

# Eigenvalues of FᵀF below this part of the largest are taken for rounding: singular values of F
# below 3e-7 of the largest.
RANK_TOLERANCE = 1e-13
# Makes the box-constrained problem strictly convex, so that its active set is found in finitely
# many steps; the fit changes by about as much in relative terms.
RIDGE = 1e-12
# Bounds of a coefficient must not be exactly zero.
SMALLEST_BOUND = 1e-12


class ChebCB(Contextual):
    """ChebCB: approaches the best ω of every single instance, told a number that describes it.

    Args:
        grid: The ω to choose from, inside (0, 2); 20 from 1 to 1.95 if None.
        low: Smallest context, such as a shift of the diagonal.
        high: Largest one; outside it warns and the nearer end is taken.
        degree: Of the polynomials, at least 0.
        random_state: NumPy generator, seed, ``RandomState``, ``torch.Generator`` or None.

    Raises:
        ValueError: low ≥ high, negative degree, or a bad grid.

    Choose a context in which the cost is smooth: the logarithm of a coefficient that spans decades.
    Source: arXiv 2310.02246, algorithm 2; constants as in the authors' code.
    """

    _state = (
        "_gram", "_products", "_squares", "_theta", "_bounded",
        "_loss", "_fit", "_features", "_eta",
    )  # fmt: skip

    def __init__(
        self,
        grid: Any = None,
        low: float | int = 0.0,
        high: float | int = 1.0,
        degree: int = 5,
        random_state: Any = None,
    ) -> None:
        super().__init__(grid, low, high, random_state)
        if degree < 0:
            raise ValueError(f"degree must be at least 0, got {degree}")
        self.degree = degree
        d, m = self.grid.size, degree + 1
        # Of each action: FᵀF, Fᵀ(loss − 1), Σ(loss − 1)². Nothing here is divided by the scale,
        # which grows: coefficients and their bounds are in iterations, and stay valid.
        self._gram, self._products = np.zeros((d, m, m)), np.zeros((d, m))
        self._squares = np.zeros(d)
        self._theta = np.zeros((d, m))
        self._bounded = np.zeros(d, dtype=bool)  # the fit is not the free one
        # Rounds, largest and smallest loss, Σ loss²; Σ ŷ², Σ ŷ loss with ŷ as scaled when played.
        self._loss = {"rounds": 0, "largest": 0.0, "smallest": math.inf, "squares": 0.0}
        self._fit = {"squares": 0.0, "products": 0.0}
        self._features, self._eta = np.zeros(m), 0.0

    def _scale(self) -> float:
        """K N = 2K + 4 (max − min) (1 + ln m)."""
        spread = self._loss["largest"] - self._loss["smallest"]
        return 2 * self._loss["largest"] + 4 * spread * (1 + math.log(self.degree + 1))

    def _probabilities(self, context: Any) -> np.ndarray:
        angle = math.acos(2 * self._position(context) - 1)
        self._features = np.cos(angle * np.arange(self.degree + 1))  # T_j(cos a) = cos(j a)
        d = self.grid.size
        if not self._loss["rounds"]:
            return np.full(d, 1 / d)
        predicted = (self._theta @ self._features) / self._scale()
        best = int(predicted.argmin())
        p = 1 / (d + self._eta * (predicted - predicted[best]))
        p[best] = 0.0
        p[best] = 1 - p.sum()
        return p

    def _learn(self, action: int, loss: float) -> None:
        f, seen, fit = self._features, self._loss, self._fit
        before = self._scale() if seen["rounds"] else 1.0
        predicted = float(self._theta[action] @ f) / before
        wider = not seen["smallest"] <= loss <= seen["largest"]
        seen["rounds"] += 1
        seen["largest"] = max(seen["largest"], loss)
        seen["smallest"] = min(seen["smallest"], loss)
        seen["squares"] += loss * loss
        fit["squares"] += predicted * predicted
        fit["products"] += predicted * loss
        self._gram[action] += np.multiply.outer(f, f)
        self._products[action] += (loss - 1) * f
        self._squares[action] += (loss - 1) ** 2

        spread = seen["largest"] - seen["smallest"]
        degrees = np.arange(1, self.degree + 1)
        # |θ_0| ≤ 1/N and |θ_j| ≤ 2 (max − min) / (K N j), times the scale K N.
        bounds = np.concatenate(([seen["largest"]], 2 * spread / degrees))
        bounds = np.maximum(bounds, SMALLEST_BOUND * seen["largest"])
        # Wider bounds move only fits that have met their bounds.
        again = np.flatnonzero(self._bounded).tolist() if wider else []
        for other in {action, *again}:
            self._theta[other], self._bounded[other] = bounded_fit(
                self._gram[other], self._products[other], bounds, self._theta[other]
            )
        self._eta = self._exploration(action, spread)

    def _exploration(self, action: int, spread: float) -> float:
        """η after this round: 2 t √(d t / (R − resnorm + 2 α² t))."""
        seen, scale, m = self._loss, self._scale(), self.degree + 1
        t = seen["rounds"]
        rest = 0.0
        if self._bounded[action]:
            theta, products = self._theta[action], self._products[action]
            rest = float(theta @ (self._gram[action] @ theta - 2 * products))
            rest = max(rest + self._squares[action], 0.0)
        regret = (
            self._fit["squares"]
            - 2 * self._fit["products"] / scale
            + seen["squares"] / scale**2
            - rest / scale**2
        )
        # What polynomials of this degree miss of a function that is Lipschitz in the context.
        alpha = (math.pi + 2 / math.pi * math.log(2 * m + 1)) / (2 * scale * (m + 1)) * spread
        return (
            2 * t * math.sqrt(self.grid.size * t / max(regret + 2 * alpha**2 * t, SMALLEST_SCALE))
        )


def bounded_fit(
    gram: np.ndarray, products: np.ndarray, bounds: np.ndarray, start: np.ndarray | None = None
) -> tuple[np.ndarray, bool]:
    """argmin θᵀGθ − 2 hᵀθ over |θ_j| ≤ ub_j, from the normal equations.

    Args:
        gram: G = FᵀF ``(m, m)``.
        products: h = Fᵀy ``(m,)``.
        bounds: ub ``(m,)``, positive.
        start: A fit that is close, such as the one before the last sample.

    Returns:
        θ ``(m,)``, the shortest free least-squares solution if the bounds hold for it, and whether
        they do not.
    """
    values, vectors = np.linalg.eigh(gram)
    kept = values > RANK_TOLERANCE * values[-1]
    inverse = np.zeros_like(values)
    inverse[kept] = 1 / values[kept]
    free = vectors @ (inverse * (vectors.T @ products))
    if (np.abs(free) <= bounds).all():
        return free, False
    return _active_set(
        gram, products, bounds, np.clip(free if start is None else start, -bounds, bounds)
    ), True


def _active_set(g: np.ndarray, h: np.ndarray, bounds: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Walks from one set of active bounds to the next; the objective falls at every step."""
    m = len(h)
    size = float(g.trace())
    g = g.copy()
    g.flat[:: m + 1] += RIDGE * size
    side = (x >= bounds).astype(int) - (x <= -bounds)  # 0: free
    tolerance = 1e-10 * (np.abs(h).max() + size * bounds.max())
    for _ in range(20 * m):
        goal = side * bounds
        inside = np.flatnonzero(side == 0)
        if inside.size:
            rows = g[inside]
            goal[inside] = np.linalg.solve(rows[:, inside], h[inside] - rows @ goal)
        over = np.abs(goal) > bounds
        if over.any():
            move = goal - x
            room = np.full(m, np.inf)
            room[over] = (np.sign(move[over]) * bounds[over] - x[over]) / move[over]
            first = int(room.argmin())
            x = np.clip(x + max(room[first], 0.0) * move, -bounds, bounds)
            side[first] = 1 if move[first] > 0 else -1
            continue
        x = goal
        # At a bound the objective must not fall inwards.
        pull = side * (g @ x - h)
        worst = int(pull.argmax())
        if pull[worst] <= tolerance:
            break
        side[worst] = 0
    return x
