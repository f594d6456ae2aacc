import numpy as np
import pytest
import torch
from card_checks import (
    check_claims_follow_the_measurements,
    check_figure,
    check_smoke,
    check_snippet,
)

from stiefel.papers import Scale, UnavailableError, get, s4d, s4d_measures, sequence_digits


@pytest.fixture(scope="module")
def measurement():
    return check_smoke("s4d", race=False, seconds=15)


def test_gains_and_differences_are_those_of_the_accuracies(measurement):
    m = measurement.metrics
    gains = [m[f"accuracy_{init}"] - m["accuracy_real"] for init in ("legs", "lin", "inv")]
    assert m["least_gain"] == min(gains)
    assert m["mean_gain"] == pytest.approx(sum(gains) / 3)
    zoh = (m["accuracy_legs"] + m["accuracy_lin"]) / 2
    bilinear = (m["accuracy_legs_bilinear"] + m["accuracy_lin_bilinear"]) / 2
    assert m["discretisation_difference"] == pytest.approx(abs(zoh - bilinear))
    assert m["legs_lin_difference"] == pytest.approx(
        abs(m["accuracy_legs"] - m["accuracy_lin"]), abs=1e-12
    )
    assert m["speedup"] == min(m["speedup_forward"], m["speedup_both"])


def test_theory_of_the_card_is_exact():
    """Errors of the sheet, at the orders that a test can afford."""
    config = {"orders": [16, 32, 64, 128], "band": s4d.BAND, "points": s4d.POINTS}
    errors = s4d_measures.transfer_errors(config, lambda f, m: None)
    np.testing.assert_allclose(errors["half"], [0.1363, 0.0547, 0.0209, 0.00903], rtol=5e-3)
    np.testing.assert_allclose(errors["whole"], 1.0, atol=0.02)


def test_modes_agree_on_real_sequences(measurement):
    assert 0 < measurement.metrics["mode_difference"] < 1e-5


def test_the_plain_kernel_is_the_kernel():
    from stiefel.nn import s4d_init, vandermonde_kernel

    a, b = s4d_init("legs", 8)
    g = torch.Generator().manual_seed(0)
    c = torch.randn(3, 4, dtype=a.dtype, generator=g)
    dt = torch.tensor([[0.01], [0.1], [0.3]], dtype=torch.float64)
    plain = s4d_measures.plain_kernel(a, b, c, dt, 70)
    torch.testing.assert_close(vandermonde_kernel(a[None], b[None], c[None], dt, 70)[0], plain)


def test_split_is_stratified_disjoint_and_follows_the_seed():
    (x, y, test_x, test_y), checksum = sequence_digits.digits(0)
    assert x.shape == (1297, 64, 1)
    assert test_x.shape == (500, 64, 1)
    assert (float(x.min()), float(x.max())) == (-1, 1)
    shares = test_y.bincount() / (y.bincount() + test_y.bincount())
    assert (shares - 500 / 1797).abs().max() < 0.005
    other, again = sequence_digits.digits(1), sequence_digits.digits(0)
    assert not torch.equal(other[0][3], test_y)
    assert torch.equal(again[0][2], test_x)
    assert len(checksum) == 64
    assert sequence_digits.stratified(torch.tensor([0, 0, 0, 1]), 2).tolist() == [
        True,
        True,
        False,
        False,
    ]


def test_variants_change_what_they_say():
    common = {**s4d.STANDARD, **sequence_digits.SMOKE}
    models = {
        name: sequence_digits.build({**common, **change}, 1, 10, 0)
        for name, change in s4d.VARIANTS.items()
    }
    kernels = {n: m.blocks[0].layer.kernel for n, m in models.items() if n != "gru"}
    assert (kernels["real"].a_im == 0).all()
    assert kernels["lin bilinear"].disc == "bilinear"
    assert not kernels["legs frozen"].a_re.requires_grad
    assert kernels["legs"].a_re.requires_grad
    assert torch.equal(kernels["legs half"].B, kernels["legs"].B / 2)
    for name in ("inv", "random"):
        assert not torch.equal(kernels[name].a_im, kernels["legs"].a_im)
    assert isinstance(models["gru"], sequence_digits.RecurrentClassifier)
    state = torch.random.get_rng_state()
    twin = sequence_digits.build({**common, "model": "gru"}, 1, 10, 0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(twin.head.weight, models["gru"].head.weight)


def test_claims_follow_the_measurements(measurement):
    check_claims_follow_the_measurements("s4d", measurement)


def test_figure_draws_the_slope_of_theory(measurement):
    figure = check_figure("s4d", measurement)
    orders, errors = (measurement.series[name] for name in ("orders", "error"))
    drawn = [np.asarray(line.get_ydata()) for line in figure.axes[1].lines]
    slope = errors[-1] * orders[-1] / np.asarray(orders)
    assert any(len(y) == len(slope) and np.allclose(y, slope) for y in drawn)


def test_snippet_runs():
    assert check_snippet("s4d")["optimizer"].state


def test_metadata():
    paper = get("s4d")
    assert (paper.arxiv, paper.published) == ("2206.11893", "2022-06")
    assert [claim.bound for claim in paper.claims] == [
        0.15, 0.25, 0.08, 0.10, 1.8, 3.0, 0.95, 1e-5, 10.0, 1.0,
    ]  # fmt: skip


def test_paper_scale_is_refused_without_its_data(monkeypatch, tmp_path):
    monkeypatch.delenv("STIEFEL_DATA", raising=False)
    with pytest.raises(UnavailableError, match="STIEFEL_DATA"):
        get("s4d").experiment(Scale.PAPER, 0, None)
    monkeypatch.setenv("STIEFEL_DATA", str(tmp_path))
    with pytest.raises(UnavailableError, match=r"test_batch\.bin"):
        get("s4d").experiment(Scale.PAPER, 0, None)


def test_cifar_is_read_as_its_page_describes(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for file in (*sequence_digits.CIFAR_TRAIN, *sequence_digits.CIFAR_TEST):
        records = rng.integers(0, 256, (3, 3073), dtype=np.uint8)
        records[:, 0] = [7, 0, 9]
        records.tofile(tmp_path / file)
    (x, y, test_x, test_y), checksum = sequence_digits.cifar10(tmp_path)
    assert x.shape == (15, 1024, 3)
    assert test_x.shape == (3, 1024, 3)
    assert y[:3].tolist() == test_y.tolist() == [7, 0, 9]
    # Colour planes follow one another in a record; here a step has all three.
    green = int(records[1, 1 + 1024 + 5])
    assert float(test_x[1, 5, 1]) == pytest.approx(green / 127.5 - 1)
    assert len(checksum) == 64
    (tmp_path / sequence_digits.CIFAR_TEST[0]).write_bytes(b"12")
    with pytest.raises(ValueError, match="not a multiple of 3073"):
        sequence_digits.cifar10(tmp_path)
