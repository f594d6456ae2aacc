"""What goes wrong with checkpoints, and how names that came from a file are shown."""

from __future__ import annotations

_LONGEST_SHOWN = 120


class CheckpointError(ValueError):
    """A checkpoint that is damaged, that lies about itself, or that is no checkpoint at all."""


def quoted(name: object) -> str:
    """``name`` for a message: escaped, and cut where a file made it absurdly long."""
    text = repr(name[: _LONGEST_SHOWN + 1] if isinstance(name, str) else name)
    return text if len(text) <= _LONGEST_SHOWN + 2 else f"{text[:_LONGEST_SHOWN]}…"


def listed(names: list[str], at_most: int = 5) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(quoted(name) for name in names[:at_most])
    return shown if len(names) <= at_most else f"{shown} and {len(names) - at_most} more"
