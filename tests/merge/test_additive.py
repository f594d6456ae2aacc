import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.merge import (
    linear,
    linear_rows,
    slerp,
    slerp_coefficients,
    slerp_moments,
    task_arithmetic,
    task_arithmetic_rows,
)
from stiefel.merge.arithmetic import BLOCK, all_finite

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SEEDS = st.integers(0, 2**31)


def tensors(count, *shape, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for _ in range(count)]


def reference_linear(models, weights, normalize=True):
    """mergekit 0.1.5: an accumulator in float32, one addcmul a model, one division."""
    dtype = torch.float64 if models[0].dtype == torch.float64 else torch.float32
    factors = torch.tensor(weights, dtype=dtype)
    total = torch.zeros_like(models[0], dtype=dtype)
    for model, factor in zip(models, factors, strict=True):
        total.addcmul_(model, factor)
    return (total / factors.sum() if normalize else total).to(models[0].dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
def test_linear_is_bit_equal_to_one_accumulation_in_float32(dtype, normalize):
    models = tensors(3, 130, 517, dtype=dtype)  # more than one block
    for weights in ([1.0, 1.0, 1.0], [0.3, 0.5, 0.7], [1.0, -0.25, 0.1]):
        expected = reference_linear(models, weights, normalize)
        got = linear(models, weights, normalize=normalize)
        assert got.dtype == dtype
        assert torch.equal(got, expected)


def test_linear_values():
    a, b = torch.tensor([0.0, 2.0]), torch.tensor([4.0, 6.0])
    assert linear([a, b]).tolist() == [2, 4]
    assert linear([a, b], [1, 3]).tolist() == [3, 5]
    assert linear([a, b], [1, 3], normalize=False).tolist() == [12, 20]


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 9), seed=SEEDS, cut=st.integers(1, 8))
def test_portions_of_rows_give_the_bits_of_the_whole(rows, seed, cut):
    base, *models = tensors(4, rows, 37, dtype=torch.bfloat16, seed=seed)
    weights = [0.4, 1.0, -0.3]
    for whole, part in (
        (linear(models, weights), lambda s: linear_rows([m[s] for m in models], weights)),
        (
            task_arithmetic(base, models, weights, scale=0.7, normalize=True),
            lambda s: task_arithmetic_rows(
                base[s], [m[s] for m in models], weights, scale=0.7, normalize=True
            ),
        ),
    ):
        pieces = [part(slice(i, i + cut)) for i in range(0, rows, cut)]
        assert torch.equal(torch.cat(pieces), whole)


def test_rows_go_where_they_are_told():
    a, b = tensors(2, 3, 5, dtype=torch.bfloat16)
    out = torch.zeros(3, 5)
    assert linear_rows([a, b], [1, 1], out=out) is out
    torch.testing.assert_close(out, (a.float() + b.float()) / 2, rtol=0, atol=0)
    again = a.clone()
    task_arithmetic_rows(again, [b], [1.0], out=again)  # in place of the base
    assert torch.equal(again, b)
    transposed = linear([a.T, b.T])
    assert torch.equal(transposed, linear([a, b]).T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_task_arithmetic_is_its_formula(dtype):
    base, *models = tensors(3, 7, 11, dtype=dtype)
    work = [m.double() - base.double() for m in models]
    expected = base.double() + 0.3 * (2 * work[0] - 0.5 * work[1])
    got = task_arithmetic(base, models, [2, -0.5], scale=0.3)
    torch.testing.assert_close(got, expected.to(dtype))
    mean = task_arithmetic(base, models, [2, -0.5], normalize=True).double()
    torch.testing.assert_close(
        mean.to(dtype), (base.double() + (2 * work[0] - 0.5 * work[1]) / 1.5).to(dtype)
    )


def test_task_arithmetic_undoes_and_repeats():
    base, model = tensors(2, 6, 4, dtype=torch.float64)
    torch.testing.assert_close(task_arithmetic(base, [model]), model)
    torch.testing.assert_close(task_arithmetic(base, [model, model], [1, -1]), base)
    # Weights that cancel are not divided by.
    assert torch.equal(task_arithmetic(base, [model, model], [1, -1], normalize=True), base)


def test_slerp_values():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    half = slerp(a, b, 0.5)
    torch.testing.assert_close(half, torch.tensor([math.sqrt(0.5), 2 * math.sqrt(0.5)]))
    assert torch.equal(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    third = slerp(a, b, 1 / 3)
    torch.testing.assert_close(third, torch.tensor([math.cos(math.pi / 6), 1.0]))


def test_slerp_takes_a_straight_line_where_there_is_no_angle():
    a = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(slerp(a, 3 * a, 0.25), 1.5 * a)
    torch.testing.assert_close(slerp(a, torch.zeros(2), 0.25), 0.75 * a)
    torch.testing.assert_close(slerp(a, -a, 0.25), 0.5 * a)
    near = a + torch.tensor([0.01, -0.01])
    torch.testing.assert_close(slerp(a, near, 0.5), (a + near) / 2)


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, t=st.floats(0, 1))
def test_slerp_stays_on_the_sphere(seed, t):
    a, b = tensors(2, 4, 5, dtype=torch.float64, seed=seed)
    a, b = a / a.norm(), b / b.norm()
    got = slerp(a, b, t)
    assert float(got.norm()) == pytest.approx(1, abs=1e-12)
    assert torch.equal(got, slerp(a, b, t))
    torch.testing.assert_close(slerp(b, a, 1 - t), got)


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_slerp_moments_do_not_depend_on_portions(cut):
    a, b = tensors(2, 11, 300, dtype=torch.bfloat16)
    pairs = [(a[i : i + cut], b[i : i + cut]) for i in range(0, 11, cut)]
    assert slerp_moments(pairs) == slerp_moments([(a, b)])
    x, y = a.double().flatten(), b.double().flatten()
    expected = [float(x @ x), float(y @ y), float(x @ y)]
    assert slerp_moments([(a, b)]) == pytest.approx(expected)
    factors = slerp_coefficients(0.3, slerp_moments(pairs))
    assert torch.equal(linear_rows([a, b], factors, normalize=False), slerp(a, b, 0.3))
    assert slerp_moments([]) == (0.0, 0.0, 0.0)


def test_state_dicts_are_merged_tensor_by_tensor():
    a, b = (
        {"w": w, "steps": torch.tensor(3), "flags": torch.tensor([True])} for w in tensors(2, 2, 3)
    )
    merged = linear([a, b], [1, 3])
    assert list(merged) == ["w", "steps", "flags"]
    assert torch.equal(merged["w"], linear([a["w"], b["w"]], [1, 3]))
    assert torch.equal(merged["steps"], a["steps"])
    assert merged["steps"] is not a["steps"]
    both = task_arithmetic(a, [b, b], scale=0.5)
    torch.testing.assert_close(both["w"], b["w"])
    torch.testing.assert_close(slerp(a, b, 1.0)["w"], b["w"])
    with pytest.raises(TypeError, match=r"'steps' is torch\.int64 and differs"):
        linear([a, {**b, "steps": torch.tensor(4)}])


def test_what_does_not_fit_is_named():
    a, b = tensors(2, 2, 3)
    with pytest.raises(ValueError, match="models must not be empty"):
        linear([])
    with pytest.raises(ValueError, match=r"models\[1\] has shape \(3, 2\), but models\[0\]"):
        linear([a, b.T])
    with pytest.raises(ValueError, match=r"models\[0\] has shape \(3, 2\), but base"):
        task_arithmetic(a, [b.T])
    broken = b.clone()
    broken[1, 2] = math.nan
    with pytest.raises(ValueError, match=r"models\[1\] of 'w' must be finite, but 1 of its 6"):
        linear([{"w": a}, {"w": broken}])
    with pytest.raises(ValueError, match=r"models\[1\] does not match models\[0\]: it lacks w and"):
        linear([{"w": a}, {"v": b}])
    with pytest.raises(TypeError, match="all tensors or all mappings"):
        linear([a, {"w": b}])
    with pytest.raises(TypeError, match=r"real floating point, got torch\.int64"):
        linear([a.long(), b.long()])
    with pytest.raises(ValueError, match="one entry a model, got 1 for 2"):
        linear([a, b], [1])
    with pytest.raises(ValueError, match="must not sum to zero"):
        linear([a, b], [1, -1])
    with pytest.raises(ValueError, match="weights must be finite"):
        linear([a, b], [1, math.inf])
    with pytest.raises(ValueError, match="scale must be finite"):
        task_arithmetic(a, [b], scale=math.nan)
    with pytest.raises(ValueError, match="t must be finite"):
        slerp(a, b, math.inf)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nothing_that_is_not_finite_is_overlooked(dtype, bad):
    x = torch.full((BLOCK + 3,), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(x)  # the largest number is one
    assert all_finite(x[:0])
    for place in (0, BLOCK, BLOCK + 2):
        y = x.clone()
        y[place] = bad
        assert not all_finite(y)


def test_inputs_are_not_modified_and_scalars_pass():
    base, *models = tensors(3, 3, 3)
    copies = [x.clone() for x in (base, *models)]
    task_arithmetic(base, models)
    linear(models)
    slerp(*models, 0.5)
    assert all(map(torch.equal, copies, (base, *models)))
    assert float(linear([torch.tensor(1.0), torch.tensor(3.0)])) == 2
    assert linear([torch.zeros(0, 3), torch.ones(0, 3)]).shape == (0, 3)
    assert float(task_arithmetic(torch.tensor(1.0), [torch.tensor(3.0)])) == 3
