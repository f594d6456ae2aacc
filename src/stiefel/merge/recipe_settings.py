"""Values of a recipe that change over the layers and over the names of tensors.

A setting is a scalar, a list (a gradient over the layers), ``{value, filter}``, or a list of such
rules, of which the first that matches counts. Where the same parameter is set in several places,
the innermost place that has an answer for this tensor counts: the source of a slice or the entry
of a model, then the slice, then the whole recipe. The meaning is mergekit's, so that its recipes
give what they gave.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from stiefel.merge.recipe_errors import nearest, shown

Scalar = bool | int | float | str


@dataclass(frozen=True)
class Rule:
    """A value, or a gradient, for the tensors whose name contains ``filter``."""

    value: Scalar | tuple[Scalar, ...]
    filter: str | None = None

    def matches(self, tensor: str) -> bool:
        """Whether the rule is for this tensor: a substring decides, ``*`` or none is for all."""
        return self.filter is None or self.filter == "*" or self.filter in tensor


Setting = tuple[Rule, ...]
Settings = Mapping[str, Setting]


@dataclass(frozen=True)
class Parameter:
    """What a method knows about one of its parameters."""

    name: str
    kind: type
    """``float``, ``bool`` or ``str``."""
    default: Scalar | None = None
    required: bool = False
    each: bool = False
    """Set for each model; otherwise one value serves the whole merge."""
    allowed: tuple[str, ...] = ()
    """Of a ``str``: the values there are."""
    at_least: float | int = -math.inf
    at_most: float | int = math.inf
    above: float | int = -math.inf
    """The value must be larger than this."""
    only: bool | None = None
    """Of a ``bool``: the value that is offered."""
    help: str = ""

    def check(self, value: Any) -> Scalar:
        """``value`` as this parameter's type.

        Raises:
            ValueError: another type, NaN, out of range, or none of the allowed words; the message
                says what came and what is allowed.
        """
        if self.kind is bool:
            if isinstance(value, bool) and self.only in (None, value):
                return value
            if self.only is not None:
                raise ValueError(
                    f"only {str(self.only).lower()} is offered here, got {shown(value)}"
                )
            raise ValueError(f"must be true or false, got {shown(value)}")
        if self.kind is str:
            if isinstance(value, str) and value in self.allowed:
                return value
            close = nearest(value, self.allowed) if isinstance(value, str) else ""
            raise ValueError(f"must be {' | '.join(self.allowed)}, got {shown(value)}{close}")
        return self._number(value)

    def _number(self, value: Any) -> float:
        number = math.nan
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                number = float(value)  # YAML reads 1e-3, without a point, as a word
            except (ValueError, OverflowError):
                number = math.nan
        inside = self.at_least <= number <= self.at_most and number > self.above
        if not math.isfinite(number) or not inside:
            raise ValueError(f"must be {self._range()}, got {shown(value)}")
        return number

    def _range(self) -> str:
        low = "" if self.at_least == -math.inf else f"at least {self.at_least:g}"
        low = low if self.above == -math.inf else f"above {self.above:g}"
        high = "" if self.at_most == math.inf else f"at most {self.at_most:g}"
        said = " and ".join(part for part in (low, high) if part)
        return f"a number {said}" if said else "a finite number"


def parse_setting(parameter: Parameter, raw: Any) -> Setting:
    """The setting that a recipe writes as ``raw``, every value in it checked.

    Raises:
        ValueError: not a scalar, list, ``{value, filter}`` or list of those; an empty list; or a
            value that ``parameter`` does not take.
    """
    if isinstance(raw, dict):
        return (_rule(parameter, raw),)
    if isinstance(raw, list) and any(isinstance(item, dict) for item in raw):
        if not all(isinstance(item, dict) for item in raw):
            raise ValueError("mixes {value, filter} with bare values: write all as {value, filter}")
        return tuple(_rule(parameter, item) for item in raw)
    return (Rule(_value(parameter, raw)),)


def _rule(parameter: Parameter, raw: dict[str, Any]) -> Rule:
    unknown = [key for key in raw if key not in ("value", "filter")]
    if unknown:
        close = nearest(unknown[0], ("value", "filter"))
        raise ValueError(f"unknown key {unknown[0]!r} in a rule of value and filter{close}")
    if "value" not in raw:
        raise ValueError("a rule needs a value")
    chosen = raw.get("filter")
    if chosen is not None and not isinstance(chosen, str):
        raise ValueError(f"filter must be a part of tensor names, got {shown(chosen)}")
    return Rule(_value(parameter, raw["value"]), chosen)


def _value(parameter: Parameter, raw: Any) -> Scalar | tuple[Scalar, ...]:
    if not isinstance(raw, list):
        return parameter.check(raw)
    if not raw:
        raise ValueError("an empty list has no value")
    return tuple(parameter.check(item) for item in raw)


def at_layer(value: Scalar | tuple[Scalar, ...], t: float | int) -> Scalar:
    """The value at the relative depth ``t`` in [0, 1].

    Numbers of a list are anchors at equal distances, with straight lines between them; of Booleans
    and words, the one at ⌊t (n - 1)⌋ counts.
    """
    if not isinstance(value, tuple):
        return value
    place = t * (len(value) - 1)
    low = int(place)
    first = value[low]
    if isinstance(first, (bool, str)):
        return first
    second = value[min(low + 1, len(value) - 1)]
    fraction = place - low
    return (1 - fraction) * first + fraction * second  # type: ignore[operator]


def resolve(
    parameter: Parameter, places: Iterable[Settings], tensor: str, t: float | int
) -> Scalar | None:
    """What ``parameter`` is for one tensor.

    Args:
        parameter: which one.
        places: where it may be set, innermost first.
        tensor: name of the tensor, for the filters.
        t: relative depth of its layer, from 0 to 1; 0 outside the layers.

    Returns:
        The value of the first place with a rule for this tensor, else the default.

    Raises:
        LookupError: it is required and no place has a rule for this tensor.
    """
    for settings in places:
        for rule in settings.get(parameter.name, ()):
            if rule.matches(tensor):
                return at_layer(rule.value, t)
    if parameter.required:
        raise LookupError(parameter.name)
    return parameter.default
