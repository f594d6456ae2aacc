"""``stiefel digest``: what is new since a date, as an e-mail. The work is in ``stiefel.atlas``."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer

from stiefel.cli_options import JsonOption, fail

if TYPE_CHECKING:
    from stiefel.atlas.digest import Digest
    from stiefel.atlas.mail import Settings

EXAMPLES = (
    "Example: [bold]stiefel digest --since 2026-11-01[/]\n\n"
    "Example: [bold]stiefel digest --since 2026-11-01 --out digest.eml[/]\n\n"
    "Example: [bold]STIEFEL_SMTP_HOST=mail.example.org … stiefel digest --since 2026-11-01 "
    "--send[/]"
)
HELP = "\n\n".join(
    (
        "New and changed cards since a date, as an e-mail of text and HTML.",
        (
            "Printed as text, unless [bold]--out[/] writes it as a file or [bold]--send[/] sends "
            "it. Nothing is sent when nothing is new."
        ),
        (
            "To send, the environment has STIEFEL_SMTP_HOST, _FROM and _TO, and where the server "
            "asks for them _USER and _PASSWORD; further _PORT, and _TLS: starttls (unless said "
            "otherwise), implicit (on port 465) or off (never with a password)."
        ),
    )
)


def digest(
    since: Annotated[
        str,
        typer.Option(
            metavar="DATE", help="From when, as 2026-11-01 or 2026-11-01T08:00; UTC if not said."
        ),
    ],
    results: Annotated[
        Path, typer.Option("--results", help="Folder that holds the results.")
    ] = Path("results"),
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.eml", help="Write the message to this file.")
    ] = None,
    send: Annotated[bool, typer.Option("--send", help="Send the message over SMTP.")] = False,
    page_url: Annotated[
        str, typer.Option(metavar="URL", help="Where the page is served, for links to the cards.")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """What is new since a date, as an e-mail."""
    from stiefel.atlas.digest import UNSENT, collect, message, text
    from stiefel.atlas.mail import (
        DeliveryError,
        SettingsError,
        read_settings,
        receivers_of,
        sender_of,
    )
    from stiefel.atlas.mail import send as send_mail
    from stiefel.papers import all_papers
    from stiefel.storage import write_bytes

    start = _date(since)
    _check_url(page_url)
    if not results.is_dir():
        fail(f"no folder {results}")
    settings: Settings | None = None
    try:
        settings = read_settings() if send else None  # before the work, not after
        sender = sender_of(os.environ) if os.environ.get("STIEFEL_SMTP_FROM") else UNSENT
        receivers = receivers_of(os.environ)
    except SettingsError as error:
        fail(str(error))
    found = collect(results, all_papers(), start)
    mail = message(found, sender=sender, receivers=receivers, page_url=page_url)
    if out is not None:
        try:
            write_bytes(out, mail.as_bytes())
        except OSError as error:
            fail(f"cannot write: {error}")
    sent = settings is not None and bool(found.items)
    if settings is not None and sent:
        try:
            send_mail(mail, settings)
        except DeliveryError as error:
            fail(f"not sent: {error}")
    if as_json:
        typer.echo(json.dumps(_told(found, out, sent)))
    elif out is None and not send:
        typer.echo(text(found, page_url), nl=False)
    else:
        _say(found, out, send, len(receivers))


def _say(found: Digest, out: Path | None, send: bool, receivers: int) -> None:
    typer.echo(found.subject)
    if out is not None:
        typer.echo(f"Message: {out}")
    if send and found.items:
        typer.echo(f"Sent to {receivers} {'receiver' if receivers == 1 else 'receivers'}.")
    elif send:
        typer.echo("Nothing sent.")


def _told(found: Digest, out: Path | None, sent: bool) -> dict[str, object]:
    return {
        "since": found.since.isoformat(),
        "items": [item.to_json() for item in found.items],
        "out": None if out is None else str(out),
        "sent": sent,
    }


def _date(text: str) -> datetime:
    try:
        when = datetime.fromisoformat(text.strip())
    except ValueError:
        raise typer.BadParameter(
            f"want a date such as 2026-11-01, got {text!r}", param_hint="--since"
        ) from None
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    if when > datetime.now(UTC):
        raise typer.BadParameter(f"{text} lies in the future", param_hint="--since")
    return when


def _check_url(text: str) -> None:
    """Links in a message are http(s) and absolute, or not there."""
    if not text:
        return
    try:
        parts = urlsplit(text)
    except ValueError:
        parts = None
    if not (parts and parts.scheme in ("http", "https") and parts.netloc and text.isprintable()):
        raise typer.BadParameter(
            f"want an address such as https://example.org/atlas, got {text!r}",
            param_hint="--page-url",
        )
