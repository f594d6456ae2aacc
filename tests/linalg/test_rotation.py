import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.linalg import procrustes, procrustes_rotation
from stiefel.linalg.rotation import (
    SingularCayleyError,
    cayley,
    haar,
    inverse_cayley,
    rotation_exp,
    rotation_log,
    skew,
)

PI = math.pi
SEEDS = st.integers(0, 2**31)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_skew(*shape, seed=0, dtype=torch.float64):
    return skew(normal(*shape, seed=seed, dtype=dtype))


def turning(angles, n, seed=0):
    """Skew logarithm that turns orthogonal planes by these angles, and its exponential."""
    frame = haar(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    log, turn = torch.zeros(n, n, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    for i, angle in enumerate(angles):
        a, b = 2 * i, 2 * i + 1
        log[b, a], log[a, b] = angle, -angle
        turn[a, a] = turn[b, b] = math.cos(angle)
        turn[b, a], turn[a, b] = math.sin(angle), -math.sin(angle)
    return frame @ log @ frame.mT, frame @ turn @ frame.mT


def expm(q):
    """SciPy's exponential, one matrix at a time."""
    flat = q.double().reshape(-1, *q.shape[-2:])
    return torch.from_numpy(np.stack([scipy.linalg.expm(one.numpy()) for one in flat])).view(
        q.shape
    )


def orthogonality(r):
    r = r.double()
    return float((r.mT @ r - torch.eye(r.shape[-1], dtype=torch.float64)).abs().max())


# Cayley


def test_cayley_exact_values():
    t = math.tan(PI / 8)
    q = torch.tensor([[0, -t], [t, 0]], dtype=torch.float64)
    c = math.sqrt(0.5)
    expected = torch.tensor([[c, -c], [c, c]], dtype=torch.float64)
    torch.testing.assert_close(cayley(q), expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(inverse_cayley(expected), q, rtol=0, atol=1e-15)


def test_cayley_of_the_merged_rotation_of_the_sheet():
    rng = np.random.RandomState(0)
    v = [torch.from_numpy(rng.randn(3, 28) * 0.05 * (i + 1)) for i in range(3)]
    merged = sum(v) * sum(x.norm() for x in v) / sum(v).norm() / 3
    assert float(merged.sum()) == pytest.approx(0.27273014367629245, abs=1e-13)
    upper = torch.zeros(3, 8, 8, dtype=torch.float64)
    rows, cols = torch.triu_indices(8, 8, 1)
    upper[:, rows, cols] = merged
    r = cayley(upper - upper.mT)
    assert float(r.sum()) == pytest.approx(20.842039706949837, abs=1e-12)
    expected = [0.8369699375994513, 0.35450148180527846, 0.2651932315092652]
    assert r[0, 0, :3].tolist() == pytest.approx(expected, abs=1e-13)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 12), scale=st.floats(1e-8, 3), seed=SEEDS)
def test_cayley_round_trip(n, scale, seed):
    q = random_skew(2, n, n, seed=seed) * scale
    r = cayley(q)
    assert orthogonality(r) <= 1e-14 * (1 + float(q.norm()))
    torch.testing.assert_close(r.det(), torch.ones(2, dtype=torch.float64))
    back = inverse_cayley(r)
    assert float((back - q).norm()) <= 1e-13 * float(q.norm()) * (1 + float(q.norm()))
    assert torch.equal(back, -back.mT)
    # Change of basis, and the inverse.
    p = haar(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(cayley(skew(p @ q @ p.mT)), p @ r @ p.mT, rtol=0, atol=1e-11)
    torch.testing.assert_close(cayley(-q), r.mT, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_half_turns_have_no_cayley_coordinate(dtype):
    half_turn = torch.diag(torch.tensor([1.0, -1, -1])).to(dtype)
    batch = torch.stack([torch.eye(3).to(dtype), half_turn])
    with pytest.raises(SingularCayleyError, match=r"\(matrix \(1,\) of the batch\).*rotation_log"):
        inverse_cayley(batch)
    _, r = turning([PI - 1e-3, 0.4], 4)
    with pytest.raises(SingularCayleyError, match="eigenvalue -1"):
        inverse_cayley(turning([PI, 0.4], 4)[1].to(dtype))
    if dtype != torch.bfloat16:
        assert torch.linalg.matrix_norm(inverse_cayley(r.to(dtype)), 2) == pytest.approx(
            2e3, rel=1e-2
        )


# Exponential and logarithm


@pytest.mark.parametrize("norm", [1e-12, 1e-4, 0.01, 0.03, 0.3, 0.9, 1.0, 3.9, 4.0, 30.0])
@pytest.mark.parametrize(("dtype", "eps"), [(torch.float64, 2e-16), (torch.float32, 1.2e-7)])
@pytest.mark.parametrize("n", [3, 5, 24])  # SciPy's closed form for n = 2 is less accurate
def test_exp_agrees_with_scipy(n, norm, dtype, eps):
    q = random_skew(n, n, seed=n)
    q = (q * (norm / torch.linalg.matrix_norm(q, 1))).to(dtype)
    batch = torch.stack([q, 40 * q / norm])
    for got in (rotation_exp(q), rotation_exp(batch)[0]):
        assert got.dtype == dtype
        assert float((got - expm(q)).abs().max()) <= 16 * eps * (1 + norm)
        assert orthogonality(got) <= 16 * eps * (1 + norm)
    torch.testing.assert_close(rotation_exp(-q), rotation_exp(q).mT, rtol=0, atol=99 * eps)


@pytest.mark.parametrize("angle", [0.0, 1e-9, 0.04, 0.5, 0.95, 1.0, PI, 30.0])
def test_exp_of_a_plane_is_a_rotation_by_the_angle(angle):
    # 0.04 and 0.5 are where torch.linalg.matrix_exp loses digits of a single matrix.
    q = torch.tensor([[0.0, -angle], [angle, 0.0]], dtype=torch.float64)
    c, s = math.cos(angle), math.sin(angle)
    expected = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    close = {"rtol": 0, "atol": 2e-16 * (4 + angle)}
    torch.testing.assert_close(rotation_exp(q), expected, **close)
    close = {"rtol": 0, "atol": 1.2e-7 * (4 + angle)}
    torch.testing.assert_close(rotation_exp(q.float()).double(), expected, **close)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 12), largest=st.floats(1e-12, PI - 1e-3), seed=SEEDS)
def test_log_inverts_exp(n, largest, seed):
    rng = np.random.default_rng(seed)
    angles = largest * rng.random(n // 2)
    log, r = turning(angles, n, seed=seed)
    got = rotation_log(r)
    assert torch.equal(got, -got.mT)
    # Two planes near π are conditioned like 1 / their distance from it.
    conditioning = 1 / (PI - largest)
    assert float((got - log).abs().max()) <= 1e-13 * conditioning
    assert float((rotation_exp(got) - r).abs().max()) <= 1e-13


def test_log_agrees_with_scipy():
    for seed, n in enumerate((3, 6, 9)):
        r = expm(random_skew(n, n, seed=seed) * 0.5)
        reference = torch.from_numpy(np.asarray(scipy.linalg.logm(r.numpy())).real.copy())
        torch.testing.assert_close(rotation_log(r), reference, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "eps"), [(torch.float64, 2e-16), (torch.float32, 1.2e-7)])
@pytest.mark.parametrize("size", [1e-10, 1e-6, 1e-3])
def test_log_is_relatively_accurate_near_the_identity(size, dtype, eps):
    q = size * random_skew(7, 7, dtype=dtype)
    assert float((rotation_log(rotation_exp(q)) - q).norm()) <= 32 * eps * float(q.norm())


@pytest.mark.parametrize(("dtype", "eps"), [(torch.float64, 2e-16), (torch.float32, 1.2e-7)])
@pytest.mark.parametrize("distance", [0, 1e-15, 1e-12, 1e-8, 1e-7, 1e-4, 0.05, 0.099, 0.101, 0.2])
@pytest.mark.parametrize("planes", [1, 2, 3])
def test_log_near_half_turns(planes, distance, dtype, eps):
    angles = [PI - distance * (1 + i) for i in range(planes)] + [0.3]
    log, r = turning(angles, 9, seed=planes)
    got = rotation_log(r.to(dtype))
    assert float((rotation_exp(got) - r).abs().max()) <= 64 * eps
    largest = torch.linalg.matrix_norm(got, 2)
    assert float(largest) == pytest.approx(PI - distance, abs=64 * eps)
    if planes == 1 and distance > 100 * eps:
        # One plane near π is well conditioned; only its sense at π itself is free.
        assert float((got - log).abs().max()) <= 400 * eps


def test_log_of_minus_identity_and_of_a_mixed_batch():
    minus = -torch.eye(4, dtype=torch.float64)
    log = rotation_log(minus)
    torch.testing.assert_close(log @ log, PI**2 * minus)
    batch = torch.stack([torch.eye(4, dtype=torch.float64), minus, turning([1.0, 2.0], 4)[1]])
    logs = rotation_log(batch.view(3, 1, 4, 4))
    assert torch.equal(logs[0, 0], torch.zeros(4, 4, dtype=torch.float64))
    torch.testing.assert_close(logs[1, 0], log)
    torch.testing.assert_close(logs[2, 0], turning([1.0, 2.0], 4)[0])


@settings(max_examples=20, deadline=None)
@given(n=st.integers(2, 9), seed=SEEDS)
def test_log_is_equivariant(n, seed):
    r = rotation_exp(random_skew(n, n, seed=seed) * 0.3)
    p = haar(n, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    log = rotation_log(r)
    torch.testing.assert_close(rotation_log(p @ r @ p.mT), p @ log @ p.mT, rtol=0, atol=1e-12)
    torch.testing.assert_close(rotation_log(r.mT), -log, rtol=0, atol=1e-12)


# Procrustes


def loss(source, target, r):
    return float((source @ r - target).square().sum())


def slow_closest(source, target, rtol):
    """The sheet's rule word by word, one matrix, reflections allowed."""
    u, s, vh = np.linalg.svd((source.mT @ target).numpy())
    rank = int((s > rtol * s[0]).sum())
    left, right = u[:, rank:], vh[rank:].T
    a, _, bt = np.linalg.svd(left.T @ right)
    return torch.from_numpy(u[:, :rank] @ vh[:rank] + left @ a @ bt @ right.T)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 8), width=st.integers(1, 8), seed=SEEDS, proper=st.booleans())
def test_procrustes_is_optimal(rows, width, seed, proper):
    source, target = normal(2, rows, width, seed=seed)
    r = procrustes_rotation(source, target, proper=proper)
    assert orthogonality(r) <= 1e-13
    best = loss(source, target, r)
    others = torch.stack(
        [
            haar(width, generator=torch.Generator().manual_seed(seed + i), dtype=torch.float64)
            for i in range(20)
        ]
    )
    near = r @ rotation_exp(0.05 * random_skew(20, width, width, seed=seed))
    if proper:
        assert float(r.det()) == pytest.approx(1, abs=1e-12)
        others[..., 0] *= others.det()[:, None]
    for other in (*others, *near):
        assert best <= loss(source, target, other) + 1e-10


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(2, 9), width=st.integers(2, 9), seed=SEEDS)
def test_procrustes_recovers_a_rotation_and_is_equivariant(rows, width, seed):
    source = normal(rows, width, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    r = rotation_exp(0.05 * random_skew(width, width, seed=seed))
    got = procrustes_rotation(source, source @ r)
    assert loss(source, source @ r, got) <= 1e-20 * float(source.square().sum())
    if rows >= width and float(torch.linalg.cond(source)) < 100:
        torch.testing.assert_close(got, r, rtol=0, atol=1e-10)
    target = source @ r + 0.01 * normal(rows, width, seed=seed + 1)
    left = haar(rows, generator=generator, dtype=torch.float64)
    right = haar(width, generator=generator, dtype=torch.float64)
    base = procrustes_rotation(source, target)
    close = {"rtol": 0, "atol": 1e-8}
    if float(torch.linalg.cond(source)) < 100:
        torch.testing.assert_close(procrustes_rotation(left @ source, left @ target), base, **close)
        turned = procrustes_rotation(source @ right, target @ right)
        torch.testing.assert_close(turned, right.mT @ base @ right, **close)
        torch.testing.assert_close(procrustes_rotation(target, source), base.mT, **close)
        torch.testing.assert_close(procrustes_rotation(7 * source, target / 9), base, **close)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 5), extra=st.integers(1, 9), seed=SEEDS, proper=st.booleans())
def test_wide_form_equals_the_dense_form(rows, extra, seed, proper):
    width = 2 * rows + extra
    source, target = normal(2, rows, width, seed=seed)
    target = source + 0.3 * target
    dense = procrustes._optimal(source.mT @ target, proper, "closest", 1e-12)[0]
    fast = procrustes_rotation(source, target, proper=proper)
    torch.testing.assert_close(fast, dense, rtol=0, atol=1e-11)
    reference = slow_closest(source, target, 1e-12)
    if float(reference.det()) > 0:
        torch.testing.assert_close(fast, reference, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("rows", "width"), [(6, 8), (4, 8), (3, 8)])
def test_among_optimal_rotations_the_closest_to_identity(rows, width):
    source = normal(rows, width)
    target = source + 0.2 * normal(rows, width, seed=1)
    r = procrustes_rotation(source, target)
    eye = torch.eye(width, dtype=torch.float64)
    distance = float((r - eye).norm())
    free = torch.linalg.svd(target, full_matrices=True).Vh[rows:]
    null = free.shape[0]
    for seed in range(40):
        # Turning what the target does not see leaves the loss as it is.
        turn = rotation_exp(0.3 * random_skew(null, null, seed=seed))
        other = r @ (eye + free.mT @ (turn - torch.eye(null, dtype=torch.float64)) @ free)
        assert loss(source, target, other) == pytest.approx(loss(source, target, r), rel=1e-9)
        assert distance <= float((other - eye).norm()) + 1e-12


@pytest.mark.parametrize("rows", [32, 24])
def test_wide_matrices_in_float32_are_not_noise(rows):
    # The sheet's 32 x 64 example gave 8.17 with arbitrary null vectors.
    source = normal(rows, 64, dtype=torch.float32)
    target = source + 0.01 * normal(rows, 64, seed=1, dtype=torch.float32)
    eye = torch.eye(64)
    assert float((procrustes_rotation(source, target) - eye).norm()) < 0.2
    arbitrary = procrustes_rotation(source, target, null="svd", proper=False)
    u, _, vh = torch.linalg.svd(source.double().mT @ target.double())
    torch.testing.assert_close(arbitrary, (u @ vh).float())
    assert float((arbitrary - eye).norm()) > 2


def test_kabsch_flips_the_cheapest_direction():
    source = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    mirror = torch.diag(torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64))
    target = source @ mirror
    torch.testing.assert_close(procrustes_rotation(source, target, proper=False), mirror)
    expected = torch.diag(torch.tensor([-1.0, 1.0, -1.0], dtype=torch.float64))
    torch.testing.assert_close(procrustes_rotation(source, target), expected)
    # With a null direction the flip is free.
    source[2, 2] = target[2, 2] = 0
    torch.testing.assert_close(procrustes_rotation(source, target), expected)
    torch.testing.assert_close(procrustes_rotation(source, target, proper=False), mirror)


@pytest.mark.parametrize("shape", [(5, 4), (4, 4), (3, 4), (1, 4), (0, 4), (2, 1), (3, 0), (0, 0)])
def test_equal_or_zero_matrices_give_the_identity(shape):
    source = normal(*shape)
    eye = torch.eye(shape[1], dtype=torch.float64)
    torch.testing.assert_close(procrustes_rotation(source, source), eye, rtol=0, atol=1e-12)
    zero = torch.zeros_like(source)
    for s, t in ((zero, zero), (source, zero), (zero, source)):
        torch.testing.assert_close(procrustes_rotation(s, t), eye, rtol=0, atol=1e-12)


def test_dead_neurons_and_batches_of_mixed_rank():
    source = normal(3, 6, 6)
    source[0, 2:] = 0
    source[1, 5] = 0
    target = source @ rotation_exp(0.2 * random_skew(6, 6, seed=1))
    got = procrustes_rotation(source, target, proper=False)
    for i in range(3):
        expected = slow_closest(source[i], target[i], 1e-12)
        torch.testing.assert_close(got[i], expected, rtol=0, atol=1e-10)
    one_base = procrustes_rotation(source[2], target)
    torch.testing.assert_close(one_base[2], got[2], rtol=0, atol=1e-10)
    assert one_base.shape == (3, 6, 6)


# Haar


@pytest.mark.parametrize(("n", "m"), [(5, 5), (7, 3), (3, 7), (4, 1), (1, 1), (0, 3), (3, 0)])
def test_haar_is_orthonormal(n, m, generator):
    q = haar(n, m, generator=generator, dtype=torch.float64)
    assert q.shape == (n, m)
    gram = q.mT @ q if n >= m else q @ q.mT
    eye = torch.eye(min(n, m), dtype=torch.float64)
    torch.testing.assert_close(gram, eye, rtol=0, atol=1e-14)


def test_haar_moments(generator):
    n, samples = 3, 4000
    q = torch.stack(
        [haar(n, generator=generator, dtype=torch.float64).flatten() for _ in range(samples)]
    )
    # E q = 0 and E q_ij q_kl = 1/n on the diagonal; five standard errors.
    assert float(q.mean(0).abs().max()) <= 5 / math.sqrt(n * samples)
    second = q.mT @ q / samples
    target = torch.eye(n * n, dtype=torch.float64) / n
    assert float((second - target).abs().max()) <= 5 * 0.31 / math.sqrt(samples)
    # Equal chance for both determinants.
    sign = q.view(-1, n, n).det().sign().mean()
    assert abs(float(sign)) <= 5 / math.sqrt(samples)


def test_haar_entries_have_the_invariant_distribution(generator):
    # In three dimensions every entry is uniform on [-1, 1] (Archimedes), also after a turn.
    q = torch.stack([haar(3, generator=generator, dtype=torch.float64) for _ in range(2000)])
    turned = turning([1.1], 3)[1] @ q
    for sample in (q[:, 0, 0], q[:, 2, 2], turned[:, 0, 0], turned[:, 1, 2]):
        assert scipy.stats.kstest(sample.numpy(), scipy.stats.uniform(-1, 2).cdf).pvalue > 1e-4


def test_haar_arguments(generator):
    again = torch.Generator().manual_seed(0)
    assert torch.equal(haar(4, generator=generator), haar(4, generator=again))
    assert haar(3).dtype == torch.get_default_dtype()
    assert haar(3, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="at least 0, got -1 and 2"):
        haar(-1, 2)
    with pytest.raises(TypeError, match="dtype must be real floating point"):
        haar(2, dtype=torch.int64)


# All of them


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
def test_every_dtype(dtype, tolerance):
    q = (0.3 * random_skew(2, 3, 6, 6)).to(dtype)
    exact = q.double()
    close = {"rtol": tolerance, "atol": tolerance}
    for function in (cayley, rotation_exp, skew):
        got = function(q)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), function(exact), **close)
    r = rotation_exp(exact)
    for function in (inverse_cayley, rotation_log):
        got = function(r.to(dtype))
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), function(r), rtol=0, atol=3 * tolerance)
    source = normal(9, 6).to(dtype)
    target = (source.double() @ r[0, 0]).to(dtype)
    got = procrustes_rotation(source, target)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), r[0, 0], rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "function", [skew, cayley, inverse_cayley, rotation_exp, rotation_log], ids=lambda f: f.__name__
)
def test_shapes_and_bad_inputs(function):
    for shape in ((0, 0), (2, 0, 0), (0, 3, 3)):
        assert function(torch.zeros(shape)).shape == shape
    one = torch.ones(1, 1) if function in (inverse_cayley, rotation_log) else torch.zeros(1, 1)
    result = function(one)
    assert float(result) == (1.0 if function in (cayley, rotation_exp) else 0.0)
    with pytest.raises(ValueError, match=r"must be square \[..., n, n\], got shape \(2, 3\)"):
        function(torch.zeros(2, 3))
    for wrong in (torch.zeros(3), torch.zeros(3, 3, dtype=torch.int64), torch.zeros(2, 2) * 1j):
        with pytest.raises(TypeError):
            function(wrong)
    bad = torch.zeros(2, 3, 3)
    bad[1, 0, 2] = math.inf
    if function is skew:
        assert function(bad)[1, 0, 2].isinf()
        assert function(bad)[0].isfinite().all()
    else:
        with pytest.raises(ValueError, match="must be finite, but 1 of its 18 entries"):
            function(bad)


@pytest.mark.parametrize("function", [cayley, rotation_exp])
def test_what_is_not_skew_is_rejected(function):
    q = random_skew(2, 4, 4)
    for extreme in (1e-170, 1e170):  # squares leave the range of float64
        if function is cayley or extreme < 1:
            assert function(q * extreme).isfinite().all()
        with pytest.raises(ValueError, match="skew-symmetric"):
            function(extreme * torch.eye(4, dtype=torch.float64))
    if function is rotation_exp:
        with pytest.raises(ValueError, match="too large to keep a digit"):
            function(q * 1e17)
    q[1] += 1e-3 * torch.eye(4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"skew-symmetric \(matrix \(1,\) of the batch\)"):
        function(q)
    with pytest.raises(ValueError, match="skew-symmetric"):
        function(torch.eye(3))


def test_what_is_not_a_rotation_is_rejected():
    for function in (inverse_cayley, rotation_log):
        with pytest.raises(ValueError, match=r"must be orthogonal: .* 3.0e\+00, at most 1e-03"):
            function(2 * torch.eye(3))
    reflection = torch.stack([torch.eye(3), torch.diag(torch.tensor([1.0, 1, -1]))])
    with pytest.raises(ValueError, match=r"determinant is -1 \(matrix \(1,\) of the batch\)"):
        rotation_log(reflection)


def test_bad_procrustes_arguments():
    x = normal(4, 3)
    with pytest.raises(ValueError, match=r"one size, got shapes \(4, 3\) and \(3, 4\)"):
        procrustes_rotation(x, x.mT)
    with pytest.raises(TypeError, match=r"source is torch.float64 but target is torch.float32"):
        procrustes_rotation(x, x.float())
    with pytest.raises(ValueError, match="target must be finite"):
        procrustes_rotation(x, x * math.nan)
    with pytest.raises(ValueError, match="null must be 'closest' or 'svd', got 'any'"):
        procrustes_rotation(x, x, null="any")
    with pytest.raises(ValueError, match=r"rtol must be in \[0, 1\), got 1"):
        procrustes_rotation(x, x, rtol=1.0)


def test_inputs_are_not_modified():
    q, source, target = 0.2 * random_skew(5, 5), normal(3, 8), normal(3, 8, seed=1)
    r = turning([PI, 0.1], 5)[1]
    copies = [x.clone() for x in (q, source, target, r)]
    skew(q), cayley(q), rotation_exp(q), rotation_log(r)
    inverse_cayley(cayley(q)), procrustes_rotation(source, target)
    for before, after in zip(copies, (q, source, target, r), strict=True):
        assert torch.equal(before, after)


# Gradients


@pytest.mark.parametrize("scale", [1e-3, 0.5, 2.0])
def test_gradients_of_the_maps(scale):
    x = (scale * normal(2, 4, 4)).requires_grad_()
    for function in (cayley, rotation_exp):
        assert torch.autograd.gradcheck(lambda x, f=function: f(skew(x)), x)
        assert torch.autograd.gradgradcheck(lambda x, f=function: f(skew(x)), x)
    assert torch.autograd.gradcheck(lambda x: inverse_cayley(rotation_exp(skew(x))), x)
    y = (0.2 * normal(3, 3)).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: inverse_cayley(cayley(skew(x))), y)


@pytest.mark.parametrize(
    "angles", [[0.0, 0.0], [0.3, 0.3], [1.0, 2.5], [PI - 0.05, 1.0], [PI - 0.3, PI - 0.2]]
)
@pytest.mark.parametrize("n", [4, 5])
def test_gradient_of_log_along_the_group(angles, n):
    r = turning(angles, n)[1]
    x = torch.zeros(n, n, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotation_log(r @ rotation_exp(skew(x))), x)
    r.requires_grad_()
    (grad,) = torch.autograd.grad(rotation_log(r), r, normal(n, n))
    inside = r.mT @ grad
    torch.testing.assert_close(inside, -inside.mT, rtol=0, atol=1e-10)


def test_gradient_of_log_is_bounded_at_half_turns():
    r = turning([PI, PI, 0.2], 7)[1].requires_grad_()
    (grad,) = torch.autograd.grad(rotation_log(r), r, random_skew(7, 7))
    # Without the turning planes held fixed to each other it would be near 1e15.
    assert 0 < float(grad.norm()) < 100


@pytest.mark.parametrize("shape", [(5, 3), (4, 4), (2, 6, 3)])
def test_gradient_of_procrustes(shape):
    source, target = normal(*shape).requires_grad_(), normal(*shape, seed=1).requires_grad_()
    for proper in (True, False):
        assert torch.autograd.gradcheck(
            lambda s, t, p=proper: procrustes_rotation(s, t, proper=p), (source, target)
        )
    same = torch.eye(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(procrustes_rotation, (same, same.detach().clone()))
    with pytest.raises(RuntimeError, match="rank deficient"):
        procrustes_rotation(normal(2, 3).requires_grad_(), normal(2, 3))
