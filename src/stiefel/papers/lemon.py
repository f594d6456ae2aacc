"""LeMON: one network pretrained on seven equations adapts to new ones with few simulations."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from stiefel.papers.figures import BLUE, GREEN, GREY, ORANGE, VIOLET, legend, panels, title
from stiefel.papers.paper import Claim, Measurement, Paper, Scale, UnavailableError
from stiefel.papers.progress import Progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SEVEN = ["advection", "sin_flux", "bistable", "heat", "klein_gordon", "logistic", "kdv"]
THREE = ["heat", "advection", "klein_gordon"]
ONE = ["heat"]
HELD_OUT = ["burgers", "sine_gordon"]
NAMES = {"burgers": "Burgers", "sine_gordon": "sine-Gordon", "wave": "wave"}
FEW = [20, 100]
# Start → families that it was pretrained on.
STARTS: dict[str, list[str]] = {"scratch": [], "multi": SEVEN, "three": THREE, "one": ONE}

LAPTOP: dict[str, Any] = {
    "nx": 32, "nt": 32, "grid": 128, "per_draw": 5, "count": 200, "test": 100,
    "dim": 32, "heads": 4, "layers": [1, 1, 1, 2], "ffn": 64, "rank": 8, "device": "cpu",
    "pretrain_steps": 400, "batch": 64, "steps": 100, "few": FEW, "held_out": HELD_OUT,
    "meta": 0, "lora": False, "starts": 1,
}  # fmt: skip
SMOKE: dict[str, Any] = {
    "count": 32, "test": 10, "pretrain_steps": 3, "steps": 2, "batch": 16, "few": [4, 8],
}  # fmt: skip
# The sizes of the paper with wave as a third held-out family; 20,000 of its 512,000 trajectories
# of each family, as many as fit into 64 GB of memory.
PAPER: dict[str, Any] = {
    "nx": 128, "nt": 64, "grid": None, "per_draw": 50, "count": 20_000, "test": 1000,
    "dim": 512, "heads": 8, "layers": [2, 4, 8, 8], "ffn": 2048, "rank": 64, "device": "cuda",
    "pretrain_steps": 30_000, "batch": 150, "held_out": [*HELD_OUT, "wave"],
}  # fmt: skip
# Trainings from scratch on the same samples, from different starts: cheap, and what they scatter by
# is not what is asked about.
SCRATCH_STARTS = 3
META_STEPS = {Scale.SMOKE: 1, Scale.LAPTOP: 100, Scale.PAPER: 1000}


def settings(scale: Scale) -> dict[str, Any]:
    """The sizes of an experiment.

    Raises:
        UnavailableError: paper scale without a GPU.
    """
    if scale is Scale.PAPER:
        import torch

        if not torch.cuda.is_available():
            raise UnavailableError(
                "LeMON at paper scale trains 70 million weights for 30,000 steps and needs a "
                "GPU with 24 GB; there is none on this machine"
            )
        return LAPTOP | PAPER
    return LAPTOP | (SMOKE if scale is Scale.SMOKE else {})


def experiment(scale: Scale, seed: int, progress: Progress) -> Measurement:
    """Adapt an untrained and three pretrained networks to every held-out family."""
    common = settings(scale)

    from stiefel.papers.lemon_runs import run

    configs = []
    for name, families in STARTS.items():
        extra: dict[str, Any] = {}
        if name == "multi":
            extra = {"lora": True, "meta": META_STEPS[scale]}
        elif name == "scratch":
            extra = {"starts": 1 if scale is Scale.SMOKE else SCRATCH_STARTS}
        configs.append({**common, **extra, "families": families, "seed": seed})
    results = progress.shared("lemon", configs, run, span=(0.0, 0.99))
    runs = dict(zip(STARTS, results, strict=True))
    held_out, (few, many) = common["held_out"], common["few"]

    def error(start: str, family: str, count: int, method: str = "full") -> float:
        return runs[start]["errors"][f"{method} {family} {count}"]

    def worst(count: int, method: str = "full") -> float:
        return max(error("multi", f, count, method) / error("scratch", f, count) for f in held_out)

    metrics = {
        "ratio_few": worst(few),
        "ratio_many": worst(many),
        "few_over_scratch_many": fmean(error("multi", f, few) for f in held_out)
        / fmean(error("scratch", f, many) for f in held_out),
        "ratio_lora": worst(few, "lora"),
        "lora_share": runs["multi"]["trained"] / runs["multi"]["total"],
        "ratio_meta": max(
            error("multi", f, few, "meta") / error("multi", f, few) for f in held_out
        ),
        "ratio_one_family": max(error("one", f, few) / error("scratch", f, few) for f in held_out),
        "worst_zero_shot": max(runs["multi"]["errors"][f"zero {f}"] for f in held_out),
    }
    for start in STARTS:
        for name, value in runs[start]["errors"].items():
            metrics[f"{start}_{name.replace(' ', '_')}"] = value
    series = {f"loss {name}": runs[name]["losses"] for name in ("multi", "three", "one")}
    for kind, values in runs["multi"][f"field {held_out[0]}"].items():
        series[f"field {kind}"] = values
    progress(1.0, f"{few} samples: {metrics['ratio_few']:.2f} of the error from scratch")
    return Measurement(seed, metrics, series, {**common, "starts": STARTS})


def figure(measurements: Sequence[Measurement]) -> Figure:
    """Errors after adaptation; against the number of families; one prediction."""
    picture, (left, middle, right) = panels(3)
    _draw_errors(left, measurements)
    _draw_families(middle, measurements)
    _draw_field(right, measurements)
    return picture


def _draw_errors(ax: Axes, measurements: Sequence[Measurement]) -> None:
    config = measurements[0].config
    few, many = config["few"]  # pyrefly: ignore
    rows = (
        (f"scratch, {few}", f"scratch_full_{{}}_{few}", GREY),
        (f"scratch, {many}", f"scratch_full_{{}}_{many}", GREY),
        ("zero-shot", "multi_zero_{}", VIOLET),
        (f"LoRA, {few}", f"multi_lora_{{}}_{few}", GREEN),
        (f"PAML, {few}", f"multi_meta_{{}}_{few}", ORANGE),
        (f"pretrained, {few}", f"multi_full_{{}}_{few}", BLUE),
        (f"pretrained, {many}", f"multi_full_{{}}_{many}", BLUE),
    )
    for family, marker in zip(HELD_OUT, "os", strict=True):
        for y, (_, name, colour) in enumerate(rows):
            values = [m.metrics[name.format(family)] for m in measurements]
            ax.scatter(values, [-y] * len(values), s=14, color=colour, alpha=0.6, marker=marker)
            ax.plot([fmean(values)] * 2, [-y - 0.28, -y + 0.28], color=colour, linewidth=1.5)
        ax.scatter([], [], s=14, color=GREY, marker=marker, label=NAMES[family])
        for y, name, share in ((3, few, 0.9), (5, few, 0.9), (6, many, 0.85)):
            bound = share * fmean(m.metrics[f"scratch_full_{family}_{name}"] for m in measurements)
            ax.plot([bound] * 2, [-y - 0.28, -y + 0.28], ":", color=GREY, linewidth=1.3)
    ax.plot([], [], ":", color=GREY, linewidth=1.3, label="claimed at most")
    ax.set_yticks([-y for y in range(len(rows))], [label for label, *_ in rows])
    ax.set_xlim(left=0)
    ax.set_ylim(-len(rows) + 0.5, 2.2)  # room for the legend
    ax.set_xlabel("relative L2 error, new trajectories")
    title(ax, "equation not seen before")
    legend(ax)


def _draw_families(ax: Axes, measurements: Sequence[Measurement]) -> None:
    counts = [
        len(families) for families in (STARTS[s] for s in ("scratch", "one", "three", "multi"))
    ]
    for family, colour, marker in zip(HELD_OUT, (BLUE, ORANGE), "os", strict=True):
        for few, style in zip(measurements[0].config["few"], ("-", "--"), strict=True):  # pyrefly: ignore
            means = [
                fmean(m.metrics[f"{start}_full_{family}_{few}"] for m in measurements)
                for start in ("scratch", "one", "three", "multi")
            ]
            ax.plot(
                range(len(counts)), means, style, color=colour, marker=marker, markersize=3.5,
                linewidth=1.3, label=f"{NAMES[family]}, {few}",
            )  # fmt: skip
    ax.set_xticks(range(len(counts)), [str(c) for c in counts])
    low, high = ax.get_ylim()
    ax.set_ylim(0, high + 0.35 * (high - low))  # room for the legend
    ax.set_xlabel("families of pretraining")
    title(ax, "error and number of families")
    legend(ax)


def _draw_field(ax: Axes, measurements: Sequence[Measurement]) -> None:
    first = measurements[0].series
    x = [2 * (i + 0.5) / len(first["field target"]) for i in range(len(first["field target"]))]
    for name, label, colour, style in (
        ("input", "input, t = 0", GREY, ":"),
        ("target", "truth", BLUE, "-"),
        ("prediction", "prediction", ORANGE, "--"),
    ):
        ax.plot(x, first[f"field {name}"], style, color=colour, linewidth=1.4, label=label)
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.35 * (high - low))  # room for the legend
    ax.set_xlabel("x")
    title(ax, f"{NAMES[HELD_OUT[0]]}, last time, {measurements[0].config['few'][0]} samples")  # pyrefly: ignore
    legend(ax)


paper = Paper(
    slug="lemon",
    title="LeMON: Learning to Learn Multi-Operator Networks",
    authors="Jingmin Sun, Zecheng Zhang and Hayden Schaeffer",
    published="2024-08",
    arxiv="2408.16168",
    code="https://github.com/JingminSun/LeMON",
    topic="layers",
    data="simulations",
    summary=(
        "One transformer learns the evolution operators of many differential equations; it reads "
        "which equation it has before it in Polish notation. A new equation then needs few "
        "simulations, by fine-tuning, low-rank adapters or after meta-learning."
    ),
    claim=Claim(
        "On equations not seen before, 20 trajectories leave a network pretrained on seven others "
        "with at most 0.9 of the error of the same network from scratch (larger ratio of two "
        "equations)",
        metric="ratio_few",
        at_most=0.9,
    ),
    others=(
        Claim(
            "and 100 trajectories with at most 0.85",
            metric="ratio_many",
            at_most=0.85,
        ),
        Claim(
            "20 trajectories after pretraining beat 100 from scratch (ratio of mean errors)",
            metric="few_over_scratch_many",
            at_most=1.0,
        ),
        Claim(
            "LoRA with 20 trajectories ends at 0.9 of the error from scratch or below (the larger "
            "ratio)",
            metric="ratio_lora",
            at_most=0.9,
        ),
        Claim(
            "and trains at most 15 % of the weights",
            metric="lora_share",
            at_most=0.15,
        ),
    ),
    experiment=experiment,
    figure=figure,
    snippet="""\
from stiefel.nn.lemon import PROSE, PolishTokenizer, evaluate, finetune, operator_data, pde
model = PROSE(n_x=32, vocab=len(PolishTokenizer()), dim=32, heads=4, layers=(1, 1, 1, 2))
data = operator_data(pde.sample("burgers", 20, nx=32, nt=32))
report = finetune(model, data, steps=5)
error = evaluate(model, data)
""",
    notes=(
        (
            "Pretrained on advection, sine flux, bistable, heat, Klein–Gordon, logistic and KdV, "
            "200 trajectories each; Burgers and sine-Gordon are held out. 82,688 weights, 400 "
            "steps of pretraining, 100 of adaptation. The paper's network has 70 million and "
            "512,000 trajectories a family."
        ),
        (
            "Everything is solved here, spectrally on 128 points of which 32 are kept; ε of the "
            "conservation laws is 0.03, so that no shock is thinner than the grid. Eight slices "
            "of the first half of the time are the input, eight of the second half the target. "
            "Each parameter set has five initial conditions."
        ),
        (
            "Adaptation runs at a rate of 1e-3 after pretraining and 2e-3 from scratch, neither "
            "tuned here; from scratch is the mean over three starts. 100 steps are few for an "
            "untrained network: the comparison is about few steps as much as about few "
            "trajectories."
        ),
        (
            "Zero-shot, told only the symbols, the network is poor: its error is about a third of "
            "the norm. Pretraining on the heat equation alone helps little or harms; one "
            "equation teaches no others."
        ),
        (
            "Meta-learning (PAML, 100 outer steps of two tasks from the pretrained weights) gains "
            "nothing over plain pretraining here, where initial data are drawn alike for all "
            "families. The paper's largest gains are on other initial data."
        ),
        (
            "Two facts found on the way: the authors' data of Cahn–Hilliard and the sign of their "
            "porous-medium formula disagree with the equations named, and adapters put on torch's "
            "own encoder layer are skipped in evaluation. Neither touches what is measured here."
        ),
    ),
    seconds=100.0,
)
