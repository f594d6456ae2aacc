"""Papers made for the tests of the runner, the page and the command line.

Each child process imports this module by name, so nothing here may depend on the test that runs.
What a test wants to vary it passes through a folder named in STIEFEL_TEST_DIR.
"""

import os
import time
from pathlib import Path

from shared_work import square

from stiefel.papers import Claim, Measurement, Paper, Scale, UnavailableError


def _folder():
    return Path(os.environ["STIEFEL_TEST_DIR"])


def make(slug, experiment, figure=None, **changes):
    fields = {
        "slug": slug,
        "title": f"The {slug} paper",
        "authors": "A. Author and 2 others",
        "published": "2025-03-14",
        "arxiv": "2503.00001",
        "code": "https://example.org/code",
        "topic": "testing",
        "summary": "A summary. In two sentences.",
        "claim": Claim(text="the ratio stays small", metric="ratio", at_most=0.9),
        "snippet": "from stiefel.optim import RMNP\nopt = RMNP(groups, lr=0.02)  # a comment",
        "seconds": 3.0,
    }
    return Paper(experiment=experiment, figure=figure or draw, **{**fields, **changes})


def draw(measurements):
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots()
    for m in measurements:
        axes.plot(m.series["loss"], label=f"seed {m.seed}")
    axes.set(xlabel="step", ylabel="loss", title="Loss <b> & more")
    axes.axhline(1.0, color="black")
    axes.legend()
    return figure


def quick_experiment(scale, seed, progress):
    import torch

    with (_folder() / "calls.txt").open("a") as file:
        file.write(f"quick {seed}\n")
    print("printed by an experiment")
    for step in range(3):
        progress(step / 3, f"loss {step}")
    return Measurement(
        seed=seed,
        metrics={"ratio": 0.7 + 0.01 * seed, "nothing": float("nan")},
        series={"loss": [3.0, 2.0, 1.0 + seed]},
        config={
            "threads": os.environ["OMP_NUM_THREADS"],
            "torch_threads": torch.get_num_threads(),
            "scale": scale.value,
        },
    )


def crash_experiment(scale, seed, progress):
    if seed == 1 and not (_folder() / "mended").exists():
        raise RuntimeError("the <matrix> broke")
    return Measurement(seed=seed, metrics={"ratio": 0.5}, series={"loss": [1.0]})


def killed_experiment(scale, seed, progress):
    os.kill(os.getpid(), 9)


def slow_experiment(scale, seed, progress):
    """Seed 0 is done at once, the others take half a minute."""
    (_folder() / f"started-{seed}").write_text(str(os.getpid()))
    if seed:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and not (_folder() / "hurry").exists():
            time.sleep(0.05)
    return Measurement(seed=seed, metrics={"ratio": 0.5}, series={"loss": [1.0]})


def unavailable_experiment(scale, seed, progress):
    if scale is Scale.PAPER:
        raise UnavailableError("needs eight GPUs,\n found none.")
    return Measurement(seed=seed, metrics={"ratio": 1.5}, series={"loss": [1.0]})


def sharing_experiment(scale, seed, progress):
    runs = progress.shared("square", [{"n": 2}, {"n": 3}], square)
    return Measurement(
        seed=seed, metrics={"ratio": 0.1 * sum(r["value"] for r in runs)}, series={"loss": [1.0]}
    )


quick = make("quick", quick_experiment)
crash = make("crash", crash_experiment, seconds=2.0)
killed = make("killed", killed_experiment, seconds=1.0)
slow = make("slow", slow_experiment)
unavailable = make("unavailable", unavailable_experiment)
sharing_a = make("sharing-a", sharing_experiment)
sharing_b = make("sharing-b", sharing_experiment)
local = make("local", lambda scale, seed, progress: None)
