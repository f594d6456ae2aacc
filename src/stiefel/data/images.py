"""Real photographs without a download: the two that scikit-learn brings along."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from stiefel.data.text import MissingDataError

# Who took each; both were published under CC BY 2.0.
PICTURES = {"china": "danielbuechele", "flower": "vultilion"}


@dataclass(frozen=True)
class Picture:
    """A photograph and where it is from."""

    pixels: UInt8[Tensor, "height width 3"]
    """Red, green, blue, 0 to 255; rows from the top."""
    source: str
    """What it shows and who brings it along."""
    version: str
    """Of the package that holds the file and of the one that decoded it."""
    sha256: str
    """Checksum of the pixels: decoders differ by a level here and there."""
    licence: str


def photograph(name: str = "china", *, folder: Path | None = None) -> Picture:
    """One of scikit-learn's sample images, a Chinese palace or a flower, 427 × 640 pixels.

    The file is read in place; scikit-learn itself is not imported. JPEG compressed it in blocks
    of 8 × 8, which a cosine transform can see.

    Args:
        name: ``"china"`` or ``"flower"``.
        folder: Where ``NAME.jpg`` is; None means the installed scikit-learn.

    Raises:
        ValueError: another name.
        MissingDataError: scikit-learn or Pillow is not installed, or the file is not there.
    """
    if name not in PICTURES:
        raise ValueError(f"name must be one of {', '.join(PICTURES)}, got {name!r}")
    file, author = f"{name}.jpg", PICTURES[name]
    origin = "a folder of your own"
    if folder is None:
        spec = find_spec("sklearn")
        if spec is None or spec.origin is None:
            raise MissingDataError(
                "the sample photograph comes with scikit-learn, which is not installed: "
                "pip install scikit-learn"
            )
        folder = Path(spec.origin).parent / "datasets" / "images"
        origin = f"scikit-learn {version('scikit-learn')}"
    path = folder / file
    if not path.is_file():
        raise MissingDataError(
            f"there is no {file} in {folder}; a complete scikit-learn has it: "
            "pip install --force-reinstall scikit-learn"
        )
    try:
        import PIL.Image  # only here: everything else works without it
    except ImportError as error:
        raise MissingDataError(
            "reading the sample photograph needs Pillow: pip install pillow"
        ) from error
    with PIL.Image.open(path) as image:
        pixels = np.array(image.convert("RGB"))
    return Picture(
        pixels=torch.from_numpy(pixels),
        source=f"{file}, a sample image of scikit-learn, photograph by {author}",
        version=f"{origin}, Pillow {PIL.__version__}",
        sha256=hashlib.sha256(pixels.tobytes()).hexdigest(),
        licence=f"CC BY 2.0 (attribution: {author})",
    )
