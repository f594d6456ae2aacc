"""Learning to relax: bandits that tune SOR on shifts, a heat equation and photographs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from stiefel.papers.figures import BLUE, GREEN, GREY, ORANGE, legend, mean_series, panels, title
from stiefel.papers.paper import Claim, Measurement, Paper, Scale
from stiefel.papers.progress import Progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Fixed ω that the bandits are held against. On shifts they solve each so-many-th system: small ω
# take up to 600 iterations and are never the best.
SHIFT_OMEGAS = {1: 20, 1.2: 20, 1.4: 10, 1.6: 2, 1.8: 2}
HEAT_OMEGAS = (1, 1.3, 1.5, 1.75, 1.95)
PATCH_OMEGAS = (1, 1.3, 1.5, 1.6, 1.7, 1.8, 1.9)
KINDS = ("high", "low")
# Systems: shifts, steps of the heat equation and its nx, patches.
SIZES: dict[Scale, tuple[int, int, tuple[int, ...], int]] = {
    Scale.SMOKE: (40, 40, (10,), 20),
    Scale.LAPTOP: (2000, 5000, (25,), 500),
    Scale.PAPER: (5000, 5000, (25, 50, 100, 200, 400), 2000),
}
BLOCKS, BINS = 20, 10
# Runs of a bandit on one sequence, each with its own draws: their mean is what is judged.
PATCH_RUNS, HEAT_RUNS = 4, 3


def experiment(scale: Scale, seed: int, progress: Progress) -> Measurement:
    """Iteration counts of the bandits and of fixed ω on the same three sequences of systems."""
    from stiefel.papers.learned_sor_runs import heat, patches, shifts

    count, steps, sizes, pieces = SIZES[scale]
    patch_configs = [{"policy": p, "count": pieces, "seed": seed, "run": 0} for p in PATCH_OMEGAS]
    patch_configs += [
        {"policy": p, "count": pieces, "seed": seed, "run": run}
        for p in ("tsallis", "chebcb")
        for run in range(1 if scale is Scale.SMOKE else PATCH_RUNS)
    ]
    found = progress.shared("sor-patches", patch_configs, patches, span=(0.0, 0.3))
    by_patch = _mean_runs([c["policy"] for c in patch_configs], found)
    # Without a bandit nothing depends on the seed: all seeds share those runs.
    heat_configs = [
        {"policy": p, "nx": nx, "steps": steps, "seed": 0, "run": 0}
        for nx in sizes
        for p in (*HEAT_OMEGAS, "cg")
    ]
    heat_configs += [
        {"policy": p, "nx": nx, "steps": steps, "seed": seed, "run": run}
        for nx in sizes
        for p in ("tsallis", "chebcb")
        for run in range(1 if scale is Scale.SMOKE else HEAT_RUNS)
    ]
    found = progress.shared("sor-heat", heat_configs, heat, span=(0.3, 0.6))
    by_heat = _mean_runs([(c["nx"], c["policy"]) for c in heat_configs], found)
    shift_configs = [
        {"kind": k, "policy": p, "every": every, "count": count, "seed": seed}
        for k in KINDS
        for p, every in (*SHIFT_OMEGAS.items(), ("tsallis", 1), ("chebcb", 1), ("instance", 1))
    ]
    found = progress.shared("sor-shifts", shift_configs, shifts, span=(0.6, 1.0))
    by_shift = {(c["kind"], c["policy"]): r for c, r in zip(shift_configs, found, strict=True)}

    metrics = {
        **_patch_metrics(by_patch),
        **_heat_metrics(by_heat, sizes),
        **_shift_metrics(by_shift),
    }
    series = {
        **_patch_series(by_patch),
        **_heat_series(by_heat, sizes[0]),
        **_shift_series(by_shift["high", "chebcb"]),
    }
    progress(1.0, f"ChebCB at {metrics['patches_over_fixed']:.2f} of the best fixed ω")
    config = {
        "sizes": [count, steps, list(sizes), pieces],
        "sha256 photographs": by_patch["chebcb"]["sha256"],
    }
    return Measurement(seed, metrics, series, config)


def _mean_runs(keys: Sequence[Any], results: Sequence[Mapping[str, Any]]) -> dict[Any, Any]:
    """Results by key; counts are means over the runs that have one key."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for key, result in zip(keys, results, strict=True):
        groups.setdefault(key, []).append(result)
    return {
        key: {
            **runs[0],
            "counts": [fmean(c) for c in zip(*(r["counts"] for r in runs), strict=True)],
        }
        for key, runs in groups.items()
    }


def _patch_metrics(runs: Mapping[Any, Mapping[str, Any]]) -> dict[str, float]:
    """Means of the second half, when the bandits have learned."""
    half = len(runs["chebcb"]["counts"]) // 2
    late = {p: fmean(run["counts"][half:]) for p, run in runs.items()}
    fixed = min(late[p] for p in PATCH_OMEGAS)
    instance = fmean(_best_of([runs[p]["counts"][half:] for p in PATCH_OMEGAS]))
    return {
        "patches_over_fixed": late["chebcb"] / fixed,
        "patches_over_instance": late["chebcb"] / instance,
        "patches_tsallis_over_fixed": late["tsallis"] / fixed,
        "patches_instance": instance,
        **{f"patches_omega_{p}": late[p] for p in PATCH_OMEGAS},
        "patches_chebcb": late["chebcb"],
        "patches_chebcb_all": fmean(runs["chebcb"]["counts"]),
        "patches_tsallis_all": fmean(runs["tsallis"]["counts"]),
    }


def _heat_metrics(
    runs: Mapping[tuple[int, Any], Mapping[str, Any]], sizes: Sequence[int]
) -> dict[str, float]:
    """Total counts, also those of the first rounds; the claims are about the smallest grid."""
    metrics = {}
    for nx in sizes:
        totals = {p: float(sum(run["counts"])) for (n, p), run in runs.items() if n == nx}
        fixed = min(totals[p] for p in HEAT_OMEGAS)
        ratios = {
            "heat_tsallis_over_fixed": totals["tsallis"] / fixed,
            "heat_chebcb_over_fixed": totals["chebcb"] / fixed,
            "heat_chebcb_over_cg": totals["chebcb"] / totals["cg"],
            "heat_best_step_over_fixed": sum(_best_of([runs[nx, p]["counts"] for p in HEAT_OMEGAS]))
            / fixed,
        }
        ending = "" if nx == sizes[0] else f"_nx_{nx}"
        metrics.update({name + ending: value for name, value in ratios.items()})
    return metrics


def _shift_metrics(runs: Mapping[tuple[str, Any], Mapping[str, Any]]) -> dict[str, float]:
    metrics = {}
    for kind in KINDS:
        means = {p: fmean(run["counts"]) for (k, p), run in runs.items() if k == kind}
        fixed = min(means[p] for p in SHIFT_OMEGAS)
        metrics[f"shifts_{kind}_chebcb_over_fixed"] = means["chebcb"] / fixed
        metrics[f"shifts_{kind}_tsallis_over_fixed"] = means["tsallis"] / fixed
        metrics[f"shifts_{kind}_instance_over_fixed"] = means["instance"] / fixed
    return metrics


def _best_of(runs: Sequence[Sequence[float]]) -> list[float]:
    """The smallest count of each system."""
    return [min(counts) for counts in zip(*runs, strict=True)]


def _patch_series(runs: Mapping[Any, Mapping[str, Any]]) -> dict[str, list[float]]:
    best = min(PATCH_OMEGAS, key=lambda p: sum(runs[p]["counts"]))
    curves = {
        "fixed": runs[best]["counts"],
        "tsallis": runs["tsallis"]["counts"],
        "chebcb": runs["chebcb"]["counts"],
        "instance": _best_of([runs[p]["counts"] for p in PATCH_OMEGAS]),
    }
    size = len(curves["fixed"]) // BLOCKS
    series = {
        f"patches {name}": [fmean(c[i * size : (i + 1) * size]) for i in range(BLOCKS)]
        for name, c in curves.items()
    }
    return {"patches": [(i + 0.5) * size for i in range(BLOCKS)], **series}


def _heat_series(runs: Mapping[tuple[int, Any], Mapping[str, Any]], nx: int) -> dict[str, Any]:
    totals = {p: float(sum(run["counts"])) for (n, p), run in runs.items() if n == nx}
    steps = len(runs[nx, "cg"]["counts"])
    best = sum(_best_of([runs[nx, p]["counts"] for p in HEAT_OMEGAS]))
    return {
        "heat omegas": [totals[p] / steps for p in HEAT_OMEGAS],
        "heat tsallis": [totals["tsallis"] / steps],
        "heat chebcb": [totals["chebcb"] / steps],
        "heat step": [best / steps],
    }


def _shift_series(run: Mapping[str, Any]) -> dict[str, list[float]]:
    """Median ω of the second half, in parts of equally many shifts."""
    half = len(run["contexts"]) // 2
    pairs = sorted(zip(run["contexts"][half:], run["omegas"][half:], strict=True))
    size = len(pairs) // BINS
    parts = [pairs[i * size : (i + 1) * size] for i in range(BINS)]
    middle = size // 2
    return {
        "shift": [part[middle][0] for part in parts],
        "shift omega": [sorted(omega for _, omega in part)[middle] for part in parts],
    }


def figure(measurements: Sequence[Measurement]) -> Figure:
    """Photographs: iterations as it learns; heat: means of ω; shifts: ω learned over theory."""
    picture, (left, middle, right) = panels(3)
    _draw_patches(left, measurements)
    _draw_heat(middle, measurements)
    _draw_shifts(right, measurements)
    return picture


def _draw_patches(ax: Axes, measurements: Sequence[Measurement]) -> None:
    systems = mean_series(measurements, "patches")
    for name, label, colour, style in (
        ("tsallis", "Tsallis-INF", ORANGE, "-"),
        ("fixed", "best fixed ω", GREY, "-"),
        ("chebcb", "ChebCB", BLUE, "-"),
        ("instance", "best of 7 for each", GREEN, (0, (4, 3))),
    ):
        values = mean_series(measurements, f"patches {name}")
        ax.plot(systems, values, color=colour, linestyle=style, linewidth=1.3, label=label)
    ax.set_ylim(0, None)
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * 1.25)  # room for the legend
    ax.set_xlabel("systems solved")
    title(ax, "photographs: SOR iterations")
    legend(ax)


def _draw_heat(ax: Axes, measurements: Sequence[Measurement]) -> None:
    ax.plot(
        HEAT_OMEGAS, mean_series(measurements, "heat omegas"), color=GREY, marker="s",
        markersize=3.5, linewidth=1.0, label="fixed ω",
    )  # fmt: skip
    for name, label, colour, style in (
        ("tsallis", "Tsallis-INF", ORANGE, "-"),
        ("step", "best of 5 for each", GREEN, (0, (4, 3))),
        ("chebcb", "ChebCB", BLUE, "-"),
    ):
        (value,) = mean_series(measurements, f"heat {name}")
        ax.axhline(value, color=colour, linestyle=style, linewidth=1.3, label=label)
    low, high = ax.get_ylim()
    ax.set_ylim(low * 0.9, high)
    ax.set_xlabel("ω")
    title(ax, "heat: SSOR-CG iterations a step")
    legend(ax, "upper left")


def _draw_shifts(ax: Axes, measurements: Sequence[Measurement]) -> None:
    shifts = [-0.15 + 0.6 * i / 100 for i in range(101)]
    radii = [4 * math.cos(math.pi / 11) / (4 + c) for c in shifts]
    ax.plot(
        shifts, [1 + (b / (1 + math.sqrt(1 - b * b))) ** 2 for b in radii],
        color=GREY, linewidth=1.3, label="ω* of theory",
    )  # fmt: skip
    for i, m in enumerate(measurements):
        ax.plot(
            m.series["shift"], m.series["shift omega"], "o", color=BLUE, markersize=3.5,
            label=None if i else "ChebCB, median",
        )  # fmt: skip
    ax.set_xlabel("shift c")
    title(ax, "shifts: ω chosen")
    legend(ax)


paper = Paper(
    slug="learned-sor",
    title="Learning to Relax: Setting Solver Parameters Across a Sequence of Linear System "
    "Instances",
    authors="Mikhail Khodak, Edmond Chow, Maria-Florina Balcan, Ameet Talwalkar",
    published="2023-10",
    arxiv="2310.02246",
    code="https://github.com/mkhodak/learning-to-relax",
    topic="numerics",
    data="images",
    summary=(
        "A bandit that sees only iteration counts sets the relaxation parameter ω of SOR while a "
        "sequence of linear systems is solved, nearly as well as the best fixed ω. Told a number "
        "that describes each system, it approaches the best ω of every single one."
    ),
    claim=Claim(
        "Smoothing patches of photographs, ChebCB takes at most 0.80 of the iterations of the best "
        "of seven fixed ω, once it has seen 250 systems",
        metric="patches_over_fixed",
        at_most=0.80,
    ),
    others=(
        Claim(
            "and at most 1.15 times those of the best of the seven for each system",
            metric="patches_over_instance",
            at_most=1.15,
        ),
        Claim(
            "Heat equation: Tsallis-INF takes at most 1.06 times the iterations of the best fixed "
            "ω, exploration included",
            metric="heat_tsallis_over_fixed",
            at_most=1.06,
        ),
        Claim(
            "ChebCB at most 0.92 times",
            metric="heat_chebcb_over_fixed",
            at_most=0.92,
        ),
        Claim(
            "and at most 0.32 of plain conjugate gradients",
            metric="heat_chebcb_over_cg",
            at_most=0.32,
        ),
        Claim(
            "Random shifts of large spread: ChebCB takes at most 0.86 of the iterations of the "
            "best fixed ω, exploration included",
            metric="shifts_high_chebcb_over_fixed",
            at_most=0.86,
        ),
        Claim(
            "and of small spread",
            metric="shifts_low_chebcb_over_fixed",
            at_most=0.86,
        ),
        Claim(
            "Tsallis-INF takes at most 1.35 times the iterations of the best fixed ω after 2,000 "
            "shifts of large spread",
            metric="shifts_high_tsallis_over_fixed",
            at_most=1.35,
        ),
        Claim(
            "and at most 1.25 times at small spread",
            metric="shifts_low_tsallis_over_fixed",
            at_most=1.25,
        ),
    ),
    experiment=experiment,
    figure=figure,
    snippet="""\
import numpy as np
from stiefel.numerics import GridOperator, RelaxedSolver
solver, u = RelaxedSolver("ssor-cg", "chebcb", low=0, high=1, random_state=0), np.ones(576)
for c in np.linspace(0, 1, 50):  # systems one after the other, each described by a number
    u = solver.solve(GridOperator((24, 24), 4 + c, (-1.0, -1.0)), u, context=c).x
""",
    notes=(
        (
            "Photographs: 500 patches of 24 × 24 pixels, every second one of scikit-learn's two "
            "pictures, smoothed with weights exp(−20 Δf²) and a data term of 0.01 to 1, whose "
            "logarithm is the context; SOR to 1e-6 from the noisy patch. The claims are about the "
            "second half; the first one pays for trying all twenty ω. Each seed has its own "
            "patches and the mean of four runs of each bandit, three on the heat equation: with "
            "one run each, three claims were inconclusive by the bandits' own scatter."
        ),
        (
            "Heat: Crank–Nicolson on 24 × 24 points, 5,000 steps, diffusion between 0 and 10 as "
            "context; SSOR-CG to 1e-8. Even the best of the five ω at every single step saves "
            "only an eighth; ChebCB, with twenty to choose from, comes a little below that."
        ),
        (
            "Shifts: 2,000 Laplacians on 10 × 10 points plus −0.15 + 0.6 Beta; SOR to 1e-8. Fixed "
            "ω run on each second system, up to 1.4 on each tenth or twentieth: those are far from "
            "the best."
        ),
        (
            "Tsallis-INF pays some 5,000 rounds of exploration before its total meets the best "
            "fixed ω: on shifts ω = 1 costs six times the best one."
        ),
        (
            "SOR gains from ω on nearly consistently ordered matrices such as stencils. On dense "
            "correlation matrices ω = 1 is often the best already, and on large grids SSOR-CG is "
            "flat in ω: a bandit then only adds exploration."
        ),
        (
            "The probabilities come from a Newton iteration that cannot overshoot; the authors' "
            "code starts one elsewhere, whose probabilities do not sum to 1 after some 200 rounds."
        ),
    ),
    seconds=60.0,
)
