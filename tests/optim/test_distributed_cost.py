"""The cost model of distributed steps: bytes by hand, laws of its time, what it reads."""

import json
import math
import struct
from dataclasses import replace
from itertools import pairwise

import distributed_cost
import numpy as np
import pytest
import torch
from distributed_check import calibrated
from distributed_machine import METHODS, Machine
from distributed_model import cost
from distributed_rounds import Clock, Pieces, make_round, run_rounds
from distributed_shapes import PRESETS, Model, Parameter, from_shapes, named, read_model
from run import peak_bytes, state_bytes
from torch import nn

from stiefel.optim import NorMuon, distribution_plan
from stiefel.optim.distributed.plan import _imagined
from stiefel.optim.distributed.planner import make_rounds

MACHINE = Machine(tflops=100, gbs=1000, gbps=200, us=10)
SMALL = Model(
    "small",
    (
        Parameter("a", (8, 6), True),
        Parameter("b", (8, 6), True),
        Parameter("tall", (12, 4), True),
        Parameter("embedding", (16, 6), False),
    ),
)
GATHERING = [name for name, m in METHODS.items() if m.matrices and name not in ("AuON", "RMNP")]


def quick(name, ranks, machine=MACHINE, model=None, **settings):
    return cost(model or named("gpt2-small"), name, ranks, machine, **settings)


@pytest.mark.parametrize("name", GATHERING)
def test_bytes_of_two_equal_matrices_are_those_by_hand(name):
    """Each of two ranks owns one 8×6: half comes in, half goes out, 4 bytes each."""
    model = Model("two", SMALL.parameters[:2])
    found = cost(model, name, 2, MACHINE)
    assert (found.sent, found.sent_mean) == (2 * 4 * 8 * 6 // 2, 2 * 4 * 8 * 6 // 2)
    assert found.parameters == found.gradients == 4 * 8 * 6
    assert found.imbalance == 1.0


def test_bytes_with_an_idle_rank_are_those_by_hand():
    """One 8×6 on three ranks of 3, 3 and 2 rows: its owner sends 5 rows, the others theirs."""
    model = Model("one", SMALL.parameters[:1])
    found = cost(model, "NorMuon", 3, MACHINE)
    assert found.sent == 5 * 6 * 4
    assert found.sent_mean == 2 * 5 * 6 * 4 / 3
    assert found.imbalance == 3.0
    assert found.parameters == 3 * 6 * 4
    assert found.state == 3 * 6 * 4 + 8 * 4  # its momentum, and a second moment of every row


def test_replicated_parameters_only_send_updates():
    found = cost(Model("one", SMALL.parameters[:1]), "Muon", 3, MACHINE, replicated=True)
    assert found.sent == 2 * 8 * 6 * 4
    assert found.parameters == 8 * 6 * 4


def test_state_and_parameters_count_embeddings_too():
    found = cost(SMALL, "RMNP", 4, MACHINE)
    numbers = (2 + 2) * 6 + 3 * 4 + 4 * 6
    assert found.parameters == 4 * numbers
    assert found.state == 4 * (numbers + 4 * 6)  # momenta of matrices, two means of the embedding
    assert cost(SMALL, "AdamW", 4, MACHINE).state == 2 * 4 * numbers
    assert cost(SMALL, "AdamW", 4, MACHINE, dtype=torch.bfloat16).state == 2 * 2 * numbers


def test_row_methods_send_nothing_and_auon_two_numbers_per_matrix():
    assert quick("RMNP", 64).sent == quick("AdamW", 64).sent == 0
    matrices = 12 * 6
    assert quick("AuON", 64).sent == 16 * matrices


@pytest.mark.parametrize("world", [2, 8, 100])
def test_traffic_is_the_least_that_owners_need(world):
    model = named("gpt2-small")
    optimizer = NorMuon(model.groups(torch.float32))
    plan = distribution_plan(optimizer, world)
    assert sum(plan.bytes_sent) == plan.minimum_bytes
    assert quick("NorMuon", world).sent_mean * world == pytest.approx(plan.minimum_bytes)
    # Gather and scatter of everything that an owner does not hold already.
    whole = 2 * 4 * model.numel(True)
    assert whole * (1 - 2 / world) <= plan.minimum_bytes <= whole


@pytest.mark.parametrize("replicated", [False, True])
@pytest.mark.parametrize("world", [3, 8])
def test_the_rounds_that_are_timed_send_what_the_plan_says(world, replicated):
    optimizer = NorMuon(named("gpt2-small").groups(torch.float32))
    plan = distribution_plan(optimizer, world, replicated=replicated)
    sent, back, pieces = np.zeros(world), np.zeros(world), Pieces()
    for lane in _imagined(optimizer, world, replicated):
        for owners in make_rounds(lane.entries, world):
            made = make_round(owners, world, pieces, lambda _: 0.0, gathers=not replicated)
            assert made.send.sum() == made.receive.sum()
            assert made.back_send.sum() == made.back_receive.sum()
            sent += made.send
            back += made.back_send
    assert tuple(sent) == plan.gather_bytes
    assert tuple(back) == plan.scatter_bytes


@pytest.mark.parametrize("name", METHODS)
def test_better_machines_are_never_slower(name):
    before = quick(name, 8)
    for better in (
        replace(MACHINE, tflops=200),
        replace(MACHINE, gbs=2000),
        replace(MACHINE, gbps=400),
        replace(MACHINE, us=5),
        replace(MACHINE, launch_us=1),
        replace(MACHINE, host_us=10),
    ):
        assert quick(name, 8, better).seconds <= before.seconds
    assert quick(name, 8, replace(MACHINE, slowdown=4.0)).seconds > before.seconds
    assert quick(name, 8, replace(MACHINE, fresh_gbs=1.0)).seconds >= before.seconds


@pytest.mark.parametrize("name", ["NorMuon", "DCTAdamW", "RMNP"])
def test_more_ranks_hold_and_compute_less(name):
    costs = [quick(name, ranks) for ranks in (1, 8, 64, 512)]
    for fewer, more in pairwise(costs):
        assert more.flops <= fewer.flops
        assert more.parameters < fewer.parameters
        assert more.state <= fewer.state
        assert more.imbalance >= fewer.imbalance - 1e-9


@pytest.mark.parametrize("name", GATHERING)
@pytest.mark.parametrize("ranks", [2, 16, 128])
def test_overlap_hides_a_share_of_messages_and_never_more(name, ranks):
    found = quick(name, ranks)
    assert 0 <= found.hidden <= 1
    without = quick(name, ranks, replace(MACHINE, overlaps=False))
    assert without.hidden == 0
    assert without.seconds == pytest.approx(found.computing + found.communicating)
    assert max(found.computing, found.communicating) <= found.seconds * (1 + 1e-12)
    assert found.seconds <= without.seconds


def test_one_rank_speaks_to_nobody():
    found = quick("NorMuon", 1)
    assert found.sent == found.communicating == found.hidden == 0


def test_a_round_by_hand():
    """Two ranks, each with half of the other's 8×6: memory and launches are free."""
    machine = replace(MACHINE, gbs=math.inf, launch_us=0.0, host_us=0.0, message_us=1.0)
    model = Model("two", SMALL.parameters[:2])
    optimizer = METHODS["NorMuon"].optimizer(model.groups(torch.float32))
    lane = _imagined(optimizer, 2, False)[0]
    rounds = [
        make_round(o, 2, Pieces(), lambda _: 1e-3, gathers=True)
        for o in make_rounds(lane.entries, 2)
    ]
    clock = Clock(machine, 2)
    run_rounds(clock, rounds, overlap=False)
    # A rank is holder and owner at once, so it has two messages with the other.
    message = 1e-6 * (10 + 2) + 8 * (4 * 24) / 200e9
    assert clock.now == pytest.approx([1e-3 + 2 * message] * 2)
    assert clock.talked == pytest.approx(2 * message)


def test_a_collective_starts_with_the_last_rank_and_after_the_one_before():
    clock = Clock(replace(MACHINE, us=1e6, message_us=0.0), 2)
    one, nothing = np.ones(2), np.zeros(2)
    clock.compute(np.array([1.0, 3.0]))
    assert clock.launch(one, nothing, nothing, wait=False) == pytest.approx(4.0)
    assert clock.launch(one, nothing, nothing, wait=False) == pytest.approx(5.0)
    assert clock.now == pytest.approx([1.0, 3.0])  # nobody has waited yet
    clock.compute(np.array([9.0, 1.0]))
    clock.wait(5.0)
    assert clock.now == pytest.approx([10.0, 5.0])
    assert clock.launch(nothing, nothing, nothing, wait=True) == 0.0
    clock.word(2)
    assert clock.now == pytest.approx([12.0, 12.0])
    assert clock.talked == pytest.approx(4.0)


def test_ranks_on_shared_cores_take_the_time_of_all_their_work():
    machine = replace(MACHINE, slowdown=2.0)  # four ranks on two cores
    assert machine.spread(np.full(4, 1.0)) == pytest.approx([2.0] * 4)
    assert machine.spread(np.array([1.0, 0, 0, 0])) == pytest.approx([1.0, 0, 0, 0])
    assert machine.spread(np.array([1.0, 1, 1, 0])) == pytest.approx([1.5, 1.5, 1.5, 0])


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.matrices])
def test_workspace_is_what_a_step_takes(name):
    """The constants of the table against the profiler's account of one square matrix."""
    parameter = nn.Parameter(torch.randn(256, 256, generator=torch.Generator().manual_seed(0)))
    parameter.grad = parameter.detach().clone()
    optimizer = METHODS[name].optimizer([parameter])
    scratch = peak_bytes(optimizer.step) - state_bytes(optimizer)
    assert scratch / 4 / parameter.numel() == pytest.approx(METHODS[name].workspace, rel=0.15)


def test_the_largest_run_is_planned_in_a_minute():
    found = cost(named("llama-7b"), "NorMuon", 1024, MACHINE)
    assert found.flops > 0
    assert found.sent * 1024 >= found.sent_mean * 1024 > 0


# Models


def test_presets_have_the_sizes_of_the_models():
    assert named("gpt2-small").numel() == 124_439_808
    assert named("llama-7b").numel() == 6_738_415_616
    assert named("llama-70b").numel() == 68_976_648_192
    assert PRESETS.keys() == {"gpt2-small", "gpt2-xl", "llama-7b", "llama-70b"}


def test_names_and_dimensions_route_shapes(tmp_path):
    shapes = {"wte.weight": [9, 4], "h.w": [4, 4], "h.b": [4], "experts": [2, 4, 3]}
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps(shapes), encoding="utf-8")
    for source in (json.dumps(shapes), str(path)):
        model = read_model(source)
        assert [p.name for p in model.parameters if p.matrix] == ["h.w", "experts"]
    assert [p.matrix for p in read_model(str(path), "h[.]w").parameters] == [
        True,
        False,
        False,
        True,
    ]
    plan = distribution_plan(NorMuon(model.groups(torch.float32)), 2)
    assert [a.shape for a in plan.assignments] == [(4, 4), (4, 3), (4, 3)]


def test_a_safetensors_header_is_enough(tmp_path):
    header = {"__metadata__": {"format": "pt"}}
    header["w"] = {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 48]}
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)  # the numbers themselves are not there
    assert read_model(str(path)).parameters == (Parameter("w", (4, 3), True),)
    path.write_bytes(b"\xff" * 8)
    with pytest.raises(ValueError, match="is no safetensors file"):
        read_model(str(path))


@pytest.mark.parametrize("shape", [3, [0, 2], [2.0], [True, 2], "ab"])
def test_shapes_must_be_lists_of_positive_ints(shape):
    with pytest.raises(ValueError, match="the shape of 'w' must be a list of positive ints"):
        from_shapes("bad", {"w": shape})


def test_a_model_must_have_parameters():
    with pytest.raises(ValueError, match="empty has no parameters"):
        from_shapes("empty", {})


# The command


def test_the_command_prints_and_writes_every_method(tmp_path, capsys):
    path = tmp_path / "costs.json"
    distributed_cost.main(["--ranks", "8,64", "--json", str(path)])
    shown = capsys.readouterr().out
    rows = json.loads(path.read_text(encoding="utf-8"))["costs"]
    assert [(r["method"], r["ranks"]) for r in rows] == [(m, w) for w in (8, 64) for m in METHODS]
    assert "NorMuon" in shown
    assert all(r["memory"] == sum(r[k] for k in MEMORY) for r in rows)


MEMORY = ("parameters", "gradients", "state", "scratch")


def test_measured_speed_is_this_machines(capsys):
    shapes = '{"w": [64, 64], "wide": [32, 96]}'
    arguments = ["--shapes", shapes, "--tflops", "measured", "--rounds", "5", "--ranks", "2"]
    distributed_cost.main([*arguments, "--methods", "NorMuon,RMNP"])
    assert "measured on this machine, GFLOP/s: NorMuon" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "0"], "--ranks must be at least 1, got 0"),
        (["--ranks", "two"], "--ranks must be numbers between commas, got two"),
        (["--methods", "NorMuon,SGD"], "--methods has SGD"),
        (["--tflops", "-1"], "--tflops must be above 0 or 'measured', got -1"),
        (["--tflops", "many"], "--tflops must be above 0 or 'measured', got many"),
        (["--gbps", "nan"], "--gbps must be above 0, got nan"),
        (["--device", "abacus"], "--device must be one of torch's"),
        (["--us", "-1"], "--us must be at least 0, got -1.0"),
        (["--rounds", "4"], "--rounds must be at least 5, got 4"),
        (["--shapes", "[1]"], "--shapes: "),
        (["--shapes", "missing.json"], "--shapes: "),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        distributed_cost.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_calibration_takes_apart_what_it_has_measured():
    """From times of a machine that is known, that machine."""
    names = {"memory": 2 * 1e-3, "copies": 500 * 4e-6, "word": 10 * 1e-4, "host": 42 * 3e-5}
    names |= {"all ranks at once": 2.0, "alone": 1.0}
    names["fresh"] = 4 * 8 * 2**20 * (1e-3 / (3 * 4 * 2**21) + 1e-9)  # one pass, and 1 GB/s
    names["large"] = 1e-4 + 4 * 3 * 2**21 * 8 / 10e9
    measured = {("seconds", key): {"wall": value} for key, value in names.items()}
    machine = calibrated(4, measured, "wall")
    assert machine.slowdown == 2.0
    assert machine.gbs == pytest.approx(2 * 3 * 4 * 2**21 / 1e-3 / 1e9)
    assert machine.launch_us == pytest.approx(2.0)
    assert machine.host_us == pytest.approx(15.0)
    assert machine.us == pytest.approx(100.0)
    assert machine.gbps == pytest.approx(10.0)
    assert machine.fresh_gbs == pytest.approx(2.0)
