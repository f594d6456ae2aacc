"""Diagnostics of row normalisation: closed forms, slow twins, and what noise gives."""

import math

import pytest
import torch
from law_table import assert_all_close, noise, values
from torch import nn

from stiefel.linalg import haar, polar
from stiefel.optim import (
    RMNP,
    Muon,
    polar_cosine,
    rmnp_direction,
    row_dominance,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def slow_dominance(v):
    gram = [[float(a @ b) for b in v] for a in v]
    n = len(gram)
    r = [
        gram[i][i] / (sum(abs(gram[i][j]) for j in range(n) if j != i) / (n - 1)) for i in range(n)
    ]
    return sum(r) / n, min(r), max(r)


@every_dtype
def test_row_dominance_equals_its_slow_twin(dtype):
    v = noise((2, 5, 3), 0, dtype)
    kept = v.clone()
    found = row_dominance(v)
    assert torch.equal(v, kept)
    assert all(f.shape == (2,) for f in found)
    expected = [slow_dominance(matrix.double()) for matrix in v]
    for k in range(3):
        torch.testing.assert_close(
            found[k].double(), torch.tensor([e[k] for e in expected]).double(), rtol=1e-4, atol=1e-5
        )
    for i in range(2):
        assert_all_close(
            [f.double() for f in row_dominance(v[i])], [f[i].double() for f in found], 1e-6
        )


def test_row_dominance_of_transposed_matrices():
    tall, wide = noise((6, 4), 0), noise((4, 6), 1)
    assert_all_close(list(row_dominance(tall, True)), list(row_dominance(tall.T)))
    assert_all_close(list(row_dominance(wide, True)), list(row_dominance(wide)))


def test_row_dominance_at_the_edges():
    eye = torch.eye(3, 4, dtype=torch.float64)
    assert [float(f) for f in row_dominance(eye)] == [math.inf] * 3
    eye[1] = 0
    mean, low, high = row_dominance(eye)
    assert (float(mean), float(low), float(high)) == (math.inf, 0.0, math.inf)
    same_rows = torch.ones(3, 4, dtype=torch.float64)
    assert_all_close([torch.stack(row_dominance(same_rows))], [torch.ones(3, dtype=torch.float64)])
    with pytest.raises(ValueError, match="at least two rows"):
        row_dominance(torch.ones(1, 4))


def test_row_dominance_works_through_many_rows_in_pieces():
    v = noise((4100, 3), 0)
    gram = (v @ v.T).abs()
    own = gram.diagonal()
    r = own * 4099 / (gram.sum(1) - own)
    assert_all_close(list(row_dominance(v)), [r.mean(), r.min(), r.max()], 1e-10)


@pytest.mark.parametrize("cols", [96, 384])
def test_dominance_of_noise_grows_with_the_columns_alone(cols):
    mean, _, _ = row_dominance(noise((96, cols), 0))
    assert float(mean) == pytest.approx(math.sqrt(math.pi * cols / 2), rel=0.03)


def test_cosine_to_the_polar_factor():
    assert float(polar_cosine(noise((256, 256), 0))) == pytest.approx(0.85, abs=0.01)
    assert float(polar_cosine(noise((96, 384), 1))) == pytest.approx(0.967, abs=0.005)
    assert float(polar_cosine(noise((384, 96), 2))) == pytest.approx(0.967, abs=0.005)
    v = noise((2, 4, 6), 3)
    a, b = rmnp_direction(v), polar(v)
    expected = [float((a[i] * b[i]).sum() / (a[i].norm() * b[i].norm())) for i in range(2)]
    assert_all_close([polar_cosine(v)], [torch.tensor(expected, dtype=torch.float64)])
    assert polar_cosine(v.float()).dtype == torch.float64


def test_orthogonal_rows_are_the_polar_factor():
    q = haar(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v = torch.arange(1, 7, dtype=torch.float64)[:, None] * q
    assert_all_close([rmnp_direction(v), polar(v)], [q, q], 4e-15)
    assert float(polar_cosine(v)) == pytest.approx(1, abs=1e-14)


def test_muon_and_rmnp_agree_on_orthogonal_rows():
    """One step from orthogonal gradients: the same direction up to the polynomial's error."""
    q = haar(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pair = [nn.Parameter(torch.zeros(4, 6, dtype=torch.float64)) for _ in range(2)]
    for p in pair:
        p.grad = torch.tensor([1.0, 0.5, 2.0, 0.7]).double()[:, None] * q
    optimizers = Muon([pair[0]], lr=1.0, weight_decay=0.0), RMNP([pair[1]], lr=1.0)
    for optimizer in optimizers:
        optimizer.step()
    assert_all_close(values(optimizers[1]), [-q])
    assert_all_close(values(optimizers[0]), [-q], 0.06)
