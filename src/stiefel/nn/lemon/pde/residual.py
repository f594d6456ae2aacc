"""Whether data satisfy their formula: its terms by spectral and finite differences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.nn.lemon.expression import Expression, Name, evaluate, prefix, terms
from stiefel.nn.lemon.formula import parse
from stiefel.nn.lemon.pde.grid import all_modes
from stiefel.nn.lemon.pde.split import SPACE_DERIVATIVES
from stiefel.nn.lemon.tokenizer import VARIABLES

# Central differences of order six over seven times.
_FIRST = (-1 / 60, 3 / 20, -3 / 4, 0.0, 3 / 4, -3 / 20, 1 / 60)
_SECOND = (1 / 90, -3 / 20, 3 / 2, -49 / 18, 3 / 2, -3 / 20, 1 / 90)


def residual(
    formula: str | Expression | Sequence[str | Expression],
    u: Float[Tensor, "n times points"],
    t: Float[Tensor, " times"],
    x: Float[Tensor, " points"],
) -> Float[Tensor, " n"]:
    """‖Σ terms‖ over the norm of the largest term, one number per sample; 0 for a solution.

    Space derivatives by Fourier (u must be periodic), time derivatives by central differences of
    order six, so the first and last three times are left out. Use float64 and times close enough.

    Args:
        formula: One for all samples or one each.
        u: Solutions.
        t: Equidistant times, at least 7.
        x: Points.

    Raises:
        KeyError, ValueError: no formula; fewer than 7 times; as many formulas as samples or one.
    """
    if len(t) < 7:
        raise ValueError(f"t must hold at least 7 times, got {len(t)}")
    each = [formula] if isinstance(formula, str | Expression) else list(formula)
    if len(each) not in (1, len(u)):
        raise ValueError(f"formula must be one or {len(u)} formulas, got {len(each)}")
    trees = [parse(f, VARIABLES) if isinstance(f, str) else f for f in each]
    values = _derivatives(u, float(t[1] - t[0]), trees) | {"x": x}
    return torch.cat(
        [
            _relative(tree, {k: v if k == "x" else v[i : i + 1] for k, v in values.items()})
            for i, tree in enumerate(trees)
        ]
        if len(trees) > 1
        else [_relative(trees[0], values)]
    )


def _relative(tree: Expression, values: dict[str, Tensor]) -> Tensor:
    """The sum of the terms against the largest of them."""
    parts = [sign * evaluate(term, values) for sign, term in terms(tree)]
    parts = [p.expand_as(values["u"]) for p in parts]
    largest = torch.stack([torch.linalg.vector_norm(p, dim=(1, 2)) for p in parts]).amax(0)
    total = torch.linalg.vector_norm(torch.stack(parts).sum(0), dim=(1, 2))
    return total / largest.clamp_min(1e-300)


def _derivatives(u: Tensor, dt: float | int, trees: Sequence[Expression]) -> dict[str, Tensor]:
    used = {e.name for tree in trees for e in prefix(tree) if isinstance(e, Name)}
    inner = u[:, 3:-3]
    spectrum, k = all_modes(inner)
    fields = {
        name: torch.fft.irfft((1j * k) ** m * spectrum, n=u.shape[-1]) if m else inner
        for name, m in SPACE_DERIVATIVES.items()
        if name in used or name == "u"
    }
    for name, weights, order in (("ut", _FIRST, 1), ("utt", _SECOND, 2)):
        if name in used:
            windows = u.unfold(1, 7, 1)
            stencil = torch.tensor(weights, dtype=u.dtype, device=u.device)
            fields[name] = windows @ stencil / dt**order
    return fields
