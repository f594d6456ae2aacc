"""What a paper is here: a claim, an experiment that measures it, a verdict computed from both."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from stiefel.comparison import mean_interval as mean_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from stiefel.papers.progress import Progress


class Scale(StrEnum):
    """How much of the experiment is run."""

    SMOKE = "smoke"
    """Seconds; for tests. Proves that everything runs, says nothing about the claim."""
    LAPTOP = "laptop"
    """At most two minutes on two cores for all seeds together."""
    PAPER = "paper"
    """The authors' scale. Refuses where the data or the accelerator is missing."""


class Verdict(StrEnum):
    """What the measurements say about a claim."""

    REPRODUCED = "reproduced"
    NOT_REPRODUCED = "not reproduced"
    INCONCLUSIVE = "inconclusive"
    FAILED = "failed"


@dataclass(frozen=True)
class Measurement:
    """What one seed gave: numbers for the claims, series for the figure."""

    seed: int
    metrics: Mapping[str, float]
    series: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Curves and other arrays that the figure draws. Not used for the verdict."""
    config: Mapping[str, object] = field(default_factory=dict)
    """What a reader needs to repeat it: data checksum, learning rates chosen, sizes."""


@dataclass(frozen=True)
class Judgement:
    """A claim held against measurements."""

    claim: Claim
    value: float
    """Mean of the metric over seeds."""
    interval: tuple[float, float]
    """95 % confidence interval of that mean (Student's t over seeds)."""
    verdict: Verdict


@dataclass(frozen=True)
class Claim:
    """One statement of a paper, as a bound on one metric.

    Exactly one of ``at_most`` and ``at_least`` is given. The claim is reproduced when the whole
    95 % interval of the metric's mean over seeds keeps the bound, not reproduced when the whole
    interval breaks it, and inconclusive otherwise, as always with fewer than two seeds.
    """

    text: str
    metric: str
    """Key in :attr:`Measurement.metrics`."""
    at_most: float | None = None
    at_least: float | None = None

    def __post_init__(self) -> None:
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError(
                f"claim {self.text!r} needs exactly one of at_most and at_least, "
                f"got at_most={self.at_most}, at_least={self.at_least}"
            )

    @property
    def bound(self) -> float:
        """The number the metric is held against."""
        return self.at_most if self.at_most is not None else self.at_least  # pyrefly: ignore

    @property
    def relation(self) -> str:
        """``≤`` or ``≥``, as in *metric ≤ bound*."""
        return "≤" if self.at_most is not None else "≥"

    def judge(self, measurements: Sequence[Measurement]) -> Judgement:
        """Hold this claim against measurements of several seeds.

        Raises:
            KeyError: a measurement lacks the metric.
        """
        for m in measurements:
            if self.metric not in m.metrics:
                raise KeyError(
                    f"seed {m.seed} has no metric {self.metric!r}; "
                    f"it has {', '.join(sorted(m.metrics)) or 'none'}"
                )
        values = [float(m.metrics[self.metric]) for m in measurements]
        mean, lo, hi = mean_interval(values)
        if len(values) < 2 or math.isnan(mean):
            return Judgement(self, mean, (lo, hi), Verdict.INCONCLUSIVE)
        sign = 1 if self.at_most is not None else -1
        worst, best = max(sign * lo, sign * hi), min(sign * lo, sign * hi)
        if worst <= sign * self.bound:
            verdict = Verdict.REPRODUCED
        elif best > sign * self.bound:
            verdict = Verdict.NOT_REPRODUCED
        else:
            verdict = Verdict.INCONCLUSIVE
        return Judgement(self, mean, (lo, hi), verdict)


Experiment = Callable[["Scale", int, "Progress"], Measurement]
"""Trains, solves, measures: ``experiment(scale, seed, progress)``. It runs in a process of its own,
so it must be importable by module and name; modules that hold one import torch only inside it."""

FigureMaker = Callable[[Sequence[Measurement]], "Figure"]


@dataclass(frozen=True)
class Paper:
    """One paper: what it says, what is checked of it, and how a user gets it."""

    slug: str
    title: str
    authors: str
    """As on the paper's first page; ``"First Author and 4 others"`` where there are many."""
    published: str
    """ISO date of the first version, to the day or month: ``2025-10``."""
    arxiv: str
    code: str | None
    """Address of the authors' code, if any."""
    topic: str
    summary: str
    """Two sentences in our own words."""
    claim: Claim
    """The headline; its verdict is the paper's."""
    experiment: Experiment
    figure: FigureMaker
    """Draws all seeds. Of several panels the first goes on the card."""
    snippet: str
    """The five lines a user would paste."""
    others: tuple[Claim, ...] = ()
    """Further claims, shown beside the headline."""
    notes: tuple[str, ...] = ()
    """What a reader must know to read the verdict: controls, limits of the scale."""
    seconds: float = 60.0
    """Rough cost at laptop scale, all seeds, two cores. Cheap papers run first."""
    data: str = ""
    """What the headline is measured on, in a word that several papers share: ``"images"``,
    ``"text"``, ``"pretrained weights"``, ``"synthetic"``, …; the page filters by it."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.slug):
            raise ValueError(
                f"slug must be lower-case words joined by hyphens (it names files), "
                f"got {self.slug!r}"
            )
        if not re.fullmatch(r"\d{4}-\d{2}(-\d{2})?", self.published):
            raise ValueError(f"published must be YYYY-MM or YYYY-MM-DD, got {self.published!r}")
        if self.code is not None and not re.match(r"https?://", self.code):
            raise ValueError(f"code must be an http(s) address or None, got {self.code!r}")

    @property
    def claims(self) -> tuple[Claim, ...]:
        """The headline claim first."""
        return (self.claim, *self.others)

    def judge(self, measurements: Sequence[Measurement]) -> tuple[Judgement, ...]:
        """Every claim held against the measurements, the headline first."""
        return tuple(claim.judge(measurements) for claim in self.claims)


class UnavailableError(RuntimeError):
    """Something that an experiment needs (data, accelerator, network) is not on this machine."""
