"""Files of this home: one safetensors file each, settings as JSON in its header. No pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from stiefel.storage import write_bytes

# Changes with what the files hold.
FORMAT = 1


def save(path: Path, kind: str, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write atomically: a reader, or a crash, sees the old file or the new one, whole.

    Raises:
        OSError: it cannot be written.
        TypeError, ValueError: settings that JSON has no word for.
    """
    from safetensors.torch import save as to_bytes

    text = json.dumps({"kind": kind, "format": FORMAT, **settings}, allow_nan=False)
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    write_bytes(path, to_bytes(plain, metadata={"stiefel.generate": text}))


def load(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors of a file that :func:`save` wrote.

    Raises:
        FileNotFoundError: there is none.
        ValueError: damaged, not one of ours, of another kind or of a newer format.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("stiefel.generate")
            if text is None:
                raise ValueError(f"{path} is not a file of stiefel.generate")
            settings = json.loads(text)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(settings, dict) or settings.get("kind") != kind:
        found = settings.get("kind") if isinstance(settings, dict) else settings
        raise ValueError(f"{path} holds {found!r}, not a {kind}")
    if settings.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {settings.get('format')!r}; this version reads {FORMAT}"
        )
    return settings, tensors
