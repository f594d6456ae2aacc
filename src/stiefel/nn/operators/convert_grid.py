"""Where a converted network is being evaluated: the grid against the one it was trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import Tensor, nn

from stiefel.nn.operators.checks import check_weights, values_known
from stiefel.nn.operators.resample import resample

ATTRIBUTE = "_stiefel_grid"
"""Under which every converted layer, and the network, holds the :class:`Grid` they share."""


@dataclass(frozen=True)
class Place:
    """One evaluation: grid sizes over base sizes, axis by axis, and quadrature weights if given."""

    ratio: tuple[Fraction, ...]
    weights: Tensor | None = None
    """``[N]`` or ``[batch, N]``, points in the order of the flattened grid."""

    @property
    def is_base(self) -> bool:
        """Whether this is the grid of the training."""
        return all(r == 1 for r in self.ratio)


class Grid:
    """Settings of one conversion, and where it is being evaluated right now.

    The ratio is one number per axis for the whole network: below a layer of stride 2 both the base
    grid and the current one are halved.

    Args:
        base_shape: Grid of the training.
        periodic: Points j/N; otherwise the grid holds both end points.
        interpolation: ``"hat"`` or ``"official"``.
        mode: Of :func:`resample`, for layers that count points.
    """

    def __init__(
        self, base_shape: tuple[int, ...], periodic: bool, interpolation: str, mode: str
    ) -> None:
        self.base_shape, self.periodic = base_shape, periodic
        self.interpolation, self.mode = interpolation, mode
        # None while the arguments of a call are looked at: what fails there is left as well.
        self._places: list[Place | None] = []

    @property
    def here(self) -> Place:
        """The current evaluation.

        Raises:
            RuntimeError: a converted layer was called on its own.
        """
        place = self.current
        if place is None:
            raise RuntimeError(
                "a converted layer was called outside of its network, so the grid is not known; "
                "call the module that convert returned, or convert the layer by itself"
            )
        return place

    @property
    def current(self) -> Place | None:
        """As :attr:`here`; None outside of the network."""
        return self._places[-1] if self._places else None

    def ratio(self, shape: tuple[int, ...]) -> tuple[Fraction, ...]:
        """``shape`` over the base grid, counted in cells where the end points belong to the grid.

        Raises:
            ValueError: a single point where the grid has two ends.
        """
        if self.periodic:
            return tuple(Fraction(n, m) for n, m in zip(shape, self.base_shape, strict=True))
        if min(shape) < 2:
            raise ValueError(f"a grid with both end points has at least 2 per axis, got {shape}")
        return tuple(Fraction(n - 1, m - 1) for n, m in zip(shape, self.base_shape, strict=True))

    def scale(self, shape: tuple[int, ...], name: str, *, up: bool) -> tuple[int, ...]:
        """Sizes of the base grid of this level on the current grid (``up``), or the other way.

        Raises:
            ValueError: not a whole number of points; says at which layer.
        """
        ends = 0 if self.periodic else 1
        found = []
        for n, r in zip(shape, self.here.ratio, strict=True):
            size = (n - ends) * (r if up else 1 / r) + ends
            if size.denominator != 1 or size < 1:
                what = "output" if up else "input"
                raise ValueError(
                    f"layer {name!r}: {shape} points of its {what} at the training grid's level "
                    f"and ratio {_ratios(self.here.ratio)} do not match in whole points; use grid "
                    f"sizes that its strides divide, whole multiples of {self.base_shape} for sure"
                )
            found.append(int(size))
        return tuple(found)

    def to_base(self, x: Tensor, name: str) -> Tensor:
        """``x`` ``[batch, channels, *grid]`` on the base grid of its level."""
        shape = self.scale(tuple(x.shape[2:]), name, up=False)
        return resample(x, shape, self.mode, periodic=self.periodic)

    def from_base(self, x: Tensor, name: str) -> Tensor:
        """The way back."""
        shape = self.scale(tuple(x.shape[2:]), name, up=True)
        return resample(x, shape, self.mode, periodic=self.periodic)

    def check_uniform(self, name: str) -> None:
        """Raise ``ValueError`` where weights say that the points are no uniform grid."""
        weights = self.here.weights
        # With both end points in the grid, those weigh half.
        if weights is None or not self.periodic or not values_known(weights):
            return
        if bool((weights - weights.mean()).abs().max() > 1e-3 * weights.mean()):
            raise ValueError(
                f"layer {name!r} needs a uniform grid, but the weights of the points differ; "
                "resample the field to a uniform grid, or use KernelIntegral or attention there"
            )

    @contextmanager
    def at(self, place: Place) -> Iterator[None]:
        """Evaluate as if the network were at ``place``; for layers called one by one."""
        self._places.append(place)
        try:
            yield
        finally:
            self._places.pop()

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before the network's forward: reads the grid off its input, takes ``weights`` out."""
        kwargs = dict(kwargs)
        weights = kwargs.pop("weights", None)
        self._places.append(None)
        self._places[-1] = self.place(args, kwargs, weights)
        return args, kwargs

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """After it, also when it failed."""
        self._places.pop()

    def place(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], weights: Tensor | None
    ) -> Place:
        """The evaluation that these arguments ask for.

        Raises:
            ValueError: no argument is a field on a grid of as many axes as the base grid, or the
                weights do not fit.
        """
        ndim = len(self.base_shape)
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        for axes in (ndim + 2, ndim + 1):
            for x in tensors:
                if x.ndim == axes:
                    shape = tuple(x.shape[axes - ndim :])
                    batch = x.shape[0] if axes == ndim + 2 else None
                    return Place(self.ratio(shape), _flat_weights(weights, shape, batch))
        raise ValueError(
            f"the converted network needs a field [batch, channels, *grid] with {ndim} grid axes "
            f"as base_shape {self.base_shape} has, got shapes {[tuple(x.shape) for x in tensors]}"
        )


def _flat_weights(
    weights: Tensor | None, shape: tuple[int, ...], batch: int | None
) -> Tensor | None:
    """``[N]`` or ``[batch, N]``."""
    if weights is None:
        return None
    check_weights(weights)
    count = 1
    for n in shape:
        count *= n
    allowed = [(count,), shape]
    if batch is not None:
        allowed += [(batch, count), (batch, *shape)]
    given = tuple(weights.shape)
    if given not in allowed:
        raise ValueError(
            "weights must have one entry per point, shape "
            f"{' or '.join(map(str, dict.fromkeys(allowed)))}, got {given}"
        )
    return weights.reshape(count) if given in allowed[:2] else weights.reshape(-1, count)


def _ratios(ratio: tuple[Fraction, ...]) -> str:
    return " × ".join(str(r) for r in ratio)
