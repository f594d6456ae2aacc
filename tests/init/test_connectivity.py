import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.init import block_init, dale_init
from stiefel.theory import effective_rank


@settings(deadline=None, max_examples=30)
@given(
    n=st.integers(3, 30),
    share=st.floats(0.2, 0.8),
    balanced=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_neuron_has_one_sign(n, share, balanced, seed):
    excitatory = round(share * n)
    if balanced and not 0 < excitatory < n:
        return
    generator = torch.Generator().manual_seed(seed)
    w = dale_init(n, share, balanced, 2.0, generator=generator, dtype=torch.float64)
    assert (w[:, :excitatory] >= 0).all()
    assert (w[:, excitatory:] <= 0).all()
    assert float(w.norm()) == pytest.approx(2 * math.sqrt(n), rel=1e-12)
    if balanced:
        assert w.sum(-1).abs().max() < 1e-12


def test_without_balance_the_mean_adds_an_eigenvalue(generator):
    draw = {"generator": generator, "dtype": torch.float64}
    loose, tight = dale_init(200, balanced=False, **draw), dale_init(200, **draw)
    sizes = [torch.linalg.eigvals(w).abs().sort().values for w in (loose, tight)]
    assert sizes[0][-1] > 3 * sizes[0][-2]
    assert sizes[1][-1] < 1.5 * sizes[1][-2]
    assert effective_rank(loose) < 0.5 * effective_rank(tight)


def test_blocks_have_their_means(generator):
    sizes, means = (150, 50), [[0.5, -1.0], [2.0, 0.0]]
    w = block_init(sizes, means, generator=generator, dtype=torch.float64)
    assert float(w.norm()) == pytest.approx(1.25 * math.sqrt(200), rel=1e-12)
    scale = w[150:, 150:].std()  # that block has mean zero: its spread is the unit
    groups = (slice(0, 150), slice(150, 200))
    for a in range(2):
        for b in range(2):
            block = w[groups[a], groups[b]] / scale
            assert float(block.mean()) == pytest.approx(means[a][b], abs=0.1)


def test_blocks_without_means_are_gaussian(generator):
    plain = block_init([4, 6], torch.zeros(2, 2), 1.0, generator=generator)
    again = torch.randn(10, 10, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(plain, again * math.sqrt(10) / again.norm())
    strong = block_init([4, 6], [[9.0, 0.0], [0.0, -9.0]], 1.0, generator=generator)
    assert effective_rank(strong, "participation") < effective_rank(plain, "participation")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    for w in (dale_init(8, dtype=dtype), block_init([4, 4], torch.eye(2), dtype=dtype)):
        assert w.dtype == dtype
        assert w.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "n must be at least 1"),
        ((5, 1.1), "frac_exc must be in"),
        ((5, math.nan), "frac_exc must be in"),
        ((5, 1.0), "5 excitatory of 5"),
        ((5, 0.01), "0 excitatory of 5"),
        ((5, 0.8, True, 0.0), "gain must be positive"),
    ],
)
def test_bad_dale(arguments, message):
    with pytest.raises(ValueError, match=message):
        dale_init(*arguments)


@pytest.mark.parametrize(
    ("sizes", "means", "message"),
    [
        ([], [[1.0]], "one or more positive"),
        ([2, 0], [[1.0, 0.0], [0.0, 1.0]], "one or more positive"),
        ([2, 2], [[1.0]], r"means must be \[2, 2\]"),
        ([2], [[math.inf]], "finite"),
    ],
)
def test_bad_blocks(sizes, means, message):
    with pytest.raises(ValueError, match=message):
        block_init(sizes, means)
