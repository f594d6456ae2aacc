"""Task vectors: what a fine-tune changed, as something to add, scale and compare.

Ilharco et al., "Editing Models with Task Arithmetic" (arXiv 2212.04089); θ0 + α Σ τ_t merges, θ0 −
α τ_t forgets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stiefel.linalg._checks import check_finite, compute_dtype

State = Mapping[str, Tensor]


class TaskVector:
    """τ = θ_finetuned − θ_base, tensor by tensor.

        merged = (tau_1 + tau_2).apply_to(base, alpha=0.5)
        forgotten = (-tau_1).apply_to(base)

    Half types are subtracted in float32, which holds the difference of two of them. Integer tensors
    and buffers are no part of it: :meth:`apply_to` leaves them as the base has them. Tensors that
    one model holds under two names count once in :meth:`dot` and :meth:`norm`.

    Args:
        base: θ0: a state dict, or a module, of which its ``state_dict()`` is taken.
        finetuned: θ_t, with the same names and shapes.

    Attributes:
        deltas: The differences by name, at least float32.

    Raises:
        ValueError: names or shapes differ (all are listed), no floating-point tensor, or NaN and
            infinities.
        TypeError: a tensor is floating point in one model and not in the other.
    """

    def __init__(self, base: State | nn.Module, finetuned: State | nn.Module) -> None:
        start, end = as_state(base), as_state(finetuned)
        _check_names(start, end, "base", "finetuned")
        # A mapping that reads at each access may give two tensors one address, one after the other.
        alive = isinstance(start, dict) and isinstance(end, dict)
        deltas: dict[str, Tensor] = {}
        known: dict[tuple[object, ...], Tensor] = {}
        for name, before in start.items():
            after = end[name]
            if before.shape != after.shape:
                raise ValueError(
                    f"{name} has shape {tuple(before.shape)} in base and {tuple(after.shape)} in "
                    "finetuned"
                )
            if before.is_floating_point() != after.is_floating_point():
                raise TypeError(f"{name} is {before.dtype} in base and {after.dtype} in finetuned")
            if not before.is_floating_point():
                continue
            key = (*_place(before), *_place(after)) if alive else (name,)
            if key not in known:
                dtype = compute_dtype(torch.promote_types(before.dtype, after.dtype))
                first = before.detach().to(dtype)
                known[key] = after.detach().to(device=before.device, dtype=dtype) - first
                if not known[key].is_meta:
                    check_finite(known[key], f"the change of {name}")
            deltas[name] = known[key]
        if not deltas:
            raise ValueError("base has no floating-point tensor")
        self.deltas = deltas

    @classmethod
    def from_deltas(cls, deltas: State) -> TaskVector:
        """A task vector of given differences, not copied.

        Raises:
            ValueError: none is given, or one holds NaN or infinities.
            TypeError: one is not floating point.
        """
        if not deltas:
            raise ValueError("deltas must hold at least one tensor")
        for name, delta in deltas.items():
            if not delta.is_floating_point():
                raise TypeError(f"deltas[{name!r}] must be real floating point, got {delta.dtype}")
            check_finite(delta, f"deltas[{name!r}]")
        return cls._of(dict(deltas))

    @classmethod
    def _of(cls, deltas: dict[str, Tensor]) -> TaskVector:
        vector = cls.__new__(cls)
        vector.deltas = deltas
        return vector

    def __repr__(self) -> str:
        count = sum(delta.numel() for delta in self._once())
        return f"TaskVector({len(self.deltas)} tensors, {count:,} numbers, norm {self.norm():.4g})"

    def __len__(self) -> int:
        return len(self.deltas)

    def __iter__(self) -> Iterator[str]:
        return iter(self.deltas)

    def __getitem__(self, name: str) -> Tensor:
        return self.deltas[name]

    def __add__(self, other: TaskVector | int) -> TaskVector:
        """τ₁ + τ₂. Adding 0 is allowed, so that ``sum(vectors)`` works."""
        if isinstance(other, int) and other == 0:
            return self
        if not isinstance(other, TaskVector):
            return NotImplemented
        return self._combine(other, torch.add)

    __radd__ = __add__

    def __sub__(self, other: TaskVector) -> TaskVector:
        """τ₁ − τ₂."""
        if not isinstance(other, TaskVector):
            return NotImplemented
        return self._combine(other, torch.sub)

    def __mul__(self, factor: float | int) -> TaskVector:
        """α τ.

        Raises:
            ValueError: α is NaN or infinite.
        """
        if isinstance(factor, TaskVector):
            return NotImplemented
        number = _finite(factor, "the factor")
        return self._map(lambda delta: delta * number)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float | int) -> TaskVector:
        """τ / n."""
        return self * (1 / divisor)

    def __neg__(self) -> TaskVector:
        """−τ: what takes the skill away."""
        return self._map(torch.neg)

    def dot(self, other: TaskVector) -> float:
        """Σ τ₁ τ₂, in float64.

        Raises:
            ValueError: the names or shapes differ.
        """
        _check_names(self.deltas, other.deltas, "the first", "the second")
        pairs = {}
        for name, mine in self.deltas.items():
            theirs = other.deltas[name]
            _check_shapes(name, mine, theirs)
            pairs[id(mine), id(theirs)] = (mine, theirs)
        return math.fsum(_dot(a, b) for a, b in pairs.values())

    def norm(self) -> float:
        """‖τ‖₂ over all tensors, in float64."""
        return math.sqrt(math.fsum(_dot(delta, delta) for delta in self._once()))

    def cosine(self, other: TaskVector) -> float:
        """τ₁·τ₂ / (‖τ₁‖ ‖τ₂‖), between −1 and 1.

        Raises:
            ValueError: the names or shapes differ, or a task vector is zero.
        """
        lengths = self.norm() * other.norm()
        if not lengths > 0:
            raise ValueError("the cosine of a task vector that is zero is not defined")
        return min(1.0, max(-1.0, self.dot(other) / lengths))

    def apply_to(self, base: State | nn.Module, alpha: float | int = 1.0) -> dict[str, Tensor]:
        """θ = base + α τ as a new state dict, in the base's dtypes; the base stays as it is.

        Computed in float32 at least and rounded once. Tensors that τ does not have are the base's
        own, not copies. ``model.load_state_dict`` or ``torch.func.functional_call`` takes it.

        Raises:
            ValueError: the base lacks a name or has another shape, or α is NaN or infinite.
        """
        result = dict(as_state(base))
        alpha = _finite(alpha, "alpha")
        lost = sorted(set(self.deltas) - set(result))
        if lost:
            raise ValueError(f"base has no {', '.join(lost)}, which the task vector changes")
        known: dict[tuple[object, ...], Tensor] = {}
        starts = dict(result)
        for name, delta in self.deltas.items():
            start = starts[name]
            if start.shape != delta.shape:
                raise ValueError(
                    f"{name} has shape {tuple(start.shape)} in base and {tuple(delta.shape)} in "
                    "the task vector"
                )
            key = (*_place(start), id(delta))
            if key not in known:
                dtype = torch.promote_types(compute_dtype(start.dtype), delta.dtype)
                moved = start.detach().to(dtype).add(delta.to(start.device, dtype), alpha=alpha)
                known[key] = moved.to(start.dtype)
            result[name] = known[key]
        return result

    def _once(self) -> list[Tensor]:
        """The differences without those that stand under a second name."""
        return list({id(delta): delta for delta in self.deltas.values()}.values())

    def _map(self, f: Callable[[Tensor], Tensor]) -> TaskVector:
        made = {id(delta): f(delta) for delta in self._once()}
        return self._of({name: made[id(delta)] for name, delta in self.deltas.items()})

    def _combine(self, other: TaskVector, f: Callable[[Tensor, Tensor], Tensor]) -> TaskVector:
        _check_names(self.deltas, other.deltas, "the first", "the second")
        made: dict[tuple[int, int], Tensor] = {}
        result = {}
        for name, mine in self.deltas.items():
            theirs = other.deltas[name]
            _check_shapes(name, mine, theirs)
            key = (id(mine), id(theirs))
            if key not in made:
                made[key] = f(mine, theirs.to(mine.device))
            result[name] = made[key]
        return self._of(result)


def as_state(model: State | nn.Module) -> State:
    """The tensors of a model by name."""
    return model.state_dict() if isinstance(model, nn.Module) else model


def _place(tensor: Tensor) -> tuple[object, ...]:
    """What two names of one tensor have in common."""
    if tensor.is_meta or hasattr(tensor, "placements") or not tensor.numel():
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _check_shapes(name: str, first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape:
        raise ValueError(
            f"{name} has shape {tuple(first.shape)} in one and {tuple(second.shape)} in the other"
        )


def _dot(a: Tensor, b: Tensor) -> float:
    product: Any = (a.double() * b.to(a.device).double()).sum()
    return float(product.full_tensor() if hasattr(product, "placements") else product)


def _finite(value: float | int, name: str) -> float:
    value = float(value)
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return value


def _check_names(first: State, second: State, first_name: str, second_name: str) -> None:
    """Raise ``ValueError`` with all names that only one has."""
    only = [
        f"only {owner} has {', '.join(names[:8])}{f' and {len(names) - 8} more' * (len(names) > 8)}"
        for owner, names in (
            (first_name, sorted(set(first) - set(second))),
            (second_name, sorted(set(second) - set(first))),
        )
        if names
    ]
    if only:
        raise ValueError("the tensors must have the same names: " + "; ".join(only))
