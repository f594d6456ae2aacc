"""The screen must not change the answer; ties go by row."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.merge import exact_search, nearest


def by_hand(q, g, k, exclude=None):
    q, g = (np.asarray(x, np.float64) for x in (q, g))
    scores = (q / np.linalg.norm(q, axis=1, keepdims=True)) @ (
        g / np.linalg.norm(g, axis=1, keepdims=True)
    ).T
    if exclude is not None:
        scores[np.arange(len(q)), exclude] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), order


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def clusters(n, d, spread, seed=0):
    centres = draw(10, d, seed=seed)
    which = torch.randint(10, (n,), generator=torch.Generator().manual_seed(seed))
    return centres[which] + spread * draw(n, d, seed=seed + 1)


@pytest.mark.parametrize("screen", [True, False])
@pytest.mark.parametrize("spread", [1.0, 0.1, 0.003])
def test_neighbours_are_exact_in_any_crowd(screen, spread):
    """At 0.003 hundreds of scores lie within one rounding of bfloat16 of each other."""
    g = clusters(3000, 16, spread)
    q = g[:200]
    exclude = torch.arange(200)
    values, rows = nearest(q, g, 5, exclude=exclude, screen=screen, chunk=64)
    wanted, order = by_hand(q, g, 5, exclude.numpy())
    np.testing.assert_allclose(values.numpy(), wanted, atol=1e-6)
    # Rows whose scores differ by no more than float32's rounding may change places.
    different = rows.numpy() != order
    scores = torch.nn.functional.normalize(q.double()) @ torch.nn.functional.normalize(g.double()).T
    ours = scores.gather(1, rows).numpy()
    assert np.abs(ours - wanted)[different].max(initial=0) < 5e-7
    assert not (rows == exclude[:, None]).any()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 7), st.integers(40, 400), st.integers(1, 20))
def test_the_screen_changes_nothing(seed, k, n, d):
    g, q = draw(n, d, seed=seed), draw(9, d, seed=seed + 1)
    if n <= 4 * k + 32:
        n = 4 * k + 33
        g = draw(n, d, seed=seed)
    with_screen, without = (nearest(q, g, k, screen=s) for s in (True, False))
    torch.testing.assert_close(with_screen[0], without[0], atol=5e-7, rtol=0)


def test_duplicates_rank_by_row():
    g = draw(4, 6)[[0, 1, 1, 2, 1, 3, 0]]
    _, rows = nearest(g[1:2], g, 4, screen=False)
    assert rows[0, :3].tolist() == [1, 2, 4]
    _, rows = nearest(g[1:2], g, 2, screen=False, exclude=torch.tensor([1]))
    assert rows[0].tolist() == [2, 4]


def test_crowds_beyond_the_widest_list_are_computed_in_full(monkeypatch):
    monkeypatch.setattr(exact_search, "WIDEST", 50)
    g = clusters(1000, 8, 1e-3)
    ours, twin = (nearest(g[:20], g, 3, screen=s) for s in (True, False))
    torch.testing.assert_close(ours[0], twin[0], atol=5e-7, rtol=0)


def test_the_bound_of_the_screen_holds():
    q, g = (exact_search.unit_rows(draw(300, 64, seed=s), "x") for s in (0, 1))
    coarse = exact_search._Coarse(g)
    moved = (q - q.bfloat16().float()).norm(dim=1)
    bound = moved + 1.002 * coarse.moved + 2 * 64 * 2.0**-24 + 1.01 * 2.0**-9
    gap = ((q.bfloat16() @ coarse.rounded.T).double() - q.double() @ g.double().T).abs().amax(1)
    assert bool((gap < bound).all())
    assert bool((gap > 0.05 * bound).all())  # and is not idle


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    g = draw(100, 8).to(dtype)
    values, rows = nearest(g[:5], g, 1)
    assert rows[:, 0].tolist() == list(range(5))
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_lengths_do_not_matter_even_extreme_ones():
    g = draw(50, 8)
    scale = torch.logspace(-30, 30, 50)[:, None]
    assert torch.equal(nearest(g[:9], g * scale, 3)[1], nearest(g[:9], g, 3)[1])


def test_no_queries():
    values, rows = nearest(torch.empty(0, 4), draw(9, 4), 2)
    assert values.shape == rows.shape == (0, 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": 0}, ValueError, "k must be between 1 and 9"),
        ({"k": 9, "exclude": torch.arange(5)}, ValueError, "k must be between 1 and 8"),
        ({"exclude": torch.arange(3)}, ValueError, "exclude must hold one row per query"),
        ({"gallery": draw(9, 3)}, ValueError, "one width"),
        ({"gallery": torch.zeros(9, 4)}, ValueError, "row 0 of gallery has only zeros"),
        ({"queries": torch.full((5, 4), torch.nan)}, ValueError, "row 0 of queries has NaN"),
        ({"queries": torch.ones(5, 4, dtype=torch.int64)}, TypeError, "floating"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"queries": draw(5, 4), "gallery": draw(9, 4), "k": 2, **change}
    if error is TypeError:
        with pytest.raises(TypeError, match=message):
            exact_search.unit_rows(arguments["queries"], "queries")
        return
    with pytest.raises(error, match=message):
        nearest(**arguments)
