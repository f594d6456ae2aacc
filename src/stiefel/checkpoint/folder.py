"""Which files make up a checkpoint: one file, a folder with one, or shards with an index.

An index comes from whoever made the folder, so the names in it are not paths: a file has to lie in
the folder itself, and a symbolic link may not lead out of it.
"""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stiefel.checkpoint.errors import CheckpointError, listed, quoted
from stiefel.checkpoint.header import load_json

INDEX_SUFFIX = ".safetensors.index.json"
MAX_INDEX_BYTES = 32 * 2**20
MAX_CONFIG_BYTES = 4 * 2**20
# The shortest entry, "":"a.safetensors", has its only colon on 18 bytes.
_INDEX_BYTES_PER_BRACKET = 16
_CONFIG_BYTES_PER_BRACKET = 4
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5,6})-of-(?P<total>\d{5,6})\.safetensors")


@dataclass(frozen=True)
class Found:
    """The files of a checkpoint, and what its index says about them."""

    folder: Path
    files: tuple[Path, ...]
    index: Path | None = None
    weight_map: dict[str, str] | None = None


def find_files(path: Path) -> Found:
    """The files of the checkpoint at ``path``: a file, an index, or a folder.

    In a folder ``model.safetensors`` is preferred, as transformers does, then the only index, then
    the only safetensors file, then a complete set ``…-00001-of-00003.safetensors``.

    Raises:
        CheckpointError: nothing there, only pickles, several candidates, a damaged index.
    """
    if path.is_dir():
        return _in_folder(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if path.name.endswith(INDEX_SUFFIX):
        return _from_index(path)
    refuse_pickle(path)
    return Found(path.parent, (path,))


def refuse_pickle(path: Path) -> None:
    """Raise for a name that stands for a pickle, with what to do about it."""
    if path.suffix.lower() in _PICKLES:
        raise CheckpointError(
            f"{path} is a pickle, which can run any code when it is loaded, and is never opened "
            "here; load it where you trust it and save it as safetensors, for example with "
            "model.save_pretrained(folder)"
        )


def read_config(folder: Path) -> dict[str, Any] | None:
    """config.json of the folder; None where there is none.

    Raises:
        CheckpointError: it is not a JSON object, or absurdly large.
    """
    path = folder / "config.json"
    if not path.exists():
        return None
    return load_json(_small_file(path, MAX_CONFIG_BYTES), str(path), _CONFIG_BYTES_PER_BRACKET)


def _small_file(path: Path, most: int) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is not a regular file")
        if status.st_size > most:
            raise CheckpointError(f"{path} has {status.st_size} bytes, at most {most} are read")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def _in_folder(folder: Path) -> Found:
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be listed: {error.strerror}") from error
    if "model.safetensors" in names:
        return Found(folder, (folder / "model.safetensors",))
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    if len(indexes) == 1:
        return _from_index(folder / indexes[0])
    files = [name for name in names if name.endswith(".safetensors")]
    if not indexes and len(files) == 1:
        return Found(folder, (folder / files[0],))
    if not indexes and files:
        return Found(folder, _complete_set(folder, files))
    if indexes:
        raise CheckpointError(
            f"{folder} has several indexes ({listed(indexes)}); give the path of the one meant"
        )
    pickles = [name for name in names if Path(name).suffix.lower() in _PICKLES]
    if pickles:
        refuse_pickle(folder / pickles[0])
    raise CheckpointError(
        f"{folder} has no weights: no *.safetensors and no *{INDEX_SUFFIX}; "
        f"it holds {listed(names) if names else 'nothing'}"
    )


def _complete_set(folder: Path, names: list[str]) -> tuple[Path, ...]:
    """Shards without an index, if all of one set are there and nothing else is."""
    parts = [_SHARD.fullmatch(name) for name in names]
    sets = {(part["stem"], part["total"]) for part in parts if part}
    if len(sets) != 1 or not all(parts):
        raise CheckpointError(
            f"{folder} has several safetensors files ({listed(names)}) and no index; "
            "give the path of the one meant"
        )
    total = int(next(iter(sets))[1])
    if total != len(names):
        raise CheckpointError(
            f"{folder} has {len(names)} of {total} shards ({listed(names)}); "
            "the download is incomplete"
        )
    return tuple(folder / name for name in names)


def _from_index(index: Path) -> Found:
    content = load_json(_small_file(index, MAX_INDEX_BYTES), str(index), _INDEX_BYTES_PER_BRACKET)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} must map tensors to files under the key 'weight_map'")
    folder = index.parent
    files: dict[str, Path] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise CheckpointError(
                f"{index}: tensor {quoted(tensor)} must be mapped to a file name, "
                f"got {type(name).__name__}"
            )
        if name not in files:
            files[name] = _shard(index, folder, name)
    return Found(folder, tuple(files[name] for name in sorted(files)), index, weight_map)


def _shard(index: Path, folder: Path, name: str) -> Path:
    """The file ``name`` of the index, if it may be opened."""
    if name in ("", ".", "..") or any(sign in name for sign in "/\\\0") or not name.isprintable():
        raise CheckpointError(
            f"{index} names the file {quoted(name)}; only files in the same folder are opened"
        )
    path = folder / name
    refuse_pickle(path)
    if not name.endswith(".safetensors"):
        raise CheckpointError(f"{index} names the file {quoted(name)}, which is not *.safetensors")
    try:
        outside = leads_out(path, folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        reason = getattr(error, "strerror", None) or "a loop of links"
        raise CheckpointError(f"{index} names {quoted(name)}, which is missing: {reason}") from None
    if outside is not None:
        raise CheckpointError(
            f"{index} names {quoted(name)}, a link that leads out of the folder to {outside}; "
            "give the path of the real folder"
        )
    return path


def leads_out(path: Path, folder: Path) -> Path | None:
    """The file behind ``path`` where links lead out of ``folder``; None where they do not.

    Raises:
        OSError, RuntimeError: there is no such file, or a loop of links.
    """
    real, home = path.resolve(strict=True), folder.resolve()
    # A download cache keeps snapshots/<revision>/name as a link to blobs/<hash> of that model.
    allowed = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    return None if real.parent in allowed else real
