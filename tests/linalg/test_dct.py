import subprocess
import sys
import threading
from importlib import import_module

import numpy as np
import pytest
import scipy.fft
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.linalg.dct import dct, dct_matrix, idct

# The package exports the function of the same name, so the module needs its full path.
module = import_module("stiefel.linalg.dct")
TYPES = (2, 3)
# Torch's own forward-mode rules use it on first use.
jit_warning = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")


def slow_matrix(n):
    """The definition, one cosine at a time."""
    matrix = torch.empty(n, n, dtype=torch.float64)
    for i in range(n):
        c = np.sqrt(0.5) if i == 0 else 1.0
        for j in range(n):
            matrix[i, j] = c * np.sqrt(2 / n) * np.cos(np.pi * i * (2 * j + 1) / (2 * n))
    return matrix


def fft_path(x, kind):
    """The differentiable route, which plain CPU tensors otherwise bypass."""
    return module._dct2_torch(x) if kind == 2 else module._dct3_torch(x)


def test_exact_values_of_the_sheet():
    x4 = torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)
    x5 = torch.tensor([1.0, 2, 3, 4, 5], dtype=torch.float64)
    expected = [
        (x4, 2, [5.0, -2.2304424974, 0.0, -0.1585126678]),
        (x5, 2, [6.7082039325, -3.149499889, 0.0, -0.2839902278, 0.0]),
        (x4, 3, [4.3889551652, -3.0719298296, 1.0719298296, -0.3889551652]),
    ]
    for x, kind, values in expected:
        for got in (dct(x, type=kind), fft_path(x, kind)):
            torch.testing.assert_close(got.tolist(), values, rtol=0, atol=1e-10)
    rows = [
        [0.5, 0.5, 0.5, 0.5],
        [0.6532814824, 0.2705980501, -0.2705980501, -0.6532814824],
        [0.5, -0.5, -0.5, 0.5],
        [0.2705980501, -0.6532814824, 0.6532814824, -0.2705980501],
    ]
    got = dct_matrix(4, dtype=torch.float64).tolist()
    torch.testing.assert_close(got, rows, rtol=0, atol=1e-10)


def test_column_scores_of_the_sheet():
    i, j = torch.meshgrid(torch.arange(1.0, 7), torch.arange(1.0, 5), indexing="ij")
    scores = dct(torch.cos(0.7 * i.double() * j.double())).abs().sum(0)
    expected = [1.494417036, 3.4059850567, 3.7869562012, 4.3633688038]
    torch.testing.assert_close(scores.tolist(), expected, rtol=0, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 70),
    rows=st.integers(1, 3),
    kind=st.sampled_from(TYPES),
    seed=st.integers(0, 2**31),
)
def test_both_routes_agree_with_scipy_and_the_definition(n, rows, kind, seed):
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, n)))
    basis = slow_matrix(n) if kind == 2 else slow_matrix(n).mT
    reference = torch.from_numpy(scipy.fft.dct(x.numpy(), type=kind, norm="ortho"))
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(dct(x, type=kind), reference, **close)
    torch.testing.assert_close(fft_path(x, kind), reference, **close)
    torch.testing.assert_close(x @ basis.mT, reference, **close)
    torch.testing.assert_close(dct_matrix(n, type=kind, dtype=torch.float64), basis, **close)
    torch.testing.assert_close(idct(dct(x, type=kind), type=kind), x, **close)
    # Parseval
    torch.testing.assert_close(dct(x, type=kind).square().sum(), x.square().sum())


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
@pytest.mark.parametrize("kind", TYPES)
def test_any_dimension_and_strides(dim, kind, generator):
    x = torch.randn(4, 5, 6, generator=generator, dtype=torch.float64).transpose(0, 2)
    before = x.clone()
    expected = torch.from_numpy(scipy.fft.dct(x.numpy(), type=kind, axis=dim, norm="ortho"))
    torch.testing.assert_close(dct(x, dim=dim, type=kind), expected)
    watched = x.clone().requires_grad_()
    torch.testing.assert_close(dct(watched, dim=dim, type=kind).detach(), expected)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 3e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)],
)
@pytest.mark.parametrize("grad", [False, True])
def test_every_dtype(dtype, tolerance, grad, generator):
    x = torch.randn(8, 1024, generator=generator).to(dtype)
    reference = scipy.fft.dct(x.double().numpy(), norm="ortho")
    got = dct(x.clone().requires_grad_(grad)).detach()
    assert got.dtype == dtype
    np.testing.assert_allclose(got.double().numpy(), reference, rtol=tolerance, atol=tolerance)


def test_half_types_are_rounded_once(generator):
    x = torch.randn(3, 40, generator=generator).bfloat16()
    assert torch.equal(dct(x), dct(x.float()).bfloat16())


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), (0, 0)])
@pytest.mark.parametrize("function", [dct, idct])
def test_empty(shape, function):
    for grad in (False, True):
        x = torch.zeros(shape, requires_grad=grad)
        assert function(x).shape == shape
    assert dct_matrix(0).shape == (0, 0)


def test_length_one_is_the_identity():
    x = torch.tensor([[2.0], [-3.0]], dtype=torch.float64)
    for kind in TYPES:
        torch.testing.assert_close(dct(x, type=kind), x)
        torch.testing.assert_close(fft_path(x, kind), x)


@jit_warning
@pytest.mark.parametrize("n", [1, 2, 5, 6])
@pytest.mark.parametrize("kind", TYPES)
def test_gradients(n, kind, generator):
    x = torch.randn(2, n, generator=generator, dtype=torch.float64, requires_grad=True)

    def function(x):
        return dct(x, dim=-1, type=kind) ** 3

    assert torch.autograd.gradcheck(function, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, x)


def test_gradient_is_the_inverse_transform(generator):
    x, g = torch.randn(2, 3, 9, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(dct(x), x, g)
    torch.testing.assert_close(grad, idct(g))


@jit_warning
def test_transforms_that_watch_are_not_bypassed(generator):
    x, tangent = torch.randn(2, 3, 8, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(dct)(x), dct(x))
    value, derivative = torch.func.jvp(dct, (x,), (tangent,))
    torch.testing.assert_close(value, dct(x))
    torch.testing.assert_close(derivative, dct(tangent))
    with torch.autograd.forward_ad.dual_level():
        dual = dct(torch.autograd.forward_ad.make_dual(x, tangent))
        derivative = torch.autograd.forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(derivative, dct(tangent))
    jacobian = torch.func.jacrev(dct)(x[0])
    torch.testing.assert_close(jacobian, dct_matrix(8, dtype=torch.float64))


def test_compiles_without_a_graph_break():
    # In its own process: the compiler cannot look through the type checks of this test run.
    code = """
import torch
from stiefel.linalg.dct import dct, idct
x = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
compiled = torch.compile(lambda x: idct(dct(x) * 2), backend="aot_eager", fullgraph=True)
torch.testing.assert_close(compiled(x), 2 * x)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nan_stays_in_its_row():
    x = torch.ones(3, 6)
    x[1, 2] = torch.nan
    for y in (dct(x), fft_path(x, 2), fft_path(x, 3)):
        assert y[1].isnan().all()
        assert y[[0, 2]].isfinite().all()


def test_negated_views():
    z = torch.complex(torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64))
    view = z.conj().imag
    assert view.is_neg()
    torch.testing.assert_close(dct(view), -dct(z.imag.clone()))


@pytest.mark.parametrize("n", [1024, 4096])
def test_matrix_stays_orthogonal_in_float32(n):
    matrix = dct_matrix(n).double()
    some = torch.arange(0, n, n // 64)
    error = matrix[some] @ matrix.mT - torch.eye(n, dtype=torch.float64)[some]
    assert error.abs().max() <= 2e-6


def test_matrix_matches_the_transform(generator):
    x = torch.randn(7, 33, generator=generator, dtype=torch.float64)
    for kind in TYPES:
        matrix = dct_matrix(33, type=kind, dtype=torch.float64)
        torch.testing.assert_close(x @ matrix.mT, dct(x, type=kind))
    assert dct_matrix(8, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_plans_are_kept_and_bounded(generator):
    module._plans.clear()
    x = torch.randn(2, 10, generator=generator)
    first = module._plan(x)
    assert module._plan(x) is first
    assert module._plan(x.double()) is not first
    for n in range(1, 2 * module._MAX_PLANS):
        module._plan(torch.empty(n))
    assert len(module._plans) == module._MAX_PLANS
    assert (10, torch.float32, x.device) not in module._plans


def test_a_plan_from_inference_mode_serves_autograd():
    module._plans.clear()
    with torch.inference_mode():
        fft_path(torch.ones(11), 2)
    x = torch.ones(11, requires_grad=True)
    dct(x).sum().backward()
    torch.testing.assert_close(x.grad, idct(torch.ones(11)))


def test_threads_share_the_cache():
    module._plans.clear()
    failures = []

    def work():
        for n in range(1, 150):
            x = torch.ones(n, dtype=torch.float64)
            if not torch.allclose(fft_path(fft_path(x, 2), 3), x):
                failures.append(n)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(module._plans) <= module._MAX_PLANS


@pytest.mark.parametrize("function", [dct, idct])
def test_bad_inputs(function):
    with pytest.raises(ValueError, match="type must be 2 or 3, got 1"):
        function(torch.ones(3), type=1)
    with pytest.raises(ValueError, match="scalar"):
        function(torch.tensor(1.0))
    with pytest.raises(IndexError, match=r"dim must be in \[-2, 1\].*got 2"):
        function(torch.ones(3, 3), dim=2)
    for wrong in (torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.complex64)):
        with pytest.raises(TypeError):
            function(wrong)


def test_bad_matrix_arguments():
    with pytest.raises(ValueError, match="n must be at least 0, got -1"):
        dct_matrix(-1)
    with pytest.raises(ValueError, match="type must be 2 or 3"):
        dct_matrix(4, type=4)
    with pytest.raises(TypeError, match="dtype must be real floating point"):
        dct_matrix(4, dtype=torch.int32)
