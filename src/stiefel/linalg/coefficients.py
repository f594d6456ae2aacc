"""Coefficient tables of the odd quintic Newton–Schulz iteration, and what makes a table safe.

One step maps every singular value σ to aσ + bσ³ + cσ⁵. A table is one triple (a, b, c) per step.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

Triple = tuple[float, float, float]
# A name of NAMES, one triple (a, b, c), or one triple per step, as lists or arrays.
Coefficients = str | Sequence[Any] | np.ndarray

# Jordan et al. 2024: one triple for all steps, tuned for slope at 0.
CLASSIC: Triple = (3.4445, -4.7750, 2.0315)

# Polar Express (arXiv 2505.16932), l = 1e-3, cushion 0.02407327424182761, for σ in [l, 1]. The last
# row is the Taylor polynomial, repeated for further steps.
_POLAR_EXPRESS: tuple[Triple, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
# Polar Express divides the input by 1.01 ‖X‖ and every row but the last by the same factor, so that
# rounding of the norm in bfloat16 cannot leave the interval.
_POLAR_EXPRESS_SAFETY = 1.01

# Fitted to momentum spectra recorded while training language models and to synthetic ones (mean
# error relative to CLASSIC), under the guards below with ±2 % noise at every step.
_FITTED: tuple[Triple, ...] = (
    (8.0295, -20.9299, 14.1998),
    (3.9996, -2.7428, 0.4774),
    (3.7264, -2.6514, 0.4873),
    (3.0563, -2.2605, 0.4758),
    (2.1047, -1.4615, 0.3839),
)
# The same fit with four steps: less work for an error of about CLASSIC's.
_FAST: tuple[Triple, ...] = (
    (7.892, -21.7943, 15.4007),
    (3.8769, -2.8833, 0.5494),
    (3.3745, -2.5714, 0.5324),
    (2.4481, -1.8108, 0.4449),
)

NAMES = ("classic", "polar_express", "fitted", "fast")


@dataclass(frozen=True)
class Table:
    """A Newton–Schulz polynomial: X ← X / (safety·‖X‖_F + eps), then one triple a step."""

    triples: tuple[Triple, ...]
    safety: float = 1.0
    eps: float = 0.0
    """1e-7 in the published tables, which makes momentum near that size fade; 0 is scale-free."""
    restarts: tuple[int, ...] | None = None
    """Steps (0-based) before which the Gram-side algorithm must return to X to stay accurate in
    bfloat16, where the weight is spread over many rows. None: before every step."""
    cautious_restarts: tuple[int, ...] | None = None
    """The same where a few rows carry the weight."""

    @property
    def steps(self) -> int:
        """Number of iterations."""
        return len(self.triples)

    @property
    def slope(self) -> float:
        """Derivative of the composed polynomial at 0: how much tiny singular values are raised."""
        return float(np.prod([a for a, _, _ in self.triples]))

    def gram_segments(self, spread: bool = True) -> tuple[int, ...]:
        """Lengths of the runs of steps that the Gram side may take between two returns to X."""
        restarts = self.restarts if spread else self.cautious_restarts
        if restarts is None:
            return (1,) * self.steps
        cuts = (0, *(k for k in restarts if k < self.steps), self.steps)
        return tuple(b - a for a, b in pairwise(cuts))


def scalar_image(sigma: np.ndarray, triples: Sequence[Triple]) -> np.ndarray:
    """Where singular values ``sigma`` end after all steps, in float64."""
    x = np.asarray(sigma, dtype=np.float64)
    for a, b, c in triples:
        square = x * x
        x = x * (a + square * (b + c * square))
    return x


@lru_cache(maxsize=64)
def table(coefficients: str | tuple[Triple, ...], steps: int | None = None) -> Table:
    """The table of this name, or of these triples.

    Args:
        coefficients: ``"classic"``, ``"polar_express"``, ``"fitted"``, ``"fast"``, or triples.
        steps: Number of iterations. ``None`` means five, or as many as the table has rows. Tables
            of one row are repeated; Polar Express goes on with its last row.

    Raises:
        ValueError: unknown name, or more steps asked than the table has rows.
    """
    if coefficients == "classic":
        count = 5 if steps is None else steps
        # Established for five steps and fewer.
        restarts = ((3,), (1, 3)) if count <= 5 else (None, None)
        return Table((CLASSIC,) * count, 1.0, 1e-7, *restarts)
    if coefficients == "polar_express":
        count = 5 if steps is None else steps
        shrink = _POLAR_EXPRESS_SAFETY
        rows = [(a / shrink, b / shrink**3, c / shrink**5) for a, b, c in _POLAR_EXPRESS[:-1]]
        rows += [_POLAR_EXPRESS[-1]] * max(0, count - len(rows))
        # Its values stay close to where the polynomial diverges: no Gram-side run is safe.
        return Table(tuple(rows[:count]), shrink, 1e-7)
    if coefficients == "fitted":
        return Table(_rows("fitted", _FITTED, steps), 1.0, 0.0, (2, 3), (1, 2, 3))
    if coefficients == "fast":
        return Table(_rows("fast", _FAST, steps), 1.0, 0.0, (2,), (1, 2))
    if isinstance(coefficients, str):
        raise ValueError(
            f"coefficients must be one of {', '.join(NAMES)} or a sequence of (a, b, c), "
            f"got {coefficients!r}"
        )
    if len(coefficients) == 1 and steps is not None:
        coefficients = coefficients * steps
    return Table(_rows("coefficients", coefficients, steps))


def as_table(coefficients: Coefficients, steps: int | None = None) -> Table:
    """:func:`table` for whatever a user may pass: nested lists, arrays, one bare triple.

    Raises:
        ValueError: not a name, a triple or a sequence of triples of finite numbers; no rows.
    """
    if isinstance(coefficients, str):
        return table(coefficients, steps)
    try:
        array = np.asarray(coefficients, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"coefficients must be numbers (a, b, c), got {coefficients!r}") from error
    array = array[None] if array.ndim == 1 else array
    if array.ndim != 2 or array.shape[1] != 3 or array.shape[0] == 0:
        raise ValueError(
            "coefficients must be a triple (a, b, c) or a sequence of at least one triple, "
            f"got shape {array.shape}"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"coefficients must be finite, got {coefficients!r}")
    return table(tuple((float(a), float(b), float(c)) for a, b, c in array), steps)


# The three guards, on [0, 1.02]: bfloat16 rounds a norm by up to 2 %.
_OUTPUT_MAX = 1.3
_INTERMEDIATE_MIN = 0.04
_OUTPUT_MIN = 0.5
_DEAD_ZONE = 0.02  # singular values below are allowed to stay small
_NOISE = 0.005  # one bfloat16 rounding


def check_guards(table: Table) -> None:
    """Refuse a polynomial that could hurt training; warn of one that is merely weak.

    On 10⁵ points of [0, 1.02], with exact steps and with every step off by ±0.5 % (all up, all
    down, alternating): (1) no output above 1.3; (2) no negative output, and no intermediate below
    0.04 where σ₀ > 0.02; (3) no output below 0.5 where σ₀ > 0.02. A fit to a few spectra can look
    perfect on average and still send some σ₀ to −1, which is ascent along that direction.

    Raises:
        ValueError: a guard of the first kind, or a negative output: names σ₀ and its image.

    Warns:
        UserWarning: the other guards.
    """
    unsafe, weak = _guard_report(table)
    if unsafe is not None:
        raise ValueError(unsafe)
    if weak is not None:
        warnings.warn(f"weak Newton–Schulz coefficients: {weak}", UserWarning, stacklevel=2)


@lru_cache(maxsize=64)
def _guard_report(table: Table) -> tuple[str | None, str | None]:
    """What makes the table unsafe and what makes it weak, if anything."""
    start = np.linspace(0.0, 1.02, 100_001)[1:]
    above = start > _DEAD_ZONE
    weak = None
    for pattern in ((0.0, 0.0), (_NOISE, _NOISE), (-_NOISE, -_NOISE), (_NOISE, -_NOISE)):
        x = start / table.safety
        for step, (a, b, c) in enumerate(table.triples):
            with np.errstate(over="ignore", invalid="ignore"):
                square = x * x
                x = x * (a + square * (b + c * square)) * (1 + pattern[step % 2])
            if step < table.steps - 1 and (low := np.nanmin(x[above])) < _INTERMEDIATE_MIN:
                at = start[above][np.nanargmin(x[above])]
                weak = f"σ₀ = {at:.4f} is {low:.4f} after step {step + 1} (≥ 0.04 wanted)"
        bad = ~(x <= _OUTPUT_MAX) | ~(x > 0)
        if bad.any():
            worst = int(np.argmax(np.where(bad, np.abs(np.nan_to_num(x, nan=np.inf)), -1.0)))
            return (
                f"coefficients send the singular value σ₀ = {start[worst]:.4f} to {x[worst]:.4g}; "
                f"outputs must lie in (0, {_OUTPUT_MAX}] for every σ₀ in (0, 1.02]"
                + (f" when steps are off by {_NOISE:.1%}" if any(pattern) else "")
            ), None
        if (low := x[above].min()) < _OUTPUT_MIN:
            at = start[above][x[above].argmin()]
            weak = f"σ₀ = {at:.4f} ends at {low:.4f} (≥ 0.5 wanted)"
    return None, weak


def _rows(name: str, rows: tuple[Triple, ...], steps: int | None) -> tuple[Triple, ...]:
    if steps is None:
        return rows
    if not 0 <= steps <= len(rows):
        raise ValueError(f"{name} has {len(rows)} steps, got steps={steps}")
    return rows[:steps]
