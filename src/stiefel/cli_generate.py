"""``stiefel generate``: train a retrieval-augmented model on a folder of images, draw from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stiefel.cli_options import JsonOption, fail, terminable

if TYPE_CHECKING:
    import torch

    from stiefel.generate import ImageDatabase, RetrievalDiffusion

EXAMPLES = (
    "Example: [bold]stiefel generate --train photos --size 32 --model model.safetensors[/]\n\n"
    "Example: [bold]stiefel generate --model model.safetensors --database others --count 16 "
    "--out grid.png[/]"
)
HELP = "\n\n".join(
    (
        "Draw images from a small network and a database of images.",
        (
            "[bold]--train[/] DIR trains a model on a folder of images and writes it to "
            "[bold]--model[/], its database beside it. An interrupted training goes on where it "
            "stopped when it is called again."
        ),
        (
            "[bold]--out[/] draws a picture: samples, below each the database images that it saw. "
            "[bold]--database[/] DIR draws from the images of another folder, without training; "
            "[bold]--query[/] IMAGE draws images that resemble one."
        ),
        "Ends with 2 where a file or a number cannot be used; the message says which.",
    )
)
Report = Callable[[float, str], None]


def generate(
    model: Annotated[
        Path, typer.Option(metavar="FILE", help="The model: read, or written by --train.")
    ],
    train: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Train on this folder of images.")
    ] = None,
    database: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Draw from the images of this folder.", show_default="the model's"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Picture of the samples, PNG.",
            show_default="samples.png, without --train",
        ),
    ] = None,
    count: Annotated[int, typer.Option(min=1, metavar="N", help="Samples.")] = 16,
    query: Annotated[
        Path | None, typer.Option(metavar="IMAGE", help="Resemble this image.")
    ] = None,
    top_m: Annotated[
        str,
        typer.Option(
            "--top-m",
            metavar="M",
            help="Start from the images retrieved most often: a share (0.1) or a number (50).",
        ),
    ] = "1.0",
    guidance: Annotated[
        float, typer.Option(help="At least 1; more follows the neighbours more closely.")
    ] = 1.0,
    neighbours: Annotated[
        int | None,
        typer.Option(min=1, metavar="K", help="Images that a sample sees.", show_default="4"),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of sampling.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Of all random numbers.")] = 0,
    size: Annotated[
        int, typer.Option(min=4, help="Side that images of --train are cut and resized to.")
    ] = 32,
    grey: Annotated[bool, typer.Option("--grey", help="Train on grey images.")] = False,
    train_steps: Annotated[int, typer.Option(min=1, help="Of training.")] = 3000,
    keep: Annotated[
        int, typer.Option(min=1, help="DCT coefficients a channel by which images are compared.")
    ] = 24,
    as_json: JsonOption = False,
) -> None:
    """See :data:`HELP`."""
    number = _top_m(top_m)
    if train is None and out is None:
        out = Path("samples.png")
    if out is None and (database is not None or query is not None):
        fail("--database and --query are for sampling: give --out FILE too")
    with terminable(), _answered(model):
        if train is not None:
            _train(model, train, size, grey, train_steps, keep, neighbours, seed, as_json)
        if out is None:
            return
        _sample(
            model, out, database, query, count, number, guidance, neighbours, steps, seed, as_json
        )


def _top_m(text: str) -> float | int:
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise typer.BadParameter(
            f"want a share such as 0.1 or a number such as 50; got {text!r}", param_hint="--top-m"
        ) from None


@contextmanager
def _answered(model: Path) -> Iterator[None]:
    """Bad input ends with status 2, an interrupt with 130."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(
            f"\nInterrupted. {model} is as it was; the same command goes on with the training.",
            err=True,
        )
        raise typer.Exit(130) from None
    except OSError as error:
        fail(f"cannot read or write: {error}")
    except (ValueError, TypeError, ImportError, FloatingPointError) as error:
        fail(str(error))


@contextmanager
def _progress(label: str) -> Iterator[Report | None]:
    """A bar on the terminal; nothing where stderr is none."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[word]}"),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(label, total=1.0, word="")
        yield lambda part, word: bars.update(task, completed=part, word=word)


def _train(
    path: Path,
    folder: Path,
    size: int,
    grey: bool,
    steps: int,
    keep: int,
    neighbours: int | None,
    seed: int,
    as_json: bool,
) -> None:
    from stiefel.generate import DCTEncoder, ImageDatabase, RetrievalDiffusion, read_images

    images = read_images(folder, size, channels=1 if grey else 3)
    db = ImageDatabase(images, DCTEncoder(keep).fit(images))
    checkpoint = path.with_name(f"{path.stem}.training.safetensors")
    with _progress("training") as report:
        model = RetrievalDiffusion().fit(
            images,
            db,
            k=4 if neighbours is None else neighbours,
            steps=steps,
            batch_size=min(128, max(8, 2**18 // images[0].numel())),
            seed=seed,
            checkpoint=checkpoint,
            progress=report,
        )
    model.save(path)
    checkpoint.unlink(missing_ok=True)
    parameters = sum(p.numel() for p in model.network.parameters())
    loss = float(model.losses[-min(100, steps) :].mean())
    if as_json:
        done = {"model": str(path), "images": len(db), "parameters": parameters, "loss": loss}
        typer.echo(json.dumps({"trained": done}))
    else:
        typer.echo(
            f"Written: {path} ({parameters:,} parameters, {len(db)} images, loss {loss:.4f})"
        )


def _sample(
    path: Path,
    out: Path,
    folder: Path | None,
    query: Path | None,
    count: int,
    top_m: float | int,
    guidance: float,
    neighbours: int | None,
    steps: int,
    seed: int,
    as_json: bool,
) -> None:
    import torch

    from stiefel.generate import RetrievalDiffusion, copy_report, read_images, save_grid

    if out.suffix.lower() != ".png":
        fail(f"--out must end in .png, got {out}")
    model = RetrievalDiffusion.load(path)
    shape = model.database.shape
    channels, sides = (shape[0] if len(shape) == 3 else 1), (shape[-2], shape[-1])
    names: list[str] | None = None
    if folder is not None:
        model, names = _other(model, folder, sides, channels)
    asked = None if query is None else read_images([query], sides, channels=channels)
    with _progress("sampling") as report:
        samples, rows = model.sample(
            count,
            query=asked,
            top_m=top_m,
            guidance=guidance,
            k=neighbours,
            steps=steps,
            generator=torch.Generator().manual_seed(seed),
            return_neighbours=True,
            progress=report,
        )
    seen = _seen(model.database, rows, asked)
    save_grid(out, samples, seen)
    distance = copy_report(samples, model.database).mean
    if as_json:
        named = [[_name(r, names) for r in line] for line in rows.tolist()]
        told = {"out": str(out), "count": count, "neighbours": named, "distance": distance}
        typer.echo(json.dumps(told))
    else:
        typer.echo(
            f"Written: {out} ({count} samples, each above its neighbours; "
            f"mean distance to the nearest database image {distance:.2f})"
        )


def _other(
    model: RetrievalDiffusion, folder: Path, sides: tuple[int, int], channels: int
) -> tuple[RetrievalDiffusion, list[str]]:
    """The model with a folder's images as database, and their names."""
    from stiefel.generate import ImageDatabase
    from stiefel.generate.pictures import image_files, read_images

    files = image_files(folder)
    images = read_images(files, sides, channels=channels)
    other = ImageDatabase(images, model.database.encoder, metric=model.database.metric)
    return model.swap_database(other), [str(f.relative_to(folder)) for f in files]


def _seen(db: ImageDatabase, rows: torch.Tensor, query: torch.Tensor | None) -> torch.Tensor:
    """``[n, k, *shape]`` images that the samples saw; a query stands in its own place."""
    found = db.images[rows.clamp_min(0)]
    if query is not None:
        found[rows < 0] = query[0]
    return found


def _name(row: int, names: list[str] | None) -> str | int:
    if row < 0:
        return "query"
    return row if names is None else names[row]
