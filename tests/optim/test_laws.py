"""Laws of a step that every row obeys: what it depends on, and what it leaves alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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

NAMES = ("fitted", "fast", "classic", "polar_express")


@every_row
def test_a_step_moves_every_parameter_down_the_gradient(row):
    optimizer = row(model(), weight_decay=0.0)
    before = values(optimizer)
    train(optimizer, 1)
    for p, old in zip(flat(optimizer), before, strict=True):
        assert torch.isfinite(p).all()
        assert ((p - old) * p.grad).sum() < 0


@pytest.mark.parametrize(
    "row", [r for r in ROWS if r in ONE_EACH or "error_feedback" in r.kwargs], ids=lambda r: r.name
)
def test_it_solves_a_least_squares_problem(row):
    target = 0.2 * noise((6, 4), 7)
    weight = nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))
    optimizer = row([weight], lr=0.05, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=300)
    for _ in range(300):
        optimizer.zero_grad()
        (weight - target).square().sum().backward()
        optimizer.step()
        schedule.step()
    assert (weight - target).square().sum() < 1e-3 * target.square().sum()


@rows_with("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_lower_precision_follows_float64(row, dtype):
    optimizer, exact = row(model(dtype)), row(model())
    for p, q in zip(flat(optimizer), flat(exact), strict=True):
        q.data.copy_(p)
    before = values(exact)
    for step in range(3):
        set_gradients(flat(optimizer), step)
        for p, q in zip(flat(optimizer), flat(exact), strict=True):
            q.grad = p.grad.double()
        optimizer.step()
        exact.step()
    matrices = optimizer.param_groups[0]["params"]
    for i, (p, q) in enumerate(zip(flat(optimizer), flat(exact), strict=True)):
        assert p.dtype == dtype
        for key, value in optimizer.state[p].items():
            assert value.dtype == row.kept(key, value, dtype)
        moved = (q - before[i]).norm()
        # bfloat16 products everywhere; below float32 the parameters themselves are rounded too.
        rounding = 3 * torch.finfo(dtype).eps * before[i].norm()
        assert (p.double() - q).norm() < (0.08 if i < len(matrices) else 0.02) * moved + rounding


@pytest.mark.parametrize("row", [r for r in ROWS if r.products], ids=lambda row: row.name)
def test_precision_of_the_products_is_as_asked(row):
    errors = {}
    exact = row(model(), weight_decay=0.0)
    train(exact, 2)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        optimizer = row(model(torch.float32), weight_decay=0.0, ns_dtype=dtype)
        train(optimizer, 2)
        pairs = zip(values(optimizer)[:4], values(exact)[:4], strict=True)
        errors[dtype] = sum(float((p - q).norm()) for p, q in pairs)
    assert errors[torch.float32] < 1e-5
    assert errors[torch.float64] < 1e-5
    assert 1e-5 < errors[torch.bfloat16] < 5e-2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("row", [r for r in ROWS if r.polynomial], ids=lambda row: row.name)
def test_every_polynomial_serves_every_method(row, name):
    optimizer = row(parameters(), weight_decay=0.0, **{row.polynomial: name})
    before = values(optimizer)
    train(optimizer, 1)
    for p, old in zip(flat(optimizer), before, strict=True):
        moved = p - old
        cosine = -(moved * p.grad).sum() / moved.norm() / p.grad.norm()
        assert cosine > 0.6


@every_row
def test_parameters_without_gradient_are_left_with_their_state(row):
    optimizer, twin = row(model()), row(model())
    train(optimizer, 2)
    train(twin, 2)
    silent = [flat(optimizer)[i] for i in (1, 3, 5)]
    set_gradients(flat(optimizer), 2)
    for p in silent:
        p.grad = None
    before = everything(optimizer)
    optimizer.step()
    set_gradients(flat(twin), 2)
    twin.step()
    after = everything(optimizer)
    twins = {id(p): q for p, q in zip(flat(optimizer), flat(twin), strict=True)}
    entries = [e for e in zip(before, after, strict=True) if isinstance(e[0], tuple)]
    for p, (old, new) in zip(flat(optimizer), entries, strict=True):
        if any(p is s for s in silent):
            assert same(old, new)
        else:
            assert not torch.equal(old[0], new[0])
            assert_all_close([p], [twins[id(p)]])


@every_row
def test_all_silent_changes_nothing(row):
    optimizer = row(model())
    before = everything(optimizer)
    assert optimizer.step() is None
    assert same(before, everything(optimizer))
    assert not optimizer.state


@rows_with("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_zero_gradients_only_decay(row, dtype):
    optimizer = row(model(dtype), weight_decay=0.5, adamw_weight_decay=0.25, adamw_lr=0.01)
    before = values(optimizer)
    for p in flat(optimizer):
        p.grad = torch.zeros_like(p)
    for _ in range(2):
        optimizer.step()
    for i, (p, old) in enumerate(zip(values(optimizer), before, strict=True)):
        rate = 1 - 0.02 * 0.5 if i < len(MATRICES) else 1 - 0.01 * 0.25
        for _ in range(2):  # one rounding a step, as the parameter is stored
            wide = old.float() if dtype == torch.bfloat16 else old
            old = (wide * rate).to(dtype)
        if i < len(MATRICES):
            assert torch.equal(p, old)
        else:
            torch.testing.assert_close(p, old)


@every_row
def test_zero_gradients_and_no_decay_change_nothing(row):
    optimizer = row(parameters(), weight_decay=0.0)
    before = values(optimizer)
    for p in flat(optimizer):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert same(before, values(optimizer))


@every_row
def test_decay_is_decoupled(row):
    """Two steps with decay: the update is that of the run without, from the same gradients."""
    lr, decay = 0.02, 0.3
    decayed, free = row(parameters(), weight_decay=decay), row(parameters(), weight_decay=0.0)
    expected = values(free)
    for step in range(3):
        before = values(free)
        train(decayed, 1, start=step)
        train(free, 1, start=step)
        updates = [new - old for new, old in zip(values(free), before, strict=True)]
        expected = [(1 - lr * decay) * w + u for w, u in zip(expected, updates, strict=True)]
    assert_all_close(values(decayed), expected)
    assert (values(decayed)[0] - values(free)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("row", [r for r in ONE_EACH if r.scale_free], ids=lambda row: row.name)
@given(exponent=st.floats(-8, 8))
@settings(max_examples=6, deadline=None)
def test_scaling_all_gradients_changes_nothing(row, exponent):
    optimizer, scaled = row(parameters()), row(parameters())
    train(optimizer, 3)
    train(scaled, 3, scale=10**exponent)
    assert_all_close(values(scaled), values(optimizer), 1e-6)


@pytest.mark.parametrize("row", [r for r in ROWS if r.scale_free], ids=lambda row: row.name)
@pytest.mark.parametrize("exponent", [-26, 26])
def test_scaling_by_powers_of_two_changes_no_digit_in_float32(row, exponent):
    optimizer = row(parameters(dtype=torch.float32))
    scaled = row(parameters(dtype=torch.float32))
    train(optimizer, 3)
    train(scaled, 3, scale=2.0**exponent)
    assert_all_close(values(scaled), values(optimizer), 1e-6)


@every_row
def test_permuting_rows_permutes(row):
    order = torch.tensor([3, 1, 4, 0, 2, 5])
    weight, permuted = parameters(((6, 4),))[0], parameters(((6, 4),))[0]
    permuted.data.copy_(weight[order])
    optimizers = row([weight]), row([permuted])
    for step in range(3):
        weight.grad = noise((6, 4), step)
        permuted.grad = weight.grad[order].clone()
        for optimizer in optimizers:
            optimizer.step()
    assert_all_close([permuted], [weight[order]])


@every_row
def test_shared_batches_equal_an_optimizer_for_each_parameter(row):
    shapes = ((6, 4), (4, 6), (6, 4), (5, 5), (6, 4))
    together = row(parameters(shapes))
    train(together, 3)
    for i, p in enumerate(parameters(shapes)):
        alone = row([p])
        for step in range(3):
            p.grad = noise(p.shape, 1000 + 100 * step + i)
            alone.step()
        assert_all_close([p], [flat(together)[i]])
        for key, value in alone.state[p].items():
            assert_all_close([together.state[flat(together)[i]][key]], [value])


@rows_with("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_gradients_are_left_bitwise(row, dtype):
    optimizer = row(model(dtype))
    for step in range(2):
        set_gradients(flat(optimizer), step)
        before = [p.grad.clone() for p in flat(optimizer)]
        optimizer.step()
        assert same(before, [p.grad for p in flat(optimizer)])


@rows_with(
    "count dtype",
    (1, 3),
    (torch.float32, torch.bfloat16),
    rows=[r for r in ROWS if r.running_mean],
)
def test_momentum_is_the_running_mean_and_nothing_else(row, dtype, count):
    """torch.optim.Muon normalises a bfloat16 momentum in place without Nesterov; this one not."""
    rate = row(parameters(((6, 4),))).defaults[row.momentum]
    rate = rate[0] if isinstance(rate, tuple) else rate
    optimizer = row(parameters(((6, 4),) * count, dtype))
    expected = [torch.zeros(6, 4, dtype=dtype) for _ in range(count)]
    for step in range(3):
        set_gradients(flat(optimizer), step)
        for m, p in zip(expected, flat(optimizer), strict=True):
            m.lerp_(p.grad, 1 - rate)
        optimizer.step()
    assert same(expected, [optimizer.state[p]["momentum_buffer"] for p in flat(optimizer)])
    assert expected[0].norm() < 0.9


@every_row
def test_accumulated_gradients_count_as_their_sum(row):
    weights = parameters(((6, 4),)), parameters(((6, 4),))
    parts = [noise((6, 4), i) for i in range(3)]
    once, accumulated = row(weights[0]), row(weights[1])
    for _ in range(2):
        (weights[0][0] * sum(parts)).sum().backward()
        for part in parts:
            (weights[1][0] * part).sum().backward()
        once.step()
        accumulated.step()
        once.zero_grad()
        accumulated.zero_grad()
    assert_all_close(weights[1], weights[0])


@every_row
def test_closure(row):
    optimizer = row(model())
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        calls.append(0)
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in flat(optimizer))
        loss.backward()
        return loss.detach()

    losses = [float(optimizer.step(closure)) for _ in range(3)]
    assert len(calls) == 3
    assert losses[0] > losses[1] > losses[2]


@one_each
def test_hundreds_of_bfloat16_steps_stay_finite(row):
    weight = parameters(((8, 4),), torch.bfloat16)[0]
    optimizer = row([weight])
    gradients = noise((50, 8, 4), 3, torch.bfloat16)
    for step in range(400):
        weight.grad = gradients[step % 50] * 10.0 ** (step % 7 - 3)
        optimizer.step()
    assert torch.isfinite(weight).all()
    for value in optimizer.state[weight].values():
        assert torch.isfinite(value).all()
    # Singular values of an update are at most 1.5 · lr · scale, and there are four of them.
    assert not row.bounded or weight.float().norm() < 400 * 0.02 * 1.5 * 2 * max(
        2**0.5, 0.2 * 8**0.5
    )


@one_each
def test_empty_and_one_row_matrices(row):
    shapes = ((0, 4), (4, 0), (1, 5), (5, 1), (1, 1), (3, 2))
    optimizer = row(parameters(shapes))
    before = values(optimizer)
    train(optimizer, 1)
    for p, old in zip(flat(optimizer), before, strict=True):
        assert not p.numel() or not torch.equal(p, old)
    train(optimizer, 1, start=1)
    assert all(torch.isfinite(p).all() for p in flat(optimizer))
