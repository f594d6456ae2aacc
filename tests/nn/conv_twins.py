"""The matrix of a convolution, entry by entry, and the kernel of the exact values."""

import itertools
import math

import torch


def det_kernel(m, c, k, dim=2):
    """sin(n²)/√(C·k^d), n = 1, 2, … in row-major order."""
    n = torch.arange(1, m * c * k**dim + 1, dtype=torch.float64)
    return (torch.sin(n**2) / math.sqrt(c * k**dim)).reshape(m, c, *[k] * dim)


def dense(kernel, image, stride, border="circular", groups=1):
    """[M·∏N, C·∏image]: one loop over everything. Borders: circular, valid, zeros (same)."""
    m, per_group, *k = kernel.shape
    c, dim = per_group * groups, len(k)
    stride = (stride,) * dim if isinstance(stride, int) else stride
    if border == "valid":
        outputs = [(n - size) // s + 1 for n, size, s in zip(image, k, stride, strict=True)]
        before = [0] * dim
    else:
        outputs = [-(-n // s) for n, s in zip(image, stride, strict=True)]
        before = [(size - 1) // 2 if border == "zeros" else 0 for size in k]
    matrix = torch.zeros(m, *outputs, c, *image, dtype=kernel.dtype)
    for out, tap in itertools.product(
        itertools.product(*map(range, outputs)), itertools.product(*map(range, k))
    ):
        place = [o * s + t - b for o, s, t, b in zip(out, stride, tap, before, strict=True)]
        if border == "circular":
            place = [p % n for p, n in zip(place, image, strict=True)]
        elif any(not 0 <= p < n for p, n in zip(place, image, strict=True)):
            continue
        for g in range(groups):
            rows = slice(g * (m // groups), (g + 1) * (m // groups))
            columns = slice(g * per_group, (g + 1) * per_group)
            matrix[(rows, *out, columns, *place)] += kernel[(rows, slice(None), *tap)]
    return matrix.reshape(m * math.prod(outputs), -1)


def distance(matrix):
    """‖AAᵀ − I‖_F or ‖AᵀA − I‖_F on the smaller side, and the same in the spectral norm."""
    gram = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
    off = gram - torch.eye(len(gram), dtype=gram.dtype)
    return float(torch.linalg.matrix_norm(off)), float(torch.linalg.matrix_norm(off, 2))
