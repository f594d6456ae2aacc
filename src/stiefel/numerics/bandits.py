"""Which ω next? Bandits that see nothing but iteration counts (arXiv 2310.02246).

Each is asked for ω, ``predict(context)``, and told what the solve cost, ``update(loss)``, so that
it fits into any time-stepping loop. :class:`TsallisINF` comes close to the best fixed ω of its
grid; :class:`BinnedTsallisINF` to the best one for each range of a context that is known before
the solve. :class:`~stiefel.numerics.ChebCB` learns the cost as a function of the context.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from stiefel.numerics.least_squares_arrays import as_generator
from stiefel.numerics.relaxation import check_omega
from stiefel.numerics.sor_operators import check_entries, real_array

# The paper's action grid.
GRID = (1.0, 1.95, 20)
# Iteration counts all of 1 leave no scale to divide by.
SMALLEST_SCALE = 1e-12
NEWTON_STEPS = 50


class Policy:
    """What the bandits share: the grid, the draw, the order of calls, the state."""

    _state: tuple[str, ...] = ()
    """Attributes that learning changes."""

    def __init__(self, grid: Any = None, random_state: Any = None) -> None:
        values = np.linspace(*GRID) if grid is None else real_array(grid, "grid").astype(float)
        if values.ndim != 1 or not values.size:
            raise ValueError(f"grid must be a list of one ω or more, got shape {values.shape}")
        check_entries(values, "grid")
        check_omega(values, values.size)
        self.grid = values
        self.random_state = as_generator(random_state)
        self.probabilities_ = np.full(values.size, 1 / values.size)
        """Of the actions, at the last ``predict``."""
        self._action: int | None = None

    def predict(self, context: Any = None) -> float:
        """Draw the next ω from the grid. A draw that is never told its cost is forgotten.

        Args:
            context: What is known of the system before it is solved; a number. Without use for a
                policy that takes none.

        Raises:
            ValueError: the context is missing or not finite.
        """
        self.probabilities_ = self._probabilities(context)
        total = np.cumsum(self.probabilities_)
        chosen = int(np.searchsorted(total, self.random_state.random() * total[-1], "right"))
        self._action = min(chosen, self.grid.size - 1)
        return float(self.grid[self._action])

    def update(self, loss: Any) -> None:
        """Tell what the ω of the last ``predict`` cost.

        Args:
            loss: Iterations, at least 1; also of a solve that did not converge.

        Raises:
            RuntimeError: nothing was predicted since the last update.
            ValueError: the loss is not finite or below 1.
        """
        if self._action is None:
            raise RuntimeError("update needs a predict before it: no ω is waiting for its cost")
        loss = check_loss(loss)
        action, self._action = self._action, None
        self._learn(action, loss)

    def _probabilities(self, context: Any) -> np.ndarray:
        raise NotImplementedError

    def _learn(self, action: int, loss: float) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """All that was learned and the state of the random numbers, as copies."""
        names = ("grid", "probabilities_", "_action", *self._state)
        state = {name.strip("_"): copy.deepcopy(getattr(self, name)) for name in names}
        state["random_state"] = copy.deepcopy(self.random_state.bit_generator.state)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken, with the same random numbers.

        Raises:
            KeyError: entries are missing.
            ValueError: it is of another grid or another kind of random numbers.
        """
        names = ("probabilities_", "_action", *self._state)
        missing = {"grid", "random_state", *(n.strip("_") for n in names)} - set(state)
        if missing:
            raise KeyError(f"the state lacks {', '.join(sorted(missing))}")
        if not np.array_equal(state["grid"], self.grid):
            raise ValueError("the state is of another grid of ω")
        # Of the same kind of generator, which refuses the state of another.
        self.random_state.bit_generator.state = copy.deepcopy(state["random_state"])
        for name in names:
            setattr(self, name, copy.deepcopy(state[name.strip("_")]))


class TsallisINF(Policy):
    """Tsallis-INF: nearly as good in total as the best fixed ω, whatever the sequence is.

    Args:
        grid: The ω to choose from, inside (0, 2); 20 from 1 to 1.95 if None. Sort it as you like.
        random_state: NumPy generator, seed, ``RandomState``, ``torch.Generator`` or None.

    Raises:
        ValueError: an empty grid, or ω outside (0, 2).

    Losses are divided by the mean loss − 1 so far. Exploration has its price: with costs that
    differ sixfold, some thousand rounds pass before the total meets that of the best fixed ω.
    Source: arXiv 2310.02246, algorithm 1; Zimmert and Seldin 2021.
    """

    _state = ("_seen",)

    def __init__(self, grid: Any = None, random_state: Any = None) -> None:
        super().__init__(grid, random_state)
        self._seen = _nothing_seen(self.grid.size)

    def _probabilities(self, context: Any) -> np.ndarray:
        return _next_probabilities(self._seen)

    def _learn(self, action: int, loss: float) -> None:
        _see(self._seen, action, loss, self.probabilities_[action])


def _nothing_seen(d: int) -> dict[str, Any]:
    """What Tsallis-INF remembers: importance-weighted losses, unscaled, their sum and number."""
    return {"losses": np.zeros(d), "sum": 0.0, "rounds": 0}


def _next_probabilities(seen: dict[str, Any]) -> np.ndarray:
    losses, rounds = seen["losses"], seen["rounds"]
    if not rounds:
        return np.full(losses.size, 1 / losses.size)
    scale = max(seen["sum"] / rounds - 1, SMALLEST_SCALE)
    return tsallis_probabilities(losses / scale, rounds + 1)


def _see(seen: dict[str, Any], action: int, loss: float, probability: Any) -> None:
    seen["losses"][action] += (loss - 1) / probability
    seen["sum"] += loss
    seen["rounds"] += 1


def tsallis_probabilities(losses: Any, t: int) -> np.ndarray:
    """p_i = 4 (η (k_i − x))⁻² with η = 2/√t and x < min k such that they sum to 1.

    Args:
        losses: Cumulative scaled losses k ``(d,)``.
        t: Round, from 1.

    Raises:
        ValueError: losses not finite, t below 1.

    With y = min k − x, the power mean h(y) = (Σ p)^(−1/2) is concave and grows: Newton's method for
    h = 1 climbs to the root from y = 2/η, where p of the best is 1, never overshoots, and needs a
    few steps. (The authors' code starts at x = −1 and leaves k as it is. Once k has grown, that is
    far left of the root, where Newton's method for Σp = 1 overshoots and Σp is not 1.)
    """
    k = real_array(losses, "losses")
    check_entries(k, "losses")
    if t < 1:
        raise ValueError(f"t must be at least 1, got {t}")
    k = k - k.min()
    unit = math.sqrt(t)  # 2/η: p_i = (unit / (k_i + y))²
    y = unit
    for _ in range(NEWTON_STEPS):
        ratio = unit / (k + y)
        p = ratio * ratio
        total = float(p.sum())
        step = (math.sqrt(total) - 1) * total * unit / float(p @ ratio)
        y += step
        if step <= 1e-15 * y:
            break
    p = (unit / (k + y)) ** 2
    return p / p.sum()


class Contextual(Policy):
    """A policy that needs a number in [low, high] before it chooses."""

    def __init__(
        self, grid: Any, low: float | int, high: float | int, random_state: Any = None
    ) -> None:
        super().__init__(grid, random_state)
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"low must be below high, both finite, got {low} and {high}")
        self.low, self.high = float(low), float(high)

    def _position(self, context: Any) -> float:
        """Where in [low, high] the context is: 0 to 1. Warns outside, and takes the end."""
        if context is None:
            raise ValueError(f"{type(self).__name__} needs a context, got None")
        value = float(context)
        if math.isnan(value):
            raise ValueError("context must be a number, got NaN")
        if not self.low <= value <= self.high:
            warnings.warn(
                f"context {value:g} lies outside [{self.low:g}, {self.high:g}]; the nearer end is "
                "taken",
                RuntimeWarning,
                stacklevel=4,
            )
            value = min(max(value, self.low), self.high)
        return (value - self.low) / (self.high - self.low)


class BinnedTsallisINF(Contextual):
    """Tsallis-INF with a context: one bandit for each of ``bins`` equal parts of [low, high].

    Args:
        grid: As for :class:`TsallisINF`.
        low: Smallest context.
        high: Largest one; outside it warns and the nearer end is taken.
        bins: Number of parts, at least 1. Each has to learn on its own.
        random_state: As for :class:`TsallisINF`; one stream for all.

    Raises:
        ValueError: low ≥ high, no bin, or a bad grid.

    Source: arXiv 2310.02246, section 3.
    """

    _state = ("_bandits", "_bin")

    def __init__(
        self,
        grid: Any = None,
        low: float | int = 0.0,
        high: float | int = 1.0,
        bins: int = 5,
        random_state: Any = None,
    ) -> None:
        super().__init__(grid, low, high, random_state)
        if bins < 1:
            raise ValueError(f"bins must be at least 1, got {bins}")
        self.bins, self._bin = bins, 0
        self._bandits = [_nothing_seen(self.grid.size) for _ in range(bins)]

    def _probabilities(self, context: Any) -> np.ndarray:
        self._bin = min(int(self._position(context) * self.bins), self.bins - 1)
        return _next_probabilities(self._bandits[self._bin])

    def _learn(self, action: int, loss: float) -> None:
        _see(self._bandits[self._bin], action, loss, self.probabilities_[action])


def check_loss(loss: Any) -> float:
    """A loss as a float.

    Raises:
        ValueError: not finite or below 1.
    """
    value = float(loss)
    if not (math.isfinite(value) and value >= 1):
        raise ValueError(f"loss must be a finite number of iterations, at least 1, got {loss}")
    return value
