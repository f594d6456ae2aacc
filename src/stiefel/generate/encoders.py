"""Frozen encoders φ: image → vector. Any callable will do; these two know nothing of labels.

Their statistics belong to the encoder. They are fitted once and stay: refitted on a swapped
database they would move the new domain onto the old one, and the swap would silently weaken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stiefel.generate._checks import Images, as_images, whole
from stiefel.linalg import dct

Encoder = Callable[[Tensor], Tensor]
# Two encoders are one where a probe image's vectors differ by less, relative to their norm.
SAME_ENCODER = 1e-4
# How a probe's pixels are drawn: Knuth's multiplicative hash, the same on every machine.
_HASH = 2654435761


def zigzag(height: int, width: int) -> list[tuple[int, int]]:
    """All (row, column) of a matrix along its antidiagonals, turning at each, as in JPEG."""
    cells = [(i, j) for i in range(height) for j in range(width)]
    # Odd diagonals run down, even ones up.
    return sorted(cells, key=lambda c: (sum(c), c[0] if sum(c) % 2 else -c[0]))


def probe(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """One fixed image ``[1, *shape]`` of all frequencies in [-1, 1)."""
    count = int(np.prod(shape))
    values = (np.arange(1, count + 1, dtype=np.uint64) * _HASH) % 2**32
    image = torch.from_numpy(values.astype(np.float64) / 2**31 - 1)
    return image.reshape(1, *shape).to(dtype)


def encode(encoder: Encoder, images: Tensor, *, batch: int = 4096) -> Tensor:
    """``φ(images)`` as rows ``[N, e]``, in batches; gradients are not tracked.

    Raises:
        TypeError: ``encoder`` is not callable, or returns no floating-point tensor.
        ValueError: it returns another number of rows, or no columns.
    """
    if not callable(encoder):
        raise TypeError(f"encoder must be callable, got {type(encoder).__name__}")
    parts = []
    with torch.no_grad():
        for part in images.split(batch):
            out = encoder(part)
            if not isinstance(out, Tensor) or not out.is_floating_point():
                kind = out.dtype if isinstance(out, Tensor) else type(out).__name__
                raise TypeError(f"encoder must return a floating-point tensor, got {kind}")
            if out.ndim < 2 or len(out) != len(part) or not out.numel():
                raise ValueError(
                    f"encoder must return one vector an image: got shape {tuple(out.shape)} "
                    f"of {len(part)} images"
                )
            parts.append(out.flatten(1))
    return torch.cat(parts)


def fingerprint(encoder: Encoder, shape: tuple[int, ...]) -> Tensor:
    """What tells encoders apart: the vector ``[e]`` of :func:`probe`, in float64."""
    return encode(encoder, probe(shape))[0].double().cpu()


def same_encoder(a: Tensor, b: Tensor) -> bool:
    """Whether two fingerprints of one width are those of one encoder."""
    return bool((a - b).norm() <= SAME_ENCODER * torch.maximum(a.norm(), b.norm()))


class DCTEncoder:
    """The first coefficients of the orthonormal 2-D DCT-II, in zig-zag order, centred and scaled.

    ``(c - mean) / std``: ``mean[keep]`` per coefficient, ``std`` one number for all. Images
    ``[..., H, W]`` become ``[..., keep]``; a colour image ``[C, H, W]`` becomes ``[C, keep]``,
    which the database flattens.
    """

    def __init__(
        self, keep: int = 24, mean: Tensor | None = None, std: float | int | Tensor | None = None
    ) -> None:
        """An encoder; without statistics until :meth:`fit`, unless they are given.

        Args:
            keep: Coefficients kept. Fewer give newer images, more give closer ones.
            mean: ``[keep]``, subtracted.
            std: One positive number, divided by.

        Raises:
            TypeError: ``keep`` is no whole number.
            ValueError: ``keep`` < 1, ``mean`` is not ``[keep]`` or not finite, or ``std`` not > 0.
        """
        self.keep = whole(keep, "keep")
        self.mean = torch.zeros(self.keep) if mean is None else torch.as_tensor(mean)
        self.std = torch.ones(()) if std is None else torch.as_tensor(std, dtype=torch.float64)
        _check_statistics(self.mean, self.std, self.keep)

    def coefficients(self, x: Tensor) -> Tensor:
        """The plain coefficients ``[..., keep]`` of images ``[..., H, W]``.

        Raises:
            TypeError: integer images.
            ValueError: fewer than two dimensions, or images of fewer than ``keep`` pixels.
        """
        if x.ndim < 2:
            raise ValueError(f"x must be images [..., H, W], got shape {tuple(x.shape)}")
        height, width = x.shape[-2:]
        if height * width < self.keep:
            raise ValueError(f"keep={self.keep} of an image of {height} × {width} pixels")
        order = zigzag(height, width)[: self.keep]
        both = dct(dct(x, dim=-1), dim=-2).flatten(-2)
        return both[..., torch.tensor([i * width + j for i, j in order], device=x.device)]

    def fit(self, x: Images) -> DCTEncoder:
        """Take mean and standard deviation from images ``[N, ..., H, W]``; returns itself.

        Raises:
            TypeError: integer images.
            ValueError: no image, NaN, or all images are the same.
        """
        found = self.coefficients(as_images(x, "x").detach().double()).reshape(-1, self.keep)
        mean = found.mean(0)
        std = (found - mean).square().mean().sqrt()
        _check_statistics(mean, std, self.keep)
        self.mean, self.std = mean, std
        return self

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., keep]`` of images ``[..., H, W]``, in their precision."""
        found = self.coefficients(x)
        return (found - self.mean.to(found)) / self.std.to(found)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a file needs to make it again: settings and tensors."""
        return {"kind": "dct", "keep": self.keep}, {"mean": self.mean, "std": self.std}


class PCAEncoder:
    """The first principal components of the images it was fitted on, centred and scaled.

    ``(x - mean) components / std`` with one ``std`` for all. Images ``[..., *shape]`` become
    ``[..., keep]``.
    """

    def __init__(
        self,
        keep: int = 24,
        mean: Tensor | None = None,
        components: Tensor | None = None,
        std: float | int | Tensor | None = None,
    ) -> None:
        """An encoder; call :meth:`fit` unless ``mean[*shape]``, ``components[D, keep]`` are given.

        Raises:
            TypeError: ``keep`` is no whole number.
            ValueError: ``keep`` < 1, or only one of ``mean`` and ``components`` is given.
        """
        self.keep = whole(keep, "keep")
        if (mean is None) != (components is None):
            raise ValueError("mean and components belong together: give both or neither")
        self.mean, self.components = mean, components
        self.std = torch.ones(()) if std is None else torch.as_tensor(std, dtype=torch.float64)

    def fit(self, x: Images) -> PCAEncoder:
        """Take the components from images ``[N, *shape]``; returns itself.

        Signs: the largest entry of each component is positive, so that they are the same anywhere.

        Raises:
            TypeError: integer images.
            ValueError: NaN, fewer images or pixels than components, or all images are the same.
        """
        images = as_images(x, "x").detach().double()
        rows = images.flatten(1)
        most = min(rows.shape)
        if self.keep > most:
            raise ValueError(f"keep={self.keep} components of {len(rows)} images, at most {most}")
        mean = rows.mean(0)
        _, _, vectors = torch.linalg.svd(rows - mean, full_matrices=False)
        found = vectors[: self.keep].mT
        top = found.gather(0, found.abs().argmax(0, keepdim=True))
        found = found * torch.where(top < 0, -1.0, 1.0)
        std = ((rows - mean) @ found).square().mean().sqrt()
        _check_statistics(mean, std, len(mean))
        self.mean, self.components, self.std = mean.reshape(images.shape[1:]), found, std
        return self

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., keep]`` of images ``[..., *shape]``.

        Raises:
            ValueError: not fitted, or images of another shape.
        """
        if self.mean is None or self.components is None:
            raise ValueError("this PCAEncoder has no components yet: call fit first")
        shape = self.mean.shape
        if x.shape[x.ndim - len(shape) :] != shape:
            raise ValueError(f"x must be images of shape {tuple(shape)}, got {tuple(x.shape)}")
        centred = (x - self.mean.to(x)).flatten(x.ndim - len(shape))
        return centred @ self.components.to(x) / self.std.to(x)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a file needs to make it again: settings and tensors."""
        if self.mean is None or self.components is None:
            raise ValueError("this PCAEncoder has no components yet: call fit first")
        tensors = {"mean": self.mean, "components": self.components, "std": self.std}
        return {"kind": "pca", "keep": self.keep}, tensors


def from_state(settings: dict[str, Any], tensors: dict[str, Tensor]) -> DCTEncoder | PCAEncoder:
    """The encoder that :meth:`DCTEncoder.state` or :meth:`PCAEncoder.state` described.

    Raises:
        ValueError: another kind.
    """
    kinds = {"dct": DCTEncoder, "pca": PCAEncoder}
    if settings.get("kind") not in kinds:
        raise ValueError(f"encoder kind must be one of {', '.join(kinds)}, got {settings!r}")
    return kinds[settings["kind"]](settings["keep"], **tensors)


def _check_statistics(mean: Tensor, std: Tensor, width: int) -> None:
    if mean.shape != (width,) or not bool(mean.isfinite().all()):
        raise ValueError(f"mean must be {width} finite numbers, got shape {tuple(mean.shape)}")
    if std.ndim or not bool(std.isfinite()) or float(std) <= 0:
        raise ValueError(f"std must be one positive number, got {std.tolist()}: do images differ?")
