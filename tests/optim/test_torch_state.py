"""Saving, loading, hooks and copies, as PyTorch's own tests check them; see torch_table."""

import copy
import pickle

import pytest
import torch
from law_table import parameters, same
from torch import nn
from torch_internal import (
    TensorTracker,
    TestCase,
)
from torch_table import (
    SHAPES,
    every_class,
    every_setting,
    set_gradients,
)


@pytest.fixture
def case():
    return TestCase()


@every_setting
def test_state_dict_is_deterministic(cls, kwargs, case):
    """As torch checks it: a copy that loads the state tracks the original, tensor by tensor."""
    params, others = parameters(SHAPES), parameters(SHAPES)
    optimizer = cls(params, **copy.deepcopy(kwargs))
    for step in range(2):
        set_gradients(params, step)
        optimizer.step()
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            q.copy_(p)
    resumed = cls(others, **copy.deepcopy(kwargs))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    tracker = TensorTracker(assert_eq_kwargs={"rtol": 0, "atol": 0})
    for step in range(2, 5):
        set_gradients(params, step)
        set_gradients(others, step)
        optimizer.step()
        resumed.step()
        for p in params:
            tracker.add(p)
        for q in others:
            tracker.pop_check_set(q, case)
    assert tracker.all_popped()
    assert same(optimizer.state_dict(), resumed.state_dict())


@every_setting
def test_state_dict_shape(cls, kwargs):
    params = parameters(SHAPES)
    optimizer = cls(params, **copy.deepcopy(kwargs))
    set_gradients(params)
    optimizer.step()
    state = optimizer.state_dict()
    assert sorted(state) == ["param_groups", "state"]
    assert sorted(state["state"]) == [0, 1, 2]
    assert state["param_groups"][0]["params"] == [0, 1, 2]
    assert all(k in state["param_groups"][0] for k in kwargs)
    assert list(optimizer.state) == params  # keys are the parameters themselves
    assert all(isinstance(k, nn.Parameter) for k in optimizer.state)


@every_class
def test_load_and_save_hooks(cls):
    params = parameters(SHAPES)
    optimizer = cls(params)
    set_gradients(params)
    optimizer.step()
    calls = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("save"))

    def halve(o, state):
        calls.append("saved")
        for group in state["param_groups"]:
            group["lr"] /= 2
        return state

    optimizer.register_state_dict_post_hook(halve)
    lr = optimizer.param_groups[0]["lr"]
    state = optimizer.state_dict()
    assert state["param_groups"][0]["lr"] == lr / 2
    assert optimizer.param_groups[0]["lr"] == lr

    def load(o, given):
        calls.append("load")
        given["param_groups"] = copy.deepcopy(given["param_groups"])
        given["param_groups"][0]["lr"] = 0.125

    handle = optimizer.register_load_state_dict_pre_hook(load)
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("loaded"))
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.125
    handle.remove()
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == lr / 2
    assert calls == ["save", "saved", "load", "loaded", "loaded"]


@every_setting
def test_pickle_and_deepcopy(cls, kwargs):
    params = parameters(SHAPES)
    optimizer = cls(params, **copy.deepcopy(kwargs))
    set_gradients(params)
    optimizer.step()
    for twin in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):  # noqa: S301
        copies = twin.param_groups[0]["params"]
        assert not any(p is q for p, q in zip(params, copies, strict=True))
        assert list(twin.state) == copies
        assert same(list(params), list(copies))
        state, other = optimizer.state_dict()["state"], twin.state_dict()["state"]
        assert same(state, other)
