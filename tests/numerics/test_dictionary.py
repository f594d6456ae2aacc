"""Frank–Wolfe over the spectral ball: the sheet's exact numbers, identities, errors."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.linalg import dct_matrix, haar, polar
from stiefel.numerics import (
    DictionaryState,
    NoGradientWarning,
    frank_wolfe_gap,
    fw_step,
    fw_update,
    linear_oracle,
    power_gradient,
    recovery_error,
    start_dictionary,
)


def sheet_batch(t):
    i, j = torch.arange(3.0).double()[:, None], torch.arange(5.0).double()[None]
    return torch.sin(1.7 * (i + 1) * (j + 1) + 0.9 * t * (i + 1) ** 2 + j**2)


def sheet_states(p, steps=6):
    state, found = start_dictionary(3, torch.eye(3, dtype=torch.float64)), []
    for t in range(1, steps + 1):
        state = fw_step(state, sheet_batch(t), p)
        found.append(state)
    return found


def close(found, expected, atol=6e-11):
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=atol
    )


def test_exact_values_p3():
    close(sheet_batch(1)[0], [0.5155013718, -0.8322674422, -0.5440211109, -0.8371417780,
                              0.2640885214])  # fmt: skip
    states = sheet_states(3)
    first, last = states[0], states[-1]
    close(first.A, [[0.9989268573, -0.0125864796, 0.0445725739],
                    [0.0149387694, 0.9984912053, -0.0528407625],
                    [-0.0438402439, 0.0534499163, 0.9976077082]])  # fmt: skip
    close(states[1].A[0], [0.9942391690, -0.0367804794, 0.0908816584])
    close(last.A, [[0.9871825123, -0.0325501729, 0.1509314214],
                   [0.0628995638, 0.9779742207, -0.1889552700],
                   [-0.1409853594, 0.1964655916, 0.9677878058]])  # fmt: skip
    close(last.A.sum(), 2.9807503133)
    close(torch.linalg.svdvals(first.G), [1.9507515345, 0.8899816631, 0.4975122328])
    close(torch.linalg.svdvals(last.G), [1.6074573298, 1.3339611610, 0.7977731745])
    assert last.t == 6


def test_exact_values_p4():
    states = sheet_states(4)
    close(states[0].A[0], [0.9981197133, -0.0347777367, 0.0504732300])
    close(states[-1].A[0], [0.9507913483, -0.0952413365, 0.2773469213])
    close(states[-1].A.sum(), 2.9719171020)
    close(polar(states[-1].A)[0], [0.9553912681, -0.1004914575, 0.2777210682])


def twin(a, g, t, y, p, step_power, averaging_power):
    """The sheet's lines in NumPy, entry by entry where it matters."""
    z = a @ y
    gradient = np.zeros_like(a)
    for b in range(y.shape[1]):
        gradient += p * np.outer(np.abs(z[:, b]) ** (p - 2) * z[:, b], y[:, b]) / y.shape[1]
    rho, gamma = min(1, t**-averaging_power), min(1, t**-step_power)
    g = (1 - rho) * g + rho * gradient
    u, _, vt = np.linalg.svd(g)
    return a + gamma * (u @ vt - a), g


@given(
    p=st.sampled_from([3, 4, 2.5, 5.0]),
    step_power=st.floats(0, 1),
    averaging_power=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
@settings(max_examples=15, deadline=None)
def test_agrees_with_the_obvious_twin_and_stays_in_the_ball(p, step_power, averaging_power, seed):
    generator = torch.Generator().manual_seed(seed)
    state = start_dictionary(4, generator=generator)
    a, g = state.A.numpy(), state.G.numpy()
    for t in range(1, 6):
        y = torch.randn(4, 7, generator=generator, dtype=torch.float64)
        state = fw_step(state, y, p, step_power=step_power, averaging_power=averaging_power)
        a, g = twin(a, g, t, y.numpy(), p, step_power, averaging_power)
        np.testing.assert_allclose(state.A, a, atol=1e-9)
        np.testing.assert_allclose(state.G, g, atol=1e-9)
        assert float(torch.linalg.matrix_norm(state.A, 2)) <= 1 + 1e-12


@pytest.mark.parametrize("p", [3, 4, 2.7])
def test_gradient_is_that_of_the_norm(p):
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(5, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    ((a @ y).abs().pow(p).sum() / 6).backward()
    torch.testing.assert_close(power_gradient(a.detach(), y, p), a.grad)


def test_ranks_may_share_a_batch():
    generator = torch.Generator().manual_seed(2)
    state = start_dictionary(6, generator=generator)
    y = torch.randn(6, 30, generator=generator, dtype=torch.float64)
    parts = [power_gradient(state.A, part, 4) for part in y.split(10, dim=1)]
    together = fw_update(state, torch.stack(parts).mean(0))
    torch.testing.assert_close(together.A, fw_step(state, y, 4).A)


def test_dictionaries_side_by_side_are_as_alone():
    generator = torch.Generator().manual_seed(3)
    many = start_dictionary(5, batch=(2, 3), generator=generator)
    assert many.A.shape == (2, 3, 5, 5)
    torch.testing.assert_close(
        many.A @ many.A.mT, torch.eye(5, dtype=torch.float64).expand(2, 3, 5, 5)
    )
    alone = DictionaryState(many.A[1, 2], many.G[1, 2], 0)
    for _ in range(4):
        y = torch.randn(2, 3, 5, 8, generator=generator, dtype=torch.float64)
        many, alone = fw_step(many, y), fw_step(alone, y[1, 2])
    torch.testing.assert_close(many.A[1, 2], alone.A)


def test_nothing_is_modified_and_the_scale_of_all_data_does_not_matter():
    state = start_dictionary(3, "dct")
    kept = [x.clone() for x in state[:2]]
    small = state
    for t in range(1, 5):
        after, small = fw_step(state, sheet_batch(t)), fw_step(small, 1e-3 * sheet_batch(t))
        if t == 1:
            assert torch.equal(state.A, kept[0])
            assert torch.equal(state.G, kept[1])
        state = after
    torch.testing.assert_close(small.A, state.A)


def test_oracle_reaches_the_nuclear_norm_and_nothing_in_the_ball_does_better():
    generator = torch.Generator().manual_seed(4)
    g = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    nuclear = torch.linalg.svdvals(g).sum()
    torch.testing.assert_close((linear_oracle(g) * g).sum(), nuclear)
    for _ in range(20):
        other = haar(6, generator=generator, dtype=torch.float64)
        assert (other * g).sum() < nuclear


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spectrum", ["gaussian", "singular", "wide", "zero"])
def test_inexact_oracle_keeps_its_promise(dtype, spectrum):
    generator = torch.Generator().manual_seed(5)
    g = torch.randn(3, 24, 24, generator=generator, dtype=torch.float64)
    if spectrum == "singular":  # what centred samples give
        g = g - g.mean(-1, keepdim=True)
    elif spectrum == "wide":
        u, _, v = torch.linalg.svd(g)
        g = u * torch.logspace(0, -2.5, 24, dtype=torch.float64) @ v
    elif spectrum == "zero":
        g[1] = 0
    s = linear_oracle(g.to(dtype), "newton-schulz").double()
    nuclear = torch.linalg.svdvals(g).sum(-1)
    assert ((s * g).sum((-2, -1)) >= (1 - 1e-3) * nuclear - 1e-12).all()
    assert (torch.linalg.matrix_norm(s, 2) <= 1 + 1e-6).all()


def test_inexact_oracle_hands_over_what_it_cannot_prove():
    # 63 singular values that the polynomial leaves below one and that together still count.
    d = torch.full((64,), 3e-5, dtype=torch.float64)
    d[0] = 1.0
    fine = linear_oracle(torch.stack([d.diag(), torch.eye(64).double()]), "newton-schulz")
    torch.testing.assert_close(fine[0], torch.eye(64).double())
    torch.testing.assert_close(fine[1], torch.eye(64).double())


def test_gap_is_zero_at_stationary_points_and_positive_elsewhere():
    generator = torch.Generator().manual_seed(6)
    y = torch.randn(8, 400, generator=generator, dtype=torch.float64)
    a = haar(8, generator=generator, dtype=torch.float64)
    assert frank_wolfe_gap(a, y, 4) > 0.1
    assert frank_wolfe_gap(0.3 * a, y, 3) > 0
    for _ in range(3000):
        a = polar(power_gradient(a, y, 4))
    assert abs(float(frank_wolfe_gap(a, y, 4))) < 1e-6


def test_recovery_error_does_not_see_order_and_signs():
    generator = torch.Generator().manual_seed(7)
    d = haar(9, generator=generator, dtype=torch.float64)
    signs = torch.randint(0, 2, (9, 1), generator=generator) * 2.0 - 1
    permuted = signs * d.mT[torch.randperm(9, generator=generator)]
    close(recovery_error(3 * permuted, d), 0.0, atol=1e-12)
    a = torch.randn(9, 9, generator=generator, dtype=torch.float64)
    turned = signs * a[torch.randperm(9, generator=generator)]
    torch.testing.assert_close(recovery_error(turned, d), recovery_error(a, d))
    # All products ±1/√n: the farthest there is.
    hadamard = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
    close(recovery_error(hadamard, torch.eye(2, dtype=torch.float64)), 0.5, atol=1e-12)


@pytest.mark.parametrize("oracle", ["svd", "newton-schulz"])
def test_recovers_a_sparse_dictionary(oracle):
    """The sheet's row n = 20, θ = 0.1, B = 10: .00096 after 1,000 steps."""
    generator = torch.Generator().manual_seed(8)
    d = haar(20, generator=generator, dtype=torch.float64)
    state = start_dictionary(20, generator=generator)
    early = None
    for t in range(600):
        x = torch.randn(20, 10, generator=generator, dtype=torch.float64)
        x *= torch.rand(20, 10, generator=generator) < 0.1
        state = fw_step(state, d @ x, polar=oracle)
        if t == 20:
            early = float(recovery_error(state.A, d))
    assert early > 0.1
    assert float(recovery_error(state.A, d)) < 0.004


@pytest.mark.parametrize("rank", [2, 7])
def test_a_singular_gradient_moves_the_dictionary_least(rank):
    """Of all maximisers the closest to A: on the null space nothing turns."""
    generator = torch.Generator().manual_seed(9)
    state = start_dictionary(8, generator=generator)
    basis = haar(8, generator=generator, dtype=torch.float64)
    inside = basis[:, :rank] @ torch.randn(rank, 30, generator=generator, dtype=torch.float64)
    g = power_gradient(state.A, inside, 4)
    s = fw_step(state, inside, 4).A
    torch.testing.assert_close((s * g).sum(), torch.linalg.svdvals(g).sum())
    u, _, vh = torch.linalg.svd(g)
    left, right = u[:, rank:], vh[rank:]
    closest = left @ polar(left.mT @ state.A @ right.mT) @ right
    torch.testing.assert_close(left @ (left.mT @ s), closest, atol=1e-2, rtol=0)


def test_float32_follows_float64():
    states = [start_dictionary(3, "dct", dtype=t) for t in (torch.float32, torch.float64)]
    for t in range(1, 9):
        states = [fw_step(s, sheet_batch(t).to(s.A.dtype)) for s in states]
    assert states[0].A.dtype == torch.float32
    torch.testing.assert_close(states[0].A.double(), states[1].A, atol=1e-4, rtol=0)


def test_counter_may_be_a_tensor():
    plain = start_dictionary(3, "dct")
    tensor = DictionaryState(plain.A, plain.G, torch.tensor(0))
    for t in range(1, 5):
        plain, tensor = fw_step(plain, sheet_batch(t)), fw_step(tensor, sheet_batch(t))
    torch.testing.assert_close(tensor.A, plain.A)
    assert int(tensor.t) == plain.t == 4


def test_one_graph_under_compile():
    script = Path(__file__).with_name("dictionary_compiled.py")
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert run.stdout.strip() == "one graph", run.stderr


def test_start():
    close(start_dictionary(4, "dct").A, dct_matrix(4, dtype=torch.float64).tolist(), atol=1e-15)
    given_matrix = torch.tensor([[2.0, 0.0], [0.0, -3.0]])
    state = start_dictionary(2, given_matrix)
    close(state.A, [[1.0, 0.0], [0.0, -1.0]])
    assert (state.t, float(state.G.abs().sum())) == (0, 0.0)
    for bad, error, match in (
        ({"n": 0}, ValueError, "n must be at least 1"),
        ({"n": 2, "init": "haar"}, ValueError, "init must be"),
        ({"n": 2, "init": torch.eye(3)}, ValueError, r"init must be \[..., 2, 2\]"),
        ({"n": 2, "init": torch.full((2, 2), math.nan)}, ValueError, "init must be finite"),
        ({"n": 2, "dtype": torch.float16}, TypeError, "dtype must be"),
    ):
        with pytest.raises(error, match=match):
            start_dictionary(**bad)


def test_batches_without_a_gradient_change_nothing():
    state = fw_step(start_dictionary(3, "dct"), sheet_batch(1))
    for y in (torch.zeros(3, 4), torch.full((3, 4), 1e-200)):
        with pytest.warns(NoGradientWarning, match="nothing was learned"):
            after = fw_step(state, y.double())
        assert after.t == 1
        assert torch.equal(after.A, state.A)
        assert torch.equal(after.G, state.G)
    two = DictionaryState(torch.stack([state.A] * 2), torch.stack([state.G] * 2), 1)
    after = fw_step(two, torch.stack([sheet_batch(2), torch.zeros(3, 5).double()]))
    torch.testing.assert_close(after.A[0], fw_step(state, sheet_batch(2)).A)
    assert torch.equal(after.A[1], state.A)
    assert torch.equal(after.G[1], state.G)


def test_bad_input():
    state, y = start_dictionary(3, "dct"), sheet_batch(1)
    for p in (2, 1, math.inf, math.nan):
        with pytest.raises(ValueError, match="p must be a finite number above 2"):
            fw_step(state, y, p)
    with pytest.raises(ValueError, match="at least one sample"):
        fw_step(state, y[:, :0])
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="Y must be finite"):
            fw_step(state, y.clone().fill_(bad))
    with pytest.raises(ValueError, match="powers of Y overflow"):
        fw_step(state, 1e200 * y)
    with pytest.raises(TypeError, match="both be float32 or both float64"):
        fw_step(state, y.float())
    for name in ("step_power", "averaging_power"):
        for value in (-0.1, 1.5, math.nan):
            with pytest.raises(ValueError, match=rf"{name} must be a number in \[0, 1\]"):
                fw_step(state, y, **{name: value})
    with pytest.raises(ValueError, match="D must be finite"):
        recovery_error(state.A, torch.full((3, 3), math.nan, dtype=torch.float64))
