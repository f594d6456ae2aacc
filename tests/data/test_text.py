import hashlib
import platform
import socket
import sysconfig
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stiefel.data import MissingDataError, python_source

STDLIB = Path(sysconfig.get_path("stdlib"))


def write(folder, contents):
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


def test_it_is_the_library_s_own_source_in_order():
    text = python_source(300_000)
    expected = b"".join(p.read_bytes() for p in sorted(STDLIB.glob("*.py")))[:300_000]
    got = bytes(torch.cat([text.train, text.validation]).tolist())
    assert got == expected
    assert text.sha256 == hashlib.sha256(expected).hexdigest()
    assert text.train.dtype == torch.uint8
    assert platform.python_version() in text.version
    assert "PSF" in text.licence


def test_default_text_splits_between_files_near_ninety_per_cent():
    text = python_source()
    assert len(text.train) + len(text.validation) == 2_000_000
    starts = accumulate(p.stat().st_size for p in sorted(STDLIB.glob("*.py")))
    assert text.split == "file"
    assert len(text.train) in set(starts)
    assert 0.8 <= len(text.train) / 2_000_000 <= 0.95


def test_no_socket_is_opened(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    assert len(python_source(50_000).train) > 0


def test_sorted_by_name_and_only_python_files_of_the_folder_itself(tmp_path):
    write(tmp_path, {"b.py": b"2" * 20, "a.py": b"1" * 80, "c.txt": b"3" * 50})
    (tmp_path / "inner").mkdir()
    write(tmp_path / "inner", {"a.py": b"4" * 50})
    text = python_source(None, folder=tmp_path)
    assert bytes(text.train.tolist()) == b"1" * 80
    assert bytes(text.validation.tolist()) == b"2" * 20
    assert text.split == "file"


def test_one_long_file_is_cut_by_position(tmp_path):
    text = python_source(100, folder=write(tmp_path, {"a.py": bytes(range(200))}))
    assert (len(text.train), len(text.validation), text.split) == (90, 10, "position")
    assert text.validation.tolist() == list(range(90, 100))


@pytest.mark.parametrize(
    ("contents", "limit", "found"),
    [({}, 2_000_000, "0 bytes"), ({"a.py": b"x" * 99}, 100, "99 bytes"), ({}, None, "0 bytes")],
)
def test_missing_source_is_said_with_numbers(tmp_path, contents, limit, found):
    with pytest.raises(MissingDataError, match=found) as error:
        python_source(limit, folder=write(tmp_path, contents))
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("limit", [9, 0, -1])
def test_limit_must_leave_something_to_split(limit):
    with pytest.raises(ValueError, match=f"limit must be at least 10.*got {limit}"):
        python_source(limit)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12), cut=st.integers(0, 30))
def test_split_is_the_file_start_nearest_to_ninety_per_cent(tmp_path_factory, lengths, cut):
    limit = max(10, sum(lengths) - cut)
    if sum(lengths) < limit:
        lengths = [*lengths, limit]
    folder = tmp_path_factory.mktemp("files")
    write(folder, {f"{i:02}.py": bytes([i]) * n for i, n in enumerate(lengths)})
    text = python_source(limit, folder=folder)
    starts = [s for s in accumulate(lengths) if 0.8 * limit <= s <= 0.95 * limit]
    assert len(text.train) + len(text.validation) == limit
    if starts:
        assert text.split == "file"
        assert set(text.train.tolist()).isdisjoint(text.validation.tolist())
        best = min(abs(s - 0.9 * limit) for s in starts)
        assert abs(len(text.train) - 0.9 * limit) == pytest.approx(best)
    else:
        assert (text.split, len(text.train)) == ("position", int(0.9 * limit))
