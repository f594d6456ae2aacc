"""Exact search: against a slow twin, against faiss, under ties, duplicates and exclusion."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.generate import DCTEncoder, ImageDatabase, search


def identity(x):
    return x


def twin(rows, queries, k, metric, excluded=None):
    """Every score in float64, sorted; equal ones by row."""
    rows, queries = rows.double(), queries.double()
    if metric == "cosine":
        dots = (queries[:, None] * rows).sum(2)
        scores = dots / (queries.norm(dim=1)[:, None] * rows.norm(dim=1))
    else:
        scores = -0.5 * (queries[:, None] - rows).square().sum(2)
    if excluded is not None:
        scores = scores.masked_fill(excluded, -torch.inf)
    return scores.sort(dim=1, descending=True, stable=True)[1][:, :k]


def test_sheet_example():
    rows = torch.tensor([[1, 0], [0, 1], [1, 1], [-1, 0], [2, 0.1]])
    database = ImageDatabase(rows, identity)
    index, score = database.search(torch.tensor([[1, 0.2], [-0.5, 1]]), 3)
    assert index.tolist() == [[4, 0, 2], [1, 3, 2]]
    assert (score.diff(dim=1) <= 0).all()
    own, _ = database.search(database.embeddings, 2, exclude_ids=database.ids)
    assert own.tolist() == [[4, 2], [2, 4], [4, 0], [1, 2], [0, 2]]


@pytest.mark.parametrize("backend", ["torch", "faiss"])
@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize(("n", "e", "q"), [(9000, 16, 40), (200, 3, 700), (12500, 5, 8)])
def test_agrees_with_the_twin(n, e, q, metric, backend):
    g = torch.Generator().manual_seed(n)
    rows, queries = torch.randn(n, e, generator=g) + 0.5, torch.randn(q, e, generator=g)
    database = ImageDatabase(rows, identity, metric=metric)
    index, score = database.search(queries, 7, backend=backend)
    assert torch.equal(index, twin(rows, queries, 7, metric))
    if metric == "l2":
        found = (queries[:, None] - rows[index]).norm(dim=2)
    else:
        found = torch.cosine_similarity(queries[:, None], rows[index], dim=2)
    torch.testing.assert_close(score, found)


def test_agrees_with_scikit_learn():
    from sklearn.neighbors import NearestNeighbors

    g = torch.Generator().manual_seed(0)
    rows, queries = torch.randn(5000, 24, generator=g), torch.randn(50, 24, generator=g)
    peer = NearestNeighbors(n_neighbors=4, metric="cosine").fit(rows.double().numpy())
    expected = peer.kneighbors(queries.double().numpy(), return_distance=False)
    index, _ = ImageDatabase(rows, identity).search(queries, 4)
    assert index.tolist() == expected.tolist()


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_duplicates_come_in_order_of_rows(backend):
    """More equal rows than candidates: the first ones win, whoever multiplied."""
    g = torch.Generator().manual_seed(1)
    few = torch.randn(30, 8, generator=g)
    rows = few.repeat(300, 1)
    database = ImageDatabase(rows, identity)
    index, _ = database.search(few, 5, backend=backend)
    expected = torch.arange(30)[:, None] + 30 * torch.arange(5)
    assert torch.equal(index, expected)
    # Excluding them all by one id leaves the runner-up.
    grouped = ImageDatabase(rows, identity, ids=torch.arange(len(rows)) % 30)
    index, _ = grouped.search(few, 5, exclude_ids=torch.arange(30), backend=backend)
    same = torch.arange(len(rows)) % 30 == torch.arange(30)[:, None]
    assert torch.equal(index, twin(rows, few, 5, "cosine", same))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 4), st.integers(1, 6), st.sampled_from(["cosine", "l2"]),
    st.integers(0, 10_000),
)  # fmt: skip
def test_small_whole_numbers_have_ties(n, e, q, metric, seed):
    g = torch.Generator().manual_seed(seed)
    rows = torch.randint(-1, 2, (n, e), generator=g).double()
    queries = torch.randint(-1, 2, (q, e), generator=g).double()
    rows[(rows == 0).all(1), 0] = 1
    queries[(queries == 0).all(1), 0] = 1
    k = int(torch.randint(1, n + 1, (), generator=g))
    index, _ = ImageDatabase(rows, identity, metric=metric).search(queries, k)
    wanted = twin(rows, queries, k, metric)
    if metric == "l2":
        assert torch.equal(index, wanted)
    else:  # cosines that are equal in exact arithmetic may differ in the last bit
        found = torch.cosine_similarity(queries[:, None], rows[index], dim=2)
        best = torch.cosine_similarity(queries[:, None], rows[wanted], dim=2)
        torch.testing.assert_close(found, best, rtol=0, atol=1e-12)


def test_near_ties_below_float32_are_decided():
    """Rows that differ by 1e-9: one product in float32 cannot tell them apart."""
    base = torch.ones(5000, 4, dtype=torch.float64)
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(2))
    base[:, 0] += 1e-9 * order
    database = ImageDatabase(base, identity, dtype=torch.float64, metric="l2")
    index, _ = database.search(torch.ones(1, 4, dtype=torch.float64), 6)
    assert order[index[0]].tolist() == [0, 1, 2, 3, 4, 5]


def test_spans_and_parts_of_queries_are_joined(monkeypatch):
    g = torch.Generator().manual_seed(3)
    rows, queries = torch.randn(1000, 6, generator=g), torch.randn(33, 6, generator=g)
    monkeypatch.setattr(search, "BLOCK", 64)
    monkeypatch.setattr(search, "SPAN", 256)
    monkeypatch.setattr(search, "QUERIES", 10)
    monkeypatch.setattr(search, "GATHER", 500)
    index, _ = ImageDatabase(rows, identity).search(queries, 3)
    assert torch.equal(index, twin(rows, queries, 3, "cosine"))


def test_half_precision_decides_by_what_is_stored():
    g = torch.Generator().manual_seed(4)
    rows = torch.randn(300, 8, generator=g)
    database = ImageDatabase(rows, identity, dtype=torch.float16)
    assert database.embeddings.dtype == torch.float16
    queries = torch.randn(5, 8, generator=g).half()
    index, score = database.search(queries, 4)
    assert torch.equal(index, twin(rows.half(), queries, 4, "cosine"))
    assert score.dtype == torch.float16


def test_bad_queries_are_named():
    database = ImageDatabase(torch.eye(4), identity)
    with pytest.raises(ValueError, match=r"k=5 neighbours of a database of 4"):
        database.search(torch.eye(4), 5)
    with pytest.raises(ValueError, match=r"k=4 neighbours of a database of 4 images, less 1"):
        database.search(torch.eye(4), 4, exclude_ids=database.ids)
    assert database.search(torch.eye(4), 4, exclude_ids=torch.full((4,), 9))[0].shape == (4, 4)
    for k in (0, -1):
        with pytest.raises(ValueError, match="k must be at least 1"):
            database.search(torch.eye(4), k)
    with pytest.raises(ValueError, match=r"queries must be \[Q, 4\]"):
        database.search(torch.ones(2, 3), 1)
    with pytest.raises(ValueError, match="queries has NaN or infinities in rows 1"):
        database.search(torch.tensor([[1.0, 0, 0, 0], [torch.nan, 0, 0, 0]]), 1)
    with pytest.raises(ValueError, match="zero vectors"):
        database.search(torch.zeros(1, 4), 1)
    with pytest.raises(ValueError, match="backend must be one of"):
        database.search(torch.eye(4), 1, backend="annoy")
    with pytest.raises(ValueError, match="exclude_ids must be one for each query"):
        database.search(torch.eye(4), 1, exclude_ids=torch.zeros(2).long())
    with pytest.raises(ValueError, match="too large"):
        ImageDatabase(torch.full((3, 2), 1e30), identity, metric="l2").search(torch.ones(1, 2), 1)
    assert database.search(torch.ones(0, 4), 2)[0].shape == (0, 2)


def test_missing_faiss_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    database = ImageDatabase(torch.eye(40), identity)
    with pytest.raises(ImportError, match=r"stiefel\[generate\]"):
        database.search(torch.eye(40), 1, backend="faiss")


def test_digits_of_the_sheet(digits):
    images, labels = digits
    database = ImageDatabase(images, DCTEncoder(24).fit(images))
    index, _ = database.search(database.embeddings, 4, exclude_ids=database.ids)
    assert index[:3].tolist() == [
        [877, 1167, 1541, 1365],
        [93, 1120, 1112, 466],
        [57, 277, 556, 534],
    ]
    assert float((labels[index] == labels[:, None]).double().mean()) == pytest.approx(
        0.94672, abs=5e-6
    )
    counts = index.flatten().bincount(minlength=1797)
    assert int(counts.max()) == 15
    assert int((counts == 0).sum()) == 100
    raw = ImageDatabase(images, lambda x: x.flatten(1))
    index, _ = raw.search(raw.embeddings, 4, exclude_ids=raw.ids)
    assert float((labels[index] == labels[:, None]).double().mean()) == pytest.approx(
        0.98080, abs=5e-6
    )
