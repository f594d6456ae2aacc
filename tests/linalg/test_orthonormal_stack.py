"""Random orthonormal matrices from reflections: orthonormal, uniform, as QR would give."""

import math

import pytest
import torch
from scipy.stats import kstest

from stiefel.linalg.decoupled import decoupled_factors
from stiefel.linalg.orthonormal_stack import orthonormal_stack

SHAPES = [(1, 1), (2, 2), (7, 7), (64, 64), (40, 9), (9, 40), (1, 5), (5, 1), (300, 300)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("haar", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-14), (torch.float32, 3e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)],
)
def test_narrow_side_is_orthonormal(shape, haar, dtype, tolerance, generator):
    q = orthonormal_stack(3, *shape, haar=haar, generator=generator, dtype=dtype)
    assert q.shape == (3, *shape)
    assert q.dtype is dtype
    q = q.double() if shape[0] >= shape[1] else q.double().mT
    eye = torch.eye(q.shape[-1], dtype=torch.float64)
    assert float((q.mT @ q - eye).abs().max()) <= tolerance


def test_it_is_the_qr_of_a_gaussian_matrix():
    """The twin: reflections on the columns of a matrix whose R is rebuilt must have R_ii > 0.

    With G = QR the column k of QᵀG is Gaussian length; here G is rebuilt from the reflectors.
    """
    n = 6
    x = torch.randn(1, n, n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    q = orthonormal_stack(1, n, n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)[
        0
    ]
    lower = x[0].mT.tril()  # drawn row by row
    # Undo the product from the left: after k reflections the next column is the k-th vector drawn.
    rest = q.mT.clone()  # square ones come transposed
    for k in range(n):
        v = lower[:, k].clone()
        sign = -1.0 if v[k] < 0 else 1.0
        assert float(rest[:, k] @ (v / v.norm())) == pytest.approx(1.0)  # Q e_k is that vector
        v[k] += sign * v.norm()
        rest -= 2 * torch.outer(v, v @ rest) / (v @ v)
        assert float(rest[k, k]) == pytest.approx(-sign)
    torch.testing.assert_close(rest.abs(), torch.eye(n, dtype=torch.float64))


def test_it_is_uniform_and_plain_signs_are_not(generator):
    """An entry of a Haar matrix of size 3 is uniform in (−1, 1); det is ±1 with equal chance."""
    q = orthonormal_stack(6000, 3, 3, generator=generator, dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            assert kstest(q[:, i, j].numpy(), "uniform", args=(-1, 2)).pvalue > 1e-4
    assert abs(float(torch.linalg.det(q).mean())) < 5 / math.sqrt(6000)
    # Invariance: the trace of Q times any fixed rotation has the same law, mean 0 and variance 1.
    turn = orthonormal_stack(1, 3, 3, generator=generator, dtype=torch.float64)[0]
    traces = (turn @ q).diagonal(dim1=-2, dim2=-1).sum(-1)
    assert abs(float(traces.mean())) < 0.07
    assert float(traces.var()) == pytest.approx(1.0, abs=0.1)
    plain = orthonormal_stack(500, 3, 3, haar=False, generator=generator)
    assert (plain[:, 0, 0] <= 0).all()  # LAPACK's reflections turn the first entry to −sign


def test_seeds_and_sizes(generator):
    first, again = (
        orthonormal_stack(2, 4, 3, generator=torch.Generator().manual_seed(1)) for _ in range(2)
    )
    assert torch.equal(first, again)
    assert orthonormal_stack(0, 4, 3).shape == (0, 4, 3)
    assert orthonormal_stack(2, 0, 3).shape == (2, 0, 3)
    with pytest.raises(ValueError, match="at least 0, got 1, -1 and 2"):
        orthonormal_stack(1, -1, 2)
    with pytest.raises(TypeError, match="floating point"):
        orthonormal_stack(1, 2, 2, dtype=torch.int64)


def test_decoupled_factors_multiply_to_the_modes(generator):
    left = orthonormal_stack(1, 5, 4, generator=generator, dtype=torch.float64)[0]
    right = orthonormal_stack(1, 8, 4, generator=generator, dtype=torch.float64)[0]
    amplitude = torch.tensor([1.0, 0.8, 0.6, 0.4], dtype=torch.float64)
    for hidden, kept in (((), 4), ((6,), 4), ((7, 3, 9), 3)):
        factors = decoupled_factors(left, right, hidden, amplitude, count=2, generator=generator)
        assert [f.shape[-2:] for f in factors] == [
            (b, a) for a, b in zip((8, *hidden), (*hidden, 5), strict=True)
        ]
        product = factors[0]
        for factor in factors[1:]:
            product = factor @ product
        power = amplitude[:kept] ** (len(hidden) + 1)
        exact = left[:, :kept] * power @ right[:, :kept].mT
        torch.testing.assert_close(product, exact.expand(2, -1, -1))
        for factor in factors:
            values = torch.linalg.svdvals(factor[0])[:kept]
            torch.testing.assert_close(values, amplitude[:kept])
