"""Real digits pasted on crops of real photographs: a task that needs learned features.

Plain 8 × 8 digits are nearly linearly separable. On these a linear classifier is little better
than chance, and a small network gains much from every further thousand images.
"""

from __future__ import annotations

import hashlib
import operator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from stiefel.data.images import photograph
from stiefel.data.tables import table

SIDE = 8
"""Pixels of a digit in one direction."""
CONTRAST = 0.5
"""What a full stroke adds to its background, or takes from it."""
BACKGROUND = (0.7, 0.15)
"""Photographs are squeezed to 0.15 … 0.85, so that strokes of both signs stay visible."""
_PICTURES = ("china", "flower")


@dataclass(frozen=True)
class ClutteredDigits:
    """Two thirds to fit, one third to test; no handwritten digit is in both."""

    train_x: Float[Tensor, "train pixels"]
    """Float32 in [0, 1]; the rows of the canvas one after the other."""
    train_y: Int[Tensor, " train"]
    test_x: Float[Tensor, "test pixels"]
    test_y: Int[Tensor, " test"]
    source: str
    version: str
    """Of the packages that hold and decode the originals."""
    sha256: str
    """Checksum of all images and labels."""
    licence: str


def cluttered_digits(count: int = 4500, *, seed: int = 0, canvas: int = 12) -> ClutteredDigits:
    """``count`` images of ``canvas`` × ``canvas`` pixels, a pure function of the arguments.

    Each is a random crop of one of scikit-learn's two photographs in grey, with a handwritten
    digit (its test table of 1797) at a random place, added or subtracted with equal chance.

    Args:
        count: Images in all; the first ``2 · count // 3`` are the training part.
        seed: Of the digits, crops, places and signs; 0 to 2³² − 1.
        canvas: Pixels in one direction, 9 to 426: the digit must be able to move.

    Raises:
        ValueError: ``count`` below 3, or ``seed`` or ``canvas`` out of range.
        MissingDataError: scikit-learn or Pillow is not installed.
    """
    count, seed, canvas = map(operator.index, (count, seed, canvas))
    if count < 3:
        raise ValueError(f"count must be at least 3 (two to fit, one to test), got {count}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in 0 … 2³² − 1, got {seed}")
    pictures = [photograph(name) for name in _PICTURES]
    grey = [p.pixels.numpy().mean(-1, dtype=np.float64) / 255 for p in pictures]
    grey = [g.astype(np.float32) for g in grey]
    least = min(min(g.shape) for g in grey)
    if not SIDE < canvas < least:
        raise ValueError(f"canvas must be in {SIDE + 1} … {least - 1} pixels, got {canvas}")
    digits = table("digits")
    strokes = (digits.x.numpy() / 16).astype(np.float32).reshape(-1, SIDE, SIDE)

    random = np.random.RandomState(seed)  # its stream defines the task
    order = random.permutation(len(strokes))
    strokes, classes = strokes[order], digits.y.numpy()[order]
    known, train = len(strokes) * 2 // 3, count * 2 // 3
    gain, offset = BACKGROUND
    images = np.empty((count, canvas, canvas), np.float32)
    labels = np.empty(count, np.int64)
    for i in range(count):
        which = random.randint(0, known) if i < train else random.randint(known, len(strokes))
        picture = grey[random.randint(len(grey))]
        top = random.randint(0, picture.shape[0] - canvas)
        left = random.randint(0, picture.shape[1] - canvas)
        image = picture[top : top + canvas, left : left + canvas] * gain + offset
        sign = 1 if random.rand() < 0.5 else -1
        down, right = random.randint(0, canvas - SIDE + 1, 2)
        image[down : down + SIDE, right : right + SIDE] += sign * CONTRAST * strokes[which]
        images[i] = image.clip(0, 1)
        labels[i] = classes[which]

    x, y = torch.from_numpy(images.reshape(count, -1)), torch.from_numpy(labels)
    return ClutteredDigits(
        train_x=x[:train],
        train_y=y[:train],
        test_x=x[train:],
        test_y=y[train:],
        source=f"{digits.source}; {'; '.join(p.source for p in pictures)}",
        version=pictures[0].version,
        sha256=hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest(),
        licence=f"{digits.licence}; {'; '.join(p.licence for p in pictures)}",
    )
