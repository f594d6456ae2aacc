"""YAML of a recipe: safe types only, bounded in every direction, with the line of every key.

A recipe comes from anyone. The parser's events are counted before a document is built, so that
neither nesting nor aliases of aliases can cost more memory or time than the bounds say. No tag can
make an object, and a key that stands twice is an error, not the last one's win.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stiefel.merge.recipe_errors import (
    MissingPackageError,
    Problem,
    RecipeError,
    dotted,
    shown,
)

MAX_BYTES = 500_000
MAX_DEPTH = 20
MAX_NODES = 20_000  # aliases count as often as they are used

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """What the YAML says, and where."""

    content: dict[str, Any]
    lines: Mapping[Path, int]
    """Line (from 1) of each key, or of each item of a list."""

    def line(self, path: Path) -> int | None:
        """The line of ``path``, or of the nearest enclosing key that is there."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path)


def parse_yaml(text: str, name: str = "recipe") -> Document:
    """Read a YAML mapping.

    Args:
        text: the document.
        name: what messages call it.

    Raises:
        RecipeError: not YAML, not one mapping with words as keys, a key twice, a tag that is not
            one of YAML's plain types, or beyond :data:`MAX_BYTES`, :data:`MAX_DEPTH`,
            :data:`MAX_NODES`. The message has the line.
        MissingPackageError: PyYAML is not installed.
    """
    try:
        import yaml
    except ImportError as error:
        raise MissingPackageError("PyYAML") from error

    def wrong(message: str, line: int | None = None, key: str = "") -> RecipeError:
        return RecipeError(name, [Problem(message, key, line)])

    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_BYTES:
        raise wrong(f"{size} bytes; a recipe has at most {MAX_BYTES}")
    try:
        _check_bounds(yaml, text, wrong)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            raise wrong("empty; a recipe has at least merge_method and models or slices")
        if not isinstance(node, yaml.MappingNode):
            raise wrong(f"must be keys and values, got a {node.id}", node.start_mark.line + 1)
        loader = yaml.SafeLoader("")
        try:
            lines: dict[Path, int] = {}
            return Document(_plain(yaml, loader, node, (), lines, wrong), lines)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = " ".join(part for part in (error.context, error.problem) if part)
        raise wrong(f"not valid YAML: {said}", None if mark is None else mark.line + 1) from error
    except yaml.YAMLError as error:  # a character that YAML does not have
        raise wrong(f"not valid YAML: {error}") from error


def _check_bounds(yaml: Any, text: str, wrong: Any) -> None:
    """Count nodes and depth from the events alone; aliases weigh what they repeat."""
    sizes: dict[str, int] = {}  # anchor → nodes under it
    open_nodes: list[tuple[str | None, int]] = []  # anchor, nodes before it
    total = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes and any(event.anchor == a for a, _ in open_nodes):
                raise wrong(f"*{event.anchor} stands inside what it repeats", line)
            total += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            if len(open_nodes) >= MAX_DEPTH:
                raise wrong(f"nested more than {MAX_DEPTH} deep", line)
            open_nodes.append((event.anchor, total))
            sizes.pop(event.anchor or "", None)
            total += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor:
                sizes[anchor] = total - before
        if total > MAX_NODES:
            raise wrong(f"more than {MAX_NODES} values, aliases counted as they repeat", line)


def _plain(
    yaml: Any, loader: Any, node: Any, path: Path, lines: dict[Path, int], wrong: Any
) -> Any:
    """The node as Python's own types; notes the line of everything in it."""
    if len(path) > 2 * MAX_DEPTH:  # aliases can nest deeper than what is written
        raise wrong(f"nested more than {2 * MAX_DEPTH} deep", node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        if node.tag != "tag:yaml.org,2002:map":
            raise wrong(f"the tag {node.tag} is not allowed", node.start_mark.line + 1)
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = _key(yaml, loader, key_node, wrong)
            if key in found:
                raise wrong("this key stands twice", line, dotted((*path, key)))
            lines[(*path, key)] = line
            found[key] = _plain(yaml, loader, value_node, (*path, key), lines, wrong)
        return found
    if isinstance(node, yaml.SequenceNode):
        if node.tag != "tag:yaml.org,2002:seq":
            raise wrong(f"the tag {node.tag} is not allowed", node.start_mark.line + 1)
        items = []
        for index, item in enumerate(node.value):
            lines[(*path, index)] = item.start_mark.line + 1
            items.append(_plain(yaml, loader, item, (*path, index), lines, wrong))
        return items
    return _scalar(loader, node, wrong)


def _key(yaml: Any, loader: Any, node: Any, wrong: Any) -> str:
    line = node.start_mark.line + 1
    if node.tag == "tag:yaml.org,2002:merge":
        raise wrong("merge keys (<<) are not supported: write the keys out", line)
    key = _scalar(loader, node, wrong) if isinstance(node, yaml.ScalarNode) else None
    if not isinstance(key, str):
        raise wrong(f"a key must be a word, got {shown(node.value)}", line)
    return key


def _scalar(loader: Any, node: Any, wrong: Any) -> Any:
    try:
        return loader.construct_object(node, deep=True)
    except (ValueError, OverflowError) as error:  # a date such as 2020-99-99, a huge number
        line = node.start_mark.line + 1
        raise wrong(f"{shown(node.value)} cannot be read: {error}", line) from error
