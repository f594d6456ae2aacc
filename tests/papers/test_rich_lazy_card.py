import itertools
import math

import numpy as np
import pytest
import torch
from card_checks import (
    check_claims_follow_the_measurements,
    check_figure,
    check_smoke,
    check_snippet,
)

from stiefel.linalg import haar
from stiefel.papers import Scale, UnavailableError, get
from stiefel.papers import rich_lazy_data as data
from stiefel.papers import rich_lazy_runs as runs
from stiefel.theory import Trials, tangent_kernel, two_alternative


@pytest.fixture(scope="module")
def measurement():
    return check_smoke("rich-lazy", race=False, seconds=15)


def test_metrics_are_those_of_the_series(measurement):
    m, s = measurement.metrics, measurement.series
    for name in ("digits", "spectral", "small", "2AF"):
        assert m[f"dw_ratio_{name}"] == s[f"dW {name}"][0] / s[f"dW {name}"][-1]
        assert m[f"ra_gain_{name}"] == s[f"RA {name}"][-1] - s[f"RA {name}"][0]
        assert m[f"ka_gain_{name}"] == s[f"KA {name}"][-1] - s[f"KA {name}"][0]
    mean, formula = s["KA linear"], s["KA linear formula"]
    gaps = [abs(a - b) for a, b in zip(mean[:-1], formula, strict=True)]
    assert m["linear_error"] == pytest.approx(max(gaps))
    assert m["linear_order"] == pytest.approx(min(mean[-1] - mean[-2], mean[-2] - mean[0]))
    assert measurement.config["params"] == ["h2h.weight"]


def test_linear_theory_holds_already_at_smoke_scale(measurement):
    m = measurement.metrics
    assert m["linear_error"] < 1e-3
    assert m["linear_task_error"] < 1e-3
    assert m["linear_residual"] < 1e-4
    assert m["linear_large_least"] > 0.98
    ra = measurement.series["RA linear"]
    for r, value in zip((1, 2, 5, 10), ra, strict=False):
        assert value == pytest.approx(math.sqrt(r) / 10, abs=2e-3)
    assert ra[-1] == pytest.approx(1.0, abs=1e-3)


def test_controls_differ_in_what_they_keep():
    starts = [runs.Start(1), runs.Start(1, 1.25, "spectral"), runs.Start(40, 0.5), runs.Start(40)]
    stack = runs.initial_stack((3, 40, 2), starts, [torch.Generator().manual_seed(0)])
    fro = [float(torch.linalg.matrix_norm(w)) for w in stack.w]
    top = [float(torch.linalg.matrix_norm(w, 2)) for w in stack.w]
    assert fro[0] == pytest.approx(fro[3], rel=1e-5)  # the same Gaussian, truncated
    assert top[1] == pytest.approx(top[3], rel=1e-5)
    assert fro[2] == pytest.approx(0.4 * fro[3], rel=1e-5)
    assert torch.equal(stack.w_in[0], stack.w_in[3])


def one_by_one(stack, trials, lr, steps):
    """The obvious twin: each network by itself with torch's SGD and clipping."""
    nets = []
    for index in range(len(stack.w)):
        net = stack.network(index)
        optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9)
        for step in range(steps):
            optimizer.zero_grad()
            trials[step].loss(net(trials[step].inputs)).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), runs.CLIP)
            optimizer.step()
        nets.append(net)
    return nets


@pytest.mark.parametrize("clip", [1e9, 0.05])
def test_a_stack_trains_as_its_networks_do(clip, monkeypatch):
    monkeypatch.setattr(runs, "CLIP", clip)
    generator = torch.Generator().manual_seed(0)
    stack = runs.initial_stack((3, 10, 3), [runs.Start(1), runs.Start(10)], [generator])
    stack = runs.Stack(*(t.double() for t in stack.tensors))
    trials = [two_alternative(6, generator, dtype=torch.float64) for _ in range(8)]
    trained = runs.train(stack, lambda step: trials[step], lr=0.05, stop_at=[0.0, 0.0], steps=8)
    assert trained.steps == [8, 8]
    assert trained.finished == [False, False]
    for index, net in enumerate(one_by_one(stack, trials, 0.05, 8)):
        for ours, theirs in zip(
            trained.stack.network(index).parameters(), net.parameters(), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_each_network_stops_by_itself():
    generator = torch.Generator().manual_seed(0)
    starts = [runs.Start(2), runs.Start(12), runs.Start(2)]
    stack = runs.initial_stack((3, 12, 3), starts, [generator])
    stack = runs.Stack(*(t.double() for t in stack.tensors))
    trials = [two_alternative(16, generator, dtype=torch.float64) for _ in range(60)]

    def batches(step):
        own = trials[step]
        return Trials(own.inputs.expand(3, -1, -1, -1), own.targets.expand(3, -1, -1))

    seen = []
    trained = runs.train(
        stack,
        batches,
        lr=0.1,
        stop_at=[0.9, 0.7, 0.0],
        steps=60,
        every=lambda step, loss: seen.append(loss),
    )
    assert trained.finished == [True, True, False]
    assert trained.steps[0] < 60
    assert trained.steps[1] < 60
    assert trained.steps[2] == 60 == len(seen)
    assert trained.losses[0] < 0.9
    assert trained.losses[1] < 0.7
    assert trained.unfinished(0.5) == 1
    assert trained.unfinished(0.0) == 0
    # Each has the weights of a training alone: the first a shorter one, and the last goes on
    # undisturbed, momentum included, when the others leave.
    for index in (0, 2):
        alone = runs.train(
            stack.pick(torch.tensor([index])),
            lambda step: trials[step],
            lr=0.1,
            stop_at=[0.0],
            steps=trained.steps[index],
        )
        torch.testing.assert_close(alone.stack.w[0], trained.stack.w[index], rtol=1e-6, atol=1e-8)


def test_the_better_of_two_rates_is_kept():
    stack = runs.Stack(*(torch.zeros(2, 1, 1) for _ in range(3)))
    other = runs.Stack(*(torch.ones(2, 1, 1) for _ in range(3)))
    first = runs.Trained(stack, [1, 1], [0.5, 0.1], [True, False])
    second = runs.Trained(other, [2, 2], [0.3, 0.2], [False, True])
    best = first.better(second)
    assert (best.steps, best.losses, best.finished) == ([2, 1], [0.3, 0.1], [False, False])
    assert best.stack.w.flatten().tolist() == [1.0, 0.0]


def test_divergence_names_the_step_and_the_network():
    stack = runs.initial_stack((3, 8, 3), [runs.Start(8)] * 2, [torch.Generator().manual_seed(0)])
    stack.w[1] *= 1e30
    trials = two_alternative(4)
    with pytest.raises(FloatingPointError, match="network 1 is not finite at step 1"):
        runs.train(stack, lambda step: trials, lr=0.1, stop_at=[0.0, 0.0], steps=3)


def test_linear_kernel_is_that_of_autograd():
    generator = torch.Generator().manual_seed(0)
    w1 = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    w2 = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    x = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    kernels = []
    for i in range(2):
        net = torch.nn.Sequential(
            torch.nn.Linear(4, 5, bias=False), torch.nn.Linear(5, 1, bias=False)
        ).double()
        with torch.no_grad():
            net[0].weight.copy_(w1[i])
            net[1].weight.copy_(w2[i][None])
        kernels.append(tangent_kernel(net, x))
        torch.testing.assert_close(kernels[i], x @ runs._tangent_metric(w1, w2)[i] @ x.mT)
    metric = x.mT @ x / 7
    m = [metric @ runs._tangent_metric(w1, w2)[i] for i in range(2)]
    cosine = (kernels[0] * kernels[1]).sum() / (kernels[0].norm() * kernels[1].norm())
    torch.testing.assert_close(runs._cosine(m[0], m[1]), cosine)


def test_data_of_the_sheet():
    x, beta, checksum = data.whitened_diabetes()
    torch.testing.assert_close(x.mT @ x / 442, torch.eye(10, dtype=torch.float64))
    assert float(beta.norm()) == pytest.approx(0.7195, abs=5e-5)
    assert len(checksum) == 64
    images = data.images(Scale.LAPTOP)
    assert images.train.inputs.shape == (1500, 8, 8)
    assert images.test.inputs.shape == (297, 8, 8)
    assert float(images.train.inputs.max()) == 1.0
    tasks = data.isotropic_tasks(2, 6, 0.5, torch.Generator().manual_seed(0))
    torch.testing.assert_close(tasks[:6] @ tasks[:6].mT, 0.25 * torch.eye(6).double())
    assert not torch.allclose(tasks[:6], tasks[6:])
    a = haar(6, dtype=torch.float64)[:, :2]
    total = (tasks @ a).square().sum()  # over two bases: twice the trace of a aᵀ, times 0.25
    assert float(total) == pytest.approx(2 * 2 * 0.25)


def test_laptop_scale_is_that_of_the_sheet():
    plan = data.LAPTOP
    assert plan.ranks == (1, 2, 5, 10, 30, 100)
    assert (plan.hidden, plan.rates, plan.batch, plan.stop) == (100, (0.01,), 100, 0.2)
    assert runs.Start(1) == runs.Start(1, 1.25, "fro")
    assert data.PAPER.rates == (0.001, 0.003, 0.01)
    assert data.PAPER.neuro == ("2AF", "DMS", "CXT")


@pytest.mark.parametrize("name", data.PAPER.neuro)
def test_every_neuroscience_task_runs(name):
    result = data.neuro_runs(name, data.SMOKE, 0, lambda fraction, message: None)
    assert len(result.reports) == 1
    assert len(result.reports[0]) == 2
    assert all(math.isfinite(v) for v in result.mean("KA"))


def test_paper_scale_is_refused_without_its_data(monkeypatch):
    monkeypatch.delenv("STIEFEL_DATA", raising=False)
    with pytest.raises(UnavailableError, match="STIEFEL_DATA"):
        get("rich-lazy").experiment(Scale.PAPER, 0, None)


def test_mnist_is_read_as_rows(tmp_path):
    arrays = {}
    for name, n in (("train", 5), ("test", 3)):
        arrays[f"x_{name}"] = np.full((n, 28, 28), 255, dtype=np.uint8)
        arrays[f"y_{name}"] = np.arange(n, dtype=np.uint8)
    np.savez(tmp_path / "mnist.npz", **arrays)
    images = data.read_mnist(tmp_path / "mnist.npz", "cpu")
    assert images.train.inputs.shape == (5, 28, 28)
    assert float(images.test.inputs.min()) == 1.0
    assert images.test.targets[:, -1].tolist() == [0, 1, 2]
    np.savez(tmp_path / "bad.npz", **{**arrays, "y_test": arrays["y_test"][:2]})
    with pytest.raises(ValueError, match=r"x_test in .* must be \(2, 28, 28\)"):
        data.read_mnist(tmp_path / "bad.npz", "cpu")


def test_claims_follow_the_measurements(measurement):
    check_claims_follow_the_measurements("rich-lazy", measurement)


def test_figure_draws_theory_over_measurement(measurement):
    figure = check_figure("rich-lazy", measurement)
    curve = figure.axes[2].lines[0].get_ydata()
    assert curve[0] == pytest.approx(0.930769, abs=1e-6)
    assert all(b > a for a, b in itertools.pairwise(curve))
    assert len(figure.axes[2].collections) == 4  # two seeds, each with an aligned start


def test_snippet_runs():
    assert check_snippet("rich-lazy")["probe"].params == ("h2h.weight",)


def test_metadata():
    paper = get("rich-lazy")
    assert (paper.arxiv, paper.claim.at_least) == ("2310.08513", 1.2)
    bounds = {claim.metric: claim.bound for claim in paper.others}
    assert bounds["ra_gain_digits"] == 0.1
    assert bounds["ka_gain_digits"] == 0.12
    assert bounds["ka_spearman"] == 0.8
    assert bounds["linear_error"] == 0.004
    assert bounds["linear_aligned"] == 0.9999
