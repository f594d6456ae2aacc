"""``stiefel atlas``: the page, built once or served live. The work is in ``stiefel.atlas``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stiefel.cli_options import fail, terminable

EXAMPLES = (
    "Example: [bold]stiefel atlas --results results --out build/atlas --open[/]\n\n"
    "Example: [bold]stiefel atlas --watch --open[/]"
)


def atlas(
    results: Annotated[
        Path, typer.Option("--results", help="Folder that holds the results.", show_default=True)
    ] = Path("results"),
    out: Annotated[Path, typer.Option(help="Folder for the page.")] = Path("build/atlas"),
    open_: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Serve it on loopback, live, until Ctrl-C.")
    ] = False,
    port: Annotated[
        int | None,
        typer.Option(
            min=0, max=65535, help="Where to serve, with --watch.", show_default="any free one"
        ),
    ] = None,
) -> None:
    """Build the page from the results: a card and an article for each paper, and feeds.

    With --watch it is rebuilt whenever results change, and open pages reload.
    """
    from stiefel.atlas.page import MissingPackageError, build_page

    if port is not None and not watch:
        raise typer.BadParameter("only with --watch", param_hint="--port")
    if watch:
        _watch(results, out, port or 0, open_)
        return
    try:
        index = build_page(results, out)
    except MissingPackageError as error:
        fail(str(error))
    except OSError as error:
        fail(f"cannot write: {error}")
    typer.echo(f"Page: {index}")
    if open_:
        typer.launch(index.absolute().as_uri())


def _watch(results: Path, out: Path, port: int, open_: bool) -> None:
    """Serve until Ctrl-C, which is how it is meant to end."""
    from stiefel.atlas.page import MissingPackageError
    from stiefel.atlas.watch import watch

    def started(address: str) -> None:
        typer.echo(f"Page: {address} (Ctrl-C ends it)")
        if open_:
            typer.launch(address)

    try:
        with terminable():
            watch(
                results,
                out,
                port=port,
                on_start=started,
                on_build=lambda: typer.echo("Results changed: page rebuilt."),
                on_problem=lambda error: typer.echo(f"Page not rebuilt: {error}", err=True),
            )
    except MissingPackageError as error:
        fail(str(error))
    except OSError as error:
        fail(f"cannot serve {out} on port {port or 'any'}: {error}")
    except KeyboardInterrupt:
        typer.echo("Stopped.")
