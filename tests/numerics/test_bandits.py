import copy
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial import chebyshev
from scipy.optimize import lsq_linear

from stiefel.numerics import BinnedTsallisINF, ChebCB, TsallisINF, tsallis_probabilities
from stiefel.numerics.relaxation_chebyshev import bounded_fit

POLICIES = (TsallisINF, BinnedTsallisINF, ChebCB)


@pytest.mark.parametrize(
    ("losses", "t", "expected"),
    [
        ([0, 1, 2, 4], 9, [0.40556959, 0.27596797, 0.19984923, 0.1186132]),
        ([0, 0, 0, 0], 1, [0.25] * 4),
        (50 * np.arange(20), 10_000, [0.26407711, 0.16714761, 0.11522464, 0.08421292]),
    ],
)
def test_probabilities(losses, t, expected):
    np.testing.assert_allclose(tsallis_probabilities(losses, t)[:4], expected, atol=1e-8)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=30),
    st.integers(1, 10**9),
)
def test_probabilities_solve_their_equation(losses, t):
    p, k = tsallis_probabilities(losses, t), np.asarray(losses)
    assert p.sum() == pytest.approx(1, abs=1e-12)
    assert (p > 0).all()
    # 1/√p_i − 1/√p_j = η (k_i − k_j) / 2, whatever x is.
    root = (1 / np.sqrt(p)) * np.sqrt(t)
    best = k.argmin()
    np.testing.assert_allclose(root - root[best], k - k[best], rtol=1e-6, atol=1e-6 * root[best])


def test_probabilities_refuse():
    with pytest.raises(ValueError, match="finite"):
        tsallis_probabilities([0, np.nan], 3)
    with pytest.raises(ValueError, match="t must"):
        tsallis_probabilities([0, 1], 0)


def slow_tsallis(grid, rng, losses_of, rounds):
    """The algorithm line by line, x by bisection."""
    k, seen, chosen = np.zeros(len(grid)), [], []
    for t in range(1, rounds + 1):
        scale = max(np.mean(seen) - 1, 1e-12) if seen else 1.0
        eta, scaled = 2 / np.sqrt(t), k / scale
        low, high = scaled.min() - np.sqrt(len(grid)) * 2 / eta, scaled.min() - 2 / eta
        for _ in range(200):
            x = (low + high) / 2
            if (4 / (eta * (scaled - x)) ** 2).sum() > 1:
                high = x
            else:
                low = x
        p = 4 / (eta * (scaled - x)) ** 2
        i = int(np.searchsorted(np.cumsum(p), rng.random() * p.sum(), "right"))
        loss = losses_of(t, i)
        k[i] += (loss - 1) / p[i]
        seen.append(loss)
        chosen.append(grid[i])
    return chosen, k


def cost(t, i):
    return 20 + 3 * (i - 7) ** 2 + t % 5


def test_tsallis_follows_the_algorithm():
    bandit = TsallisINF(random_state=5)
    grid = np.linspace(1, 1.95, 20)
    np.testing.assert_array_equal(bandit.grid, grid)
    chosen = []
    for t in range(1, 401):
        omega = bandit.predict()
        chosen.append(omega)
        bandit.update(cost(t, int(np.argmin(np.abs(grid - omega)))))
    expected, k = slow_tsallis(grid, np.random.default_rng(5), cost, 400)
    assert chosen == expected
    np.testing.assert_allclose(bandit.state_dict()["seen"]["losses"], k, rtol=1e-9)
    assert abs(np.mean(chosen[-100:]) - grid[7]) < abs(np.mean(chosen[:100]) - grid[7])


def slow_chebcb(d, m, rng, contexts, losses_of):
    """The algorithm with the whole history, least squares and scipy's bounded ones."""
    theta, eta, phi, played, losses, predicted = np.zeros((d, m)), 0.0, [], [], [], []
    etas, scale = [], None
    for t, c in enumerate(contexts, 1):
        f = chebyshev.chebvander(2 * c - 1, m - 1)[0]
        yhat = theta @ f
        best = int(yhat.argmin())
        p = 1 / (d + eta * (yhat - yhat[best]))
        p[best] = 0
        p[best] = 1 - p.sum()
        total = np.cumsum(p)
        i = int(np.searchsorted(total, rng.random() * total[-1], "right"))
        phi.append(f)
        played.append(i)
        losses.append(losses_of(c, i))
        predicted.append(yhat[i])
        y = np.array(losses)
        K, spread = y.max(), y.max() - y.min()
        N = 2 + 4 * spread / K * (1 + np.log(m))
        changed, scale = scale != K * N, K * N
        ub = np.maximum([1 / N, *(2 * spread / (scale * np.arange(1, m)))], 1e-12)
        rest = 0.0
        for arm in range(d):
            rows = np.array(played) == arm
            if not rows.any() or not (changed or arm == i):
                continue
            F, target = np.array(phi)[rows], (y[rows] - 1) / scale
            theta[arm] = np.linalg.lstsq(F, target, rcond=1e-7)[0]
            bounded = (np.abs(theta[arm]) > ub).any()
            if bounded:
                theta[arm] = lsq_linear(F, target, (-ub, ub), tol=1e-14, method="bvls").x
            if arm == i:
                rest = np.sum((F @ theta[arm] - target) ** 2) if bounded else 0.0
        alpha = (np.pi + 2 / np.pi * np.log(2 * m + 1)) / (2 * scale * (m + 1)) * spread
        R = np.sum((np.array(predicted) - y / scale) ** 2)
        eta = 2 * t * np.sqrt(d * t / max(R - rest + 2 * alpha**2 * t, 1e-12))
        etas.append(eta)
    return played, theta * scale, etas


def test_chebcb_follows_the_algorithm():
    """Draws agree one by one, and so do the fits where the data determine them."""
    contexts = np.random.default_rng(1).random(150)

    def price(c, i):
        return round(15 + 40 * (i / 5 - c) ** 2 + 5 * np.cos(9 * c))

    grid = np.linspace(1, 1.9, 6)
    bandit = ChebCB(grid, 0, 1, degree=3, random_state=2)
    mine, etas = [], []
    for c in contexts:
        omega = bandit.predict(c)
        mine.append(int(np.argmin(np.abs(grid - omega))))
        bandit.update(price(c, mine[-1]))
        etas.append(bandit.state_dict()["eta"])
    played, theta, expected = slow_chebcb(6, 4, np.random.default_rng(2), contexts, price)
    assert mine == played
    # While an ω has fewer trials than coefficients its bounded fit is not unique.
    np.testing.assert_allclose(etas, expected, rtol=2e-3)
    grid_points = chebyshev.chebvander(np.linspace(-1, 1, 9), 3)
    np.testing.assert_allclose(
        grid_points @ bandit.state_dict()["theta"].T, grid_points @ theta.T, atol=1e-3
    )


def test_wider_bounds_reach_every_fit():
    """Costs that grow widen the bounds of all: each fit is the best within the present ones."""
    bandit, rng = ChebCB([1.0, 1.3, 1.6], degree=3, random_state=0), np.random.default_rng(3)
    history = {w: ([], []) for w in bandit.grid}
    costs = []
    for t in range(40):
        c = 0.05 * rng.random()  # close together: the free fits are wild
        omega, cost = bandit.predict(c), float(1 + rng.integers(1, 5 + 10 * t))
        bandit.update(cost)
        costs.append(cost)
        history[omega][0].append(chebyshev.chebvander(2 * c - 1, 3)[0])
        history[omega][1].append(cost - 1)
        bounds = np.array([max(costs), *(2 * np.ptp(costs) / np.arange(1, 4))])
        bounds = np.maximum(bounds, 1e-9)
        for omega, theta in zip(bandit.grid, bandit.state_dict()["theta"], strict=True):
            F, y = map(np.array, history[omega])
            if len(F):
                best = lsq_linear(F, y, (-bounds, bounds), method="bvls", tol=1e-14).cost
                assert 0.5 * np.sum((F @ theta - y) ** 2) <= best + 1e-6 * (1 + y @ y)
    assert bandit.state_dict()["bounded"].any()


def test_context_pays():
    contexts, totals = np.random.default_rng(7).random(1500), {}
    for name, bandit in (
        ("none", TsallisINF(random_state=0)),
        ("binned", BinnedTsallisINF(low=0, high=1, random_state=0)),
        ("chebcb", ChebCB(low=0, high=1, random_state=0)),
    ):
        total = 0.0
        for c in contexts:
            loss = 10 + 400 * (bandit.predict(c) - 1.1 - 0.7 * c) ** 2
            bandit.update(loss)
            total += loss
        totals[name] = total / 1500
    assert totals["chebcb"] < 0.7 * totals["binned"] < 0.7 * totals["none"]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 6), st.floats(0.02, 3), st.integers(0, 10**6))
def test_bounded_fit_is_the_best(rows, m, size, seed):
    rng = np.random.default_rng(seed)
    F, y = chebyshev.chebvander(rng.uniform(-1, 1, rows), m - 1), rng.standard_normal(rows)
    bounds = size / np.arange(1, m + 1)
    free = np.linalg.lstsq(F, y, rcond=1e-6)[0]
    best = lsq_linear(F, y, (-bounds, bounds), method="bvls", tol=1e-14).cost
    for start in (None, bounds * rng.uniform(-1, 1, m), bounds * rng.choice([-1, 0, 1], m)):
        theta, bounded = bounded_fit(F.T @ F, F.T @ y, bounds, start)
        assert (np.abs(theta) <= bounds * (1 + 1e-12)).all()
        assert 0.5 * np.sum((F @ theta - y) ** 2) <= best + 1e-7 * (1 + y @ y)
        if np.abs(np.abs(free) / bounds - 1).min() > 1e-3:
            assert bounded == (np.abs(free) > bounds).any()


@pytest.mark.parametrize("make", POLICIES)
def test_state_and_pickle_go_on_alike(make):
    def play(bandit, rounds, start=0):
        chosen = []
        for t in range(start, start + rounds):
            chosen.append(bandit.predict(0.37 * t % 1))
            bandit.update(5 + 30 * abs(chosen[-1] - 1.5))
        return chosen

    bandit = make(random_state=4)
    play(bandit, 50)
    state, frozen, twin = bandit.state_dict(), pickle.dumps(bandit), copy.deepcopy(bandit)
    expected = play(bandit, 50, 50)
    other = make(random_state=99)
    other.load_state_dict(state)
    for again in (other, pickle.loads(frozen), twin):  # noqa: S301 - our own bytes
        assert play(again, 50, 50) == expected
        np.testing.assert_array_equal(again.probabilities_, bandit.probabilities_)
    json.dumps(state, default=lambda x: x.tolist())
    with pytest.raises(ValueError, match="another grid"):
        make([1.0, 1.5]).load_state_dict(state)
    del state["random_state"]
    with pytest.raises(KeyError, match="random_state"):
        other.load_state_dict(state)


@pytest.mark.parametrize("make", POLICIES)
def test_order_of_calls_and_losses(make):
    bandit = make(random_state=0)
    with pytest.raises(RuntimeError, match="predict before"):
        bandit.update(3)
    omega = bandit.predict(0.5)
    assert omega in bandit.grid
    assert bandit.probabilities_ == pytest.approx(1 / 20)
    for loss in (0, 0.5, -1, np.nan, np.inf):
        with pytest.raises(ValueError, match="loss"):
            bandit.update(loss)
    bandit.update(3)
    with pytest.raises(RuntimeError, match="predict before"):
        bandit.update(3)


@pytest.mark.parametrize("make", POLICIES)
@pytest.mark.parametrize("loss", [1, 7])
def test_equal_losses_and_a_single_action(make, loss):
    bandit, single = make(random_state=0), make([1.3], random_state=0)
    for _ in range(60):
        bandit.predict(0.2)
        bandit.update(loss)
        assert single.predict(0.2) == 1.3
        single.update(loss)
        assert np.isfinite(bandit.probabilities_).all()
        assert bandit.probabilities_.sum() == pytest.approx(1)
        assert (bandit.probabilities_ >= 0).all()


@pytest.mark.parametrize("make", [BinnedTsallisINF, ChebCB])
def test_contexts(make):
    bandit = make(low=-1, high=1, random_state=0)
    with pytest.raises(ValueError, match="needs a context"):
        bandit.predict()
    with pytest.raises(ValueError, match="NaN"):
        bandit.predict(float("nan"))
    with pytest.warns(RuntimeWarning, match="outside"):
        bandit.predict(1.5)
    with pytest.raises(ValueError, match="low must be below"):
        make(low=1, high=1)
    assert bandit.predict(torch.tensor(0.3)) in bandit.grid


def test_bins_are_those_of_the_nearest_centre():
    bandit = BinnedTsallisINF(low=-1, high=3, bins=4, random_state=0)
    centres = np.array([-0.5, 0.5, 1.5, 2.5])
    for c in np.linspace(-1, 3, 37):
        bandit.predict(c)
        distance = np.abs(centres - c)
        assert distance[bandit.state_dict()["bin"]] == pytest.approx(distance.min())
    with pytest.raises(ValueError, match="bins"):
        BinnedTsallisINF(bins=0)


def test_bad_grids():
    for grid, match in (
        ([], "grid"), ([1.0, 2.0], "omega"), ([0.0], "omega"), ([1.0, np.nan], "finite"),
        ([[1.0]], "grid"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            TsallisINF(grid)
    with pytest.raises(ValueError, match="degree"):
        ChebCB(degree=-1)


def test_draws_follow_the_probabilities():
    bandit = TsallisINF([1.0, 1.2, 1.4], random_state=0)
    bandit.predict()
    bandit.update(10)
    seen = [bandit.predict() for _ in range(4000)]
    share = [seen.count(w) / 4000 for w in bandit.grid]
    np.testing.assert_allclose(share, bandit.probabilities_, atol=0.03)
    assert np.ptp(bandit.probabilities_) > 0.1
