"""What a paper's seeds say together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from stiefel.atlas.record import Record
from stiefel.papers.paper import Judgement, Measurement, Paper, Scale, Verdict


@dataclass(frozen=True)
class Result:
    """A paper held against what was measured of it.

    ``verdict`` is the headline claim's; ``inconclusive`` always at smoke scale, ``failed`` when a
    seed crashed. ``seconds`` is the sum of the seeds' wall times, ``peak_rss_mb`` (MiB) the largest
    of their peaks.
    """

    slug: str
    scale: Scale
    verdict: Verdict
    claims: tuple[Judgement, ...]
    """Every claim, the headline first."""
    seeds: tuple[int, ...]
    """Seeds asked for; those that crashed are among them."""
    seconds: float
    peak_rss_mb: float | None
    commit: str | None
    measurements: tuple[Measurement, ...]
    """One for each seed that finished."""
    errors: Mapping[int, str] = field(default_factory=dict)
    """For each seed that crashed, what went wrong, in one line."""

    def to_json(self) -> dict[str, Any]:
        """JSON-able; what JSON cannot say (NaN, infinities) is None."""
        return {
            "slug": self.slug,
            "scale": self.scale.value,
            "verdict": self.verdict.value,
            "claims": [
                {
                    "text": j.claim.text,
                    "metric": j.claim.metric,
                    "value": _finite(j.value),
                    "interval": [_finite(j.interval[0]), _finite(j.interval[1])],
                    "bound": _finite(j.claim.bound),
                    "verdict": j.verdict.value,
                }
                for j in self.claims
            ],
            "seeds": list(self.seeds),
            "seconds": round(self.seconds, 3),
            "peak_rss_mb": None if self.peak_rss_mb is None else round(self.peak_rss_mb, 1),
            "commit": self.commit,
            "measurements": [
                {"seed": m.seed, "metrics": {k: _finite(v) for k, v in m.metrics.items()}}
                for m in self.measurements
            ],
        }


def combine(
    paper: Paper, scale: Scale, records: Sequence[Record], errors: Mapping[int, str] | None = None
) -> Result:
    """The result of a paper from the records of its seeds and the errors of those that crashed.

    Raises:
        KeyError: a record lacks the metric of a claim (it was made by another version of the
            paper).
    """
    errors = dict(errors or {})
    records = sorted((r for r in records if r.seed not in errors), key=lambda r: r.seed)
    measurements = tuple(r.measurement for r in records)
    claims = paper.judge(measurements)
    if errors:
        claims = tuple(replace(j, verdict=Verdict.FAILED) for j in claims)
    elif scale is Scale.SMOKE:
        claims = tuple(replace(j, verdict=Verdict.INCONCLUSIVE) for j in claims)
    peaks = [r.peak_rss_mb for r in records if r.peak_rss_mb is not None]
    newest = max(records, key=lambda r: r.started, default=None)
    return Result(
        slug=paper.slug,
        scale=scale,
        verdict=claims[0].verdict,
        claims=claims,
        seeds=tuple(sorted({*(r.seed for r in records), *errors})),
        seconds=math.fsum(r.seconds for r in records),
        peak_rss_mb=max(peaks, default=None),
        commit=newest.commit if newest else None,
        measurements=measurements,
        errors=errors,
    )


def number(value: float | None) -> str:
    """A number for people: four significant digits."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:.4g}".replace("-", "−")


def interval(bounds: tuple[float, float]) -> str:
    """An interval for people; a dash where there is none."""
    return "–" if math.isinf(bounds[0]) and bounds[0] < 0 else " to ".join(map(number, bounds))


def estimate(judgement: Judgement) -> str:
    """Mean and interval for people; a dash without measurements."""
    if math.isnan(judgement.value):
        return "–"
    if math.isinf(judgement.interval[0]):
        return number(judgement.value)
    return f"{number(judgement.value)} ({interval(judgement.interval)})"


def plus_minus(judgement: Judgement) -> str:
    """Mean and half the width of its interval, for people."""
    half = (judgement.interval[1] - judgement.interval[0]) / 2
    value = number(judgement.value)
    return f"{value} ± {half:.2g}" if math.isfinite(half) else value


def duration(seconds: float) -> str:
    """A time span for people: ``0.4 s``, ``12 s``, ``3 min 05 s``, ``2 h 10 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
