import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.nn import associative_scan
from stiefel.nn.scan import _doubling, scan

DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def parts(shape, dtype, varying, seed=0):
    """Factors inside the unit circle, drives and a start."""
    g = generator(seed)
    width = shape[-1]
    a = torch.randn(shape if varying else (width,), dtype=dtype, generator=g)
    a = a / (1 + a.abs())
    b = torch.randn(shape, dtype=dtype, generator=g)
    return a, b, torch.randn(*shape[:-2], width, dtype=dtype, generator=g)


def loop(a, b, start=None, reverse=False):
    """The definition."""
    length = b.shape[-2]
    x = torch.zeros_like(b[..., 0, :]) if start is None else start
    states = [x] * length
    for k in reversed(range(length)) if reverse else range(length):
        x = (a if a.ndim == 1 else a[..., k, :]) * x + b[..., k, :]
        states[k] = x
    return torch.stack(states, dim=-2)


@given(
    length=st.integers(1, 90),
    chunk=st.integers(2, 40),
    batch=st.sampled_from([(), (3,), (2, 1, 2)]),
    width=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    varying=st.booleans(),
    reverse=st.booleans(),
    started=st.booleans(),
)
@settings(max_examples=120, deadline=None)
def test_scan_is_the_loop(length, chunk, batch, width, dtype, varying, reverse, started):
    a, b, start = parts((*batch, length, width), dtype, varying, seed=length)
    expected = loop(a, b, start if started else None, reverse)
    tolerance = 1e-12 if dtype in (torch.float64, torch.complex128) else 2e-5
    if not started:
        found = associative_scan(a, b, reverse=reverse, chunk=chunk)
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    found = scan(a, b, start if started else None, reverse=reverse, chunk=chunk)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    twin = _doubling(a, b, start if started else None, reverse)
    torch.testing.assert_close(twin, expected, atol=tolerance, rtol=tolerance)


@given(st.integers(1, 40), st.integers(1, 40), st.booleans())
@settings(max_examples=30, deadline=None)
def test_composition_is_associative(left, right, reverse):
    """A sequence cut anywhere: what one part ends with starts the other."""
    a, b, _ = parts((2, left + right, 3), torch.complex128, varying=True, seed=left)
    whole = associative_scan(a, b, reverse=reverse)
    cuts = [slice(left, None), slice(0, left)] if reverse else [slice(0, left), slice(left, None)]
    state, found = None, []
    for cut in cuts:
        found.append(scan(a[:, cut], b[:, cut], state, reverse=reverse, chunk=8))
        state = found[-1][:, 0 if reverse else -1]
    torch.testing.assert_close(torch.cat(found[::-1] if reverse else found, dim=1), whole)


def test_thousands_of_steps_in_float32_are_more_exact_than_the_loop():
    """A memory of 10,000 steps: the loop carries its rounding errors along, chunks do not."""
    a, b, _ = parts((2, 2048, 8), torch.complex64, varying=False)
    a = 0.9999 * a / a.abs()
    exact = loop(a.to(torch.complex128), b.to(torch.complex128))
    naive = (loop(a, b) - exact).abs().max()
    assert (associative_scan(a, b) - exact).abs().max() < 0.6 * naive
    assert (associative_scan(a.expand_as(b), b) - exact).abs().max() < 0.6 * naive
    assert (_doubling(a, b, None, False) - exact).abs().max() < naive


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_and_their_gradients(dtype, varying, reverse):
    leaves = [x.requires_grad_() for x in parts((1, 5, 2), dtype, varying)]

    def function(a, b, start):
        return scan(a, b, start, reverse=reverse, chunk=2)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_gradients_are_those_of_the_loop():
    for varying in (False, True):
        a, b, _ = parts((3, 101, 4), torch.complex128, varying)
        weights = torch.randn(3, 101, 4, dtype=torch.float64, generator=generator(1))
        found = []
        for function in (associative_scan, loop):
            leaves = [a.clone().requires_grad_(), b.clone().requires_grad_()]
            (function(*leaves).abs().square() * weights).sum().backward()
            found.append([x.grad for x in leaves])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_only_what_is_asked_for_is_differentiated():
    a, b, start = parts((2, 9, 3), torch.float64, varying=False)
    associative_scan(a.requires_grad_(), b).sum().backward()
    assert b.grad is None
    associative_scan(a.detach(), b.requires_grad_()).sum().backward()
    assert b.grad is not None
    start.requires_grad_()
    scan(a.detach(), b.detach(), start).sum().backward()
    powers = torch.stack([a.detach() ** k for k in range(1, 10)]).sum(0)
    torch.testing.assert_close(start.grad, powers.expand(2, 3))


def test_real_and_complex_go_together():
    a, b, _ = parts((2, 33, 3), torch.float64, varying=False)
    turned = a.to(torch.complex128) * 1j
    for left, right in ((turned, b), (a, b.to(torch.complex128) * 1j), (a.float(), b)):
        left = left.clone().requires_grad_()
        found = associative_scan(left, right)
        assert found.dtype == torch.promote_types(left.dtype, right.dtype)
        torch.testing.assert_close(found, loop(left.to(found.dtype), right.to(found.dtype)))
        found.abs().sum().backward()
        assert left.grad.dtype == left.dtype


def test_factors_are_broadcast_over_the_batch():
    a, b, _ = parts((4, 50, 3), torch.float64, varying=True)
    a = a[0].requires_grad_()
    torch.testing.assert_close(associative_scan(a, b), loop(a.expand_as(b), b))
    associative_scan(a, b).sum().backward()
    twin = a.detach().clone().requires_grad_()
    loop(twin.expand_as(b), b).sum().backward()
    torch.testing.assert_close(a.grad, twin.grad)
    one = associative_scan(a[None], b)
    torch.testing.assert_close(one, associative_scan(a, b))


def test_views_conjugates_and_strides():
    a, b, _ = parts((3, 40, 5), torch.complex128, varying=False)
    turned = b.transpose(0, 2).contiguous().transpose(0, 2)
    torch.testing.assert_close(associative_scan(a, turned), loop(a, b))
    torch.testing.assert_close(associative_scan(a.conj(), b.conj()), loop(a, b).conj())
    before = b.clone()
    associative_scan(a, b)
    assert torch.equal(b, before)
    # What comes back from a sum is one number with stride 0.
    associative_scan(a, b.requires_grad_()).real.sum().backward()
    exact = loop(a.conj(), torch.ones_like(b), reverse=True)
    torch.testing.assert_close(b.grad, exact)


def test_zero_factors_leave_the_drives():
    _, b, _ = parts((2, 70, 3), torch.float64, varying=False)
    assert torch.equal(associative_scan(torch.zeros(3, dtype=b.dtype), b), b)
    ones = associative_scan(torch.ones(3, dtype=b.dtype), b)
    torch.testing.assert_close(ones, b.cumsum(-2))


def test_meta_tensors_have_shapes():
    found = associative_scan(torch.empty(3, device="meta"), torch.empty(2, 70, 3, device="meta"))
    assert found.shape == (2, 70, 3)


A, B = torch.ones(3), torch.ones(2, 5, 3)


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "a must be floating", (A.long(), B)),
        (TypeError, "b must be floating", (A, B.bool())),
        (ValueError, "L ≥ 1", (A, torch.ones(3))),
        (ValueError, "L ≥ 1", (A, torch.ones(2, 0, 3))),
        (ValueError, "a must be", (torch.ones(4), B)),
        (ValueError, "a must be", (torch.ones(1, 3), B)),
        (ValueError, "a must be", (torch.ones(3, 5, 3), B)),
        (ValueError, "a must be", (torch.ones(1, 2, 5, 3), B)),
        (ValueError, "a must be", (torch.tensor(1.0), B)),
        (ValueError, "chunk must be", (A, B, False, 1)),
        (ValueError, "a must be finite", (A * torch.nan, B)),
        (ValueError, "b must be finite", (A, B * torch.inf)),
    ],
)
def test_bad_arguments(error, match, arguments):
    with pytest.raises(error, match=match):
        associative_scan(*arguments)


def test_large_finite_numbers_are_allowed():
    big = torch.full((1, 3, 2), 3e38)
    assert torch.equal(associative_scan(torch.zeros(2), big), big)
