"""ROOT: published values, the threshold and its two ways to find it, the fitted coefficients."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_exact import gradient, three_steps
from torch import nn

from stiefel.linalg.coefficients import CLASSIC, Table, check_guards, scalar_image, table
from stiefel.linalg.schulz import Workspace
from stiefel.optim import Muon
from stiefel.optim import quantile as selection
from stiefel.optim.fit import fit_coefficients, marchenko_pastur, spectrum_ratio
from stiefel.optim.quantile import _by_kthvalue, abs_quantile, clip_, clip_threshold
from stiefel.optim.root import OFFICIAL, ROOT, TRIPLE, soft_clip


def assert_exact(actual, expected, tolerance):
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def reference(x, q):
    """Linear interpolation at index q(N − 1), by sorting."""
    return np.quantile(x.double().abs().numpy(), q)


def last_threshold(weight, state, nesterov=True):
    """ε of the last step for momentum that is a sum: 20 times that of a running mean."""
    m = state["momentum_buffer"]
    u = torch.lerp(gradient(*weight.shape, 2), m, 0.95) if nesterov else m
    return float(abs_quantile(20 * u, 0.9)) + 1e-9


def test_classic_coefficients():
    weight, state = three_steps(ROOT, 4, 3, coefficients="classic")
    assert_exact(
        weight,
        [
            [0.07430948, 0.09072704, 0.02346181],
            [-0.06947269, -0.07332035, -0.01820831],
            [0.07539910, 0.10420936, 0.02726362],
            [-0.03533617, -0.11156513, -0.03983318],
        ],
        2e-8,  # the printed values have 1e-9 beside ε, 1e-7 beside the norm of the sum
    )
    assert math.isclose(last_threshold(weight, state), 3.5798581630, abs_tol=1e-10)
    weight, _ = three_steps(ROOT, 3, 4, coefficients="classic")
    assert_exact(weight[0], [0.07430948, 0.09613964, 0.02412134, -0.05648690], 2e-8)


def test_other_coefficients():
    weight, _ = three_steps(ROOT, 4, 3, coefficients=(2.9794, -3.6674, 1.6207))
    assert_exact(weight[0], [0.07428405, 0.09067772, 0.02372061], 2e-8)
    for given_as in ("triple", TRIPLE, {(3, 4): TRIPLE}, {(3, 4): [TRIPLE] * 5}):
        weight, _ = three_steps(ROOT, 4, 3, coefficients=given_as)
        assert_exact(weight[0], [0.07482969, 0.09064917, 0.02308114], 2e-8)


def test_without_nesterov():
    weight, state = three_steps(ROOT, 4, 3, coefficients="classic", nesterov=False)
    assert_exact(weight[0], [0.07311566, 0.08970931, 0.02304797], 4e-8)
    assert math.isclose(last_threshold(weight, state, False), 2.7517808722, abs_tol=1e-10)


def test_soft_clip_by_hand():
    update = torch.tensor([[-5, 1, 2], [3, -4, 0.5]], dtype=torch.float64)
    base, outliers = soft_clip(update, 0.9)
    limit = 4.5 + 1e-9
    assert torch.equal(base, torch.tensor([[-limit, 1, 2], [3, -4, 0.5]], dtype=torch.float64))
    expected = torch.tensor([[limit - 5, 0, 0], [0, 0, 0]], dtype=torch.float64)
    assert torch.equal(outliers, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_soft_clip_splits(dtype, generator):
    update = torch.randn(3, 20, 30, generator=generator).to(dtype)
    update *= torch.tensor([1.0, 100, 0])[:, None, None].to(dtype)
    before = update.clone()
    base, outliers = soft_clip(update, 0.9)
    assert torch.equal(update, before)
    assert torch.equal(outliers, update - base)
    assert base.dtype == outliers.dtype == dtype
    for u, b, o in zip(update[:2], base, outliers, strict=False):
        limit = reference(u, 0.9) * (1 + torch.finfo(dtype).eps)
        assert b.abs().double().max() <= limit + 1e-9
        assert 56 <= (o != 0).sum() <= 60  # a tenth, less ties in low precision
        assert ((o == 0) | (o.sign() == u.sign())).all()
    assert not base[2].any()
    assert not outliers[2].any()


def test_soft_clip_is_the_proximal_step(generator):
    """O minimises ½‖U − O‖² + ε‖O‖₁."""
    update = torch.randn(6, 5, dtype=torch.float64, generator=generator)
    base, outliers = soft_clip(update, 0.7)
    limit = base.abs().max()

    def goal(o):
        return (update - o).square().sum() / 2 + limit * o.abs().sum()

    for _ in range(20):
        nearby = outliers + 0.1 * torch.randn(6, 5, dtype=torch.float64, generator=generator)
        assert goal(outliers) < goal(nearby)


def test_soft_clip_keeps_nan_visible():
    update = torch.ones(2, 3, 4)
    update[0, 1, 1] = math.nan
    base, outliers = soft_clip(update)
    assert base[0].isnan().any()
    assert outliers[0].isnan().any()
    assert torch.equal(base[1], update[1])


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=[True, False], ids=["partition", "bracket"])
def way(request, monkeypatch):
    """Both ways of selecting, whichever is faster on this machine."""
    monkeypatch.setattr(selection, "_partitions_fast", lambda _: request.param)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5), (130, 200), (200, 401), (1, 1)])
@pytest.mark.parametrize("q", [0.001, 0.5, 0.9, 0.999, 1.0])
def test_quantile_is_exact(way, dtype, shape, q, generator):
    x = (torch.randn(2, *shape, generator=generator) ** 3).to(dtype)
    values = abs_quantile(x, q)
    assert values.shape == (2, 1, 1)
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-14 if dtype == torch.float64 else 1e-7
    for matrix, value in zip(x, values, strict=True):
        assert math.isclose(value, reference(matrix, q), rel_tol=tolerance)
    radix = _by_kthvalue(x.flatten(1).abs(), q)  # what accelerators run
    torch.testing.assert_close(radix, values.flatten().double(), rtol=tolerance, atol=0)


@given(
    q=st.floats(0.01, 1.0),
    entries=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30),
    repeats=st.sampled_from([1, 3000]),
)
@settings(max_examples=60, deadline=None)
def test_quantile_of_anything(q, entries, repeats):
    """Ties, zeros, and structure that a sample at equal distances may miss."""
    x = torch.tensor(entries * repeats)[None]
    expected = reference(x, q)
    with pytest.MonkeyPatch.context() as patch:
        for fast in (True, False):
            patch.setattr(selection, "_partitions_fast", lambda _, fast=fast: fast)
            assert math.isclose(abs_quantile(x, q), expected, rel_tol=1e-6, abs_tol=1e-30)


@pytest.mark.parametrize("hidden", [0.0, 1e3])
def test_quantile_where_the_sample_sees_nothing(way, hidden):
    """Every entry of the sample is 1, all others are not: the bracket misses, and it shows."""
    x = torch.full((1, 200_000), hidden)
    for stride in range(16, 40):
        x[:, ::stride] = 1.0
    assert float(abs_quantile(x, 0.05)) == reference(x, 0.05)
    assert float(abs_quantile(x, 0.97)) == reference(x, 0.97)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.895, 0.95])
@pytest.mark.parametrize("least", [0.0, 0.5])
def test_quantile_of_many_equal_entries(way, share, least, generator):
    """Where a vectorised partition gets nowhere."""
    x = 1 + torch.rand(3, 200, 300, generator=generator)
    x[torch.rand(x.shape, generator=generator) < share] = least
    for matrix, value in zip(x, abs_quantile(-x, 0.9), strict=True):
        assert math.isclose(value, reference(matrix, 0.9), rel_tol=1e-7)


def test_scratch_memory_changes_nothing(way, generator):
    space = Workspace()
    for shape in ((2, 300, 500), (1, 3, 4), (3, 200, 200)):
        x = torch.randn(shape, generator=generator)
        before = x.clone()
        assert torch.equal(abs_quantile(x, 0.7, space=space), abs_quantile(x, 0.7))
        assert torch.equal(x, before)
    assert space.nbytes == 4 * 300 * 500


def test_vectorised_partitions_are_told_from_scalar_ones(monkeypatch):
    measured = selection._partitions_fast.__wrapped__
    now = iter(range(1000))
    monkeypatch.setattr(selection.time, "thread_time", lambda: next(now))
    assert measured(np.dtype(np.int32))  # equally long
    times = iter([0, 1] * 5 + [0, 60] * 5)
    monkeypatch.setattr(selection.time, "thread_time", lambda: next(times))
    assert not measured(np.dtype(np.int32))


def test_clipping_in_place_is_clamping_at_the_threshold(way, generator):
    x = torch.randn(3, 150, 200, generator=generator)
    x[1] = 0
    x[2, 8:] = 0  # its quantile is zero: the smallest positive entry bounds it
    limit = clip_threshold(x, 0.9)
    expected = x.clamp(-limit, limit)
    clip_(x, 0.9)
    assert torch.equal(x, expected)
    assert 0 < float(limit[2]) == float(x[2].max())


def test_sampled_quantile(generator):
    x = torch.randn(2, 400, 900, generator=generator) * torch.linspace(0.1, 3, 900)
    sampled, whole = abs_quantile(x, 0.9, "sampled"), abs_quantile(x, 0.9)
    assert not torch.equal(sampled, whole)
    torch.testing.assert_close(sampled, whole, rtol=0.02, atol=0)
    small = x[:, :20, :30]
    assert torch.equal(abs_quantile(small, 0.9, "sampled"), abs_quantile(small, 0.9))


@pytest.mark.parametrize("shape", [(3, 4), (200, 300)])
def test_nan_and_infinity_in_quantiles(shape):
    x = torch.ones(3, *shape)
    x[0, 1, 1], x[1, 1, 1] = math.nan, math.inf
    values = abs_quantile(x, 0.5).flatten().tolist()
    assert math.isnan(values[0])
    assert values[1:] == [1.0, 1.0]
    assert _by_kthvalue(x.flatten(1), 0.5).isnan().tolist() == [True, False, False]
    assert abs_quantile(x, 1.0).flatten()[1] == math.inf


def test_mostly_zeros_take_the_smallest_positive():
    x = torch.zeros(2, 10, 10)
    x[0, 0, :3] = torch.tensor([3.0, -0.5, 2.0])
    assert clip_threshold(x, 0.9).flatten().tolist() == [0.5, 0.0]
    base, _ = soft_clip(x, 0.9)
    torch.testing.assert_close(base[0, 0, :3], torch.tensor([0.5, -0.5, 0.5]))
    assert not base[1].any()
    w = [nn.Parameter(torch.zeros(10, 10)) for _ in range(2)]
    w[0].grad, w[1].grad = x[0], x[1]
    ROOT(w, lr=1.0).step()
    assert w[0].norm() > 0.5
    assert not w[1].any()


@pytest.mark.parametrize("q", [0.0, -0.1, 1.001, math.nan])
def test_bad_quantiles(q):
    for call in (soft_clip, abs_quantile):
        with pytest.raises(ValueError, match=r"quantile must be in \(0, 1\]"):
            call(torch.ones(2, 2), q)
    with pytest.raises(ValueError, match=r"quantile must be in \(0, 1\]"):
        ROOT([nn.Parameter(torch.ones(2, 2))], quantile=q)


def test_bad_calls_of_the_quantile():
    with pytest.raises(ValueError, match="mode must be one of"):
        abs_quantile(torch.ones(2, 2), 0.5, "guess")
    with pytest.raises(ValueError, match="x must hold matrices"):
        abs_quantile(torch.ones(0, 2), 0.5)


def run(cls, gradients, dtype=torch.float64, **kwargs):
    weight = nn.Parameter(torch.zeros(gradients[0].shape, dtype=dtype))
    optimizer = cls([weight], **{"lr": 0.02, **kwargs})
    for g in gradients:
        weight.grad = g.to(dtype)
        optimizer.step()
    return weight.detach(), optimizer


@pytest.fixture
def gradients(generator):
    return list(torch.randn(3, 12, 8, dtype=torch.float64, generator=generator))


@pytest.mark.parametrize("name", ["classic", "fitted", "fast", "polar_express"])
def test_without_clipping_it_is_muon(name, gradients):
    root, _ = run(ROOT, gradients, quantile=1.0, coefficients=name)
    muon, _ = run(Muon, gradients, scale="rms", ns=name)
    assert torch.equal(root, muon)


def test_scaling_transposing_and_constant_matrices(gradients):
    expected, _ = run(ROOT, gradients)
    for scale in (1e-8, 1e8):
        scaled, _ = run(ROOT, [scale * g for g in gradients])
        torch.testing.assert_close(scaled, expected, rtol=1e-9, atol=1e-12)
    transposed, _ = run(ROOT, [g.mT.contiguous() for g in gradients])
    torch.testing.assert_close(transposed.mT, expected, rtol=1e-9, atol=1e-12)
    flat = [torch.ones(6, 4, dtype=torch.float64)]
    assert torch.equal(run(ROOT, flat)[0], run(Muon, flat, scale="rms")[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_size_of_outliers_does_not_matter(dtype, gradients):
    """An entry of U above the threshold times 1000: the two order statistics stay."""
    base = gradients[0].clone()
    top = base.abs().flatten().argmax()
    worse = base.clone()
    worse.view(-1)[top] *= 1000
    steps = [run(ROOT, [g], dtype)[0] for g in (base, worse)]
    assert torch.equal(*steps)
    muon = [run(Muon, [g], dtype)[0] for g in (base, worse)]
    assert (muon[0] - muon[1]).double().norm() > 0.1 * muon[0].double().norm()


def test_each_matrix_has_its_own_threshold(gradients):
    many = [nn.Parameter(torch.zeros(12, 8, dtype=torch.float64)) for _ in range(3)]
    for k, (p, g) in enumerate(zip(many, gradients, strict=True)):
        p.grad = 100.0**k * g
    ROOT(many, lr=0.02).step()
    for p, g in zip(many, gradients, strict=True):
        torch.testing.assert_close(p.detach(), run(ROOT, [g])[0], rtol=1e-9, atol=1e-12)


def test_signs_do_not_matter_to_the_threshold(gradients):
    flipped = torch.ones(12, 8, dtype=torch.float64)
    flipped[::2] = -1
    expected = run(ROOT, gradients)[0] * flipped
    actual = run(ROOT, [g * flipped for g in gradients])[0]
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_momentum_keeps_the_outliers():
    g = torch.ones(6, 6, dtype=torch.float64)
    g[2, 3] = 1e4
    _, optimizer = run(ROOT, [g])
    m = optimizer.state[optimizer.param_groups[0]["params"][0]]["momentum_buffer"]
    torch.testing.assert_close(m, 0.05 * g)


def test_share_removed(gradients):
    for nesterov in (True, False):
        weight, optimizer = run(ROOT, gradients, nesterov=nesterov, quantile=0.8)
        state = optimizer.state[optimizer.param_groups[0]["params"][0]]
        m = state["momentum_buffer"]
        u = torch.lerp(gradients[-1], m, 0.95) if nesterov else m
        expected = float(soft_clip(u, 0.8)[1].abs().sum() / u.abs().sum())
        before = weight.clone()
        ((name, shares),) = optimizer.removed().items()
        assert name == "parameter 0 of group 0"
        assert len(shares) == 1
        assert math.isclose(shares[0], expected, rel_tol=1e-7)
        assert torch.equal(weight, before)
    split = nn.Parameter(torch.zeros(6, 4))
    split.grad = torch.zeros(6, 4)
    optimizer = ROOT([{"params": [("qkv", split)], "blocks": 3}])
    assert optimizer.removed() == {}
    optimizer.step()
    assert optimizer.removed() == {"parameter 'qkv'": [0.0, 0.0, 0.0]}


@pytest.mark.parametrize("mode", ["exact", "sampled"])
def test_nan_in_momentum_skips_that_matrix_and_says_so(mode):
    weights = [nn.Parameter(torch.ones(4, 3)) for _ in range(2)]
    optimizer = ROOT(weights, weight_decay=0.0, quantile_mode=mode)
    for w in weights:
        w.grad = torch.ones(4, 3)
    optimizer.step()
    before = [w.detach().clone() for w in weights]
    optimizer.state[weights[0]]["momentum_buffer"][1, 2] = math.nan
    with pytest.warns(RuntimeWarning, match=r"NaN in the momentum of 1 matrices of shape \(4, 3\)"):
        optimizer.step()
    assert torch.equal(weights[0], before[0])
    assert not torch.equal(weights[1], before[1])
    optimizer.param_groups[0]["nonfinite"] = "propagate"
    optimizer.step()
    assert weights[0].isnan().all()


def test_nonfinite_gradients():
    weight = nn.Parameter(torch.ones(4, 3))
    weight.grad = torch.full((4, 3), math.inf)
    with pytest.raises(FloatingPointError, match="parameter 0"):
        ROOT([weight]).step()
    with pytest.warns(RuntimeWarning, match="skipped"):
        ROOT([weight], nonfinite="skip").step()
    assert torch.equal(weight.detach(), torch.ones(4, 3))


# Coefficients


def image(sigma, triple, steps=5):
    return float(scalar_image(np.array([sigma]), [triple] * steps)[0])


def test_the_official_square_triple_is_unstable():
    bad = OFFICIAL[2048, 2048]
    assert math.isclose(image(0.5591, bad), 3.31383191, abs_tol=1e-7)
    assert math.isclose(image(0.8291002291, bad), 1.05438906, abs_tol=1e-7)
    assert math.isclose(image(0.5591, CLASSIC), 0.68214740, abs_tol=1e-7)
    assert math.isclose(image(0.8291002291, CLASSIC), 1.12359948, abs_tol=3e-7)
    grid = np.linspace(0, 1, 100_001)
    assert scalar_image(grid, [bad] * 6).max() > 600
    for shape, limit in (((2048, 3072), 1.24), ((2048, 8192), 1.13), ((2048, 16384), 1.21)):
        assert math.isclose(scalar_image(grid, [OFFICIAL[shape]] * 5).max(), limit, abs_tol=1e-2)
    with pytest.raises(ValueError, match=r"coefficients of shape \(2048, 2048\).*σ₀ = 0.5"):
        ROOT([nn.Parameter(torch.ones(2, 3))], coefficients={(2048, 2048): bad})


def test_shipped_tables_keep_all_guards():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rule in (Table((TRIPLE,) * 5), table("fitted")):
            check_guards(rule)
    actual = [image(s, TRIPLE) for s in (0.05, 0.3, 0.6, 0.8, 0.9, 1)]
    expected = [0.866478, 0.884727, 0.898385, 1.023277, 1.010005, 0.890916]
    np.testing.assert_allclose(actual, expected, atol=6e-7)


def official_errors():
    errors = []
    for shape, triple in OFFICIAL.items():
        sigma = marchenko_pastur(*shape)
        rules = ((CLASSIC,) * 5, (triple,) * 5, (TRIPLE,) * 5, table("fitted").triples)
        errors.append([np.mean((scalar_image(sigma, rule) - 1) ** 2) for rule in rules])
    return errors


def test_orthogonality_on_the_official_shapes():
    """Classic, official, one triple, per step; Marchenko–Pastur spectra."""
    errors = np.array(official_errors())
    expected = [
        [3.38e-2, 1.65e-2, 1.10e-2, 1.70e-3],
        [3.40e-2, 1.53e-3, 9.34e-3, 1.75e-3],
        [4.25e-2, 4.01e-3, 1.07e-2, 1.78e-3],
    ]
    np.testing.assert_allclose(errors[1:], expected, rtol=0.01)
    assert (np.diff(errors[0]) < 0).all()  # the square shape: better from column to column
    assert (errors[:, 3] < 0.31 * errors[:, 0]).all()


def weights(*shapes):
    return [nn.Parameter(torch.empty(s)) for s in shapes]


def test_official_coefficients_by_shape():
    with pytest.warns(UserWarning, match=r"no coefficients for shape \(3, 4\).*classic"):
        optimizer = ROOT(weights((4, 3)), coefficients="official")
    group = optimizer.param_groups[0]
    assert optimizer._rule(group, 4, 3).triples == (CLASSIC,) * 5
    assert optimizer._rule(group, 8192, 2048).triples == (OFFICIAL[2048, 8192],) * 5
    with pytest.warns(UserWarning, match=r"\(2048, 2048\) are unstable"):
        ROOT(weights((2048, 2048)), coefficients="official")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "the elementwise rule")
        ROOT(weights((3072, 2048)), coefficients="official")


def test_mappings_by_shape():
    mapping = {(3, 4): TRIPLE, (2, 4): table("fitted").triples}
    with pytest.warns(UserWarning, match=r"no coefficients for shape \(5, 6\)"):
        optimizer = ROOT(weights((4, 3), (2, 4), (6, 5)), coefficients=mapping, ns_steps=4)
    group = optimizer.param_groups[0]
    assert optimizer._rule(group, 4, 3).triples == (TRIPLE,) * 4
    assert optimizer._rule(group, 2, 4).triples == table("fitted").triples
    assert optimizer._rule(group, 6, 5).triples == (CLASSIC,) * 4
    again = ROOT(weights((4, 3)))
    state = {"state": {}, "param_groups": [{**group, "params": [0]}]}
    again.load_state_dict(state)
    assert again._rule(again.param_groups[0], 3, 4).triples == (TRIPLE,) * 4


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ("best", "coefficients must be one of .*'best'"),
        ({(4, 3): TRIPLE}, r"keys of coefficients must be \(min, max\), got \(4, 3\)"),
        ({(3, 4): (1, 2)}, "coefficients must be a triple"),
        ((3.4916, -4.8224, 2.1095), "σ₀"),
        ((1, math.nan, 0), "finite"),
    ],
)
def test_bad_coefficients(given, match):
    with pytest.raises(ValueError, match=match):
        ROOT(weights((3, 4)), coefficients=given)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"ns_steps": 0}, "ns_steps must be an integer ≥ 1, got 0"),
        ({"ns_steps": 6}, "fitted has 5 steps"),
        ({"quantile_mode": "guess"}, "quantile_mode must be one of"),
        ({"momentum": 1.0}, "momentum"),
        ({"lr": -1.0}, "lr"),
        ({"ns_dtype": torch.float16}, "ns_dtype"),
        ({"maximize": True}, "maximize"),
    ],
)
def test_bad_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        ROOT(weights((3, 4)), **settings)


def test_vectors_are_refused_by_name():
    with pytest.raises(ValueError, match=r"'bias' has shape \(3,\)"):
        ROOT([("bias", nn.Parameter(torch.ones(3)))])


# Fitting


def power_law(count, alpha):
    return np.arange(1.0, count + 1) ** -alpha


def test_marchenko_pastur_is_the_spectrum_of_gaussians(generator):
    for shape in ((300, 300), (200, 600)):
        x = torch.randn(shape, dtype=torch.float64, generator=generator)
        sigma = torch.linalg.svdvals(x / x.norm()).numpy()
        np.testing.assert_allclose(marchenko_pastur(*shape), sigma, atol=2.5 / shape[0])
        assert np.array_equal(marchenko_pastur(*shape), marchenko_pastur(*shape[::-1]))
    assert np.allclose(marchenko_pastur(1, 5), 1)


def test_fit_beats_classic_on_every_spectrum_and_keeps_the_guards():
    found = fit_coefficients(96, 384)
    assert found.shape == (1, 3)
    for sigma in (marchenko_pastur(96, 384), power_law(96, 0.5), power_law(96, 1.0)):
        assert spectrum_ratio(found, sigma) < 0.017  # the sheet's worst: 0.016
    np.testing.assert_allclose(found[0], [2.7417, -3.4289, 1.6820], atol=2e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_guards(Table((tuple(found[0]),) * 5))
    assert fit_coefficients(384, 96) is found  # cached, whichever side is longer
    with pytest.raises(ValueError, match="read-only"):
        found[0, 0] = 1
    optimizer = ROOT(weights((384, 96)), coefficients={(96, 384): found})
    assert optimizer._rule(optimizer.param_groups[0], 384, 96).slope > 100


def test_fit_for_training_has_a_steep_start():
    found = fit_coefficients(96, 384, alphas=(0.5, 1.0, 1.5))
    ratios = [spectrum_ratio(found, power_law(96, a)) for a in (0.5, 1.0, 1.5)]
    assert max(ratios) < 0.75
    assert found[0, 0] > 3.4


def test_fit_per_step_and_to_given_spectra():
    sigma = [power_law(64, 0.5), 7 * power_law(48, 1.0)]
    rows = fit_coefficients(64, 64, steps=4, spectrum=sigma, per_step=True)
    assert rows.shape == (4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_guards(Table(tuple(map(tuple, rows))))
    for s in sigma:
        assert spectrum_ratio(rows, s) < 0.5
    one = fit_coefficients(64, 64, spectrum=np.asarray(sigma[0]))
    assert spectrum_ratio(one, sigma[0]) < 0.1


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"rows": 0}, "rows must be ≥ 1, got 0"),
        ({"cols": 0}, "cols must be ≥ 1"),
        ({"steps": 0}, "steps must be ≥ 1"),
        ({"spectrum": []}, "at least one array"),
        ({"spectrum": [[]]}, "one-dimensional arrays"),
        ({"spectrum": [[1.0, -1.0]]}, "≥ 0"),
        ({"spectrum": [1.0, math.nan]}, "finite"),
        ({"spectrum": np.zeros(3)}, "must not be zero"),
    ],
)
def test_bad_arguments_of_the_fit(arguments, match):
    with pytest.raises(ValueError, match=match):
        fit_coefficients(**{"rows": 4, "cols": 5, **arguments})
