"""What several commands share: options, and how bad input is answered."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, NoReturn

import typer

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]


def fail(message: str) -> NoReturn:
    """Say what is wrong with the input and end with status 2."""
    typer.secho(f"stiefel: {message}", fg="red", err=True)
    raise typer.Exit(2)


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM is a KeyboardInterrupt too."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def seed_list(text: str) -> list[int]:
    """Seeds from numbers joined by commas.

    Raises:
        typer.BadParameter: something else, or a seed named twice.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise typer.BadParameter(
            f"want whole numbers joined by commas, as in 0,1,2; got {text!r}", param_hint="--seeds"
        )
    seeds = [int(part) for part in parts]
    if len(set(seeds)) < len(seeds):
        raise typer.BadParameter(f"each seed once, got {text!r}", param_hint="--seeds")
    return seeds
