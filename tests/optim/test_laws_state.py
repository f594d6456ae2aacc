"""Laws of saving and loading: a resumed run is the uninterrupted one, to the last bit."""

import copy
import io
import pickle

import pytest
import torch
from law_table import (
    ONE_EACH,
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

from stiefel.optim import RMNP, Muon


def by_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


CARRIERS = {
    "file": by_file,
    "deepcopy": copy.deepcopy,
    "pickle": lambda s: pickle.loads(pickle.dumps(s)),  # noqa: S301
}


DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@rows_with("dtype carrier", DTYPES, ("file", "pickle"))
def test_resumed_equals_uninterrupted(row, dtype, carrier):
    through, stopped, resumed = (row(model(dtype)) for _ in range(3))
    train(through, 5)
    train(stopped, 2)
    state = CARRIERS[carrier](stopped.state_dict())
    for p, q in zip(flat(resumed), flat(stopped), strict=True):
        p.data.copy_(q)
    resumed.load_state_dict(state)
    assert same(resumed.state_dict(), stopped.state_dict())
    train(resumed, 3, start=2)
    assert same(values(resumed), values(through))
    assert same(resumed.state_dict(), through.state_dict())


@every_row
def test_settings_travel(row):
    optimizer, other = row(model()), row(model(), lr=0.5, weight_decay=0.9)
    other.load_state_dict(by_file(optimizer.state_dict()))
    for a, b in zip(optimizer.param_groups, other.param_groups, strict=True):
        assert {k: v for k, v in a.items() if k != "params"} == {
            k: v for k, v in b.items() if k != "params"
        }


@rows_with("copier", ("deepcopy", "pickle"))
def test_a_copied_optimizer_goes_on_alike(row, copier):
    optimizer = row(model())
    train(optimizer, 2)
    twin = CARRIERS[copier](optimizer)
    assert same(values(optimizer), values(twin))
    assert same(optimizer.state_dict(), twin.state_dict())
    before = values(optimizer)
    train(twin, 2, start=2)
    assert same(before, values(optimizer))
    train(optimizer, 2, start=2)
    assert same(values(optimizer), values(twin))


@rows_with("old new", DTYPES, DTYPES)
def test_state_loads_onto_another_dtype(row, old, new):
    source, target = row(model(old)), row(model(new))
    train(source, 2)
    target.load_state_dict(by_file(source.state_dict()))
    for p, q in zip(flat(source), flat(target), strict=True):
        assert source.state[p].keys() == target.state[q].keys()
        for key, value in target.state[q].items():
            assert value.dtype == row.kept(key, source.state[p][key], new)
            assert torch.equal(value, source.state[p][key].to(value.dtype))
    train(target, 2, start=2)
    assert all(torch.isfinite(p).all() for p in flat(target))


@every_row
def test_statistics_of_bfloat16_parameters_are_not_rounded(row):
    source, target = row(model(torch.bfloat16)), row(model(torch.bfloat16))
    train(source, 3)
    target.load_state_dict(source.state_dict())
    rounded = False
    for p, q in zip(flat(source), flat(target), strict=True):
        for key in (*row.wide, *row.exact):
            if key in source.state[p]:
                value = source.state[p][key]
                assert same(value, target.state[q][key])
                assert value.data_ptr() != target.state[q][key].data_ptr()
                if key in row.wide:
                    rounded |= not torch.equal(value, value.bfloat16().float())
    assert rounded == bool(row.wide)


@every_row
def test_loading_does_not_touch_what_is_loaded(row):
    source, target = row(model()), row(model())
    train(source, 2)
    state = copy.deepcopy(source.state_dict())
    before = copy.deepcopy(state)
    target.load_state_dict(state)
    assert same(before, state)


@one_each
def test_hooks_see_and_change_what_is_loaded(row):
    source, target = row(model(torch.bfloat16)), row(model(torch.bfloat16))
    train(source, 2)

    def double(optimizer, state_dict):
        state = {
            i: {k: v * 2 if v.ndim else v for k, v in s.items()}
            for i, s in state_dict["state"].items()
        }
        return {**state_dict, "state": state}

    seen = []
    target.register_load_state_dict_pre_hook(double)
    target.register_load_state_dict_post_hook(
        lambda o: seen.append({k: v.clone() for k, v in o.state[flat(o)[0]].items()})
    )
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    expected = {k: v * 2 if v.ndim else v for k, v in source.state[flat(source)[0]].items()}
    assert same(target.state[flat(target)[0]], expected)
    assert same(seen, [expected])
    assert len(target._optimizer_load_state_dict_pre_hooks) == 1
    assert len(target._optimizer_load_state_dict_post_hooks) == 1


@pytest.mark.parametrize("row", [r for r in ONE_EACH if r.running_mean], ids=lambda row: row.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_run_of_torch_muon_goes_on(row, dtype):
    weights = parameters(((6, 4), (4, 6)), dtype)
    theirs = torch.optim.Muon(weights, lr=0.01, weight_decay=0.2, momentum=0.9)
    train(theirs, 2)
    own = row([p.detach().clone().requires_grad_() for p in weights], lr=0.5)
    own.load_state_dict(by_file(theirs.state_dict()))
    group = own.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["rule"]) == (0.01, 0.2, "matrix")
    assert group["nonfinite"] == "raise"
    for p, q in zip(weights, flat(own), strict=True):
        momentum = theirs.state[p]["momentum_buffer"]
        assert same(momentum, own.state[q]["momentum_buffer"])
    train(own, 2, start=2)
    assert all(torch.isfinite(p).all() for p in flat(own))


def test_a_run_of_torch_muon_goes_on_as_there():
    """float32 products and Jordan's triple: the same method, so the same trajectory."""
    weights = parameters(((6, 4), (4, 6)), torch.float32)
    theirs = torch.optim.Muon(weights, lr=0.01, weight_decay=0.2, momentum=0.9)
    train(theirs, 2)
    own = Muon(
        [p.detach().clone().requires_grad_() for p in weights],
        ns="classic",
        ns_dtype=torch.float32,
    )
    own.load_state_dict(copy.deepcopy(theirs.state_dict()))
    start = values(own)
    train(theirs, 3, start=2)
    train(own, 3, start=2)
    for p, q, old in zip(weights, flat(own), start, strict=True):
        assert (p - q).norm() < 0.02 * (q - old).norm()  # theirs multiplies in bfloat16


@one_each
def test_a_run_of_torch_adamw_goes_on(row):
    vectors = parameters(((4,), (3, 7)))
    theirs = torch.optim.AdamW(vectors, lr=0.01, betas=(0.8, 0.9), weight_decay=0.1, fused=True)
    train(theirs, 2)
    with pytest.warns(UserWarning, match="no parameter is updated by the matrix rule"):
        own = row(
            [
                {
                    "params": [p.detach().clone().requires_grad_() for p in vectors],
                    "rule": "elementwise",
                }
            ]
        )
    own.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert own.param_groups[0]["rule"] == "elementwise"
    train(theirs, 2, start=2)
    train(own, 2, start=2)
    assert same(values(own), values(theirs))


@one_each
def test_a_state_that_maximizes_is_refused(row):
    theirs = torch.optim.SGD(parameters(), maximize=True)
    own = row(parameters())
    before = everything(own)
    with pytest.raises(ValueError, match="maximize"):
        own.load_state_dict(theirs.state_dict())
    assert same(before, everything(own))


@one_each
def test_groups_of_other_sizes_are_refused(row):
    own = row(model())
    train(own, 1)
    before = everything(own)
    for other in (
        row(parameters()),
        row([*model()[:1], {"params": [noise((4,), 0)], "rule": "elementwise"}]),
    ):
        with pytest.raises(ValueError, match="loaded state dict"):
            own.load_state_dict(other.state_dict())
    assert same(before, everything(own))
    assert len(own._optimizer_load_state_dict_pre_hooks) == 0


@every_row
def test_state_is_momentum_and_what_the_method_says(row):
    optimizer = row(parameters(((6, 4), (4, 6))))
    train(optimizer, 1)
    for p in flat(optimizer):
        assert set(optimizer.state[p]) == {row.first, *row.extra}
        if row.per_neuron:
            assert all(optimizer.state[p][key].shape == (p.shape[0],) for key in row.extra)


def test_state_of_rmnp_is_half_of_adamw():
    own, theirs = (
        RMNP(parameters(dtype=torch.float32)),
        torch.optim.AdamW(parameters(dtype=torch.float32)),
    )
    sizes = []
    for optimizer in (own, theirs):
        set_gradients(flat(optimizer), 0)
        optimizer.step()
        sizes.append(sum(v.numel() for s in optimizer.state.values() for v in s.values() if v.ndim))
    assert 2 * sizes[0] == sizes[1]


@one_each
def test_untouched_state_stays_equal_without_a_step(row):
    optimizer = row(model())
    train(optimizer, 2)
    before = everything(optimizer)
    optimizer.state_dict()
    repr(optimizer)
    assert same(before, everything(optimizer))
    assert_all_close(values(optimizer), [e[0] for e in before if isinstance(e, tuple)])
