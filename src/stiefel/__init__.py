"""Stiefel: papers on orthogonality, initialisation and low rank as methods, checks and cards.

The homes (``stiefel.linalg``, ``stiefel.optim``, ...) are loaded when first touched, so that
``import stiefel`` and ``stiefel --help`` do not pay for torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = (
    "atlas",
    "checkpoint",
    "data",
    "diagnose",
    "generate",
    "init",
    "linalg",
    "merge",
    "nn",
    "numerics",
    "optim",
    "papers",
    "regularize",
    "theory",
)

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return import_module(f"stiefel.{name}")
    raise AttributeError(f"module 'stiefel' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
