import math

import pytest
import torch
from torch import nn

from stiefel.data import MissingDataError
from stiefel.papers import UnavailableError, byte_gpt, race
from stiefel.papers.byte_gpt import GPT, GPTSize, build_optimizer, project, rate_factor
from stiefel.papers.contestants import FACTORIES
from stiefel.papers.paper import Scale

SMALL = GPTSize(width=24, blocks=2, heads=3, context=10, vocabulary=17)


def quiet(fraction, message):
    pass


def slow_forward(model, tokens, size):
    """The model as one would write it on paper: one sequence, one head, one position at a time."""
    weights = {name: p.detach().double() for name, p in model.named_parameters()}

    def norm(row):
        return row / (row.square().mean() + torch.finfo(torch.float32).eps).sqrt()

    logits = []
    for sequence in tokens.tolist():
        rows = [
            weights["tokens.weight"][token] + weights["positions.weight"][i]
            for i, token in enumerate(sequence)
        ]
        for b in range(size.blocks):
            w = {k: weights[f"blocks.{b}.{k}.weight"] for k in ("q", "k", "v", "o", "up", "down")}
            normed = [norm(row) for row in rows]
            q, k, v = ([w[name] @ row for row in normed] for name in ("q", "k", "v"))
            width = size.width // size.heads
            for i in range(len(rows)):
                heads = []
                for h in range(size.heads):
                    part = slice(h * width, (h + 1) * width)
                    scores = torch.stack([q[i][part] @ k[j][part] for j in range(i + 1)])
                    share = torch.softmax(scores / math.sqrt(width), 0)
                    heads.append(sum(share[j] * v[j][part] for j in range(i + 1)))
                rows[i] = rows[i] + w["o"] @ torch.cat(heads)
            rows = [r + w["down"] @ nn.functional.gelu(w["up"] @ norm(r)) for r in rows]
        logits.append(torch.stack([weights["head.weight"] @ norm(row) for row in rows]))
    return torch.stack(logits)


def test_forward_equals_the_slow_reference(generator):
    model = GPT(SMALL, seed=3)
    tokens = torch.randint(SMALL.vocabulary, (3, SMALL.context), generator=generator)
    expected = slow_forward(model, tokens, SMALL)
    torch.testing.assert_close(model(tokens).double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("batch", "length"), [(4, 7), (1, 5), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_project_is_the_matrix_product_with_its_gradients(generator, batch, length, dtype):
    x = torch.randn(batch, length, 6, generator=generator, dtype=dtype, requires_grad=True)
    w = torch.randn(5, 6, generator=generator, dtype=dtype, requires_grad=True)
    g = torch.randn(batch, length, 5, generator=generator, dtype=dtype)
    grads = torch.autograd.grad(project(x, w), (x, w), g)
    expected = torch.autograd.grad(x @ w.T, (x, w), g)
    torch.testing.assert_close(project(x, w), x @ w.T)
    torch.testing.assert_close(grads, expected)


def test_the_future_is_not_seen(generator):
    model = GPT(SMALL, seed=0)
    tokens = torch.randint(SMALL.vocabulary, (2, 10), generator=generator)
    changed = tokens.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % SMALL.vocabulary
    a, b = model(tokens), model(changed)
    torch.testing.assert_close(a[:, :6], b[:, :6], rtol=0, atol=0)
    assert (a[:, 6:] - b[:, 6:]).abs().amin(-1).max() > 0


def test_initial_weights_have_the_stated_spread():
    size = GPTSize()
    model = GPT(size, seed=0)
    residual = math.sqrt(2 * 3)
    for block in model.blocks:
        for layer in (block.q, block.k, block.v, block.up):
            assert layer.weight.std().item() == pytest.approx(96**-0.5, rel=0.03)
        assert block.o.weight.std().item() == pytest.approx(96**-0.5 / residual, rel=0.03)
        assert block.down.weight.std().item() == pytest.approx(384**-0.5 / residual, rel=0.03)
    assert model.tokens.weight.std().item() == pytest.approx(0.5, rel=0.03)
    assert model.positions.weight.std().item() == pytest.approx(0.5, rel=0.03)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.03)
    # ln 256 at the start: the head says nothing yet.
    rows = torch.randint(256, (8, 65), generator=torch.Generator().manual_seed(0))
    assert byte_gpt.next_token_loss(model, rows).item() == pytest.approx(math.log(256), abs=0.05)


def test_seed_decides_the_weights_and_nothing_else_is_touched():
    before = torch.get_rng_state()
    a, b, c = (GPT(SMALL, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not any(torch.equal(a[k], c[k]) for k in a)


def test_matrices_and_others_are_all_parameters_once():
    model = GPT(GPTSize(), seed=0)
    shapes = sorted(tuple(p.shape) for p in model.matrices().values())
    assert shapes == [(96, 96)] * 12 + [(96, 384)] * 3 + [(384, 96)] * 3
    ids = [id(p) for p in (*model.matrices().values(), *model.others())]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize(
    ("step", "factor"),
    [(0, 0.1), (4, 0.5), (9, 1.0), (99, 1.0), (149, 0.55), (199, 0.1)],
)
def test_linear_schedule(step, factor):
    assert rate_factor(step, 200, 10) == pytest.approx(factor)


def test_cosine_schedule_and_unknown_ones():
    assert rate_factor(0, 100, 10, "cosine") == pytest.approx(0.1)
    assert rate_factor(9, 100, 10, "cosine") == pytest.approx(1.0)
    assert rate_factor(54, 100, 10, "cosine") == pytest.approx(0.505)
    assert rate_factor(99, 100, 10, "cosine") == pytest.approx(0.01)
    with pytest.raises(ValueError, match="linear or cosine, got 'step'"):
        rate_factor(0, 100, 10, "step")


@pytest.mark.parametrize("method", FACTORIES)
def test_every_method_gives_adamw_the_same_rest_without_decay(method):
    model = GPT(SMALL, seed=0)
    optimizer = build_optimizer(model, method, lr=0.5)
    matrices, rest = optimizer.param_groups
    assert {id(p) for p in matrices["params"]} == {id(p) for p in model.matrices().values()}
    assert {id(p) for p in rest["params"]} == {id(p) for p in model.others()}
    assert (matrices["lr"], rest["lr"]) == (0.5, 3e-3)
    assert matrices["weight_decay"] == rest["weight_decay"] == 0
    assert tuple(rest["betas"]) == (0.9, 0.95)
    assert matrices.get("nesterov", True) is (method != "muon-plain")


def test_unknown_method():
    with pytest.raises(ValueError, match="got 'sgd'"):
        build_optimizer(GPT(SMALL, seed=0), "sgd", lr=0.1)


@pytest.mark.parametrize("method", FACTORIES)
def test_a_run_is_determined_by_its_config_and_learns(method):
    config = race.plan(Scale.SMOKE).config(method, 5e-3, seed=1)
    first, second = (byte_gpt.train(config, quiet) for _ in range(2))
    for key in ("losses", "select", "probes"):
        assert first[key] == second[key]
    assert first["steps"] == [5, 10, 15, 20]
    assert first["final"] == first["losses"][-1] < first["losses"][0]
    assert byte_gpt.train({**config, "seed": 2}, quiet)["losses"] != first["losses"]


def test_a_run_equals_a_plain_training_loop():
    """Same text, batches, schedule and windows, written out with nothing but torch."""
    config = race.plan(Scale.SMOKE).config("adamw", 4e-3, seed=5)
    data = byte_gpt.text(config["limit"])
    model = GPT(GPTSize(16, 1, 2, 16), seed=5)
    optimizer = torch.optim.AdamW(
        [
            {"params": list(model.blocks.parameters()), "lr": 4e-3},
            {"params": [model.tokens.weight, model.positions.weight, model.head.weight]},
        ],
        lr=3e-3,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        foreach=False,
    )
    draws = torch.Generator().manual_seed(1_000_005)
    starts = torch.randint(len(data.train) - 16, (20, 4), generator=draws)
    held_out = torch.linspace(0, len(data.validation) - 17, 16).long()[::2]

    def loss(tokens, where):
        rows = torch.stack([tokens[s : s + 17] for s in where.tolist()]).long()
        return nn.functional.cross_entropy(model(rows[:, :-1]).mT, rows[:, 1:])

    losses = []
    for step in range(20):
        factor = (step + 1) / 2 if step < 2 else 1.0
        if step >= 10:
            factor = 1 - 0.9 * (step - 9) / 10
        for group, peak in zip(optimizer.param_groups, (4e-3, 3e-3), strict=True):
            group["lr"] = peak * factor
        optimizer.zero_grad()
        loss(data.train, starts[step]).backward()
        optimizer.step()
        if (step + 1) % 5 == 0:
            losses.append(loss(data.validation, held_out).item())
    assert byte_gpt.train(config, quiet)["losses"] == pytest.approx(losses, abs=1e-4)


def test_validation_windows_that_choose_are_not_those_reported():
    config = race.plan(Scale.SMOKE).config("adamw", 1e-3, seed=0)
    result = byte_gpt.train(config, quiet)
    assert result["select"] != result["final"]
    assert result["select"] == pytest.approx(result["final"], abs=0.5)


@pytest.mark.parametrize("method", ["adamw", "muon"])
def test_a_diverged_run_says_so(method):
    config = race.plan(Scale.SMOKE).config(method, 1e30, seed=0)
    result = byte_gpt.train(config, quiet)
    assert result["final"] is None
    assert result["select"] is None


def test_progress_is_reported_with_the_loss():
    seen = []
    config = race.plan(Scale.SMOKE).config("adamw", 1e-3, seed=0)
    result = byte_gpt.train(config, lambda fraction, message: seen.append((fraction, message)))
    assert [fraction for fraction, _ in seen] == [0.25, 0.5, 0.75, 1.0]
    assert f"{result['final']:.3f}" in seen[-1][1]


def test_missing_text_makes_the_paper_unavailable(monkeypatch):
    def missing(limit):
        raise MissingDataError("no source here")

    monkeypatch.setattr(byte_gpt, "python_source", missing)
    with pytest.raises(UnavailableError, match="no source here"):
        byte_gpt.text(12_345)
