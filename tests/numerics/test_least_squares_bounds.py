import math

import numpy as np
import pytest

from stiefel.numerics import (
    chernoff_rate,
    error_bound,
    fit_basis,
    instability_bound,
    orthonormal_polynomials,
    sample_design,
    samples_for_stability,
    solve_design,
)


def test_rate():
    assert chernoff_rate(0.5) == pytest.approx(0.15343, abs=5e-6)
    assert chernoff_rate(0.5) == pytest.approx(0.5 + 0.5 * math.log(0.5))


def test_enough_samples_are_enough_and_no_more():
    for m, delta, eta in ((1, 0.5, 0.1), (20, 0.5, 0.2), (50, 0.9, 0.01)):
        n = samples_for_stability(m, delta, eta)
        assert instability_bound(m, n, delta) <= eta
        assert n == m or instability_bound(m, n - 1, delta) > eta
        assert samples_for_stability(m, delta, eta, method="dpp-repeat") == m * n


def test_bounds_hold_for_designs():
    """λ_min < 1/2 in at most the share that is allowed; mean error of the stable ones bounded."""
    x = np.linspace(-1, 1, 500)
    basis = fit_basis(orthonormal_polynomials(x, 5))
    f = np.exp(2 * x)
    best = basis.project(f)
    rest = np.mean((f - basis.evaluate(orthonormal_polynomials(x, 5)) @ best) ** 2)
    rng = np.random.default_rng(0)
    for method, n in (("iid", 130), ("iid", 30), ("dpp-repeat", 15)):
        stable, ratios = 0, []
        for _ in range(300):
            design = sample_design(basis, n, method=method, generator=rng)
            if design.lambda_min >= 0.5:
                stable += 1
                fit = solve_design(basis, design, f[design.indices])
                ratios.append(1 + np.sum((fit.orthonormal - best) ** 2) / rest)
        if method == "iid":
            assert 1 - stable / 300 <= instability_bound(5, n)
        assert 1 < np.mean(ratios) <= error_bound(5, n, probability=stable / 300)
    assert error_bound(5, 10, 0.0) == 1.5


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: chernoff_rate(1), "delta"),
        (lambda: instability_bound(0, 3), "m and n"),
        (lambda: samples_for_stability(0), "m must be"),
        (lambda: samples_for_stability(3, eta=0), "eta"),
        (lambda: samples_for_stability(3, method="volume"), "'iid' or 'dpp-repeat'"),
        (lambda: error_bound(3, 0), "m and n"),
        (lambda: error_bound(3, 3, 1), "delta"),
        (lambda: error_bound(3, 3, probability=0), "probability"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
