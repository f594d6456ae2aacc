"""``stiefel merge``: plan from headers, merge, explain. The work is in :mod:`stiefel.merge`."""

from __future__ import annotations

import io
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stiefel.cli_options import JsonOption, fail, terminable

if TYPE_CHECKING:
    from rich.console import Console

    from stiefel.merge.explain import Explanation
    from stiefel.merge.plan_adapters import AdapterPlan
    from stiefel.merge.plan_types import MergePlan
    from stiefel.merge.recipe_types import Recipe

EXAMPLES = (
    "Example: [bold]stiefel merge recipe.yaml --out merged --dry-run[/]\n\n"
    "Example: [bold]stiefel merge recipe.yaml --out merged --explain[/]"
)
HELP = "\n\n".join(
    (
        "Merge fine-tuned models as a recipe says.",
        (
            "The recipe is YAML in mergekit's schema. Models are folders or files of safetensors "
            "(PEFT adapters: base+adapter); what comes out is a folder that transformers loads."
        ),
        (
            "Everything that can be wrong is found from the headers before a tensor is read. "
            "Tensors stream from disk to disk: memory depends on the largest one, not on the "
            "model. The output appears whole or not at all, and [bold]--resume[/] goes on with "
            "an interrupted run."
        ),
    )
)
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?\s*", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_PICTURES = (".svg", ".png")


def merge(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the merged model.", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only the plan: files, memory, time.")
    ] = False,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain", help="Show rotations, rest and energy of each layer, before and after."
        ),
    ] = False,
    explain_plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Picture of --explain, .svg or .png.",
            show_default="OUT.explain.svg",
        ),
    ] = None,
    explain_size: Annotated[
        int,
        typer.Option(min=2, metavar="N", help="Rotations only of matrices with so many inputs."),
    ] = 4096,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")
    ] = False,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Tensors at work at a time.", show_default="one a core, up to 8"),
    ] = None,
    shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Largest weight file, as in 500MB or 5GB.")
    ] = "5GB",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Copy the base's Python files.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Merge models; :data:`HELP` is what the command line says."""
    if out is not None:
        _check_place(out)
    elif not dry_run:
        fail("give --out DIR, or --dry-run for the plan alone")
    if explain_plot is not None and explain_plot.suffix.lower() not in _PICTURES:
        raise typer.BadParameter(
            f"want a name that ends in {' or '.join(_PICTURES)}; got {str(explain_plot)!r}",
            param_hint="--explain-plot",
        )
    if explain_plot is None and out is not None and not dry_run:
        explain_plot = out.with_name(f"{out.name}.explain.svg")
    limit = _shard_bytes(shard_size)
    work = _Work(out, threads, as_json)
    with terminable(), _answered(work, dry_run):
        checked = _checked(recipe)
        if checked.merges_adapters:
            if explain:
                fail("--explain compares weights of models; this recipe merges adapters alone")
            work.adapters(checked, recipe.parent, dry_run, resume)
            return
        plan = work.plan(checked, recipe.parent, limit, trust_remote_code)
        if explain:
            work.announce(plan, not dry_run, explain_size)  # before the work, not after
        if not dry_run:
            work.merge(plan, resume)
        if explain:
            work.explain(plan, None if dry_run else out, explain_size, explain_plot)


def _check_place(out: Path) -> None:
    """The output takes its name by a rename, which nobody should be standing in."""
    real, current = Path(os.path.realpath(out)), Path.cwd()
    if real == current or real in current.parents:
        fail(f"--out {out} would replace the current folder; run this from another one")


def _checked(path: Path) -> Recipe:
    from stiefel.merge.recipe import read_recipe

    return read_recipe(path)


def _shard_bytes(text: str) -> int:
    found = _SIZE.fullmatch(text)
    size = 0.0
    if found:
        base = 1024 if "i" in text.lower() else 1000
        size = float(found[1]) * base ** _POWERS[found[2].lower()]
    if not 1 <= size < 2**63:
        raise typer.BadParameter(
            f"want a size such as 500MB, 5GB or 2GiB; got {text!r}", param_hint="--shard-size"
        )
    return int(size)


@contextmanager
def _answered(work: _Work, dry_run: bool) -> Iterator[None]:
    """Bad input ends with status 2, an interrupt with 130."""
    try:
        yield
    except KeyboardInterrupt:
        if work.written:
            typer.echo(
                f"\nInterrupted. {work.out} is written; --explain is not finished.", err=True
            )
        elif not dry_run:
            typer.echo(
                f"\nInterrupted. {work.out} is as it was; the same command with --resume goes on "
                "from what is written.",
                err=True,
            )
        raise typer.Exit(130) from None
    except OSError as error:
        fail(f"cannot read or write: {error}")
    except (ValueError, ImportError) as error:
        # RecipeError, PlanError, CheckpointError, NonFiniteError, and missing packages.
        fail(str(error))


class _Work:
    """The steps of the command, and what each says: results on stdout, the rest on stderr."""

    def __init__(self, out: Path | None, threads: int | None, as_json: bool) -> None:
        from rich.console import Console

        self.out = out
        self.threads = threads
        self.written = False
        self.as_json = as_json
        self.said = Console(stderr=True)
        self.console = Console()

    def plan(self, recipe: Recipe, folder: Path, limit: int, trust: bool) -> MergePlan:
        """Make the plan and show it."""
        from stiefel.merge.engine import processors
        from stiefel.merge.plan import build_plan
        from stiefel.merge.plan_report import estimate, plan_json, plan_lines

        plan = build_plan(recipe, folder, out=self.out, shard_bytes=limit, trust_remote_code=trust)
        threads = self.threads = self.threads or processors()
        estimated = estimate(plan, threads)
        content = {"plan": {**plan_json(plan, estimated), "threads": threads}}
        self._show(content, plan_lines(plan, estimated, threads), plan.warnings)
        return plan

    def merge(self, plan: MergePlan, resume: bool) -> None:
        """Carry the plan out."""
        from stiefel.merge.engine import merge as carry_out
        from stiefel.merge.plan_report import bytes_text

        assert self.out is not None  # noqa: S101 - checked with the options
        with _Display(self.said, "merge") as display:
            report = carry_out(
                plan,
                self.out,
                resume=resume,
                threads=self.threads,
                progress=lambda p: display.show(
                    p.fraction, f"{p.done} of {p.total} · {p.tensor}", p.remaining
                ),
            )
        self.written = True
        new = [text for text in report.warnings if text not in plan.warnings]
        self._warn(new)
        if self.as_json:
            done = {
                "folder": str(self.out),
                "tensors": len(plan.tasks),
                "resumed": report.resumed,
                "bytes": report.nbytes,
                "seconds": round(report.seconds, 3),
                "warnings": list(report.warnings),
            }
            typer.echo(json.dumps({"merged": done}, allow_nan=False, ensure_ascii=False))
            return
        kept = f", {report.resumed} of them from an earlier run" if report.resumed else ""
        typer.echo(
            f"Written: {self.out} ({len(plan.tasks)} tensors{kept}, {bytes_text(report.nbytes)}, "
            f"{report.seconds:.1f} s; merge.json tells how each came about)"
        )

    def announce(self, plan: MergePlan, merged: bool, size: int) -> None:
        """Whether there is something to explain, and a word where that takes minutes."""
        from stiefel.merge.explain import seconds_to_explain
        from stiefel.merge.plan_report import seconds_text

        seconds = seconds_to_explain(plan, merged, size)
        if seconds >= 60:
            about = f"about {seconds_text(seconds)} of one core"
            self._warn(
                [f"--explain takes {about}; a smaller --explain-size leaves out large rotations"]
            )

    def explain(
        self, plan: MergePlan, merged: Path | None, size: int, picture: Path | None
    ) -> None:
        """Compare the inputs, and what was merged, with the base."""
        from stiefel.merge.explain import explain
        from stiefel.merge.explain_report import table

        with _Display(self.said, "explain") as display:
            told = explain(plan, merged, max_side=size, on_progress=display.show)
        if self.as_json:
            typer.echo(json.dumps({"explain": told.to_json()}, allow_nan=False))
        else:
            self.console.print(table(told))
        self._warn(told.notes)
        if picture is None:
            return
        try:
            image = _image(told, picture.suffix.lower().removeprefix("."))
        except ImportError as error:
            typer.echo(str(error), err=True)
            return
        _write(picture, image)
        typer.echo(f"Written: {picture}", err=self.as_json)

    def adapters(self, recipe: Recipe, folder: Path, dry_run: bool, resume: bool) -> None:
        """Plan and make an adapter from adapters."""
        from stiefel.merge.engine import merge as carry_out
        from stiefel.merge.plan_adapters import build_adapter_plan
        from stiefel.merge.plan_report import adapter_json, adapter_lines

        plan: AdapterPlan = build_adapter_plan(recipe, folder, out=self.out)
        self._show({"plan": adapter_json(plan)}, adapter_lines(plan), plan.warnings)
        if dry_run:
            return
        assert self.out is not None  # noqa: S101 - checked with the options
        if resume:
            self._warn(["--resume has no effect: adapters are merged in one go"])
        report = carry_out(plan, self.out)
        self._warn([text for text in report.warnings if text not in plan.warnings])
        if self.as_json:
            done = {
                "folder": str(self.out),
                "modules": report.tensors,
                "bytes": report.nbytes,
                "seconds": round(report.seconds, 3),
                "warnings": list(report.warnings),
            }
            typer.echo(json.dumps({"merged": done}, allow_nan=False, ensure_ascii=False))
            return
        typer.echo(
            f"Written: {self.out} (adapter of {plan.modules} modules, {report.seconds:.1f} s; "
            "merge.json tells how it came about)"
        )

    def _show(
        self,
        content: Mapping[str, Any],
        lines: Sequence[tuple[str, str]],
        warnings: Sequence[str],
    ) -> None:
        from stiefel.merge.plan_report import table

        if self.as_json:
            typer.echo(json.dumps(content, allow_nan=False, ensure_ascii=False))
        else:
            self.console.print(table(lines))
        self._warn(warnings)

    def _warn(self, warnings: Sequence[str]) -> None:
        for text in warnings:
            typer.secho(f"note: {text}", fg="yellow", err=True)


class _Display:
    """A bar with the time that is left; lines now and then where there is no terminal."""

    EVERY = 10.0

    def __init__(self, console: Console, what: str) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        self._console = console
        self._what = what
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("[cyan]{task.fields[message]}", markup=True),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(what, total=1.0, message="", left="")
        self._start = self._told = time.monotonic()

    def __enter__(self) -> _Display:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, fraction: float, message: str, remaining: float | None = None) -> None:
        """So far; ``remaining`` in seconds, by default as fast as until now."""
        from rich.markup import escape

        now = time.monotonic()
        if remaining is None and fraction > 0:
            remaining = (now - self._start) * (1 - fraction) / fraction
        left = "" if remaining is None else f"{_clock(remaining)} left"
        self._bar.update(self._task, completed=fraction, message=escape(message), left=left)
        if not self._console.is_terminal and now - self._told >= self.EVERY:
            self._told = now
            self._console.print(
                f"{self._what}: {fraction:.0%} {left} {message}",
                soft_wrap=True,
                highlight=False,
                markup=False,
            )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _image(told: Explanation, kind: str) -> bytes:
    from stiefel.merge.explain_report import figure

    picture = figure(told)
    from matplotlib import rc_context

    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else None
    with rc_context({"svg.hashsalt": "merge", "svg.fonttype": "none"}):
        picture.savefig(buffer, format=kind, dpi=150, metadata=metadata)
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> None:
    hidden = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden.write_bytes(content)
    hidden.replace(path)
