"""``stiefel new-paper``: the start of a paper of your own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from stiefel.cli_options import JsonOption, fail

EXAMPLES = """
Examples:\n
[bold]stiefel new-paper my-method[/] - a package my-method/ of its own, found once it is installed\n
[bold]stiefel new-paper my-method --folder ~/stiefel[/] - a module of that checkout of Stiefel
"""


def new_paper(
    slug: Annotated[str, typer.Argument(help="Its name: lower-case words joined by hyphens.")],
    folder: Annotated[
        Path, typer.Option(help="A checkout of Stiefel, or where the package's folder goes.")
    ] = Path(),
    title: Annotated[str, typer.Option(help="Title of the paper.")] = "",
    arxiv: Annotated[str, typer.Option(help="Its number on arXiv.")] = "0000.00000",
    topic: Annotated[str, typer.Option(help="Its group on the page.")] = "theory",
    as_json: JsonOption = False,
) -> None:
    """Write the start of a paper of your own: module, test and page that run as they stand."""
    from stiefel.atlas.new_paper import new_paper as write

    try:
        made = write(slug, folder, title=title, arxiv=arxiv, topic=topic)
    except (ValueError, FileExistsError) as error:
        fail(str(error))
    except OSError as error:
        fail(f"cannot write: {error}")
    if as_json:
        files = [str(path) for path in made.files]
        typer.echo(json.dumps({"slug": slug, "files": files, "in_checkout": made.in_checkout}))
        return
    for path in made.files:
        typer.echo(f"wrote {path}")
    install = "" if made.in_checkout else f"pip install -e {made.files[0].parent} && "
    typer.echo(f"Now: {install}stiefel reproduce {slug} --scale smoke")
