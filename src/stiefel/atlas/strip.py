"""A claim in one line of picture: seeds, mean, interval, and the side of the bound that counts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from stiefel.papers.paper import Judgement

WIDTH, HEIGHT = 160, 26


def strip(judgement: Judgement, values: Sequence[float]) -> str:
    """An ``<svg>`` of a claim: a dot a seed, a bar for the interval, the kept side shaded.

    Empty if there is nothing finite to draw.
    """
    claim, (lo, hi) = judgement.claim, judgement.interval
    values = [v for v in values if math.isfinite(v)]
    if not values or not math.isfinite(claim.bound):
        return ""
    # An interval from two seeds can be far wider than anything else: it may run off the edge.
    core = [*values, claim.bound]
    span = max(core) - min(core) or abs(claim.bound) or 1.0
    ends = [v for v in (lo, hi) if math.isfinite(v)]
    left = max(min([*core, *ends]), min(core) - span) - 0.08 * span
    right = min(max([*core, *ends]), max(core) + span) + 0.08 * span

    def x(value: float) -> float:
        place = (min(max(value, left), right) - left) / (right - left)
        return round(2 + place * (WIDTH - 4), 1)

    bound, middle = x(claim.bound), HEIGHT / 2
    kept = (2.0, bound) if claim.at_most is not None else (bound, WIDTH - 2.0)
    width, tall = kept[1] - kept[0], HEIGHT - 6
    parts = [
        f'<svg class="strip" viewBox="0 0 {WIDTH} {HEIGHT}" aria-hidden="true">',
        f'<rect class="kept" x="{kept[0]}" y="3" width="{width:.1f}" height="{tall}" rx="3"/>',
        f'<line class="bound" x1="{bound}" x2="{bound}" y1="1" y2="{HEIGHT - 1}"/>',
    ]
    if len(ends) == 2:
        parts.append(
            f'<line class="interval" x1="{x(lo)}" x2="{x(hi)}" y1="{middle}" y2="{middle}"/>'
        )
    parts += [f'<circle class="seed" cx="{x(v)}" cy="{middle}" r="3"/>' for v in values]
    if math.isfinite(judgement.value):
        mean = x(judgement.value)
        parts.append(
            f'<line class="mean" x1="{mean}" x2="{mean}" y1="{middle - 8}" y2="{middle + 8}"/>'
        )
    return "".join(parts) + "</svg>"
