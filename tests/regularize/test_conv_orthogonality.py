import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from stiefel.linalg import polar
from stiefel.nn import OrthogonalConv2d, lorth, lorth_sigma_bounds, orthogonal_conv
from stiefel.regularize import LayerReport, OrthogonalityPenalty


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, padding_mode="circular"),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 6, 3, 2, groups=2), nn.ConvTranspose2d(6, 2, 3, stride=2)),
        nn.Conv2d(2, 8, 3, dilation=2),
        nn.Flatten(),
        nn.Linear(12, 5),
    )


def by_hand(model):
    """Layer after layer, the dense one from its own formula."""
    w = model[5].weight
    return (
        lorth(model[0].weight)
        + lorth(model[2][0].weight, 2, groups=2)
        + lorth(model[2][1].weight, 2)
        + lorth(model[3].weight)
        + (w @ w.T - torch.eye(5)).square().sum()
    )


def test_the_sum_over_layers():
    model = net()
    penalty = OrthogonalityPenalty(model, lam=0.3)
    torch.testing.assert_close(penalty(), 0.3 * by_hand(model))
    penalty().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    (0.3 * by_hand(model)).backward()
    others = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == len(others) == 5
    for a, b in zip(gradients, others, strict=True):
        torch.testing.assert_close(a, b)


def test_layers_of_one_shape_together():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(4, 5, 3) for _ in range(3)))
    total = sum(lorth(layer.weight) for layer in model)
    torch.testing.assert_close(OrthogonalityPenalty(model, lam=1)(), total)


def test_a_transposed_layer_is_the_transpose():
    """On a torus: output of the transposed layer, wrapped, is the adjoint of the plain one."""
    layer = nn.ConvTranspose1d(3, 2, 3, stride=2, bias=False).double()
    penalty = OrthogonalityPenalty(layer, lam=1)
    n = 6
    x = torch.eye(3 * n, dtype=torch.float64).reshape(-1, 3, n)
    with torch.no_grad():
        y = layer(x)  # length 2n + 1
        y[..., 0] += y[..., 2 * n]
        matrix = y[..., : 2 * n].flatten(1)
        off = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
        off = off - torch.eye(len(off), dtype=torch.float64)
        assert float(off.square().sum()) == pytest.approx(n * float(penalty()), rel=1e-12)


def test_what_is_chosen():
    model = net()
    every = OrthogonalityPenalty(model)
    assert list(every.layers) == ["0", "2.0", "2.1", "3", "5"]
    assert list(OrthogonalityPenalty(model, dense=False).layers) == ["0", "2.0", "2.1", "3"]
    assert list(OrthogonalityPenalty(model, include=["3", "0"]).layers) == ["0", "3"]
    some = OrthogonalityPenalty(model, include=lambda name, module: module.bias.numel() > 5)
    assert list(some.layers) == ["0", "2.0", "3"]
    with pytest.raises(ValueError, match=r"include must name .* got \['1', '9'\]"):
        OrthogonalityPenalty(model, include=["0", "1", "9"])


def test_orthogonal_layers_cost_nothing(generator):
    exact = nn.Sequential(
        OrthogonalConv2d(2, 4, 3, generator=generator),
        OrthogonalConv2d(4, 3, 3, method="cayley", generator=generator),
        orthogonal_conv(nn.Conv2d(3, 4, 3), generator=generator),
        OrthogonalConv2d(4, 3, 3, method="penalty", generator=generator),
    )
    penalty = OrthogonalityPenalty(exact)
    assert list(penalty.layers) == ["3"]
    assert float(penalty().detach()) < 1e-11
    with pytest.raises(ValueError, match="no layer"):
        OrthogonalityPenalty(exact[:3])


def test_report():
    model = net()
    with torch.no_grad():
        model[5].weight.copy_(polar(model[5].weight))
    lines = OrthogonalityPenalty(model).report()
    assert all(isinstance(line, LayerReport) for line in lines)
    assert [(line.name, line.case, line.feasible) for line in lines] == [
        ("0", "CO", True), ("2.0", "RO", True), ("2.1", "RO", True), ("3", "CO", True),
        ("5", "RO", True),
    ]  # fmt: skip
    low, high = lorth_sigma_bounds(model[0].weight.detach().double())
    assert (lines[0].sigma_low, lines[0].sigma_high) == (float(low), float(high))
    assert lines[0].value == pytest.approx(float(lorth(model[0].weight.detach())), rel=1e-5)
    assert lines[4].value < 1e-10
    assert 0.999 < lines[4].sigma_low <= 1 <= lines[4].sigma_high < 1.001


def test_training_brings_it_down():
    model = net()
    penalty = OrthogonalityPenalty(model, lam=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    before = float(penalty().detach())
    for _ in range(200):
        optimizer.zero_grad()
        loss = penalty()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 1e-3 * before


def test_layers_that_cannot_be_orthogonal():
    model = nn.Sequential(nn.Conv2d(1, 10, 3, 4), nn.Conv2d(10, 4, 3))
    with pytest.raises(ValueError, match=r"0: orthonormal rows need .* smallest L_orth is 1"):
        OrthogonalityPenalty(model)
    with pytest.warns(UserWarning, match="smallest L_orth is 1"):
        kept = OrthogonalityPenalty(model, on_infeasible="warn")
    assert list(kept.layers) == ["0", "1"]
    assert float(kept().detach()) >= 0.1
    assert [line.feasible for line in kept.report()] == [False, True]
    assert list(OrthogonalityPenalty(model, on_infeasible="skip").layers) == ["1"]
    with pytest.raises(ValueError, match="no layer"):
        OrthogonalityPenalty(model[:1], on_infeasible="skip")


def test_square_layers_are_named():
    with pytest.warns(UserWarning, match=r"M = C·∏S in 0, 2: .*local minimum"):
        OrthogonalityPenalty(
            nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv1d(2, 4, 3, 2))
        )
    # A matrix has no local minima: no warning, which would be an error here.
    OrthogonalityPenalty(nn.Sequential(nn.Linear(4, 4), nn.Conv2d(1, 4, 2, 2)))


@pytest.mark.parametrize(
    ("model", "settings", "error", "message"),
    [
        (nn.Linear(2, 3), {"lam": -1}, ValueError, "lam must be finite and at least 0, got -1"),
        (nn.Linear(2, 3), {"lam": math.nan}, ValueError, "lam must be finite"),
        (nn.Linear(2, 3), {"on_infeasible": "hope"}, ValueError, "on_infeasible must be one of"),
        (nn.ReLU(), {}, ValueError, "no layer"),
        (nn.Linear(2, 3), {"dense": False}, ValueError, "no layer"),
        (nn.Conv3d(1, 1, 3), {}, ValueError, "one or two axes"),
        (nn.Conv2d(2, 3, 3, 2, dilation=2), {}, NotImplementedError, "dilation"),
    ],
)
def test_bad_settings(model, settings, error, message):
    with pytest.raises(error, match=message):
        OrthogonalityPenalty(model, **settings)


def test_a_weight_that_is_not_finite():
    model = net()
    penalty = OrthogonalityPenalty(model)
    with torch.no_grad():
        model[2][0].weight[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"the weight of 2\.0 must be finite"):
        penalty()


def test_mixed_precision():
    model = net()
    value = float(OrthogonalityPenalty(model)().detach())
    model[0].double()
    model[3].bfloat16()
    mixed = OrthogonalityPenalty(model)()
    assert float(mixed.detach()) == pytest.approx(value, rel=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        assert float(OrthogonalityPenalty(net())().detach()) == pytest.approx(value, rel=1e-5)


def test_weights_shared_by_two_ranks(tmp_path):
    script = Path(__file__).with_name("conv_orthogonality_sharded.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for rank in ranks:
            out, errors = rank.communicate(timeout=120)
            assert rank.returncode == 0, errors[-3000:]
            assert out.strip().endswith("ok")
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
