"""The ``stiefel`` command: parses, calls, prints. The work is done elsewhere.

Nothing heavy is imported before a command needs it: ``stiefel --help`` answers at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stiefel import __version__
from stiefel.cli_atlas import EXAMPLES as ATLAS_EXAMPLES
from stiefel.cli_atlas import atlas
from stiefel.cli_diagnose import EXAMPLES as DIAGNOSE_EXAMPLES
from stiefel.cli_diagnose import HELP as DIAGNOSE_HELP
from stiefel.cli_diagnose import diagnose
from stiefel.cli_digest import EXAMPLES as DIGEST_EXAMPLES
from stiefel.cli_digest import HELP as DIGEST_HELP
from stiefel.cli_digest import digest
from stiefel.cli_generate import EXAMPLES as GENERATE_EXAMPLES
from stiefel.cli_generate import HELP as GENERATE_HELP
from stiefel.cli_generate import generate
from stiefel.cli_merge import EXAMPLES as MERGE_EXAMPLES
from stiefel.cli_merge import HELP as MERGE_HELP
from stiefel.cli_merge import merge
from stiefel.cli_new_paper import EXAMPLES as NEW_PAPER_EXAMPLES
from stiefel.cli_new_paper import new_paper
from stiefel.cli_options import JsonOption, fail, seed_list
from stiefel.cli_race import EXAMPLES, HELP, race

if TYPE_CHECKING:
    from stiefel.atlas import Result
    from stiefel.papers import Paper

app = typer.Typer(
    name="stiefel",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; ends the process.

    Exit status: 0 done, 1 ``--strict`` and a claim not reproduced, 2 bad input, 130 interrupted.
    """
    try:
        app(args=arguments, prog_name="stiefel")
    except KeyboardInterrupt:
        sys.exit(130)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"stiefel {__version__}")
        raise typer.Exit


@app.callback(epilog="Example: [bold]stiefel reproduce rmnp --scale smoke[/]")
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Papers on orthogonality, initialisation and low rank, each re-checked on your machine."""


@app.command("list", epilog="Example: [bold]stiefel list --json[/]")
def list_papers(as_json: JsonOption = False) -> None:
    """List the papers: slug, title, topic, and how long a check takes."""
    from stiefel.papers import all_papers

    papers = all_papers()
    if as_json:
        for paper in papers:
            typer.echo(json.dumps(_describe(paper)))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from stiefel.atlas.result import duration

    table = Table(header_style="bold")
    table.add_column("slug", style="bold", no_wrap=True)
    table.add_column("title")
    table.add_column("published", no_wrap=True)
    table.add_column("topic")
    table.add_column("takes about", justify="right", no_wrap=True)
    for paper in papers:
        table.add_row(
            paper.slug,
            escape(paper.title),
            paper.published,
            escape(paper.topic),
            duration(paper.seconds),
        )
    Console().print(table)


@app.command(epilog="Example: [bold]stiefel show normuon[/]")
def show(
    slug: Annotated[str, typer.Argument(help="Which paper; see [bold]stiefel list[/].")],
    as_json: JsonOption = False,
) -> None:
    """Show one paper: what it says, what is checked of it, how to use it."""
    paper = _paper(slug)
    if as_json:
        typer.echo(json.dumps(_describe(paper)))
        return
    from rich.console import Console
    from rich.padding import Padding
    from rich.syntax import Syntax
    from rich.text import Text

    from stiefel.atlas.result import number

    console = Console()
    say = console.print
    say(Text(paper.title, "bold"))
    say(Text(f"{paper.authors} · {paper.published} · arXiv {paper.arxiv} · {paper.topic}", "dim"))
    if paper.code:
        say(Text(f"Authors' code: {paper.code}", "dim"))
    say(Padding(Text(paper.summary), (1, 0)))
    for claim in paper.claims:
        say(Text.assemble(("Claim  ", "bold"), claim.text))
        say(Text(f"       {claim.metric} {claim.relation} {number(claim.bound)}", "cyan"))
    for note in paper.notes:
        say(Text.assemble(("Note   ", "bold"), note))
    say(Padding(Syntax(paper.snippet.strip(), "python", theme="ansi_dark"), (1, 0)))
    say(Text(f"Check it: stiefel reproduce {slug}", "bold"))


def _scale_name(text: str) -> str:
    allowed = ("smoke", "laptop", "paper")
    if text not in allowed:
        raise typer.BadParameter(f"want one of {', '.join(allowed)}; got {text!r}")
    return text


@app.command(
    epilog="Example: [bold]stiefel reproduce rmnp normuon --jobs 2 --page build/atlas[/]",
    short_help="Re-check papers on this machine and keep the results.",
)
def reproduce(
    slugs: Annotated[
        list[str] | None,
        typer.Argument(metavar="SLUG", help="Which papers; all of them if none is named."),
    ] = None,
    scale: Annotated[
        str,
        typer.Option(
            metavar="smoke|laptop|paper",
            callback=_scale_name,
            help="smoke: seconds, no verdict. laptop: minutes. paper: as the authors ran it.",
        ),
    ] = "laptop",
    seeds: Annotated[str, typer.Option(help="Seeds, joined by commas.")] = "0,1,2",
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Runs side by side.", show_default="one a CPU core"),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder that holds the results.")] = Path("results"),
    page: Annotated[
        Path | None, typer.Option(help="Rebuild the page in this folder as each paper finishes.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Run again what is there.")] = False,
    cluster: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Run on the workers of this Dask scheduler."),
    ] = None,
    cluster_store: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Folder that all workers see, for what runs share."),
    ] = None,
    retries: Annotated[
        int, typer.Option(min=0, help="Starts anew of a run whose cluster worker was lost.")
    ] = 2,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 unless every claim holds or is open.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Re-check papers on this machine and keep the results.

    Interrupted runs go on where they stopped: results that the same code has made are not made
    again. A paper from elsewhere is named as MODULE:NAME.
    """
    wanted = seed_list(seeds)
    chosen = _chosen(slugs)
    if cluster_store is not None and cluster is None:
        raise typer.BadParameter("needs --cluster", param_hint="--cluster-store")
    where = {"cluster": cluster, "cluster_store": cluster_store, "retries": retries}
    results = _run(chosen, scale, wanted, jobs, out, page, force, as_json, where)
    if not as_json:
        from rich.console import Console

        from stiefel.atlas.display import verdict_table

        Console().print(verdict_table(results))
        typer.echo(f"Results: {out}")
    if page is not None:
        typer.echo(f"Page: {page / 'index.html'}", err=as_json)
    bad = {"not reproduced", "failed"}
    if strict and any(claim.verdict.value in bad for r in results for claim in r.claims):
        raise typer.Exit(1)


def _run(
    papers: list[Paper],
    scale: str,
    seeds: list[int],
    jobs: int | None,
    out: Path,
    page: Path | None,
    force: bool,
    as_json: bool,
    where: dict[str, Any],
) -> list[Result]:
    """Run, printing a JSON line and rebuilding the page as each paper finishes."""
    from rich.console import Console

    from stiefel.atlas import runner
    from stiefel.atlas.cluster import ClusterError
    from stiefel.atlas.page import MissingPackageError, build_page, shown_papers

    def finished(result: Result) -> None:
        if as_json:
            typer.echo(json.dumps(result.to_json(), allow_nan=False, ensure_ascii=False))
        if page is not None:
            build_page(out, page, papers=shown_papers(papers))

    try:
        if page is not None:  # before hours of work, not after
            build_page(out, page, papers=shown_papers(papers))
        return runner.reproduce(
            papers,
            scale=scale,
            seeds=seeds,
            jobs=jobs,
            out=out,
            force=force,
            console=Console(stderr=as_json),
            on_result=finished,
            **where,
        )
    except (MissingPackageError, ClusterError) as error:
        fail(str(error))
    except OSError as error:
        fail(f"cannot write: {error}")
    except KeyboardInterrupt:
        typer.echo(
            f"\nInterrupted. What was finished is kept in {out}; "
            "the same command goes on from there.",
            err=True,
        )
        raise typer.Exit(130) from None


app.command(
    help=HELP,
    epilog=EXAMPLES,
    short_help="Which optimizer for your model? All of them under one protocol.",
)(race)


app.command(
    help=MERGE_HELP,
    epilog=MERGE_EXAMPLES,
    short_help="Merge fine-tuned models as a recipe says, streaming from disk to disk.",
)(merge)
app.command(
    help=DIAGNOSE_HELP,
    epilog=DIAGNOSE_EXAMPLES,
    short_help="What a checkpoint's weights tell, without data: a report as table, page or JSON.",
)(diagnose)
app.command(
    help=GENERATE_HELP,
    epilog=GENERATE_EXAMPLES,
    short_help="Draw images from a small network and a database of images; or train one.",
)(generate)
app.command(
    help=DIGEST_HELP,
    epilog=DIGEST_EXAMPLES,
    short_help="New and changed cards since a date, as an e-mail: printed, written or sent.",
)(digest)
app.command(
    "new-paper",
    epilog=NEW_PAPER_EXAMPLES,
    short_help="Write the start of a paper of your own: module, test and page.",
)(new_paper)


app.command(epilog=ATLAS_EXAMPLES)(atlas)


def _describe(paper: Paper) -> dict[str, Any]:
    fields = ("slug", "title", "authors", "published", "arxiv", "code", "topic", "summary")
    return {
        **{name: getattr(paper, name) for name in fields},
        "claims": [
            {"text": c.text, "metric": c.metric, "relation": c.relation, "bound": c.bound}
            for c in paper.claims
        ],
        "notes": list(paper.notes),
        "snippet": paper.snippet,
        "seconds": paper.seconds,
    }


def _chosen(names: list[str] | None) -> list[Paper]:
    from stiefel.papers import all_papers

    papers = [_paper(name) for name in names] if names else list(all_papers())
    slugs = [paper.slug for paper in papers]
    twice = [slug for slug in dict.fromkeys(slugs) if slugs.count(slug) > 1]
    if twice:
        fail(f"asked for twice: {', '.join(twice)}")
    return papers


def _paper(name: str) -> Paper:
    """The paper with this slug, or ``MODULE:NAME`` of one from elsewhere."""
    from stiefel.papers import Paper, get

    if ":" not in name:
        try:
            return get(name)
        except KeyError as error:
            fail(str(error.args[0]))
    module, _, attribute = name.partition(":")
    try:
        paper = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        fail(f"cannot load {name!r}: {error}")
    if not isinstance(paper, Paper):
        fail(f"{name!r} is a {type(paper).__name__}, not a Paper")
    return paper
