"""NorMuon, checked on a small byte-level GPT: fewer steps than AdamW, no worse than Muon."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from stiefel.papers import race
from stiefel.papers.figures import COLOURS, LABELS, draw_losses, legend, panels, title
from stiefel.papers.paper import Claim, Measurement, Paper, Scale
from stiefel.papers.progress import Progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METHODS = ("muon", "normuon", "adamw")
# The control: Muon's direction at NorMuon's size, without the row normalisation.
CONTROL = "muon-exact-rms"
# The part of AdamW's steps that NorMuon is given in the headline.
SHORT = 0.6
# A seed on which NorMuon ends further than this above Muon counts as behind.
TOLERANCE = 0.01


def experiment(scale: Scale, seed: int, progress: Progress) -> Measurement:
    """Race NorMuon against AdamW and Muon, each at the best rate of its grid on seed 0."""
    plan = race.plan(scale)
    choices = race.choose(progress, plan, METHODS, span=(0.0, 0.6))
    short_steps = round(SHORT * plan.steps)
    configs = {method: plan.config(method, choices[method].lr, seed) for method in METHODS}
    configs["short"] = plan.config("normuon", choices["normuon"].lr, seed, short_steps)
    configs["control"] = plan.config(CONTROL, choices["muon"].lr, seed)
    results = progress.shared(plan.kind, list(configs.values()), plan.trainer, span=(0.6, 1.0))
    runs = dict(zip(configs, results, strict=True))
    finals = {name: race.final(run) for name, run in runs.items()}

    late = [probe for probe in runs["normuon"]["probes"] if probe["step"] >= plan.steps // 4]
    tall = [probe["tall"] for probe in late]
    metrics = {
        "loss_short_minus_adamw": finals["short"] - finals["adamw"],
        "loss_minus_muon": finals["normuon"] - finals["muon"],
        "behind_muon": float(finals["normuon"] - finals["muon"] > TOLERANCE),
        "loss_minus_control": finals["normuon"] - finals["control"],
        "control_minus_muon": finals["control"] - finals["muon"],
        "variation_ratio": fmean(t["variation_after"] for t in tall)
        / fmean(t["variation_before"] for t in tall),
        "condition_ratio": fmean(t["condition_after"] for t in tall)
        / fmean(t["condition_before"] for t in tall),
        **{f"loss_{name}": value for name, value in finals.items()},
    }
    crossings = {
        "steps_muon_to_adamw": race.crossing(runs["muon"], finals["adamw"]),
        "steps_to_adamw": race.crossing(runs["normuon"], finals["adamw"]),
        "steps_to_muon": race.crossing(runs["normuon"], finals["muon"]),
    }
    metrics |= {name: value for name, value in crossings.items() if value is not None}
    return Measurement(seed, metrics, _series(runs, late), race.settings_of(plan, choices))


def _series(runs: dict[str, race.Run], late: list[race.Run]) -> dict[str, list[float]]:
    series = {f"loss {name}": run["losses"] for name, run in runs.items()}
    series |= {f"steps {name}": run["steps"] for name, run in runs.items()}
    series["probe steps"] = [probe["step"] for probe in late]
    for kind in ("square", "tall", "wide"):
        for when in ("before", "after"):
            series[f"variation {when} {kind}"] = [p[kind][f"variation_{when}"] for p in late]
    return series


def figure(measurements: Sequence[Measurement]) -> Figure:
    """Loss curves; the paired differences to Muon with the control; row norms."""
    picture, (left, middle, right) = panels(3)
    draw_losses(
        left,
        measurements,
        {
            "adamw": (LABELS["adamw"], COLOURS["adamw"], "-"),
            "muon": (LABELS["muon"], COLOURS["muon"], "-"),
            "normuon": (LABELS["normuon"], COLOURS["normuon"], "-"),
            "short": ("0.6 × steps", COLOURS["short"], "-"),
        },
    )
    level = fmean(m.metrics["loss_adamw"] for m in measurements)
    left.axhline(level, color=COLOURS["adamw"], linewidth=0.8, linestyle=":")
    _draw_differences(middle, measurements)
    _draw_variation(right, measurements)
    return picture


def _draw_differences(ax: Axes, measurements: Sequence[Measurement]) -> None:
    """Each seed's final loss minus Muon's, for NorMuon and for the control."""
    columns = (
        ("NorMuon", "loss_minus_muon", "normuon"),
        ("control", "control_minus_muon", CONTROL),
    )
    for m in measurements:
        pair = [m.metrics[metric] for _, metric, _ in columns]
        ax.plot([0, 1], pair, color=COLOURS["adamw"], linewidth=0.7, zorder=1)
    for x, (_, metric, colour) in enumerate(columns):
        values = [m.metrics[metric] for m in measurements]
        ax.scatter([x] * len(values), values, s=22, color=COLOURS[colour], zorder=2)
    ax.axhline(0.0, color=COLOURS["muon"], linewidth=0.8, linestyle=":")
    ax.set_xticks([0, 1], ["NorMuon", "Muon,\nexact RMS"])
    ax.set_xlim(-0.5, 1.5)
    title(ax, "final loss − Muon's")


def _draw_variation(ax: Axes, measurements: Sequence[Measurement]) -> None:
    """Spread of the row norms before and after the normalisation, by shape."""
    for x, kind in enumerate(("square", "wide", "tall")):
        for when, offset in (("before", -0.19), ("after", 0.19)):
            value = fmean(fmean(m.series[f"variation {when} {kind}"]) for m in measurements)
            colour = COLOURS["muon" if when == "before" else "normuon"]
            label = {"before": "Newton–Schulz", "after": "NorMuon"}[when] if x == 0 else None
            ax.bar(x + offset, value, 0.36, color=colour, label=label)
    ax.set_xticks(range(3), ["square", "wide", "tall"])
    title(ax, "variation of row norms")
    legend(ax, "upper left")


paper = Paper(
    slug="normuon",
    title="NorMuon: Making Muon more efficient and scalable",
    authors="Zichong Li and 4 others",
    published="2025-10",
    arxiv="2510.05491",
    code="https://github.com/zichongli5/NorMuon",
    topic="optimizers",
    data="text",
    summary=(
        "Muon makes the directions of an update equally strong, but not its rows: some neurons "
        "move much further than others. NorMuon keeps one running second moment per neuron, "
        "divides by its root, and restores the size of the whole update."
    ),
    claim=Claim(
        "With 0.6 × the steps NorMuon ends at or below AdamW's final loss "
        "(loss after 120 steps minus AdamW's after 200)",
        metric="loss_short_minus_adamw",
        at_most=0.0,
    ),
    others=(
        Claim(
            "At equal steps NorMuon ends at or below Muon (paired difference of final losses)",
            metric="loss_minus_muon",
            at_most=0.0,
        ),
        Claim(
            "On no seed does NorMuon end more than 0.01 above Muon (share of seeds that do)",
            metric="behind_muon",
            at_most=0.0,
        ),
        Claim(
            "On tall matrices the row norms of the update vary at most half as much as before "
            "the normalisation (coefficient of variation, ratio)",
            metric="variation_ratio",
            at_most=0.5,
        ),
        Claim(
            "There the update stays as well conditioned as Muon's, within a factor of 2",
            metric="condition_ratio",
            at_most=2.0,
        ),
    ),
    experiment=experiment,
    figure=figure,
    snippet="""\
import torch
from stiefel.optim import NorMuon, split_parameters
model = torch.nn.TransformerEncoderLayer(64, 4)
optimizer = NorMuon(split_parameters(model), lr=1e-2)
model(torch.randn(8, 2, 64)).square().mean().backward(); optimizer.step()
""",
    notes=(
        race.RULES,
        "NorMuon and Muon both use Nesterov momentum and the classic five Newton–Schulz steps.",
        (
            "The control is Muon with NorMuon's exact update size but without the row "
            "normalisation, at Muon's rate. Where it ends as low as NorMuon, the gain over Muon "
            "is owed to the size rule, not to the rows."
        ),
        (
            "Another order of rounding inside Newton–Schulz alone moves a final loss by about as "
            "much as NorMuon and Muon differ here: read the interval, not the sign."
        ),
        (
            "The rows of a polar factor differ in norm only where a matrix is taller than wide; on "
            "the others NorMuon corrects little more than Newton–Schulz's own error."
        ),
        (
            "The paper's 11 % fewer steps than Muon is a figure for a billion parameters. Here the "
            "whole run is 200 steps of 1,024 bytes; the step at which NorMuon reaches Muon's final "
            "loss is among the metrics (steps_to_muon)."
        ),
    ),
    seconds=80.0,
)
