import sys

import pytest
import torch

from stiefel.data import MissingDataError, table


@pytest.mark.parametrize(
    ("name", "shape", "classes", "total"),
    [
        ("digits", (1797, 64), 10, 561_718.0),
        ("breast_cancer", (569, 30), 2, None),
        ("iris", (150, 4), 3, 2_078.7),
        ("wine", (178, 13), 3, None),
    ],
)
def test_tables_of_classes(name, shape, classes, total):
    found = table(name)
    assert found.x.shape == shape
    assert found.x.dtype == torch.float64
    assert found.y.dtype == torch.int64
    assert found.y.unique().tolist() == list(range(classes))
    if total is not None:
        assert float(found.x.sum()) == pytest.approx(total)
    assert len(found.sha256) == 64


def test_diabetes_is_raw():
    found = table("diabetes")
    assert found.y.dtype == torch.float64
    assert (float(found.y.min()), float(found.y.max())) == (25, 346)
    assert float(found.x[:, 0].mean()) == pytest.approx(48.5181, abs=1e-4)  # years, not scaled


def test_callers_own_their_table():
    table("iris").x.zero_()
    assert float(table("iris").x.sum()) > 0


def test_other_names_are_refused():
    with pytest.raises(ValueError, match=r"breast_cancer.*got 'mnist'"):
        table("mnist")


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingDataError, match="pip install scikit-learn"):
        table("digits")
