"""Retrieval metrics against scikit-learn and by hand; backfilling."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from stiefel.merge import backfill_curve, backfill_order, retrieval_metrics


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(q, g, yq, yg, exclude_self):
    """One query after the other, with a stable sort."""
    q, g = (np.asarray(x, np.float64) for x in (q, g))
    width = min(q.shape[1], g.shape[1])
    q, g = (x[:, :width] / np.linalg.norm(x[:, :width], axis=1, keepdims=True) for x in (q, g))
    first, precision = [], []
    for i in range(len(q)):
        keep = np.arange(len(g)) != (i if exclude_self else -1)
        order = np.argsort(-(g @ q[i])[keep], kind="stable")
        right = (np.asarray(yg)[keep] == int(yq[i]))[order]
        if right.any():
            ranks = np.flatnonzero(right) + 1
            first.append(ranks[0])
            precision.append(np.mean(np.arange(1, len(ranks) + 1) / ranks))
    first = np.array(first)
    return {
        "cmc1": np.mean(first <= 1), "cmc5": np.mean(first <= 5), "map": np.mean(precision),
        "skipped": len(q) - len(first),
    }  # fmt: skip


def test_values_of_the_sheet():
    g = torch.tensor([[1, 0], [0.9, 0.1], [0, 1], [0.1, 0.9], [0.7, 0.7]], dtype=torch.float64)
    y = torch.tensor([0, 0, 1, 1, 0])
    found = retrieval_metrics(g, g, y, y, exclude_self=True)
    assert found["cmc1"] == 1
    assert found["map"] == pytest.approx(29 / 30, abs=1e-12)


@pytest.mark.parametrize("exclude_self", [True, False])
@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_against_one_query_at_a_time(exclude_self, chunk):
    g, y = draw(80, 5), torch.randint(0, 6, (80,), generator=torch.Generator().manual_seed(1))
    y[0] = 77  # a class of one
    q = draw(80, 4, seed=2)
    ours = retrieval_metrics(q, g, y, y, exclude_self=exclude_self, chunk=chunk)
    wanted = by_hand(q, g, y, y, exclude_self)
    assert ours == pytest.approx(wanted, abs=1e-12)
    assert ours["skipped"] == (1 if exclude_self else 0)


def test_average_precision_is_that_of_scikit_learn():
    q, g = draw(1, 5), draw(60, 5, seed=3)
    y = torch.arange(60) % 4
    scores = torch.nn.functional.normalize(g) @ torch.nn.functional.normalize(q)[0]
    wanted = average_precision_score((y == 2).numpy(), scores.numpy())
    found = retrieval_metrics(q, g, torch.tensor([2]), y)
    assert found["map"] == pytest.approx(wanted, abs=1e-12)


def test_equal_scores_rank_by_place():
    g = torch.eye(3, dtype=torch.float64)[[0, 1, 1, 1, 2, 0, 0]]  # scores are 0 or 1, exactly
    y = torch.tensor([0, 1, 2, 1, 2, 2, 0])
    for exclude in (True, False):
        assert retrieval_metrics(g, g, y, y, exclude_self=exclude) == pytest.approx(
            by_hand(g, g, y, y, exclude), abs=1e-12
        )


def test_a_rotation_of_both_sides_changes_nothing():
    g, y = draw(50, 6), torch.arange(50) % 5
    rotation = torch.linalg.qr(draw(6, 6, seed=9)).Q
    plain = retrieval_metrics(g, g, y, y, exclude_self=True)
    turned = retrieval_metrics(g @ rotation, g @ rotation, y, y, exclude_self=True)
    assert turned == pytest.approx(plain, abs=1e-12)


def test_order_of_backfilling():
    rows = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 1.0], [10.0, 10.0], [10.0, 13.0]])
    labels = torch.tensor([7, 7, 7, 3, 3])
    own = torch.stack([rows[:3].mean(0)] * 3 + [rows[3:].mean(0)] * 2)
    distance = (rows - own).norm(dim=1)
    assert backfill_order(rows, labels).tolist() == distance.argsort(descending=True).tolist()
    rows = rows + 1
    cosine = backfill_order(rows, labels, "cosine")
    means = torch.stack([rows[:3].mean(0)] * 3 + [rows[3:].mean(0)] * 2)
    away = 1 - torch.cosine_similarity(rows, means)
    assert cosine.tolist() == away.argsort(descending=True, stable=True).tolist()


def test_the_curve_goes_from_forward_to_backward():
    y = torch.arange(40) % 4
    old, new = draw(40, 6), draw(40, 6, seed=1) + 3 * torch.eye(6, dtype=torch.float64)[y]
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    curve = backfill_curve(new, old, new, order, y, y, metric="cmc1", exclude_self=True)
    ends = [retrieval_metrics(new, g, y, y, exclude_self=True)["cmc1"] for g in (old, new)]
    assert [curve.values[0], curve.values[-1]] == pytest.approx(ends)
    assert curve.area == pytest.approx(np.trapezoid(curve.values, curve.betas))
    half = old.clone()
    half[order[:12]] = new[order[:12]]
    assert curve.values[3] == retrieval_metrics(new, half, y, y, exclude_self=True)["cmc1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"yq": torch.arange(3)}, "its labels have shape"),
        ({"Q": draw(5, 4), "yq": torch.arange(5)}, "exclude_self needs"),
        ({"G": torch.zeros(9, 4)}, "row 0 of G has only zeros"),
        ({"yq": torch.full((9,), 50)}, "no query has its label"),
    ],
)
def test_bad_sets(change, message):
    arguments = {
        "Q": draw(9, 4), "G": draw(9, 4), "yq": torch.arange(9),
        "yg": torch.arange(9), "exclude_self": True, **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(**arguments)


def test_bad_backfills():
    g, y = draw(9, 4), torch.arange(9) % 3
    with pytest.raises(ValueError, match="metric must be one of l2, cosine"):
        backfill_order(g, y, "manhattan")
    with pytest.raises(ValueError, match="finite"):
        backfill_order(g / 0, y)
    for change, message in (
        ({"order": torch.zeros(9, dtype=torch.int64)}, "permutation of the 9 rows"),
        ({"betas": [0.5, 1]}, "betas must ascend"),
        ({"metric": "recall"}, "metric must be one of cmc1"),
        ({"backward": draw(9, 5)}, "one shape"),
    ):
        arguments = {
            "queries": g, "forward": g, "backward": g, "order": torch.arange(9),
            "query_labels": y, "gallery_labels": y, **change,
        }  # fmt: skip
        with pytest.raises(ValueError, match=message):
            backfill_curve(**arguments)
