import hashlib
import importlib.util
import socket
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch

from stiefel.data import MissingDataError, images, photograph


def test_the_picture_is_whole_and_says_what_it_is():
    picture = photograph()
    assert picture.pixels.shape == (427, 640, 3)
    assert picture.pixels.dtype == torch.uint8
    assert picture.pixels.float().mean().item() == pytest.approx(143.7, abs=0.1)
    assert picture.sha256 == hashlib.sha256(picture.pixels.numpy().tobytes()).hexdigest()
    assert "scikit-learn" in picture.version
    assert "Pillow" in picture.version
    assert "CC BY 2.0" in picture.licence
    assert "danielbuechele" in picture.licence


def test_it_is_scikit_learn_s_without_importing_it():
    code = """
import sys
from stiefel.data import photograph
pixels = photograph().pixels.numpy()
print("sklearn" in sys.modules)
from sklearn.datasets import load_sample_image
print((load_sample_image("china.jpg") == pixels).all())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "True"]


def test_no_socket_is_opened(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    assert len(photograph().pixels) == 427


def test_colours_and_rows_keep_their_order(tmp_path):
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:8, :, 0] = 200  # red above, blue below
    pixels[8:, :, 2] = 100
    PIL.Image.fromarray(pixels).save(tmp_path / "china.jpg", quality=100, subsampling=0)
    picture = photograph(folder=tmp_path)
    wrong = picture.pixels.numpy().astype(int) - pixels
    assert abs(wrong).max() < 20
    assert "folder of your own" in picture.version


def test_missing_scikit_learn_names_the_command(monkeypatch):
    monkeypatch.setattr(images, "find_spec", lambda name: None)
    with pytest.raises(MissingDataError, match=r"pip install scikit-learn$"):
        photograph()


def test_missing_file_names_the_folder(tmp_path):
    with pytest.raises(MissingDataError, match=r"no china\.jpg") as error:
        photograph(folder=tmp_path)
    assert str(tmp_path) in str(error.value)


def test_missing_pillow_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    assert importlib.util.find_spec("sklearn") is not None
    with pytest.raises(MissingDataError, match="pip install pillow"):
        photograph()
