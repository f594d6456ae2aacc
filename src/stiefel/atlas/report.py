"""The link that tells us of a result that differs: filled in with what the page shows."""

from __future__ import annotations

from importlib import metadata
from urllib.parse import quote

from stiefel import __version__
from stiefel.atlas.entry import Entry
from stiefel.atlas.result import interval, number

_LABELS = ("issues", "issue tracker", "bug tracker", "tracker")


def issue_address() -> str | None:
    """Where the installed project takes issues, by its own metadata; None where it names no place.

    That is ``[project.urls]`` in pyproject.toml, under Issues or Bug Tracker.
    """
    try:
        entries = metadata.metadata("stiefel").get_all("Project-URL") or []
    except metadata.PackageNotFoundError:
        return None
    for entry in entries:
        label, _, address = entry.partition(",")
        if label.strip().lower() in _LABELS and address.strip().startswith("https://"):
            return address.strip().rstrip("/")
    return None


def report_text(entry: Entry) -> str:
    """The numbers, machine and commit of the page, and blanks for the reader's."""
    paper, result, judgement = entry.paper, entry.result, entry.headline
    lines = [
        f"Paper: {paper.title} ({paper.slug}, stiefel {__version__})",
        f"Claim: {paper.claim.text}",
        f"Metric: {paper.claim.metric} {paper.claim.relation} {number(paper.claim.bound)}",
        "",
        "ON THE PAGE",
        f"Verdict: {entry.verdict}",
    ]
    if result is not None and judgement is not None:
        values = [
            f"seed {m.seed}: {number(m.metrics[paper.claim.metric])}" for m in result.measurements
        ]
        newest = max(entry.records, key=lambda record: record.started)
        machine = newest.machine
        lines += [
            f"Mean: {number(judgement.value)} (95 %: {interval(judgement.interval)})",
            f"Seeds: {', '.join(values)}",
            "Machine: {cpu}, {cores} cores, {system}".format(
                **{k: machine.get(k, "?") for k in ("cpu", "cores", "system")}
            ),
            f"Versions: {', '.join(f'{k} {v}' for k, v in newest.versions.items())}",
            f"Commit: {newest.commit or 'not recorded'}",
            f"Date: {newest.started[:10]}",
        ]
    return "\n".join(
        [*lines, f"Command: {entry.command}", "", "HERE", "Mean and seeds:", "Machine:", "Commit:"]
    )


def report_link(entry: Entry, address: str | None) -> str:
    """A new issue at ``address``, or without one a letter whose receiver the reader fills in."""
    title = quote(f"{entry.paper.slug}: a result that differs", safe="")
    body = quote(report_text(entry), safe="")
    if address is not None:
        return f"{address}/new?title={title}&body={body}"
    return f"mailto:?subject={title}&body={body.replace('%0A', '%0D%0A')}"
