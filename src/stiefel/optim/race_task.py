"""What is raced on: a small byte GPT on any text, or whatever a factory makes."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stiefel.optim.small_gpt import GPT, GPTSize, next_token_loss, windows

# The share of every file (or of the bytes of all files) that is trained on.
TRAIN_SHARE = 0.9
# Validation windows of each half: those that choose rates and those that are reported.
WINDOWS = 64
SPLITS = ("position", "file")

CONTRACT = (
    "make(seed) must return (model, batches, loss): model an nn.Module; batches a dict with "
    '"train", a sequence of batches (taken in order, round and round) or a function of the step, '
    'and "validation", a sequence of at least two batches; loss(model, batch) a scalar tensor'
)


class FactoryError(RuntimeError):
    """What a factory of models, or the loss it returned, raised: see ``__cause__``."""


@dataclass
class Task:
    """A model to train and what it is trained and judged on."""

    model: nn.Module
    train: Callable[[int], Any]
    """The batch of a step, counted from 0."""
    select: Sequence[Any]
    """Validation batches that choose rates."""
    report: Sequence[Any]
    """Validation batches whose mean loss is reported."""
    loss: Callable[[nn.Module, Any], Any]
    name: str = "the byte GPT"

    def loss_of(self, batch: Any) -> Tensor:
        """Loss of the model on a batch, a tensor of one number.

        Raises:
            TypeError: it is something else.
        """
        loss = self.loss(self.model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = (
                f"tensor of shape {tuple(loss.shape)}"
                if isinstance(loss, Tensor)
                else type(loss).__name__
            )
            raise TypeError(f"{self.name}: the loss of a batch is a {what}. {CONTRACT}")
        return loss

    def mean_loss(self, batches: Sequence[Any]) -> float:
        """Mean over batches, in evaluation mode and without gradients."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                return math.fsum(float(self.loss_of(b)) for b in batches) / len(batches)
        finally:
            self.model.train(training)

    def try_out(self) -> None:
        """Take the loss of one training batch and one validation batch.

        Raises:
            TypeError: a loss is no scalar tensor, or does not depend on the weights.
            FactoryError: the model, the batches or the loss raised something.
        """
        try:
            loss = self.loss(self.model, self.train(0))
            self.loss(self.model, self.report[0])
        except Exception as error:
            raise FactoryError(f"{self.name}: the loss of a batch raised {error!r}") from error
        if not self.loss_of(self.train(0)).requires_grad:
            raise TypeError(f"{self.name}: the loss {loss!r} has no gradient. {CONTRACT}")


def text_settings(
    files: Sequence[str | Path], split: str = "position", batch: int = 16, **size: int
) -> dict[str, Any]:
    """Everything that defines a race on text, JSON-able; the files are read and checked.

    Args:
        files: UTF-8 text files.
        split: ``"position"``: the last tenth of every file is for validation; ``"file"``: whole
            files from the end of the list, until they hold a tenth of the bytes.
        batch: Windows per step.
        size: Of :class:`GPTSize`: ``width``, ``blocks``, ``heads``, ``context``.

    Raises:
        ValueError: no file, one named twice, text that is empty, not UTF-8 or too short for the
            context, an unknown split, one file only to split by file, sizes out of range.
        OSError: a file cannot be read.
    """
    gpt = GPTSize(**size)
    numbers = {**asdict(gpt), "batch": batch}
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if gpt.width % gpt.heads:
        raise ValueError(f"width must be a multiple of heads, got {gpt.width} and {gpt.heads}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    names = [str(file) for file in files]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"text must be different files, at least one; got {names}")
    if split == "file" and len(names) < 2:
        raise ValueError("split='file' needs at least two files, got one; use split='position'")
    train, validation, digest = _read(tuple(names), split)
    length = gpt.context + 1
    for part, data, least in (("train on", train, length), ("validate on", validation, 2 * length)):
        if len(data) < least:
            raise ValueError(
                f"the text leaves {len(data)} bytes to {part}, a context of {gpt.context} needs "
                f"{least}: give more text or a context shorter than {gpt.context}"
            )
    return {"text": names, "split": split, "sha256": digest, **numbers}


def factory_settings(make: str | Callable[[int], Any]) -> dict[str, Any]:
    """Everything that defines a race on what a factory makes, JSON-able.

    Raises:
        ValueError: not ``module:name``, or nothing callable there; the message says why.
    """
    if isinstance(make, str):
        factory(make)
        return {"factory": make}
    name = getattr(make, "__qualname__", type(make).__name__)
    return {"factory": f"{getattr(make, '__module__', '?')}:{name}"}


def factory(name: str) -> Callable[[int], Any]:
    """Import the factory that ``module:name`` stands for.

    Raises:
        ValueError: it cannot be imported, is not callable or cannot take one argument.
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ValueError(f"a model is named as module:function, got {name!r}")
    try:
        make = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot load {name!r}: {error}") from error
    if not callable(make):
        raise ValueError(f"{name!r} is a {type(make).__name__}, not a function. {CONTRACT}")
    try:
        inspect.signature(make).bind(0)
    except TypeError as error:
        raise ValueError(f"{name!r} cannot be called with a seed: {error}. {CONTRACT}") from None
    return make


def build(settings: Mapping[str, Any], seed: int, steps: int, make: Any = None) -> Task:
    """The task of one run: the same for every contestant that is given the same seed.

    Args:
        settings: From :func:`text_settings` or :func:`factory_settings`.
        seed: Of weights and batches.
        steps: Length of the run.
        make: The factory itself, where its name is not enough.

    Raises:
        ValueError: a text file has changed since the settings were made.
        TypeError: the factory returned something else than agreed.
        FactoryError: it raised something.
    """
    if "factory" in settings:
        make = make or factory(settings["factory"])
        try:
            made = make(seed)
        except Exception as error:
            raise FactoryError(f"{settings['factory']} raised {error!r}") from error
        return _checked(made, settings["factory"])
    size = GPTSize(*(settings[k] for k in ("width", "blocks", "heads", "context", "vocabulary")))
    train, validation, digest = _read(tuple(settings["text"]), settings["split"])
    if digest != settings["sha256"]:
        raise ValueError(f"the text has changed during the race: {', '.join(settings['text'])}")
    length, batch = size.context + 1, settings["batch"]
    generator = torch.Generator().manual_seed(1_000_000 + seed)
    starts = torch.randint(len(train) - length + 1, (steps, batch), generator=generator)
    # Never overlapping: every other window chooses rates, those between are reported.
    half = min(WINDOWS, len(validation) // (2 * length))
    if half > batch:
        half -= half % batch  # equal batches, so that the mean of their means is the mean
    spread = torch.linspace(0, len(validation) - length, 2 * half).long().tolist()
    report, select = (
        windows(validation, spread[offset::2], length).split(batch) for offset in (0, 1)
    )

    def rows(step: int) -> Tensor:
        return windows(train, starts[step].tolist(), length)

    return Task(GPT(size, seed), rows, select, report, next_token_loss)


def _checked(made: Any, name: str) -> Task:
    def refuse(what: str) -> TypeError:
        return TypeError(f"{name}: {what}. {CONTRACT}")

    if not isinstance(made, tuple) or len(made) != 3:
        count = f" of {len(made)}" if isinstance(made, tuple) else ""
        raise refuse(f"it returned a {type(made).__name__}{count}")
    model, batches, loss = made
    if not isinstance(model, nn.Module):
        raise refuse(f"the model is a {type(model).__name__}")
    if not isinstance(batches, Mapping) or not {"train", "validation"} <= set(batches):
        got = sorted(map(str, batches)) if isinstance(batches, Mapping) else type(batches).__name__
        raise refuse(f"the batches are {got}")
    train, validation = batches["train"], batches["validation"]
    if not isinstance(validation, Sequence | Tensor) or len(validation) < 2:
        raise refuse(f'"validation" is {_outline(validation)}')
    if not callable(train) and not (isinstance(train, Sequence | Tensor) and len(train)):
        raise refuse(f'"train" is {_outline(train)}')
    if not callable(loss):
        raise refuse(f"the loss is a {type(loss).__name__}")
    take = train if callable(train) else lambda step: train[step % len(train)]
    select, report = ([validation[i] for i in range(k, len(validation), 2)] for k in (1, 0))
    return Task(model, take, select, report, loss, name)


def _outline(value: Any) -> str:
    count = f" of length {len(value)}" if hasattr(value, "__len__") else ""
    return f"a {type(value).__name__}{count}"


def _read(names: tuple[str, ...], split: str) -> tuple[Tensor, Tensor, str]:
    """Training bytes, validation bytes and a checksum of both."""
    stamps = tuple((s.st_mtime_ns, s.st_size) for s in (Path(name).stat() for name in names))
    return _read_once(names, split, stamps)


@lru_cache(maxsize=4)
def _read_once(
    names: tuple[str, ...], split: str, _stamps: tuple[tuple[int, int], ...]
) -> tuple[Tensor, Tensor, str]:
    pieces = [_text(name) for name in names]
    if split == "position":
        cuts = [int(TRAIN_SHARE * len(piece)) for piece in pieces]
    else:
        wanted, cuts = (1 - TRAIN_SHARE) * sum(map(len, pieces)), [len(p) for p in pieces]
        held = 0
        for i in range(len(pieces) - 1, 0, -1):  # the first file always stays for training
            if held >= wanted:
                break
            held += len(pieces[i])
            cuts[i] = 0
    train = b"".join(piece[:cut] for piece, cut in zip(pieces, cuts, strict=True))
    validation = b"".join(piece[cut:] for piece, cut in zip(pieces, cuts, strict=True))
    digest = hashlib.sha256(train + b"\0" + validation).hexdigest()
    return _tokens(train), _tokens(validation), digest


def _tokens(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0).byte()


def _text(name: str) -> bytes:
    data = Path(name).read_bytes()
    if not data:
        raise ValueError(f"{name} is empty")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}"
        ) from None
    if b"\0" in data:
        raise ValueError(f"{name} is not text: byte {data.index(0)} is zero")
    return data
