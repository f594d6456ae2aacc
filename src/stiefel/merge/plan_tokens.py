"""Vocabularies: which row of one model's embedding stands for which token of another's.

Two fine-tunes of one base often differ by a few added tokens, or by rows of padding. Rows are then
matched token by token. A token that a model lacks has the base's row there, so that the model
changes nothing about it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
    "chat_template.json", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
# What decides which token has which number.
_DECIDING = (
    "tokenizer.json", "vocab.json", "vocab.txt", "added_tokens.json", "tokenizer.model",
    "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
_MOST_BYTES = 100_000_000
_MOST_TOKENS = 10_000_000


class VocabularyError(ValueError):
    """A tokenizer's file that is damaged, or tokenizers that cannot be brought together."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of one model."""

    folder: Path
    ids: Mapping[str, int]
    """Token → number."""
    added: tuple[Mapping[str, Any], ...] = ()
    """Entries of ``added_tokens`` in tokenizer.json."""


def same_files(first: Path, second: Path) -> bool | None:
    """Whether two folders have the same tokenizer, byte for byte; None: one has no tokenizer."""
    if first == second:
        return True
    sets = [[n for n in _DECIDING if (folder / n).is_file()] for folder in (first, second)]
    if not all(sets):
        return None
    if sets[0] != sets[1]:
        return False
    return all(_bytes(first / name) == _bytes(second / name) for name in sets[0])


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """Tokens of the tokenizer in ``folder``; None where no file can be read without its library.

    Read are tokenizer.json, else vocab.json or vocab.txt with added_tokens.json. A lone
    tokenizer.model (sentencepiece) is None.

    Raises:
        VocabularyError: a file is damaged.
    """
    if (folder / "tokenizer.json").is_file():
        content = _json(folder / "tokenizer.json")
        model = content.get("model")
        ids = _ids(model.get("vocab") if isinstance(model, dict) else None, folder)
        added = content.get("added_tokens") or []
        if not isinstance(added, list) or not all(_is_added(entry) for entry in added):
            raise VocabularyError(f"{folder / 'tokenizer.json'}: added_tokens is damaged")
        ids |= {entry["content"]: entry["id"] for entry in added}
        return Vocabulary(folder, ids, tuple(added))
    if (folder / "vocab.json").is_file():
        ids = _ids(_json(folder / "vocab.json"), folder)
    elif (folder / "vocab.txt").is_file():
        lines = _bytes(folder / "vocab.txt").decode("utf-8", "replace").splitlines()
        ids = {token: number for number, token in enumerate(lines)}
    else:
        return None
    if (folder / "added_tokens.json").is_file():
        ids |= _ids(_json(folder / "added_tokens.json"), folder)
    return Vocabulary(folder, ids)


def rows_for(target: Vocabulary, own: Vocabulary, rows: int, own_rows: int) -> Tensor | None:
    """Which row of ``own`` stands for each row of ``target``.

    Args:
        target, own: the vocabularies.
        rows, own_rows: rows of their embeddings; padding may make them longer than the vocabulary.

    Returns:
        int64 ``[rows]``: a row of ``own``, or -1 where it lacks the token or the row is padding;
        None where row i is row i.
    """
    index = torch.full((rows,), -1, dtype=torch.int64)
    named = torch.zeros(rows, dtype=torch.bool)
    for token, number in target.ids.items():
        if 0 <= number < rows:
            named[number] = True
            there = own.ids.get(token, -1)
            if 0 <= there < own_rows:
                index[number] = there
    place = torch.arange(rows)
    if own_rows == rows:  # padding of equal length stays where it is
        index = torch.where(named, index, place)
    return None if own_rows == rows and bool((index == place).all()) else index


def rows_by_place(rows: int, own_rows: int) -> Tensor | None:
    """As :func:`rows_for`, of equal tokenizers: only the padding differs."""
    if rows == own_rows:
        return None
    place = torch.arange(rows)
    return torch.where(place < own_rows, place, -1)


def union(base: Vocabulary, others: Sequence[Vocabulary]) -> tuple[Vocabulary, str | None]:
    """The base's vocabulary with the added tokens of all others behind it.

    Returns:
        The vocabulary, and the text of its tokenizer.json; None if nothing was added.

    Raises:
        VocabularyError: the vocabularies proper (not the added tokens) differ, so that no order of
            tokens serves both; or the base has no tokenizer.json.
    """
    file = base.folder / "tokenizer.json"
    if not file.is_file():
        raise VocabularyError(f"union needs a tokenizer.json, and {base.folder} has none")
    ids, added = dict(base.ids), list(base.added)
    free = max(ids.values(), default=-1) + 1
    for other in others:
        extra = {entry["content"]: entry for entry in other.added}
        foreign = [token for token in other.ids if token not in ids and token not in extra]
        if foreign:
            raise VocabularyError(
                f"union brings added tokens together, but {len(foreign)} tokens of "
                f"{other.folder} belong to another vocabulary (the first: {foreign[0]!r})"
            )
        for token, entry in extra.items():
            if token not in ids:
                ids[token] = free
                added.append({**entry, "id": free})
                free += 1
    if len(added) == len(base.added):
        return base, None
    content = copy.deepcopy(_json(file))
    content["added_tokens"] = added
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    return Vocabulary(base.folder, ids, tuple(added)), text


def _bytes(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise VocabularyError(f"{path} has {size} bytes, at most {_MOST_BYTES} are read")
        return path.read_bytes()
    except OSError as error:
        raise VocabularyError(f"{path} cannot be read: {error.strerror}") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_bytes(path).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise VocabularyError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise VocabularyError(f"{path} must hold an object, got {type(content).__name__}")
    return content


def _ids(raw: Any, folder: Path) -> dict[str, int]:
    """Token → number, from a mapping, or a list of [token, score] in the order of the numbers."""
    if isinstance(raw, list):
        raw = {item[0]: i for i, item in enumerate(raw) if isinstance(item, list) and item}
    if not isinstance(raw, dict) or not all(_is_id(number) for number in raw.values()):
        raise VocabularyError(f"the tokenizer in {folder} has no readable vocabulary")
    return raw


def _is_added(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("content"), str)
        and _is_id(entry.get("id"))
    )


def _is_id(number: Any) -> bool:
    return type(number) is int and 0 <= number < _MOST_TOKENS
