"""What PyTorch's own tests ask of every optimizer, run on ours and on torch.optim.AdamW alike.

Cases, error inputs and helpers come from ``torch.testing._internal``; the bodies follow what
PyTorch's optimizer tests check, written once for all classes.
"""

import copy
import weakref

import hypothesis
import pytest
import torch
from law_table import noise, parameters, same
from torch import nn
from torch.optim import lr_scheduler
from torch_internal import (
    OptimizerErrorEnum,
)
from torch_table import (
    ADAMW,
    CLASSES,
    OURS,
    SETTINGS,
    SHAPES,
    every_class,
    every_setting,
    set_gradients,
)


def test_importing_the_helpers_changes_nothing_else():
    """They load a profile of ten examples and freeze the backends' flags."""
    assert hypothesis.settings.get_current_profile_name() in ("default", "ci")
    assert hypothesis.settings().max_examples == 100
    torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark


def test_the_table_is_that_of_torch():
    """The settings above name real arguments of AdamW too; a torch without them would be news."""
    assert ADAMW.supports_param_groups
    assert len(SETTINGS) >= 4 * len(CLASSES)


@pytest.mark.parametrize(
    ("cls", "bad"),
    [
        pytest.param(each.optim_cls, bad, id=f"{each.name}-{bad.optimizer_error_input.desc}")
        for each in OURS
        for bad in each.optim_error_inputs_func("cpu", torch.float32)
    ],
)
def test_errors_of_torch(cls, bad):
    assert bad.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    given = bad.optimizer_error_input
    params = parameters(SHAPES) if given.params is None else given.params
    if issubclass(bad.error_type, Warning):
        with pytest.warns(bad.error_type, match=bad.error_regex):
            cls(params, **given.kwargs)
    else:
        with pytest.raises(bad.error_type, match=bad.error_regex):
            cls(params, **given.kwargs)


@every_class
def test_other_refusals(cls):
    with pytest.raises(ValueError, match="empty parameter list"):
        cls([])
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        cls(["weight"])
    leaf = parameters(SHAPES)[0]
    with pytest.raises(ValueError, match="non-leaf Tensor"):
        cls([leaf * 2])


@every_setting
def test_it_goes_down(cls, kwargs):
    """A linear least-squares problem, as PyTorch's for-loop test, from generators of parameters."""
    weight = nn.Parameter(noise((10, 5), 0))
    x, y = noise((5,), 1), noise((10,), 2)
    optimizer = cls((p for p in [weight]), **copy.deepcopy(kwargs))

    def closure():
        optimizer.zero_grad()
        loss = (weight.mv(x) - y).pow(2).sum()
        loss.backward()
        return loss.detach()

    first = closure().item()
    for _ in range(20):
        optimizer.step(closure)
    assert closure().item() < first


@pytest.mark.parametrize(
    ("cls", "makers"),
    [
        pytest.param(each.optim_cls, makers, id=f"{each.name}-{i}")
        for each in [*OURS, ADAMW]
        for i, makers in enumerate(OURS[0].scheduler_inputs)
    ],
)
def test_it_goes_down_with_schedulers(cls, makers):
    weight = nn.Parameter(noise((10, 5), 0))
    x, y = noise((5,), 1), noise((10,), 2)
    optimizer = cls([weight], lr=0.01)
    schedulers = [make(optimizer) for make in makers]
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (weight.mv(x) - y).pow(2).sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        for scheduler in schedulers:
            if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                scheduler.step(losses[-1])
            else:
                scheduler.step()
    assert losses[-1] < losses[0]


@every_class
def test_hooks_of_a_step(cls):
    params = parameters(SHAPES)
    optimizer = cls(params)
    seen = []
    before = optimizer.register_step_pre_hook(lambda o, a, k: seen.append(params[0].clone()))
    after = optimizer.register_step_post_hook(lambda o, a, k: seen.append(params[0].clone()))
    set_gradients(params)
    optimizer.step()
    assert len(seen) == 2
    assert not torch.equal(*seen)
    assert torch.equal(seen[1], params[0])
    before.remove()
    after.remove()
    optimizer.step()
    assert len(seen) == 2


@every_class
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(cls, set_to_none):
    params = parameters(SHAPES)
    optimizer = cls(params)
    set_gradients(params[:2])
    optimizer.zero_grad(set_to_none=set_to_none)
    assert params[2].grad is None
    for p in params[:2]:
        assert p.grad is None if set_to_none else not p.grad.any()
    before = [p.detach().clone() for p in params]
    optimizer.step()
    if set_to_none:
        assert same(before, [p.detach() for p in params])
        assert not optimizer.state


@every_class
def test_groups(cls):
    """Settings of a group win over the constructor's; parameters of no group stay."""
    a, b, c = parameters(SHAPES)
    optimizer = cls([{"params": [a], "lr": 0.0}, {"params": b}], lr=0.25, weight_decay=0.0)
    assert [g["lr"] for g in optimizer.param_groups] == [0.0, 0.25]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0, 0.0]
    old = [p.detach().clone() for p in (a, b, c)]
    set_gradients([a, b, c])
    optimizer.step()
    assert torch.equal(a, old[0])
    assert not torch.equal(b, old[1])
    assert torch.equal(c, old[2])
    optimizer.add_param_group({"params": [c], "lr": 0.5})
    optimizer.step()
    assert not torch.equal(c, old[2])
    assert len(optimizer.param_groups) == 3
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [c]})


@every_class
def test_default_group_options_do_not_leak(cls):
    a, b, _ = parameters(SHAPES)
    optimizer = cls([{"params": [a]}, {"params": [b]}], lr=0.1)
    optimizer.param_groups[0]["lr"] = 5.0
    assert optimizer.param_groups[1]["lr"] == 0.1
    assert optimizer.defaults["lr"] == 0.1


@every_class
def test_named_parameters(cls):
    net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False))
    optimizer = cls(net.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "1.weight"]
    assert optimizer.param_groups[0]["params"] == list(net.parameters())
    state = optimizer.state_dict()
    assert state["param_groups"][0]["param_names"] == ["0.weight", "1.weight"]
    plain = cls(net.parameters())
    plain.load_state_dict(state)
    assert plain.param_groups[0]["param_names"] == ["0.weight", "1.weight"]
    optimizer.load_state_dict(cls(net.parameters()).state_dict())
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "1.weight"]


@every_class
def test_repr(cls):
    optimizer = cls(parameters(SHAPES), lr=0.125)
    text = repr(optimizer)
    assert text.startswith(f"{cls.__name__} (\nParameter Group 0\n")
    assert "lr: 0.125" in text


@every_class
def test_steps_without_gradients(cls):
    params = parameters(SHAPES)
    optimizer = cls(params)
    before = [p.detach().clone() for p in params]
    assert optimizer.step() is None
    assert optimizer.step(lambda: 3.5) == 3.5
    assert same(before, [p.detach() for p in params])


@every_class
def test_no_grad_mode_and_versions(cls):
    """A step is not recorded by autograd and bumps versions, so that stale graphs are refused."""
    weight = parameters(SHAPES)[0]
    optimizer = cls([weight])
    out = (weight * weight).sum()
    set_gradients([weight])
    version = weight._version
    optimizer.step()
    assert weight._version > version
    assert weight.is_leaf
    assert weight.requires_grad
    assert all(not v.requires_grad for v in optimizer.state[weight].values())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@every_class
def test_parameters_are_freed(cls):
    params = parameters(SHAPES)
    optimizer = cls(params)
    set_gradients(params)
    optimizer.step()
    reference = weakref.ref(params[0])
    optimizer.param_groups[0]["params"] = params[1:]
    del optimizer.state[params[0]]
    del params
    set_gradients(optimizer.param_groups[0]["params"], 1)
    optimizer.step()
    assert reference() is None


@every_class
def test_a_tensor_rate_is_read_at_every_step(cls):
    params, others = parameters(SHAPES), parameters(SHAPES)
    lr = torch.tensor(0.5, dtype=torch.float64)
    tensor, number = cls(params, lr=lr), cls(others, lr=0.5)
    for step, rate in enumerate((0.5, 0.25, 0.0)):
        lr.fill_(rate)
        number.param_groups[0]["lr"] = rate
        set_gradients(params, step)
        set_gradients(others, step)
        tensor.step()
        number.step()
    torch.testing.assert_close(params, others, rtol=1e-12, atol=1e-12)


@every_class
def test_shared_gradients_and_repeated_steps(cls):
    """The same gradient tensor on two parameters of one shape: read, never written."""
    a, b = parameters(((4, 3), (4, 3)))
    b.data.copy_(a)
    a.grad = b.grad = noise((4, 3), 9)
    grad = a.grad.clone()
    optimizer = cls([a, b])
    for _ in range(3):
        optimizer.step()
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert torch.equal(a.grad, grad)


@every_class
def test_subclassed_tensors_and_requires_grad(cls):
    """Plain tensors that require gradients are parameters too; frozen ones are left alone."""
    plain = noise((4, 3), 0).requires_grad_()
    frozen = noise((4, 3), 1)
    old = frozen.clone()
    optimizer = cls([plain, frozen])
    (plain * frozen).sum().backward()
    before = plain.detach().clone()
    optimizer.step()
    assert not torch.equal(plain, before)
    assert torch.equal(frozen, old)
    assert frozen not in optimizer.state


@pytest.mark.parametrize("each", OURS, ids=lambda each: each.name)
def test_complex_parameters_are_refused(each):
    """AdamW takes them as pairs of reals; a row norm or polar factor would mean something else."""
    assert not each.supports_complex
    weight = nn.Parameter(torch.ones(2, 3, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"must be real floating point, got torch\.complex64"):
        each.optim_cls([weight])
