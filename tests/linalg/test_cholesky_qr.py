import pytest
import torch

from stiefel.linalg.cholesky_qr import orthonormal_factor, shifted_cholesky_qr


def with_condition(m, condition, generator, dtype=torch.float32, n=None):
    """m × n matrix with logarithmically spaced singular values."""
    n = m if n is None else n
    u = torch.linalg.qr(torch.randn(m, n, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    s = condition ** -torch.linspace(0, 1, n, dtype=torch.float64)
    return ((u * s) @ v.mT).to(dtype)


def error(q):
    q = q.double()
    eye = torch.eye(q.shape[-1], dtype=q.dtype)
    return (q.mT @ q - eye).abs().amax((-2, -1))


def signed_qr(a):
    """Householder QR with a positive diagonal of R, which makes it unique."""
    q, r = torch.linalg.qr(a)
    return q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]


# One pass on 128 × 128 in float32 is off by .0087, .35, .81, .94; two with a shift in each by
# 1.3e-5, 2.0e-5, 4.2e-4, .56.
@pytest.mark.parametrize(
    ("condition", "one", "two"),
    [(1e2, 0.0087, 1.3e-5), (1e3, 0.35, 2.0e-5), (1e4, 0.81, 4.2e-4)],
)
def test_two_passes_are_orthonormal_where_one_is_not(condition, one, two, generator):
    a = with_condition(128, condition, generator)
    q, ok = shifted_cholesky_qr(a, passes=1)
    assert one / 3 < error(q) < 3 * one
    assert not ok
    q, ok = shifted_cholesky_qr(a)
    assert error(q) < two
    assert ok


def test_the_flag_is_the_error(generator):
    stack = torch.stack([with_condition(48, 10.0**k, generator) for k in range(0, 13, 2)])
    q, ok = shifted_cholesky_qr(stack)
    assert ok.tolist() == [bool(e <= 1e-3) for e in error(q)]
    assert ok[0]
    assert not ok[-1]


@pytest.mark.parametrize("shape", [(5, 5), (9, 4), (1, 1), (3, 2, 7, 3)])
def test_it_is_the_q_of_qr(shape, generator):
    a = torch.randn(shape, generator=generator, dtype=torch.float64)
    q, ok = shifted_cholesky_qr(a, shift=0.0)
    assert ok.shape == shape[:-2]
    assert ok.all()
    torch.testing.assert_close(q, signed_qr(a), atol=1e-12, rtol=0)
    # The shift moves column spaces little: span(Q) is span(A) exactly, columns within it by ε κ².
    q, ok = shifted_cholesky_qr(a)
    assert ok.all()
    assert error(q).max() < 1e-12
    torch.testing.assert_close(q @ (q.mT @ a), a, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(q, signed_qr(a), atol=1e-3, rtol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_scale_changes_nothing(scale, generator):
    a = torch.randn(16, 16, generator=generator)
    q, ok = shifted_cholesky_qr(a * scale)
    assert ok
    torch.testing.assert_close(q, shifted_cholesky_qr(a)[0], atol=1e-4, rtol=0)


def test_matrices_of_a_stack_do_not_meet(generator):
    """A norm over the whole stack would shift the small matrix away, and NaN would spread."""
    a = torch.randn(4, 12, 12, generator=generator)
    a[1] *= 1e-15
    a[2] = 0
    a[3, 0, 0] = torch.nan
    q, ok = shifted_cholesky_qr(a)
    assert ok.tolist() == [True, True, False, False]
    for i in (0, 1):
        torch.testing.assert_close(q[i], shifted_cholesky_qr(a[i])[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_deficient_matrices_are_reported_and_fall_back_alone(rank, generator):
    a = torch.randn(3, 8, 8, generator=generator)
    left = torch.randn(8, rank, generator=generator)
    a[1] = left @ torch.randn(rank, 8, generator=generator)
    q, ok = shifted_cholesky_qr(a)
    # Rounding may leave a basis even of a deficient matrix; then it is one.
    assert ok.tolist() == [bool(e <= 1e-3) for e in error(q)]
    assert rank == 1 or not ok[1]
    full = orthonormal_factor(a, "scqr")
    assert error(full).max() <= 1e-3
    assert torch.equal(full[0], q[0])
    if ok[1]:
        assert torch.equal(full[1], q[1])
    assert error(orthonormal_factor(a, "qr")).max() < 1e-5


def test_dependent_columns_do_not_hang_on_the_last_bit(generator):
    a = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    a[:, 2] = a[:, 0] - 2 * a[:, 1]
    q = orthonormal_factor(a)
    for scale in (3.7, 0.3):
        torch.testing.assert_close(orthonormal_factor(a * scale), q, atol=1e-12, rtol=0)
    assert error(q) < 1e-12
    torch.testing.assert_close(q[:, 0].abs(), a[:, 0].abs() / a[:, 0].norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype, generator):
    a = torch.randn(2, 6, 6, generator=generator).to(dtype)
    before = a.clone()
    q, ok = shifted_cholesky_qr(a)
    assert q.dtype == dtype
    assert ok.all()
    assert torch.equal(a, before)
    assert error(q).max() < 4 * torch.finfo(dtype).eps + 1e-12


def test_empty():
    for shape in ((0, 0), (0, 3, 3), (4, 0)):
        q, ok = shifted_cholesky_qr(torch.zeros(shape))
        assert q.shape == shape
        assert ok.all()


def test_gradcheck(generator):
    a = torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: shifted_cholesky_qr(x, shift=0.0)[0], a)


def test_bad_inputs():
    square = torch.eye(3)
    with pytest.raises(ValueError, match=r"at least as many rows as columns, got \(2, 3\)"):
        shifted_cholesky_qr(torch.ones(2, 3))
    with pytest.raises(ValueError, match="shift must be finite and ≥ 0, got -1"):
        shifted_cholesky_qr(square, shift=-1.0)
    with pytest.raises(ValueError, match="passes must be ≥ 1, got 0"):
        shifted_cholesky_qr(square, passes=0)
    for wrong in (square[0], torch.ones(3, 3, dtype=torch.int64)):
        with pytest.raises(TypeError):
            shifted_cholesky_qr(wrong)
