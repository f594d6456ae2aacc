import copy
import math
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stiefel.merge import TaskVector

SHAPES = {"a": (3, 4), "b": (5,), "c": (2, 1, 3)}


def state(seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(s, dtype=torch.float64, generator=g).to(dtype) for n, s in SHAPES.items()
    }


def flat(vector):
    return torch.cat([vector[name].flatten() for name in SHAPES])


def same(a, b):
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-12, atol=1e-12)


def test_by_hand():
    base = {"w": torch.tensor([[1.0, 2.0]]), "n": torch.tensor(3)}
    tuned = {"w": torch.tensor([[4.0, -2.0]]), "n": torch.tensor(7)}
    tau = TaskVector(base, tuned)
    assert tau["w"].tolist() == [[3, -4]]
    assert tau.norm() == 5
    assert tau.apply_to(base, 0.5)["w"].tolist() == [[2.5, 0]]
    assert tau.apply_to(base)["n"] == 3  # counters are the base's
    assert (-tau).apply_to(tuned)["w"].tolist() == [[1, 2]]
    assert tau.dot(-2 * tau) == -50
    assert tau.cosine(-tau) == -1
    assert len(tau) == 1
    assert "norm 5" in repr(tau)


seeds = st.integers(0, 10**6)


@settings(max_examples=30, deadline=None)
@given(seeds, st.floats(-3, 3))
def test_it_is_a_vector_space_with_an_inner_product(seed, alpha):
    base = state(seed)
    x, y, z = (TaskVector(base, state(seed + i)) for i in (1, 2, 3))
    u, v = flat(x), flat(y)
    torch.testing.assert_close(flat(x + y), u + v)
    torch.testing.assert_close(flat(x - y), u - v)
    torch.testing.assert_close(flat(alpha * x), alpha * u)
    same(x * alpha, alpha * x)
    same(-x, x * -1)
    same(x / 4, 0.25 * x)
    same(sum([x, y, z]), x + y + z)
    same(alpha * (x + y), alpha * x + alpha * y)
    assert x.dot(y) == pytest.approx(float(u @ v), abs=1e-10)
    assert x.dot(y) == y.dot(x)
    assert x.norm() == pytest.approx(float(u.norm()))
    assert x.cosine(y) == pytest.approx(float(u @ v / u.norm() / v.norm()), abs=1e-12)
    assert -1 <= x.cosine(x) <= 1
    # Both ways of merging, and the fine-tune itself.
    same((x + y).apply_to(base, alpha), y.apply_to(x.apply_to(base, alpha), alpha))
    same(x.apply_to(base), state(seed + 1))
    same(x.apply_to(base, 0), base)


def test_modules_are_read_and_left_alone():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    tuned = copy.deepcopy(base)
    tuned(torch.randn(8, 3))  # moves the running statistics
    with torch.no_grad():
        tuned[0].weight += 1
    before = copy.deepcopy(base.state_dict())
    tau = TaskVector(base, tuned)
    assert "1.num_batches_tracked" not in tau
    merged = tau.apply_to(base)
    same(base.state_dict(), before)
    base.load_state_dict(merged)
    torch.testing.assert_close(base[0].weight, tuned[0].weight)
    torch.testing.assert_close(base[1].running_mean, tuned[1].running_mean)
    assert base[1].num_batches_tracked == 0


def test_tied_tensors_count_once_and_stay_tied():
    def tied(seed):
        model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
        nn.init.normal_(model["embed"].weight, generator=torch.Generator().manual_seed(seed))
        model["head"].weight = model["embed"].weight
        return model

    base, tuned = tied(0), tied(1)
    tau = TaskVector(base, tuned)
    change = (tuned["embed"].weight - base["embed"].weight).detach()
    assert tau.norm() == pytest.approx(float(change.norm()), rel=1e-6)
    twice = 2 * tau + tau - (-tau)
    assert twice.norm() == pytest.approx(4 * float(change.norm()), rel=1e-6)
    assert twice.dot(tau) == pytest.approx(4 * float(change.norm()) ** 2, rel=1e-6)
    merged = tau.apply_to(base, 0.5)
    assert merged["embed.weight"] is merged["head.weight"]


class Buffered(Mapping):
    """Reads each tensor into the same memory."""

    def __init__(self, values):
        self.values_ = values
        self.buffer = torch.empty_like(next(iter(values.values())))

    def __getitem__(self, name):
        return self.buffer.copy_(self.values_[name])

    def __iter__(self):
        return iter(self.values_)

    def __len__(self):
        return len(self.values_)


def test_mappings_that_read_at_each_access():
    """Two tensors have one address there, one after the other: they are not one tensor."""
    start = {f"w{i}": torch.full((64,), float(i)) for i in range(5)}
    end = {f"w{i}": torch.full((64,), 3.0 * i) for i in range(5)}
    tau = TaskVector(Buffered(start), Buffered(end))
    for i in range(5):
        assert tau[f"w{i}"].tolist() == [2.0 * i] * 64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_precision(dtype):
    """Half types: the difference is exact in float32, and the way there and back too."""
    base, tuned = state(0, dtype), state(1, dtype)
    tau = TaskVector(base, tuned)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(delta.dtype == wide for delta in tau.deltas.values())
    back = tau.apply_to(base)
    for name in SHAPES:
        assert back[name].dtype == dtype
        torch.testing.assert_close(back[name], tuned[name])
        expected = (base[name].double() + 0.3 * (tuned[name].double() - base[name].double())).to(
            dtype
        )
        torch.testing.assert_close(tau.apply_to(base, 0.3)[name], expected)


def test_from_deltas():
    deltas = {"w": torch.ones(2, 2)}
    tau = TaskVector.from_deltas(deltas)
    assert tau["w"] is deltas["w"]
    assert tau.norm() == 2
    with pytest.raises(ValueError, match="at least one"):
        TaskVector.from_deltas({})
    with pytest.raises(TypeError, match=r"deltas\['w'\] must be real"):
        TaskVector.from_deltas({"w": torch.ones(2).int()})
    with pytest.raises(ValueError, match=r"deltas\['w'\] must be finite"):
        TaskVector.from_deltas({"w": torch.tensor([math.inf])})


def test_models_that_do_not_fit_are_named():
    base = state(0)
    with pytest.raises(ValueError, match="only base has a, c; only finetuned has x"):
        TaskVector(base, {"b": base["b"], "x": base["a"]})
    with pytest.raises(ValueError, match=r"b has shape \(5,\) in base and \(6,\) in finetuned"):
        TaskVector(base, {**base, "b": torch.zeros(6)})
    with pytest.raises(TypeError, match=r"b is torch.float64 in base and torch.int64 in"):
        TaskVector(base, {**base, "b": torch.zeros(5).long()})
    with pytest.raises(ValueError, match="the change of c must be finite"):
        TaskVector(base, {**base, "c": torch.full((2, 1, 3), math.nan)})
    with pytest.raises(ValueError, match="no floating-point tensor"):
        TaskVector({"n": torch.tensor(1)}, {"n": torch.tensor(2)})


def test_vectors_that_do_not_fit():
    base = state(0)
    tau = TaskVector(base, state(1))
    part = TaskVector.from_deltas({"a": tau["a"], "b": tau["b"]})
    for call in (lambda: tau + part, lambda: tau - part, lambda: tau.dot(part)):
        with pytest.raises(ValueError, match="only the first has c"):
            call()
    other = TaskVector.from_deltas({**tau.deltas, "b": torch.zeros(1, dtype=torch.float64)})
    for call in (lambda: tau + other, lambda: tau.dot(other)):
        with pytest.raises(ValueError, match=r"b has shape \(5,\) in one and \(1,\) in the other"):
            call()
    with pytest.raises(ValueError, match="base has no c, which the task vector changes"):
        tau.apply_to({n: base[n] for n in ("a", "b")})
    with pytest.raises(ValueError, match=r"b has shape \(1,\) in base and \(5,\) in the task"):
        tau.apply_to({**base, "b": torch.zeros(1)})
    with pytest.raises(ValueError, match="alpha must be finite, got nan"):
        tau.apply_to(base, math.nan)
    with pytest.raises(ValueError, match="the factor must be finite"):
        tau * math.inf
    with pytest.raises(ValueError, match="cosine of a task vector that is zero"):
        tau.cosine(tau - tau)
    part.apply_to(base)  # the rest of the base stays
    for call in (lambda: tau + 1, lambda: tau * tau, lambda: tau - 0):
        with pytest.raises(TypeError):
            call()
