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

from stiefel.linalg import haar
from stiefel.papers import Scale, UnavailableError, get, online_dictionary_runs
from stiefel.papers.online_dictionary import PAPER, SPARSE


@pytest.fixture(scope="module")
def measurement():
    return check_smoke("online-dictionary", race=False, seconds=10)


def quiet(fraction, message):
    pass


def test_listing_is_cheap():
    check_listing_is_cheap("online_dictionary")


def test_metrics_are_those_of_the_series(measurement):
    m, s = measurement.metrics, measurement.series
    assert m["recovery_error"] == s["error"][-1]
    rates = [g * t**0.25 / math.log(t) for t, g in zip(s["gap steps"], s["gap"], strict=True)]
    assert m["gap_over_rate"] == max(rates)
    differences = np.subtract(s["psnr online 4"], s["psnr random"])
    assert m["patches_above_random"] == pytest.approx(differences.min())
    assert m["patches_below_offline"] == pytest.approx(
        np.subtract(s["psnr offline"], s["psnr online 4"]).max()
    )
    assert m["patches_above_pca"] == pytest.approx(s["psnr online 4"][0] - s["psnr pca"][0])
    assert m["digits_to_pca"] == pytest.approx(m["digits_online_4"] / m["digits_pca"])
    assert all(len(c) > 0 for c in measurement.config["sha256"].values())


def test_a_small_dictionary_is_recovered():
    config = {**SPARSE, "n": 20, "batch": 10, "steps": 1000, "seed": 0}
    course = online_dictionary_runs.recover(config, quiet)
    assert course["error"][0] > 0.3
    assert course["error"][-1] < 0.002  # the sheet: .00096
    slow = online_dictionary_runs.recover({**config, "powers": {"step_power": 1.0}}, quiet)
    assert slow["error"][-1] > 3 * course["error"][-1]


def test_samples_are_sparse_in_the_dictionary():
    generator = torch.Generator().manual_seed(0)
    d = haar(30, generator=generator, dtype=torch.float64)
    x = d.mT @ online_dictionary_runs.sparse_batch(d, 0.1, 500, generator)
    share = float((x.abs() > 1e-10).double().mean())
    assert share == pytest.approx(0.1, abs=0.01)
    assert float(x[x.abs() > 1e-10].std()) == pytest.approx(1, abs=0.08)


def test_patches_of_both_sides_are_apart_and_have_no_mean():
    train, checksum = online_dictionary_runs.patches(200, True, 0)
    test, same = online_dictionary_runs.patches(200, False, 0)
    assert train.shape == test.shape == (200, 64)
    assert checksum == same
    np.testing.assert_allclose(train.mean(1), 0, atol=1e-12)
    assert not (train[:, None] == test[None]).all(-1).any()
    again, other = (online_dictionary_runs.patches(200, True, s)[0] for s in (0, 1))
    np.testing.assert_array_equal(again, train)
    assert not np.array_equal(other, train)


def test_bases_and_errors():
    dct = online_dictionary_runs.square_dct()
    np.testing.assert_allclose(dct @ dct.T, np.eye(64), atol=1e-12)
    x = np.random.default_rng(0).standard_normal((50, 64)) * np.linspace(1, 3, 64)
    codes = np.sort(np.square(x @ dct.T), axis=1)
    expected = [codes[:, : 64 - k].sum() for k in online_dictionary_runs.KEPT]
    np.testing.assert_allclose(online_dictionary_runs.squared_error(dct, x), expected)
    axes = online_dictionary_runs.principal(x)
    variances = np.square(x @ axes.T).sum(0)
    assert (np.diff(variances) <= 1e-9).all()


def test_sheet_values_of_the_digits(measurement):
    """DCT and pixels need no learning: .452 and .893 at two coefficients, any split near it."""
    assert measurement.metrics["digits_dct"] == pytest.approx(0.452, abs=0.02)
    assert measurement.metrics["digits_pixels"] == pytest.approx(0.893, abs=0.01)


def test_claims_follow_the_measurements(measurement):
    check_claims_follow_the_measurements("online-dictionary", measurement)


def test_figure_draws_the_bound_of_theory(measurement):
    figure = check_figure("online-dictionary", measurement)
    steps = np.asarray(measurement.series["gap steps"])
    bound = np.log(steps) / steps**0.25
    drawn = [np.asarray(line.get_ydata()) for line in figure.axes[1].lines]
    assert any(len(y) == len(bound) and np.allclose(y, bound) for y in drawn)


def test_snippet_runs():
    scope = check_snippet("online-dictionary")
    assert (np.count_nonzero(scope["codes"], axis=1) == 4).all()
    assert scope["learner"].n_steps_ == 50


def test_metadata():
    paper = get("online-dictionary")
    assert (paper.arxiv, paper.published, paper.topic) == ("2103.01484", "2021-03", "numerics")
    assert [claim.bound for claim in paper.claims] == [
        0.002, 1.0, 0.92, 0.70, 1.05, 0.10, 1.4, 0.0, 4.0, 20.0,
    ]  # fmt: skip


def test_paper_scale_is_refused_without_its_data(monkeypatch, tmp_path):
    monkeypatch.delenv("STIEFEL_DATA", raising=False)
    with pytest.raises(UnavailableError, match="STIEFEL_DATA"):
        get("online-dictionary").experiment(Scale.PAPER, 0, None)
    monkeypatch.setenv("STIEFEL_DATA", str(tmp_path))
    with pytest.raises(UnavailableError, match=r"data\.txt"):
        get("online-dictionary").experiment(Scale.PAPER, 0, None)
    assert {c["n"] for c in PAPER["sparse"]} == {64, 128, 256}
    assert all(c["batch"] * c["steps"] == 100_000 for c in PAPER["sparse"])


def test_sensors_are_read_as_their_page_describes(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    values = rng.normal(20, 3, (2, 150))
    lines = [
        f"2004-02-28 00:59:16.02785 {epoch} {mote} {values[mote - 1, epoch]:.4f} 37.1 45.1 2.7"
        for epoch in rng.permutation(150)
        for mote in (1, 2)
    ]
    lines[3:3] = [
        "2004-02-28 00:59:16.02785 7 1 122.153 -3.9 11.04 2.03",
        "2004-02-28 00:59:16.02785 7 1",
    ]
    path = tmp_path / "intel-lab" / "data.txt"
    path.parent.mkdir()
    path.write_text("\n".join(lines) + "\n", encoding="ascii")
    windows = online_dictionary_runs.sensor_windows(path)
    assert windows.shape == (4, 64)
    np.testing.assert_allclose(windows[1], values[0, 64:128], atol=1e-4)
    np.testing.assert_allclose(windows[2], values[1, :64], atol=1e-4)
    monkeypatch.setenv("STIEFEL_DATA", str(tmp_path))
    found = online_dictionary_runs.sensors({"seed": 0, "batch": 2}, quiet)
    assert set(found["error"]) == {"dct", "pca", "online 4"}
    assert all(0 <= e <= 1 for e in found["error"]["online 4"])
    path.write_text("\n".join(lines[:20]) + "\n", encoding="ascii")
    with pytest.raises(ValueError, match="no mote with 64 readings"):
        online_dictionary_runs.sensor_windows(path)
