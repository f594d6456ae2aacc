import numpy as np
import pytest
from card_checks import (
    check_claims_follow_the_measurements,
    check_figure,
    check_listing_is_cheap,
    check_smoke,
    check_snippet,
)
from scipy import sparse

from stiefel.numerics.sampled import SampledMatrix
from stiefel.papers import Scale, UnavailableError, get
from stiefel.papers import dequantized_linear_algebra_runs as runs
from stiefel.papers.dequantized_linear_algebra import LAPTOP

SLUG = "dequantized-linear-algebra"


@pytest.fixture(scope="module")
def measurement():
    return check_smoke(SLUG, race=False, seconds=10)


def test_listing_is_cheap():
    check_listing_is_cheap("dequantized_linear_algebra")


def test_metrics_are_those_of_the_series(measurement):
    m, s = measurement.metrics, measurement.series
    at = s["residual rows"].index(200.0)
    for name in ("patches", "text"):
        assert m[f"residual_{name}"] == s[f"residual {name} l2"][at] >= 1
        ratio = s[f"residual {name} l2"][at] / s[f"residual {name} uniform"][at]
        assert m[f"{name}_to_uniform"] == pytest.approx(ratio)
    measured, identity = np.array(s["gram measured"]), np.array(s["gram identity"])
    assert m["gram_off"] == pytest.approx(np.abs(measured / identity - 1).max())
    slope = np.polyfit(np.log(s["gram rows"]), np.log(measured), 1)[0]
    assert m["slope_off"] == pytest.approx(abs(slope + 0.5))
    assert m["query_speedup"] == pytest.approx(s["svd"][-1] / s["query"][-1])
    assert m["query_time_by_rows"] == pytest.approx(s["query"][-1] / s["query"][0])
    assert m["total_speedup"] < m["query_speedup"]
    assert m["recommend_acceptance_100"] > 0
    assert all(len(c) == 64 for c in measurement.config["sha256"].values())


def test_sheet_value_of_the_distance(measurement):
    assert measurement.metrics["distance_exact"] == pytest.approx(1564.53, abs=5e-3)


def test_what_the_card_says_of_its_limits(measurement):
    m = measurement.metrics
    assert m["residual_raw_uniform"] < m["residual_raw_l2"]
    assert m["residual_randomized_svd"] < m["residual_large"]
    bounds = [v for name, v in m.items() if "bound_to_trivial" in name]
    assert len(bounds) == 3
    assert min(bounds) >= 1
    notes = " ".join(get(SLUG).notes)
    assert "does not win" in notes
    assert "vacuous" in notes


@pytest.mark.parametrize("shape", [(200, 15), (15, 200)])
def test_exact_reference(shape):
    A = np.random.default_rng(0).standard_normal(shape)
    exact = runs.Exact(A)
    sigma2 = np.linalg.svd(A, compute_uv=False) ** 2
    assert exact.fro2 == pytest.approx(sigma2.sum())
    assert exact.best == pytest.approx(sigma2[runs.K :].sum())
    best = np.linalg.svd(A)[2][: runs.K].T
    assert exact.residual(best) == pytest.approx(1)
    V = np.linalg.qr(np.random.default_rng(1).standard_normal((shape[1], runs.K)))[0]
    assert exact.residual(V) == pytest.approx(np.linalg.norm(A - A @ V @ V.T) ** 2 / exact.best)
    gram = ((A.T @ A) ** 2).sum()
    expected = np.sqrt((sigma2.sum() ** 2 - gram) / 7) / sigma2.sum()
    assert exact.identity(7) == pytest.approx(expected)
    same = runs.Exact(sparse.csr_array(A))
    assert same.residual(V) == pytest.approx(exact.residual(V))


def test_length_beats_uniform_where_few_rows_are_long():
    rng = np.random.default_rng(0)
    A = rng.standard_normal((2000, 20)) * 0.01
    A[:40] = rng.standard_normal((40, 12)) @ rng.standard_normal((12, 20))
    found = runs.residuals(SampledMatrix(A), runs.Exact(A), (100,), 3, rng)
    assert found["l2"][0] < 0.7 * found["uniform"][0]


def test_patches_have_no_mean_and_are_those_of_the_picture():
    rng = np.random.default_rng(0)
    some, digest = runs.patches(500, rng)
    assert some.shape == (500, 192)
    np.testing.assert_allclose(some.mean(1), 0, atol=1e-12)
    raw, same = runs.patches(500, np.random.default_rng(0), centred=False)
    assert digest == same
    np.testing.assert_allclose(raw - raw.mean(1, keepdims=True), some, atol=1e-12)
    assert LAPTOP["rows"] == (427 - 7) * (640 - 7)


def test_identifiers_are_counted(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "left_out.py").write_text("never never never")
    words = [f"w{'a' * k}" for k in range(2, 30)]
    (tmp_path / "a.py").write_text(" ".join(words) + " waa waa ab")
    (tmp_path / "b.py").write_text(" ".join(words[:3]))
    found, digest = runs.identifiers(tmp_path)
    assert found.shape == (2, 28)
    counts = found.toarray()
    assert counts[0, 0] == 3  # the commonest comes first
    np.testing.assert_array_equal(counts.sum(1), [30, 3])
    assert len(digest) == 64
    with pytest.raises(UnavailableError, match="no source files"):
        runs.identifiers(tmp_path / "nothing")


def test_claims_follow_the_measurements(measurement):
    check_claims_follow_the_measurements(SLUG, measurement)


def test_figure_draws_theory_and_measurement(measurement):
    figure = check_figure(SLUG, measurement)
    drawn = [np.asarray(line.get_ydata()) for line in figure.axes[1].lines]
    for name in ("gram identity", "gram measured"):
        assert any(np.array_equal(y, measurement.series[name]) for y in drawn)


def test_snippet_runs():
    scope = check_snippet(SLUG)
    assert scope["V"].shape == (64, 10)


def test_metadata():
    paper = get(SLUG)
    assert (paper.arxiv, paper.published, paper.topic) == ("1910.06151", "2019-10", "numerics")
    assert [claim.bound for claim in paper.claims] == [
        1.15, 1.0, 0.75, 0.08, 0.10, 1.5, 0.03, 10.0, 1.12, 500.0, 3.0,
    ]  # fmt: skip


def test_paper_scale_reads_its_files_and_refuses_without(monkeypatch, tmp_path):
    monkeypatch.delenv("STIEFEL_DATA", raising=False)
    with pytest.raises(UnavailableError, match="STIEFEL_DATA"):
        get(SLUG).experiment(Scale.PAPER, 0, None)
    monkeypatch.setenv("STIEFEL_DATA", str(tmp_path))
    with pytest.raises(UnavailableError, match=r"ratings\.csv and .*rows\.npy"):
        get(SLUG).experiment(Scale.PAPER, 0, None)
    rng = np.random.default_rng(0)
    np.save(tmp_path / "rows.npy", rng.standard_normal((3000, 20)).astype(np.float32))
    lines = [
        f"{u},{i},{(u * i) % 5 + 0.5},1" for u in range(1, 41) for i in range(10, 40, 1 + u % 2)
    ]
    text = "userId,movieId,rating,timestamp\n" + "\n".join(lines)
    (tmp_path / "ratings.csv").write_text(text)
    table = runs.ratings(tmp_path / "ratings.csv")
    assert table.shape == (40, 30)
    assert table.nnz == len(lines)
    assert table.toarray()[2, 10] == (3 * 20) % 5 + 0.5  # user 3, item 20
    found = runs.large({"k": 3, "r": 60, "updates": 20, "accepted": 10}, rng)
    assert found["tall_updates_per_seconds"] > 0
    assert 0 < found["ratings_acceptance"] <= 1
