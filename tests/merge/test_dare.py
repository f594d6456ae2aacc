import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.merge import dare, dare_mask, dare_rows, task_arithmetic, ties


def tensors(count, *shape, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=g, dtype=torch.float64)
    noise = [0.1 * torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(count)]
    return base.to(dtype), [(base + n).to(dtype) for n in noise]


@settings(max_examples=50, deadline=None)
@given(start=st.integers(0, 100), count=st.integers(0, 100), seed=st.integers(-5, 2**70))
def test_a_mask_is_a_window_on_one_stream(start, count, seed):
    whole = dare_mask(0, 200, 0.5, seed=seed, name="w", model=1)
    part = dare_mask(start, count, 0.5, seed=seed, name="w", model=1)
    assert torch.equal(part, whole[start : start + count])


def test_masks_have_their_density_and_differ():
    n = 40_000
    for density in (0.1, 0.5, 0.9):
        share = float(dare_mask(0, n, density, seed=0).float().mean())
        assert abs(share - density) < 4 * (density * (1 - density) / n) ** 0.5
    assert dare_mask(0, n, 1.0, seed=0).all()
    masks = [
        dare_mask(0, n, 0.5, seed=s, name=name, model=m)
        for s, name, m in ((0, "", 0), (1, "", 0), (0, "w", 0), (0, "", 1))
    ]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert abs(float((a == b).float().mean()) - 0.5) < 0.02
    # Neighbours are independent too.
    assert abs(float((masks[0][1:] == masks[0][:-1]).float().mean()) - 0.5) < 0.02


def test_masks_stay_the_same_for_good():
    """A merge can be repeated years later: these bits are part of the format."""
    bits = dare_mask(0, 32, 0.5, seed=42, name="model.layers.0.mlp.up_proj.weight", model=1)
    assert int("".join(str(int(b)) for b in bits), 2) == BITS


BITS = 0xC66EC5B1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("consensus", [None, "sum"])
@pytest.mark.parametrize("rescale", [True, False])
def test_it_is_its_formula(dtype, consensus, rescale):
    base, models = tensors(2, 31, 17, dtype=dtype)
    origin, total, divisor = base.double(), [], []
    weights, densities = [0.7, 1.5], [0.5, 0.8]
    for i, (model, w, density) in enumerate(zip(models, weights, densities, strict=True)):
        mask = dare_mask(0, base.numel(), density, seed=3, name="w", model=i).view(base.shape)
        total.append(w * (model.double() - origin) * mask / (density if rescale else 1))
        divisor.append(torch.full_like(origin, w))
    stacked = torch.stack(total)
    if consensus:
        elected = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
        stacked = stacked * (stacked.sign() == elected)
    expected = (origin + 0.3 * stacked.sum(0)).to(dtype)
    got = dare(
        {"w": base}, [{"w": m} for m in models], weights, density=densities, seed=3,
        consensus=consensus, rescale=rescale, scale=0.3,
    )["w"]  # fmt: skip
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {}
    torch.testing.assert_close(got, expected, **tolerance)
    assert torch.equal(
        got,
        dare(base, models, weights, density=densities, seed=3, consensus=consensus,
             rescale=rescale, scale=0.3, name="w"),
    )  # fmt: skip


@pytest.mark.parametrize("cut", [1, 3, 7])
def test_portions_of_rows_give_the_bits_of_the_whole(cut):
    base, models = tensors(2, 10, 13, dtype=torch.bfloat16)
    pieces = [
        dare_rows(
            base[i : i + cut], [m[i : i + cut] for m in models], [1, 1], [0.5, 0.5], seed=7,
            name="w", start=13 * i, consensus="sum",
        )
        for i in range(0, 10, cut)
    ]  # fmt: skip
    whole = dare(base, models, seed=7, name="w", consensus="sum")
    assert torch.equal(torch.cat(pieces), whole)


def test_limits():
    base, models = tensors(2, 12, 9)
    everything = {"density": 1.0, "scale": 0.5}
    assert torch.equal(dare(base, models, **everything), task_arithmetic(base, models, scale=0.5))
    assert torch.equal(
        dare(base, models, density=1.0, consensus="sum", normalize=True),
        ties(base, models, density=1.0),
    )


def test_the_mean_over_seeds_is_the_sum_of_changes():
    base, models = tensors(2, 20, 20, dtype=torch.float64)
    runs = torch.stack([dare(base, models, density=0.5, seed=s) for s in range(200)])
    expected = task_arithmetic(base, models)
    spread = runs.std(0) / 200**0.5
    assert float(((runs.mean(0) - expected).abs() / spread).mean()) < 1.2


def test_what_does_not_fit_is_named():
    base, models = tensors(1, 3, 3)
    with pytest.raises(ValueError, match="consensus must be"):
        dare(base, models, consensus="count")
    with pytest.raises(ValueError, match="density must be in"):
        dare(base, models, density=0)
    with pytest.raises(ValueError, match="models must not be empty"):
        dare(base, [])
