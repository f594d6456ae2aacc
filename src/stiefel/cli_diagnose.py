"""``stiefel diagnose``: what a checkpoint's weights tell, on the terminal, as a page, as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stiefel.cli_options import JsonOption, fail

if TYPE_CHECKING:
    from rich.console import Console

    from stiefel.diagnose import Comparison, Report, Rule, Trajectory

EXAMPLES = (
    "Example: [bold]stiefel diagnose ./model --html report.html[/]\n\n"
    "Example: [bold]stiefel diagnose step-1000 step-2000 step-4000 --json[/]"
)
HELP = "\n\n".join(
    (
        "What the weights of a checkpoint tell, without data and without running it.",
        (
            "A folder or a file of safetensors, of any size: tensors are read a few megabytes at a "
            "time. Per matrix the Weibull line (k: how far its shape is from Gaussian, λ: its "
            "scale), per embedding the overlaps of its rows; then what stands out."
        ),
        (
            "Several checkpoints are those of one run, in order: growth of λ and drift of k. With "
            "[bold]--compare[/] two models stand side by side."
        ),
        (
            "Ends with 2 where something is damaged (the rest is analysed all the same), with 1 "
            "under [bold]--strict[/] where anything is unusual."
        ),
    )
)
_SHOWN = 12


def diagnose(
    checkpoints: Annotated[
        list[Path], typer.Argument(metavar="CHECKPOINT...", help="Folder or file of safetensors.")
    ],
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the report as one HTML file.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="CHECKPOINT", help="A second model, side by side.")
    ] = None,
    component: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGEX=KIND", help="Own rule from names to kinds (q, k, o, up ...); repeatable."
        ),
    ] = None,
    whole: Annotated[
        bool, typer.Option("--whole", help="Fit fused projections as they are stored.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit status 1 if anything is unusual.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """See :data:`HELP`."""
    from rich.console import Console

    from stiefel.checkpoint import CheckpointError
    from stiefel.diagnose import compare as compare_reports
    from stiefel.diagnose import diagnose as diagnose_one
    from stiefel.diagnose import trajectory

    if compare is not None and len(checkpoints) > 1:
        fail("--compare takes one checkpoint besides its own, not the several of a run")
    rules = _rules(component or [])
    paths = [*checkpoints, *([compare] if compare is not None else [])]
    notes = Console(stderr=True)
    reports: list[Report] = []
    for path in paths:
        if not path.exists():
            fail(f"{path} does not exist")
        try:
            with _progress(notes, str(path)) as step:
                reports.append(diagnose_one(path, split_qkv=not whole, rules=rules, progress=step))
        except (CheckpointError, ValueError, OSError) as error:
            fail(str(error))
    comparison = compare_reports(*reports) if compare is not None else None
    run = trajectory(reports) if len(checkpoints) > 1 else None
    if html is not None:
        _write_page(html, reports, comparison, run)
    if as_json:
        for report in reports:
            typer.echo(json.dumps(report.to_json()))
        for extra in (comparison, run):
            if extra is not None:
                typer.echo(json.dumps(extra.to_json()))
    else:
        _print(Console(), reports, comparison, run)
        if html is not None:
            typer.echo(f"Report: {html}")
    if any(report.serious for report in reports):
        raise typer.Exit(2)
    if strict and any(report.findings for report in reports):
        raise typer.Exit(1)


def _rules(texts: list[str]) -> list[Rule]:
    from stiefel.diagnose import Rule, classify_name

    rules = []
    for text in texts:
        pattern, sign, kind = text.rpartition("=")
        if not (sign and pattern and kind.strip()):
            fail(f"--component wants REGEX=KIND, as in 'mixer\\.in=up', got {text!r}")
        rules.append(Rule(pattern, kind.strip()))
    try:
        classify_name("", rules)
    except ValueError as error:
        fail(str(error))
    return rules


def _write_page(
    path: Path, reports: list[Report], comparison: Comparison | None, run: Trajectory | None
) -> None:
    from stiefel.diagnose.page import MissingPackageError, render
    from stiefel.storage import write_text

    try:
        text = render(reports, comparison=comparison, trajectory=run)
        write_text(path, text)
    except MissingPackageError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{path} cannot be written: {error.strerror}")


@contextmanager
def _progress(console: Console, label: str) -> Iterator[Callable[[float, str], None] | None]:
    """A bar on the terminal; nothing where stderr is none."""
    if not console.is_terminal:
        yield None
        return
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(escape(label), total=1.0)
        yield lambda part, name: bars.update(task, completed=part)


def _print(
    console: Console,
    reports: list[Report],
    comparison: Comparison | None,
    run: Trajectory | None,
) -> None:
    for report in reports:
        _print_report(console, report)
    if comparison is not None:
        _print_comparison(console, comparison)
    if run is not None:
        _print_run(console, run)


def _number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


def _place(value: float, block: int | None) -> str:
    return f"{value:.3f}" if block is None else f"{value:.3f} ({block})"


def _print_report(console: Console, report: Report) -> None:
    from rich.markup import escape
    from rich.table import Table

    model = report.model
    about = [f"{model['parameters']:,} parameters", f"{len(report.matrices)} matrices"]
    about += [str(model[key]) for key in ("type", "attention") if model[key]]
    console.print(f"[bold]{escape(report.source)}[/]  {escape(', '.join(about))}")
    if report.summary:
        table = Table(header_style="bold", caption="in brackets: the block")
        table.add_column("kind")
        for title in ("matrices", "median k", "smallest", "largest", "median λ"):
            table.add_column(title, justify="right", no_wrap=True)
        for kind, row in report.summary.items():
            table.add_row(
                escape(kind),
                str(row.count),
                f"{row.k:.3f}",
                _place(row.k_min, row.block_min),
                _place(row.k_max, row.block_max),
                _number(row.lam),
            )
        console.print(table)
    for space in report.embeddings:
        fits = "indeterminate" if space.capacity is None else f"{space.capacity:.3g} directions"
        console.print(
            f"{escape(space.name)}: ε {space.eps:.4f} ({space.excess:.2f} × random), "
            f"capacity {fits}"
        )
    if not report.findings:
        console.print("Nothing unusual.")
    for finding in report.findings[:_SHOWN]:
        sign = "[bold red]![/]" if finding.serious else "•"
        name = f"[bold]{escape(finding.tensor)}[/]: " if finding.tensor else ""
        console.print(f"{sign} {name}{escape(finding.text)}")
    if len(report.findings) > _SHOWN:
        console.print(f"and {len(report.findings) - _SHOWN} more: --html or --json has all")


def _print_comparison(console: Console, comparison: Comparison) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="What differs most", header_style="bold")
    for title in ("matrix", "k", "k of the second", "standard errors", "λ ratio"):
        table.add_column(title, justify="left" if title == "matrix" else "right")
    for change in comparison.changes[:_SHOWN]:
        table.add_row(
            escape(change.name),
            f"{change.k[0]:.3f}",
            f"{change.k[1]:.3f}",
            f"{change.errors:.1f}",
            f"{change.lam_ratio:.3f}",
        )
    console.print(table)
    for which, names in (("first", comparison.only_first), ("second", comparison.only_second)):
        if names:
            console.print(f"{len(names)} matrices only in the {which}, {escape(names[0])} for one")


def _print_run(console: Console, run: Trajectory) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="Median λ along the run", header_style="bold")
    table.add_column("kind")
    for place in range(len(run.sources)):
        table.add_column(str(place), justify="right")
    table.add_column("growth")
    for kind, values in run.lam.items():
        state = run.attribution.get(kind, "–").replace("_", " ")
        table.add_row(escape(kind), *(_number(value) for value in values), state)
    console.print(table)
