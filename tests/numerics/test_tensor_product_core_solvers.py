import math
from functools import reduce
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import jvp, vmap

from stiefel.numerics.tensor_product import (
    DiffusionOperator,
    FastDiagonalization,
    IncompatibleDataError,
    IncompatibleDataWarning,
    SingularOperatorError,
    grid1d,
    pencil_axis,
    poisson_solve,
)
from stiefel.numerics.tensor_product import transforms as tr

SIZES = (2, 3, 4)
CONDITIONS = ("dirichlet", "neumann", "periodic", "dirichlet-neumann", "neumann-dirichlet")
SCHEMES = ("fd2", "compact4", "compact6", "fv", ("bspline", 1), ("bspline", 3))
ALL = [(bc, s) for bc in CONDITIONS for s in SCHEMES if bc != "periodic" or "bspline" not in s]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def close(a, b, rtol=1e-12, atol=1e-12):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), rtol=rtol, atol=atol)


def axis(n, bc="dirichlet", scheme="fd2", length=1.0):
    if scheme == "fv":
        s = torch.linspace(0, 1, n + 1, dtype=torch.float64)
        scheme = ("fv", length * (s + 0.1 * torch.sin(2 * torch.pi * s) / (2 * torch.pi)))
    return grid1d(n, length, bc, scheme)


def identity_or_mass(a):
    return torch.eye(len(a), dtype=torch.float64) if a.mass is None else a.mass


def dense(axes, shift=0.0):
    """The assembled operator, term by term."""
    masses = [identity_or_mass(a) for a in axes]
    terms = [
        reduce(torch.kron, [a.stiffness if i == j else masses[i] for i, a in enumerate(axes)])
        for j in range(len(axes))
    ]
    return sum(terms) + shift * reduce(torch.kron, masses)


def test_poisson_exact():
    i, j, k = torch.meshgrid(*[torch.arange(n).double() for n in SIZES], indexing="ij")
    F = 1 + i + 2 * j + 3 * k
    U = poisson_solve(F)
    close(U[0, 0], [0.096912764571, 0.200862534001, 0.270088232365, 0.245381073962], atol=1e-12)
    close(U[1, 2], [0.181762329933, 0.30913259115, 0.378358289514, 0.330230639325], atol=1e-12)
    assert float(U.sum()) == pytest.approx(6.517896712292, abs=2e-12)
    for c, row, total in (
        (10, [0.063840279604, 0.139932247371, 0.197377472029, 0.190270534591], 4.828201479834),
        (-20, [0.488891381671, 0.865173670617, 0.980275601413, 0.719498785837], 22.555952808407),
    ):
        U = poisson_solve(F, [1, 1, 1], shift=c)
        close(U[0, 0], row)
        assert float(U.sum()) == pytest.approx(total, abs=2e-12)
    lowest = sum(float(grid1d(n).eigenvalues.min()) for n in SIZES)
    assert lowest == pytest.approx(27.921733283283, abs=1e-12)
    with pytest.raises(SingularOperatorError, match=r"27\.92173328"):
        poisson_solve(F, shift=-lowest)


def test_dirichlet_operator_is_the_textbook_matrix():
    n, h = 5, 1 / 6
    T = (2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)) / h**2
    a = grid1d(n)
    close(a.stiffness, T)
    k = np.arange(1, n + 1)
    close(a.eigenvalues, 4 / h**2 * np.sin(k * np.pi / 12) ** 2)
    close(a.eigenvectors, math.sqrt(2 / 6) * np.sin(np.outer(k, k) * np.pi / 6))
    close(a.points, h * k)
    neumann, ring = grid1d(n, bc="neumann"), grid1d(n, bc="periodic")
    assert torch.diagonal(neumann.stiffness).tolist() == pytest.approx([25, 50, 50, 50, 25])
    close(neumann.eigenvalues, 100 * np.sin((k - 1) * np.pi / 10) ** 2)
    close(ring.stiffness[0], [50, -25, 0, 0, -25])


@pytest.mark.parametrize(("bc", "scheme"), ALL)
def test_modes_diagonalise(bc, scheme):
    for n in (5, 6):
        a = axis(n, bc, scheme, 1.3)
        S, M, K = a.eigenvectors, identity_or_mass(a), a.stiffness
        close(S.mT @ M @ S, torch.eye(n))
        scale = float(K.abs().max())
        close(K @ S / scale, M @ S * a.eigenvalues / scale)
        assert a.points.diff().min() > 0
        assert 0 <= a.points.min() < a.points.max() <= 1.3
        assert a.constant == ("dirichlet" not in bc)
        if a.constant:
            assert a.eigenvalues[0] == 0
            close(K @ torch.ones(n).double() / scale, torch.zeros(n))


@pytest.mark.parametrize(("bc", "scheme"), ALL)
def test_solve_and_apply_are_the_assembled_matrix(bc, scheme):
    sizes = (5, 4, 6)
    axes = [axis(n, bc, scheme, 1 + 0.3 * i) for i, n in enumerate(sizes)]
    solver = FastDiagonalization(axes, 0.7)
    A, U = dense(axes, 0.7), randn(2, *sizes)
    F = (U.reshape(2, -1) @ A).reshape(U.shape)
    scale = float(F.abs().max())
    close(solver.apply(U) / scale, F / scale)
    close(solver.solve(F), U, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(4, 6), st.sampled_from(ALL)), min_size=1, max_size=4), st.data()
)
def test_any_mixture_of_axes(chosen, data):
    axes = [axis(n, *kind) for n, kind in chosen]
    batch = data.draw(st.sampled_from([(), (2,), (1, 2)]))
    solver = FastDiagonalization(axes, 1.5)
    U = randn(*batch, *solver.shape, seed=len(chosen))
    close(solver.solve(solver.apply(U)), U, atol=1e-9)


@pytest.mark.parametrize("basis", ["dst", "dct", "hartley"])
@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_fast_transforms_are_the_tables(basis, n):
    V, U = tr.basis_matrix(basis, n), randn(3, n, 2)
    watched = U.clone().requires_grad_()  # the way through torch.fft
    for x in (U, watched, torch.complex(U, U.flip(0))):
        for inverse, A in ((False, V.mT), (True, V)):
            found = tr.transform(x, 1, basis, inverse=inverse)
            close(found, torch.einsum("ij,bjc->bic", A.to(x.dtype), x))


@pytest.mark.parametrize("bc", ["dirichlet", "neumann", "periodic"])
def test_transforms_and_gemm_agree(bc):
    axes = [grid1d(n, 1.0, bc) for n in (5, 6, 7)]
    U = randn(5, 6, 7)
    gemm, fast = (FastDiagonalization(axes, 2.0, method=m) for m in ("gemm", "transform"))
    assert fast.transforms == [axes[0].basis] * 3
    close(gemm.solve(U), fast.solve(U))


@pytest.mark.parametrize(
    ("n", "bc", "fast"),
    [(96, "neumann", False), (127, "dirichlet", True), (128, "dirichlet", False),
     (128, "neumann", True), (427, "neumann", True), (640, "neumann", True),
     (100, "periodic", True), (101, "periodic", False), (401, "periodic", False),
     (127, "dirichlet-neumann", False)],
)  # fmt: skip
def test_rule_for_the_transform(n, bc, fast):
    assert (FastDiagonalization([grid1d(n, bc=bc)], 1.0).transforms[0] is not None) is fast


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_precisions(dtype):
    sizes = (12, 10, 11)
    solver = FastDiagonalization([grid1d(n) for n in sizes])
    wide = torch.complex128 if dtype.is_complex else torch.float64
    F = randn(*sizes, dtype=dtype)
    found, exact = solver.solve(F), solver.solve(F.to(wide))
    assert found.dtype == dtype
    if dtype.is_complex:
        close(exact.imag, solver.solve(F.to(wide).imag.contiguous()))
    # Refined: as near as float32 can be.
    limit = 1.2e-7 if dtype in (torch.float32, torch.complex64) else 1e-14
    assert float((found - exact).abs().max() / exact.abs().max()) < limit


def test_refinement_of_float32_helps():
    sizes = (40, 41, 42)
    axes = [grid1d(n, bc="neumann") for n in sizes]
    F = randn(*sizes, dtype=torch.float32)
    exact = FastDiagonalization(axes, 1e-3).solve(F.double())
    errors = [
        float((FastDiagonalization(axes, 1e-3, refine=r).solve(F) - exact).abs().max())
        for r in (True, False)
    ]
    assert 5 * errors[0] < errors[1]


def test_complex_shift():
    axes = [grid1d(n) for n in SIZES]
    solver, F = FastDiagonalization(axes, -40 + 3j), randn(*SIZES, dtype=torch.complex128)
    A = dense(axes).to(F.dtype) + (-40 + 3j) * torch.eye(24)
    close(solver.solve(F).reshape(-1), torch.linalg.solve(A, F.reshape(-1)))
    close(solver.apply(F).reshape(-1), A @ F.reshape(-1))
    with pytest.raises(TypeError, match="complex since shift is"):
        solver.solve(F.real.contiguous())


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
def test_derivatives():
    axes = [grid1d(3), grid1d(4, bc="neumann"), grid1d(3, bc="periodic", scheme="compact4")]
    U = randn(2, 3, 4, 3).requires_grad_()
    for method in ("gemm", "transform"):
        solver = FastDiagonalization(axes, 1.0, method=method)
        for run in (solver.solve, solver.apply):
            assert torch.autograd.gradcheck(run, U)
            close(vmap(run)(U), run(U))
            close(jvp(run, (U.detach(),), (U.detach(),))[1], run(U.detach()))
    masses = [axis(3, "neumann", "fv"), axis(4, "dirichlet", ("bspline", 2))]
    assert torch.autograd.gradcheck(
        FastDiagonalization(masses, 1.0).solve, randn(3, 4).requires_grad_()
    )
    Z = randn(3, 4, 3, dtype=torch.complex128).requires_grad_()
    assert torch.autograd.gradcheck(FastDiagonalization(axes, 1j).solve, Z)


@pytest.mark.parametrize("bc", ["neumann", "periodic"])
@pytest.mark.parametrize("scheme", ["fd2", "compact6", "fv"])
def test_null_space(bc, scheme):
    axes = [axis(n, bc, scheme) for n in (5, 6, 4)]
    F = randn(2, 5, 6, 4)
    F[0] -= F[0].mean()
    F[1] -= F[1].mean() - 0.25
    solver = FastDiagonalization(axes)
    assert solver.singular
    with pytest.raises(IncompatibleDataError, match=r"mean of item \(1,\) is 2.50e-01"):
        solver.solve(F)
    U = solver.solve(F[0])
    close(solver.apply(U), F[0], atol=1e-10)
    mass = reduce(torch.kron, [identity_or_mass(a) for a in axes])
    assert abs(float((mass @ U.reshape(-1)).sum())) < 1e-12
    with pytest.warns(IncompatibleDataWarning, match="was taken out"):
        warned = FastDiagonalization(axes, incompatible="warn").solve(F)
    quiet = FastDiagonalization(axes, incompatible="project").solve(F)
    assert torch.equal(warned, quiet)
    assert abs(float((mass @ quiet[1].reshape(-1)).sum())) < 1e-12
    # What is taken out lies in the span of M applied to constants.
    out = (F[1] - solver.apply(quiet[1])).reshape(-1)
    ones = mass @ torch.ones(120).double()
    close(out, ones * (out.sum() / ones.sum()), atol=1e-10)
    assert solver.solve(F[0].float()).dtype == torch.float32
    assert FastDiagonalization(axes, 1e-6).singular is False


def test_a_wall_somewhere_needs_no_mean():
    axes = [grid1d(4, bc="neumann"), grid1d(5, bc="dirichlet-neumann")]
    solver, F = FastDiagonalization(axes), torch.ones(4, 5).double()
    close(solver.apply(solver.solve(F)), F, atol=1e-11)


def exact_field(axes):
    """u = s(1)s(2)s(3) + s(4)s(1)s(2), s(k) = sin kπx, and -∇²u."""
    s = [[torch.sin(k * torch.pi * a.points) for k in range(5)] for a in axes]

    def term(p, q, r):
        return torch.einsum("i,j,k->ijk", s[0][p], s[1][q], s[2][r])

    u = term(1, 2, 3), term(4, 1, 2)
    return u[0] + u[1], torch.pi**2 * (14 * u[0] + 21 * u[1])


@pytest.mark.parametrize(
    ("scheme", "errors", "digits"),
    [("fd2", [0.2125, 0.0519, 0.0129], 5e-3), ("compact4", [0.0227, 0.00133, 8.26e-5], 5e-3),
     ("compact6", [4.0e-3, 5.8e-5, 8.8e-7], 2e-2)],
)  # fmt: skip
def test_order_of_the_schemes(scheme, errors, digits):
    for n, expected in zip((7, 15, 31), errors, strict=True):
        u, f = exact_field([grid1d(n)] * 3)
        error = (poisson_solve(f, scheme=scheme) - u).abs().max()
        assert float(error) == pytest.approx(expected, rel=digits)


def test_compact_scheme_near_a_wall_where_f_is_not_zero():
    """Second order only, as documented: u = x(1 - x)/2 · a bump, f = 1 at the wall."""
    errors = []
    for n in (15, 31, 63):
        x = grid1d(n).points
        u = x * (1 - x) * torch.exp(x)
        f = torch.exp(x) * (x**2 + 3 * x)
        errors.append(float((poisson_solve(f, scheme="compact4") - u).abs().max()))
    rates = [math.log2(a / b) for a, b in pairwise(errors)]
    assert all(1.7 < rate < 2.3 for rate in rates)


@pytest.mark.parametrize("bc", ["neumann", "dirichlet-neumann", "neumann-dirichlet", "periodic"])
@pytest.mark.parametrize(
    ("scheme", "order"), [("fd2", 2), ("compact4", 4), ("compact6", 6), ("fv", 2)]
)
def test_order_of_the_other_ends(bc, scheme, order):
    angle = {"neumann": (2, 0), "dirichlet-neumann": (1.5, -0.5), "periodic": (2, 0.3)}
    k, phase = angle.get(bc, (1.5, 0))
    errors = []
    for n in (16, 32):
        a = axis(n, bc, scheme)
        u = torch.cos(torch.pi * (k * a.points + phase))
        f = (k * torch.pi) ** 2 * u
        if a.mass is not None:
            f = a.mass @ f
        found = FastDiagonalization([a], incompatible="project").solve(f)
        found -= (found - u).mean() if a.constant else 0
        errors.append(float((found - u).abs().max()))
    # From n to 2n the step of a mixed axis falls by a little less than 2.
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.35


def test_bsplines_converge():
    from stiefel.numerics.tensor_product.bsplines import bspline_values

    for p in (1, 2, 3):
        errors = []
        for elements in (8, 16):
            nodes, weights = np.polynomial.legendre.leggauss(p + 2)
            x = (np.arange(elements)[:, None] + (nodes + 1) / 2).ravel() / elements
            w = torch.tensor(np.tile(weights / 2 / elements, elements))
            B = bspline_values(torch.tensor(x), elements, p)[:, 1:-1]
            u = [torch.sin(k * torch.pi * torch.tensor(x)) for k in (1, 2)]
            load = torch.outer(B.mT @ (w * u[0]), B.mT @ (w * u[1])) * 5 * torch.pi**2
            c = poisson_solve(load, scheme=("bspline", p))
            error = B @ c @ B.mT - torch.outer(*u)
            errors.append(float(torch.einsum("ij,i,j->", error**2, w, w).sqrt()))
        assert abs(math.log2(errors[0] / errors[1]) - (p + 1)) < 0.3
    assert grid1d(6, scheme=("bspline", 2)).points.shape == (6,)


def test_pencils():
    g = randn(5, 5)
    M, K = g @ g.mT + torch.eye(5), randn(5, 5, seed=1)
    K = K @ K.mT
    a = pencil_axis(K, M)
    close(a.eigenvectors.mT @ K @ a.eigenvectors, torch.diag(a.eigenvalues), atol=1e-11)
    close(a.eigenvectors.mT @ M @ a.eigenvectors, torch.eye(5))
    solver = FastDiagonalization([a, grid1d(3), pencil_axis(K)])
    F = randn(5, 3, 5)
    close(solver.solve(solver.apply(F)), F, atol=1e-8)
    close(solver.apply(F).reshape(-1), dense(solver.axes) @ F.reshape(-1), atol=1e-9)


def test_scipy_preconditioner():
    from scipy.sparse.linalg import cg

    solver = FastDiagonalization([grid1d(n) for n in SIZES], 0.5)
    A, P = solver.as_scipy_linear_operator(), solver.as_scipy_linear_operator(inverse=True)
    b, counts = np.arange(24.0), []
    x, failed = cg(A, b, M=P, rtol=1e-12, callback=counts.append)
    assert failed == 0
    assert len(counts) <= 2
    np.testing.assert_allclose(x, solver.solve(torch.tensor(b).reshape(SIZES)).flatten())
    shifted = FastDiagonalization(solver.axes, 1j).as_scipy_linear_operator(inverse=True)
    y = b + 1j * b[::-1]
    assert np.vdot(y, shifted @ b) == pytest.approx(np.vdot(shifted.rmatvec(y), b))


def bumps(ratio):
    return lambda x, y, z: torch.exp(
        math.log(ratio) / 2 * torch.sin(2 * torch.pi * x) * torch.sin(3 * torch.pi * y)
        * torch.cos(2 * torch.pi * z)
    )  # fmt: skip


@pytest.mark.parametrize(("ratio", "counts"), [(3, (14, 14)), (10, (27, 28)), (100, (79, 89))])
def test_iterations_of_the_preconditioned_solver(ratio, counts):
    for n, expected in zip((15, 31), counts, strict=True):
        op = DiffusionOperator.from_function(bumps(ratio), [grid1d(n)] * 3)
        F = randn(n, n, n)
        result = op.solve(F)
        assert result.converged
        assert abs(result.iterations - expected) <= 2
        assert float((op.matmul(result.x) - F).norm() / F.norm()) < 1.01e-8
    plain = DiffusionOperator.from_function(bumps(3), [grid1d(15)] * 3)
    assert abs(plain.solve(randn(15, 15, 15), preconditioned=False).iterations - 74) <= 3


@pytest.mark.parametrize("bc", CONDITIONS)
def test_diffusion_with_a_constant_is_the_direct_problem(bc):
    axes = [grid1d(n, 1.0, bc) for n in (3, 4, 5)]
    U = randn(3, 4, 5)
    op = DiffusionOperator.from_points(torch.full((3, 4, 5), 2.5).double(), axes, 0.5)
    solver = FastDiagonalization(axes, 0.2)
    close(op.matmul(U), 2.5 * solver.apply(U), atol=1e-11)
    result = op.solve(solver.apply(U), rtol=1e-12)
    assert result.iterations <= 2
    close(2.5 * result.x, U, atol=1e-10)


def test_diffusion_is_symmetric_and_differentiable():
    axes = [grid1d(3), grid1d(4, bc="neumann"), grid1d(3, bc="periodic")]
    values = randn(3, 4, 3).exp()
    op = DiffusionOperator.from_points(values, axes)
    A = op.as_scipy_linear_operator() @ np.eye(36)
    np.testing.assert_allclose(A, A.T, atol=1e-11)
    assert np.linalg.eigvalsh(A).min() > 0
    # Faces between points carry the harmonic mean.
    h = 1 / 4
    assert -A[0, 12] * h**2 == pytest.approx(2 / (1 / values[0, 0, 0] + 1 / values[1, 0, 0]))

    def run(a, f):
        return DiffusionOperator.from_points(a, axes).solve(f, rtol=1e-13).x

    assert torch.autograd.gradcheck(run, (values.requires_grad_(), randn(3, 4, 3).requires_grad_()))


def test_singular_diffusion():
    axes = [grid1d(n, bc="neumann") for n in (4, 5)]
    op, F = DiffusionOperator.from_points(randn(4, 5).exp(), axes), randn(4, 5)
    with pytest.raises(IncompatibleDataError):
        op.solve(F)
    F -= F.mean()
    result = op.solve(F, rtol=1e-11)
    close(op.matmul(result.x), F, atol=1e-9)
    assert op.solve(torch.zeros(4, 5).double()).iterations == 0
    assert not op.solve(F, maxiter=1).converged


EDGES = torch.tensor([0.0, 0.4, 0.3, 1.0])


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: grid1d(0), ValueError, "at least 1"),
        (lambda: grid1d(2, bc="periodic"), ValueError, "periodic axis must be at least 3"),
        (lambda: grid1d(4, -1.0), ValueError, "length must be a positive"),
        (lambda: grid1d(4, math.nan), ValueError, "length"),
        (lambda: grid1d(4, bc="robin"), ValueError, "bc must be one of 'dirichlet'"),
        (lambda: grid1d(4, scheme="fd8"), ValueError, "scheme must be one of 'fd2'"),
        (lambda: grid1d(4, scheme=("fd", 8)), ValueError, "scheme must be one of 'fd2'"),
        (
            lambda: grid1d(3, scheme=("fv", EDGES)),
            ValueError,
            r"edges must increase, but edges\[2\]",
        ),
        (lambda: grid1d(4, scheme=("fv", EDGES)), ValueError, "must be 5 numbers"),
        (lambda: grid1d(3, 2.0, scheme=("fv", EDGES.sort()[0])), ValueError, "span the length 2.0"),
        (lambda: grid1d(1, scheme=("bspline", 3)), ValueError, "n must be at least 2"),
        (lambda: grid1d(4, bc="periodic", scheme=("bspline", 2)), ValueError, "open knots"),
        (lambda: pencil_axis(randn(3, 3)), ValueError, "stiffness must be symmetric"),
        (lambda: pencil_axis(torch.eye(3), -torch.eye(3)), ValueError, "positive definite"),
        (
            lambda: pencil_axis(torch.eye(3), 1 - 2 * torch.ones(3, 3)),
            ValueError,
            "positive definite",
        ),
        (lambda: pencil_axis(torch.eye(3), torch.eye(2)), ValueError, "shape of stiffness"),
        (lambda: FastDiagonalization([]), ValueError, "1 to 4"),
        (lambda: FastDiagonalization([grid1d(3)] * 5), ValueError, "1 to 4"),
        (lambda: FastDiagonalization([grid1d(3)], math.inf), ValueError, "shift must be finite"),
        (lambda: FastDiagonalization([grid1d(3)], method="lu"), ValueError, "method"),
        (lambda: FastDiagonalization([grid1d(3)], incompatible="?"), ValueError, "incompatible"),
        (
            lambda: FastDiagonalization([grid1d(3), axis(3, scheme="fv")], method="transform"),
            ValueError,
            r"axes\[1\] is fv",
        ),
        (
            lambda: FastDiagonalization([grid1d(3)]).solve(randn(4)),
            ValueError,
            "3 points along grid axis 0",
        ),
        (lambda: FastDiagonalization([grid1d(3)]).solve(torch.ones(3).int()), TypeError, "float32"),
        (
            lambda: FastDiagonalization([grid1d(3)]).solve(torch.full((3,), torch.nan)),
            ValueError,
            "finite",
        ),
        (lambda: FastDiagonalization([grid1d(3)]).solve(randn(0, 3)), ValueError, "empty"),
        (lambda: poisson_solve(randn(2, 2, 2, 2, 2)), ValueError, "1 to 4 axes"),
        (lambda: poisson_solve(randn(3), [1, 1]), ValueError, "at least 2 axes"),
        (
            lambda: poisson_solve(randn(3, 3), [1, 1], ["neumann"]),
            ValueError,
            "bc must be one value",
        ),
        (lambda: poisson_solve(randn(3, 3), bc="neumann"), IncompatibleDataError, "mean zero"),
        (
            lambda: DiffusionOperator([torch.ones(3)], [grid1d(3)]),
            ValueError,
            r"faces\[0\] must have",
        ),
        (lambda: DiffusionOperator([torch.zeros(4)], [grid1d(3)]), ValueError, "out of scope"),
        (lambda: DiffusionOperator([], [grid1d(3)]), ValueError, "one entry per axis"),
        (lambda: DiffusionOperator([torch.ones(4)], [grid1d(3)], -1), ValueError, "at least 0"),
        (
            lambda: DiffusionOperator([torch.arange(1, 5.0)], [grid1d(3, bc="periodic")]),
            ValueError,
            "must agree",
        ),
        (
            lambda: DiffusionOperator([torch.ones(4)], [grid1d(3, scheme="compact4")]),
            ValueError,
            "scheme 'fd2'",
        ),
    ],
)
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_singular_shifts_are_found_in_any_dimension():
    for d in (1, 2, 3, 4):
        axes = [grid1d(n, 1 + 0.1 * n) for n in range(3, 3 + d)]
        eigenvalue = float(sum(a.eigenvalues[-1 - (i % 2)] for i, a in enumerate(axes)))
        with pytest.raises(SingularOperatorError, match="meets the eigenvalue"):
            FastDiagonalization(axes, -eigenvalue)
        close_by = FastDiagonalization(axes, -eigenvalue * (1 + 1e-7))
        F = randn(*close_by.shape)
        assert float((close_by.apply(close_by.solve(F)) - F).abs().max()) < 1e-5


def test_lists_and_single_values():
    F = randn(5, 6)
    spline = ("bspline", 2)
    mixed = poisson_solve(F, (1.0, 2.0), ("dirichlet", "neumann"), (spline, "fd2"), 1.0)
    axes = [grid1d(5, scheme=spline), grid1d(6, 2.0, "neumann")]
    close(mixed, FastDiagonalization(axes, 1.0).solve(F))
    batch = torch.stack([F, 2 * F])
    close(poisson_solve(batch, [1.0, 1.0], scheme=spline)[1], 2 * poisson_solve(F, scheme=spline))


def test_inference_mode_leaves_nothing_that_autograd_cannot_use():
    solver, F = FastDiagonalization([grid1d(4, bc="neumann")], 1.0), randn(4).float()
    with torch.inference_mode():
        expected = solver.solve(F)
    again = solver.solve(F.clone().requires_grad_())
    again.sum().backward()
    close(again, expected)


def test_memory_is_a_few_fields():
    """At most 6 N doubles beyond the input, by torch's own account."""
    from torch.profiler import ProfilerActivity, profile

    n = (40, 42, 44)
    F = randn(*n)
    solver = FastDiagonalization([grid1d(k) for k in n])
    solver.solve(F)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        solver.solve(F)
    held = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert F.nbytes < peak <= 4 * F.nbytes
