"""Modes of tasks, from data, covariances or streams; the pre-training criterion; Jacobians."""

import math

import pytest
import torch
from torch import nn

from stiefel.data import table
from stiefel.init import orthogonal_init_
from stiefel.theory import Covariances, jacobian_spectrum, pretraining_consistency, task_modes


@pytest.fixture(scope="module")
def digits():
    data = table("digits")
    x = data.x / 16
    y = nn.functional.one_hot(data.y).double()
    return x - x.mean(0), y - y.mean(0)


@pytest.fixture
def random_task(generator):
    x = torch.randn(200, 6, generator=generator, dtype=torch.float64) @ torch.diag(
        torch.tensor([3.0, 2.0, 1.0, 1.0, 0.5, 0.1], dtype=torch.float64)
    )
    y = x[:, :4] @ torch.randn(4, 3, generator=generator, dtype=torch.float64)
    return x + 5.0, y + torch.randn(200, 3, generator=generator, dtype=torch.float64)


def test_digits_have_the_nine_modes_of_the_sheet(digits):
    modes = task_modes(*digits, k=40)
    expected = [0.29717, 0.28571, 0.28390, 0.27338, 0.25878, 0.24891, 0.22651, 0.20352, 0.18468]
    torch.testing.assert_close(
        modes.S, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=6e-6
    )
    zero = torch.zeros(10, 40, dtype=torch.float64)
    assert modes.loss_floor == pytest.approx(0.15947, abs=6e-6)
    assert modes.loss_floor + float(modes.excess(zero)) == pytest.approx(0.44999, abs=6e-6)
    assert 0.005 < modes.dropped_energy < 0.02


def test_whitened_inputs_are_white(random_task):
    x, y = random_task
    modes = task_modes(x, y, center=True)
    white = modes.transform(x)
    eye = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(white.mT @ white / 200, eye, rtol=0, atol=1e-9)
    torch.testing.assert_close((y - y.mean(0)).mT @ white / 200, modes.sigma31)
    torch.testing.assert_close(modes.U * modes.S @ modes.V.mT, modes.sigma31)
    assert modes.dropped_energy == 0
    torch.testing.assert_close(modes.delta, torch.ones(3, dtype=torch.float64))
    assert modes.mixing < 1e-12


@pytest.mark.parametrize("whiten", [True, False])
def test_losses_are_those_of_the_data(random_task, whiten, generator):
    x, y = random_task
    modes = task_modes(x, y, whiten=whiten)
    seen = modes.transform(x)
    best = torch.linalg.lstsq(seen, y).solution.mT
    torch.testing.assert_close(modes.optimum, best)

    def loss(w):
        return float((y - seen @ w.mT).square().sum() / 400)

    w = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    assert modes.loss_floor == pytest.approx(loss(best))
    excess = modes.excess(w)
    for k in range(2):
        assert float(excess[k]) == pytest.approx(loss(w[k]) - loss(best))
    strengths = modes.strengths(w)
    torch.testing.assert_close(strengths[1, 0], modes.U[:, 0] @ w[1] @ modes.V[:, 0])


def test_data_stream_shards_and_covariances_agree(random_task):
    x, y = random_task
    whole = task_modes(x, y, center=True)
    stream = task_modes(zip(x.split(33), y.split(33), strict=True), center=True)
    halves = [Covariances().update(x[:70], y[:70]), Covariances().update(x[70:], y[70:])]
    merged = task_modes(halves[0].merge(halves[1]).merge(Covariances()), center=True)
    apart, z = x - x.mean(0), y - y.mean(0)
    energy = float(z.square().sum() / 200)
    given = task_modes(
        Covariances.from_matrices(apart.mT @ apart / 200, z.mT @ apart / 200, energy)
    )
    arrays = task_modes(x.numpy(), y.numpy(), center=True)
    for other in (stream, merged, given, arrays):
        torch.testing.assert_close(other.S, whole.S)
        assert other.loss_floor == pytest.approx(whole.loss_floor)
    assert halves[0].count == 200


def test_a_large_mean_costs_no_digits(random_task):
    x, y = random_task
    far = task_modes(zip((x + 1e6).split(20), y.split(20), strict=True), center=True)
    torch.testing.assert_close(far.S, task_modes(x, y, center=True).S, rtol=1e-7, atol=0)


def test_sums_are_means_times_examples(random_task):
    x, y = random_task
    mean, total = (task_modes(x, y, whiten=False, reduction=r) for r in ("mean", "sum"))
    torch.testing.assert_close(total.S, 200 * mean.S)
    assert total.loss_floor == pytest.approx(200 * mean.loss_floor)


def test_inputs_without_variance_are_left_out(random_task):
    x, y = random_task
    doubled = torch.cat([x, x[:, :2], torch.zeros(200, 1, dtype=torch.float64)], dim=1)
    modes = task_modes(doubled, y, center=True)
    assert modes.V.shape[0] == 6
    assert modes.dropped_energy < 1e-9
    torch.testing.assert_close(modes.S, task_modes(x, y, center=True).S)
    kept = task_modes(x, y, k=2, center=True)
    values = torch.linalg.eigvalsh(torch.cov(x.mT))
    assert kept.dropped_energy == pytest.approx(float(values[:4].sum() / values.sum()))


def test_covariances_without_output_energy_know_no_loss():
    eye = torch.eye(2, dtype=torch.float64)
    modes = task_modes(Covariances.from_matrices(eye, 2 * eye))
    assert modes.loss_floor is None
    assert float(modes.excess(torch.zeros(2, 2, dtype=torch.float64))) == pytest.approx(4.0)


def standardised(name):
    data = table(name)
    x = (data.x - data.x.mean(0)) / data.x.std(0, correction=0)
    return x, nn.functional.one_hot(data.y).double()


def test_pretraining_criterion(digits):
    assert pretraining_consistency(*digits) == pytest.approx(0.2057, abs=6e-5)
    assert pretraining_consistency(*standardised("wine")) == pytest.approx(0.1103, abs=6e-5)
    found = pretraining_consistency(*standardised("breast_cancer"))
    assert found == pytest.approx(0.1368, abs=6e-5)
    x, _ = digits
    vectors = torch.linalg.eigh(x.mT @ x).eigenvectors
    scores = x @ vectors[:, -9:]
    assert pretraining_consistency(x, scores) < 1e-7


def test_pretraining_criterion_and_off_diagonal_part(digits):
    modes = task_modes(*digits, whiten=False)
    rotated = modes.V.mT @ modes.sigma11 @ modes.V
    off = 1 - float(rotated.diagonal().square().sum() / rotated.square().sum())
    assert off == pytest.approx(0.0217, abs=6e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: task_modes(x, y[:-1]), "same number of rows, got 200 and 199"),
        (
            lambda x, y: task_modes(x.clone().index_fill_(0, torch.tensor([3]), math.nan), y),
            "X must be finite",
        ),
        (lambda x, y: task_modes(x, y / 0), "Y must be finite"),
        (lambda x, y: task_modes(x[0], y), "X must be \\[examples, features\\]"),
        (lambda x, y: task_modes(x, y, k=7), "between 1 and the rank of the inputs, 6, got 7"),
        (lambda x, y: task_modes(x, y, k=0), "got 0"),
        (lambda x, y: task_modes(x, y, k=2, whiten=False), "whiten=False, k=2"),
        (lambda x, y: task_modes(x, 0 * y), "no mode to learn"),
        (lambda x, y: task_modes(0 * x, y), "no variance"),
        (lambda x, y: task_modes(x), "says nothing of a task"),
        (lambda x, y: task_modes(Covariances()), "no data yet"),
        (lambda x, y: task_modes([(x, y), (x[:, :2], y)]), "this batch has 2 inputs"),
        (lambda x, y: task_modes(Covariances().update(x, y), y), "Y must be left out"),
        (lambda x, y: task_modes(x, y, reduction="median"), "reduction must be"),
        (lambda x, y: task_modes(x, y).transform(y), "x must have 6 features"),
    ],
)
def test_bad_tasks(random_task, call, message):
    with pytest.raises(ValueError, match=message):
        call(*random_task)


def test_bad_covariances():
    eye = torch.eye(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="symmetric"):
        Covariances.from_matrices(eye + torch.tensor([[0.0, 1.0], [0.0, 0.0]]), eye)
    with pytest.raises(ValueError, match="sigma11 must be"):
        Covariances.from_matrices(eye, torch.ones(2, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="finite"):
        Covariances.from_matrices(eye * math.nan, eye)
    given = Covariances.from_matrices(eye, eye)
    with pytest.raises(ValueError, match="update needs counts"):
        given.update(eye, eye)
    with pytest.raises(ValueError, match="need data"):
        task_modes(given, center=True)


# --- Jacobians -----------------------------------------------------------------------------------


def tanh_network(layers, width):
    return nn.Sequential(
        *[part for _ in range(layers) for part in (nn.Tanh(), nn.Linear(width, width))]
    ).double()


def test_jacobian_of_a_linear_network_is_its_product(generator):
    net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 4)).double()
    values, isometry = jacobian_spectrum(net, torch.randn(3, 5, dtype=torch.float64))
    exact = torch.linalg.svdvals(net[1].weight @ net[0].weight)
    torch.testing.assert_close(values, exact.detach().expand(3, 4))
    share = float((exact >= 0.1 * exact[0]).double().mean())
    assert isometry.tolist() == pytest.approx([share] * 3)
    assert all(p.grad is None for p in net.parameters())


def test_jacobian_of_a_tanh_network_is_the_product_of_its_layers(generator):
    net = tanh_network(4, 6)
    x = torch.randn(6, generator=generator, dtype=torch.float64)
    product, signal = torch.eye(6, dtype=torch.float64), x
    for layer in net[1::2]:
        product = layer.weight * (1 - signal.tanh() ** 2) @ product
        signal = layer(signal.tanh())
    values, isometry = jacobian_spectrum(net, x)
    torch.testing.assert_close(values, torch.linalg.svdvals(product.detach()))
    assert isometry.shape == ()


def test_orthogonal_tanh_networks_keep_what_gaussian_ones_lose(generator):
    """The sheet's check D, at half its width: 0.8 against 0.03 to 0.05."""
    net = tanh_network(100, 100)
    x = torch.randn(100, generator=generator, dtype=torch.float64)
    orthogonal_init_(net, gain=1.0, generator=generator)
    assert float(jacobian_spectrum(net, x).isometry) >= 0.6
    for layer in net[1::2]:
        nn.init.normal_(layer.weight, std=0.1, generator=generator)
    assert float(jacobian_spectrum(net, x).isometry) <= 0.1


def test_images_and_half_types():
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(32, 3))
    values, isometry = jacobian_spectrum(net, torch.randn(2, 1, 4, 4))
    assert values.shape == (2, 3)
    assert isometry.shape == (2,)
    half = nn.Linear(3, 3).bfloat16()
    assert jacobian_spectrum(half, torch.ones(3).bfloat16()).singular_values.dtype is torch.float32


def test_dead_and_broken_networks():
    net = nn.Linear(3, 3)
    nn.init.zeros_(net.weight)
    assert float(jacobian_spectrum(net, torch.ones(3)).isometry) == 0
    nn.init.constant_(net.weight, math.nan)
    with pytest.raises(ValueError, match="NaN or infinity"):
        jacobian_spectrum(net, torch.ones(3))
    with pytest.raises(TypeError, match="floating point"):
        jacobian_spectrum(net, torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="one input"):
        jacobian_spectrum(net, torch.tensor(1.0))
