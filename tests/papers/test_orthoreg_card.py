import copy
import itertools
import json
import warnings
from statistics import fmean

import numpy as np
import pytest
import torch
from card_checks import (
    check_claims_follow_the_measurements,
    check_figure,
    check_smoke,
    check_snippet,
)

from stiefel.papers import Scale, UnavailableError, get, orthoreg, orthoreg_clip, orthoreg_runs
from stiefel.papers.attribute_digits import TASKS, accuracy, make_lab
from stiefel.regularize import orthoreg_loss


@pytest.fixture(scope="module")
def measurement():
    return check_smoke("orthoreg", race=False, seconds=30)


@pytest.fixture(scope="module")
def lab():
    return make_lab(0, width=24, train=200, validation=100, epochs=2)


CONFIG = {**orthoreg.SMOKE, "width": 24}


def run_of(**values):
    names = ("single", "absolute", "normalised", "negated", "negated_far", "cosine", "error")
    return {**dict.fromkeys((*names, "norm", "digits"), 1.0), **values}


def test_metrics_are_differences_to_the_plain_run():
    gains, errors = [3.0, -1.0, 2.0, 5.0, 1.5], [-0.1, 0.2, -0.3, -0.4, -0.05]
    runs = [
        {
            "0": run_of(absolute=80.0, error=1.0, negated=20.0, cosine=0.5, norm=2.0, single=98.0),
            "1": run_of(
                absolute=80.0 + g, error=1.0 + e, negated=17.0, cosine=0.1, norm=8.0, single=97.5
            ),
            "10": run_of(normalised=4.0),
        }
        for g, e in zip(gains, errors, strict=True)
    ]
    m = orthoreg._metrics(runs)
    assert m["absolute_gain"] == pytest.approx(fmean(gains))
    assert m["second_least_gain"] == pytest.approx(1.5)
    assert m["second_largest_error_change"] == pytest.approx(-0.05)
    assert m["negation_fall"] == pytest.approx(3)
    assert m["cosine_ratio"] == pytest.approx(0.2)
    assert m["single_fall"] == pytest.approx(0.5)
    assert m["normalised_gain_10"] == pytest.approx(3)
    assert m["norm_ratio"] == pytest.approx(4)


def test_every_seed_has_bases_of_its_own():
    seeds = [[c["lab"] for c in orthoreg.configs(Scale.LAPTOP, seed)] for seed in range(3)]
    assert sorted(itertools.chain(*seeds)) == list(range(15))
    first, second = orthoreg.configs(Scale.LAPTOP, 0)[:2]
    assert list(first["penalties"]) == ["0", "1", "10", "0.1", "100", "offdiag"]
    assert first["penalties"]["offdiag"] == {"lam": 1.0, "power": 2, "target": "offdiag"}
    assert list(second["penalties"]) == ["0", "1", "10"]
    assert second["penalties"]["10"] == {"lam": 10.0, "power": 1, "target": "identity"}


def test_experts_change_two_matrices_and_the_penalty_inflates_them(lab):
    none, strong = (
        orthoreg_runs.experts(lab, CONFIG, orthoreg.penalties([lam])[lam]) for lam in ("0", "10")
    )
    assert list(none) == list(TASKS)
    for task, tau in none.items():
        changed = {name for name, delta in tau.deltas.items() if delta.any()}
        assert changed == set(orthoreg_runs.MATRICES)
        assert strong[task].norm() > tau.norm()
        for name in orthoreg_runs.MATRICES:
            assert orthoreg_loss(strong[task][name]) < orthoreg_loss(tau[name])


def test_evaluation_against_the_definitions(lab):
    taus = orthoreg_runs.experts(lab, {**CONFIG, "steps": 30}, orthoreg.penalties(["1"])["1"])
    bench = orthoreg_runs.bench_of(lab)
    found = orthoreg_runs.evaluate(bench, taus, (0.0, 1.0))
    own = {task: tau.apply_to(lab.base) for task, tau in taus.items()}
    assert found["single"] == pytest.approx(fmean(accuracy(own[t], lab, t) for t in TASKS))

    def merged(alpha):
        return {n: lab.base[n] + alpha * sum(tau[n] for tau in taus.values()) for n in lab.base}

    def score(alpha):
        state = merged(alpha)
        valid = [
            accuracy(state, lab, t, lab.validation) / accuracy(own[t], lab, t, lab.validation)
            for t in TASKS
        ]
        return fmean(valid)

    best = max((i / 20 for i in range(21)), key=score)
    assert score(found["alpha"]) == pytest.approx(score(best))
    state = merged(found["alpha"])
    assert found["absolute"] == pytest.approx(fmean(accuracy(state, lab, t) for t in TASKS))
    assert found["digits"] == pytest.approx(accuracy(state, lab, "digit"))
    assert found["negated"] <= found["negated_before"]
    cosines = np.array(found["cosines"])
    np.testing.assert_allclose(np.diag(cosines), 1)
    assert found["cosine"] == pytest.approx(np.abs(cosines[np.triu_indices(5, 1)]).mean())
    assert found["map"][0][0] == 0
    first, second = list(TASKS)[:2]
    both = (taus[first] + taus[second]).apply_to(lab.base)
    apart = sum(
        float((bench.outputs(t)(own[t], lab.test.x).argmax(1)
               != bench.outputs(t)(both, lab.test.x).argmax(1)).double().mean())
        for t in (first, second)
    )  # fmt: skip
    assert found["map"][1][1] == pytest.approx(apart)


def test_claims_follow_the_measurements(measurement):
    check_claims_follow_the_measurements("orthoreg", measurement)


def test_figure_draws_the_measurements(measurement):
    figure = check_figure("orthoreg", measurement, panels=4)
    left, plain, penalised, cosines = figure.axes
    assert list(left.lines[1].get_ydata()) == pytest.approx(measurement.series["absolute"])
    for axes, lam in ((plain, "0"), (penalised, "1")):
        mesh = axes.collections[0].get_array()
        size = len(measurement.series["grid"])
        expected = np.reshape(measurement.series[f"map {lam}"], (size, size)).T
        np.testing.assert_allclose(mesh, expected)
    shown = cosines.collections[0].get_array()
    before, after = (np.reshape(measurement.series[f"cosines {k}"], (5, 5)) for k in ("0", "1"))
    np.testing.assert_allclose(np.tril(shown, -1), np.tril(before, -1))
    np.testing.assert_allclose(np.triu(shown, 1), np.triu(after, 1))


def test_snippet_runs():
    scope = check_snippet("orthoreg")
    assert len(scope["regularizer"].updates) == 2


def test_metadata():
    paper = get("orthoreg")
    assert (paper.arxiv, paper.published, paper.topic) == ("2604.17078", "2026-04", "merging")
    assert [c.bound for c in paper.claims] == [1.5, 0.0, 0.0, 1.5, 0.3, 1.0, 2.0]


def test_paper_scale_is_refused_without_its_data(monkeypatch, tmp_path):
    monkeypatch.delenv("STIEFEL_DATA", raising=False)
    with pytest.raises(UnavailableError, match="set STIEFEL_DATA to a folder with clip, cars/tra"):
        get("orthoreg").experiment(Scale.PAPER, 0, None)
    monkeypatch.setenv("STIEFEL_DATA", str(tmp_path))
    with pytest.raises(UnavailableError, match=r"control/test"):
        get("orthoreg").experiment(Scale.PAPER, 0, None)


def tiny_clip(folder):
    """A CLIP of two small towers and two tasks of noise, dark and bright."""
    import transformers
    from PIL import Image

    letters = [*map(chr, range(97, 123)), "."]
    vocabulary = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    files = folder / "vocab.json", folder / "merges.txt"
    files[0].write_text(json.dumps({word: i for i, word in enumerate(vocabulary)}))
    files[1].write_text("#version: 0.2\n")
    size, last = 16, len(vocabulary) - 1
    small = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "projection_dim": 8,
    }  # fmt: skip
    ends = {"bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last}
    config = transformers.CLIPConfig(
        text_config={**small, **ends, "vocab_size": last + 1, "max_position_embeddings": 40},
        vision_config={**small, "image_size": size, "patch_size": 8},
        projection_dim=8,
        **ends,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.CLIPModel(config).save_pretrained(folder / "clip")
    transformers.CLIPTokenizer(*map(str, files)).save_pretrained(folder / "clip")
    rng = np.random.default_rng(0)
    for task, part, (row, name) in itertools.product(
        ("mnist", "dtd", "control"), ("train", "test"), enumerate(("ink", "snow"))
    ):
        place = folder / task / part / name
        place.mkdir(parents=True)
        for i in range(8 if part == "train" else 4):
            pixels = rng.integers(0, 60, (20, 24, 3)) + 180 * row
            Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i}.png")


def test_the_authors_scale_runs_on_a_small_clip(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, about itself
        tiny_clip(tmp_path)
        config = {
            **orthoreg_clip.SETTINGS, "folder": str(tmp_path), "device": "cpu", "seed": 0,
            "tasks": ["mnist", "dtd"], "lams": ["0", "1", "10"], "batch": 8, "grid": [0.0, 1.0],
            "epochs": {"mnist": 2, "dtd": 1}, "lr": 1e-3,
        }  # fmt: skip
        result = orthoreg_clip.run(config, lambda fraction, message: None)
    runs = result["runs"]
    metrics = orthoreg._metrics([runs])
    assert all(np.isfinite(list(metrics.values())))
    assert runs["10"]["norm"] > runs["0"]["norm"]
    assert len(runs["0"]["map"]) == 2
    assert orthoreg._series(runs, config["grid"])["lams"] == [0, 1, 10]


def test_query_key_and_value_are_one_matrix_as_published():
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                self.add_module(name, torch.nn.Linear(4, 4))

    encoder = torch.nn.ModuleDict({"a": Attention(), "b": Attention()})
    groups = orthoreg_clip.groups(encoder)
    assert sorted(map(len, groups)) == [1, 1, 3, 3]
    start = copy.deepcopy(encoder.state_dict())
    with torch.no_grad():
        for p in encoder.parameters():
            p += torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    now = encoder.state_dict()
    fused = torch.cat([now[n] - start[n] for n in groups[0]])
    parts = [orthoreg_loss(torch.cat([now[n] - start[n] for n in group])) for group in groups]
    assert fused.shape == (12, 4)
    torch.testing.assert_close(orthoreg_clip.penalty(encoder, start), sum(parts))


def test_folders_that_do_not_hold_a_task(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "test" / "b").mkdir(parents=True)
    with pytest.raises(UnavailableError, match=r"no images in .*train/CLASS"):
        orthoreg_clip.parts_of(tmp_path, 0)
    for i in range(20):
        (tmp_path / "train" / "a" / f"{i}.png").touch()
    (tmp_path / "test" / "b" / "0.png").touch()
    with pytest.raises(UnavailableError, match="is a class that"):
        orthoreg_clip.parts_of(tmp_path, 0)
    (tmp_path / "train" / "b").mkdir()
    classes, parts = orthoreg_clip.parts_of(tmp_path, 0)
    assert classes == ["a", "b"]
    assert {part: len(items) for part, items in parts.items()} == {
        "train": 18, "validation": 2, "test": 1,
    }  # fmt: skip
    assert not set(parts["train"]) & set(parts["validation"])
