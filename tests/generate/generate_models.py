"""What the tests of this folder build on, importable from a process of its own."""

import torch

from stiefel.generate import RetrievalDenoiser


def small_network():
    """The same every time: 64 pixels, embeddings of width 12."""
    return RetrievalDenoiser(
        64, 12, width=16, blocks=2, inner=8, heads=2,
        generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
