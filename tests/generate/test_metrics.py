import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from stiefel.generate import (
    DCTEncoder,
    ImageDatabase,
    copy_report,
    frechet_distance,
    precision_recall,
)


def test_values_of_the_sheet():
    a = torch.tensor([[0, 0], [0, 2], [2, 0], [2, 2]]).double()
    b = torch.tensor([[1, 1], [3, 1], [1, 4], [3, 4]]).double()
    assert frechet_distance(a, b) == pytest.approx(3.5833333333, abs=1e-10)
    fake = torch.tensor([[0.5, 0.5], [3, 3], [0, 0.9], [3.2, 3]]).double()
    assert precision_recall(a / 2, fake, k=1) == (0.5, 0.25)


def test_frechet_distance_is_that_of_the_matrix_root():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(80, 7, generator=g) @ torch.randn(7, 7, generator=g)
    b = torch.randn(60, 7, generator=g) + 0.3
    s, t = (np.cov(x.double().numpy().T) for x in (a, b))
    difference = ((a.double().mean(0) - b.double().mean(0)) ** 2).sum()
    expected = float(difference) + np.trace(s + t - 2 * np.real(sqrtm(s @ t)))
    assert frechet_distance(a.numpy(), b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(a[:, :1], b[:, :1]) == pytest.approx(
        float((a[:, 0].double().mean() - b[:, 0].double().mean()) ** 2
              + (a[:, 0].double().std() - b[:, 0].double().std()) ** 2)
    )  # fmt: skip
    flat = a.clone()
    flat[:, 3] = 1.0  # a direction without variance
    assert frechet_distance(flat, flat) == pytest.approx(0, abs=1e-8)


def test_precision_and_recall_are_those_of_a_loop():
    g = torch.Generator().manual_seed(1)
    real, fake = torch.randn(40, 3, generator=g), torch.randn(25, 3, generator=g) * 0.6

    def radius(x, i, k):
        return sorted(float((x[i] - x[j]).norm()) for j in range(len(x)) if j != i)[k - 1]

    def covered(points, centres, k):
        hits = [
            any(float((p - c).norm()) <= radius(centres, i, k) for i, c in enumerate(centres))
            for p in points
        ]
        return sum(hits) / len(hits)

    expected = covered(fake, real, 3), covered(real, fake, 3)
    assert precision_recall(real, fake) == pytest.approx(expected)
    assert precision_recall(real, real, k=1) == (1.0, 1.0)


def test_duplicates_are_other_rows():
    """A ball around one of two equal rows has radius 0 for k = 1, and still holds the other."""
    real = torch.tensor([[0.0, 0], [0, 0], [5, 5]])
    assert precision_recall(real, torch.tensor([[0.0, 0], [1, 0], [9, 9]]), k=1)[0] == 1.0
    near = torch.tensor([[0.0, 0], [1e-3, 0], [20, 20]])
    assert precision_recall(real, near, k=1)[0] == pytest.approx(2 / 3)


def test_bad_features_are_named():
    a = torch.randn(5, 3)
    with pytest.raises(ValueError, match="a needs more rows than columns"):
        frechet_distance(a[:3], a)
    with pytest.raises(ValueError, match="b must have 3 columns"):
        frechet_distance(a, a[:, :2])
    with pytest.raises(ValueError, match="b has NaN"):
        frechet_distance(a, torch.full((5, 3), torch.nan))
    with pytest.raises(TypeError, match="floating"):
        precision_recall(a.long(), a)
    with pytest.raises(ValueError, match="k must be at least 1 and at most 4 for 5 rows"):
        precision_recall(a, a, k=5)
    with pytest.raises(ValueError, match=r"features \[n, d\]"):
        precision_recall(a[None], a)


def test_copy_report_warns_of_copies():
    g = torch.Generator().manual_seed(2)
    images = torch.rand(50, 4, 4, generator=g) * 2 - 1
    database = ImageDatabase(images, DCTEncoder(6).fit(images))
    others = torch.rand(20, 4, 4, generator=g) * 2 - 1
    report = copy_report(images[[7, 3]], database, others)
    assert report.nearest.tolist() == [7, 3]
    assert report.distance.tolist() == [0, 0]
    assert report.ratio == 0
    assert "below 0.9" in report.warning
    every = (others[:, None] - images).flatten(2).norm(dim=2)
    fair = copy_report(others, database, others)
    torch.testing.assert_close(fair.distance, every.double().amin(1), rtol=1e-6, atol=0)
    assert torch.equal(fair.nearest, every.argmin(1))
    assert fair.ratio == 1
    assert fair.warning is None
    alone = copy_report(others, database)
    assert (alone.reference, alone.ratio, alone.warning) == (None, None, None)
    with pytest.raises(ValueError, match="samples must hold images of shape"):
        copy_report(others[:, :2], database)
