"""Three steps of every method in float64 against published values (papers' equations, by hand)."""

import pytest
import torch

from stiefel.optim import RMNP, Muon, NorMuon, row_dominance


def gradient(rows, cols, t):
    i = torch.arange(rows, dtype=torch.float64)[:, None] + 1
    j = torch.arange(cols, dtype=torch.float64) + 1
    return torch.cos(0.7 * i * j + 0.3 * t)


def three_steps(cls, rows, cols, **settings):
    i = torch.arange(rows, dtype=torch.float64)[:, None]
    j = torch.arange(cols, dtype=torch.float64)
    weight = torch.nn.Parameter(0.1 * torch.sin(1 + i * cols + j))
    optimizer = cls([weight], lr=0.02, **settings)
    for t in range(3):
        weight.grad = gradient(rows, cols, t)
        optimizer.step()
    return weight.detach(), optimizer.state[weight]


def assert_exact(actual, expected):
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, atol=6e-9, rtol=0)


def test_muon():
    settings = {"weight_decay": 0.1, "ns": "classic"}
    weight, _ = three_steps(Muon, 4, 3, **settings)
    assert_exact(
        weight,
        [
            [0.05653547, 0.09094825, 0.04139213],
            [-0.05838646, -0.03197265, -0.00036335],
            [0.09459194, 0.11545169, 0.00015051],
            [-0.00033779, -0.13421088, -0.01447350],
        ],
    )
    weight, _ = three_steps(Muon, 3, 4, **settings)
    assert_exact(weight[0], [0.06016722, 0.10496965, 0.03939051, -0.02868812])


def test_normuon_algorithm_1():
    weight, state = three_steps(NorMuon, 4, 3, ns="classic")
    assert_exact(
        weight,
        [
            [0.06963426, 0.08957039, 0.02648301],
            [-0.07083555, -0.07675716, -0.01911383],
            [0.07588415, 0.10516793, 0.02529378],
            [-0.03831086, -0.10933700, -0.04225586],
        ],
    )
    assert_exact(state["second_moment"], [0.01802446, 0.05213272, 0.03036325, 0.05570711])
    weight, state = three_steps(NorMuon, 3, 4, ns="classic")
    assert_exact(weight[0], [0.07346965, 0.09542595, 0.02363255, -0.05705244])
    assert_exact(state["second_moment"], [0.03773701, 0.04237877, 0.03705487])


def test_normuon_as_the_authors_code():
    settings = {"ns": "classic", "rescale": "preserve", "scale": "spectral", "eps": 1e-10}
    weight, state = three_steps(NorMuon, 4, 3, nesterov=True, **settings)
    assert_exact(
        weight,
        [
            [0.04597523, 0.09211442, 0.05356010],
            [-0.06033260, -0.03939248, -0.00360487],
            [0.09843728, 0.11728582, -0.00460898],
            [-0.00710277, -0.12975536, -0.01946087],
        ],
    )
    assert_exact(state["second_moment"], [0.01767622, 0.05160178, 0.02873122, 0.05620225])
    weight, _ = three_steps(NorMuon, 3, 4, nesterov=True, **settings)
    assert_exact(weight[0], [0.05990923, 0.10521241, 0.03975660, -0.02805290])
    weight, _ = three_steps(NorMuon, 4, 3, **settings)
    assert_exact(weight[0], [0.04111986, 0.08771872, 0.05152618])


def test_rmnp():
    weight, _ = three_steps(RMNP, 4, 3, weight_decay=0.1)
    assert_exact(
        weight,
        [
            [0.03786205, 0.09237567, 0.06285338],
            [-0.07321681, -0.03073012, -0.00782879],
            [0.10248930, 0.11557994, -0.01362258],
            [-0.00805474, -0.14034891, -0.02219207],
        ],
    )
    weight, _ = three_steps(RMNP, 3, 4, weight_decay=0.1)
    assert_exact(weight[0], [0.05626822, 0.09150444, 0.04311451, -0.03185232])
    weight, _ = three_steps(RMNP, 3, 4, weight_decay=0.1, nesterov=False)
    assert_exact(weight[0], [0.05455518, 0.08962209, 0.04194814, -0.03175414])
    weight, _ = three_steps(RMNP, 4, 3, weight_decay=0.1, nesterov=False)
    assert_exact(weight[0], [0.03488250, 0.08923646, 0.06103093])


@pytest.mark.parametrize(
    ("shape", "transpose", "mean", "low", "high"),
    [
        ((3, 4), False, 3.4852858006, 3.41394277, 3.52303478),
        ((4, 3), False, 3.0186507286, 1.7165898082, 3.8051757949),
        ((4, 3), True, 3.4852858006, 3.41394277, 3.52303478),
    ],
)
def test_row_dominance(shape, transpose, mean, low, high):
    values = row_dominance(gradient(*shape, 0), transpose)
    assert_exact(torch.stack(values), [mean, low, high])
