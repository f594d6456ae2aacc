import sys

import numpy as np
import pytest
import torch
from PIL import Image

from stiefel.generate import ImageError, pictures, read_images, save_grid


def test_images_are_read_upright_cut_and_scaled(tmp_path):
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = (255, 128, 0)
    Image.fromarray(wide).save(tmp_path / "b.png")
    (tmp_path / "sub").mkdir()
    Image.fromarray(np.full((6, 6), 255, np.uint8)).save(tmp_path / "sub" / "a.png")
    (tmp_path / "notes.txt").write_text("no image")
    x = read_images(tmp_path, 10)
    assert x.shape == (2, 3, 10, 10)
    assert x[0, :, 5, 5].tolist() == pytest.approx([1, 128 / 127.5 - 1, -1], abs=1e-6)
    assert float(x[1].min()) == 1
    grey = read_images(tmp_path, (4, 6), channels=1)
    assert grey.shape == (2, 4, 6)
    clear = Image.new("RGBA", (5, 5), (0, 0, 0, 0))
    clear.save(tmp_path / "a.png")
    assert float(read_images([tmp_path / "a.png"], 5).min()) == 1  # shows white
    turned = Image.fromarray(np.repeat(np.uint8([[0, 255]]), 2, 0))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned.save(tmp_path / "a.png", exif=exif)
    assert read_images([tmp_path / "a.png"], 2, channels=1)[0, 0].tolist() == [1, -1]


def test_bad_images_are_named(tmp_path, monkeypatch):
    with pytest.raises(ImageError, match="is not a folder"):
        read_images(tmp_path / "none", 8)
    with pytest.raises(ImageError, match="has no image"):
        read_images(tmp_path, 8)
    with pytest.raises(ImageError, match="no image to read"):
        read_images([], 8)
    path = tmp_path / "x.png"
    path.write_bytes(b"not an image")
    with pytest.raises(ImageError, match=r"x\.png cannot be read as an image"):
        read_images(tmp_path, 8)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(ImageError, match="cannot be read"):
        read_images(tmp_path, 8)
    Image.new("L", (40, 40)).save(path)
    monkeypatch.setattr(pictures, "MOST_PIXELS", 1500)
    with pytest.raises(ImageError, match="40 × 40 pixels, at most 1,500"):
        read_images(tmp_path, 8)
    for most in (1000, 500):  # Pillow's own warning, and its error from twice its limit
        monkeypatch.setattr(pictures, "MOST_PIXELS", 10**9)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        with pytest.raises(ImageError, match="pixels"):
            read_images(tmp_path, 8)
    with pytest.raises(ValueError, match="channels must be 1 or 3"):
        read_images(tmp_path, 8, channels=2)
    with pytest.raises(ValueError, match="size must be at least 1"):
        read_images(tmp_path, 0)


def test_grid_shows_samples_and_their_neighbours(tmp_path):
    samples = torch.full((3, 8, 8), 1.0)
    samples[1] = -1
    neighbours = torch.zeros(3, 4, 8, 8)
    neighbours[0, 2] = torch.nan
    sheet = pictures.grid(samples, neighbours, columns=2)
    assert sheet.dtype == np.uint8
    assert sheet[2 : 2 + 104, 2 + 110 : 2 + 110 + 104].max() == 0  # the second sample, black
    strip = sheet[2 + 104 + 2 + 5, 2:106, 0]
    assert set(strip.tolist()) == {128, 225, 255}
    colour = pictures.grid(torch.rand(2, 3, 100, 80) * 2 - 1)
    assert colour.shape[1] == 2 * 166 + 2
    path = tmp_path / "g" / "grid.png"
    save_grid(path, samples, neighbours, columns=2)
    assert np.array_equal(np.asarray(Image.open(path)), sheet)
    with pytest.raises(ValueError, match="samples must be images"):
        pictures.grid(torch.zeros(2, 5, 8, 8))
    with pytest.raises(ValueError, match="columns must be at least 1"):
        pictures.grid(samples, columns=0)


def test_missing_pillow_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"stiefel\[generate\]"):
        read_images(tmp_path, 8)
