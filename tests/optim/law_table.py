"""The table of the law tests: every matrix optimizer, every setting that takes its own path.

A new method is a new row. The laws stand in ``test_laws*.py``, each parametrized over ``ROWS``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stiefel.linalg import as_table
from stiefel.optim import ARO, RMNP, ROOT, AuON, DCTAdamW, HybridAuON, Muon, NorMuon, Trion
from stiefel.optim.base import MatrixOptimizer

TRIPLES = as_table("fast").triples  # what a user of explicit coefficients would pass


@dataclass(frozen=True)
class Row:
    name: str
    cls: type[MatrixOptimizer]
    kwargs: dict[str, Any] = field(default_factory=dict)
    scale_free: bool = True
    """Whether scaling all gradients changes nothing: published ε stop that."""
    bounded: bool = True
    """Whether updates keep their size when gradients grow, ε apart."""
    squares: bool = False
    """Whether squares of gradients are kept, which overflow as AdamW's do."""
    basis: bool = False
    """Whether a transform is kept for all matrices of one width, in no optimizer's state."""
    turns: bool = False
    """Whether right multiplication by an orthogonal matrix goes through a step."""
    products: bool = True
    """Whether it takes matrix products, so that ``ns_dtype`` exists."""
    polynomial: str | None = "ns"
    """The setting that holds the coefficients of these products."""
    momentum: str = "momentum"
    """The setting that holds the decay rates."""
    first: str = "momentum_buffer"
    """The state that every updated matrix has."""
    running_mean: bool = True
    """Whether that is the running mean of the gradients."""
    extra: tuple[str, ...] = ()
    """Further state."""
    per_neuron: bool = True
    """Whether further state is one number for each neuron."""
    wide: tuple[str, ...] = ()
    """State that is never below float32."""
    exact: tuple[str, ...] = ()
    """State that is no number of the parameter's kind: indices, codes."""
    scratch_side: int = 128
    """Side of matrices so large that scratch memory is full with forty of them."""

    def __call__(self, params: Any, **overrides: Any) -> MatrixOptimizer:
        return self.cls(params, **{"lr": 0.02, **self.kwargs, **overrides})

    def kept(self, key: str, value: Tensor, dtype: torch.dtype) -> torch.dtype:
        """The dtype that state ``key``, now ``value``, has for a parameter of ``dtype``."""
        if key == "step":
            return torch.float32
        if key in self.exact:
            return value.dtype
        return max_float32(dtype) if key in self.wide else dtype

    @property
    def cycles(self) -> dict[str, bool]:
        """What OneCycleLR must be told: it knows ``momentum`` and ``betas`` alone."""
        return {"cycle_momentum": self.momentum in ("momentum", "betas")}


def max_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def muon(name: str, **kwargs: Any) -> Row:
    free = kwargs.get("ns", "fitted") not in ("classic", "polar_express")
    return Row(f"muon-{name}", Muon, kwargs, scale_free=free, turns=True)


def normuon(name: str, **kwargs: Any) -> Row:
    free = kwargs.get("ns", "fitted") not in ("classic", "polar_express")
    kept = ("second_moment", "row_age") if "bias_correction" in kwargs else ("second_moment",)
    return Row(
        f"normuon-{name}",
        NorMuon,
        kwargs,
        scale_free=free,
        turns=True,
        momentum="betas",
        extra=kept,
        per_neuron="reduce" not in kwargs,
        wide=kept,
    )


def rmnp(name: str, **kwargs: Any) -> Row:
    return Row(
        f"rmnp-{name}", RMNP, kwargs, turns=True, products=False, polynomial=None, scratch_side=16
    )


def root(name: str, **kwargs: Any) -> Row:
    free = kwargs.get("coefficients") != "classic"
    return Row(f"root-{name}", ROOT, kwargs, scale_free=free, polynomial="coefficients")


def auon(name: str, **kwargs: Any) -> Row:
    literal = kwargs.get("variant") == "code"  # momentum SGD, but for the cosh mean
    return Row(
        f"auon-{name}",
        AuON,
        kwargs,
        scale_free=not literal,
        bounded=not literal,
        products=False,
        polynomial=None,
        scratch_side=16,
    )


def hybrid(name: str, **kwargs: Any) -> Row:
    return Row(f"hybrid-{name}", HybridAuON, kwargs, polynomial=None)


def aro(name: str, **kwargs: Any) -> Row:
    wide = () if kwargs.get("rotation") == "identity" else ("rotation",)
    if kwargs.get("base") == "adam":
        wide += ("root_second_moment",)
    return Row(
        f"aro-{name}",
        ARO,
        kwargs,
        products=False,
        polynomial=None,
        momentum="beta",
        extra=("step", *wide),
        per_neuron=False,
        wide=wide,
    )


def trion(name: str, **kwargs: Any) -> Row:
    return Row(
        f"trion-{name}",
        Trion,
        kwargs,
        scale_free=kwargs.get("ns") != "classic",
        basis=True,
        first="momentum_dct",
        running_mean=False,
        per_neuron=False,
    )


def dct(name: str, **kwargs: Any) -> Row:
    feedback = kwargs.get("error_feedback")
    counts = ("column_steps",) if "correct_new_columns" in kwargs else ()
    codes = ("error_codes",) if feedback in (8, 4) else ()
    ranges = ("error_range",) if codes else ()
    error = ("error",) if feedback == "full" else ()
    return Row(
        f"dct-{name}",
        DCTAdamW,
        kwargs,
        scale_free=False,
        squares=True,
        basis=True,
        products=False,
        polynomial=None,
        momentum="betas",
        first="columns",
        running_mean=False,
        extra=("step", "low_avg", "low_avg_sq", *counts, *error, *codes, *ranges),
        per_neuron=False,
        wide=("low_avg_sq", *ranges),
        exact=("columns", *counts, *codes),
    )


# The first row of each class stands for it where one is enough.
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
    root("exact"),
    root("sampled-triple", quantile_mode="sampled", coefficients="triple", nesterov=False),
    root("classic", coefficients="classic", quantile=0.7),
    auon("paper"),
    auon("code", variant="code", gamma=1.5, nesterov=False),
    hybrid("normalized"),
    hybrid("paper", variant="paper", nesterov=False),
    hybrid("code", variant="code", gamma=1.5),
    aro("sinkhorn", weight_decay=0.1),
    aro("row-scqr", base="row", qr="scqr"),
    aro("sign", base="sign"),
    aro("adam", base="adam", beta2=0.9),
    aro("simultaneous-rarely", sinkhorn_mode="simultaneous", rotation_every=2),
    aro("identity", rotation="identity"),
    aro("eigen", rotation="eigen"),
    aro("polar-one-by-one", rotation="polar", foreach=False),
    aro("unscaled", rms=None),
    trion("spectral", rank=0.6),
    trion("paper-dct3", rank=0.75, ns="classic", norm=2, basis="dct3"),
    trion("kimi-right", rank=0.75, scale="kimi", side="right", ns="fast", weight_decay=0.1),
    trion("dion-fft", rank=0.6, method="fft", foreach=False, scale="dion"),
    dct("plain", rank=0.5),
    dct("full-rarely", rank=0.5, error_feedback="full", update_gap=2, weight_decay=0.1),
    dct("8-bit-corrected", rank=0.5, error_feedback=8, correct_new_columns=True),
    dct("4-bit-fft", rank=0.75, error_feedback=4, rotate=False, norm=2, method="fft"),
)
CLASSES = tuple(dict.fromkeys(row.cls for row in ROWS))
ONE_EACH = tuple(next(r for r in ROWS if r.cls is cls) for cls in CLASSES)
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
one_each = pytest.mark.parametrize("row", ONE_EACH, ids=lambda row: row.name)


def rows_with(names: str, *axes: Sequence[Any], rows: Sequence[Row] = ROWS) -> Any:
    """A row of each class with every combination of ``axes``, other rows with one each, in turn.

    For settings that the common machinery reads, whatever the method.
    """
    cases = list(product(*axes))
    chosen = [
        pytest.param(row, *case, id="-".join([row.name, *map(str, case)]))
        for i, row in enumerate(rows)
        for case in (cases if row in ONE_EACH else [cases[i % len(cases)]])
    ]
    return pytest.mark.parametrize(("row", *names.split()), chosen)


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


def assert_all_close(
    actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12
) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
