"""Random numbers and fields that the tests of operators share."""

import math

import pytest
import torch

from stiefel.nn.operators import grid_coordinates

# torch's forward derivatives still load it.
jit_warning = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0):
    return torch.rand(shape, generator=seeded(seed), dtype=torch.float64)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def smooth(n, frequencies=3, channels=2, ndim=1, dtype=torch.float64):
    """Band-limited random functions on the grid of n points per axis, the same for every n."""
    g = seeded(3)
    x = grid_coordinates((n,) * ndim, dtype=torch.float64)
    total = torch.zeros(1, channels, *(n,) * ndim, dtype=torch.float64)
    for _ in range(5):
        k = torch.randint(-frequencies, frequencies + 1, (ndim,), generator=g).double()
        phase, size = torch.rand(2, channels, generator=g, dtype=torch.float64)
        angle = 2 * math.pi * torch.tensordot(k, x, 1)
        for c in range(channels):
            total[0, c] += size[c] * torch.cos(angle + 6 * phase[c])
    return total.to(dtype)
