"""What the tensor-product solvers check before they work: every error names argument and axis."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

DIRICHLET, NEUMANN, PERIODIC = "dirichlet", "neumann", "periodic"
ENDS = (DIRICHLET, NEUMANN)
# Conditions at both ends of one axis; the mixed ones name the lower end first.
CONDITIONS = (
    DIRICHLET,
    NEUMANN,
    PERIODIC,
    f"{DIRICHLET}-{NEUMANN}",
    f"{NEUMANN}-{DIRICHLET}",
)
# |A - Aᴴ| above this part of max |A| is not symmetric.
SYMMETRY_TOLERANCE = 1e-10
FIELD_TYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)


class SingularOperatorError(ValueError):
    """The operator has no inverse, or hardly one: a shift that meets an eigenvalue."""


class IncompatibleDataError(ValueError):
    """A singular problem whose data admit no solution: pure Neumann or periodic, mean not zero."""


def hidden(x: Tensor) -> bool:
    """Whether the values of ``x`` cannot be looked at: it is being compiled or vectorised."""
    return torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(x)


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for float32 and complex64, float64 for float64 and complex128."""
    return dtype.to_real() if dtype.is_complex else dtype


def check_dtype(x: Tensor, name: str) -> None:
    """Raise ``TypeError`` unless ``x`` is float32, float64, complex64 or complex128."""
    if x.dtype not in FIELD_TYPES:
        raise TypeError(
            f"{name} must be float32, float64, complex64 or complex128, got {x.dtype}; "
            "use .double() or .float()"
        )


def check_finite(x: Tensor, name: str) -> None:
    """Raise ``ValueError`` if ``x`` holds a NaN or an infinity; compiled code does not look."""
    if hidden(x):
        return
    values = x.detach()
    # One number is enough to see that all is well, and takes no memory; a sum that overflows
    # only leads to the look at every entry.
    if bool(values.sum().isfinite()):
        return
    bad = ~values.isfinite()
    if bool(bad.any()):
        first = tuple(int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"{name} must be finite, but {int(bad.sum())} of its {values.numel()} entries are "
            f"NaN or infinite, the first at index {first}"
        )


def check_sizes(U: Tensor, sizes: Sequence[int], name: str = "U") -> None:
    """Raise ``ValueError`` unless ``U`` ends in axes of these sizes; names the first that is off.

    Axis 0 is the first axis of the grid; axes before it are a batch.
    """
    d = len(sizes)
    if U.ndim < d:
        raise ValueError(
            f"{name} must have at least {d} axes for a grid of shape {tuple(sizes)}, got shape "
            f"{tuple(U.shape)}"
        )
    for axis, size in enumerate(sizes):
        found = U.shape[U.ndim - d + axis]
        if found != size:
            raise ValueError(
                f"{name} must have {size} points along grid axis {axis} (the grid is "
                f"{tuple(sizes)}), got {found} in shape {tuple(U.shape)}"
            )
    if U.numel() == 0:
        raise ValueError(f"{name} is empty: shape {tuple(U.shape)}")


def check_field(U: Tensor, sizes: Sequence[int], name: str = "U") -> None:
    """Raise unless ``U`` is a finite field ``(*batch, *sizes)`` of a type that is worked in."""
    check_dtype(U, name)
    check_sizes(U, sizes, name)
    check_finite(U, name)


def check_matrix(A: Tensor, name: str, *, square: bool = False) -> None:
    """Raise unless ``A`` is one finite matrix ``(m, n)`` that is not empty."""
    check_dtype(A, name)
    if A.ndim != 2 or 0 in A.shape:
        raise ValueError(
            f"{name} must be a matrix (m, n) and not empty, got shape {tuple(A.shape)}"
        )
    if square and A.shape[0] != A.shape[1]:
        raise ValueError(f"{name} must be square (n, n), got shape {tuple(A.shape)}")
    check_finite(A, name)


def check_positive(value: Any, name: str) -> float:
    """``value`` as a float.

    Raises:
        ValueError: not a finite number above zero.
        TypeError: not a number.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a positive number, got {value!r}") from None
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")
    return number


def check_count(n: Any, name: str, least: int = 1) -> int:
    """``n`` as an int.

    Raises:
        ValueError: fewer than ``least``.
        TypeError: not an integer.
    """
    try:
        number = operator.index(n)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {n!r}") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def check_axis(axis: Any, ndim: int, name: str = "axis") -> int:
    """``axis`` counted from the front.

    Raises:
        IndexError: outside ``-ndim`` to ``ndim - 1``.
        TypeError: not an integer.
    """
    try:
        number = operator.index(axis)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {axis!r}") from None
    if not -ndim <= number < ndim:
        raise IndexError(f"{name} must be in {-ndim}..{ndim - 1}, got {number}")
    return number % ndim


def check_choice(value: Any, name: str, allowed: Sequence[Any]) -> Any:
    """``value`` itself.

    Raises:
        ValueError: none of ``allowed``.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def check_bc(bc: Any, name: str = "bc") -> tuple[str, str]:
    """The conditions at the lower and the upper end: ``"dirichlet-neumann"`` gives both.

    Raises:
        ValueError: not one of :data:`CONDITIONS`.
    """
    check_choice(bc, name, CONDITIONS)
    lower, _, upper = bc.partition("-")
    return lower, upper or lower


def per_axis(value: Any, d: int, name: str) -> list[Any]:
    """One entry per grid axis: a single value serves all, a list must have ``d``.

    Raises:
        ValueError: a list of another length.
    """
    if isinstance(value, list) or (isinstance(value, tuple) and not is_scheme(value)):
        if len(value) != d:
            raise ValueError(
                f"{name} must be one value or one per axis ({d}), got {len(value)}: {value!r}"
            )
        return list(value)
    return [value] * d


def is_scheme(value: Any) -> bool:
    """Whether a tuple is one scheme with its parameter, as ``("bspline", 3)``."""
    return len(value) == 2 and isinstance(value[0], str) and not isinstance(value[1], (str, tuple))


def is_symmetric(A: Tensor) -> bool:
    """Whether |A - Aᴴ| is within rounding of max |A|; float32 has its own rounding."""
    tolerance = max(SYMMETRY_TOLERANCE, 8 * torch.finfo(A.dtype).eps)
    values = A.detach()
    return bool((values - values.mH).abs().max() <= tolerance * values.abs().max())


def check_symmetric(A: Tensor, name: str) -> None:
    """Raise ``ValueError`` unless ``A`` is symmetric up to rounding; names the worst entry."""
    if is_symmetric(A):
        return
    difference = (A.detach() - A.detach().mH).abs()
    i, j = divmod(int(difference.argmax()), A.shape[1])
    raise ValueError(
        f"{name} must be symmetric, but entries ({i}, {j}) and ({j}, {i}) differ by "
        f"{float(difference[i, j]):.1e}"
    )
