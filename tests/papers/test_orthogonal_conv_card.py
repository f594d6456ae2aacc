import dataclasses
import math
import sys
import types
from itertools import pairwise

import numpy as np
import pytest
import torch
from card_checks import (
    check_claims_follow_the_measurements,
    check_figure,
    check_smoke,
    check_snippet,
)
from torch import nn

from stiefel.papers import Scale, UnavailableError, get, orthogonal_conv
from stiefel.papers import orthogonal_digits as digits
from stiefel.papers import orthogonal_kernels as kernels


def silent(fraction, message):
    """Where progress goes here."""


@pytest.fixture(scope="module")
def measurement():
    return check_smoke("orthogonal-conv", race=False, seconds=20)


def test_gains_are_differences_of_the_two_trainings(measurement):
    m = measurement.metrics
    for what in ("certified", "attacked", "accuracy"):
        difference = m[f"{what}_0.1"] - m[f"{what}_none"]
        assert m[f"{what}_gain"] == pytest.approx(difference, abs=1e-12)
    lipschitz = [m[f"lipschitz_{name}"] for name in ("none", "0.1", "1", "10")]
    ratios = [a / b for a, b in pairwise(lipschitz)]
    assert m["least_lipschitz_ratio"] == pytest.approx(min(ratios))
    assert m["accuracy_cost"] == pytest.approx(m["accuracy_0.1"] - m["accuracy_10"], abs=1e-12)


def test_theory_holds_for_kernels_of_any_training(measurement):
    m = measurement.metrics
    assert m["frobenius_difference"] < 1e-12
    assert m["spectral_fall"] < 1e-12
    assert 0 < m["part_of_bound"] < 1
    assert 1 <= m["spectral_growth"] <= m["largest_spectral_growth"]
    assert m["certified_but_broken"] == 0


def test_errors_by_size_are_those_of_the_matrix():
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(3, 2, 3, 3, dtype=torch.float64, generator=generator) / 4
    found = kernels.size_errors(kernel, 2, [3])
    unit = torch.eye(2 * 36, dtype=torch.float64).reshape(-1, 2, 6, 6)
    padded = nn.functional.pad(unit, (1, 1, 1, 1), mode="circular")
    matrix = nn.functional.conv2d(padded, kernel, stride=2).flatten(1)
    off = matrix.mT @ matrix - torch.eye(27, dtype=torch.float64)
    assert found["frobenius"][0] == pytest.approx(float(off.norm()), rel=1e-12)
    assert found["spectral"][0] == pytest.approx(float(torch.linalg.matrix_norm(off, 2)), rel=1e-10)
    values = torch.linalg.svdvals(matrix)[:27]
    assert (found["low"], found["high"]) == pytest.approx((float(values[-1]), float(values[0])))
    assert found["bound"] == pytest.approx(math.sqrt(3 * 9 * found["lorth"]), rel=1e-12)


def test_a_sweep_ends_at_the_known_minima():
    """The start of seed 2 ends in the local minimum of 8 2 3 2, that of seed 1 at zero."""
    config = {
        "architectures": [[2, 1, 1, 2], [5, 1, 1, 2], [8, 2, 3, 2]],
        "starts": [1, 2], "steps": 300, "lr": 0.05, "device": "cpu",
    }  # fmt: skip
    found = kernels.minimise(config, silent)
    assert found["minimum"] == [1, 3, 0]
    assert found["exists"] == [False, False, True]
    assert found["case"] == ["RO", "CO", "square"]
    for row, least in zip(found["reached"][:2], (1, 3), strict=True):
        assert row == pytest.approx([least] * 2, abs=1e-6)
    zero, local = found["reached"][2]
    assert zero < 1e-6
    assert local == pytest.approx(0.2, abs=1e-6)
    low, high = found["sigma"][2][1]
    assert low < 1e-3
    assert high == pytest.approx(math.sqrt(1.6), abs=1e-4)


def test_the_attack_finds_the_nearest_wrong_image():
    """Linear logits: the smallest margin in a ball is margin − radius·‖difference of weights‖."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(2, 16, dtype=torch.float64, generator=generator)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2, bias=False, dtype=torch.float64))
    with torch.no_grad():
        model[1].weight.copy_(weight)
    x = torch.randn(5, 1, 4, 4, dtype=torch.float64, generator=generator)
    y = torch.tensor([0, 1, 0, 1, 1])
    clean = digits.margins(model(x), y)
    least = digits.attacked(model, x, y, 0.3, 20)
    slope = (weight[0] - weight[1]).norm()
    torch.testing.assert_close(least, (clean - 0.3 * slope).detach())
    assert torch.equal(digits.attacked(model, x, y, 0.0, 1), clean.detach())


def test_margins():
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]])
    assert digits.margins(logits, torch.tensor([0, 2])).tolist() == [1, -1]


def test_certificates_follow_margin_and_constant():
    """One orthonormal layer, bias decides: margins and Lipschitz constant are known."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(2, 4))
        model[1].bias.zero_()
    x = torch.tensor([[1.0, 0, 0, 0], [0.5, 0, 0, 0], [0, 1, 0, 0]]).reshape(3, 1, 2, 2)
    config = {
        "certified_radii": [0.3, 0.4], "attack_radii": [0.3, 0.8], "attack_steps": 10,
        "autoattack": None,
    }  # fmt: skip
    found = digits.robustness(model, x, torch.tensor([0, 0, 0]), config)
    # Margins 1, 0.5, −1: radii up to 0.71 and 0.354.
    assert found["lipschitz"] == pytest.approx(1)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["certified"] == pytest.approx([2 / 3, 1 / 3])
    assert found["attacked"] == pytest.approx([2 / 3, 0])
    assert found["certified but broken"] == 0
    assert "autoattack" not in found


def test_the_older_penalty_sees_the_flattened_kernel():
    model = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Linear(2, 3))
    with torch.no_grad():
        model[0].weight.fill_(1 / 3)
        model[1].weight.copy_(torch.eye(3, 2))
    assert float(digits.kernel_penalty(model, 0.1)().detach()) == pytest.approx(0, abs=1e-12)
    with torch.no_grad():
        model[1].weight.zero_()
    assert float(digits.kernel_penalty(model, 0.1)().detach()) == pytest.approx(0.2)


def test_the_net_is_the_sheets():
    model = digits.build(digits.LAPTOP, 8, 10, 0)
    convolutions = [m for m in model if isinstance(m, nn.Conv2d)]
    assert [(m.in_channels, m.out_channels, m.stride[0]) for m in convolutions] == [
        (1, 16, 1),
        (16, 32, 2),
        (32, 64, 2),
    ]
    assert all(m.padding_mode == "circular" for m in convolutions)
    assert model[-1].in_features == 256
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    again = digits.build(digits.LAPTOP, 8, 10, 0)
    assert torch.equal(again[0].weight, model[0].weight)
    x = torch.randn(3, 4, 2, 2)
    torch.testing.assert_close(digits.MaxMin()(x).flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))
    assert (digits.MaxMin()(x)[:, :2] >= digits.MaxMin()(x)[:, 2:]).all()


def test_the_net_of_the_authors_scale_fits_its_images():
    from stiefel.nn import orthogonal_conv_exists

    for inputs, outputs, stride in digits.PAPER["layers"]:
        report = orthogonal_conv_exists(outputs, inputs, 3, stride)
        assert report
        assert report.case != "square"
    with torch.device("meta"):
        model = nn.Sequential(
            *(
                nn.Conv2d(c, m, 3, s, padding=1, padding_mode="circular")
                for c, m, s in digits.PAPER["layers"]
            )
        )
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 512, 2, 2)


def test_split_is_stratified_and_follows_the_seed():
    config = {**digits.LAPTOP, "seed": 0, "repeat": 0}
    (x, y, test_x, test_y), checksum = digits.images(config)
    assert x.shape == (1197, 1, 8, 8)
    assert test_x.shape == (600, 1, 8, 8)
    assert (float(x.min()), float(x.max())) == (0, 1)
    shares = test_y.bincount() / (y.bincount() + test_y.bincount())
    assert (shares - 600 / 1797).abs().max() < 0.005
    assert not torch.equal(digits.images({**config, "repeat": 1})[0][3], test_y)
    assert torch.equal(digits.images(config)[0][2], test_x)
    assert len(checksum) == 64


def test_claims_follow_the_measurements(measurement):
    check_claims_follow_the_measurements("orthogonal-conv", measurement)


def test_figure_draws_theory_over_measurement(measurement):
    figure = check_figure("orthogonal-conv", measurement)
    sizes = np.asarray(measurement.series["sizes"])
    drawn = [np.asarray(line.get_ydata()) for line in figure.axes[1].lines]
    for index in (1, 2, 3):
        value, bound = measurement.series[f"lorth and bound {index}"]
        for theory in (sizes * math.sqrt(value), np.asarray([bound, bound])):
            assert any(y.shape == theory.shape and np.allclose(y, theory) for y in drawn)
    assert len(figure.axes[2].get_yticks()) == len(measurement.series["reached"])


def test_the_authors_sweep_is_the_whole_grid(measurement):
    """C, M in 1 … 64, k in 1, 3, 5, 7, S in 1, 2, 4; made-up results stand in for a day of work."""
    seen = []

    class Progress:
        def shared(self, kind, configs, compute, *, span):
            results = []
            for config in configs:
                rows = [tuple(a) for a in config["architectures"]]
                seen.extend(rows)
                square = [m == c * s * s for m, c, _, s in rows]
                least = [0 if q else m % 2 for q, (m, *_) in zip(square, rows, strict=True)]
                results.append(
                    {
                        "reached": [[x, x + 1, x] for x in least],  # a seed's own is the second
                        "minimum": least,
                        "exists": [x == 0 for x in least],
                        "case": ["square" if q else "CO" for q in square],
                    }
                )
            return results

    series, metrics = orthogonal_conv._sweep(Scale.PAPER, 4, Progress(), "cpu")
    assert len(set(seen)) == 64 * 64 * 12
    assert metrics["feasible_reached"] == metrics["infeasible_difference"] == 1
    whole = dataclasses.replace(measurement, series={**measurement.series, **series})
    assert len(get("orthogonal-conv").figure([whole]).axes[2].get_yticks()) == 0


def test_snippet_runs():
    scope = check_snippet("orthogonal-conv")
    assert scope["model"][0].weight.grad.abs().sum() > 0


def test_metadata():
    paper = get("orthogonal-conv")
    assert (paper.arxiv, paper.published) == ("2108.05623", "2021-08")
    assert [claim.bound for claim in paper.claims] == [
        0.50, 0.03, -0.01, 1.0, 0.02, 1e-4, 1e-9, 1.15, 1.0, 1e-5, 1e-5,
    ]  # fmt: skip
    assert orthogonal_conv.INFEASIBLE == ((10, 1, 3, 4), (2, 1, 1, 2), (17, 1, 3, 4), (5, 1, 1, 2))


def test_paper_scale_is_refused_without_its_data(monkeypatch, tmp_path):
    monkeypatch.delenv("STIEFEL_DATA", raising=False)
    with pytest.raises(UnavailableError, match="STIEFEL_DATA"):
        get("orthogonal-conv").experiment(Scale.PAPER, 0, None)
    monkeypatch.setenv("STIEFEL_DATA", str(tmp_path))
    with pytest.raises(UnavailableError, match=r"test_batch\.bin"):
        get("orthogonal-conv").experiment(Scale.PAPER, 0, None)


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Records as the data set's page describes them, three a file."""
    (tmp_path / "cifar-10-batches-bin").mkdir()
    rng = np.random.default_rng(0)
    for file in (*digits.CIFAR_TRAIN, *digits.CIFAR_TEST):
        records = rng.integers(0, 256, (3, 3073), dtype=np.uint8)
        records[:, 0] = [7, 0, 9]
        records.tofile(tmp_path / file)
    monkeypatch.setenv("STIEFEL_DATA", str(tmp_path))
    return records


def test_authors_images_and_attack(cifar, monkeypatch):
    """The whole training at the authors' settings, smaller; AutoAttack's part by a stand-in."""
    (_, _, test_x, _), _ = digits.images({"data": "cifar10"})
    assert test_x.shape == (3, 3, 32, 32)
    torch.testing.assert_close(
        test_x[1], torch.from_numpy(cifar[1, 1:].reshape(3, 32, 32) / np.float32(255))
    )

    class AutoAttack:
        def __init__(self, model, *, norm, eps, version, device):
            assert (norm, eps, version) == ("L2", 36 / 255, "standard")

        def run_standard_evaluation(self, x, y, bs):
            return x

    stand_in = types.ModuleType("autoattack")
    stand_in.AutoAttack = AutoAttack
    stand_in.__spec__ = types.SimpleNamespace(name="autoattack")
    monkeypatch.setitem(sys.modules, "autoattack", stand_in)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = {
        **digits.settings(Scale.PAPER), "device": "cpu", "layers": [[3, 4, 2], [4, 6, 4]],
        "epochs": 1, "attack_steps": 2, "seed": 0, "repeat": 0, "regulariser": "lorth",
        "lam": 0.1, "sizes": [8],
    }  # fmt: skip
    found = digits.train(config, silent)
    assert found["autoattack"] == found["accuracy"]
    assert len(found["attacked"]) == 2
    monkeypatch.delitem(sys.modules, "autoattack")
    assert digits.settings(Scale.PAPER)["autoattack"] is None
