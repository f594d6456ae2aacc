"""Laws of company: schedulers, scaled losses, compilation, new groups, memory, AdamW."""

import copy
import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from law_table import (
    MATRICES,
    ONE_EACH,
    ROWS,
    assert_all_close,
    every_row,
    everything,
    flat,
    model,
    noise,
    one_each,
    parameters,
    rows_with,
    same,
    set_gradients,
    train,
    values,
)
from torch import nn
from torch.optim import lr_scheduler
from torch.profiler import ProfilerActivity, profile

from stiefel.optim import RMNP, split_parameters

SCHEDULERS = {
    "LambdaLR": lambda o, row: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "OneCycleLR": lambda o, row: lr_scheduler.OneCycleLR(
        o, max_lr=[0.1, 0.01], total_steps=8, base_momentum=0.8, max_momentum=0.9, **row.cycles
    ),
    "CosineAnnealingLR": lambda o, row: lr_scheduler.CosineAnnealingLR(o, T_max=4),
    "ReduceLROnPlateau": lambda o, row: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0),
    "SequentialLR": lambda o, row: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.5)],
        milestones=[2],
    ),
}
WITH_TENSOR_RATE = ("OneCycleLR", "ReduceLROnPlateau", "SequentialLR")


def advance(scheduler):
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(1.0)
    else:
        scheduler.step()


@rows_with("name", tuple(SCHEDULERS))
def test_schedulers_drive_both_rules(row, name):
    """The scheduled run equals one whose settings are written by hand before every step."""
    tensor = name in WITH_TENSOR_RATE
    lr = torch.tensor(0.02) if tensor else 0.02
    rest = torch.tensor(1e-3) if tensor else 1e-3
    optimizer = row(model(), lr=lr, adamw_lr=rest)
    twin = row(model())
    scheduler = SCHEDULERS[name](optimizer, row)
    rates = []
    for step in range(5):
        for ours, theirs in zip(optimizer.param_groups, twin.param_groups, strict=True):
            theirs.update({k: ours[k] for k in ("betas", "momentum") if k in ours})
            theirs["lr"] = float(ours["lr"])
        rates.append([float(g["lr"]) for g in optimizer.param_groups])
        train(optimizer, 1, start=step)
        train(twin, 1, start=step)
        advance(scheduler)
    # A rate held as a float32 tensor is rounded.
    assert_all_close(values(optimizer), values(twin), 1e-6 if tensor else 1e-14)
    for i in (0, 1):
        assert len({rate[i] for rate in rates}) > 2


@every_row
def test_scaled_losses(row):
    """GradScaler: steps equal those without it, and an overflow skips the step and the state."""
    optimizer, twin = row(model(torch.float32)), row(model(torch.float32))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)

    def loss(params, step):
        return sum((p * noise(tuple(p.shape), step, p.dtype)).sum() for p in params)

    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(loss(flat(optimizer), step)).backward()
        if step == 2:
            flat(optimizer)[0].grad[0, 0] = torch.inf
        before = everything(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step == 2:
            after = everything(optimizer)
            assert same([e[0::2] for e in before[1:5]], [e[0::2] for e in after[1:5]])
            assert scaler.get_scale() == 2.0**9
            continue
        twin.zero_grad()
        loss(flat(twin), step).backward()
        twin.step()
    assert_all_close(values(optimizer), values(twin), 1e-6)


@every_row
def test_added_groups(row):
    late = row(model())
    late.add_param_group({"params": parameters(((3, 5),), seed=2), "lr": 0.1})
    late.add_param_group({"params": parameters(((5,),), seed=3)[0], "rule": "elementwise"})
    whole = row(
        [
            *model(),
            {"params": parameters(((3, 5),), seed=2), "rule": "matrix", "lr": 0.1},
            {"params": parameters(((5,),), seed=3), "rule": "elementwise"},
        ]
    )
    train(late, 3)
    train(whole, 3)
    assert same(values(late), values(whole))
    assert same(late.state_dict(), whole.state_dict())
    assert late.param_groups[2]["lr"] == 0.1
    assert late.param_groups[3]["lr"] == late.defaults["adamw_lr"]


@one_each
def test_single_tensors_as_groups(row):
    scalar = nn.Parameter(torch.tensor(2.0))
    optimizer = row(
        [{"params": parameters(((3, 2),))[0]}, {"params": scalar, "rule": "elementwise"}]
    )
    train(optimizer, 1)
    assert scalar != 2.0


@one_each
def test_names(row):
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    optimizer = row(split_parameters(net))
    names = [group["param_names"] for group in optimizer.param_groups]
    assert names == [["0.weight", "2.weight"], ["0.bias", "2.bias", "4.weight", "4.bias"]]
    optimizer.add_param_group({"params": [("late", parameters(((3, 2),))[0])]})
    optimizer.add_param_group({"params": [], "rule": "elementwise"})
    assert [g["param_names"] for g in optimizer.param_groups[2:]] == [["late"], []]
    assert optimizer.state_dict()["param_groups"][2]["param_names"] == ["late"]
    net(torch.ones(1, 3)).sum().backward()
    net[2].weight.grad[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"parameter '2\.weight'"):
        optimizer.step()


@one_each
def test_settings_of_a_group_win(row):
    groups = [
        {"params": parameters(((6, 4),)), "lr": 0.5, "weight_decay": 0.2},
        {"params": parameters(((4,),)), "rule": "elementwise", "lr": 0.7, "betas": (0.5, 0.6)},
    ]
    optimizer = row(groups)
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.7]
    assert optimizer.param_groups[0]["weight_decay"] == 0.2
    assert optimizer.param_groups[1]["betas"] == (0.5, 0.6)
    assert not any(key.startswith("adamw_") for g in optimizer.param_groups for key in g)
    assert "rule" not in groups[0]  # the user's own dicts stay as they were


@rows_with("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_the_rest_is_torch_adamw_to_the_last_bit(row, dtype):
    settings = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    optimizer = row(model(dtype), **{f"adamw_{key}": value for key, value in settings.items()})
    twins = parameters(((4,), (3, 7)), dtype, seed=1)
    theirs = torch.optim.AdamW(twins, fused=True, **settings)
    for step in range(3):
        set_gradients(flat(optimizer), step)
        for p, q in zip(optimizer.param_groups[1]["params"], twins, strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        theirs.step()
    for p, q in zip(optimizer.param_groups[1]["params"], twins, strict=True):
        assert torch.equal(p, q)
        assert same(dict(optimizer.state[p]), dict(theirs.state[q]))


def test_compiled_steps_equal_eager_ones():
    script = Path(__file__).with_name("compiled_steps.py")
    command = [sys.executable, "-W", "ignore", str(script)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    differences = json.loads(done.stdout.splitlines()[-1])
    assert len(differences) == len(ONE_EACH)
    assert max(differences.values()) < 1e-12, differences


def peak_of_a_step(optimizer):
    """Bytes above what was held before, by torch's own account of every allocation."""
    gc.collect()  # else what earlier tests left is freed while we count
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        optimizer.step()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak, held


BENCHMARK = ((384, 384),) * 24 + ((1536, 384),) * 6 + ((384, 1536),) * 6


@one_each
def test_memory_of_a_step(row):
    """Beyond parameters and state at most twice the largest stack of equal matrices."""
    optimizer = row([nn.Parameter(torch.zeros(shape)) for shape in BENCHMARK])
    for p in flat(optimizer):
        p.grad = torch.ones_like(p)
    peak, held = peak_of_a_step(optimizer)
    state = sum(v.nbytes for s in optimizer.state.values() for v in s.values())
    stack = 24 * 384 * 384 * 4
    scratch = optimizer._space.nbytes
    # The transform in float32, and in bfloat16 for the way back from products.
    basis = 384 * 384 * (4 + 2) if row.basis else 0
    assert peak <= state + 2 * stack
    assert state <= held <= state + scratch + basis + 8192
    peak, held = peak_of_a_step(optimizer)
    assert peak <= 2 * stack - scratch
    assert held <= 8192  # nothing more is kept
    assert optimizer._space.nbytes == scratch


@every_row
def test_scratch_memory_does_not_grow_with_the_number_of_parameters(row):
    shape = (row.scratch_side, row.scratch_side)
    sizes = []
    for count in (40, 80):
        optimizer = row([nn.Parameter(torch.ones(shape)) for _ in range(count)])
        for p in flat(optimizer):
            p.grad = torch.ones_like(p)
        optimizer.step()
        sizes.append(optimizer._space.nbytes)
    assert sizes[0] == sizes[1]


def test_rmnp_needs_less_memory_than_adamw():
    shapes = ((96, 96),) * 8 + ((384, 96),) * 2
    peaks = []
    for optimizer in (
        RMNP(parameters(shapes, torch.float32)),
        torch.optim.AdamW(parameters(shapes, torch.float32), foreach=True),
    ):
        set_gradients(flat(optimizer), 0)
        peaks.append(peak_of_a_step(optimizer)[0])
    assert peaks[0] < 0.6 * peaks[1]


@every_row
def test_scratch_memory_is_never_saved(row):
    optimizer = row(model())
    train(optimizer, 2)
    assert "_space" not in optimizer.__getstate__()
    assert copy.deepcopy(optimizer)._space.nbytes == 0
    assert set(optimizer.state_dict()) == {"state", "param_groups"}


def test_results_do_not_depend_on_what_ran_before():
    """Scratch memory is shared by shapes and steps: nothing of the old contents may show."""
    for row in ROWS:
        fresh, used = row(parameters(MATRICES)), row(parameters(MATRICES))
        other = nn.Parameter(noise((9, 7), 5))
        used.add_param_group({"params": [other]})
        for step in range(3):
            set_gradients(flat(fresh), step)
            set_gradients(flat(used), step, scale=1.0)
            fresh.step()
            for buffer in used._space._buffers.values():
                exact = not buffer.is_floating_point()
                buffer.fill_(torch.iinfo(buffer.dtype).max if exact else float("nan"))
            used.step()
        assert_all_close(values(used)[: len(MATRICES)], values(fresh))


@one_each
def test_training_a_network(row):
    """From modules to a fit, as a user would write it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    x = torch.randn(128, 8)
    y = torch.sin(x[:, :1] + x[:, 1:2])
    optimizer = row(split_parameters(net), adamw_lr=3e-3)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 150)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(net(x), y)
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert set(row.extra) < set(optimizer.state[net[0].weight])
