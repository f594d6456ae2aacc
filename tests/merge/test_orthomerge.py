import math
import warnings
from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.linalg import (
    cayley,
    haar,
    inverse_cayley,
    procrustes_rotation,
    rotation_exp,
    rotation_log,
    skew,
)
from stiefel.merge import (
    CancellationWarning,
    HalfTurnWarning,
    OrthoSettings,
    merge_rotations,
    orthomerge,
    orthomerge_tensor,
    task_arithmetic,
    ties,
    tsvm,
)
from stiefel.merge import turning as turning_module
from stiefel.merge.adapter_rotation import skew_blocks
from stiefel.merge.lie_average import merge_coordinates
from stiefel.merge.prepared import is_turned

T = math.tan(math.pi / 8)
SEEDS = st.integers(0, 2**31)
SHAPES = [(24, 16), (16, 16), (16, 24), (4, 40)]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def family(out, width, count=3, seed=0, size=0.1, dtype=torch.float64):
    base = normal(out, width, seed=seed)
    experts = [base + size * normal(out, width, seed=seed + 1 + i) for i in range(count)]
    return base.to(dtype), [w.to(dtype) for w in experts]


def plane(i, j, t, d=3):
    q = torch.zeros(d, d, dtype=torch.float64)
    q[i, j], q[j, i] = t, -t
    return q


def slow_orthomerge(base, experts, variant, merge_residuals):
    """The equations one by one, with dense matrices."""
    deltas = [w - base for w in experts]
    mean = torch.stack(deltas).mean(0)
    qs = []
    for w, delta in zip(experts, deltas, strict=True):
        target = w
        if variant == "C":
            cosine = torch.nn.functional.cosine_similarity(delta, mean, dim=1, eps=1e-6)
            target = base + (cosine < 0).double()[:, None] * delta
        qs.append(inverse_cayley(procrustes_rotation(base, target)))
    total = sum(qs)
    c = sum(q.norm() for q in qs) / total.norm()
    merged = cayley(skew(total * c / len(qs)))
    rests = [w - base @ cayley(q) for w, q in zip(experts, qs, strict=True)]
    return base @ merged + merge_residuals(rests)


# Part A: rotations.


def test_merged_planes_have_the_sheets_values():
    q1, q2 = plane(0, 1, T), plane(0, 2, T)
    merged = merge_rotations([q1, q2])
    torch.testing.assert_close(merged, (q1 + q2) / math.sqrt(2))
    assert float(merged.norm()) == pytest.approx(T * math.sqrt(2))
    plain = merge_rotations([q1, q2], correct=False)
    torch.testing.assert_close(plain, (q1 + q2) / 2)
    quarter = cayley(torch.tensor([[0, -T], [T, 0]], dtype=torch.float64))
    h = math.sqrt(0.5)
    torch.testing.assert_close(quarter, torch.tensor([[h, -h], [h, h]], dtype=torch.float64))


def test_the_sheets_random_blocks():
    rng = np.random.RandomState(0)
    triangles = [torch.tensor(rng.randn(3, 28) * 0.05 * (i + 1)) for i in range(3)]
    merged = merge_coordinates(triangles)
    assert float(merged.sum()) == pytest.approx(0.27273014367629245, abs=1e-12)
    assert float(merged.norm()) == pytest.approx(0.8960368763226859, abs=1e-12)
    assert merged[0, :4].tolist() == pytest.approx(
        [0.19997075958863095, 0.12383457272293755, 0.1468571170566331, 0.06831866500443638]
    )
    q = merge_rotations([skew_blocks(t) for t in triangles])
    torch.testing.assert_close(q, skew_blocks(merged))  # one factor for all blocks
    r = cayley(q)
    assert float(r.sum()) == pytest.approx(20.842039706949837, abs=1e-11)
    assert r[0, 0, :3].tolist() == pytest.approx(
        [0.8369699375994513, 0.35450148180527846, 0.2651932315092652]
    )


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 5), seed=SEEDS, alpha=st.floats(-2, 2))
def test_norm_is_the_mean_of_norms_and_direction_that_of_the_sum(count, seed, alpha):
    qs = [skew(normal(2, 4, 4, seed=seed + i)) for i in range(count)]
    weights = [1.0 + i for i in range(count)]
    merged = merge_rotations(qs, weights, intensity=alpha)
    mean = sum(w * float(q.norm()) for w, q in zip(weights, qs, strict=True)) / sum(weights)
    assert float(merged.norm()) == pytest.approx(abs(alpha) * mean, rel=1e-10, abs=1e-12)
    total = sum(w * q for w, q in zip(weights, qs, strict=True))
    torch.testing.assert_close(merged, alpha * mean * total / total.norm())
    torch.testing.assert_close(merged, merge_rotations(qs[::-1], weights[::-1], intensity=alpha))
    # Equal rotations: the same one. One that does not turn: shorter by its share.
    torch.testing.assert_close(merge_rotations([qs[0]] * 3), qs[0])
    torch.testing.assert_close(merge_rotations([qs[0], torch.zeros_like(qs[0])]), qs[0] / 2)


def test_opposite_rotations_cancel_with_a_word():
    q = skew(normal(4, 4))
    for rest in (0.0, 1e-10):
        with pytest.warns(CancellationWarning, match="cancel"):
            merged = merge_rotations([q, -q + rest * skew(normal(4, 4, seed=1))])
        assert torch.equal(merged, torch.zeros(4, 4, dtype=torch.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing there, nothing to say
        assert not merge_rotations([0 * q, 0 * q]).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rotations_of_every_dtype(dtype):
    qs = [skew(normal(2, 3, 3, seed=i)).to(dtype) for i in range(2)]
    merged = merge_rotations(qs)
    assert merged.dtype == dtype
    exact = merge_rotations([q.double() for q in qs])
    torch.testing.assert_close(merged, exact.to(dtype))


def test_gradient_of_the_merge():
    qs = [normal(3, 3, seed=i).requires_grad_() for i in range(2)]
    assert torch.autograd.gradcheck(lambda *x: merge_rotations([skew(a) for a in x]), qs)


def test_rotations_that_do_not_fit_are_named():
    q = skew(normal(3, 3))
    with pytest.raises(ValueError, match="Qs must not be empty"):
        merge_rotations([])
    with pytest.raises(ValueError, match=r"Qs\[1\] must be skew"):
        merge_rotations([q, normal(3, 3)])
    for weights in ([1.0], [-1.0, 2.0], [0.0, 0.0], [1.0, math.nan]):
        with pytest.raises(ValueError, match="weights must"):
            merge_rotations([q, q], weights)
    with pytest.raises(ValueError, match="intensity must be finite"):
        merge_rotations([q], intensity=math.inf)
    with pytest.raises(TypeError, match=r"coordinates\[1\] is torch.float32"):
        merge_rotations([q, q.float()])
    with pytest.raises(ValueError, match=r"coordinates\[1\] has shape"):
        merge_coordinates([q, q[:2]])


# Part C: any weights.


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", ["G", "C"])
@pytest.mark.parametrize("residual", ["ta", "ties", "tsvm", "mine"])
def test_equal_to_the_equations_one_by_one(shape, variant, residual):
    base, experts = family(*shape)
    zero = torch.zeros_like(base)
    merges = {
        "ta": lambda rests: sum(rests) / 3,
        "ties": lambda rests: ties(zero, rests, density=0.2),
        "tsvm": tsvm,
        "mine": lambda rests: rests[0] - rests[1],
    }
    merge = merges[residual]
    expected = slow_orthomerge(base, experts, variant, merge)
    got, report = orthomerge_tensor(
        base, experts, OrthoSettings(variant, merge if residual == "mine" else residual)
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    assert report.map == "cayley"
    assert len(report.norms) == len(report.residuals) == 3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", ["G", "C"])
@pytest.mark.parametrize("map_", ["cayley", "log"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_one_expert_is_given_back(shape, variant, map_, dtype):
    base, (expert,) = family(*shape, count=1, dtype=dtype)
    chosen = OrthoSettings(variant, "ta", map=map_)
    got, _ = orthomerge_tensor(base, [expert], chosen)
    torch.testing.assert_close(got, expert, rtol=0, atol=1e-12 if dtype == torch.float64 else 0)
    copies, report = orthomerge_tensor(base, [expert] * 4, chosen)
    torch.testing.assert_close(copies, got, rtol=0, atol=1e-12)
    assert report.correction == pytest.approx(1, abs=1e-6) or max(report.norms) < 1e-6


@settings(max_examples=15, deadline=None)
@given(shape=st.sampled_from(SHAPES), seed=SEEDS)
def test_turning_the_input_space_and_renaming_experts_change_nothing(shape, seed):
    base, experts = family(*shape, seed=seed)
    chosen = OrthoSettings("G", "ta")
    got, _ = orthomerge_tensor(base, experts, chosen)
    close = {"rtol": 0, "atol": 1e-7}
    torch.testing.assert_close(orthomerge_tensor(base, experts[::-1], chosen)[0], got, **close)
    u = haar(shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    turned, _ = orthomerge_tensor(base @ u, [w @ u for w in experts], chosen)
    torch.testing.assert_close(turned, got @ u, **close)


@pytest.mark.parametrize("out", [20, 12])
def test_pure_rotations_keep_every_singular_value(out):
    base = normal(out, 12)
    experts = [base @ rotation_exp(0.1 * skew(normal(12, 12, seed=i))) for i in range(1, 4)]
    got, report = orthomerge_tensor(base, experts, OrthoSettings(residual="ties"))
    torch.testing.assert_close(torch.linalg.svdvals(got), torch.linalg.svdvals(base))
    assert max(report.residuals) < 1e-12
    torch.testing.assert_close(got @ got.T, base @ base.T)  # angles and norms of all neurons


def test_opposite_experts_cancel_to_the_base():
    base = normal(20, 12)
    r = rotation_exp(0.1 * skew(normal(12, 12, seed=1)))
    with pytest.warns(CancellationWarning):
        got, report = orthomerge_tensor(base, [base @ r, base @ r.T], OrthoSettings(residual="ta"))
    torch.testing.assert_close(got, base)
    assert report.correction == 0


def test_wide_matrices_are_not_noise():
    """Sheet: with arbitrary null vectors R - I of such a matrix had a norm of 8.17, not 0.163."""
    base, experts = family(32, 64, count=2, size=0.02, dtype=torch.float32)
    _, report = orthomerge_tensor(base, experts)
    assert max(report.norms) < 0.2


def test_few_rows_are_merged_without_a_square_of_the_width():
    width = 20_000  # a square in float32 would be 1.6 GB
    base, experts = family(2, width, dtype=torch.float32)
    got, report = orthomerge_tensor(base, experts, OrthoSettings(residual="ta"))
    turned = turning_module.extract(base, experts)
    assert turned.basis is not None
    assert turned.rotations[0].shape == (8, 8)
    assert got.shape == base.shape
    assert report.correction > 1


@pytest.mark.parametrize("variant", ["G", "C"])
@pytest.mark.parametrize("residual", ["ta", "ties"])
def test_the_small_form_equals_the_dense_one(variant, residual):
    base, experts = family(4, 40)
    chosen = OrthoSettings(variant, residual)
    small, _ = orthomerge_tensor(base, experts, chosen)
    assert turning_module.extract(base, experts).basis is not None
    expected = slow_orthomerge(
        base, experts, variant,
        (lambda r: sum(r) / 3) if residual == "ta" else
        (lambda r: ties(torch.zeros_like(base), r, density=0.2)),
    )  # fmt: skip
    torch.testing.assert_close(small, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("variant", ["G", "C"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_folded_low_rank_changes_span_only_their_rank(variant, dtype):
    base = normal(12, 60).to(dtype)
    experts = [
        (base.double() + 0.1 * normal(12, 2, seed=i) @ normal(2, 60, seed=i + 9)).to(dtype)
        for i in (1, 2, 3)
    ]
    turned = turning_module.extract(base, experts, variant=variant)
    assert turned.basis is not None
    assert turned.basis.shape == (60, 12 + 3 * 2)  # with all rows it would be 48, more than half
    got, _ = orthomerge_tensor(base, experts, OrthoSettings(variant, "ta"))
    wide = base.double(), [w.double() for w in experts]
    expected = slow_orthomerge(*wide, variant, lambda rests: sum(rests) / 3)
    atol = 1e-5 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=atol)
    coarse = turning_module.extract(base.bfloat16(), [w.bfloat16() for w in experts])
    assert coarse.basis is None


def test_turns_by_pi_fall_back_to_logarithms():
    base = normal(8, 4)
    half = torch.diag(torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=torch.float64))
    small = rotation_exp(plane(2, 3, 0.3, 4))
    with pytest.warns(HalfTurnWarning, match="layer.0.weight turns a plane by almost π"):
        got, report = orthomerge_tensor(
            base, [base @ half, base @ small], OrthoSettings(residual="ta"), name="layer.0.weight"
        )
    assert report.map == "log"
    assert report.norms == pytest.approx((math.pi * math.sqrt(2), 0.3 * math.sqrt(2)), abs=1e-6)
    assert torch.isfinite(got).all()
    torch.testing.assert_close(torch.linalg.svdvals(got), torch.linalg.svdvals(base))


def test_a_reflection_is_merged_as_the_nearest_rotation():
    base = normal(8, 4)
    mirror = torch.diag(torch.tensor([1.0, 1.0, 1.0, -1.0], dtype=torch.float64))
    got, _ = orthomerge_tensor(base, [base @ mirror], OrthoSettings(residual="ta", map="log"))
    torch.testing.assert_close(got, base @ mirror)  # what is no rotation is in the residual


def test_logarithms_and_cayley_agree_for_small_angles():
    base, experts = family(30, 10, size=1e-3)
    a, b = (orthomerge_tensor(base, experts, OrthoSettings("G", "ta", map=m))[0]
            for m in ("cayley", "log"))  # fmt: skip
    assert float((a - b).norm() / (a - base).norm()) < 1e-3
    r = procrustes_rotation(base, experts[0])
    torch.testing.assert_close(rotation_log(r), 2 * inverse_cayley(r), rtol=0, atol=1e-8)


def test_dead_neurons_and_zero_experts():
    base, experts = family(12, 8)
    base[3:6] = 0
    dead = [w.clone() for w in experts]
    for w in dead:
        w[3:6] = 0
    got, _ = orthomerge_tensor(base, dead, OrthoSettings(residual="ta"))
    assert not got[3:6].any()
    nothing, report = orthomerge_tensor(base, [base, base])
    torch.testing.assert_close(nothing, base)
    assert report.norms == pytest.approx((0, 0), abs=1e-12)
    # An expert that did not move counts: half the coordinate.
    _, report = orthomerge_tensor(base, [dead[0], base], OrthoSettings(residual="ta"))
    assert report.correction == pytest.approx(1, abs=1e-6)
    zero = torch.zeros(4, 3)
    assert not orthomerge_tensor(zero, [zero])[0].any()


def test_weights_and_scale():
    base, experts = family(12, 8)
    first, _ = orthomerge_tensor(base, experts, OrthoSettings(residual="ta"), weights=[1, 0, 0])
    torch.testing.assert_close(first, experts[0])
    full = orthomerge_tensor(base, experts, OrthoSettings(residual="ta"))[0]
    none = orthomerge_tensor(base, experts, OrthoSettings(residual="ta", residual_scale=0))[0]
    half = orthomerge_tensor(base, experts, OrthoSettings(residual="ta", residual_scale=1 / 6))[0]
    torch.testing.assert_close(half, (full + none) / 2)
    torch.testing.assert_close(torch.linalg.svdvals(none), torch.linalg.svdvals(base))
    still = orthomerge_tensor(
        base, experts, OrthoSettings(residual="ta", residual_scale=0, intensity=0)
    )[0]
    torch.testing.assert_close(still, base)
    shorter = orthomerge_tensor(
        base, experts, OrthoSettings(residual="ta", residual_scale=0, correct=False)
    )[0]
    assert float((shorter - base).norm()) < 0.7 * float((none - base).norm())


@pytest.mark.parametrize("polar", ["svd", "newton"])
@pytest.mark.parametrize("shape", [(40, 24), (24, 24), (20, 24)])
def test_both_ways_to_the_rotation_agree(polar, shape):
    base, experts = family(*shape)
    expected = orthomerge_tensor(base, experts, OrthoSettings(residual="ta"))[0]
    got = orthomerge_tensor(base, experts, OrthoSettings(residual="ta", polar=polar))[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-8)


def test_products_of_blocks_equal_the_solver(monkeypatch):
    base, experts = family(90, 80)
    expected = orthomerge_tensor(base, experts, OrthoSettings(residual="ta"))[0]
    monkeypatch.setattr(turning_module, "_BLOCKED_FROM", 2)
    got = orthomerge_tensor(base, experts, OrthoSettings(residual="ta"))[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


def test_portions_change_nothing(monkeypatch):
    base, experts = family(90, 30, dtype=torch.float32)
    everything = [OrthoSettings(v, r) for v in "GC" for r in ("ta", "ties", "dare", "tsvm")]
    whole = [orthomerge_tensor(base, experts, s, name="a.weight")[0] for s in everything]
    monkeypatch.setattr(turning_module, "PORTION", 120)
    monkeypatch.setattr(import_module("stiefel.merge.prepared"), "_KEPT", 0)
    for expected, chosen in zip(whole, everything, strict=True):
        got, _ = orthomerge_tensor(base, experts, chosen, name="a.weight")
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_large_tensors_in_float32(monkeypatch):
    base, experts = family(30, 20)
    expected = orthomerge_tensor(base, experts)[0]
    monkeypatch.setattr(import_module("stiefel.merge.prepared"), "_SMALL", 0)
    monkeypatch.setattr(turning_module, "FLOAT64_UP_TO", 0)
    got, report = orthomerge_tensor(base.float(), [w.float() for w in experts])
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-5)
    assert report.map == "cayley"


def test_tsvm_keeps_few_directions():
    parts = [normal(6, 1, seed=i) @ normal(1, 8, seed=9 + i) for i in range(3)]
    merged = tsvm(parts)
    assert int(torch.linalg.matrix_rank(merged)) <= 6
    torch.testing.assert_close(tsvm([parts[0]]), parts[0])
    values = torch.stack([torch.linalg.matrix_norm(p, 2) for p in parts]).sort(descending=True)
    torch.testing.assert_close(torch.linalg.svdvals(merged)[:3].sum(), values.values.sum(),
                               rtol=0.2, atol=0)  # fmt: skip
    a, b = torch.zeros(4, 4), torch.zeros(4, 4)
    a[0, 0], b[1, 1] = 3.0, 2.0  # already orthogonal: nothing to change
    torch.testing.assert_close(tsvm([a, b]), a + b)
    torch.testing.assert_close(tsvm([a, b], [1, 2]), a + 2 * b)
    assert torch.equal(tsvm([torch.ones(3), 3 * torch.ones(3)]), 2 * torch.ones(3))


# State dicts.


def model(seed=0, dtype=torch.float32):
    return {
        "a.weight": normal(12, 8, seed=seed, dtype=dtype),
        "a.bias": normal(12, seed=seed + 100, dtype=dtype),
        "input_layernorm.weight": normal(8, seed=seed + 200, dtype=dtype),
        "conv.weight": normal(4, 3, 2, 2, seed=seed + 300, dtype=dtype),
        "steps": torch.tensor(7),
    }


def test_models_are_merged_tensor_by_tensor():
    base = model()
    experts = [
        {k: v + 0.1 * w if v.is_floating_point() else v for (k, v), w in
         zip(base.items(), model(seed).values(), strict=True)}
        for seed in (1, 2)
    ]  # fmt: skip
    merged = orthomerge(base, experts, residual="ta")
    assert list(merged) == list(base)
    assert {k: v.dtype for k, v in merged.items()} == {k: v.dtype for k, v in base.items()}
    mean = task_arithmetic(base, experts, scale=0.5)
    for name in ("a.bias", "input_layernorm.weight", "conv.weight"):
        torch.testing.assert_close(merged[name], mean[name])  # R = I
    assert not torch.allclose(merged["a.weight"], mean["a.weight"], atol=1e-3)
    alone, _ = orthomerge_tensor(
        base["a.weight"], [e["a.weight"] for e in experts], OrthoSettings(residual="ta")
    )
    assert torch.equal(merged["a.weight"], alone)
    for choice in ({"exclude": ["a."]}, {"include": ["b."]}):
        kept = orthomerge(base, experts, residual="ta", **choice)
        torch.testing.assert_close(kept["a.weight"], mean["a.weight"])
    named = orthomerge(base, experts, residual="ta", include=["a.w"])
    assert torch.equal(named["a.weight"], merged["a.weight"])


def test_what_is_turned():
    matrix = torch.zeros(3, 3)
    assert is_turned("model.embed_tokens.weight", matrix)
    assert not is_turned("input_layernorm.weight", matrix)
    assert not is_turned("a.bias", matrix)
    assert not is_turned("a.weight", torch.zeros(3))


def test_ties_over_the_whole_model():
    base = {"a.weight": normal(9, 5), "b.weight": normal(7, 9, seed=1)}
    experts = [
        {k: v + s * normal(*v.shape, seed=i) for (k, v), s in
         zip(base.items(), (0.3, 0.01), strict=True)}
        for i in (2, 3)
    ]  # fmt: skip
    merged = orthomerge(base, experts, threshold="model", density=0.3)
    # Rests of b are small: only those of a are kept, so b is turned and nothing else.
    torch.testing.assert_close(
        torch.linalg.svdvals(merged["b.weight"]), torch.linalg.svdvals(base["b.weight"]),
        rtol=0, atol=1e-4,
    )  # fmt: skip
    single = orthomerge(base, experts, density=0.3)
    assert not torch.allclose(single["b.weight"], merged["b.weight"], atol=1e-4)
    one = {"a.weight": base["a.weight"]}, [{"a.weight": e["a.weight"]} for e in experts]
    torch.testing.assert_close(
        orthomerge(*one, threshold="model")["a.weight"], orthomerge(*one)["a.weight"]
    )


def test_dare_follows_its_generator():
    base, experts = {"a.weight": normal(9, 5)}, [{"a.weight": normal(9, 5, seed=1)}]

    def run(seed):
        g = None if seed is None else torch.Generator().manual_seed(seed)
        return orthomerge(base, experts, residual="dare", density=0.5, generator=g)["a.weight"]

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert torch.equal(run(None), run(None))


def test_what_does_not_fit_is_named():
    base, experts = family(6, 4)
    as_dict = [{"a.weight": w} for w in experts]
    with pytest.raises(ValueError, match="models must not be empty"):
        orthomerge({"a.weight": base}, [])
    with pytest.raises(ValueError, match="experts must not be empty"):
        orthomerge_tensor(base, [])
    with pytest.raises(ValueError, match=r"experts\[1\] of 'a.weight' has shape \(4, 6\)"):
        orthomerge({"a.weight": base}, [as_dict[0], {"a.weight": experts[1].T}])
    with pytest.raises(ValueError, match=r"experts\[0\] of 'a.weight' must be finite"):
        orthomerge({"a.weight": base}, [{"a.weight": experts[0] / 0}])
    with pytest.raises(TypeError, match=r"'n' is torch\.int64 and differs"):
        orthomerge({"n": torch.tensor(1)}, [{"n": torch.tensor(2)}])
    with pytest.raises(ValueError, match="only matrices can be turned"):
        orthomerge_tensor(base[0], [experts[0][0]], turn=True, name="a.bias")
    with pytest.raises(ValueError, match="threshold must be"):
        orthomerge({"a.weight": base}, as_dict, threshold="layer")
    for wrong in (
        {"variant": "D"}, {"residual": "tas"}, {"map": "exp"}, {"polar": "qr"}, {"density": 0},
        {"residual_scale": math.nan}, {"intensity": math.inf},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"must be (one of|in|finite)"):
            OrthoSettings(**wrong)
    with pytest.raises(ValueError, match=r"residual must return shape \(6, 4\)"):
        orthomerge_tensor(base, experts, OrthoSettings(residual=lambda rests: rests[0].T))


def test_inputs_are_not_modified_and_out_is_filled():
    base, experts = family(6, 4)
    copies = [x.clone() for x in (base, *experts)]
    out = torch.zeros(6, 4)
    got, _ = orthomerge_tensor(base, experts, out=out)
    assert got is out
    torch.testing.assert_close(out, orthomerge_tensor(base, experts)[0].float())
    assert all(map(torch.equal, copies, (base, *experts)))
