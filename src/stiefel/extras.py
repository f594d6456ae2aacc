"""Names of a home that need an extra: imported when they are asked for, not before."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any


def estimator(home: str, modules: Mapping[str, str], name: str) -> Any:
    """What a home's ``__getattr__`` answers: an estimator built on scikit-learn.

    Args:
        home: Name of the home, for the message.
        modules: Estimator → the module that defines it.
        name: What was asked for.

    Raises:
        AttributeError: ``name`` is not one of them.
        ImportError: scikit-learn is not installed; names the extra.
    """
    if name not in modules:
        raise AttributeError(f"module {home!r} has no attribute {name!r}")
    try:
        return getattr(import_module(modules[name]), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "sklearn":
            raise
        raise ImportError(
            f"{name} needs scikit-learn, which is not installed: pip install 'stiefel[atlas]'"
        ) from error
