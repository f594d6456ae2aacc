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

from stiefel.papers import Scale, UnavailableError, get, ptd, ptd_measures, sequence_digits


@pytest.fixture(scope="module")
def measurement():
    return check_smoke("ptd", race=False, seconds=15)


def test_losses_are_those_of_the_accuracies(measurement):
    m = measurement.metrics
    for name in ("s4d", "ptd", "hippo"):
        lost = m[f"trained_clean_{name}"] - m[f"trained_spike_{name}"]
        assert m[f"trained_loss_{name}"] == pytest.approx(lost)
    # One split at this scale: worst and mean are the same.
    assert m["s4d_spike_loss"] == pytest.approx(m["accuracy_clean_s4d"] - m["accuracy_spike_s4d"])
    assert m["s4d_beside_loss"] == pytest.approx(m["accuracy_clean_s4d"] - m["accuracy_beside_s4d"])
    robust = [m[f"accuracy_clean_{n}"] - m[f"accuracy_spike_{n}"] for n in ("hippo", "ptd")]
    assert m["robust_spike_loss"] == pytest.approx(max(robust))
    assert m["ptd_clean_difference"] == pytest.approx(
        abs(m["accuracy_clean_ptd"] - m["accuracy_clean_hippo"])
    )


def test_features_tell_what_the_sheet_tells(measurement):
    """They are as in a full run but for the number of splits; so are their claims."""
    m = measurement.metrics
    assert m["s4d_spike_loss"] >= 0.40
    assert m["robust_spike_loss"] <= 0.03
    assert m["ptd_clean_difference"] <= 0.02
    assert m["s4d_clean_lead"] > 0.02
    assert m["accuracy_white_s4d"] < m["accuracy_clean_s4d"] - 0.1
    series = measurement.series
    worst = series["theta"][int(np.argmin(series["sweep s4d"]))]
    assert worst == pytest.approx(2.4290, abs=1e-4)
    assert worst == pytest.approx(series["resonances"][-1])


def test_worst_split_counts():
    def split(s4d, hippo, ptd):
        return {
            name: {"clean": 0.8, "spike": spike, "spike twice": 0.1, "beside": 0.7, "white": 0.5}
            for name, spike in (("s4d", s4d), ("hippo", hippo), ("ptd", ptd))
        }

    found = ptd._losses([split(0.3, 0.79, 0.8), split(0.1, 0.78, 0.75)])
    assert found["s4d_spike_loss"] == pytest.approx(0.5)
    assert found["robust_spike_loss"] == pytest.approx(0.05)
    assert found["s4d_beside_loss"] == pytest.approx(0.1)
    assert found["accuracy_spike_s4d"] == pytest.approx(0.2)


def test_theory_of_the_card_is_exact(measurement):
    m = measurement.metrics
    assert m["s4d_transfer_error"] == pytest.approx(0.6367, abs=1e-4)
    assert m["ptd_transfer_error"] == pytest.approx(0.003127, abs=1e-6)
    assert m["formula_difference"] < 1e-9
    errors = measurement.series
    np.testing.assert_allclose(errors["sup s4d"], [0.6386, 0.6371, 0.6367], atol=1e-4)
    np.testing.assert_allclose(errors["sup ptd"], [0.003127, 0.001609, 0.000815], atol=1e-6)
    config = {"orders": [16, 64], "band": 20.0, "points": 801, "t": 0.1, "curve": 64}
    found = ptd_measures.transfer_errors(config, lambda f, m: None)
    np.testing.assert_allclose(found["s4d band"], [0.1363, 0.0209], rtol=5e-3)


def test_variants_have_the_sizes_of_the_sheet(measurement):
    m = measurement.metrics
    assert m["kappa_structured_0.1"] == pytest.approx(15.9, abs=1e-3)
    assert m["backward_error_random_1e-3"] == pytest.approx(1e-3)
    assert m["kappa_optimize_100"] < 7.1
    assert m["backward_error_optimize_1000"] < 0.0158
    # What the objective does not look at.
    assert m["transfer_error_optimize_1000"] > 0.5
    assert all(m[f"rightmost_{n}"] < 0 for n in ("optimize_100", "optimize_1000", "random_1e-3"))


def test_starts_are_what_they_are_called():
    n = 8
    a, b = ptd_measures.system("hippo", n, 0.1)
    p = torch.outer(b, b) / 2
    normal, half = ptd_measures.system("s4d", n, 0.1)
    torch.testing.assert_close(normal, a + p)
    torch.testing.assert_close(half, b / 2)
    perturbed, scaled = ptd_measures.system("ptd", n, 0.1)
    torch.testing.assert_close(perturbed, a + 0.1 * p)
    torch.testing.assert_close(scaled, 0.95 * b)


def test_basis_is_the_zero_order_hold():
    a, b = ptd_measures.system("hippo", 6, 0.1)
    states = ptd_measures.basis(a, b, 0.05, 4)
    step = torch.linalg.matrix_exp(a * 0.05)
    x = torch.linalg.solve(a, (step - torch.eye(6)) @ b)
    for row in states:
        torch.testing.assert_close(row, x)
        x = step @ x


def test_layer_is_the_recurrence():
    states = ptd_measures.basis(*ptd_measures.system("ptd", 4, 0.1), 0.05, 9)
    layer = ptd_measures.FrozenBasis(states, 3, torch.Generator().manual_seed(0), norm=False)
    u = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(1))
    kernel = layer.C @ layer.states.mT
    y = layer.D * u
    for t in range(9):
        for k in range(t + 1):
            y[:, t] = y[:, t] + kernel[:, k] * u[:, t - k]
    exact = u + torch.nn.functional.glu(layer.output(torch.nn.functional.gelu(y)), dim=-1)
    torch.testing.assert_close(layer(u), exact, atol=1e-5, rtol=1e-5)


def test_digits_are_enlarged_to_256_steps():
    config = {"data": "digits", "split": 0, "side": 16}
    (x, y, test_x, _), checksum = ptd_measures.sequences(config)
    assert x.shape == (1297, 256, 1)
    assert test_x.shape == (500, 256, 1)
    assert len(y) == 1297
    assert (float(x.min()), float(x.max())) == (-1, 1)
    assert len(checksum) == 64
    small, _ = ptd_measures.sequences({**config, "side": 8})
    assert small[0].shape == (1297, 64, 1)


def test_claims_follow_the_measurements(measurement):
    check_claims_follow_the_measurements("ptd", measurement)


def test_figure_draws_theory_over_measurement(measurement):
    figure = check_figure("ptd", measurement)
    drawn = [np.asarray(line.get_ydata()) for line in figure.axes[1].lines]
    for name in ("s4d", "ptd"):
        for kind in ("curve", "theory"):
            wanted = measurement.series[f"{kind} {name}"]
            assert any(len(y) == len(wanted) and np.allclose(y, wanted) for y in drawn)


def test_snippet_runs():
    assert check_snippet("ptd")["optimizer"].state


def test_metadata():
    paper = get("ptd")
    assert (paper.arxiv, paper.published, paper.topic) == ("2310.01698", "2023-10", "layers")
    assert [claim.bound for claim in paper.claims] == [
        0.40, 0.03, 0.02, 0.08, 0.6, 2.0, 0.005, 1.0, 0.05, 0.03,
    ]  # fmt: skip


def test_listing_needs_no_torch():
    check_listing_is_cheap("ptd")


def test_paper_scale_is_refused_without_its_data(monkeypatch, tmp_path):
    monkeypatch.delenv("STIEFEL_DATA", raising=False)
    with pytest.raises(UnavailableError, match="STIEFEL_DATA"):
        get("ptd").experiment(Scale.PAPER, 0, None)
    monkeypatch.setenv("STIEFEL_DATA", str(tmp_path))
    with pytest.raises(UnavailableError, match=r"test_batch\.bin"):
        get("ptd").experiment(Scale.PAPER, 0, None)


def test_colour_images_take_the_same_path(monkeypatch, tmp_path):
    """Features and layers on records as CIFAR-10 has them, in the settings of the paper scale."""
    rng = np.random.default_rng(0)
    (tmp_path / "cifar-10-batches-bin").mkdir()
    for file in (*sequence_digits.CIFAR_TRAIN, *sequence_digits.CIFAR_TEST):
        records = rng.integers(0, 256, (4, sequence_digits.CIFAR_RECORD), dtype=np.uint8)
        records[:, 0] = [1, 2, 1, 2]
        records.tofile(tmp_path / file)
    monkeypatch.setenv("STIEFEL_DATA", str(tmp_path))
    features = {**ptd.FEATURES, **ptd.PAPER_DATA, "order": 16, "theta": 2.35, "split": 0}
    found = ptd_measures.feature_accuracies({**features, "sweep": [1.0]}, lambda f, m: None)
    assert all(0 <= found[name]["spike"] <= 1 for name in ("hippo", "s4d", "ptd"))
    layer = {**ptd.LAYER, **features, "epochs": 1, "width": 4, "layers": 2, "batch": 20}
    result = ptd_measures.train(
        {**layer, "start": "ptd", "norm": True, "repeat": 0}, lambda f, m: None
    )
    assert len(result["losses"]) == 1
    assert result["clean"] in (0.0, 0.25, 0.5, 0.75, 1.0)
