import importlib.util
import math

import numpy as np
import pytest
import torch
from card_checks import (
    check_claims_follow_the_measurements,
    check_figure,
    check_listing_is_cheap,
    check_smoke,
    check_snippet,
)

from stiefel.papers import Scale, UnavailableError, get, tensor_product_pde
from stiefel.papers import tensor_product_pde_runs as runs

SLUG = "tensor-product-pde"


@pytest.fixture(scope="module")
def measurement():
    return check_smoke(SLUG, race=False, seconds=20)


def test_what_does_not_depend_on_the_scale(measurement):
    m = measurement.metrics
    assert m["difference"] <= 1e-9
    assert m["residual"] <= 1e-12
    assert m["picture_error"] <= 1e-10
    assert m["picture_error_spsolve"] <= 1e-8
    assert 1 < m["peak_fields"] <= 6
    orders = [v for name, v in m.items() if name.startswith("order_") and "deviation" not in name]
    assert len(orders) == len(runs.NOMINAL) == 13


def test_the_matrix_is_the_seven_point_one():
    A = runs.cube(3).toarray()
    assert A[13, 13] == 96
    assert sorted(np.flatnonzero(A[13]).tolist()) == [4, 10, 12, 13, 14, 16, 22]
    assert A[13, 14] == A[13, 10] == A[13, 4] == -16
    np.testing.assert_array_equal(A, A.T)


def test_errors_are_those_known_on_the_unit_cube():
    """The sheet's figures, at sizes that a test can afford."""
    box = [1.0, 1.0, 1.0]
    for scheme, errors in {
        "fd2": [0.2125, 0.0519],
        "compact4": [0.0227, 0.00133],
        "compact6": [4.0e-3, 5.8e-5],
    }.items():
        found = [runs._difference_error(n, scheme, box) for n in (7, 15)]
        assert found == pytest.approx(errors, rel=2e-2)
    for degree, error in ((1, 0.0318), (2, 0.00437), (3, 0.00102), (4, 2.1e-4)):
        # These were taken at the Gauss points of the assembly, where the error is smaller.
        assert runs._spline_error(8, degree, box, degree + 1) == pytest.approx(error, rel=1e-2)
    fine = [runs._spline_error(8, 1, box, count) for count in (4, 7)]
    assert fine == pytest.approx([0.0379] * 2, rel=2e-3)
    assert runs._derivative_error(16, 4, 1, 0.0) == pytest.approx(3.85e-3, rel=1e-2)
    assert runs._derivative_error(16, 6, 1, 0.0) == pytest.approx(5.9e-4, rel=1e-2)
    assert runs._open_error(17) == pytest.approx(3.16e-3, rel=1e-2)
    assert runs._heat_error(8, box) == pytest.approx(4.19e-4, rel=1e-2)
    assert runs._heat_error(32, box) == pytest.approx(2.67e-5, rel=1e-2)


def test_observed_order():
    assert runs.observed([1.0, 5.0, 0.3125]) == 4


def test_iterations_do_not_grow_with_the_grid():
    counts = runs.iterations((15, 31), 10.0, 0)
    assert counts["preconditioned"] == pytest.approx([27, 28], abs=2)
    assert counts["plain"] == pytest.approx([94, 199], rel=0.05)


def test_without_pyamg_conjugate_gradients_stand_in(monkeypatch):
    found = importlib.util.find_spec

    def hide(name, *rest):
        return None if name == "pyamg" else found(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", hide)
    result = runs.against_iterative(10, 0, exact=True)
    assert "CG" in result["peer"]
    assert result["setup"] == 0
    assert 0 < result["solve"] < math.inf
    assert result["difference"] < 1e-9
    assert result["peer bytes"] > 2 * result["ours bytes"]


def test_peak_is_counted():
    x = torch.ones(1000, dtype=torch.float64)
    assert runs.peak_bytes(lambda: (x + 1) * 2 + 3) == pytest.approx(2 * x.nbytes, rel=0.1)


def test_claims_follow_the_measurements(measurement):
    check_claims_follow_the_measurements(SLUG, measurement)


def test_figure_draws_the_slopes_of_theory(measurement):
    figure = check_figure(SLUG, measurement)
    points, times = (np.array(measurement.series[k]) for k in ("points", "seconds"))
    drawn = [np.asarray(line.get_ydata()) for line in figure.axes[0].lines]
    slope = times[-1] * (points / points[-1]) ** (4 / 3)
    assert any(len(y) == len(slope) and np.allclose(y, slope) for y in drawn)


def test_snippet_runs():
    scope = check_snippet(SLUG)
    assert float((scope["solver"].apply(scope["u"]) - scope["f"]).abs().max()) < 1e-9


def test_metadata():
    paper = get(SLUG)
    assert (paper.arxiv, paper.published, paper.topic) == ("2606.25148", "2026-06-23", "numerics")
    assert [c.bound for c in paper.claims] == [
        1e-9, 1e-12, 100, 50, 10, 3, 2, 6, 4 / 3, 0.25, 1e-10, 20,
    ]  # fmt: skip
    check_listing_is_cheap("tensor_product_pde")
    assert tensor_product_pde.LAPTOP["direct"] <= 24


def test_paper_scale_needs_an_accelerator(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnavailableError, match="CUDA"):
        get(SLUG).experiment(Scale.PAPER, 0, None)
