"""Compact derivatives: exact values, polynomials, orders, ends."""

import math

import pytest
import torch

from stiefel.numerics.tensor_product import compact, compact_derivative, compact_gradient, grid1d

F64 = torch.float64
SCHEMES = [(1, 4), (1, 6), (2, 4), (2, 6)]
LEAST = {(1, 4): 5, (1, 6): 7, (2, 4): 6, (2, 6): 8}
every_scheme = pytest.mark.parametrize(("deriv", "order"), SCHEMES)


@pytest.fixture(params=["matrix", "solver"])
def path(request, monkeypatch):
    """Both ways to the result: one product, or stencil and line solve."""
    compact._kept_scheme.cache_clear()
    if request.param == "solver":
        monkeypatch.setattr(compact, "DENSE_LIMIT", 0)
    yield request.param
    compact._kept_scheme.cache_clear()


def test_exact_values_of_the_sheet(path):
    x = torch.linspace(0, 1, 6, dtype=F64)
    torch.testing.assert_close(
        compact_derivative(x**3, 0, 0.2, bc="open"), 3 * x**2, rtol=0, atol=5e-14
    )
    expected = torch.tensor([-0.0264, 0.0136, 0.1256, 0.6456, 2.0536, 4.9736], dtype=F64)
    torch.testing.assert_close(compact_derivative(x**5, 0, 0.2), expected, rtol=0, atol=1e-13)


@every_scheme
def test_open_lines_are_exact_for_polynomials(deriv, order, path):
    degree = order if deriv == 1 else order + 1
    for n in (LEAST[deriv, order], LEAST[deriv, order] + 1, 12):
        h = 1 / (n - 1)
        x = torch.arange(n, dtype=F64) * h
        for q in range(degree + 2):
            slope = q * x ** (q - 1) if q else 0 * x
            bend = q * (q - 1) * x ** (q - 2) if q > 1 else 0 * x
            expected = slope if deriv == 1 else bend
            error = (compact_derivative(x**q, 0, h, order, deriv) - expected).abs().max()
            if q <= degree:
                assert error < 1e-10
            else:
                assert error > 1e-7, "of no higher order than promised"


def test_end_rows_are_those_of_the_paper_and_of_tables():
    assert compact._open_weights(0, 3.0, 4, 1) == pytest.approx([-17 / 6, 3 / 2, 3 / 2, -1 / 6])
    assert compact._open_weights(0, 2.0, 3, 1) == pytest.approx([-5 / 2, 2, 1 / 2])
    one_sided = [-49 / 20, 6, -15 / 2, 20 / 3, -15 / 4, 6 / 5, -1 / 6]
    assert compact._open_weights(0, 0.0, 7, 1) == pytest.approx(one_sided)
    assert compact._open_weights(1, 0.25, 3, 1) == pytest.approx([-3 / 4, 0, 3 / 4], abs=1e-15)


def test_four_points_would_be_singular():
    A = torch.tensor([[1, 3, 0, 0], [0.25, 1, 0.25, 0], [0, 0.25, 1, 0.25], [0, 0, 3, 1]])
    assert float(torch.linalg.det(A)) == 0


def wave(n, bc):
    """Values and two derivatives of a smooth function, on the points of that condition."""
    if bc == "open":
        h = 1 / (n - 1)
        t = torch.arange(n, dtype=F64) * h
        f = torch.exp(torch.sin(3 * t))
        return h, f, 3 * t.mul(3).cos() * f, 9 * f * (t.mul(3).cos() ** 2 - t.mul(3).sin())
    if bc == "periodic":
        h = 2 * math.pi / n
        t = torch.arange(n, dtype=F64) * h
        f = t.sin().exp()
        return h, f, t.cos() * f, f * (t.cos() ** 2 - t.sin())
    axis = grid1d(n, 1.0, bc)
    t, h = axis.points, axis.spacing
    if bc == "dirichlet":
        e, p, s = (2 * t).exp(), t - t * t, 1 - 2 * t
        return h, p * e, (s + 2 * p) * e, (-2 + 4 * s + 4 * p) * e
    if bc == "neumann":
        c, s = (math.pi * t).cos(), math.pi * (math.pi * t).sin()
        return h, c.exp(), -s * c.exp(), (s * s - math.pi**2 * c) * c.exp()
    k = 2.5 * math.pi
    if bc == "dirichlet-neumann":
        return h, (k * t).sin(), k * (k * t).cos(), -k * k * (k * t).sin()
    return h, (k * t).cos(), -k * (k * t).sin(), -k * k * (k * t).cos()


@every_scheme
@pytest.mark.parametrize(
    "bc",
    ["open", "periodic", "dirichlet", "neumann", "dirichlet-neumann", "neumann-dirichlet"],
)
def test_the_order_is_reached(deriv, order, bc):
    errors = []
    for n in (60, 120) if order == 6 else (64, 128):
        h, f, *derivatives = wave(n, bc)
        errors.append(
            float(
                (compact_derivative(f, 0, h, order, deriv, bc) - derivatives[deriv - 1]).abs().max()
            )
        )
    observed = math.log2(errors[0] / errors[1])
    if bc in ("periodic", "neumann") or (deriv, bc) == (1, "open"):
        assert abs(observed - order) < 0.25
    else:  # errors at an end and inside are of two orders, and change places
        assert observed > order - 0.8


def test_errors_of_the_sheet():
    def errors(order, deriv, sizes=(16, 32, 64, 128)):
        found = []
        for n in sizes:
            h, f, *derivatives = wave(n, "periodic")
            result = compact_derivative(f, 0, h, order, deriv, "periodic")
            found.append(float((result - derivatives[deriv - 1]).abs().max()))
        return found

    assert errors(4, 1) == pytest.approx([3.85e-3, 2.08e-4, 1.29e-5, 8.0e-7], rel=0.01)
    assert errors(6, 1) == pytest.approx([5.9e-4, 7.4e-6, 1.10e-7, 1.7e-9], rel=0.02)
    assert errors(4, 2)[::3] == pytest.approx([8.8e-3, 2.04e-6], rel=0.01)
    assert errors(6, 2)[::3] == pytest.approx([1.3e-3, 4.4e-9], rel=0.02)
    found = []
    for n in (17, 33, 65, 129):
        h, f, slope, _ = wave(n, "open")
        found.append(float((compact_derivative(f, 0, h) - slope).abs().max()))
    assert found == pytest.approx([3.16e-3, 2.64e-4, 1.72e-5, 1.08e-6], rel=0.01)
    assert math.log2(found[2] / found[3]) == pytest.approx(4, abs=0.25)


@pytest.mark.parametrize("order", [4, 6])
def test_second_derivatives_have_the_eigenvalues_of_the_axis(order):
    for bc in ("periodic", "neumann"):
        axis = grid1d(16, 1.3, bc, f"compact{order}")
        D = compact_derivative(torch.eye(16, dtype=F64), 0, axis.spacing, order, 2, bc)
        torch.testing.assert_close(-D, axis.stiffness, rtol=1e-10, atol=1e-9)


@every_scheme
@pytest.mark.parametrize("bc", ["open", "periodic", "dirichlet", "dirichlet-neumann"])
def test_any_axis_of_a_field_and_both_paths(deriv, order, bc, monkeypatch):
    U = torch.randn(2, 9, 140, 8, dtype=F64)
    for dim, h in ((1, 0.5), (2, 0.01), (-1, 0.3)):
        found = compact_derivative(U, dim, h, order, deriv, bc)
        lines = U.movedim(dim, -1)
        one = compact_derivative(lines[1, 3, 2].contiguous(), 0, h, order, deriv, bc)
        torch.testing.assert_close(found.movedim(dim, -1)[1, 3, 2], one, rtol=1e-9, atol=1e-9)
        compact._kept_scheme.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(compact, "DENSE_LIMIT", 0 if dim != 2 else 200)
            other = compact_derivative(U, dim, h, order, deriv, bc)
        compact._kept_scheme.cache_clear()
        torch.testing.assert_close(found, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_types(dtype, path):
    f = torch.randn(4, 20, dtype=torch.complex128)
    given = (f if dtype.is_complex else f.real).to(dtype)
    found = compact_derivative(given, 1, 0.5, 6)
    assert found.dtype == dtype
    wide = compact_derivative(f, 1, 0.5, 6)
    wide = wide if dtype.is_complex else wide.real
    tolerance = 1e-4 if torch.finfo(dtype).eps > 1e-10 else 1e-12
    torch.testing.assert_close(found.to(wide.dtype), wide, rtol=tolerance, atol=tolerance)


def test_gradients(path):
    U = torch.randn(3, 9, dtype=F64, requires_grad=True)
    for deriv, order in SCHEMES:
        for bc in ("open", "periodic", "dirichlet", "neumann"):
            assert torch.autograd.gradcheck(
                lambda u, d=deriv, o=order, b=bc: compact_derivative(u, 1, 0.7, o, d, b), U
            )


def test_gradient_of_a_field():
    axes = [grid1d(n, 1.0, bc) for n, bc in ((20, "dirichlet"), (24, "periodic"), (16, "neumann"))]
    x, y, z = torch.meshgrid(*[axis.points for axis in axes], indexing="ij")
    p = math.pi
    u = (p * x).sin() * (2 * p * y).sin() * (p * z).cos()
    expected = torch.stack(
        [
            p * (p * x).cos() * (2 * p * y).sin() * (p * z).cos(),
            2 * p * (p * x).sin() * (2 * p * y).cos() * (p * z).cos(),
            -p * (p * x).sin() * (2 * p * y).sin() * (p * z).sin(),
        ]
    )
    spacing = [axis.spacing for axis in axes]
    bc = ["dirichlet", "periodic", "neumann"]
    found = compact_gradient(torch.stack((u, 2 * u)), spacing, 6, bc)
    assert found.shape == (3, 2, 20, 24, 16)
    torch.testing.assert_close(found[:, 0], expected, rtol=0, atol=5e-5)
    torch.testing.assert_close(found[:, 1], 2 * found[:, 0])
    alone = compact_gradient(u, 0.5, bc="periodic", dims=1)
    torch.testing.assert_close(alone[0], compact_derivative(u, 2, 0.5, bc="periodic"))
    assert compact_gradient(u, 0.5).shape == (3, 20, 24, 16)


@every_scheme
def test_too_few_points_name_axis_and_need(deriv, order):
    n = LEAST[deriv, order]
    for bc, least in (("open", n), ("periodic", order - 1), ("dirichlet", n - 2)):
        compact_derivative(torch.ones(2, least, 3), 1, 1.0, order, deriv, bc)
        with pytest.raises(ValueError, match=f"at least {least} points along axis 1"):
            compact_derivative(torch.ones(2, least - 1, 3), 1, 1.0, order, deriv, bc)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"h": 0.0}, ValueError, "h must be a positive finite number"),
        ({"h": -1}, ValueError, "h must be a positive"),
        ({"h": float("nan")}, ValueError, "h must be a positive"),
        ({"order": 5}, ValueError, "order must be one of 4, 6, got 5"),
        ({"deriv": 3}, ValueError, "deriv must be one of 1, 2"),
        ({"bc": "robin"}, ValueError, "bc must be one of 'open'.*got 'robin'"),
        ({"axis": 2}, IndexError, "axis must be in"),
        ({"U": torch.full((9, 9), float("inf"))}, ValueError, "U must be finite"),
        ({"U": torch.ones(9, 0)}, ValueError, "U is empty"),
        ({"U": torch.ones(9, 9, dtype=torch.int32)}, TypeError, "U must be float32"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        compact_derivative(**{"U": torch.ones(9, 9), "axis": 0, "h": 1.0} | change)


def test_bad_gradients():
    U = torch.ones(9, 9)
    with pytest.raises(ValueError, match=r"dims must be in 1\.\.2"):
        compact_gradient(U, 1.0, dims=3)
    with pytest.raises(ValueError, match="spacing must be one value or one per axis"):
        compact_gradient(U, [1.0, 1.0, 1.0], dims=2)
