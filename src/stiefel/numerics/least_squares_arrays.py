"""What goes in and out of the least-squares methods: arrays, tensors and sources of randomness."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from jaxtyping import Float


def is_tensor(x: Any) -> bool:
    """Whether ``x`` is a torch tensor. Does not import torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def as_array(x: Any, name: str) -> np.ndarray:
    """``x`` as a float64 array: lists, arrays and tensors of real numbers.

    Raises:
        TypeError: complex numbers, text or objects.
    """
    values = x.detach().cpu().numpy() if is_tensor(x) else np.asarray(x)
    if values.dtype.kind not in "fiub":
        raise TypeError(f"{name} must hold real numbers, got dtype {values.dtype}")
    return values.astype(np.float64, copy=False)


def like(x: np.ndarray, given: Any) -> Any:
    """``x`` as a tensor on the device of ``given`` if that is one, else as it is."""
    if not is_tensor(given):
        return x
    torch = sys.modules["torch"]
    return torch.from_numpy(np.ascontiguousarray(x)).to(given.device)


def check_finite(x: np.ndarray, name: str) -> None:
    """Raise ``ValueError`` if ``x`` holds a NaN or an infinity."""
    finite = np.isfinite(x)
    if not finite.all():
        raise ValueError(
            f"{name} must be finite, but {int(x.size - finite.sum())} of its {x.size} entries "
            "are NaN or infinite"
        )


def as_generator(generator: Any) -> np.random.Generator:
    """A NumPy generator.

    Args:
        generator: One already (used and advanced), ``None`` (unpredictable), a seed, a
            ``RandomState`` or a ``torch.Generator`` (each gives a seed, and is advanced).

    Raises:
        TypeError: anything else.
    """
    if isinstance(generator, np.random.Generator):
        return generator
    if generator is None or isinstance(generator, int | np.integer | np.random.SeedSequence):
        return np.random.default_rng(generator)
    if isinstance(generator, np.random.RandomState):
        return np.random.default_rng(generator.randint(2**32, size=4, dtype=np.uint32))
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(generator, torch.Generator):
        words = torch.randint(2**31 - 1, (4,), generator=generator, device=generator.device)
        return np.random.default_rng(words.tolist())
    raise TypeError(
        "generator must be None, a seed, a numpy Generator or RandomState or a torch.Generator, "
        f"got {type(generator).__name__}"
    )


def measure(mu: Any, size: int) -> Float[np.ndarray, " N"]:
    """Candidates' weights, normalised to sum 1; None is the uniform measure, without its memory.

    Raises:
        ValueError: wrong length, negative, NaN, infinite, or all zero.
    """
    if mu is None:
        return np.broadcast_to(np.float64(1.0 / size), (size,))
    weights = as_array(mu, "mu")
    if weights.shape != (size,):
        raise ValueError(
            f"mu must have one weight per candidate, {size} of them, got shape {weights.shape}"
        )
    check_finite(weights, "mu")
    if (weights < 0).any():
        raise ValueError(f"mu must be ≥ 0, its smallest entry is {weights.min()}")
    largest = weights.max()
    if largest == 0:
        raise ValueError("mu is zero everywhere; at least one candidate needs weight")
    scaled = weights / largest  # so that the sum cannot overflow
    return scaled / scaled.sum()
