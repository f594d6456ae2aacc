"""Image files in, pictures of samples out. Pillow is imported where it is used."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from stiefel.generate._checks import whole
from stiefel.storage import write_bytes

if TYPE_CHECKING:
    from types import ModuleType

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
MODES = {1: "L", 3: "RGB"}
# An image of more pixels is refused before it is decoded: 100 megapixels.
MOST_PIXELS = 100_000_000
# Of a picture of samples: pixels between tiles, at the least a side of a tile, and samples a row.
GAP, TILE = 2, 104
# White and a grey that tells neighbours from samples.
PAPER, SHADE = 255, 225


class ImageError(ValueError):
    """A file or folder of images that cannot be used; the message says which and why."""


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "image files need Pillow, which is not installed: pip install 'stiefel[generate]'"
        ) from error
    return Image


def image_files(folder: Path) -> list[Path]:
    """The image files in a folder and its subfolders, by name.

    Raises:
        ImageError: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise ImageError(f"{folder} is not a folder")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise ImageError(f"{folder} has no image (looked for {', '.join(SUFFIXES)})")
    return found


def read_image(path: Path, size: int | tuple[int, int], channels: int) -> Tensor:
    """One image file as ``[H, W]`` or ``[3, H, W]`` in [−1, 1], float32.

    Turned upright, cut to the middle in the proportions asked for, and resized. Transparent pixels
    show white.

    Raises:
        ImageError: no image, damaged, or of more than 100 megapixels.
    """
    pillow = _pillow()
    height, width = (size, size) if isinstance(size, int) else size
    from PIL import ImageOps

    try:
        # Pillow only warns of a decompression bomb up to twice its limit; none is to be decoded.
        with warnings.catch_warnings():
            warnings.simplefilter("error", pillow.DecompressionBombWarning)
            with pillow.open(path) as file:
                if file.width * file.height > MOST_PIXELS:
                    raise ImageError(
                        f"{path} has {file.width} × {file.height} pixels, "
                        f"at most {MOST_PIXELS:,} are read"
                    )
                image = ImageOps.exif_transpose(file)
                if image.mode in ("RGBA", "LA", "P", "PA"):
                    clear = image.convert("RGBA")
                    image = pillow.new("RGBA", clear.size, "white")
                    image.alpha_composite(clear)
                image = image.convert(MODES[channels])
                image = ImageOps.fit(image, (width, height), pillow.Resampling.BICUBIC)
    except ImageError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, ArithmeticError, Warning) as error:
        raise ImageError(f"{path} cannot be read as an image: {error}") from error
    except pillow.DecompressionBombError as error:
        raise ImageError(f"{path} is too large: {error}") from error
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)) / 127.5 - 1
    return pixels if channels == 1 else pixels.movedim(-1, 0).contiguous()


def read_images(
    source: str | Path | Sequence[Path], size: int | tuple[int, int], *, channels: int = 3
) -> Tensor:
    """Image files as ``[N, 3, H, W]``, or ``[N, H, W]`` with one channel, in [−1, 1], float32.

    Args:
        source: A folder, read with its subfolders by name, or files.
        size: Side of the square, or (H, W), that each image is cut and resized to.
        channels: 3 for colour, 1 for grey.

    Raises:
        ImageError: no folder, no image in it, or one that is damaged or over 100 megapixels.
        ValueError: a size < 1, or other channels.
        ImportError: Pillow is not installed; names the extra.
    """
    for side in (size,) if isinstance(size, int) else size:
        whole(side, "size")
    if channels not in MODES:
        raise ValueError(f"channels must be 1 or 3, got {channels!r}")
    files = image_files(Path(source)) if isinstance(source, str | Path) else list(source)
    if not files:
        raise ImageError("no image to read")
    return torch.stack([read_image(path, size, channels) for path in files])


def grid(samples: Tensor, neighbours: Tensor | None = None, *, columns: int = 8) -> np.ndarray:
    """A picture of samples, each with its neighbours in small below it: bytes ``[h, w, 3]``.

    Args:
        samples: ``[n, H, W]``, ``[n, 1, H, W]`` or ``[n, 3, H, W]`` in [−1, 1].
        neighbours: ``[n, k, ...]`` images of the same shape; NaN stays blank.
        columns: Samples in a row.

    Raises:
        ValueError: other shapes.
    """
    columns = whole(columns, "columns")
    shown = _colour(samples)
    n, side = len(shown), max(shown.shape[2:])
    scale = max(1, -(-TILE // side))
    shown = _enlarged(shown, scale)
    height, width = shown.shape[2:]
    k = 0 if neighbours is None else neighbours.shape[1]
    small = []
    strip = 0
    if neighbours is not None and k:
        across = max(1, (width - (k - 1) * GAP) // k)
        flat = _colour(neighbours.flatten(0, 1))
        strip = max(1, round(across * height / width))
        # As large as fits below the sample: nearest pixels, so that small images stay crisp.
        flat = torch.nn.functional.interpolate(flat, (strip, across))
        small = list(flat.view(n, k, 3, strip, across))
    tile_height = height + (strip + GAP if strip else 0) + 3 * GAP
    rows = -(-n // columns)
    columns = min(columns, n)
    sheet = torch.full(
        (3, rows * tile_height + GAP, columns * (width + 3 * GAP) + GAP), float(PAPER)
    )
    for place in range(n):
        y = GAP + place // columns * tile_height
        x = GAP + place % columns * (width + 3 * GAP)
        sheet[:, y : y + height, x : x + width] = shown[place]
        for j in range(k):
            start = x + j * (small[place].shape[-1] + GAP)
            piece = small[place][j]
            below = y + height + GAP
            sheet[:, below : below + strip, start : start + piece.shape[-1]] = piece
    return sheet.round().byte().movedim(0, -1).contiguous().numpy()


def _colour(images: Tensor) -> Tensor:
    """``[n, 3, H, W]`` from 0 to 255; NaN becomes the shade of a blank."""
    if images.ndim == 3:
        images = images[:, None]
    if images.ndim != 4 or images.shape[1] not in MODES:
        raise ValueError(
            f"samples must be images [n, H, W], [n, 1, H, W] or [n, 3, H, W], "
            f"got shape {tuple(images.shape)}"
        )
    pixels = (images.detach().cpu().float().clamp(-1, 1) + 1) * 127.5
    return pixels.nan_to_num(SHADE).expand(-1, 3, -1, -1)


def _enlarged(images: Tensor, scale: int) -> Tensor:
    return images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)


def save_grid(
    path: str | Path,
    samples: Tensor,
    neighbours: Tensor | None = None,
    *,
    columns: int = 8,
) -> None:
    """Write :func:`grid` as PNG, atomically.

    Args:
        path: The file.
        samples: ``[n, H, W]``, ``[n, 1, H, W]`` or ``[n, 3, H, W]`` in [−1, 1].
        neighbours: ``[n, k, ...]`` images shown in small below each sample; NaN stays blank.
        columns: Samples in a row.

    Raises:
        ValueError: other shapes.
        OSError: it cannot be written.
        ImportError: Pillow is not installed; names the extra.
    """
    buffer = io.BytesIO()
    _pillow().fromarray(grid(samples, neighbours, columns=columns)).save(
        buffer, format="PNG", optimize=True
    )
    write_bytes(Path(path), buffer.getvalue())
