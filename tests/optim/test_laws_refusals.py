"""Laws of refusal: what cannot be used is named, and nothing has changed then."""

import copy
import warnings

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from law_table import (
    CLASSES,
    ROWS,
    assert_all_close,
    every_row,
    everything,
    flat,
    model,
    noise,
    one_each,
    parameters,
    rows_with,
    same,
    set_gradients,
    train,
    values,
)
from torch import nn

from stiefel.optim import ARO, RMNP, ROOT, AuON, DCTAdamW, HybridAuON, Muon, NorMuon, Trion

# (settings, the part of the message that says what is wrong); for every class.
BAD = (
    ({"maximize": True}, "only minimizes: maximize must be False"),
    ({"lr": -1.0}, "lr must be finite and ≥ 0, got -1.0"),
    ({"lr": float("nan")}, "lr must be finite"),
    ({"lr": float("inf")}, "lr must be finite"),
    ({"lr": torch.tensor([1e-3, 1e-3])}, "Tensor lr must be 1-element"),
    ({"weight_decay": -0.1}, "weight_decay must be finite and ≥ 0"),
    ({"nonfinite": "ignore"}, "nonfinite must be one of"),
    ({"adamw_lr": -1.0}, "lr must be finite and ≥ 0"),
    ({"adamw_betas": (0.9, 1.0)}, r"betas must be in \[0, 1\)"),
    ({"adamw_betas": (0.9,)}, "betas must be two numbers"),
    ({"adamw_eps": -1.0}, "eps must be finite"),
    ({"adamw_weight_decay": -1.0}, "weight_decay must be finite"),
)
NS = (
    ({"ns": "newton"}, "ns must be one of classic, polar_express, fitted, fast"),
    ({"ns": [(1.0, 2.0)]}, "must be a triple"),
    ({"ns": []}, "at least one triple"),
    ({"ns": [(float("nan"), 0.0, 0.0)]}, "finite"),
    ({"ns": [(3.4445, -4.775, 2.0315)] * 3 + [(9.0, 0.0, 0.0)]}, "singular value σ₀"),
    ({"ns_dtype": torch.float16}, "ns_dtype must be bfloat16, float32, float64 or None"),
    ({"ns_dtype": torch.int32}, "ns_dtype must be"),
)
EPS = (({"eps": -1e-8}, "eps must be finite and ≥ 0"),)
SCALE = (({"scale": "muon"}, "scale must be one of"),)
MOMENTUM = (
    ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
    ({"momentum": -0.1}, r"momentum must be in \[0, 1\)"),
    ({"momentum": float("nan")}, r"momentum must be in \[0, 1\)"),
)
BETAS = (
    ({"betas": (1.0, 0.9)}, r"betas must be in \[0, 1\)"),
    ({"betas": (0.9, -0.1)}, r"betas must be in \[0, 1\)"),
    ({"betas": (0.9,)}, "betas must be two numbers"),
)
NS_STEPS = (({"ns_steps": 0}, "ns_steps must be"),)
GAMMA = (
    ({"gamma": 0.0}, r"gamma must be in \(0, 10\]"),
    ({"gamma": 11.0}, r"gamma must be in \(0, 10\]"),
)
SELECTION = (
    ({"rank": 0}, "rank must be"),
    ({"rank": 1.5}, "rank must be"),
    ({"norm": 3}, r"norm must be one of \(1, 2\)"),
    ({"side": "rows"}, "side must be one of"),
    ({"basis": "dct4"}, "basis must be"),
    ({"method": "fast"}, "method must be one of"),
    ({"method": "fft", "basis": torch.eye}, "method='fft' needs basis"),
)
OWN = {
    Muon: (*EPS, *SCALE, *NS, *MOMENTUM, ({"rescale": "preserve"}, "rescale must be one of")),
    NorMuon: (
        *EPS,
        *SCALE,
        *NS,
        *BETAS,
        ({"rescale": None}, "rescale must be one of"),
        ({"reduce": "columns"}, "reduce must be one of"),
        ({"rescale": "rms", "scale": "spectral"}, "no effect with rescale='rms'"),
    ),
    RMNP: (*EPS, *SCALE, *MOMENTUM, ({"scale": "dion"}, "scale must be one of")),
    ROOT: (
        *MOMENTUM,
        *NS_STEPS,
        ({"quantile": 0.0}, r"quantile must be in \(0, 1\]"),
        ({"quantile": 1.1}, r"quantile must be in \(0, 1\]"),
        ({"quantile_mode": "median"}, "quantile_mode must be one of"),
        ({"coefficients": "newton"}, "coefficients must be one of"),
        ({"coefficients": [(1.0, 2.0)]}, "must be a triple"),
        ({"coefficients": {(4, 2): (3.4, -4.7, 2.0)}}, r"must be \(min, max\)"),
        ({"ns_dtype": torch.float16}, "ns_dtype must be"),
    ),
    AuON: (*MOMENTUM, *GAMMA, ({"variant": "normalized"}, "variant must be one of")),
    HybridAuON: (
        *MOMENTUM,
        *GAMMA,
        *NS_STEPS,
        ({"variant": "hybrid"}, "variant must be one of"),
        ({"ns_dtype": torch.float16}, "ns_dtype must be"),
    ),
    ARO: (
        ({"beta": 1.0}, r"beta must be in \[0, 1\)"),
        ({"beta2": -0.1}, r"beta2 must be in \[0, 1\)"),
        ({"base": "rows"}, "base must be one of"),
        ({"rotation": "qr"}, "rotation must be one of"),
        ({"qr": "cholesky"}, "qr must be one of"),
        ({"orient": "short"}, "orient must be one of"),
        ({"sinkhorn_mode": "both"}, "sinkhorn_mode must be one of"),
        ({"sinkhorn_iters": 0}, "sinkhorn_iters must be a whole number"),
        ({"rotation_every": 0}, "rotation_every must be a whole number"),
        ({"rms": -1.0}, "rms must be finite and ≥ 0"),
        ({"product_dtype": torch.float16}, "product_dtype must be one of"),
        ({"share": "model"}, "share must be None"),
    ),
    Trion: (*EPS, *SCALE, *NS, *MOMENTUM, *NS_STEPS, *SELECTION),
    DCTAdamW: (
        *EPS,
        *BETAS,
        *SELECTION,
        ({"update_gap": 0}, "update_gap must be at least 1"),
        ({"error_feedback": 16}, "error_feedback must be one of"),
        ({"correct_new_columns": True, "rotate": False}, "needs rotate=True"),
    ),
}
assert tuple(OWN) == CLASSES
CASES = [
    pytest.param(cls, kwargs, message, id=f"{cls.__name__}-{i}-{'-'.join(kwargs)}")
    for cls in OWN
    for i, (kwargs, message) in enumerate((*BAD, *OWN[cls]))
]


@pytest.mark.parametrize(("cls", "kwargs", "message"), CASES)
def test_bad_settings(cls, kwargs, message):
    # Tests check annotations too, and a wrong type is refused by them first.
    with pytest.raises((ValueError, TypeCheckError), match=f"{message}|Type-check error"):
        cls(model(), **kwargs)


@pytest.mark.parametrize(("cls", "kwargs", "message"), CASES)
def test_bad_settings_of_one_group(cls, kwargs, message):
    """A group that is refused is not there afterwards."""
    optimizer = cls(model())
    before = everything(optimizer)
    rule = "matrix"
    if any(key.startswith("adamw_") for key in kwargs):
        rule, kwargs = "elementwise", {k.removeprefix("adamw_"): v for k, v in kwargs.items()}
    if "maximize" in kwargs:
        message = "maximize must be False"
    group = {"params": parameters(((4, 2),)), "rule": rule, **kwargs}
    with pytest.raises(ValueError, match=message if "ns" not in kwargs else None):
        optimizer.add_param_group(group)
    assert same(before, everything(optimizer))
    assert len(optimizer.param_groups) == 2


def test_weak_coefficients_warn():
    with pytest.warns(UserWarning, match="weak Newton–Schulz coefficients"):
        Muon(parameters(), ns=[(1.5, -0.5, 0.0)])


@pytest.mark.parametrize("row", [r for r in ROWS if r.polynomial], ids=lambda row: row.name)
def test_coefficients_may_come_as_lists_or_arrays(row):
    triples = ((3.4445, -4.775, 2.0315),) * 5
    kinds = (triples, [list(t) for t in triples], np.array(triples))
    twins = [row(model(), **{row.polynomial: ns}) for ns in kinds]
    for optimizer in twins:
        train(optimizer, 2)
        assert all(group[row.polynomial] == triples for group in optimizer.param_groups)
        assert same(values(optimizer), values(twins[0]))


@one_each
def test_parameters_that_are_no_matrices_are_named(row):
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    with pytest.raises(ValueError, match=r"'0\.bias' has shape \(4,\), which is no matrix"):
        row(net.named_parameters())
    with pytest.raises(ValueError, match="parameter 1 of group 0 has shape"):
        row(net.parameters())
    for view, shape in (("batch", (3, 4)), ("batch", (2, 3, 4, 5)), ("transpose", (2, 3, 4))):
        with pytest.raises(ValueError, match=rf"no matrix \(view='{view}'\)"):
            row([{"params": parameters((shape,)), "view": view}])
    with pytest.raises(ValueError, match="view must be one of"):
        row([{"params": parameters(), "view": "rows"}])
    with pytest.raises(ValueError, match="rule must be 'matrix' or 'elementwise', got 'adamw'"):
        row([{"params": parameters(), "rule": "adamw"}])
    with pytest.raises(ValueError, match="6 rows, not divisible into 4 equal blocks"):
        row([{"params": parameters(((6, 4),)), "blocks": 4}])
    with pytest.raises(ValueError, match=r"blocks \(4, 1\) add up to 5"):
        row([{"params": parameters(((6, 4),)), "blocks": (4, 1)}])
    for dtype in (torch.complex64, torch.int64):
        weight = nn.Parameter(torch.ones(3, 2, dtype=dtype), requires_grad=False)
        with pytest.raises(ValueError, match=f"must be real floating point, got {dtype}"):
            row([weight])
    torn = nn.Parameter(noise((4, 3, 2, 5), 0)[..., :3])
    with pytest.raises(ValueError, match="cannot be seen as a matrix without a copy"):
        row([torn])


def spoil(optimizer, kind):
    """Give the last parameter of the matrix group a gradient that no rule can use."""
    p = optimizer.param_groups[0]["params"][-1]
    if kind == "sparse":
        p.grad = torch.eye(5, dtype=p.dtype).to_sparse()
    elif kind == "complex":
        p.grad = None
        p.grad_dtype = None
        p.grad = torch.zeros(5, 5, dtype=torch.complex128)
    else:
        p.grad[0, 0] = float(kind)
    return p


@rows_with("kind", ("sparse", "complex"))
def test_sparse_and_complex_gradients(row, kind):
    optimizer = row(model())
    train(optimizer, 1)
    set_gradients(flat(optimizer), 1)
    spoil(optimizer, kind)
    before = everything(optimizer)
    with pytest.raises(RuntimeError, match=f"does not support {kind} gradients"):
        optimizer.step()
    assert same(before, everything(optimizer))


@one_each
def test_sparse_gradients_of_embeddings_and_complex_vectors(row):
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    odd = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    odd.grad = torch.ones_like(odd)
    for parameter, message in ((table.weight, "sparse"), (odd, "complex")):
        groups = [*model(), {"params": [parameter], "rule": "elementwise"}]
        optimizer = row(groups)
        set_gradients(flat(optimizer)[:-1], 0)
        before = everything(optimizer)
        with pytest.raises(RuntimeError, match=f"{message} gradients.*parameter 0 of group 2"):
            optimizer.step()
        assert same(before, everything(optimizer))
        assert not optimizer.state


@rows_with("value", ("nan", "inf", "-inf"))
def test_nonfinite_raises_before_anything_changes(row, value):
    optimizer = row(model())
    train(optimizer, 1)
    set_gradients(flat(optimizer), 1)
    spoil(optimizer, value)
    before = everything(optimizer)
    with pytest.raises(FloatingPointError, match="NaN or Inf in the gradient of parameter 3 of"):
        optimizer.step()
    assert same(before, everything(optimizer))


@rows_with("value", ("nan", "inf"))
def test_nonfinite_skip_skips_that_parameter(row, value):
    optimizer, twin = row(model(), nonfinite="skip"), row(model())
    for each in (optimizer, twin):
        train(each, 1)
        set_gradients(flat(each), 1)
    bad = spoil(optimizer, value)
    twin.param_groups[0]["params"][-1].grad = None
    state = copy.deepcopy(optimizer.state[bad])
    with pytest.warns(RuntimeWarning, match="parameter 3 of group 0: skipped"):
        optimizer.step()
    twin.step()
    assert_all_close(values(optimizer), values(twin))
    assert same(state, optimizer.state[bad])
    train(optimizer, 1, start=2)
    assert all(torch.isfinite(p).all() for p in flat(optimizer))


@one_each
def test_nonfinite_of_elementwise_parameters(row):
    for choice, error in (("raise", FloatingPointError), ("skip", None)):
        optimizer = row(model(), nonfinite=choice)
        set_gradients(flat(optimizer), 0)
        vector = optimizer.param_groups[1]["params"][0]
        vector.grad[1] = float("nan")
        before = everything(optimizer)
        if error:
            with pytest.raises(error, match="parameter 0 of group 1"):
                optimizer.step()
            assert same(before, everything(optimizer))
        else:
            old = vector.detach().clone()
            with pytest.warns(RuntimeWarning, match="parameter 0 of group 1: skipped"):
                optimizer.step()
            assert torch.equal(vector, old)
            assert vector not in optimizer.state


@every_row
def test_nonfinite_propagate_spoils_that_parameter_alone(row):
    optimizer = row(model(), nonfinite="propagate")
    set_gradients(flat(optimizer), 0)
    bad = spoil(optimizer, "nan")
    optimizer.step()
    for p in flat(optimizer):
        assert bool(torch.isfinite(p).all()) == (p is not bad)
    assert bad.isnan().any()


@every_row
@pytest.mark.parametrize("size", [1e25, 1e30])
def test_gradients_whose_squares_overflow_are_finite(row, size):
    optimizer = row(parameters(dtype=torch.float32))
    reference = row(parameters(dtype=torch.float32))
    set_gradients(flat(optimizer), 0, scale=size)
    set_gradients(flat(reference), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    reference.step()
    before = parameters(dtype=torch.float32)
    for p, q, old in zip(flat(optimizer), flat(reference), before, strict=True):
        if row.squares:
            assert torch.isfinite(p).all()
            continue
        moved, expected = (p - old).double(), (q - old).double()
        expected *= 1 if row.bounded else size
        assert (moved - expected).norm() < 0.02 * expected.norm()


@one_each
def test_refused_groups(row):
    optimizer = row(model())
    before = everything(optimizer)
    shared = flat(optimizer)[0]
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [shared]})
    with pytest.raises(TypeError, match="param_group"):
        optimizer.add_param_group([shared])
    with pytest.raises(TypeError, match="ordered collections"):
        optimizer.add_param_group({"params": {shared}})
    with pytest.raises(ValueError, match="with/without names"):
        optimizer.add_param_group({"params": [("w", parameters(((3, 2),))[0])]})
    with pytest.raises(TypeError, match="iterable of Tensors"):
        row(shared)
    assert same(before, everything(optimizer))


@one_each
def test_groups_without_parameters_warn(row):
    with pytest.warns(UserWarning, match="no parameter is updated by the matrix rule"):
        row([{"params": [], "rule": "matrix"}, model()[1]])
    with pytest.warns(UserWarning, match="the elementwise rule got no parameter"):
        row([model()[0], {"params": [], "rule": "elementwise"}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row(model())
        row(parameters())  # nothing was said about rules: nothing is missing
