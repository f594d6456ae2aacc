"""A paper with what was measured of it: what the page, the feed and the cards speak about."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from stiefel.atlas.api import api_names
from stiefel.atlas.record import Earlier, Record, failed_seeds, load_all, load_earlier
from stiefel.atlas.result import Result, combine
from stiefel.papers.paper import Judgement, Paper, Scale

NOT_RUN = "not run yet"


@dataclass(frozen=True)
class Entry:
    """A paper with what there is of it under ``results``."""

    paper: Paper
    scale: Scale | None
    result: Result | None
    records: tuple[Record, ...]
    earlier: tuple[Earlier, ...] = ()
    """What the seeds gave before these records, where they had been run before."""

    @property
    def verdict(self) -> str:
        """The word on the badge."""
        return self.result.verdict.value if self.result else NOT_RUN

    @property
    def updated(self) -> str:
        """When it last changed, RFC 3339."""
        if self.records:
            return max(record.started for record in self.records)
        return f"{self.paper.published}-01"[:10] + "T00:00:00+00:00"

    @property
    def command(self) -> str:
        """What repeats it."""
        scale = self.scale or Scale.LAPTOP
        seeds = ",".join(map(str, self.result.seeds if self.result else (0, 1, 2)))
        return f"stiefel reproduce {self.paper.slug} --scale {scale.value} --seeds {seeds}"

    @property
    def api(self) -> tuple[str, ...]:
        """Full names of what the snippet takes from Stiefel."""
        return api_names(self.paper.snippet)

    @property
    def headline(self) -> Judgement | None:
        """The first claim held against the measurements; None where nothing was measured."""
        return self.result.claims[0] if self.result and self.result.measurements else None

    @property
    def margin(self) -> float:
        """:func:`margin` of the headline; NaN where nothing was measured or a seed crashed."""
        if self.headline is None or self.result is None or self.result.errors:
            return math.nan
        return math.nan if self.scale is Scale.SMOKE else margin(self.headline)


def read_entry(results: Path, paper: Paper) -> Entry:
    """What there is of ``paper``, at the largest scale that was run."""
    for scale in (Scale.PAPER, Scale.LAPTOP, Scale.SMOKE):
        records = [r for r in load_all(results, paper.slug, scale) if r.answers(paper)]
        errors = failed_seeds(results, paper.slug, scale)
        if records or errors:
            earlier = tuple(load_earlier(results, paper.slug, scale))
            result = combine(paper, scale, records, errors)
            return Entry(paper, scale, result, tuple(records), earlier)
    return Entry(paper, None, None, ())


def margin(judgement: Judgement) -> float:
    """How far the mean lies beyond the bound, in half-widths of its 95 % interval.

    At least 1: the whole interval keeps the bound, so the claim is reproduced. Less than −1: all of
    it breaks the bound. NaN without an interval. Where all seeds gave the same number the interval
    has no width: 1 on the bound, otherwise infinite.
    """
    lo, hi = judgement.interval
    if not (math.isfinite(lo) and math.isfinite(hi) and math.isfinite(judgement.value)):
        return math.nan
    claim = judgement.claim
    sign = 1 if claim.at_most is not None else -1
    distance, half = sign * (claim.bound - judgement.value), (hi - lo) / 2
    if half > 0:
        return distance / half
    return 1.0 if distance == 0 else math.copysign(math.inf, distance)
