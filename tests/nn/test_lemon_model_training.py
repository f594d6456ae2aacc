"""Normalisation, noise, metric, schedules and the loop of pretraining."""

import io
import itertools
import math
import types
import warnings
from contextlib import redirect_stderr

import pytest
import torch
from lemon_models import data, tiny
from torch import nn

from stiefel.nn.lemon import (
    OperatorData,
    add_noise,
    evaluate,
    normalise,
    operator_data,
    predict,
    pretrain,
    relative_l2,
)
from stiefel.nn.lemon import training as loop
from stiefel.nn.lemon import training_progress as bars
from stiefel.nn.lemon.training_data import LEAST_SCALE


def test_normalising_uses_the_input_alone():
    d = data()
    normal, mean, scale = d.normalised()
    close = torch.testing.assert_close
    close(normal.u_in.mean((1, 2, 3)), torch.zeros(12), atol=1e-5, rtol=0)
    close(normal.u_in.std((1, 2, 3), correction=0), torch.ones(12), atol=1e-5, rtol=0)
    close(mean + scale * normal.u_out, d.u_out)
    # Whatever the target is, inputs and statistics stay.
    other = OperatorData(d.u_in, d.t_in, 100 * d.u_out + 7, d.t_out, d.tokens)
    again, same_mean, same_scale = other.normalised()
    assert torch.equal(again.u_in, normal.u_in)
    assert torch.equal(same_mean, mean)
    assert torch.equal(same_scale, scale)


def test_channels_have_statistics_of_their_own():
    u = torch.randn(2, 3, 8, 2) * torch.tensor([1.0, 1e3]) + torch.tensor([0.0, 5e3])
    normal, mean, scale = normalise(u)
    assert mean.shape == scale.shape == (2, 1, 1, 2)
    assert normal.std() == pytest.approx(1, abs=0.05)


def test_inputs_without_variance_do_not_blow_up_targets():
    u = torch.full((3, 2, 4, 1), 2.0)
    u[1] = 0
    u[2] = torch.randn(2, 4, 1)
    with pytest.warns(UserWarning, match="2 of 3 inputs hardly vary"):
        normal, _, scale = normalise(u)
    assert scale[0].item() == pytest.approx(2 * LEAST_SCALE)
    assert scale[1].item() == 1
    assert normal[:2].abs().max() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        normalise(u[2:])


def test_noise_has_the_relative_size_asked_for():
    u = torch.randn(4, 3, 8, 1) * torch.tensor([1e-3, 1, 10, 1e4]).view(4, 1, 1, 1)
    g = torch.Generator().manual_seed(0)
    noisy = add_noise(u, 0.02, g)
    ratio = (noisy - u).flatten(1).norm(dim=1) / u.flatten(1).norm(dim=1)
    torch.testing.assert_close(ratio, torch.full((4,), 0.02), rtol=1e-3, atol=0)
    assert torch.equal(noisy, add_noise(u, 0.02, torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="level must be finite"):
        add_noise(u, -0.1)


def test_relative_error():
    target = torch.ones(2, 3, 4, 1)
    prediction = target.clone()
    prediction[0] = 1.5
    torch.testing.assert_close(relative_l2(prediction, target), torch.tensor([0.5, 0.0]))
    assert relative_l2(torch.ones(1, 2), torch.zeros(1, 2)).item() == pytest.approx(2**0.5 / 1e-7)
    with pytest.raises(ValueError, match="one shape"):
        relative_l2(torch.ones(1, 2), torch.ones(2, 1))


def test_splitting_trajectories():
    u = torch.arange(2 * 8 * 5.0).view(2, 8, 5)
    sample = types.SimpleNamespace(
        u=u, t=torch.arange(8) / 4, tokens=torch.tensor([[1, 2], [3, 0]])
    )
    d = operator_data(sample)
    assert torch.equal(d.u_in[..., 0], u[:, [0, 2]])
    assert torch.equal(d.u_out[..., 0], u[:, [4, 6]])
    assert d.t_out.tolist() == [[1.0, 1.5]] * 2
    d = operator_data(sample, slice(0, 1), [3, 7])
    assert d.u_in.shape == (2, 1, 5, 1)
    assert torch.equal(d.u_out[..., 0], u[:, [3, 7]])
    with pytest.raises(ValueError, match=r"t of shape \[nt\]"):
        operator_data(types.SimpleNamespace(u=u, t=torch.zeros(3), tokens=sample.tokens))
    bad = u.clone()
    bad[1, 0, 0] = float("nan")
    bad = types.SimpleNamespace(u=bad, t=sample.t, tokens=sample.tokens)
    with pytest.raises(ValueError, match="u_in must be finite, but 1 of its 2"):
        operator_data(bad)
    with pytest.raises(ValueError, match="at least one"):
        operator_data(sample, slice(0, 0))


def test_joining_and_choosing():
    a, b = data(3, length=7), data(5, length=4, seed=3)
    both = OperatorData.cat([a, b])
    assert len(both) == 8
    assert both.tokens.shape == (8, 7)
    assert (both.tokens[3:, 4:] == 0).all()
    assert torch.equal(both[4].u_in, b.u_in[1:2])
    assert torch.equal(both[-1].u_in, b.u_in[-1:])
    assert torch.equal(both[[0, 7]].u_out, torch.stack([a.u_out[0], b.u_out[4]]))
    assert both.to("cpu").tokens.shape == (8, 7)
    with pytest.raises(ValueError, match="at least one data set"):
        OperatorData.cat([])
    with pytest.raises(ValueError, match="must agree in times"):
        OperatorData.cat(
            [a, OperatorData(a.u_in, a.t_in, a.u_out[:, :2], a.t_out[:, :2], a.tokens)]
        )
    with pytest.raises(ValueError, match="length is 3"):
        a.padded(3)
    with pytest.raises(ValueError, match="t_in must have shape"):
        OperatorData(a.u_in, a.t_in[:, :2], a.u_out, a.t_out, a.tokens)
    with pytest.raises(ValueError, match="points and channels"):
        OperatorData(a.u_in[:, :, :4], a.t_in, a.u_out, a.t_out, a.tokens)


def test_pretraining_learns_reproducibly_and_leaves_the_mode():
    runs = []
    for _ in range(2):
        model = tiny().eval()
        g = torch.Generator().manual_seed(0)
        report = pretrain(model, data(30), 30, batch=10, lr=1e-2, generator=g)
        assert not model.training
        runs.append((report.losses, evaluate(model, data(30))))
    assert runs[0] == runs[1]
    assert runs[0][1] < 0.7 * evaluate(tiny(), data(30))
    assert report.trained == report.total


def test_predictions_are_in_physical_units_and_independent_of_the_batch():
    model, d = tiny(), data()
    y = predict(model, d, batch=5)
    torch.testing.assert_close(predict(model, d), y)
    normal, mean, scale = d.normalised()
    torch.testing.assert_close(mean + scale * model(*normal.inputs), y)
    assert evaluate(model, d) == pytest.approx(relative_l2(y, d.u_out).mean().item())
    assert not y.requires_grad


def test_the_schedule_rises_and_falls():
    factor = loop.warm_cosine(100, 0.1)
    values = [factor(i) for i in range(100)]
    assert values[0] == pytest.approx(0.1)
    assert values[9] == values[10] == 1
    assert values[55] == pytest.approx(0.5)
    assert all(a > b for a, b in itertools.pairwise(values[10:]))
    assert values[-1] < 1e-3
    assert loop.warm_cosine(1, 0.0)(0) == 1


def test_steps_are_adamw_with_clipping():
    """One step, by hand: AdamW moves each weight by lr against the sign of its gradient."""
    linear = nn.Linear(1, 1, bias=False)
    nn.init.ones_(linear.weight)
    pretrain(linear, (torch.ones(2, 1), torch.zeros(2, 1)), 1, lr=0.1, weight_decay=0.5)
    assert linear.weight.item() == pytest.approx(1 - 0.1 * 0.5 - 0.1, abs=1e-5)


def test_batches_visit_every_sample_once_an_epoch():
    x = torch.arange(10.0)[:, None]
    batches = iter(loop.Batches((x, x), 5, 0.0, torch.Generator().manual_seed(0)))
    seen = torch.cat([next(batches)[1] for _ in range(4)])[:, 0]
    assert seen[:10].sort().values.tolist() == seen[10:].sort().values.tolist() == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    with pytest.raises(ValueError, match="noise needs OperatorData"):
        loop.Batches((x, x), 5, 0.1, None)
    with pytest.raises(TypeError, match="OperatorData or a pair"):
        loop.split((x,))


def test_bf16_autocast_trains():
    losses = pretrain(tiny(), data(20), 20, batch=10, lr=1e-2, bf16=True).losses
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]


def test_the_bar_waits_two_seconds(monkeypatch):
    clock = iter([0.0, 1.0, 1.9, 2.1, 3.0])
    monkeypatch.setattr(bars, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    out = io.StringIO()
    with redirect_stderr(out), bars.progress_bar("training", 4, True) as bar:
        bar(1)
        bar(2)
        assert bar._bar is None
        bar(3, "loss 1")
        assert bar._bar is not None
    with bars.progress_bar("training", 4, None) as bar:  # no terminal here
        bar(4)
    assert bar._bar is None
