"""What the cards have in common, for their tests."""

import dataclasses
import math
import subprocess
import sys
import time

from stiefel.papers import Progress, Scale, Verdict, get

# Words in the names of metrics that a clock gives: these differ between two runs.
TIMED = ("time", "milliseconds", "seconds", "speedup")


def check_listing_is_cheap(module):
    code = (
        f"import sys, stiefel.papers.{module}; "
        "print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]


def check_smoke(slug, *, seconds=10, race=True):
    """One seed from scratch, twice over the same store; returns the measurement.

    ``race``: the experiment picks learning rates from a grid and trains on text.
    """
    progress, seen = Progress(lambda f, m: seen.append(f)), []
    started = time.process_time()
    measurement = get(slug).experiment(Scale.SMOKE, 0, progress)
    assert time.process_time() - started < seconds
    assert seen[-1] == 1.0
    for claim in get(slug).claims:
        assert math.isfinite(measurement.metrics[claim.metric])
    assert all(math.isfinite(v) for v in measurement.metrics.values())
    if race:
        assert set(measurement.config["bracketed"]) == set(measurement.config["rates"])
        assert len(measurement.config["text_sha256"]) == 64
    again = get(slug).experiment(Scale.SMOKE, 0, progress)
    for name, value in measurement.metrics.items():
        if not any(word in name for word in TIMED):
            assert again.metrics[name] == value
    return measurement


def check_claims_follow_the_measurements(slug, measurement):
    """Move each claim's metric across its bound and see the verdict turn, the others stay."""
    paper = get(slug)

    def verdicts(metric, value):
        changed = dataclasses.replace(measurement, metrics={**measurement.metrics, metric: value})
        return {j.claim.metric: j.verdict for j in paper.judge([changed] * 3)}

    for claim in paper.claims:
        sign = 1 if claim.at_most is None else -1
        good = verdicts(claim.metric, claim.bound + sign * 1e-3)
        bad = verdicts(claim.metric, claim.bound - sign * 1e-3)
        assert good.pop(claim.metric) is Verdict.REPRODUCED
        assert bad.pop(claim.metric) is Verdict.NOT_REPRODUCED
        assert good == bad


def check_figure(slug, measurement, *, panels=3):
    figure = get(slug).figure([measurement, dataclasses.replace(measurement, seed=1)])
    assert len(figure.axes) == panels
    for axes in figure.axes:
        assert axes.get_title(loc="left")
        assert axes.lines or axes.patches or axes.collections
    assert figure.get_facecolor()[3] == 0
    return figure


def check_snippet(slug):
    """Run what the card tells people to paste; returns the names that it leaves."""
    snippet = get(slug).snippet
    assert len(snippet.strip().splitlines()) == 5
    scope = {}
    exec(snippet, scope)  # noqa: S102 - what the card tells people to paste
    return scope
