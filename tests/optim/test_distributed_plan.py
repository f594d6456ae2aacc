"""The planner, without processes: balance, every matrix once, the same plan everywhere."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from law_table import ONE_EACH, one_each
from torch import nn

from stiefel.optim import (
    ARO,
    RMNP,
    AuON,
    DCTAdamW,
    HybridAuON,
    Muon,
    NorMuon,
    distribution_plan,
)
from stiefel.optim.distributed import planner
from stiefel.optim.distributed.geometry import full_layout, matrices_of, piece, row_layout
from stiefel.optim.distributed.placing import make_entries
from stiefel.optim.distributed.planner import balance, make_rounds

SIZES = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=12)
WORLDS = st.integers(1, 9)


def parameters(shapes, device="meta"):
    return [nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]


@given(st.lists(st.floats(0.5, 1e6), max_size=30), WORLDS)
def test_loads_are_near_the_best(costs, world):
    loads = [0.0] * world
    owners = balance(costs, loads)
    assert len(owners) == len(costs)
    for rank in range(world):
        own = sum(c for c, o in zip(costs, owners, strict=True) if o == rank)
        assert own == pytest.approx(loads[rank])
    # Nothing can be below the mean or the dearest job; the greedy rule stays near that.
    least = max([sum(costs) / world, *costs], default=0.0)
    assert max(loads) <= (2 - 1 / world) * least * (1 + 1e-9)
    assert owners == balance(costs, [0.0] * world)


def test_equal_jobs_go_round():
    assert balance([1.0] * 6, [0.0] * 3) == [0, 1, 2, 0, 1, 2]
    assert balance([1.0, 5.0, 1.0, 1.0], [0.0] * 2) == [1, 0, 1, 1]
    assert balance([1.0, 1.0], [3.0, 0.0]) == [1, 1]


@settings(deadline=None, max_examples=50)
@given(SIZES, WORLDS, st.integers(1, 2000))
def test_rounds_hold_every_matrix_once_and_little_at_a_time(shapes, world, room):
    optimizer = Muon(parameters(shapes))
    entries = [
        e
        for p in optimizer.param_groups[0]["params"]
        for e in make_entries(optimizer, 0, p, row_layout(p.shape, world))
    ]
    planner.assign(entries, [0.0] * world)
    before = planner.LARGEST_ROUND, planner.SMALLEST_ROUND
    planner.LARGEST_ROUND = planner.SMALLEST_ROUND = room
    try:
        rounds = make_rounds(entries, world)
    finally:
        planner.LARGEST_ROUND, planner.SMALLEST_ROUND = before
    seen = [(rank, e) for each in rounds for rank, own in enumerate(each) for e in own]
    assert sorted(id(e) for _, e in seen) == sorted(map(id, entries))
    assert all(e.owner == rank for rank, e in seen)
    for each in rounds:
        for own in each:
            assert sum(e.numel for e in own) <= max(room, *(e.numel for e in own), 0)


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 30),
    st.integers(1, 6),
    WORLDS,
    st.sampled_from(["flatten", "transpose", "batch", "blocks"]),
)
def test_pieces_tile_every_matrix(rows, cols, world, view):
    shape, sizes = (rows, cols), [(rows, cols)]
    if view == "batch":
        shape, sizes = (rows, cols, 3), [(cols, 3)] * rows
    elif view == "transpose":
        sizes = [(cols, rows)]
    elif view == "blocks":
        shape, sizes = (3 * rows, cols), [(rows, cols)] * 3
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    layout = row_layout(shape, world)
    for number, matrix in enumerate(matrices_of(view.replace("blocks", "flatten"), shape, sizes)):
        expected = {
            "batch": lambda n=number: whole[n],
            "transpose": lambda: whole.mT,
        }.get(view, lambda n=number: whole[n * rows : (n + 1) * rows])()
        buffer = torch.full((matrix.rows, matrix.cols), -1)
        for box in layout.boxes:
            local = whole[tuple(slice(a, b) for a, b in box)]
            own = piece(matrix.region, box)
            target = matrix.unfold(buffer)[own.inside]
            assert (target == -1).all()
            target.copy_(local[own.local])
        assert torch.equal(buffer, expected)


@one_each
def test_a_plan_is_a_function_of_the_groups_alone(row):
    shapes = ((12, 8), (12, 8), (8, 20), (7, 7), (30, 3))
    plans = [distribution_plan(row(parameters(shapes)), 4) for _ in range(2)]
    assert plans[0] == plans[1]
    later = row(parameters(shapes[:2]))
    later.add_param_group({"params": parameters(shapes[2:])})
    at_once = row([{"params": parameters(s)} for s in (shapes[:2], shapes[2:])])
    assert distribution_plan(later, 4) == distribution_plan(at_once, 4)
    assert all(a.flops > 0 for a in plans[0].assignments)
    assert sum(plans[0].flops) == pytest.approx(sum(a.flops for a in plans[0].assignments))


@settings(deadline=None, max_examples=50)
@given(SIZES, st.integers(1, 16))
def test_messages_are_the_minimum(shapes, world):
    plan = distribution_plan(NorMuon(parameters(shapes)), world)
    assert sum(plan.bytes_sent) == plan.minimum_bytes
    there = back = 0
    for (rows, cols), own in zip(shapes, plan.assignments, strict=True):
        step = -(-rows // world)
        kept = max(0, min(rows, step * (own.owner + 1)) - step * own.owner) * cols
        there += 4 * (rows * cols - kept)
        back += 4 * (rows * cols - kept)
    assert (sum(plan.gather_bytes), sum(plan.scatter_bytes)) == (there, back)


def test_a_large_model_is_balanced_and_silent_where_it_can_be():
    shapes = [(384, 384)] * 24 + [(1536, 384)] * 6 + [(384, 1536)] * 6
    for cls in (Muon, NorMuon, HybridAuON, ARO, DCTAdamW):
        plan = distribution_plan(cls(parameters(shapes)), 4)
        assert plan.imbalance < 1.02
        assert plan.rounds >= 4
    assert sum(distribution_plan(RMNP(parameters(shapes)), 4).bytes_sent) == 0
    assert set(distribution_plan(AuON(parameters(shapes)), 4).bytes_sent) == {16 * len(shapes)}
    # Two replicas of everything: nothing to gather, updates to all.
    plan = distribution_plan(Muon(parameters(shapes)), 2, replicated=True)
    assert sum(plan.gather_bytes) == 0
    assert sum(plan.scatter_bytes) == 4 * sum(a * b for a, b in shapes)
    assert full_layout((3, 2), 2).everywhere


def test_matrices_that_share_a_rotation_share_an_owner():
    params = parameters([(4, 8), (4, 6), (9, 4), (6, 6)])
    plan = distribution_plan(ARO(params, share=[params[:3]]), 3)
    owners = [a.owner for a in plan.assignments]
    assert owners[0] == owners[1] == owners[2] != owners[3]


def test_what_owners_keep():
    shapes = [(12, 8), (8, 20)]
    assert sum(distribution_plan(Muon(parameters(shapes)), 2).owned_bytes) == 0
    assert sum(distribution_plan(NorMuon(parameters(shapes)), 2).owned_bytes) == 4 * 20
    squares = distribution_plan(ARO(parameters(shapes)), 2).owned_bytes
    assert sum(squares) == 4 * (8 * 8 + 8 * 8)


def test_bad_worlds():
    optimizer = Muon(parameters([(3, 2)]))
    with pytest.raises(ValueError, match="needed there, got None"):
        distribution_plan(optimizer)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        distribution_plan(optimizer, 0)


def test_every_class_is_here():
    assert len(ONE_EACH) == 9
