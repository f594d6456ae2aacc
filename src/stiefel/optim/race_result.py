"""What came out of a race: standings, as data, as a table, as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from stiefel.comparison import Grid, crossing, mean_and_half
from stiefel.optim.race_contestants import BASELINE


@dataclass(frozen=True)
class Standing:
    """One contestant at its best rate."""

    name: str
    elementwise_lr: float
    grid: Grid
    """Losses that chose the rate, on seed 0."""
    runs: Mapping[int, Mapping[str, Any]]
    """Seed to what :func:`stiefel.optim.race_run.train` returned; empty if every rate diverged."""

    @property
    def finals(self) -> list[float]:
        """Loss at the end, one a seed that stayed finite."""
        return [run["final"] for run in self.runs.values() if run["final"] is not None]

    @property
    def diverged(self) -> list[int]:
        """Seeds whose run at the chosen rate left the finite numbers."""
        return [seed for seed, run in self.runs.items() if run["final"] is None]

    def mean_of(self, key: str) -> float | None:
        """Mean over seeds of a number of the runs."""
        values = [run[key] for run in self.runs.values() if run[key] is not None]
        return sum(values) / len(values) if values else None

    def crossings(self, baseline: Standing, axis: str) -> list[float]:
        """Where each seed first has the baseline's final loss of that seed; those that get there.

        Args:
            baseline: Whose final loss.
            axis: ``"steps"`` or ``"seconds"``.
        """
        found = []
        for seed, run in self.runs.items():
            level = baseline.runs[seed]["final"]
            if level is not None:
                place = crossing([float(x) for x in run[axis]], run["losses"], level)
                if place is not None:
                    found.append(place)
        return found

    def differences(self, baseline: Standing) -> list[float]:
        """Final loss minus the baseline's, seed by seed."""
        pairs = [(run["final"], baseline.runs[seed]["final"]) for seed, run in self.runs.items()]
        return [own - other for own, other in pairs if own is not None and other is not None]


@dataclass(frozen=True)
class RaceResult:
    """Standings, the lowest loss first, and the settings of the race."""

    standings: tuple[Standing, ...]
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, standings: Iterable[Standing], settings: Mapping[str, Any]) -> RaceResult:
        """Sort ``standings``: complete ones by mean final loss, then those that diverged."""

        def order(standing: Standing) -> tuple[bool, float]:
            finals = standing.finals
            broken = bool(standing.diverged) or not finals
            return broken, sum(finals) / len(finals) if finals else math.inf

        return cls(tuple(sorted(standings, key=order)), settings)

    @property
    def baseline(self) -> Standing:
        """AdamW's standing."""
        return next(s for s in self.standings if s.name == BASELINE)

    def to_json(self) -> dict[str, Any]:
        """Everything, JSON-able: ``settings`` and ``optimizers``, the lowest loss first.

        ``seconds`` are CPU seconds of training; ``steps_to_adamw`` and ``seconds_to_adamw`` are
        means over the seeds that reach AdamW's final loss of that seed (``reached`` many).
        """
        rows = [self.row(standing) for standing in self.standings]
        return {"settings": dict(self.settings), "optimizers": rows}

    def row(self, standing: Standing) -> dict[str, Any]:
        """One contestant as JSON-able dict; see :meth:`to_json`."""
        base = self.baseline
        steps, seconds = (standing.crossings(base, axis) for axis in ("steps", "seconds"))
        return {
            "optimizer": standing.name,
            "final": _summary(standing.finals),
            "difference_to_adamw": _summary(standing.differences(base)),
            "steps_to_adamw": _mean(steps),
            "seconds_to_adamw": _mean(seconds),
            "reached": len(steps),
            "seeds": list(standing.runs),
            "diverged": standing.diverged,
            "step_seconds": standing.mean_of("step_seconds"),
            "optimizer_seconds": standing.mean_of("optimizer_seconds"),
            "state_bytes": standing.mean_of("state_bytes"),
            "lr": standing.grid.best,
            "elementwise_lr": standing.elementwise_lr,
            "bracketed": standing.grid.bracketed,
            "grid": [{"lr": lr, "loss": loss} for lr, loss in sorted(standing.grid.tried.items())],
            "curves": [
                {"seed": seed, **{k: run[k] for k in ("steps", "seconds", "losses")}}
                for seed, run in standing.runs.items()
            ],
        }

    def table(self, narrow: bool = False) -> Any:
        """A ``rich.table.Table``, 115 characters wide, or 79 if ``narrow``."""
        from stiefel.optim.race_report import table

        return table(self, narrow)

    def figure(self) -> Any:
        """A ``matplotlib.figure.Figure``: loss against steps and against CPU seconds.

        Raises:
            ImportError: matplotlib is not installed (``pip install "stiefel[atlas]"``).
        """
        from stiefel.optim.race_report import figure

        return figure(self)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _summary(values: list[float]) -> dict[str, Any]:
    if not values:
        return {"mean": None, "interval": None, "values": []}
    mean, half = mean_and_half(values)
    bounds = None if half is None else [mean - half, mean + half]
    return {"mean": mean, "interval": bounds, "values": values}
