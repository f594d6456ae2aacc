"""The public names that a snippet uses, and where the documentation explains them."""

from __future__ import annotations

import ast
import re
import zlib
from pathlib import Path


def api_names(snippet: str) -> tuple[str, ...]:
    """Full names, ``stiefel.optim.RMNP``, of what ``snippet`` takes from Stiefel, in its order.

    Empty where it is not Python.
    """
    try:
        tree = ast.parse(snippet)
    except SyntaxError:
        return ()
    modules, names = {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and _ours(node.module):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if _ours(alias.name):
                    modules[alias.asname or "stiefel"] = alias.name if alias.asname else "stiefel"
    # Of `stiefel.nn.S4D` the walk meets the whole before `stiefel.nn`: that is left out.
    parts = set()
    for node in ast.walk(tree):
        text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if node not in parts and re.fullmatch(r"[\w.]+", text):
            parts |= set(ast.walk(node))
            first, _, rest = text.partition(".")
            if first in modules:
                names.append(f"{modules[first]}.{rest}")
    return tuple(dict.fromkeys(names))


def _ours(module: str | None) -> bool:
    return module is not None and module.split(".")[0] == "stiefel"


def read_inventory(docs: Path) -> dict[str, str]:
    """Address, relative to ``docs``, of each name in the ``objects.inv`` that Sphinx wrote there.

    Empty where there is none.

    Raises:
        ValueError: the file is not an inventory of version 2.
    """
    path = docs / "objects.inv"
    if not path.is_file():
        return {}
    head, content = path.read_bytes().split(b"\n", 1)
    if head.strip() != b"# Sphinx inventory version 2":
        raise ValueError(f"{path} must start with '# Sphinx inventory version 2', got {head!r}")
    for _ in range(3):  # project, version, a remark
        content = content.partition(b"\n")[2]
    try:
        lines = zlib.decompress(content).decode("utf-8").splitlines()
    except (zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    places = {}
    for line in lines:
        match = re.fullmatch(r"(\S+) py:\w+ -?\d+ (\S+) .+", line)
        if match:
            name, address = match[1], match[2]
            places[name] = address[:-1] + name if address.endswith("$") else address
    return places


def place(name: str, inventory: dict[str, str]) -> str | None:
    """Where ``name`` is explained; else the nearest package or module above it; else None."""
    while name:
        if name in inventory:
            return inventory[name]
        name = name.rpartition(".")[0]
    return None
