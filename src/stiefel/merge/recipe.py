"""Recipes of ``stiefel merge``: read and checked.

A recipe is YAML in mergekit's schema, or the part of it that the documentation lists; whatever
else mergekit knows is an error that names the key.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stiefel.merge.recipe_errors import (
    MissingPackageError,
    Problem,
    RecipeError,
    dotted,
    nearest,
    shown,
)
from stiefel.merge.recipe_methods import ALIASES, METHODS, NOT_OFFERED, Method
from stiefel.merge.recipe_reader import Reader
from stiefel.merge.recipe_types import Recipe
from stiefel.merge.recipe_yaml import MAX_BYTES, Document, parse_yaml


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe from a file.

    Raises:
        RecipeError: there is no such file, it is no UTF-8, or see :func:`parse_recipe`.
        MissingPackageError: PyYAML or Pydantic is not installed.
    """
    path = Path(path)
    content = b""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        if len(content) <= MAX_BYTES:
            raise RecipeError(str(path), [Problem(f"is no UTF-8 text: {error}")]) from error
        text = content.decode("utf-8", "replace")
    except OSError as error:
        said = error.strerror or str(error)
        raise RecipeError(str(path), [Problem(f"cannot be read: {said}")]) from error
    return parse_recipe(text, str(path))


def parse_recipe(text: str, name: str = "recipe") -> Recipe:
    """Check the text of a recipe.

    Args:
        text: YAML.
        name: what messages call it.

    Raises:
        RecipeError: syntax, keys or values are wrong: every problem with its line, its key, what
            came, what is allowed and the nearest name.
        MissingPackageError: PyYAML or Pydantic is not installed.
    """
    try:
        import pydantic

        from stiefel.merge import recipe_schema
    except ImportError as error:
        raise MissingPackageError("pydantic") from error
    document = parse_yaml(text, name)
    problems: list[Problem] = []
    method = _method(document, problems)
    schema = None
    try:
        schema = recipe_schema.Schema.model_validate(document.content)
    except pydantic.ValidationError as error:
        problems += [_problem(e, document, recipe_schema) for e in error.errors()]
    if schema is None or method is None:
        if method is not None:
            Reader(document, method, problems).parameters()
        raise RecipeError(name, _sorted(problems))
    reader = Reader(document, method, problems)
    recipe = reader.recipe(schema, text, name)
    if problems:
        raise RecipeError(name, _sorted(problems))
    return recipe


def _sorted(problems: Sequence[Problem]) -> list[Problem]:
    return sorted(dict.fromkeys(problems), key=lambda problem: problem.line or 0)


def _method(document: Document, problems: list[Problem]) -> Method | None:
    """The recipe's method; a problem where there is none of that name."""
    name = document.content.get("merge_method")
    if not isinstance(name, str):
        return None  # the schema says so
    found = METHODS.get(ALIASES.get(name, name))
    if found is None:
        allowed = (*METHODS, *ALIASES)
        said = f"{name!r} is not offered" if name in NOT_OFFERED else f"no method {shown(name)}"
        close = "" if name in NOT_OFFERED else nearest(name, allowed)
        message = f"{said}; there are {', '.join(allowed)}{close}"
        problems.append(Problem(message, "merge_method", document.line(("merge_method",))))
    return found


def _problem(error: Any, document: Document, schema: Any) -> Problem:
    """One of Pydantic's errors as ours."""
    path = tuple(error["loc"])
    key = dotted(path)
    line = document.line(path)
    kind, got = error["type"], error.get("input")
    last = str(path[-1]) if path else ""
    if kind == "extra_forbidden":
        if last in schema.REFUSED:
            message = f"this key of mergekit is not supported: {schema.REFUSED[last]}"
        else:
            allowed = _fields(path, schema)
            message = f"unknown key; allowed are {', '.join(allowed)}{nearest(last, allowed)}"
    elif kind == "missing":
        message = "is required"
    elif kind == "literal_error":
        allowed = [str(value).strip("'") for value in error["ctx"]["expected"].split("' or '")]
        words = [w.strip("' ") for part in allowed for w in part.split(",")]
        close = nearest(got, words) if isinstance(got, str) else ""
        message = f"must be {' | '.join(words)}, got {shown(got)}{close}"
    elif kind == "value_error":
        message = str(error["ctx"]["error"])
    elif kind == "model_type":
        forms = {"Ref": "path, path+adapter or {model: path, lora: path}", "Place": "a path"}
        form = forms.get(error["ctx"]["class_name"], "keys and values")
        message = f"must be {form}, got {shown(got)}"
    else:
        message = f"{error['msg'].lower()}, got {shown(got)}"
    return Problem(message, key, line)


def _fields(path: Sequence[str | int], schema: Any) -> list[str]:
    """The keys that exist where ``path`` has an unknown one."""
    inside = {
        "models": schema.Entry,
        "slices": schema.OutputSlice,
        "sources": schema.Source,
        "tokenizer": schema.Tokenizer,
        "model": schema.Ref,
        "base_model": schema.Ref,
        "tokenizer_source": schema.Ref,
        "source": schema.Ref,
        "lora": schema.Place,
        "adapter": schema.Place,
    }
    words = [part for part in path[:-1] if isinstance(part, str)]
    model = inside.get(words[-1], schema.Schema) if words else schema.Schema
    if len(words) > 1 and words[-1] == "model" and words[-2] in ("model", "base_model"):
        model = schema.Place
    return list(model.model_fields)
