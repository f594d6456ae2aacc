"""Orthogonal Adaptation: adapters trained apart with disjoint inputs, then simply summed."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from stiefel.papers.figures import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    VIOLET,
    legend,
    mean_series,
    panels,
    title,
)
from stiefel.papers.paper import Claim, Measurement, Paper, Scale, UnavailableError
from stiefel.papers.progress import Progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Labs (split, base and heads of their own) a seed: one lab's gain scatters by about a point.
LABS = 10
STYLES = {
    "lora": ("LoRA", GREY, "o", "-"),
    "lora fast": ("LoRA, rate × 3", GREY, "o", ":"),
    "same": ("one B for all", ORANGE, "s", "-"),
    "gaussian": ("Gaussian B", VIOLET, "v", "-"),
    "columns": ("random columns", BLUE, "o", "-"),
    "slots": ("slots", GREEN, "D", "-"),
}
# Share of columns that two adapters have in common; random ones: r / m, mean of both matrices.
OVERLAP = {"slots": 0.0, "columns": (8 / 64 + 8 / 128) / 2, "half": 0.5, "same": 1.0}


NOTES = (
    (
        "1,797 digits; trunk 64 – 128 – 128 trained on the ten classes, five questions with frozen "
        "random heads. Adapters of rank 8 on both matrices, 200 Adam steps, A at 3e-3; LoRA trains "
        "A and B at 1e-3. A seed has ten labs (split, base and heads of its own); every number of "
        "a lab is a mean over three draws of columns, starts and training orders and over all "
        "subsets of K questions. Nothing is tuned here, λ is the paper's."
    ),
    (
        "With two adapters there is no gain over one B for all (K = 2 in the last panel is flat). "
        "Different columns pay from three on."
    ),
    (
        "Much of this hangs on rates. LoRA at the frozen methods' own rate, 3e-3 (dotted), answers "
        "2 points better than random columns when three are merged. What it loses is the base: "
        "its ten digits are 12 points worse. At 1e-2 (five labs, two draws) three "
        "LoRAs gave 90.2 % and 60.7 % of the digits, random columns 77.8 % and 56.3 %, one B for "
        "all 78.3 % and 54.5 %: with large steps orthogonality did not help at all. At 1e-3 the "
        "frozen methods learn less and forget less (82.0 % and 93.7 %, one B for all 82.2 % and "
        "92.4 %)."
    ),
    (
        "Random columns share r² / m of them with another adapter on average, just what a Gaussian "
        "B has in the mean square; they only make most pairs exactly orthogonal. A Gaussian B "
        "does as well here. Slots share none and need somebody to hand them out."
    ),
    (
        "A small conditional diffusion model of digits, new classes as concepts, did not "
        "reproduce: every method, orthogonal or not, lost its concepts when three adapters were "
        "summed (identity at most 0.25 at λ = 0.6). So nothing here speaks for or against the "
        "paper's pictures, which also train tokens, with far smaller updates."
    ),
)


def experiment(scale: Scale, seed: int, progress: Progress) -> Measurement:
    """Train five adapters by each of seven methods, merge every subset, on ten labs."""
    if scale is Scale.PAPER:
        raise UnavailableError(
            "the paper scale needs a CUDA device, Stable Diffusion 1.5 with a CLIP and a face "
            "model, and twelve folders of photographs of people, which nobody may redistribute. "
            "With your own: add_orthogonal_adapters(pipe.unet, 20, adapter_id=person, "
            r"target_modules=r'.*(to_[qkv]|to_out\.0|proj_in|proj_out|ff\.net\..*)'), train A at "
            "1e-5, merge_adapters(three, 0.6, 'fold')"
        )
    from stiefel.papers.orthogonal_adaptation_runs import METHODS, SIZES, run, settings

    common = settings(scale)
    labs = 2 if scale is Scale.SMOKE else LABS
    configs = [{**common, "seed": LABS * seed + i} for i in range(labs)]
    results = progress.shared("orthogonal-adaptation", configs, run)

    def gains(other: str, kind: str, k: int) -> list[float]:
        """Random columns minus ``other`` with K = k adapters, one a lab."""
        return [r["columns"][kind][k - 1] - r[other][kind][k - 1] for r in results]

    over_lora, over_same = gains("lora", "task", 3), gains("same", "task", 3)
    metrics = {
        "gain": fmean(over_lora),
        "least_gain": min(over_lora),
        "labs_ahead": sum(gain > 0 for gain in over_lora) / labs,
        "base_gain": fmean(gains("lora", "base", 3)),
        "gain_of_five": fmean(gains("lora", "task", 5)),
        "alone": fmean(gains("lora", "task", 1)),
        "gain_over_same": fmean(over_same),
        "labs_over_same": sum(gain > 0 for gain in over_same) / labs,
        "gain_of_two_over_same": fmean(gains("same", "task", 2)),
        "gain_over_fast": fmean(gains("lora fast", "task", 3)),
        "base_gain_over_fast": fmean(gains("lora fast", "base", 3)),
        "gain_over_gaussian": fmean(gains("gaussian", "task", 3)),
        "crosstalk_slots": max(r["slots"]["largest_crosstalk"] for r in results),
    }
    for method in METHODS:
        if method != "slots":
            metrics[f"crosstalk_{method.replace(' ', '_')}"] = fmean(
                r[method]["crosstalk"] for r in results
            )
        for kind in ("task", "base"):
            for k in SIZES:
                value = fmean(r[method][kind][k - 1] for r in results)
                metrics[f"{kind}_{method.replace(' ', '_')}_{k}"] = value
    series = {"K": [float(k) for k in SIZES]}
    for method in METHODS:
        for kind in ("task", "base"):
            name = f"{kind}_{method.replace(' ', '_')}"
            series[f"{kind} {method}"] = [metrics[f"{name}_{k}"] for k in SIZES]
    progress(1.0, f"three merged: {metrics['gain']:+.1f} points over LoRA")
    config = {**common, "labs": labs, "sha256": results[0]["sha256"]}
    return Measurement(seed, metrics, series, config)


def figure(measurements: Sequence[Measurement]) -> Figure:
    """Accuracy against the number of merged adapters, and against the overlap of their columns."""
    picture, (left, middle, right) = panels(3)
    _draw_sizes(left, measurements, "task")
    title(left, "merged questions, %")
    legend(left)
    _draw_sizes(middle, measurements, "base")
    title(middle, "the ten digits, %")
    _draw_overlap(right, measurements)
    return picture


def _draw_sizes(ax: Axes, measurements: Sequence[Measurement], kind: str) -> None:
    sizes = mean_series(measurements, "K")
    for method, (label, colour, marker, line) in STYLES.items():
        for m in measurements:
            ax.plot(sizes, m.series[f"{kind} {method}"], color=colour, linewidth=0.6, alpha=0.35)
        mean = mean_series(measurements, f"{kind} {method}")
        ax.plot(
            sizes, mean, line, color=colour, marker=marker, markersize=3, linewidth=1.4, label=label
        )
    ax.set_xticks(sizes, [f"{k:.0f}" for k in sizes])
    ax.set_xlabel("adapters merged K (λ = 0.6)")


def _draw_overlap(ax: Axes, measurements: Sequence[Measurement]) -> None:
    for k, colour, marker in ((2, GREEN, "D"), (3, BLUE, "o"), (5, ORANGE, "s")):
        shares = list(OVERLAP.values())
        values = [
            fmean(m.metrics[f"task_{method}_{k}"] for m in measurements) for method in OVERLAP
        ]
        for m in measurements:
            each = [m.metrics[f"task_{method}_{k}"] for method in OVERLAP]
            ax.plot(shares, each, color=colour, linewidth=0.6, alpha=0.35)
        ax.plot(shares, values, color=colour, marker=marker, markersize=3.5)
        ax.annotate(
            f"K = {k}",
            (shares[-1], values[-1]),
            xytext=(0, 5),
            textcoords="offset points",
            ha="right",
            fontsize=7,
        )
        lora = fmean(m.metrics[f"task_lora_{k}"] for m in measurements)
        ax.axhline(lora, color=colour, linewidth=0.9, linestyle=(0, (4, 3)))
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.05 * (high - low))  # room for the upper label
    ax.set_xlabel("common columns (dashes: LoRA)")
    title(ax, "merged questions, %")


paper = Paper(
    slug="orthogonal-adaptation",
    title="Orthogonal Adaptation for Modular Customization of Diffusion Models",
    authors="Ryan Po and 3 others",
    published="2023-12",
    arxiv="2312.02432",
    code=None,
    topic="merging",
    data="images",
    summary=(
        "Every adapter freezes a down-projection of orthonormal columns drawn from one basis that "
        "all people share, and trains only the up-projection. Adapters trained apart then hardly "
        "meet, and any of them can be summed at once without training again."
    ),
    claim=Claim(
        "Three adapters summed with λ = 0.6 answer their questions at least 2.5 points better than "
        "three LoRAs (mean over all triples)",
        metric="gain",
        at_least=2.5,
    ),
    others=(
        Claim(
            "and better on every lab (share of labs)",
            metric="labs_ahead",
            at_least=1.0,
        ),
        Claim(
            "and forget at least 6 points less of what the base knew (accuracy on the ten digits)",
            metric="base_gain",
            at_least=6.0,
        ),
        Claim(
            "Alone they lose at most 0.5 points to LoRA",
            metric="alone",
            at_least=-0.5,
        ),
        Claim(
            "All five summed, they are at least 2.5 points better than LoRA",
            metric="gain_of_five",
            at_least=2.5,
        ),
        Claim(
            "Different columns matter: three summed are better than with one B for all (points)",
            metric="gain_over_same",
            at_least=0.0,
        ),
        Claim(
            "on at least four of five labs",
            metric="labs_over_same",
            at_least=0.8,
        ),
        Claim(
            "Crosstalk of slots is zero (largest of all pairs and matrices)",
            metric="crosstalk_slots",
            at_most=1e-6,
        ),
        Claim(
            "Crosstalk of random columns is at most 0.15 (mean)",
            metric="crosstalk_columns",
            at_most=0.15,
        ),
        Claim(
            "Crosstalk of LoRA is at least 0.3 (mean)",
            metric="crosstalk_lora",
            at_least=0.3,
        ),
    ),
    experiment=experiment,
    figure=figure,
    snippet="""\
import torch; from stiefel.merge import add_orthogonal_adapters, crosstalk, merge_adapters
base = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
mia = add_orthogonal_adapters(base, r=4, adapter_id="mia", target_modules=["0", "2"])
optimizer = torch.optim.AdamW(mia.parameters(), lr=3e-3)  # only A: B is frozen and shared
together = merge_adapters([mia], weights=0.6); print(crosstalk(mia, mia))
""",
    notes=NOTES,
    seconds=80.0,
)
