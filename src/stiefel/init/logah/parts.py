"""Which parameter of a graph is predicted, in what form, and how it is scaled."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stiefel.init.logah.graph import NetGraph, Node, Shape

Form = Literal["matrix", "table", "position", "gain", "offset"]


@dataclass(frozen=True)
class Part:
    """One predicted parameter."""

    name: str
    node: int
    form: Form
    """A matrix or kernel (scaled by its fan-in); a table of vectors or a grid of positions (not
    scaled); a vector that multiplies (a gain); one that is added (an offset)."""
    shape: Shape
    """Of the parameter."""
    transposed: bool = False
    """Stored with inputs before outputs."""
    vocabulary: bool = False
    """The rows have a meaning each: words, classes."""

    @property
    def decoded_shape(self) -> Shape:
        """Of what the decoder gives."""
        if self.form == "position":
            side = math.isqrt(self.shape[1])
            return (1, self.shape[2], side, side)
        if self.transposed:
            return (self.shape[1], self.shape[0], *self.shape[2:])
        return self.shape

    def fan_in(self, stored: bool = False) -> int:
        """Inputs of one output; ``stored``: as if the first axis were that of the outputs."""
        shape = self.shape if stored else self.decoded_shape
        return math.prod(shape[1:])

    @property
    def beta(self) -> int:
        """2, for ReLU; 1 where a kernel is depthwise or wider than high, as in GHN-2."""
        shape = self.decoded_shape
        if len(shape) < 3:
            return 2
        depthwise = shape[1] == 1 and shape[0] > 1 and math.prod(shape[2:]) > 1
        return 1 if depthwise or math.prod(shape[2:-1]) < shape[-1] else 2

    def place(self, decoded: Tensor) -> Tensor:
        """From what the decoder gives to the parameter's own layout."""
        if self.form == "position":
            grid = decoded.flatten(2).mT
            # Tokens before the grid (a class token) have no place in it: they stay at zero.
            return torch.cat(
                [grid.new_zeros(1, self.shape[1] - grid.shape[1], grid.shape[2]), grid], 1
            )
        return decoded.transpose(0, 1) if self.transposed else decoded


def squash(form: Form, value: Tensor) -> Tensor:
    """Gains into (0, 2), offsets into (-1, 1), as in GHN-2; others as they are."""
    if form == "gain":
        return 2 * torch.sigmoid(0.5 * value)
    return torch.tanh(0.2 * value) if form == "offset" else value


def parts(graph: NetGraph, keep_vocabulary: bool = False) -> tuple[list[Part], list[str]]:
    """What of a graph is predicted.

    Args:
        graph: The graph.
        keep_vocabulary: Leave tables of words, and heads over words or classes, at their start.

    Returns:
        The predicted parts, and the names of parameters that keep their own start.
    """
    found: list[Part] = []
    kept: list[str] = []
    for i, node in enumerate(graph.nodes):
        for part in _parts_of(graph, i, node):
            if part.form is None or (keep_vocabulary and part.vocabulary):
                kept.append(part.name)
            else:
                found.append(part)
    return found, kept


@dataclass(frozen=True)
class _Unknown:
    """A parameter without a rule."""

    name: str
    form: None = None
    vocabulary: bool = False


def _parts_of(graph: NetGraph, i: int, node: Node) -> Iterator[Part | _Unknown]:
    head = i in graph.heads
    for place, name in enumerate(node.parameters):
        shape = graph.parameter_shapes[name]
        form = _form(node.op, shape, place)
        if form is None:
            yield _Unknown(name)
            continue
        words = node.op == "embed" or (head and node.op in ("linear", "bias"))
        yield Part(name, i, form, shape, node.transposed, words)


def _form(op: str, shape: Shape, place: int) -> Form | None:
    """Form of a parameter; None if there is no rule for it."""
    ndim = len(shape)
    if 0 in shape:
        return None
    if ndim == 1:
        norm: tuple[Form, ...] = ("gain", "offset")
        gains: dict[str, tuple[Form, ...]] = {
            "ln": norm, "bn": norm, "rms_norm": norm, "scale": ("gain",), "bias": ("offset",),
        }  # fmt: skip
        forms = gains.get(op, ())
        return forms[place] if place < len(forms) else None
    if (op == "linear" and ndim == 2) or (op == "conv" and 3 <= ndim <= 5):
        return "matrix"
    if op == "embed" and ndim == 2:
        return "table"
    if op == "pos_enc":
        if ndim == 2:
            return "table"
        return "position" if ndim == 3 and shape[0] == 1 and shape[1] > 1 else None
    return None
