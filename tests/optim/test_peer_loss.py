"""The comparison of losses with a peer package: its arithmetic, and a run with stand-ins."""

import importlib.util
import json
from dataclasses import replace
from functools import partial

import peer_loss
import pytest
import torch

from stiefel.comparison import Grid
from stiefel.optim.race_contestants import CONTESTANTS
from stiefel.optim.race_result import RaceResult, Standing
from stiefel.optim.small_gpt import GPTSize


def standing(name, finals):
    runs = {seed: {"final": loss} for seed, loss in enumerate(finals)}
    return Standing(name, 1e-3, Grid({1.0: 3.0, 2.0: 2.0, 4.0: 3.0}), runs)


@pytest.mark.parametrize(
    ("own", "verdict"),
    [
        ([2.1, 2.2, 2.31], "worse"),
        ([1.9, 2.0, 2.09], "better"),
        ([2.1, 2.0, 2.2], "no worse"),
        ([2.05], "no worse"),  # one seed says nothing
    ],
)
def test_verdicts_come_from_paired_differences(own, verdict):
    other = [2.0, 2.1, 2.2][: len(own)]
    result = RaceResult((standing("a", own), standing("b", other)), {})
    (row,) = peer_loss.compare(result, [("a", "b")])
    assert row["verdict"] == verdict
    assert row["differences"] == pytest.approx([x - y for x, y in zip(own, other, strict=True)])
    assert row["rates"] == (2.0, 2.0)
    assert row["bracketed"]


def test_the_peer_gets_the_same_groups_without_decay():
    seen = {}

    def peer(groups, **settings):
        seen.update(groups=groups, settings=settings)
        return "optimizer"

    weight, bias = torch.ones(2, 2), torch.ones(2)
    groups = [
        {"params": [("w", weight)], "rule": "matrix"},
        {"params": [("b", bias)], "rule": "elementwise"},
        {"params": [], "rule": "elementwise"},
    ]
    assert peer_loss._peer(peer, {"scale": 3}, groups, 0.1, 0.2) == ["optimizer"]
    matrix, rest = seen["groups"]
    assert (matrix["use_muon"], matrix["lr"], matrix["params"][0] is weight) == (True, 0.1, True)
    assert (rest["use_muon"], rest["lr"], rest["params"][0] is bias) == (False, 0.2, True)
    assert seen["settings"] == {"weight_decay": 0.0, "scale": 3}


def test_one_seed_makes_one_task():
    make = partial(peer_loss.make, size=GPTSize(8, 1, 2, 8), limit=20_000, count=3, batch=2)
    (one, batches, _), (two, same, _), (_, other, _) = make(0), make(0), make(1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    for part in ("train", "validation"):
        assert all(torch.equal(a, b) for a, b in zip(batches[part], same[part], strict=True))
    assert not torch.equal(batches["train"][0], other["train"][0])
    assert torch.equal(batches["validation"][0], other["validation"][0])
    assert batches["train"][0].shape == (2, 9)


def test_a_tiny_run(tmp_path, monkeypatch, capsys):
    stand_in = CONTESTANTS["torch-muon"]
    names = ("peer-muon", "peer-normuon", "normuon-nesterov")
    fakes = {name: replace(stand_in, name=name) for name in names}
    monkeypatch.setattr(peer_loss, "contestants", lambda: fakes)
    before = dict(CONTESTANTS)
    out = tmp_path / "loss.json"
    peer_loss.main(["--tiny", "--seeds", "2", "--json", str(out)])
    assert before == CONTESTANTS
    content = json.loads(out.read_text())
    assert [row["peer"] for row in content["rows"]] == ["peer-muon", "peer-normuon", "peer-normuon"]
    # The second pair is one optimizer under two names.
    assert content["rows"][1]["difference"] == [0.0, 0.0]
    assert content["rows"][0]["difference"][0] != 0
    assert "Final validation loss" in capsys.readouterr().out


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit):
        peer_loss.main(["--tiny"])
    assert 'pip install "stiefel[bench]"' in capsys.readouterr().err
