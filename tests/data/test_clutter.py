import hashlib
import socket

import numpy as np
import pytest
import torch

from stiefel.data import MissingDataError, clutter, cluttered_digits, images, photograph


def joined(task):
    return torch.cat([task.train_x, task.test_x]), torch.cat([task.train_y, task.test_y])


@pytest.mark.parametrize(
    ("seed", "total", "labels"),
    [
        (0, 285448.42, [5, 9, 2, 2, 4, 2, 5, 7, 6, 8]),
        (1, 281622.35, [4, 8, 1, 8, 9, 9, 3, 7, 5, 1]),
    ],
)
def test_checksums(seed, total, labels):
    x, y = joined(cluttered_digits(4500, seed=seed))
    assert x.shape == (4500, 144)
    assert x.dtype == torch.float32
    # Decoders of JPEG differ by a level here and there.
    assert x.double().sum().item() == pytest.approx(total, rel=1e-3)
    assert y[:10].tolist() == labels


def test_moments_and_class_counts():
    task = cluttered_digits(4500, seed=0)
    x, _ = joined(task)
    assert x.double().mean().item() == pytest.approx(0.440507, abs=2e-4)
    assert x.double().std().item() == pytest.approx(0.253563, abs=2e-4)
    assert len(task.train_x) == 3000
    assert task.train_y.bincount().tolist() == [290, 322, 261, 323, 280, 343, 297, 279, 297, 308]
    assert (x.min(), x.max()) == (0, 1)


def test_a_digit_is_in_one_part_only(monkeypatch):
    # White photographs and digits that carry their number in one pixel: it can be read off.
    white = images.Picture(torch.full((20, 20, 3), 0, dtype=torch.uint8), "", "", "", "")
    monkeypatch.setattr(clutter, "photograph", lambda name: white)
    digits = clutter.table("digits")
    x = torch.zeros_like(digits.x)
    x[:, 0] = 16 * torch.arange(1, len(x) + 1) / len(x)
    monkeypatch.setattr(clutter, "table", lambda name: type(digits)(x, digits.y, "", "", "", ""))
    task = cluttered_digits(3000, seed=3)
    parts = []
    for images_ in (task.train_x, task.test_x):
        bright = images_.amax(1)
        seen = bright[bright > 0.15 + 1e-4]  # added, not taken away
        parts.append({round(float(v - 0.15) / 0.5 * len(x)) for v in seen})
    assert min(map(len, parts)) > 100
    assert not parts[0] & parts[1]


def test_same_arguments_same_images_and_honest_checksum():
    first, again = cluttered_digits(30, seed=5), cluttered_digits(30, seed=5)
    x, y = joined(first)
    assert torch.equal(x, joined(again)[0])
    assert first.sha256 == hashlib.sha256(x.numpy().tobytes() + y.numpy().tobytes()).hexdigest()
    assert first.sha256 != cluttered_digits(30, seed=6).sha256
    for word in ("china.jpg", "flower.jpg", "Optdigits"):
        assert word in first.source
    assert "vultilion" in first.licence


def test_other_canvas():
    assert cluttered_digits(4, seed=0, canvas=9).train_x.shape == (2, 81)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 2}, "count must be at least 3"),
        ({"seed": -1}, "seed must be"),
        ({"canvas": 8}, r"canvas must be in 9 … 426"),
        ({"canvas": 427}, "canvas must be"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        cluttered_digits(**arguments)


def test_no_socket_and_a_clear_word_when_data_are_missing(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    cluttered_digits(3)
    monkeypatch.setattr(images, "find_spec", lambda name: None)
    with pytest.raises(MissingDataError, match="pip install scikit-learn"):
        cluttered_digits(3)


def test_flower_is_the_other_photograph():
    flower = photograph("flower")
    assert flower.pixels.shape == (427, 640, 3)
    assert flower.pixels.float().mean().item() == pytest.approx(61.9, abs=0.1)
    assert "vultilion" in flower.licence
    assert "flower.jpg" in flower.source
    assert flower.sha256 == hashlib.sha256(np.ascontiguousarray(flower.pixels)).hexdigest()


def test_unknown_photograph():
    with pytest.raises(ValueError, match="china, flower, got 'rose'"):
        photograph("rose")
