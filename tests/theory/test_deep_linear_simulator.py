"""The covariance-only simulator against training on the data themselves, and the closed form."""

import math

import pytest
import torch
from torch import nn

from stiefel.theory import (
    Covariances,
    DeepLinearSimulator,
    max_stable_lr,
    mode_curve,
    mode_time,
    task_modes,
)


@pytest.fixture(scope="module")
def task():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=generator, dtype=torch.float64)
    mix = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    y = x @ mix + torch.randn(60, 3, generator=generator, dtype=torch.float64)
    return x, y


def trained_on_data(x, y, weights, lr, steps):
    """The slow, obvious twin: autograd on the mean loss."""
    layers = [nn.Parameter(w.clone()) for w in weights]
    losses = []
    for _ in range(steps + 1):
        out = x
        for layer in layers:
            out = out @ layer.mT
        loss = (y - out).square().sum(1).mean() / 2
        losses.append(float(loss.detach()))
        gradients = torch.autograd.grad(loss, layers)
        with torch.no_grad():
            for layer, gradient in zip(layers, gradients, strict=True):
                layer -= lr * gradient
    return losses


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("widths", [[5, 3], [5, 4, 3], [5, 7, 2, 3], [5, 4, 6, 4, 3]])
def test_runs_equal_training_on_the_data(task, whiten, widths):
    modes = task_modes(*task, whiten=whiten)
    simulator = DeepLinearSimulator(widths, "gaussian", modes=modes, seeds=(3, 4))
    runs = simulator.run([0.02, 0.05], 12, record="loss")
    assert runs.values.shape == (2, 2, 13)
    assert runs.steps.tolist() == list(range(13))
    x, y = modes.transform(task[0]), task[1]
    for i, lr in enumerate((0.02, 0.05)):
        for j in range(2):
            exact = trained_on_data(x, y, [w[j] for w in simulator.weights], lr, 12)
            torch.testing.assert_close(
                runs.values[i, j], torch.tensor(exact, dtype=torch.float64), rtol=1e-9, atol=0
            )


def test_batches_do_not_change_a_run(task):
    modes = task_modes(*task)
    settings = {"init": "orthogonal", "modes": modes}
    together = DeepLinearSimulator([5, 4, 3], seeds=(0, 1, 2), **settings)
    alone = DeepLinearSimulator([5, 4, 3], seeds=(1,), **settings)
    many, one = together.run([0.1, 0.3], 20, every=5), alone.run(0.3, 20, every=5)
    torch.testing.assert_close(many.values[1, 1], one.values[0])
    assert one.steps.tolist() == [0, 5, 10, 15, 20]
    assert many.values.shape == (2, 3, 5, 3)


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_decoupled_runs_follow_the_closed_form_to_first_order(task, depth):
    modes = task_modes(*task)
    widths = [5, *[6] * (depth - 1), 3]
    simulator = DeepLinearSimulator(widths, "decoupled", modes=modes, u0=0.05)
    errors = []
    end = float(mode_time(modes.S[0], 0.05, 0.9 * modes.S[0], max(depth, 2)))
    for lr in (end / 200, end / 2000):
        runs = simulator.run(lr, round(end / lr))
        exact = mode_curve(runs.steps, modes.S, 0.05, depth, lr)
        errors.append(float(((runs.values[0].mT - exact) / modes.S[:, None]).abs().max()))
    assert errors[0] < 0.05
    assert 7 < errors[0] / errors[1] < 13


def test_modes_beyond_the_narrowest_layer_stay_at_zero(task):
    modes = task_modes(*task)
    simulator = DeepLinearSimulator([5, 8, 2, 3], "decoupled", modes=modes, u0=0.1)
    end = simulator.run(0.3 * float(max_stable_lr(modes.S[0], 3)), 2000, every=2000).values[0, -1]
    torch.testing.assert_close(end[:2], modes.S[:2], rtol=1e-6, atol=0)
    assert abs(float(end[2])) < 1e-9


def test_own_strength_for_each_mode(task):
    modes = task_modes(*task)
    u0 = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    start = DeepLinearSimulator([5, 4, 4, 3], "decoupled", modes=modes, u0=u0).run(0.1, 0)
    torch.testing.assert_close(start.values[0, 0], u0)


def test_conservation_drifts_with_the_rate(task):
    """W₁W₁ᵀ − W₂ᵀW₂ is conserved by the flow; descent drifts in proportion to λ."""
    modes = task_modes(*task)
    drifts = []
    for lr, steps in ((0.02, 50), (0.002, 500)):
        simulator = DeepLinearSimulator([5, 4, 3], "gaussian", modes=modes, std=0.5)
        weights, sizes = simulator._batch(torch.tensor([lr], dtype=torch.float64))
        start = weights[0] @ weights[0].mT - weights[1].mT @ weights[1]
        for _ in range(steps):
            simulator._backward(weights, simulator._forward(weights), sizes)
        end = weights[0] @ weights[0].mT - weights[1].mT @ weights[1]
        drifts.append(float((end - start).norm()))
    assert 7 < drifts[0] / drifts[1] < 13


def test_diverging_runs_are_infinite_and_leave_the_others_alone(task):
    modes = task_modes(*task)
    simulator = DeepLinearSimulator([5, 4, 3], "orthogonal", modes=modes, seeds=(0, 1))
    bound = float(max_stable_lr(modes.S[0], 2))
    runs = simulator.run([0.1 * bound, 10 * bound], 60, record="excess")
    assert runs.diverged.tolist() == [[False, False], [True, True]]
    assert runs.values[1, :, -1].tolist() == [math.inf] * 2
    torch.testing.assert_close(runs.values[0], simulator.run(0.1 * bound, 60, "excess").values)
    times = simulator.learning_time([0.1 * bound, 10 * bound], 500)
    assert times[0].isfinite().all()
    assert times[1].tolist() == [math.inf] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_learning_time_is_where_the_recorded_loss_falls_below(task, dtype):
    modes = task_modes(*task)
    simulator = DeepLinearSimulator(
        [5, 6, 6, 3], "xavier", modes=modes, seeds=(0, 1, 2), dtype=dtype
    )
    rates = torch.tensor([0.02, 0.05, 0.1])
    times = simulator.learning_time(rates, 400, tolerance=0.01)
    excess = simulator.run(rates, 400, "excess").values
    goal = 0.01 * modes.excess(torch.zeros(3, 5, dtype=torch.float64))
    first = (excess <= goal).int().argmax(-1)
    assert (first > 0).all()
    assert torch.equal(times.ceil().long(), first)
    fastest = simulator.learning_time(rates, 400, tolerance=0.01, first=True)
    assert torch.equal(fastest.min(0).values, times.min(0).values)
    assert simulator.learning_time(rates, 3).isinf().all()


def test_random_starts_have_their_spectra(task):
    x = torch.randn(30, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    modes = task_modes(Covariances.from_matrices(torch.eye(40).double(), x), whiten=False)
    widths = [40, 50, 30]
    orthogonal = DeepLinearSimulator(widths, "orthogonal", modes=modes, gain=1.5).weights
    for weight in orthogonal:
        values = torch.linalg.svdvals(weight[0])
        torch.testing.assert_close(values, torch.full_like(values, 1.5))
    gaussian = DeepLinearSimulator(widths, "gaussian", modes=modes, gain=2.0).weights[0]
    assert float(gaussian.std()) == pytest.approx(2 / math.sqrt(40), rel=0.05)
    xavier = DeepLinearSimulator(widths, "xavier", modes=modes).weights[0]
    assert float(xavier.abs().max()) == pytest.approx(math.sqrt(6 / 90), rel=0.01)
    own = [torch.ones(50, 40), torch.ones(1, 30, 50)]
    given = DeepLinearSimulator(widths, own, modes=modes, seeds=(0, 1)).weights
    assert [tuple(w.shape) for w in given] == [(2, 50, 40), (2, 30, 50)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": [5]}, "at least two numbers"),
        ({"widths": [5, 0, 3]}, "at least two numbers ≥ 1"),
        ({"widths": [4, 4, 3]}, "5 inputs and end with its 3 outputs"),
        ({"widths": [5, 4, 2]}, "5 inputs and end with its 3 outputs"),
        ({"init": "kaiming"}, "init must be one of"),
        ({"init": [torch.ones(4, 5), torch.ones(3, 5)]}, "weights must have shapes"),
        ({"seeds": ()}, "at least one run"),
        ({"dtype": torch.bfloat16}, "float32 or float64"),
        ({"gain": 0.0}, "gain must be positive"),
        ({"std": math.inf, "init": "gaussian"}, "std must be positive"),
        ({"std": 0.1}, "std is for"),
        ({"init": "decoupled", "u0": -1.0}, "u0 must be > 0"),
        ({"init": "decoupled", "u0": [0.1, 0.1]}, "each of the 3 modes"),
    ],
)
def test_bad_simulators(task, change, message):
    arguments = {"widths": [5, 4, 3], "modes": task_modes(*task), **change}
    with pytest.raises(ValueError, match=message):
        DeepLinearSimulator(**arguments)


def test_bad_runs(task):
    simulator = DeepLinearSimulator([5, 4, 3], modes=task_modes(*task))
    with pytest.raises(ValueError, match="lr must be > 0"):
        simulator.run(0.0, 5)
    with pytest.raises(ValueError, match="record must be one of"):
        simulator.run(0.1, 5, record="weights")
    with pytest.raises(ValueError, match="n_steps must be ≥ 0"):
        simulator.run(0.1, -1)
    with pytest.raises(ValueError, match="tolerance"):
        simulator.learning_time(0.1, 5, tolerance=1.0)
    with pytest.raises(ValueError, match="max_steps"):
        simulator.learning_time(0.1, 0)
    eye = torch.eye(2, dtype=torch.float64)
    unknown = task_modes(Covariances.from_matrices(eye, eye))
    with pytest.raises(ValueError, match="record 'excess' instead"):
        DeepLinearSimulator([2, 2], modes=unknown).run(0.1, 5, record="loss")
