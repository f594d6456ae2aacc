"""A file is whole or absent."""

import json
import os
import stat

import pytest

from stiefel import storage
from stiefel.storage import write_json, write_text


def test_writes_through_missing_folders_and_over_what_is_there(tmp_path):
    path = tmp_path / "a" / "b" / "x.json"
    write_json(path, {"é": 1})
    write_json(path, {"é": 2})
    assert json.loads(path.read_text()) == {"é": 2}
    assert os.listdir(path.parent) == ["x.json"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_interruption_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    path = tmp_path / "x.txt"
    write_text(path, "old")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(storage.os, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.txt"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_json_is_refused_unless_asked_for(tmp_path, value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x", {"a": value})
    assert os.listdir(tmp_path) == []
    write_json(tmp_path / "x", {"a": value}, allow_nan=True)
    assert str(json.loads((tmp_path / "x").read_text())["a"]) == str(value)
