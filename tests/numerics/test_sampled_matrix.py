import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.stats import chisquare

from stiefel.numerics.sampled import SampledMatrix, sketch
from stiefel.numerics.sampled.sources import BLOCK
from stiefel.numerics.sampled.tree import FAN, SumTree

# The sheet's matrix.
A = np.array([[1.0, 2, 0], [3, 4, 1], [0, 1, -2], [2, 0, 2]])
NORMS = [5.0, 26, 5, 8]


def chance(counts, expected):
    """p-value of counts against chances; where a chance is 0 nothing may have come."""
    counts, expected = np.ravel(counts), np.ravel(expected)
    assert not counts[expected == 0].any()
    kept = expected > 0
    return chisquare(counts[kept], counts.sum() * expected[kept] / expected.sum()).pvalue


def test_sheet_values():
    m = SampledMatrix(A)
    np.testing.assert_array_equal(m.row_norms2, NORMS)
    assert m.fro2 == 44
    assert (m.shape, m.dtype) == ((4, 3), np.float64)
    index, p = m.sample_rows(1000, 0)
    expected = np.array([0.1136363636, 0.5909090909, 0.1136363636, 0.1818181818])
    np.testing.assert_allclose(p, expected[index], atol=1e-10)
    assert chance(np.bincount(index, minlength=4), expected) > 1e-3


def readings(tmp_path):
    a = np.random.default_rng(0).standard_normal((50, 7)).astype(np.float32)
    a[a > 1] = 0
    np.save(tmp_path / "a.npy", a)
    tensor = torch.from_numpy(a)
    return a, {
        "list": a.tolist(),
        "float64": a.astype(np.float64),
        "fortran": np.asfortranarray(a),
        "float16": a.astype(np.float16),
        "integers": (10 * a).astype(np.int8),
        "booleans": a > 0,
        "memmap": np.load(tmp_path / "a.npy", mmap_mode="r"),
        "csr_array": sparse.csr_array(a),
        "csr_matrix": sparse.csr_matrix(a),
        "torch": tensor,
        "bfloat16": tensor.bfloat16(),
        "grad": tensor.clone().requires_grad_(),
        "torch csr": tensor.to_sparse_csr(),
        "complex": a + 1j * a[::-1],
        "torch conj": (tensor + 1j * tensor.flip(0)).conj(),
        "strided": np.repeat(a, 2, axis=1)[:, ::2],
    }


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_every_kind_of_matrix_is_read_alike(tmp_path):
    a, kinds = readings(tmp_path)
    for name, given_ in kinds.items():
        m = SampledMatrix(given_)
        if name in ("csr_array", "csr_matrix", "torch csr"):
            dense = a
        elif isinstance(given_, torch.Tensor):
            dense = given_.detach().resolve_conj()
            dense = (dense if dense.is_complex() else dense.double()).numpy()
        else:
            dense = np.asarray(given_)
        dense = dense.astype(m.dtype)
        np.testing.assert_allclose(m.row_norms2, np.square(np.abs(dense)).sum(1), err_msg=name)
        np.testing.assert_array_equal(m.rows([3, 0, 3]), dense[[3, 0, 3]], err_msg=name)
        np.testing.assert_array_equal(m.entries([3, 0], [1, 6]), dense[[3, 0], [1, 6]])
        i, j, p = m.sample_entries(200, 1)
        squares = np.square(np.abs(dense))
        np.testing.assert_allclose(p, squares[i, j] / squares.sum(), err_msg=name)
        assert (p > 0).all()


def test_entries_follow_their_law():
    for given_ in (A, sparse.csr_array(A), torch.from_numpy(A)):
        i, j, _ = SampledMatrix(given_).sample_entries(4000, 3)
        counts = np.zeros((4, 3))
        np.add.at(counts, (i, j), 1)
        assert chance(counts, A**2) > 1e-3


def test_nothing_of_the_matrix_is_copied():
    a = np.random.default_rng(0).standard_normal((4000, 300))
    import tracemalloc

    tracemalloc.start()
    m = SampledMatrix(a)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 0.05 * a.nbytes
    a[7] = 2.0  # the owner changes a row and says so
    m.update_row(7)
    np.testing.assert_array_equal(m.rows(7), a[7:8])
    assert m.row_norms2[7] == 1200
    assert m.fro2 == pytest.approx((a**2).sum())
    m.update_row([7, 8], np.ones((2, 300)))
    m.update_row(7)  # back to what A holds
    np.testing.assert_array_equal(m.rows([7, 8]), np.stack([a[7], np.ones(300)]))


def test_blocks_of_a_file_larger_than_a_block(tmp_path):
    """Several blocks, the last one short: same as in memory; peak memory is that of a block."""
    import tracemalloc

    n, d = 3 * (BLOCK // 64) + 5, 64
    file = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.float32, (n, d))
    file[:] = np.random.default_rng(0).standard_normal((n, d), dtype=np.float32)
    file.flush()
    tracemalloc.start()
    m = SampledMatrix(np.load(tmp_path / "a.npy", mmap_mode="r"))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 8.5 * BLOCK + 17 * n  # one block as float64, norms twice
    whole = np.asarray(file, dtype=np.float64)
    np.testing.assert_allclose(m.row_norms2, (whole**2).sum(1), rtol=1e-12)
    index, _ = m.sample_rows(100, 0)
    np.testing.assert_array_equal(m.rows(index), whole[index])
    counts = sparse.csr_array(np.abs(whole[:5000]) > 1).astype(np.int64)
    np.testing.assert_array_equal(SampledMatrix(counts).row_norms2, counts.sum(1))


@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_array, torch.from_numpy])
def test_updates_and_appends_are_as_if_built_so(kind):
    rng = np.random.default_rng(2)
    given_ = rng.standard_normal((40, 5)) * (rng.random((40, 5)) < 0.6)
    now, m = given_.copy(), SampledMatrix(kind(given_))
    untouched = given_.copy()
    for step in range(60):
        if step % 3:
            index = rng.permutation(len(now))[: rng.integers(1, 6)]
            values = rng.standard_normal((len(index), 5))
            if step % 5 == 0:
                m.update_row(index, sparse.csr_matrix(values))
            else:
                m.update_row(index, values if step % 2 else torch.from_numpy(values))
            now[index] = values
        else:
            rows = rng.standard_normal((int(rng.integers(1, 4)), 5))
            m.append(rows)
            now = np.concatenate([now, rows])
    m.update_row(0, np.zeros(5))
    now[0] = 0
    assert m.shape == now.shape
    np.testing.assert_allclose(m.rows(np.arange(len(now))), now)
    np.testing.assert_allclose(m.row_norms2, (now**2).sum(1))
    assert m.fro2 == pytest.approx((now**2).sum(), rel=1e-13)
    i, j, p = m.sample_entries(3000, 0)
    np.testing.assert_allclose(p, now[i, j] ** 2 / (now**2).sum())
    np.testing.assert_allclose(m.entries(i, j), now[i, j])
    assert chance(np.bincount(i, minlength=len(now)), (now**2).sum(1)) > 1e-3
    np.testing.assert_array_equal(given_, untouched)


def test_centred_rows_dense_and_sparse():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((30, 4)) * (rng.random((30, 4)) < 0.5) + 1
    groups, centres = rng.integers(3, size=30), rng.standard_normal((3, 4))
    for given_ in (a, sparse.csr_array(a)):
        m = SampledMatrix(given_, center=a.mean(0))
        np.testing.assert_allclose(m.row_norms2, ((a - a.mean(0)) ** 2).sum(1))
        np.testing.assert_allclose(m.rows([2]), a[[2]] - a.mean(0))
        m.append(a[:1])
        np.testing.assert_allclose(m.row_norms2[-1], m.row_norms2[0])
        np.testing.assert_allclose(m.entries([30], [1]), a[0, 1] - a[:, 1].mean())
        g = SampledMatrix(given_, center=centres, groups=groups)
        expected = a - centres[groups]
        np.testing.assert_allclose(g.row_norms2, (expected**2).sum(1))
        i, j, p = g.sample_entries(50, 0)
        np.testing.assert_allclose(p, expected[i, j] ** 2 / (expected**2).sum())
        np.testing.assert_allclose(g.entries(i, j), expected[i, j])
        with pytest.raises(ValueError, match="groups"):
            g.append(a[:1])


def test_precision_is_chosen_and_norms_stay_double():
    a = np.full((3, 1000), 1e25, dtype=np.float32)  # squares are beyond float32
    m = SampledMatrix(a, dtype=np.float32)
    assert m.rows([0]).dtype == np.float32
    np.testing.assert_allclose(m.row_norms2, 1000 * np.float64(np.float32(1e25)) ** 2, rtol=1e-12)
    assert sketch(SampledMatrix(A, "float32"), 5, generator=0).R.dtype == np.float32
    assert SampledMatrix(A + 0j, "complex64").rows([0]).dtype == np.complex64


@given(
    st.lists(st.sampled_from([0.0, 1e-300, 1e-9, 0.3, 1.0, 7.0, 1e9]), min_size=1, max_size=80),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_tree_draws_only_what_has_weight(weights, seed):
    tree = SumTree(np.array(weights))
    rng = np.random.default_rng(seed)
    if not any(weights):
        with pytest.raises(ValueError, match="zero"):
            tree.draw(1, rng)
        return
    found = tree.draw(200, rng)
    assert (found >= 0).all()
    assert (tree.weights[found] > 0).all()
    assert tree.total == pytest.approx(sum(weights))


def test_tree_draws_at_the_ends():
    """The numbers that a generator gives at its extremes fall on the first and the last weight."""
    weights = np.zeros(FAN**2 + 3)
    weights[[2, FAN + 1, FAN**2]] = [1, 2, 3]
    tree = SumTree(weights)
    u = np.array([0.0, 1, 3, np.nextafter(6, 0), 6, np.nextafter(6, 7)])
    np.testing.assert_array_equal(tree._descend(u), [2, FAN + 1, FAN**2, FAN**2, FAN**2, FAN**2])


def test_tree_costs_a_logarithm():
    """An update writes one node a level; there are log₃₂ n levels; appends rebuild seldom."""
    for n, depth in ((20, 1), (1000, 2), (FAN**3, 3), (200_000, 4)):
        tree = SumTree(np.ones(n))
        assert tree.depth == depth
        before = [level.copy() for level in tree._levels]
        tree.set(np.array([n // 2]), np.array([5.0]))
        changed = [int((a != b).sum()) for a, b in zip(before, tree._levels, strict=True)]
        assert changed == [1] * depth
        tree.set(np.array([0, n - 1]), np.array([2.0, 3.0]))
        assert tree.total == n + 4 + 1 + 2
    tree, levels, rebuilt = SumTree(np.ones(1)), None, 0
    for k in range(3000):
        tree.append(np.ones(1))
        rebuilt += tree._levels is not levels
        levels = tree._levels
        assert tree.size == k + 2
    assert rebuilt < 12
    assert tree.total == 3001


def test_sums_do_not_drift():
    rng = np.random.default_rng(0)
    weights = rng.random(5000) * 10.0 ** rng.integers(-12, 12, 5000)
    tree = SumTree(weights)
    for _ in range(300):
        index = rng.permutation(5000)[:50]
        tree.set(index, 10.0 ** rng.uniform(-12, 12, 50))
    tree.set(np.arange(5000), np.full(5000, 1e-12))
    assert tree.total == pytest.approx(5e-9, rel=1e-12)


def test_draws_are_reproducible_from_every_kind_of_generator():
    m = SampledMatrix(A)
    for make in (
        lambda: 3,
        lambda: np.random.default_rng(3),
        lambda: torch.Generator().manual_seed(3),
    ):
        np.testing.assert_array_equal(m.sample_rows(20, make())[0], m.sample_rows(20, make())[0])
    rng = np.random.default_rng(3)
    assert not np.array_equal(m.sample_rows(50, rng)[0], m.sample_rows(50, rng)[0])


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: SampledMatrix(np.zeros((3, 2))), ValueError, "cannot l2-sample a zero matrix"),
        (lambda: SampledMatrix(sparse.csr_array((3, 2))), ValueError, "zero matrix"),
        (lambda: SampledMatrix(np.array([[1, np.nan], [1, 2]])), ValueError, "row 0 holds NaN"),
        (lambda: SampledMatrix(sparse.csr_array([[1.0], [np.inf]])), ValueError, "row 1 holds NaN"),
        (lambda: SampledMatrix(np.full((2, 2), 1e200)), ValueError, "row 0 is beyond float64"),
        (lambda: SampledMatrix(np.ones(3)), ValueError, "two-dimensional"),
        (lambda: SampledMatrix(torch.ones(3)), ValueError, "two-dimensional"),
        (lambda: SampledMatrix(np.ones((0, 3))), ValueError, "at least one row"),
        (lambda: SampledMatrix(sparse.csc_array(A)), TypeError, "tocsr"),
        (lambda: SampledMatrix(np.array([["a"]])), TypeError, "must hold numbers"),
        (lambda: SampledMatrix(A + 1j, dtype="float64"), TypeError, "complex for a complex A"),
        (lambda: SampledMatrix(A, dtype="int32"), TypeError, "dtype must be one of"),
        (lambda: SampledMatrix(A, center=[1, 2]), ValueError, "center must be"),
        (lambda: SampledMatrix(A, center=[1, 2, np.nan]), ValueError, "finite"),
        (lambda: SampledMatrix(A, groups=[0, 0, 0, 0]), ValueError, "groups need a center"),
        (lambda: SampledMatrix(A, center=A[:2], groups=[0, 1]), ValueError, "groups must be"),
        (lambda: SampledMatrix(A).sample_rows(0), ValueError, "s must be an integer ≥ 1"),
        (lambda: SampledMatrix(A).rows([4]), IndexError, "must be in 0 … 3"),
        (lambda: SampledMatrix(A).rows([-1]), IndexError, "must be in 0 … 3"),
        (lambda: SampledMatrix(A).rows([0.5]), TypeError, "integer"),
        (lambda: SampledMatrix(A).entries([0, 1], [0]), ValueError, "one length"),
        (lambda: SampledMatrix(A).update_row([1, 1], A[:2]), ValueError, "twice"),
        (lambda: SampledMatrix(A).update_row(1, [1, 2]), ValueError, "d = 3"),
        (lambda: SampledMatrix(A).update_row(1, A[:2]), ValueError, "must have 1 rows"),
        (lambda: SampledMatrix(A).update_row(1, [1, 2, np.inf]), ValueError, "row 1 holds NaN"),
        (lambda: SampledMatrix(A).update_row(1, [1j, 2, 3]), TypeError, "complex rows"),
        (lambda: SampledMatrix(A).append([1, 2, np.nan]), ValueError, "row 4 holds NaN"),
    ],
)  # fmt: skip
def test_bad_input(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_bad_state():
    twice = sparse.csr_array((np.ones(2), [1, 1], [0, 2]), shape=(1, 2))
    with pytest.raises(ValueError, match="sum_duplicates"):
        SampledMatrix(twice)
    m = SampledMatrix(A)
    before = m.row_norms2.copy()
    with pytest.raises(ValueError, match="NaN"):
        m.update_row([0, 1], [[1, 2, 3], [np.nan, 0, 0]])
    np.testing.assert_array_equal(m.row_norms2, before)  # nothing of a bad update is kept
    np.testing.assert_array_equal(m.rows([0, 1]), A[:2])
    m.append([1, 0, 0])
    with pytest.raises(ValueError, match="row 4 was appended"):
        m.update_row(4)
    m.update_row(np.arange(5), np.zeros((5, 3)))
    with pytest.raises(ValueError, match="zero matrix"):
        m.sample_rows(1)
    with pytest.raises(ValueError, match="read-only"):
        m.row_norms2[0] = 1
