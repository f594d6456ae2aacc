import time

import pytest
import torch
from card_checks import (
    check_claims_follow_the_measurements,
    check_figure,
    check_smoke,
    check_snippet,
)

from stiefel.papers import Progress, Scale, UnavailableError, dct_low_rank, image_autoencoder
from stiefel.papers.byte_gpt import GPT, GPTSize, build_optimizer


@pytest.fixture(scope="module")
def measurement():
    return check_smoke("dct-low-rank")


def test_text_metrics_are_differences_of_the_runs(measurement):
    m = measurement.metrics
    for other in ("svd", "random-columns", "adamw"):
        name = f"loss_minus_{other.replace('-', '_')}"
        assert m[name] == m["loss_dct"] - m[f"loss_{other}"]
    for method in dct_low_rank.LANGUAGE:
        loss = m[f"loss_{method.removesuffix('-adamw')}"]
        assert measurement.series[f"loss {method}"][-1] == loss


def test_image_metrics_are_of_the_runs_at_rank_32(measurement):
    m = measurement.metrics
    assert m["image_minus_svd"] == m["image_dct"] - m["image_svd"]
    assert m["image_over_random"] == m["image_dct"] / m["image_random-basis"]
    rates = measurement.config["image"]["rates"]
    config = dct_low_rank.image_plan(Scale.SMOKE, 32).config("svd", rates["svd"], 0)
    assert m["image_svd"] == image_autoencoder.train(config, lambda f, w: None)["final"]
    config = dct_low_rank.image_plan(Scale.SMOKE, 8).config(
        "dct", measurement.config["image_8"]["rates"]["dct"], 0
    )
    assert m["image_8_dct"] == image_autoencoder.train(config, lambda f, w: None)["final"]


def test_projection_errors_are_those_of_the_explicit_projections(measurement):
    gradient = image_autoencoder.first_gradient(0, 3).double()
    sigma = torch.linalg.svdvals(gradient)
    j, i = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    basis = torch.cos(torch.pi * i * (2 * j + 1) / 256).double()  # columns: frequencies
    basis = basis / basis.norm(dim=0)
    expected = {"svd": (sigma[32:].square().sum() / sigma.square().sum()).sqrt()}
    for name, q in (("dct2", basis), ("dct3", basis.T), ("identity", torch.eye(128).double())):
        s = gradient @ q
        p = q[:, s.abs().sum(0).topk(32).indices]
        expected[name] = (gradient - gradient @ p @ p.T).norm() / gradient.norm()
    for name, value in expected.items():
        assert measurement.metrics[f"projection_{name}"] == pytest.approx(value.item(), rel=1e-3)
    m = measurement.metrics
    assert m["projection_minus_svd"] == m["projection_dct2"] - m["projection_svd"]
    assert m["projection_over_random"] == m["projection_dct2"] / m["projection_random"]


def test_time_ratios_are_of_the_measured_medians(measurement, monkeypatch):
    m = measurement.metrics
    ratio = m["milliseconds_svd"] / m["milliseconds_select_low"]
    assert m["svd_time_ratio"] == pytest.approx(ratio)
    for name in ("select", "power"):
        growth = m[f"milliseconds_{name}_high"] / m[f"milliseconds_{name}_low"]
        assert m[f"{name}_time_growth"] == pytest.approx(growth)
    ticks = iter([1.0, 2.0, 3.0, 4.0, 9.0, 9.0, 9.0, 9.0, 5.0, 5.0, 5.0, 5.0, 70.0, 60.0])
    monkeypatch.setattr(dct_low_rank, "REPEATS", 3)

    def clock(work):
        work()
        return next(ticks)

    monkeypatch.setattr(dct_low_rank, "_cpu_seconds", clock)
    seconds = dct_low_rank.projection_seconds(Scale.SMOKE, 0)
    assert set(seconds.values()) == {5.0, 60.0}
    assert seconds["svd"] == 60.0


def test_the_clock_counts_cpu_time_of_the_work():
    assert dct_low_rank._cpu_seconds(lambda: time.sleep(0.05)) < 0.04
    assert dct_low_rank._cpu_seconds(lambda: sum(range(400_000))) > 1e-3


def test_other_seeds_use_the_rates_of_the_grid_s_seed():
    asked = []

    class Watched(Progress):
        def shared(self, kind, configs, compute, *, span=(0.0, 1.0)):
            asked.append([(kind, c["method"], c["seed"], c["lr"], c.get("rank")) for c in configs])
            return super().shared(kind, configs, compute, span=span)

    result = dct_low_rank.experiment(Scale.SMOKE, 2, Watched())
    grids, own = asked[0::2], asked[1::2]
    assert [len(grid) for grid in grids] == [12, 15, 6]
    assert {seed for grid in grids for _, _, seed, _, _ in grid} == {0}
    expected = [
        [(kind, method, 2, chosen["rates"][method], rank) for method in methods]
        for kind, methods, chosen, rank in (
            ("byte-gpt", dct_low_rank.LANGUAGE, result.config, None),
            ("image-autoencoder", dct_low_rank.IMAGE, result.config["image"], 32),
            ("image-autoencoder", dct_low_rank.IMAGE_SMALL, result.config["image_8"], 8),
        )
    ]
    assert own == expected


@pytest.mark.parametrize("method", dct_low_rank.LANGUAGE)
def test_on_text_only_the_subspace_differs(method):
    model = GPT(GPTSize(24, 2, 3, 10, 17), seed=0)
    matrices, rest = build_optimizer(model, method, lr=0.5).param_groups
    assert {id(p) for p in matrices["params"]} == {id(p) for p in model.matrices().values()}
    assert {id(p) for p in rest["params"]} == {id(p) for p in model.others()}
    assert tuple(matrices["betas"]) == (0.9, 0.95)
    assert tuple(rest["betas"]) == (0.9, 0.95)
    assert (matrices["lr"], rest["lr"]) == (0.5, 3e-3)
    assert matrices["weight_decay"] == rest["weight_decay"] == 0
    if method != "adamw":
        assert matrices["rank"] == 0.25
        assert matrices.get("method", "matmul") == "matmul"  # decided by no stopwatch
        assert matrices["error_feedback"] in ("full", True)


def test_claims_follow_the_measurements(measurement):
    check_claims_follow_the_measurements("dct-low-rank", measurement)


def test_figure_draws_the_control(measurement):
    figure = check_figure("dct-low-rank", measurement)
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert "random columns" in names


def test_snippet_runs():
    assert check_snippet("dct-low-rank")["optimizer"].state


def test_metadata():
    paper = dct_low_rank.paper
    assert (paper.slug, paper.arxiv, paper.published) == ("dct-low-rank", "2505.17967", "2025-05")
    bounds = {c.metric: (c.relation, c.bound) for c in paper.claims}
    assert bounds == {
        "loss_minus_svd": ("≤", 0.02),
        "image_minus_svd": ("≤", 0.005),
        "image_over_random": ("≤", 0.90),
        "projection_minus_svd": ("≤", 0.05),
        "projection_over_random": ("≤", 0.25),
        "svd_time_ratio": ("≥", 20.0),
        "select_time_growth": ("≤", 2.0),
        "power_time_growth": ("≥", 5.0),
    }


def test_paper_scale_is_refused_without_its_data(monkeypatch):
    monkeypatch.delenv("STIEFEL_DATA", raising=False)
    with pytest.raises(UnavailableError, match="STIEFEL_DATA"):
        dct_low_rank.experiment(Scale.PAPER, 0, None)
