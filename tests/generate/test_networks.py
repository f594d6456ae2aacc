import pytest
import torch

from stiefel.generate import RetrievalDenoiser, RetrievalUNet, alpha_bars, ddim_grid, ddim_scheduler
from stiefel.generate.attention import CrossAttention
from stiefel.generate.schedules import Grid


def build(kind, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    if kind == "mlp":
        network = RetrievalDenoiser(20, 6, width=16, blocks=2, inner=8, heads=2, generator=g)
    else:
        network = RetrievalUNet((3, 8, 12), 6, width=8, inner=8, heads=2, generator=g)
    # Nothing is zero any more, so that every path shows.
    with torch.no_grad():
        for p in network.parameters():
            p += 0.1 * torch.randn(p.shape, generator=g)
    return network.to(dtype)


def batch(kind, b=5, k=3, dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    shape = (20,) if kind == "mlp" else (3, 8, 12)
    x = torch.randn(b, *shape, generator=g, dtype=dtype)
    context = torch.randn(b, k, 6, generator=g, dtype=dtype)
    return x, torch.tensor([0, 3, 500, 998, 999])[:b], context


def test_sizes_are_those_of_the_sheet():
    for (w, blocks, inner), parameters in {
        (96, 3, 48): 201_720, (48, 2, 32): 51_432, (32, 2, 32): 32_632,
    }.items():  # fmt: skip
        network = RetrievalDenoiser(64, 24, width=w, blocks=blocks, inner=inner)
        assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.parametrize("kind", ["mlp", "unet"])
def test_order_and_repetition_of_neighbours_do_not_matter(kind):
    network, (x, t, context) = build(kind), batch(kind)
    out = network(x, t, context)
    assert out.shape == x.shape
    torch.testing.assert_close(network(x, t, context[:, [2, 0, 1]]), out, rtol=0, atol=1e-12)
    torch.testing.assert_close(network(x, t, context.repeat(1, 3, 1)), out, rtol=0, atol=1e-12)
    assert (network(x, t, context + 0.1) - out).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["mlp", "unet"])
def test_mask_equals_fewer_neighbours(kind):
    network, (x, t, context) = build(kind), batch(kind)
    mask = torch.tensor([[True, False, True]] * 5)
    out = network(x, t, context, mask)
    torch.testing.assert_close(network(x, t, context[:, ::2]), out, rtol=0, atol=1e-12)
    padded = context.clone()
    padded[:, 1] = 1e3
    torch.testing.assert_close(network(x, t, padded, mask), out, rtol=0, atol=1e-12)
    zeros = context.clone()
    zeros[:, 1] = 0  # zeros are a context of their own, not the absence of one
    assert (network(x, t, zeros) - out).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["mlp", "unet"])
def test_the_null_branch_equals_null_rows(kind):
    network, (x, t, context) = build(kind), batch(kind)
    plain = network(x, t, network.null_context(5, 4))
    modulations = network.modulations(t)
    from stiefel.generate.attention import Condition

    cheap = Condition((), 0, None, network.null_outputs(network.null))
    torch.testing.assert_close(network.run(x, modulations, cheap), plain, rtol=0, atol=1e-12)
    both = network.condition(context, null=network.null)
    doubled = tuple(torch.cat([m, m]) for m in modulations)
    out = network.run(torch.cat([x, x]), doubled, both)
    expected = torch.cat([network(x, t, context), plain])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["mlp", "unet"])
def test_one_time_step_serves_the_batch(kind):
    network, (x, _, context) = build(kind), batch(kind)
    out = network(x, torch.tensor([7]), context)
    torch.testing.assert_close(network(x, torch.full((5,), 7), context), out, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["mlp", "unet"])
def test_every_parameter_gets_a_gradient(kind):
    network, (x, t, context) = build(kind), batch(kind)
    context = torch.where(torch.tensor([True] + [False] * 4)[:, None, None], network.null, context)
    network(x, t, context).square().sum().backward()
    for name, p in network.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name


def test_gradients_are_exact():
    g = torch.Generator().manual_seed(2)
    attention = CrossAttention(4, 3, 4, 2).double()
    for n in (1, 2):
        h = torch.randn(2, n, 4, generator=g, dtype=torch.float64, requires_grad=True)
        context = torch.randn(2, 3, 3, generator=g, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda h, c: attention(h, *attention.pair(c)), (h, context))


def test_attention_is_that_of_the_formula():
    """Against a loop over heads and tokens, for one token and for several."""
    g = torch.Generator().manual_seed(3)
    attention = CrossAttention(5, 3, 6, 2).double()
    h = torch.randn(2, 4, 5, generator=g, dtype=torch.float64)
    context = torch.randn(2, 3, 3, generator=g, dtype=torch.float64)
    keys, values = context @ attention.key.weight.mT, context @ attention.value.weight.mT
    expected = torch.empty(2, 4, 6, dtype=torch.float64)
    for b in range(2):
        for token in range(4):
            q = attention.query.weight @ h[b, token]
            for head in range(2):
                part = slice(3 * head, 3 * head + 3)
                weights = (keys[b, :, part] @ q[part] / 3**0.5).softmax(0)
                expected[b, token, part] = weights @ values[b, :, part]
    expected = expected @ attention.out.weight.mT + attention.out.bias
    torch.testing.assert_close(attention(h, *attention.pair(context)), expected)
    torch.testing.assert_close(attention(h[:, :1], *attention.pair(context)), expected[:, :1])


def test_zero_context_gives_the_bias():
    network = build("mlp")
    attention = network.attentions[0]
    out = attention(torch.randn(2, 1, 16).double(), *attention.pair(torch.zeros(2, 3, 6).double()))
    assert torch.equal(out, attention.out.bias.expand(2, 1, 16))
    assert torch.equal(network.null_outputs(torch.zeros(6).double())[0], attention.out.bias)


@pytest.mark.parametrize("kind", ["mlp", "unet"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(kind, dtype):
    x, t, context = batch(kind)
    out = build(kind, dtype)(x.to(dtype), t, context.to(dtype)).detach()
    assert out.dtype == dtype
    exact = build(kind)(x, t, context).detach()
    # The time code is exact in every precision, so that the error is that of the layers.
    limit = 1e-4 if dtype == torch.float32 else 0.2
    assert float((out - exact).norm() / exact.norm()) < limit


def test_generator_alone_decides_the_weights():
    torch.manual_seed(3)
    a = RetrievalDenoiser(8, 4, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(4)
    b = RetrievalDenoiser(8, 4, generator=torch.Generator().manual_seed(1))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert 0.2 < float(a.null.detach().std()) < 1.2
    out = b(torch.randn(3, 8), torch.tensor([1]), torch.randn(3, 2, 4))
    assert torch.equal(out, torch.zeros(3, 8))  # starts at zero


def test_bad_networks_and_batches_are_named():
    with pytest.raises(ValueError, match="inner=9 must be a multiple of heads=4"):
        RetrievalDenoiser(8, 4, inner=9)
    with pytest.raises(ValueError, match="must be multiples of 4"):
        RetrievalUNet((3, 10, 8), 4)
    with pytest.raises(ValueError, match=r"shape must be \(C, H, W\)"):
        RetrievalUNet((8, 8), 4)
    with pytest.raises(ValueError, match="at least one level"):
        RetrievalUNet((1, 8, 8), 4, multipliers=())
    with pytest.raises(ValueError, match="width must be at least 1"):
        RetrievalDenoiser(8, 4, width=0)
    network, (x, t, context) = build("mlp"), batch("mlp")
    with pytest.raises(ValueError, match=r"x must be \[B, 20\]"):
        network(x[:, :5], t, context)
    with pytest.raises(ValueError, match=r"t must be \[5\] or \[1\]"):
        network(x, t[:2], context)
    with pytest.raises(ValueError, match="context must be"):
        network(x, t, context[..., :2])
    with pytest.raises(ValueError, match="context must be of 5 images"):
        network(x, t, context[:2])
    with pytest.raises(ValueError, match="mask must be bool"):
        network(x, t, context, torch.ones(5, 3))
    mask = torch.ones(5, 3, dtype=torch.bool)
    mask[2] = False
    with pytest.raises(ValueError, match="without a neighbour"):
        network(x, t, context, mask)


def test_schedules_of_the_sheet():
    cosine = alpha_bars("cosine")
    expected = [0.999958716, 0.999912576, 0.845887986, 0.492285172, 0.143178646, 2.42876691e-06]
    assert cosine[[0, 1, 250, 500, 750, 998]].tolist() == pytest.approx(expected, rel=5e-9)
    assert float(1 - cosine[0]) == pytest.approx(4.12842248e-05, rel=5e-9)
    assert float(1 - cosine[999] / cosine[998]) == pytest.approx(0.999, rel=1e-12)
    ldm = alpha_bars("ldm")
    expected = [0.9985, 0.996994427, 0.508424330, 0.114922001, 0.00833413595, 0.000142303975]
    assert ldm[[0, 1, 250, 500, 750, 999]].tolist() == pytest.approx(expected, rel=5e-9)


def test_schedules_are_those_of_diffusers_in_float64():
    from diffusers import DDIMScheduler

    for ours, options in (
        ("cosine", {"beta_schedule": "squaredcos_cap_v2"}),
        ("ldm", {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}),
    ):
        theirs = DDIMScheduler(**options).alphas_cumprod.double()
        exact = alpha_bars(ours)
        error = ((theirs - exact) / exact).abs().max()
        assert error < 1e-3
        if ours == "cosine":  # why ᾱ is computed here
            assert error > 1e-6
            assert abs(float((1 - theirs[0]) / (1 - exact[0])) - 1) > 1e-4


def test_ddim_grids():
    ldm = alpha_bars("ldm")
    grid = ddim_grid(ldm, 4, "ldm")
    assert grid.times.tolist() == [1, 251, 501, 751]
    before = [grid.final, *grid.bars[:-1].tolist()]
    assert before == pytest.approx([0.9985, 0.99699443, 0.50633634, 0.11400478], rel=5e-8)
    assert ddim_grid(ldm, 100, "ldm").times.tolist() == list(range(1, 1000, 10))
    grid = ddim_grid(ldm, 4)
    assert grid.times.tolist() == [250, 500, 749, 999]
    assert (grid.final, grid.clip) == (1.0, True)
    assert ddim_grid(ldm, 999).times.tolist() == list(range(1, 1000))
    assert ddim_grid(ldm, 999, "ldm").times.tolist() == list(range(1, 1000))
    with pytest.raises(ValueError, match="steps must be at least 1 and at most 999 for 1000"):
        ddim_grid(ldm, 1000)
    with pytest.raises(ValueError, match="grid must be one of"):
        ddim_grid(ldm, 4, "trailing")
    with pytest.raises(ValueError, match="schedule must be one of"):
        alpha_bars("linear")


def test_ddim_step_of_the_sheet():
    bars = alpha_bars()[[480, 499]]
    assert bars.tolist() == pytest.approx([0.5234477, 0.4938436], abs=1e-7)
    scheduler = ddim_scheduler(Grid(torch.tensor([480, 499]), bars, 1.0, clip=False), "eps")
    x, eps = torch.tensor([0.3, -0.7]).double(), torch.tensor([0.5, -0.2]).double()
    found, x0 = scheduler.step(eps, 1, x, return_dict=False)
    assert x0.tolist() == pytest.approx([-0.0793, -0.7936], abs=5e-5)
    assert found.tolist() == pytest.approx([0.2878, -0.7122], abs=5e-5)


def plain_ddim(x, out, bar, before, prediction, clip):
    """The sheet's formulas."""
    a, s = bar**0.5, (1 - bar) ** 0.5
    x0 = {"x0": out, "eps": (x - s * out) / a, "v": a * x - s * out}[prediction]
    if clip:
        x0 = x0.clamp(-1, 1)
    return before**0.5 * x0 + (1 - before) ** 0.5 * (x - a * x0) / s


@pytest.mark.parametrize("prediction", ["x0", "eps", "v"])
@pytest.mark.parametrize("name", ["linspace", "ldm"])
def test_scheduler_steps_are_the_formulas(prediction, name):
    g = torch.Generator().manual_seed(0)
    grid = ddim_grid(alpha_bars(), 7, name)
    scheduler = ddim_scheduler(grid, prediction)
    assert scheduler.timesteps.tolist() == [6, 5, 4, 3, 2, 1, 0]
    before = [grid.final, *grid.bars[:-1].tolist()]
    for step in scheduler.timesteps.tolist():
        x, out = torch.randn(2, 50, generator=g, dtype=torch.float64) * 2
        found = scheduler.step(out, step, x, use_clipped_model_output=grid.clip, return_dict=False)[
            0
        ]
        expected = plain_ddim(x, out, float(grid.bars[step]), before[step], prediction, grid.clip)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
