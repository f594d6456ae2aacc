"""``stiefel race``: the race of :mod:`stiefel.optim.racing`, in several processes."""

from __future__ import annotations

import io
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stiefel.cli_options import JsonOption, fail, seed_list, terminable

if TYPE_CHECKING:
    from rich.console import Console

    from stiefel.optim.race_result import RaceResult
    from stiefel.papers import Measurement
    from stiefel.papers.progress import Progress

# Written out, so that --help need not load torch; a test holds it against the table.
NAMES = "adamw, torch-muon, muon, normuon, rmnp, root, auon, hybrid-auon, aro, trion, dct-adamw"
EXAMPLES = (
    "Example: [bold]stiefel race --text notes/*.txt --optimizers muon,rmnp --steps 300[/]\n\n"
    "Example: [bold]stiefel race --model my_module:make --seeds 0,1,2,3,4[/]"
)
# Paragraphs without line breaks of their own, which would stay where they are on any terminal.
HELP = "\n\n".join(
    (
        "Race AdamW, torch.optim.Muon and Stiefel's optimizers on your text or your model.",
        (
            "One protocol for all: same initial weights, batches, schedule and steps. AdamW's best "
            "rate is found first, and everyone's embeddings, heads, norms and biases keep it; each "
            "optimizer then has a grid of rates for the hidden matrices, extended until the best "
            "lies inside. Rates are chosen on seed 0 by a slice of the validation data that is not "
            "reported."
        ),
        (
            "A model comes from a function that takes a seed and returns [bold](model, batches, "
            "loss)[/]: a torch.nn.Module whose weights depend on the seed only; a dict with "
            '"train" (a sequence of batches, or a function of the step) and "validation" (at least '
            "two batches); and loss(model, batch), a scalar tensor. The current folder is "
            "importable."
        ),
        (
            "Finished runs are kept in the output folder: an interrupted race goes on where it "
            "stopped."
        ),
    )
)


def race(
    more: Annotated[
        list[Path] | None, typer.Argument(metavar="FILE", help="Further files of --text.")
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE...", help="UTF-8 text files, for a small byte-level GPT."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODULE:MAKE", help="Your own model instead, from a function."),
    ] = None,
    optimizers: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...", help=f"AdamW against which of: {NAMES}.", show_default="all"
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Training steps of every run.")] = 200,
    seeds: Annotated[str, typer.Option(help="Seeds, joined by commas.")] = "0,1,2",
    lr: Annotated[
        float | None,
        typer.Option(
            help="Where AdamW's grid of rates starts.", show_default="0.004, with --model 0.001"
        ),
    ] = None,
    split: Annotated[
        str,
        typer.Option(
            metavar="position|file",
            help="Validate on the last tenth of every file, or on whole files, the last ones.",
        ),
    ] = "position",
    width: Annotated[int, typer.Option(min=1, help="Width of the GPT.")] = 96,
    blocks: Annotated[int, typer.Option(min=1, help="Its blocks.")] = 3,
    heads: Annotated[int, typer.Option(min=1, help="Its attention heads.")] = 4,
    context: Annotated[int, typer.Option(min=1, help="Bytes it sees.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Windows of text per step.")] = 16,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs side by side.", show_default="one a CPU core")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for runs, JSON and picture.")] = Path("race"),
    picture: Annotated[str, typer.Option(metavar="svg|png", help="Format of the picture.")] = "svg",
    as_json: JsonOption = False,
) -> None:
    """Race optimizers; :data:`HELP` is what the command line says."""
    wanted = seed_list(seeds)
    files = [str(path) for path in (*(text or ()), *(more or ()))]
    if bool(files) == (model is not None) or (more and not text):
        fail("give either --text FILE... or --model MODULE:MAKE")
    if picture not in ("svg", "png"):
        raise typer.BadParameter(f"want svg or png; got {picture!r}", param_hint="--picture")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    size = {"width": width, "blocks": blocks, "heads": heads, "context": context, "batch": batch}
    arguments: dict[str, Any] = {
        "text": files or None,
        "model": model,
        "optimizers": optimizers.split(",") if optimizers is not None else None,
        "steps": steps,
        "seeds": wanted,
        "lr": lr,
        "split": split,
        "size": size if files else None,
    }
    result = _race(arguments, jobs, out)
    drawn = _keep(result, out, picture)
    if as_json:
        for standing in result.standings:
            typer.echo(json.dumps(result.row(standing), allow_nan=False))
    else:
        from rich.console import Console

        console = Console()
        console.print(result.table(narrow=console.width < 115))
    for path in drawn:
        typer.echo(f"Written: {path}", err=as_json)


def _race(arguments: dict[str, Any], jobs: int | None, out: Path) -> RaceResult:
    """Check the input, let processes make the runs, and put the result together."""
    from rich.console import Console

    from stiefel.atlas.machine import available_cores
    from stiefel.optim.race_task import FactoryError, factory
    from stiefel.optim.racing import plan
    from stiefel.papers.closure import code_digest
    from stiefel.papers.progress import Progress

    store = out.absolute() / "runs"
    try:
        plan(**arguments)
        code = code_digest(factory(arguments["model"])) if arguments["model"] else ""
        store.mkdir(parents=True, exist_ok=True)
    except FactoryError as error:
        cause = error.__cause__ or error
        typer.echo("".join(traceback.format_exception(cause)), err=True)
        fail(str(error))
    except (ValueError, TypeError, OSError) as error:
        fail(str(error))
    try:
        with terminable(), _Display(Console(stderr=True)) as display:
            part = partial(take_part, arguments, code)
            _share(part, jobs or available_cores(), store, display)
            return _run(arguments, code, Progress(None, store))  # all is there now
    except KeyboardInterrupt:
        typer.echo(
            f"\nInterrupted. What was finished is kept in {out}; "
            "the same command goes on from there.",
            err=True,
        )
        raise typer.Exit(130) from None
    except _RunError as error:
        typer.echo(str(error), err=True)
        fail(f"a run failed: {str(error).strip().splitlines()[-1]}")
    except (ValueError, OSError) as error:
        fail(str(error))


def take_part(
    arguments: Mapping[str, Any], code: str, _scale: Any, seed: int, progress: Progress
) -> Measurement:
    """In a process of the pool: make the runs of a race that no other process is making."""
    from stiefel.optim.racing import RaceError
    from stiefel.papers import Measurement

    with suppress(RaceError):  # the parent, which looks at the same runs, comes to it too
        _run(arguments, code, progress)
    return Measurement(seed, {}, {}, {})


def _run(arguments: Mapping[str, Any], code: str, progress: Progress) -> RaceResult:
    from stiefel.optim.racing import plan

    def run_all(
        configs: Sequence[dict[str, Any]],
        compute: Callable[..., dict[str, Any]],
        *,
        span: tuple[float, float],
    ) -> list[dict[str, Any]]:
        known = [{**config, "code": code} for config in configs]
        return progress.shared("race", known, compute, span=span)

    return plan(**arguments).run(run_all)


@dataclass(frozen=True)
class _Job:
    """A race as the pool runs it: an experiment without claims."""

    experiment: Callable[..., Any]
    slug: str = "race"
    claims: tuple[()] = ()


class _RunError(RuntimeError):
    """A process of the race crashed; the message is its traceback."""


def _share(experiment: Callable[..., Any], jobs: int, store: Path, display: _Display) -> None:
    """Run ``experiment`` in so many processes, which split the runs among themselves.

    Raises:
        _RunError: one of them crashed. All are stopped then.
    """
    from stiefel.atlas.pool import Pool, Task
    from stiefel.papers.paper import Scale

    with Pool(Scale.LAPTOP, store) as pool:
        for number in range(jobs):
            pool.start(Task(_Job(experiment), number))
        while pool:
            for task, kind, content in pool.events(timeout=0.5):
                if kind == "progress":
                    display.progress(task.seed, *content)
                elif kind != "done":
                    raise _RunError(str(content))


class _Display:
    """One bar for the race, one line for each process; plain lines where there is no terminal."""

    EVERY = 10.0

    def __init__(self, console: Console) -> None:
        from rich.progress import (
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[cyan]{task.fields[message]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            speed_estimate_period=120,
        )
        self._all = self._bars.add_task("[bold]race", total=1.0, message="")
        self._furthest = 0.0
        self._messages: dict[int, str] = {}
        self._told = time.monotonic()

    def __enter__(self) -> _Display:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def progress(self, number: int, fraction: float, message: str) -> None:
        """A process has come so far; all of them are on the same way."""
        self._furthest = max(self._furthest, fraction)
        if message:
            self._messages[number] = message
        said = " · ".join(text for _, text in sorted(self._messages.items()))
        self._bars.update(self._all, completed=self._furthest, message=said)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._told >= self.EVERY:
            self._told = now
            self._console.print(
                f"race: {self._furthest:.0%} {said}", soft_wrap=True, highlight=False, markup=False
            )


def _keep(result: RaceResult, out: Path, picture: str) -> list[Path]:
    """Write JSON and picture; the picture is left out, with a word, where matplotlib is missing."""
    from stiefel.atlas.machine import commit, machine, versions
    from stiefel.storage import write_json, write_text

    content = {**result.to_json(), "versions": versions(), "machine": machine(), "commit": commit()}
    written = [out / "race.json"]
    try:
        write_json(written[0], content)
        try:
            image = _image(result, picture)
        except ImportError as error:
            typer.echo(str(error), err=True)
            return written
        written.append(out / f"race.{picture}")
        if picture == "svg":
            write_text(written[1], image.decode())
        else:
            hidden = out / f".race.{os.getpid()}.png"
            hidden.write_bytes(image)
            os.replace(hidden, written[1])
    except OSError as error:
        fail(f"cannot write: {error}")
    return written


def _image(result: RaceResult, picture: str) -> bytes:
    figure = result.figure()
    from matplotlib import rc_context

    buffer = io.BytesIO()
    metadata = {"Date": None} if picture == "svg" else None
    with rc_context({"svg.hashsalt": "race", "svg.fonttype": "none"}):
        figure.savefig(buffer, format=picture, dpi=150, metadata=metadata)
    return buffer.getvalue()
