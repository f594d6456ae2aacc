"""Which code a number depends on, as one hash.

A result stays valid until code that could have changed it changes. That code is the module of the
function that made it and, from there, every module of the same project or of ``stiefel`` that is
imported, followed to where each name is *defined*: ``from stiefel.optim import NorMuon`` counts
``stiefel/optim/normuon.py``, not the package that passes the name on.

Sources are read, never imported, and compared as syntax trees, so that comments, docstrings,
formatting and ``if TYPE_CHECKING`` blocks count for nothing. Neither does what a paper says about
itself: of ``Paper(...)`` only the experiment counts, and the function that draws the figure is
left out with everything that only it uses. Modules imported by a computed name are not seen.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import platform
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

# What carries a measurement from an experiment to disk, and does not change it.
PROTOCOL = frozenset(
    ("stiefel.storage", *(f"stiefel.papers.{name}" for name in ("paper", "progress", "closure")))
)


def runtime() -> dict[str, str]:
    """Versions that can change numbers: Python's minor version and torch's full one."""
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": metadata.version("torch"),
    }


def code_digest(function: Callable[..., Any]) -> str:
    """Hash of the code behind ``function``: its module and all it imports of its project.

    ``functools.partial`` is looked through; its arguments count by their ``repr``.

    Args:
        function: Defined in a module that exists as a file.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: the module of ``function`` has no source file.
    """
    bound: list[str] = []
    while isinstance(function, partial):
        bound.append(repr((function.args, sorted(function.keywords.items()))))
        function = function.func
    module = getattr(function, "__module__", None) or type(function).__module__
    digest = hashlib.sha256(repr(bound).encode())
    for name, path in sorted(closure(module).items()):
        digest.update(f"{name}\0{_parsed(path)[0]}\0".encode())
    return digest.hexdigest()


def closure(module: str) -> dict[str, Path]:
    """Source files, by module name, that ``module`` depends on, itself included.

    Raises:
        ValueError: ``module`` has no source file.
    """
    if _locate(module) is None:
        raise ValueError(f"module {module!r} has no source file, so its code cannot be compared")
    tops = {"stiefel", module.partition(".")[0]}
    found: dict[str, Path] = {}
    queue = [module]
    while queue:
        name = queue.pop()
        path = _locate(name)
        if path is None or name in found or name in PROTOCOL:
            continue
        found[name] = path
        for target, wanted in _parsed(path)[1]:
            target = _absolute(target, name, path)
            if target.partition(".")[0] in tops:
                queue += _defining(target, wanted) if wanted else [target]
    return found


@lru_cache(maxsize=4096)
def _parse(path: Path, stamp: tuple[int, int]) -> tuple[str, tuple[tuple[str, str], ...], ast.AST]:
    tree = _relevant(ast.parse(path.read_text(encoding="utf-8"), filename=str(path)))
    digest = hashlib.sha256(ast.dump(tree).encode()).hexdigest()
    return digest, tuple(_imports(tree)), tree


def _parsed(path: Path) -> tuple[str, tuple[tuple[str, str], ...], ast.AST]:
    """Digest, imports and tree of a source file; read again only when the file has changed."""
    stat = path.stat()
    return _parse(path, (stat.st_mtime_ns, stat.st_size))


def _imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Pairs (module as written, name taken from it or "")."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            target = "." * node.level + (node.module or "")
            yield from ((target, alias.name) for alias in node.names)


def _absolute(target: str, module: str, path: Path) -> str:
    """``target`` without leading dots, as seen from ``module``."""
    level = len(target) - len(target.lstrip("."))
    if level == 0:
        return target
    parts = module.split(".")
    if path.name == "__init__.py":
        level -= 1
    parts = parts[: len(parts) - level]
    return ".".join([*parts, target.lstrip(".")] if target.lstrip(".") else parts)


def _defining(module: str, name: str, seen: frozenset[tuple[str, str]] = frozenset()) -> list[str]:
    """The modules that ``from module import name`` depends on."""
    path = _locate(module)
    if path is None:
        # A namespace package has no file of its own, only submodules.
        return [f"{module}.{name}"]
    if name == "*" or path.name != "__init__.py":
        return [module]
    submodule = f"{module}.{name}"
    if (module, name) in seen:  # a package that imports from itself
        return [submodule if _locate(submodule) else module]
    seen = seen | {(module, name)}
    tree = _parsed(path)[2]
    for node in reversed(getattr(tree, "body", [])):  # the last binding is the one that stands
        match node:
            case ast.ImportFrom(names=names):
                for alias in names:
                    if (alias.asname or alias.name) == name:
                        source = _absolute("." * node.level + (node.module or ""), module, path)
                        return _defining(source, alias.name, seen)
            case ast.Import(names=names):
                for alias in names:
                    if alias.asname == name:
                        return [alias.name]
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                if node.name == name:
                    return [module]
            case ast.Assign() | ast.AnnAssign():
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if any(isinstance(t, ast.Name) and t.id == name for t in targets):
                    return [module]
    if _locate(submodule) is not None:
        return [submodule]
    # Bound in a way that reading does not tell (a module-level __getattr__, a star import):
    # any file of the package may be behind it.
    return [module, *_within(module, path.parent)]


def _within(package: str, folder: Path) -> list[str]:
    """Every module below a package's folder."""
    names = []
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        names.append(".".join((package, *parts)))
    return names


def _locate(module: str) -> Path | None:
    """The source file of a module, found without importing its parents; None if it has none."""
    top, *rest = module.split(".")
    if top == "__main__":
        file = getattr(sys.modules["__main__"], "__file__", None)
        return Path(file) if file and not rest else None
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # a module made by hand, without a spec
        return None
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    for folder in spec.submodule_search_locations or ():
        base = Path(folder).joinpath(*rest)
        for file in (base / "__init__.py", base.with_name(base.name + ".py")):
            if file.is_file():
                return file
    return None


def _relevant(tree: ast.Module) -> ast.Module:
    """The tree without what cannot change a number."""
    figures = {
        keyword.value.id
        for node in ast.walk(tree)
        if _is_paper(node)
        for keyword in node.keywords  # pyrefly: ignore
        if keyword.arg == "figure" and isinstance(keyword.value, ast.Name)
    }
    tree = _Strip().visit(tree)
    return _without_drawing(tree, figures) if figures else tree


def _without_drawing(tree: ast.Module, figures: set[str]) -> ast.Module:
    """The tree without its figure functions and all that only they use."""
    uses = [
        (getattr(s, "name", None), {n.id for n in ast.walk(s) if isinstance(n, ast.Name)})
        for s in tree.body
    ]
    bound = {s.name for s in tree.body if isinstance(s, ast.FunctionDef) and not s.decorator_list}
    drawn: set[str] = set()
    wanted = figures
    while True:
        needed = {n for name, names in uses if name not in drawn for n in names - {name}}
        more = (wanted - needed) & bound - drawn
        if not more:
            break
        drawn |= more
        wanted = wanted.union(*(names for name, names in uses if name in drawn))
    wanted -= needed | drawn
    kept = [s for s in tree.body if getattr(s, "name", None) not in drawn]
    for statement in kept:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            names = statement.names
            statement.names = [a for a in names if (a.asname or a.name) not in wanted]
    tree.body = [s for s in kept if getattr(s, "names", True)]  # no import of nothing
    return tree


def _is_paper(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    function = node.func
    name = getattr(function, "id", None) or getattr(function, "attr", None)
    return name == "Paper"


class _Strip(ast.NodeTransformer):
    """Removes docstrings, imports for the type checker, and what papers say of themselves."""

    def _without_docstring(self, node: Any) -> Any:
        self.generic_visit(node)
        match node.body:
            case [ast.Expr(value=ast.Constant(value=str())), *rest]:
                node.body = rest
        return node

    visit_Module = visit_ClassDef = _without_docstring
    visit_FunctionDef = visit_AsyncFunctionDef = _without_docstring

    def visit_If(self, node: ast.If) -> Any:
        test = node.test
        name = getattr(test, "id", None) or getattr(test, "attr", None)
        self.generic_visit(node)
        return node.orelse if name == "TYPE_CHECKING" else node

    def visit_Call(self, node: ast.Call) -> Any:
        self.generic_visit(node)
        if _is_paper(node):
            node.keywords = [k for k in node.keywords if k.arg == "experiment"]
        return node
