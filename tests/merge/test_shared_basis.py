"""The shared bases: orthogonality, exact values, and that a seed alone gives the same columns."""

import hashlib
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.linalg import dct_matrix
from stiefel.merge import free_slots, shared_basis
from stiefel.merge.shared_basis import (
    gaussian_columns,
    hashed,
    identity_word,
    random_columns,
    slot_columns,
    text_word,
)

WORD = (1 << 64) - 1


def mix(z):
    """SplitMix64's finaliser on Python's integers: the recipe of the docstring."""
    z = (z + 0x9E3779B97F4A7C15) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def hash_of(*words):
    h = 0
    for word in words:
        h = mix(h ^ (word & WORD))
    return h


def basis_by_the_recipe(m, cols, seed):
    """One entry after another, from the docstring alone."""
    order = sorted(range(m), key=lambda j: hash_of(2, seed, m, j))
    b = torch.empty(m, len(cols), dtype=torch.float64)
    for k in range(m):
        sign = -1 if hash_of(1, seed, k) >> 63 else 1
        for i, column in enumerate(cols):
            p = order[column]
            scale = math.sqrt((1 if p == 0 else 2) / m)
            b[k, i] = sign * scale * math.cos(math.pi * (2 * k + 1) * p / (2 * m))
    return b


def test_hash_is_splitmix():
    # The first outputs of SplitMix64 started at 0, as published with it.
    assert mix(0) == 0xE220A8397B1DCDAF
    assert mix(0x9E3779B97F4A7C15) == 0x6E789E6AA1B965F4
    words = np.array([0, 1, 2**40], dtype=np.int64)
    assert hashed((5, -1), words).tolist() == [hash_of(5, -1, w) for w in words.tolist()]


@settings(max_examples=20, deadline=None)
@given(m=st.integers(1, 24), seed=st.integers(-3, 2**40), data=st.data())
def test_columns_follow_the_recipe(m, seed, data):
    cols = data.draw(st.lists(st.integers(0, m - 1), min_size=1, unique=True))
    found = shared_basis(m, cols, seed=seed, dtype=torch.float64)
    torch.testing.assert_close(found, basis_by_the_recipe(m, cols, seed), atol=1e-14, rtol=0)


@pytest.mark.parametrize("basis", ["dct", "qr"])
@pytest.mark.parametrize("m", [1, 2, 7, 64, 320])
def test_all_columns_are_an_orthogonal_matrix(basis, m):
    o = shared_basis(m, range(m), basis=basis, seed=3)
    assert o.dtype == torch.float32
    torch.testing.assert_close(o.T @ o, torch.eye(m), atol=2e-6, rtol=0)
    # A few columns are those of the whole, in the order asked for.
    some = [m - 1, 0] if m > 1 else [0]
    assert torch.equal(shared_basis(m, torch.tensor(some), basis=basis, seed=3), o[:, some])
    if m > 2:
        assert not torch.equal(shared_basis(m, range(m), basis=basis, seed=4), o)


def test_exact_values_of_the_plain_basis():
    """The sheet's example: m = 8, no signs, no order."""
    b = shared_basis(8, range(8), seed=None, dtype=torch.float64)
    torch.testing.assert_close(b, dct_matrix(8, dtype=torch.float64).T)
    a1 = torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=torch.float64)
    a2 = torch.tensor([[1, -1], [0, 2], [0.5, 0]], dtype=torch.float64)
    b1, b2, b3 = b[:, [0, 3]], b[:, [3, 5]], b[:, [5, 6]]
    torch.testing.assert_close(b1.T @ b2, torch.tensor([[0.0, 0], [1, 0]], dtype=torch.float64))
    d1, d2, d3 = a1 @ b1.T, a2 @ b2.T, a2 @ b3.T
    wanted = torch.tensor([[2.0, 0, 1], [4, 0, 2], [6, 0, 3]], dtype=torch.float64)
    torch.testing.assert_close(d1 @ d2.T, wanted, atol=1e-14, rtol=0)
    assert float((d1 @ d2.T).norm()) == pytest.approx(8.366600265340757, abs=1e-13)
    normalised = float((d1 @ d2.T).norm() / (d1.norm() * d2.norm()))
    assert normalised == pytest.approx(0.3508232077228119, abs=1e-14)
    assert float((d1 @ d3.T).abs().max()) < 1e-14
    x = b1 @ torch.tensor([0.3, -2.0], dtype=torch.float64)
    torch.testing.assert_close((d1 + d3) @ x, d1 @ x)


def test_dtypes_are_rounded_last():
    exact = shared_basis(50, [3, 7], dtype=torch.float64)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(shared_basis(50, [3, 7], dtype=dtype), exact.to(dtype))
    b = shared_basis(4096, range(20), dtype=torch.float64)
    assert float((b.T @ b - torch.eye(20, dtype=b.dtype)).abs().max()) < 1e-13


def test_columns_cost_no_matrix():
    """20 columns of width 10⁵ in a moment: the whole matrix would have 10¹⁰ numbers."""
    start = time.thread_time()
    b = shared_basis(100_000, [0, 1, 99_999, *range(20, 37)])
    assert time.thread_time() - start < 2
    torch.testing.assert_close(b.T @ b, torch.eye(20), atol=1e-5, rtol=0)


def test_random_columns_are_documented_and_differ():
    word = int.from_bytes(hashlib.sha256(b"str:mia").digest()[:8], "little")
    assert identity_word("mia") == word
    assert identity_word(7) == text_word("int:7") != identity_word("7")
    keys = [hash_of(3, 5, word, text_word("q"), 40, j) for j in range(40)]
    wanted = sorted(range(40), key=keys.__getitem__)[:6]
    assert random_columns(40, 6, seed=5, adapter_id="mia", layer="q") == wanted
    others = [
        random_columns(40, 6, seed=6, adapter_id="mia", layer="q"),
        random_columns(40, 6, seed=5, adapter_id="leo", layer="q"),
        random_columns(40, 6, seed=5, adapter_id="mia", layer="k"),
    ]
    assert all(other != wanted for other in others)
    assert sorted(random_columns(9, 9, adapter_id=1)) == list(range(9))
    with pytest.raises(TypeError, match="a string or an integer, got True"):
        identity_word(True)


@pytest.mark.parametrize(("m", "r", "none", "shared"), [(320, 20, 0.264, 1.25), (64, 8, 0.321, 1)])
def test_shared_columns_are_hypergeometric(m, r, none, shared):
    """P(no column shared) = C(m-r, r) / C(m, r) and E = r² / m, over 1,600 pairs of ids."""
    assert math.comb(m - r, r) / math.comb(m, r) == pytest.approx(none, abs=5e-4)
    sets = [set(random_columns(m, r, adapter_id=i)) for i in range(80)]
    counts = [len(a & b) for a in sets[:40] for b in sets[40:]]
    assert np.mean([c == 0 for c in counts]) == pytest.approx(none, abs=0.06)
    assert np.mean(counts) == pytest.approx(shared, abs=0.12)


def test_overlap_is_the_number_of_shared_columns():
    a, b = ([1, 5, 9, 12], [5, 12, 13, 0])
    o = [shared_basis(16, c, seed=2, dtype=torch.float64) for c in (a, b)]
    assert float((o[0].T @ o[1]).square().sum()) == pytest.approx(2, abs=1e-12)


def test_gaussian_columns_have_their_variance():
    b = gaussian_columns(500, 40, adapter_id="a")
    assert b.shape == (500, 40)
    assert float(b.var() * 500) == pytest.approx(1, abs=0.03)
    assert float(b.mean() * 500**0.5) == pytest.approx(0, abs=0.03)
    assert float((b**4).mean() * 500**2) == pytest.approx(3, abs=0.2)
    assert torch.equal(b, gaussian_columns(500, 40, adapter_id="a"))
    meet = (b.T @ gaussian_columns(500, 40, adapter_id="b")).square().sum()
    # E||B₁ᵀB₂||² = r² / m, as for random columns.
    assert float(meet) == pytest.approx(40**2 / 500, rel=0.2)


def test_slots():
    assert slot_columns(20, 6, 2) == [12, 13, 14, 15, 16, 17]
    assert free_slots(20, 6) == [0, 1, 2]
    assert free_slots(20, 6, [1]) == [0, 2]
    assert free_slots(20, 6, [2, 0, 1]) == []
    assert len(free_slots(768, 20)) == 38
    for bad in (-1, 3):
        with pytest.raises(ValueError, match=r"slot must be in 0\.\.2 for rank 6 of width 20"):
            slot_columns(20, 6, bad)
        with pytest.raises(ValueError, match=r"used slots must be in 0\.\.2"):
            free_slots(20, 6, [bad])
    with pytest.raises(ValueError, match=r"slots \[1\] are used twice"):
        free_slots(20, 6, [1, 1])
    for call in (slot_columns, lambda m, r, s: free_slots(m, r)):
        with pytest.raises(ValueError, match=r"r must be in 1\.\.5"):
            call(5, 6, 0)
        with pytest.raises(ValueError, match=r"r must be in 1\.\.5"):
            call(5, 0, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cols": []}, "at least 1"),
        ({"m": 0}, "at least 1"),
        ({"cols": [0, 8]}, r"0\.\.7, got \[8\]"),
        ({"cols": [-1]}, r"got \[-1\]"),
        ({"cols": [3, 2, 3]}, r"different numbers in 0\.\.7, got \[3\]"),
        ({"basis": "qr", "seed": None}, "seed must be an integer"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        shared_basis(**({"m": 8, "cols": [0, 1]} | arguments))


def test_unknown_types():
    with pytest.raises(TypeError, match="floating point"):
        shared_basis(8, [0], dtype=torch.int64)
