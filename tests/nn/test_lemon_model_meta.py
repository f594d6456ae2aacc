"""Meta-learning: numbers by hand, all tasks at once against one by one, learned step sizes."""

import copy
import math

import pytest
import torch
from lemon_models import data, tiny
from torch import nn
from torch.func import functional_call

from stiefel.nn.lemon import MetaLearner, OperatorData, SymbolicStepSize, evaluate, lora, split_task
from stiefel.nn.lemon.low_rank import LowRank
from stiefel.nn.lemon.meta_tasks import stacked

mse = nn.functional.mse_loss


def line(w=1.0):
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, w)
    return model


def pair(x, y):
    return torch.tensor([[float(x)]]).double(), torch.tensor([[float(y)]]).double()


@pytest.mark.parametrize(("first_order", "gradient"), [(True, -6.24), (False, -3.99360)])
def test_maml_by_hand(first_order, gradient):
    learner = MetaLearner(line(), 0.1, 2, first_order)
    assert learner.adapt(pair(1, 3)).weight.item() == pytest.approx(1.72, abs=1e-12)
    assert learner.model.weight.item() == 1
    loss = learner.gradients([(pair(1, 3), pair(2, 5))])
    assert loss == pytest.approx(2.4336, abs=1e-12)
    assert learner.model.weight.grad.item() == pytest.approx(gradient, abs=1e-12)


def test_the_outer_gradient_is_the_mean_over_tasks():
    one, two = (pair(1, 3), pair(2, 5)), (pair(2, 1), pair(1, 1))
    alone = []
    for task in (one, two):
        learner = MetaLearner(line(), 0.1, 2)
        learner.gradients([task])
        alone.append(learner.model.weight.grad.item())
    learner.gradients([one, two])
    assert learner.model.weight.grad.item() == pytest.approx(sum(alone) / 2)


def one_by_one(learner, tasks, first_order):
    """The slow twin: one task after the other, autograd through everything that is asked for."""
    model = learner.model
    theta = dict(model.named_parameters())
    total = 0.0
    for support, query in tasks:
        s, q = support.normalised()[0], query.normalised()[0]
        if isinstance(learner.step_sizes, SymbolicStepSize):
            sizes = learner.step_sizes(*model.encode_symbols(s.tokens)).mean()
            sizes = dict.fromkeys(learner._names, sizes)
        elif learner.step_sizes is not None:
            parts = learner.step_sizes.split(learner._counts)
            sizes = {n: a.view_as(theta[n]) for n, a in zip(learner._names, parts, strict=True)}
        else:
            sizes = dict.fromkeys(learner._names, learner.inner_lr)
        moved = {n: theta[n] for n in learner._names}
        for _ in range(learner.inner_steps):
            at = {n: x.detach().requires_grad_() if first_order else x for n, x in moved.items()}
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                loss = mse(functional_call(model, at, s.inputs), s.target)
            grads = torch.autograd.grad(loss, list(at.values()), create_graph=not first_order)
            for n, g in zip(learner._names, grads, strict=True):
                moved[n] = moved[n] - sizes[n] * g.clamp(-0.5, 0.5)
        total = total + mse(functional_call(model, moved, q.inputs), q.target) / len(tasks)
    parameters = [p for g in learner.optimizer.param_groups for p in g["params"]]
    return total.item(), torch.autograd.grad(total, parameters, allow_unused=True)


def double(d):
    return OperatorData(d.u_in.double(), d.t_in, d.u_out.double(), d.t_out, d.tokens, d.pad)


@pytest.mark.parametrize("kind", ["number", "per-parameter", "symbolic", "adapters"])
@pytest.mark.parametrize("first_order", [True, False])
def test_all_tasks_at_once_equal_one_by_one(kind, first_order):
    model = tiny(dim=8, ffn=12, layers=(1, 1, 1, 1)).double()
    if kind == "adapters":
        lora(model, 2, targets="ffn")
        for module in model.modules():
            if isinstance(module, LowRank):
                nn.init.normal_(module.B, std=0.1)
    inner_lr = {
        "number": 0.1,
        "adapters": 0.1,
        "per-parameter": "per-parameter",
        "symbolic": SymbolicStepSize(8, 6).double(),
    }[kind]
    learner = MetaLearner(model, inner_lr, 2, first_order, start_lr=0.07, clamp=0.5)
    g = torch.Generator().manual_seed(0)
    families = [data(9, seed=s, formulas=f, length=n) for s, f, n in ((1, 2, 7), (2, 1, 4))]
    tasks = [split_task(double(d), 3, 4, generator=g) for d in families]
    tasks.append(split_task(double(data(8, seed=3)), 2, 4, generator=g))  # another size
    value = learner.gradients(tasks)
    parameters = [p for group in learner.optimizer.param_groups for p in group["params"]]
    expected, gradients = one_by_one(learner, tasks, first_order)
    assert value == pytest.approx(expected, rel=1e-9)
    assert sum(g is not None for g in gradients) > 10
    for p, g in zip(parameters, gradients, strict=True):
        if g is None:
            assert p.grad is None or p.grad.abs().max() == 0
        else:
            torch.testing.assert_close(p.grad, g, atol=1e-9, rtol=1e-6)
    learner.outer_step(tasks)
    adapted = learner.adapt(tasks[0][0], 1)
    assert all(p.isfinite().all() for p in adapted.parameters())


def test_learned_step_sizes_move_where_they_help():
    """f = w·x from 0 to targets of one sign: larger steps fit better, so every α grows."""
    learner = MetaLearner(line(0.0), "per-parameter", 1, start_lr=0.01, outer_lr=0.01)
    before = learner.step_sizes.item()
    for _ in range(20):
        learner.outer_step([(pair(1, 3), pair(1, 3)), (pair(1, -3), pair(1, -3))])
    assert learner.step_sizes.item() > before + 0.1
    assert abs(learner.model.weight.item()) < 0.02


def test_symbolic_step_sizes():
    size = SymbolicStepSize(8, 6, 0.5, generator=torch.Generator().manual_seed(0))
    encoding = torch.randn(3, 4, 8)
    padding = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]]).bool()
    value = size(encoding, padding)
    for i, n in enumerate((4, 2, 3)):
        expected = 0.5 * torch.sigmoid(size.net(encoding[i, :n]).mean())
        torch.testing.assert_close(value[i], expected)
    shifted = encoding + 100 * padding[..., None]
    torch.testing.assert_close(size(shifted, padding), value)
    # The inner loop leaves alone what reads the equation; the outer step does not.
    model = tiny()
    learner = MetaLearner(model, SymbolicStepSize(16))
    assert not any("symbol_encoder" in n or "token_embedding" in n for n in learner._names)
    support, query = split_task(data(30), 10, 10)
    adapted = learner.adapt(support)
    for name, p in model.symbol_encoder.named_parameters():
        assert torch.equal(adapted.symbol_encoder.get_parameter(name), p)
    learner.gradients([(support, query)])
    assert all(p.grad.abs().max() > 0 for p in learner.step_sizes.parameters())
    assert model.symbol_encoder.blocks[0].attention.qkv.weight.grad.abs().max() > 0


def test_langevin_noise_has_its_variance():
    x = (torch.zeros(1, 100), torch.zeros(1, 100))
    model = nn.Linear(100, 100, bias=False)
    nn.init.zeros_(model.weight)
    g = torch.Generator().manual_seed(0)
    learner = MetaLearner(model, 0.02, 3, langevin=0.5, generator=g)
    moved = learner.adapt(x).weight
    assert moved.std().item() == pytest.approx(math.sqrt(3 * 2 * 0.02 * 0.5), rel=0.03)
    first = MetaLearner(model, 0.02, 3, langevin=0.5, generator=g.manual_seed(0)).adapt(x).weight
    assert torch.equal(first, moved)
    # Learned sizes: the noise is differentiated as well.
    learner = MetaLearner(model, "per-parameter", 2, langevin=0.5)
    learner.gradients([(x, (torch.ones(1, 100), torch.zeros(1, 100)))])
    assert learner.step_sizes.grad.abs().max() > 0


def test_adapting_learns_and_more_steps_learn_more():
    learner = MetaLearner(tiny(), 0.05)
    support, query = split_task(data(30), 10, 20, generator=torch.Generator().manual_seed(0))
    before = copy.deepcopy(learner.model.state_dict())
    errors = [evaluate(learner.adapt(support, steps), query) for steps in (1, 5, 20)]
    assert errors[2] < errors[1] < errors[0] < evaluate(learner.model, query)
    for name, value in learner.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_meta_training_gives_a_better_start():
    g = torch.Generator().manual_seed(0)
    learner = MetaLearner(tiny(), 0.05, outer_lr=3e-3)
    families = [data(40, seed=s) for s in (1, 2)]
    support, query = split_task(data(30, seed=9), 10, 20, generator=g)
    before = evaluate(learner.adapt(support), query)
    losses = [
        learner.outer_step([split_task(f, 5, 10, generator=g) for f in families]) for _ in range(15)
    ]
    assert losses[-1] < losses[0]
    assert evaluate(learner.adapt(support), query) < 0.8 * before


def test_support_and_query_do_not_overlap_and_follow_the_generator():
    d = data(30)
    support, query = split_task(d, 10, 20, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([support.u_in, query.u_in]).flatten(1)
    assert len(torch.unique(rows, dim=0)) == 30
    again, _ = split_task(d, 10, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.u_in, support.u_in)
    with pytest.raises(ValueError, match="at most the 30 samples of data, got 11"):
        split_task(d, 11, 20)


def test_state_round_trips():
    a = MetaLearner(tiny(0), SymbolicStepSize(16))
    b = MetaLearner(tiny(1), SymbolicStepSize(16))
    b.load_state_dict(a.state_dict())
    support, _ = split_task(data(30), 10, 20)
    for p, q in zip(a.adapt(support).parameters(), b.adapt(support).parameters(), strict=True):
        assert torch.equal(p, q)
    sgd = MetaLearner(tiny(), "per-parameter")
    assert sgd.state_dict()["step_sizes"].numel() == sum(p.numel() for p in tiny().parameters())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"inner_steps": 0}, ValueError, "inner_steps must be at least 1, got 0"),
        ({"inner_lr": -0.1}, ValueError, "inner_lr must be finite, above 0"),
        ({"inner_lr": "per-tensor"}, TypeError, "'per-parameter' or a SymbolicStepSize"),
        ({"inner_lr": SymbolicStepSize(4)}, TypeError, "encode_symbols"),
        ({"inner": "bias"}, ValueError, "inner='bias' fits no parameter"),
        ({"langevin": -1.0}, ValueError, "langevin must be finite, at least 0"),
        ({"clamp": 0.0}, ValueError, "clamp must be finite, above 0"),
    ],
)
def test_settings_are_refused(change, error, words):
    with pytest.raises(error, match=words):
        MetaLearner(line(), **change)


def test_tasks_are_refused():
    learner = MetaLearner(line(), 0.1)
    good, empty = pair(1, 3), tuple(x[:0] for x in pair(1, 3))
    with pytest.raises(ValueError, match="at least one"):
        learner.outer_step([])
    with pytest.raises(ValueError, match="support of task 1 must hold at least one sample"):
        learner.outer_step([(good, good), (empty, good)])
    with pytest.raises(ValueError, match="support must hold at least one sample"):
        learner.adapt(empty)
    with pytest.raises(TypeError, match="task 0 must be a pair"):
        stacked(learner.model, [good[0]], torch.device("cpu"))
    with pytest.raises(ValueError, match="steps must be at least 1"):
        learner.adapt(good, 0)
    with pytest.raises(ValueError, match="input 0 must be finite"):
        learner.outer_step([(pair(math.nan, 1), good)])
    with pytest.raises(FloatingPointError, match="query loss of task 1 is"):
        MetaLearner(line(), 1e200).outer_step([(pair(1, 1), good), (pair(1, 3), good)])
    d = data()
    small = OperatorData(d.u_in[:, :, :4], d.t_in, d.u_out[:, :, :4], d.t_out, d.tokens)
    with pytest.raises(ValueError, match="8 points and 1 channels"):
        MetaLearner(tiny(), 0.1).outer_step([(small, small)])


def test_shared_weights_stay_shared():
    first, second = nn.Linear(2, 2).double(), nn.Linear(2, 2).double()
    second.weight = first.weight
    model = nn.Sequential(first, nn.Tanh(), second)
    x, y = torch.randn(3, 2).double(), torch.randn(3, 2).double()
    adapted = MetaLearner(model, 0.1, 1).adapt((x, y))
    assert adapted[0].weight is adapted[2].weight
    grad = torch.autograd.grad(mse(model(x), y), first.weight)[0]
    torch.testing.assert_close(adapted[0].weight, first.weight - 0.1 * grad)
