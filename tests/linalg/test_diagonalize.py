import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.linalg import (
    IllConditionedError,
    fourier_noise,
    hippo_ptd,
    legs_transfer,
    ptd_diagonalize,
    spike_frequencies,
)
from stiefel.linalg.hippo import hippo_legs, legs_normal, transfer_function
from stiefel.linalg.hippo_ptd import blaschke

# The sheet's eigenvalues of LegS + t P Pᵀ at n = 8, Im ≥ 0.
EIGENVALUES = {
    0.1: (
        -0.9524537052 + 0.3275889677j,
        -1.4914923793 + 1.7867086771j,
        -2.8151134521 + 4.7228660800j,
        -11.1409404633 + 10.3175592703j,
    ),
    0.01: (
        -1.4349398468,
        -1.0533830404,
        -2.1927461025 + 1.4378503560j,
        -4.0905356182 + 3.6357390354j,
        -10.3125568357 + 4.7472695016j,
    ),
}


def legs(n):
    return hippo_legs(n)[0]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def check(result, a, tolerance=1e-12):
    """V diag(λ) V⁻¹ = A + E, unit columns, true κ and sizes."""
    a = a.to(result.E.dtype)
    norm = torch.linalg.matrix_norm(a, 2)
    product = (result.V * result.eigenvalues) @ result.V_inv
    wrong = torch.linalg.matrix_norm(product - (a + result.E), 2) / norm
    assert wrong <= tolerance
    assert result.residual == pytest.approx(float(wrong), rel=1e-6, abs=1e-15)
    columns = torch.linalg.vector_norm(result.V, dim=0)
    torch.testing.assert_close(columns, torch.ones_like(columns))
    assert result.kappa == pytest.approx(float(torch.linalg.cond(result.V)), rel=1e-6)
    size = torch.linalg.matrix_norm(result.E, 2) / norm
    assert result.backward_error == pytest.approx(float(size))
    order = result.eigenvalues.imag
    assert (order.diff() >= 0).all()


@pytest.mark.parametrize(("t", "kappa"), [(0.1, 13.482114), (0.01, 114.770512)])
def test_eigenvalues_of_order_8(t, kappa):
    lam, b, v, weights = hippo_ptd(8, t=t)
    expected = torch.tensor(EIGENVALUES[t], dtype=torch.complex128)
    torch.testing.assert_close(lam, expected, atol=1e-9, rtol=0)
    assert weights.tolist() == [1.0 if x.imag == 0 else 2.0 for x in expected]
    assert b.shape == lam.shape
    assert v.shape == (8, len(lam))
    assert ptd_diagonalize(legs(8), low_rank="legs", t=t).kappa == pytest.approx(kappa, abs=1e-5)


@pytest.mark.parametrize(
    ("n", "kappa", "rightmost", "kappa_3", "error"),
    [
        (16, 15.9000, -0.8576, 5.0955, 0.003127),
        (64, 18.1621, -0.7570, 5.5176, 0.000815),
        (256, 18.7868, -0.7033, 5.6291, 0.0002055),
    ],
)
def test_structured_perturbation_of_legs(n, kappa, rightmost, kappa_3, error):
    a = legs(n)
    found = ptd_diagonalize(a, low_rank="legs")
    assert found.kappa == pytest.approx(kappa, abs=1e-4)
    assert found.backward_error == pytest.approx(0.0785, abs=5e-5)
    assert float(found.eigenvalues.real.max()) == pytest.approx(rightmost, abs=1e-4)
    check(found, a)
    trace = -n * (n + 1) / 2 + 0.1 * n**2 / 2
    assert abs(found.eigenvalues.sum() - trace) <= 1e-9 * n**2
    if n < 256:
        assert ptd_diagonalize(a, low_rank="legs", t=0.3).kappa == pytest.approx(kappa_3, abs=1e-4)
    lam, b, v, weights = hippo_ptd(n)
    spectrum = legs_normal(n)[0].imag
    omega = torch.cat([torch.logspace(-3, 6, 901, dtype=torch.float64), spectrum, lam.imag])
    g = transfer_function(lam, b, v[0].clone(), omega, weights)
    assert float((g - 1 / (1 + 1j * omega)).abs().max()) == pytest.approx(error, rel=2e-3)
    torch.testing.assert_close(g, legs_transfer(n, omega, 0.1), atol=1e-10, rtol=0)


def test_norms_and_condition_numbers_of_legs_itself():
    for n, norm in ((16, 163.0336336437), (64, 2607.6512524100)):
        assert float(torch.linalg.matrix_norm(legs(n), 2)) == pytest.approx(norm, abs=1e-9)
    for n, kappa in ((4, 86.1), (8, 7.7e4)):
        v = torch.linalg.eig(legs(n)).eigenvectors
        assert float(torch.linalg.cond(v)) == pytest.approx(kappa, rel=1e-2)


def test_modulus_of_the_product():
    one, ten = blaschke(8, torch.tensor([1.0, 10.0], dtype=torch.float64)).abs().tolist()
    assert one == pytest.approx(1 / math.sqrt(65), abs=1e-12)
    assert one == pytest.approx(0.1240347346, abs=1e-9)
    assert ten == pytest.approx(0.7808688094, abs=1e-9)
    omega = torch.linspace(-3e5, 3e5, 101, dtype=torch.float64)
    exact = omega.abs() / (omega**2 + 300**2).sqrt()
    torch.testing.assert_close(blaschke(300, omega).abs(), exact, atol=1e-12, rtol=0)


@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 1.0])
def test_closed_form_is_that_of_the_dense_system(t):
    n = 12
    a, b = hippo_legs(n)
    p = b / math.sqrt(2)
    dense = (a + t * torch.outer(p, p)).to(torch.complex128)
    omega = torch.tensor([0.0, 0.3, -2.0, 17.0, 45.9, 300.0], dtype=torch.float64)
    eye = torch.eye(n, dtype=dense.dtype)
    resolvent = torch.linalg.inv(1j * omega[:, None, None] * eye - dense)
    found = (resolvent @ ((1 - t / 2) * b).to(dense.dtype))[:, 0]
    torch.testing.assert_close(found, legs_transfer(n, omega, t), atol=1e-12, rtol=0)
    if t == 0:
        inner = (resolvent @ p.to(dense.dtype)) @ p.to(dense.dtype)
        torch.testing.assert_close(inner, (1 - blaschke(n, omega)) / 2, atol=1e-12, rtol=0)


@given(st.integers(1, 60), st.floats(0.01, 0.99), st.floats(-1e4, 1e4))
@settings(max_examples=60, deadline=None)
def test_relative_error_keeps_its_bound(n, t, omega):
    omega = torch.tensor(omega, dtype=torch.float64)
    ratio = legs_transfer(n, omega, t) / legs_transfer(n, omega)
    assert float((ratio - 1).abs()) <= t / (2 - 2 * t) + 1e-12


def test_unscaled_error_is_largest_at_frequency_zero():
    lam, b, v, weights = hippo_ptd(16, t=0.2, scale_B=False)
    omega = torch.cat([torch.zeros(1), torch.logspace(-3, 4, 500)]).double()
    error = (transfer_function(lam, b, v[0].clone(), omega, weights) - 1 / (1 + 1j * omega)).abs()
    assert int(error.argmax()) == 0
    assert float(error[0]) == pytest.approx(0.2 / 1.8, abs=1e-12)


@pytest.mark.parametrize(
    ("n", "highest", "asymptotic"),
    [(16, 80.966, 81.487), (32, 325.426, 325.949), (64, 1303.274, 1303.797)],
)
def test_highest_spike(n, highest, asymptotic):
    assert n**2 / math.pi == pytest.approx(asymptotic, abs=1e-3)
    spikes = spike_frequencies(n, 1e-4) / 1e-4
    assert len(spikes) == n // 2
    assert float(spikes[-1]) == pytest.approx(highest, abs=1e-3)
    gap = (legs_transfer(n, spikes[-1:], 1.0) - legs_transfer(n, spikes[-1:])).abs()
    assert float(gap) == pytest.approx(2 / math.pi, abs=3e-3)


def test_spikes_above_nyquist_are_left_out():
    spikes = spike_frequencies(16, 0.03)
    assert float(spikes[-1]) == pytest.approx(2.4290, abs=1e-4)
    assert len(spike_frequencies(16, 0.05)) == 7
    assert (spikes.diff() > 0).all()


def test_kept_modes_and_weights_are_the_whole_real_system():
    """Also where eigenvalues are real: n = 8, t = 0.01 has two."""
    for n, t in ((1, 0.1), (2, 0.1), (7, 0.1), (8, 0.01), (16, 0.001), (16, 0.1), (9, 1.0)):
        lam, b, v, weights = hippo_ptd(n, t=t)
        assert float(weights.sum()) == n
        a, full = hippo_legs(n)
        p = full / math.sqrt(2)
        a = a + t * torch.outer(p, p)
        c = torch.randn(n, dtype=torch.float64, generator=generator())
        for time in (0.0, 0.01, 0.3):
            exact = c @ torch.linalg.matrix_exp(a * time) @ ((1 - t / 2) * full)
            found = (weights * (c.to(v.dtype) @ v) * b * (lam * time).exp()).real.sum()
            assert float(found) == pytest.approx(float(exact), abs=1e-7)


def test_t_1_is_the_normal_part():
    spectrum = legs_normal(16)[0]
    found = ptd_diagonalize(legs(16), low_rank="legs", t=1)
    torch.testing.assert_close(found.eigenvalues, spectrum, atol=1e-10, rtol=0)
    assert found.kappa == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize(
    ("rel", "kappa"), [(1e-5, (1e5, 2e6)), (1e-4, (2e4, 2e5)), (1e-3, (1e3, 2e4))]
)
def test_random_perturbation_of_legs(rel, kappa):
    a = legs(64)
    found = ptd_diagonalize(a, method="random", rel=rel, generator=generator(1))
    assert found.backward_error == pytest.approx(rel, rel=1e-9)
    assert kappa[0] < found.kappa < kappa[1]
    assert float(found.eigenvalues.real.max()) < 0
    check(found, a, tolerance=1e-9)
    again = ptd_diagonalize(a, method="random", rel=rel, generator=generator(1))
    assert torch.equal(again.E, found.E)
    assert not torch.equal(
        ptd_diagonalize(a, method="random", rel=rel, generator=generator(2)).E, found.E
    )


def test_larger_random_perturbations_are_unstable():
    for rel in (0.01, 0.1):
        with pytest.raises(RuntimeError, match=r"real part [0-9]"):
            ptd_diagonalize(legs(64), method="random", rel=rel, generator=generator())
    found = ptd_diagonalize(legs(64), method="random", rel=0.1, generator=generator(), stable=False)
    assert float(found.eigenvalues.real.max()) > 0
    assert found.kappa < 500


@pytest.mark.parametrize(("gamma", "kappa", "size"), [(100.0, 7.0, 0.0393), (1000.0, 14.7, 0.0157)])
def test_search_reaches_the_sheet_and_stays_stable(gamma, kappa, size):
    a = legs(16)
    found = ptd_diagonalize(a, method="optimize", gamma=gamma, low_rank="legs")
    assert found.kappa + gamma * found.backward_error < 1.05 * (kappa + gamma * size)
    assert float(found.eigenvalues.real.max()) < -0.5
    check(found, a)
    start = ptd_diagonalize(a, low_rank="legs")
    assert found.backward_error < start.backward_error
    # It does not look at the transfer function.
    b = found.V_inv @ hippo_legs(16)[1].to(found.V.dtype)
    ones = torch.ones_like(found.weights)
    omega = torch.logspace(-2, 3, 400, dtype=torch.float64)
    g = transfer_function(found.eigenvalues, b, found.V[0].clone(), omega, ones)
    assert float((g - 1 / (1 + 1j * omega)).abs().max()) > 0.05


def test_search_without_the_barrier_is_unstable():
    settings = {"method": "optimize", "generator": generator(), "max_iter": 150}
    found = ptd_diagonalize(legs(16), stable=False, gamma=100, **settings)
    assert float(found.eigenvalues.real.max()) > 0
    assert found.kappa < 30


def test_search_gives_up_on_a_matrix_that_grows():
    with pytest.raises(RuntimeError, match="real part 2"):
        ptd_diagonalize(
            torch.diag(torch.tensor([1.0, 2.0])),
            method="optimize",
            max_iter=3,
            generator=generator(),
        )


@given(st.integers(1, 12), st.booleans(), st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_any_square_matrix(n, is_complex, seed):
    dtype = torch.complex128 if is_complex else torch.float64
    a = torch.randn(n, n, dtype=dtype, generator=generator(seed))
    found = ptd_diagonalize(
        a, method="random", rel=1e-3, stable=False, max_kappa=1e6, generator=generator(seed)
    )
    check(found, a, tolerance=1e-9)
    assert found.E.dtype == dtype
    if is_complex:
        assert (found.weights == 1).all()
    else:
        assert float(found.weights.sum()) == n
        kept = found.weights > 0
        # Every real part of the full sum comes out of the kept half.
        whole = found.eigenvalues.exp().sum().real
        half = (found.weights * found.eigenvalues.exp())[kept].sum().real
        assert float(half) == pytest.approx(float(whole))


def test_a_defective_matrix():
    """A Jordan block has one eigenvector; perturbed by δ its eigenvalues lie at δ^(1/12)."""
    a = torch.diag(torch.ones(11, dtype=torch.float64), 1)
    found = ptd_diagonalize(a, method="random", rel=1e-3, stable=False, generator=generator())
    check(found, a, tolerance=1e-10)
    assert found.kappa < 1e4
    assert 0.3 < float(found.eigenvalues.abs().max()) < 1
    low_rank = torch.eye(12, dtype=torch.float64)[-1]
    with pytest.raises(IllConditionedError, match="condition number"):
        ptd_diagonalize(a, low_rank=low_rank, t=0.1, stable=False, max_kappa=1e3)


def test_condition_numbers_above_the_limit():
    with pytest.raises(IllConditionedError, match=r"at most 1e\+08 is"):
        ptd_diagonalize(legs(32), low_rank="legs", t=1e-9)
    found = ptd_diagonalize(legs(32), low_rank="legs", t=1e-9, max_kappa=math.inf, stable=False)
    assert found.kappa > 1e8
    with pytest.raises(IllConditionedError, match="at most 10 is allowed"):
        ptd_diagonalize(legs(8), low_rank="legs", max_kappa=10)


def test_rel_sets_the_size_of_a_structured_perturbation():
    found = ptd_diagonalize(legs(16), low_rank="legs", rel=0.02)
    assert found.backward_error == pytest.approx(0.02)
    p = hippo_legs(16)[1] / math.sqrt(2)
    ratio = found.E / torch.outer(p, p)
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio))
    given_p = ptd_diagonalize(legs(16), low_rank=p[:, None])
    torch.testing.assert_close(given_p.E, ptd_diagonalize(legs(16), low_rank="legs").E)


def test_low_rank_of_rank_two_and_complex():
    g = generator()
    skew = torch.randn(6, 6, dtype=torch.complex128, generator=g)
    normal = skew - skew.mH - torch.eye(6)
    p = torch.randn(6, 2, dtype=torch.complex128, generator=g)
    found = ptd_diagonalize(normal - p @ p.mH, low_rank=p, t=1)
    torch.testing.assert_close(found.eigenvalues.real, -torch.ones(6, dtype=torch.float64))
    assert found.kappa == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_work_is_done_in_double_precision(dtype):
    a = legs(8).to(dtype)
    found = ptd_diagonalize(a, low_rank="legs")
    assert found.E.dtype == torch.float64
    check(found, a.double())


def test_no_history_is_kept():
    a = legs(8).requires_grad_()
    assert not ptd_diagonalize(a, low_rank="legs").V.requires_grad


A2 = torch.eye(2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (ValueError, "square", {"A": torch.zeros(2, 3)}),
        (ValueError, "square", {"A": torch.zeros(0, 0)}),
        (ValueError, "finite", {"A": A2 * math.nan}),
        (TypeError, "floating point or complex", {"A": torch.eye(2, dtype=torch.int64)}),
        (ValueError, "method must be one of", {"method": "qr"}),
        (ValueError, "needs low_rank", {}),
        (ValueError, "rel must be in", {"rel": 0, "method": "random"}),
        (ValueError, "rel must be in", {"rel": 1.5, "method": "random"}),
        (ValueError, "t must be in", {"t": 0, "low_rank": "legs"}),
        (ValueError, "t must be in", {"t": math.nan, "low_rank": "legs"}),
        (ValueError, "gamma must be positive", {"gamma": -1, "method": "optimize"}),
        (ValueError, "max_iter", {"max_iter": 0, "method": "optimize"}),
        (ValueError, "max_kappa", {"max_kappa": 0.5, "method": "random"}),
        (ValueError, "A must not be zero", {"A": 0 * A2, "method": "optimize", "low_rank": A2}),
        (ValueError, "low_rank must be", {"low_rank": torch.ones(3)}),
        (ValueError, 'a tensor or "legs"', {"low_rank": "legt"}),
        (ValueError, "must not be zero", {"low_rank": torch.zeros(2)}),
        (ValueError, "low_rank must be finite", {"low_rank": torch.tensor([1.0, math.inf])}),
        (TypeError, "low_rank is complex", {"low_rank": torch.ones(2, dtype=torch.complex64)}),
        (TypeError, "complex A", {"A": A2.to(torch.complex64), "low_rank": "legs"}),
    ],
)
def test_bad_arguments(error, match, arguments):
    settings = dict(arguments)
    a = settings.pop("A", -A2)
    with pytest.raises(error, match=match):
        ptd_diagonalize(a, **settings)


def test_bad_arguments_of_the_rest():
    for call, error, match in (
        (lambda: hippo_ptd(8, kind="legt"), ValueError, "kind must be legs"),
        (lambda: hippo_ptd(0), ValueError, "n must be at least 1"),
        (lambda: hippo_ptd(8, t=1.1), ValueError, r"t must be in \(0, 1\]"),
        (lambda: legs_transfer(8, torch.ones(2), -0.1), ValueError, "t must be in"),
        (lambda: legs_transfer(8, torch.tensor([math.inf])), ValueError, "omega must be finite"),
        (lambda: blaschke(0, torch.ones(2)), ValueError, "n must be at least 1"),
        (lambda: spike_frequencies(8, 0), ValueError, "dt must be positive"),
        (lambda: fourier_noise(torch.ones(3), math.nan, 1), ValueError, "theta and amplitude"),
        (lambda: fourier_noise(torch.tensor(1.0), 1, 1), ValueError, "dimension for time"),
    ):
        with pytest.raises(error, match=match):
            call()


def test_fourier_noise_is_one_sinusoid_per_sequence():
    x = torch.zeros(5, 40, 2, dtype=torch.float64)
    noise = fourier_noise(x, 0.7, 0.3, generator(), dim=1)
    # A sinusoid obeys y[k+1] + y[k-1] = 2 cos θ y[k].
    left = noise[:, 2:] + noise[:, :-2]
    torch.testing.assert_close(left, 2 * math.cos(0.7) * noise[:, 1:-1])
    quadrature = (noise[:, 1:] - math.cos(0.7) * noise[:, :-1]) / math.sin(0.7)
    amplitude = (noise[:, :-1] ** 2 + quadrature**2).sqrt()
    torch.testing.assert_close(amplitude, torch.full_like(amplitude, 0.3))
    assert len(np.unique(noise[:, 0].numpy().round(9))) == 10
    flat = fourier_noise(torch.ones(4, 9), 0.7, 0.3, generator())
    assert flat.dtype == torch.float32
    assert flat.shape == (4, 9)
    again = fourier_noise(x, 0.7, 0.3, generator(), dim=1)
    assert torch.equal(again, noise)
