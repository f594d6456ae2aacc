"""What can be wrong with a recipe or a plan, as sentences with their place."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_SHOWN = 40  # problems in one message
_LONGEST = 80  # characters of a value that came


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    message: str
    key: str = ""
    """Where in the recipe, as ``models[0].parameters.weight``; empty if in none of its keys."""
    line: int | None = None
    """Line of the recipe, from 1."""

    def __str__(self) -> str:
        place = f"line {self.line}: " if self.line is not None else ""
        return f"{place}{self.key}: {self.message}" if self.key else f"{place}{self.message}"


class _ProblemsError(ValueError):
    """Several problems in one exception; :attr:`problems` has them one by one."""

    def __init__(self, title: str, problems: Sequence[Problem]) -> None:
        self.title = title
        self.problems = tuple(problems)
        lines = [str(problem) for problem in self.problems[:_SHOWN]]
        if len(self.problems) > _SHOWN:
            lines.append(f"and {len(self.problems) - _SHOWN} more")
        super().__init__("\n  ".join([f"{title}:", *lines]))


class RecipeError(_ProblemsError):
    """The recipe itself is wrong: syntax, keys, values."""


class PlanError(_ProblemsError):
    """The recipe is right, but the checkpoints it names do not fit it or one another."""


class MissingPackageError(ImportError):
    """A package of the extra ``merge`` is not installed."""

    def __init__(self, package: str) -> None:
        super().__init__(f'recipes need {package}: pip install "stiefel[merge]"')


def nearest(name: str, allowed: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for the allowed name nearest to ``name``, or nothing."""
    folded = {word.lower().replace("-", "_"): word for word in allowed}
    found = difflib.get_close_matches(name.lower().replace("-", "_"), folded, n=1, cutoff=0.6)
    return f"; did you mean {folded[found[0]]!r}?" if found else ""


def shown(value: object) -> str:
    """``value`` as a message shows it: its ``repr``, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def dotted(path: Sequence[str | int]) -> str:
    """``("models", 0, "model")`` as ``models[0].model``."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text
