import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.init import low_rank_init
from stiefel.linalg import haar
from stiefel.theory import effective_rank

W = torch.tensor([[0.5, -0.3, 0.2], [0.1, 0.4, -0.2], [-0.6, 0.3, 0.7]], dtype=torch.float64)
KINDS = ("eig_mean", "participation", "entropy", "numeric")


def test_values_of_the_sheet():
    assert float(effective_rank(W)) == pytest.approx(0.8134939541, abs=1e-10)
    assert float(effective_rank(W, "participation")) == pytest.approx(1.8968479054, abs=1e-10)


def test_written_out():
    s = torch.linalg.svdvals(W).tolist()
    p = [v / sum(s) for v in s]
    entropy = math.exp(-sum(v * math.log(v) for v in p))
    assert float(effective_rank(W, "entropy")) == pytest.approx(entropy, rel=1e-12)
    eig = sorted((abs(v) for v in torch.linalg.eigvals(W).tolist()), reverse=True)
    assert float(effective_rank(W)) == pytest.approx(sum(eig) / (3 * eig[0]), rel=1e-12)


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 9), seed=st.integers(0, 99), scale=st.sampled_from([1e-30, 1.0, 1e30]))
def test_orthogonal_is_full_and_scale_does_not_matter(n, seed, scale):
    q = haar(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert float(effective_rank(scale * q)) == pytest.approx(1.0)
    for kind in ("participation", "entropy", "numeric"):
        assert float(effective_rank(scale * q, kind)) == pytest.approx(n)


def test_rank_one_is_one():
    w = torch.outer(W[0], W[2])
    for kind in ("participation", "entropy", "numeric"):
        assert float(effective_rank(w, kind)) == pytest.approx(1.0, abs=1e-6)
    assert float(effective_rank(w)) == pytest.approx(1 / 3, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_numeric_rank_of_truncated_matrices(dtype, generator):
    w = torch.randn(300, 300, generator=generator, dtype=dtype)
    for rank in (1, 30, 300):
        assert int(effective_rank(low_rank_init(w, rank), "numeric")) == rank
    assert int(effective_rank(torch.zeros(3, 2), "numeric")) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_batches_and_dtypes(kind):
    w = torch.stack([W, W @ W, W.mT + 1])
    ranks = effective_rank(w, kind)
    assert ranks.shape == (3,)
    for one, matrix in zip(ranks, w, strict=True):
        torch.testing.assert_close(one, effective_rank(matrix, kind))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        low = effective_rank(w.to(dtype), kind)
        assert low.dtype == dtype
        torch.testing.assert_close(low.double(), ranks, rtol=0.02, atol=0)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_gradients(kind):
    w = W.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: effective_rank(x, kind), w)


def test_bad_input():
    with pytest.raises(ValueError, match="one of eig_mean"):
        effective_rank(W, "stable")
    with pytest.raises(ValueError, match="rtol"):
        effective_rank(W, "numeric", rtol=1.0)
    with pytest.raises(ValueError, match="finite"):
        effective_rank(W * math.nan)
    with pytest.raises(ValueError, match="square"):
        effective_rank(W[:2])
    with pytest.raises(ValueError, match="rows and columns"):
        effective_rank(torch.zeros(0, 3), "numeric")
    zeros = torch.stack([W, torch.zeros_like(W)])
    for kind in KINDS[:3]:
        with pytest.raises(ValueError, match=r"no effective rank \(matrix \(1,\)"):
            effective_rank(zeros, kind)
    nilpotent = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    with pytest.raises(ValueError, match="no effective rank"):
        effective_rank(nilpotent)
