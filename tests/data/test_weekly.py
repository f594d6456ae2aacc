import math

import pytest
import torch

from stiefel.data import MissingDataError, carbon_dioxide, weekly


def test_record_is_the_published_one():
    record = carbon_dioxide()
    values = record.values
    assert values.dtype == torch.float64
    assert len(values) == 2284
    assert int(values.isnan().sum()) == 59
    assert values[:4].tolist() == [316.1, 317.3, 317.6, 317.5]
    assert (float(values[-1]), str(record.start)) == (371.5, "1958-03-29")
    assert float(values.nanmean()) == pytest.approx(340.142247191, abs=1e-9)
    assert math.isnan(float(values[6]))
    assert len(record.sha256) == 64


def test_missing_file_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(weekly, "_FILE", tmp_path / "mauna_loa_co2.txt")
    with pytest.raises(MissingDataError, match="install stiefel again"):
        carbon_dioxide()
