"""The table of the law tests: every matrix optimizer, every setting that takes its own path.

A new method is a new row. The laws stand in ``test_laws*.py``, each parametrized over ``ROWS``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stiefel.linalg import as_table
from stiefel.optim import RMNP, Muon, NorMuon
from stiefel.optim.base import MatrixOptimizer

TRIPLES = as_table("fast").triples  # what a user of explicit coefficients would pass


@dataclass(frozen=True)
class Row:
    name: str
    cls: type[MatrixOptimizer]
    kwargs: dict[str, Any] = field(default_factory=dict)
    scale_free: bool = True
    """Whether scaling all gradients changes nothing: published ε stop that."""
    products: bool = True
    """Whether it takes matrix products, so that ``ns`` and ``ns_dtype`` exist."""
    momentum: str = "momentum"
    """The setting that holds the decay rates."""

    def __call__(self, params: Any, **overrides: Any) -> MatrixOptimizer:
        return self.cls(params, **{"lr": 0.02, **self.kwargs, **overrides})


def muon(name: str, **kwargs: Any) -> Row:
    free = kwargs.get("ns", "fitted") not in ("classic", "polar_express")
    return Row(f"muon-{name}", Muon, kwargs, scale_free=free)


def normuon(name: str, **kwargs: Any) -> Row:
    free = kwargs.get("ns", "fitted") not in ("classic", "polar_express")
    return Row(f"normuon-{name}", NorMuon, kwargs, scale_free=free, momentum="betas")


def rmnp(name: str, **kwargs: Any) -> Row:
    return Row(f"rmnp-{name}", RMNP, kwargs, products=False)


ROWS = (
    muon("spectral"),
    muon("rms-classic", scale="rms", ns="classic", weight_decay=0.0),
    muon("dion-plain-express", scale="dion", nesterov=False, ns="polar_express"),
    muon("rescale-fast", rescale="rms", ns="fast"),
    muon("triples", scale=None, ns=TRIPLES),
    normuon("paper"),
    normuon("official", rescale="preserve", scale="spectral", nesterov=True, ns="classic"),
    normuon("dion-fast", rescale="preserve", scale="dion", ns="fast", weight_decay=0.01),
    normuon("long-triples", reduce="long", nesterov=True, ns=TRIPLES),
    normuon("bias-correction-express", bias_correction=True, ns="polar_express"),
    rmnp("nesterov", weight_decay=0.1),
    rmnp("plain-rms", nesterov=False, scale="rms"),
)
ONE_EACH = tuple(r for r in ROWS if r.name in ("muon-spectral", "normuon-paper", "rmnp-nesterov"))
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
one_each = pytest.mark.parametrize("row", ONE_EACH, ids=lambda row: row.name)

MATRICES = ((6, 4), (6, 4), (4, 6), (5, 5))
VECTORS = ((4,), (3, 7))  # what is 2-D may be an embedding


def noise(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same numbers in every dtype, up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def parameters(
    shapes: tuple[tuple[int, ...], ...] = MATRICES,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> list[nn.Parameter]:
    return [nn.Parameter(noise(s, 100 * seed + i, dtype)) for i, s in enumerate(shapes)]


def model(dtype: torch.dtype = torch.float64) -> list[dict[str, Any]]:
    """Two groups as split_parameters makes them."""
    return [
        {"params": parameters(MATRICES, dtype), "rule": "matrix"},
        {"params": parameters(VECTORS, dtype, seed=1), "rule": "elementwise"},
    ]


def flat(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def set_gradients(params: list[Tensor], step: int, scale: float = 1.0) -> None:
    for i, p in enumerate(params):
        p.grad = torch.empty_like(p).copy_(scale * noise(tuple(p.shape), 1000 + 100 * step + i))


def train(optimizer: torch.optim.Optimizer, steps: int, start: int = 0, scale: float = 1) -> None:
    for step in range(start, start + steps):
        set_gradients(flat(optimizer), step, scale)
        optimizer.step()


def values(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p.detach().clone() for p in flat(optimizer)]


def everything(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Parameters, gradients, state and settings: what an error must not change."""
    result: list[Any] = []
    for group in optimizer.param_groups:
        result.append({k: v for k, v in group.items() if k != "params"})
        for p in group["params"]:
            grad = p.grad
            if grad is not None and grad.layout != torch.strided:
                grad = grad.to_dense()
            state = {k: v.clone() for k, v in optimizer.state.get(p, {}).items()}
            result.append((p.detach().clone(), None if grad is None else grad.clone(), state))
    return result


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit, NaN included."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and torch.equal(a.isnan(), b.isnan())
            and torch.equal(a.nan_to_num(), b.nan_to_num())
        )
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def close(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
