import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.merge import Cut, MagnitudeCounter, ties, ties_rows, ties_threshold

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def tensors(count, *shape, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=g, dtype=torch.float64)
    noise = [0.02 * torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(count)]
    return base.to(dtype), [(base + n).to(dtype) for n in noise]


def reference(base, models, weights, densities, *, normalize=True, scale=1.0):
    """The recipe step by step, with a stable sort: mergekit's, in float32."""
    work = torch.float64 if base.dtype == torch.float64 else torch.float32
    origin, deltas = base.to(work), []
    for model, density in zip(models, densities, strict=True):
        delta = model.to(work) - origin
        k = max(1, int(density * delta.numel()))
        order = delta.abs().flatten().argsort(descending=True, stable=True)
        mask = torch.zeros(delta.numel(), dtype=work)
        mask[order[:k]] = 1
        deltas.append(delta * mask.view_as(delta))
    factors = torch.tensor(weights, dtype=work).view(-1, *[1] * base.ndim)
    weighted = torch.stack(deltas) * factors
    elected = (weighted.sum(0) >= 0).to(work) * 2 - 1
    agree = weighted.sign() == elected
    mixed, divisor = (weighted * agree).sum(0), (factors * agree).sum(0)
    divisor[divisor == 0] = 1
    if normalize:
        mixed = mixed / divisor
    return (origin + scale * mixed).to(base.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 0.3, 0.7], [1.0, -0.5, 0.2]])
def test_equal_to_a_computation_in_float32(dtype, normalize, weights):
    base, models = tensors(3, 90, 401, dtype=dtype)  # half types: many equal magnitudes
    for densities in ([0.2, 0.3, 1.0], [0.001, 0.9, 0.5]):
        expected = reference(base, models, weights, densities, normalize=normalize, scale=0.5)
        got = ties(base, models, weights, density=densities, normalize=normalize, scale=0.5)
        assert torch.equal(got, expected)


def test_values():
    base = torch.zeros(6)
    a = torch.tensor([3.0, -2.0, 0.1, 4.0, 0.0, 1.0])
    b = torch.tensor([-1.0, -4.0, 5.0, -4.0, 0.2, 0.0])
    # Kept: a: 3, -2, 4 · b: -4, 5, -4. Signs: + - + (0 → +) + +.
    got = ties(base, [a, b], density=0.5)
    assert got.tolist() == [3, -3, 5, 4, 0, 0]
    summed = ties(base, [a, b], density=0.5, normalize=False)
    assert summed.tolist() == [3, -6, 5, 4, 0, 0]
    weighted = ties(base, [a, b], [1, 3], density=0.5)
    assert weighted.tolist() == pytest.approx([3, -14 / 4, 5, -4, 0, 0])


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 8), cut=st.integers(1, 8), seed=st.integers(0, 2**31),
    density=st.floats(0.01, 1), levels=st.integers(1, 6),
)  # fmt: skip
def test_portions_of_rows_give_the_bits_of_the_whole(rows, cut, seed, density, levels):
    """With few distinct magnitudes, so that the limit is hit by many entries."""
    g = torch.Generator().manual_seed(seed)
    base = torch.zeros(rows, 13)
    models = [torch.randint(-levels, levels + 1, (rows, 13), generator=g).float() for _ in range(2)]
    parts = [slice(i, i + cut) for i in range(0, rows, cut)]
    cuts = [ties_threshold(lambda m=m: [(m[s], base[s]) for s in parts], density) for m in models]
    pieces = [ties_rows(base[s], [m[s] for m in models], cuts, [1.0, 0.5]) for s in parts]
    whole = ties(base, models, [1.0, 0.5], density=density)
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(whole, reference(base, models, [1.0, 0.5], [density, density]))


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40),
    share=st.floats(0.01, 1), wide=st.booleans(),
)  # fmt: skip
def test_counting_finds_the_kth_largest(values, share, wide):
    x = torch.tensor(values, dtype=torch.float64 if wide else torch.float32)
    k = max(1, int(share * len(values)))
    counter = MagnitudeCounter(x.dtype)
    for _ in range(counter.passes):
        counter.count(x[: len(x) // 2])
        counter.count(x[len(x) // 2 :], torch.zeros(len(x) - len(x) // 2))
        counter.narrow(k)
    cut = counter.cut()
    limit = float(x.abs().sort(descending=True).values[k - 1])
    assert cut.value == limit
    kept = Cut(cut.value, cut.at_limit).keep_(x.clone())
    if limit > 0:
        assert int((kept != 0).sum()) == k
    assert torch.equal(kept[kept != 0], x[kept != 0])


def test_histograms_of_parts_add_up():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    parts = [MagnitudeCounter() for _ in range(2)]
    for _ in range(parts[0].passes):
        for counter, half in zip(parts, x.chunk(2), strict=True):
            counter.count(half)
        total = parts[0].histogram + parts[1].histogram
        for counter in parts:
            counter.histogram.copy_(total)
            counter.narrow(100)
    assert parts[0].cut().value == float(x.abs().sort().values[-100])


def test_the_counter_checks_its_use():
    counter = MagnitudeCounter()
    with pytest.raises(ValueError, match="2 passes are needed, 0 were made"):
        counter.cut()
    counter.count(torch.ones(3))
    with pytest.raises(ValueError, match=r"k must be in 1\.\.3"):
        counter.narrow(4)
    with pytest.raises(TypeError, match="float32 or float64"):
        MagnitudeCounter(torch.bfloat16)


def test_one_limit_for_the_whole_model():
    base = {"a": torch.zeros(4), "b": torch.zeros(2, 2), "steps": torch.tensor(1)}
    model = {
        "a": torch.tensor([1.0, 2.0, 3.0, 4.0]),
        "b": torch.tensor([[10.0, 20.0], [30.0, 5.0]]),
        "steps": torch.tensor(1),
    }
    by_tensor = ties(base, [model], density=0.5)
    assert by_tensor["a"].tolist() == [0, 0, 3, 4]
    assert by_tensor["b"].tolist() == [[0, 20], [30, 0]]
    whole = ties(base, [model], density=0.5, threshold="model")
    assert whole["a"].tolist() == [0, 0, 0, 0]
    assert whole["b"].tolist() == [[10, 20], [30, 5]]
    flat_base, flat = torch.zeros(8), torch.cat([model["a"], model["b"].flatten()])
    together = ties(flat_base, [flat], density=0.5)
    assert torch.equal(together, torch.cat([whole["a"], whole["b"].flatten()]))


def test_identities():
    base, (model, other) = tensors(2, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(ties(base, [model], density=1.0), model)
    torch.testing.assert_close(ties(base, [model, model], density=1.0), model)
    assert torch.equal(
        ties(base, [model, other], density=0.3), ties(base, [other, model], density=0.3)
    )
    assert torch.equal(ties(base, [base, base]), base)
    mirrored = 2 * base - model
    # Opposite changes: + is elected on a tie, so the result is never below the base.
    assert bool((ties(base, [model, mirrored], density=1.0) >= base - 1e-12).all())


def test_what_does_not_fit_is_named():
    base, models = tensors(2, 3, 3)
    for density in (0, 1.5, -1):
        with pytest.raises(ValueError, match=r"density must be in \(0, 1\]"):
            ties(base, models, density=density)
    with pytest.raises(ValueError, match="a number or one a model"):
        ties(base, models, density=[0.5])
    with pytest.raises(ValueError, match="threshold must be"):
        ties(base, models, threshold="global")
    with pytest.raises(ValueError, match=r"models\[0\] must be finite"):
        ties(base, [base / 0, base])
    with pytest.raises(ValueError, match="does not match base"):
        ties({"a": base}, [{"b": base}], threshold="model")
    with pytest.raises(ValueError, match="scale must be finite"):
        ties(base, models, scale=math.inf)
    assert ties(torch.zeros(0), [torch.zeros(0)]).shape == (0,)
    assert ties_threshold(lambda: [(models[0], base)], 1.0) is None
