"""Shrink and perturb on state dicts and on checkpoint files, without a module."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stiefel.init.shrink_perturb_noise import blend_

SHRINK, PERTURB = 0.4, 0.1
"""Defaults of the authors' code."""
# What normalisation layers call their statistics: in a state dict only the name tells.
STATISTICS = ("*running_mean", "*running_var", "*num_batches_tracked")


def check_mixture(shrink: float | int, perturb: float | int) -> None:
    """Raise ``ValueError`` unless 0 ≤ shrink ≤ 1 and perturb is finite and not negative."""
    if not 0 <= float(shrink) <= 1:  # NaN fails as well
        raise ValueError(f"shrink must be in [0, 1], got {shrink}")
    if not (math.isfinite(perturb) and perturb >= 0):
        raise ValueError(f"perturb must be finite and ≥ 0, got {perturb}")


def check_same_entries(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` at the first name or shape in which ``fresh`` differs."""
    for name, tensor in ours.items():
        if name not in theirs:
            raise ValueError(f"fresh has no {name}")
        if theirs[name].shape != tensor.shape:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} but {tuple(theirs[name].shape)} in fresh"
            )
    extra = [name for name in theirs if name not in ours]
    if extra:
        raise ValueError(f"fresh has {extra[0]}, which is not there to be mixed")


@torch.no_grad()
def shrink_perturb(
    state_dict: Mapping[str, Tensor],
    fresh_state_dict: Mapping[str, Tensor],
    shrink: float | int = SHRINK,
    perturb: float | int = PERTURB,
    *,
    buffers: Iterable[str] = STATISTICS,
) -> dict[str, Tensor]:
    """shrink · old + perturb · fresh of two state dicts, as a new dict.

    Entries whose names match ``buffers`` (glob patterns; by default the statistics of torch's
    normalisation layers) and all that is not floating point are taken from ``fresh_state_dict``,
    except at (1, 0), where all is old. Entries that share memory are mixed once and share it
    again. Nothing that comes in is changed or aliased.

    Args:
        state_dict: Of the trained network.
        fresh_state_dict: Of a new one; the same names and shapes.
        shrink: λ, in [0, 1].
        perturb: Factor of the fresh values.
        buffers: Names or patterns of entries that are no parameters.

    Raises:
        ValueError: factors out of range, or names or shapes that differ (the first is named).

    Source: arXiv 1910.08475, section 4, in the form of the authors' code.
    """
    check_mixture(shrink, perturb)
    check_same_entries(state_dict, fresh_state_dict)
    patterns = [buffers] if isinstance(buffers, str) else list(buffers)
    made: dict[tuple[Any, ...], Tensor] = {}
    result: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if place not in made or not tensor.data_ptr():
            learnt = tensor.is_floating_point() or tensor.is_complex()
            if (shrink, perturb) == (1, 0):
                made[place] = tensor.detach().clone()
            elif not learnt or any(fnmatchcase(name, pattern) for pattern in patterns):
                made[place] = fresh_state_dict[name].detach().to(tensor, copy=True)
            else:
                made[place] = mixed(tensor, fresh_state_dict[name], shrink, perturb)
        result[name] = made[place]
    return result


def mixed(old: Tensor, fresh: Tensor, shrink: float | int, perturb: float | int) -> Tensor:
    """shrink · old + perturb · fresh as a new tensor of the old one's type and device."""
    out = old.detach().clone()
    blend_(out, fresh.detach().to(out.device), shrink, perturb)
    return out


@torch.no_grad()
def shrink_perturb_file(
    source: str | Path,
    fresh: str | Path,
    target: str | Path,
    shrink: float | int = SHRINK,
    perturb: float | int = PERTURB,
    *,
    buffers: Iterable[str] = STATISTICS,
) -> None:
    """:func:`shrink_perturb` from two safetensors files into a third, one tensor at a time.

    For models larger than memory: call it for each shard. ``target`` has the header of
    ``source`` (names, types, order, metadata) and appears only when it is complete.

    Args:
        source, fresh: Checkpoint of the trained and of a new network; the same names and shapes.
        target: Written; may be ``source``, which is then replaced.
        shrink, perturb, buffers: As in :func:`shrink_perturb`.

    Raises:
        ValueError: factors out of range, names or shapes that differ (the first is named), or a
            file that is no safetensors file.
        OSError: a file cannot be read or written.
    """
    from safetensors import SafetensorError, safe_open  # here: importing this home stays cheap

    check_mixture(shrink, perturb)
    target = Path(target)
    part = target.with_name(target.name + ".part")
    patterns = [buffers] if isinstance(buffers, str) else list(buffers)
    try:
        # safe_open has looked through both headers when the raw one is copied.
        with safe_open(source, "pt") as old, safe_open(fresh, "pt") as new, part.open("wb") as out:
            prefix, entries = _header(source)
            _check_headers(entries, new)
            out.write(prefix)
            for name in sorted(entries, key=lambda name: entries[name]["data_offsets"]):
                pair = ({name: old.get_tensor(name)}, {name: new.get_tensor(name)})
                one = shrink_perturb(*pair, shrink, perturb, buffers=patterns)[name]
                out.write(one.contiguous().view(-1).view(torch.uint8).numpy().data)
            out.flush()
            os.fsync(out.fileno())
        part.replace(target)
    except SafetensorError as error:
        raise ValueError(f"{source} or {fresh} is no safetensors file: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def _header(path: str | Path) -> tuple[bytes, dict[str, Any]]:
    """The bytes before the numbers of a valid file, and what they say of each tensor."""
    with open(path, "rb") as file:
        length = file.read(8)
        header = file.read(struct.unpack("<Q", length)[0])
    entries = json.loads(header)
    entries.pop("__metadata__", None)
    return length + header, entries


def _check_headers(entries: Mapping[str, Any], new: Any) -> None:
    """As :func:`check_same_entries`, from what the files say of their tensors."""
    names = set(new.keys())
    ours = {name: torch.empty(entry["shape"], device="meta") for name, entry in entries.items()}
    theirs = {
        name: torch.empty(new.get_slice(name).get_shape(), device="meta") for name in sorted(names)
    }
    check_same_entries(ours, theirs)
