import math

import pytest
import torch
from torch import nn

from stiefel.nn import S4DBlock, S4DModel, ssm_param_groups


def model_and_input(length=30, **options):
    g = torch.Generator().manual_seed(0)
    model = S4DModel(2, 3, 8, 2, 16, generator=g, **options)
    return model, torch.randn(4, length, 2, generator=g)


@pytest.mark.parametrize("pool", ["mean", "last", "none"])
@pytest.mark.parametrize("prenorm", [True, False])
def test_lengths_are_as_if_each_sequence_came_alone(pool, prenorm):
    model, u = model_and_input(pool=pool, prenorm=prenorm)
    lengths = torch.tensor([30, 1, 12, 29])
    for i, length in enumerate(lengths):
        u[i, length:] = math.inf
    together = model(u, lengths=lengths)
    for i, length in enumerate(lengths):
        alone = model(u[i : i + 1, :length])[0]
        found = together[i, :length] if pool == "none" else together[i]
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pool", ["last", "none"])
def test_steps_give_what_the_whole_sequence_gives(pool):
    model, u = model_and_input(pool=pool)
    states, outputs = None, []
    with torch.no_grad():
        for t in range(u.shape[1]):
            y, states = model.step(u[:, t], states)
            outputs.append(y)
        whole = model(u)
    steps = outputs[-1] if pool == "last" else torch.stack(outputs, dim=1)
    torch.testing.assert_close(steps, whole, rtol=0, atol=1e-5)


def test_pools_are_means_and_ends_of_the_outputs_before_the_head():
    model, u = model_and_input(pool="none")
    outputs = model(u)
    model.pool = "mean"
    torch.testing.assert_close(model(u), outputs.mean(1), rtol=1e-4, atol=1e-6)
    model.pool = "last"
    torch.testing.assert_close(model(u), outputs[:, -1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("prenorm", [True, False])
def test_block_is_norm_layer_and_a_way_around(prenorm):
    block = S4DBlock(4, 8, prenorm=prenorm, generator=torch.Generator().manual_seed(0))
    u = torch.randn(2, 10, 4)
    y, state = block(u)
    inner = block.layer(block.norm(u) if prenorm else u)[0]
    torch.testing.assert_close(y, u + inner if prenorm else block.norm(u + inner))
    assert state.shape == (2, 4, 4)
    step, _ = block.step(u[:, 0])
    torch.testing.assert_close(step, y[:, 0], rtol=0, atol=1e-5)


def test_it_learns_to_tell_slow_from_fast():
    g = torch.Generator().manual_seed(0)
    model = S4DModel(1, 2, 8, 1, 16, generator=g, dt_min=1e-2, dt_max=0.5)
    time = torch.arange(40.0)
    labels = torch.arange(32) % 2
    rates = 0.2 + 0.6 * labels[:, None] + 0.05 * torch.rand(32, 1, generator=g)
    u = torch.sin(rates * time + 6 * torch.rand(32, 1, generator=g))[..., None]
    optimizer = torch.optim.AdamW(ssm_param_groups(model, 1e-2, weight_decay=0.01), lr=1e-2)
    for _ in range(80):
        loss = nn.functional.cross_entropy(model(u), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def named_groups(model, groups):
    names = {id(p): name for name, p in model.named_parameters()}
    return [({names[id(p)] for p in g["params"]}, (g["lr"], g["weight_decay"])) for g in groups]


def test_groups_give_state_spaces_a_slow_rate_and_no_decay():
    model, _ = model_and_input()
    (rest, settings), (slow, slow_settings) = named_groups(
        model, ssm_param_groups(model, 1e-2, weight_decay=0.05)
    )
    assert settings == (1e-2, 0.05)
    assert slow_settings == (1e-3, 0.0)
    inside = ("log_dt", "a_re", "a_im", "B")
    assert slow == {f"blocks.{i}.layer.kernel.{name}" for i in (0, 1) for name in inside}
    assert rest | slow == {name for name, _ in model.named_parameters()}
    assert named_groups(model, ssm_param_groups(model, 1e-4))[1][1] == (1e-4, 0.0)


def test_groups_follow_hints_and_leave_out_what_is_frozen_or_seen():
    model, _ = model_and_input(lr=2e-4)
    assert named_groups(model, ssm_param_groups(model, 1e-2))[1][1] == (2e-4, 0.0)
    frozen, _ = model_and_input(lr=0.0)
    assert len(ssm_param_groups(frozen, 1e-2)) == 1
    shared = nn.ModuleList([model, model])
    counted = sum(len(g["params"]) for g in ssm_param_groups(shared, 1e-2))
    assert counted == len(list(model.parameters()))
    linear = nn.Linear(2, 2)
    linear.weight._optim = {"lr": 0.5, "weight_decay": 0.1}
    assert named_groups(linear, ssm_param_groups(linear, 1e-2))[1] == ({"weight"}, (0.5, 0.1))


def test_bad_calls_are_refused():
    model, u = model_and_input()
    with pytest.raises(ValueError, match="mean, last, none"):
        model_and_input(pool="max")
    with pytest.raises(ValueError, match="n_layers must be at least 1"):
        S4DModel(1, 1, 4, 0)
    with pytest.raises(ValueError, match="transposed"):
        S4DBlock(4, transposed=True)
    with pytest.raises(ValueError, match="2 channels"):
        model(u[..., :1])
    with pytest.raises(ValueError, match="u must be finite"):
        model(u * math.nan)
    with pytest.raises(ValueError, match="pool='last'"):
        model.step(u[:, 0])
    model.pool = "last"
    with pytest.raises(ValueError, match="2 states are needed, got 1"):
        model.step(u[:, 0], [None])
    for setting in ({"lr": -1.0}, {"lr": 1.0, "weight_decay": math.nan}):
        with pytest.raises(ValueError, match="finite and ≥ 0"):
            ssm_param_groups(model, **setting)
    with pytest.raises(ValueError, match="no parameter"):
        ssm_param_groups(nn.ReLU(), 1e-2)
