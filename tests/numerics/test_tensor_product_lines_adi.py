"""Douglas–Gunn steps: exact values, the law of each mode, order, any axis."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.numerics.tensor_product import ADIHeat, adi_amplification, axis_apply, grid1d

F64 = torch.float64


def test_exact_values_of_the_sheet():
    stepper = ADIHeat([grid1d(3)] * 3, 0.01)
    u = stepper.step(torch.ones(3, 3, 3, dtype=F64))
    corner = [0.638383994346, 0.726743263061, 0.638383994346]
    middle = [0.828008893217, 0.943478441256, 0.828008893217]
    assert u[0, 0].tolist() == pytest.approx(corner, abs=1e-12)
    assert u[1, 1].tolist() == pytest.approx(middle, abs=1e-12)
    assert float(u.sum()) == pytest.approx(19.739522912059, abs=1e-11)
    for _ in range(4):
        u = stepper.step(u)
    assert float(u.sum()) == pytest.approx(6.120777938876, abs=1e-11)
    assert float(u[1, 1, 1]) == pytest.approx(0.409945568689, abs=1e-12)
    assert float(adi_amplification(0.3, 0.5, 0.7)) == pytest.approx(0.095022624434, abs=1e-12)


def test_crank_nicolson_of_the_sheet_is_another_step():
    L = -grid1d(3).stiffness
    eye = torch.eye(3, dtype=F64)
    big = sum(
        torch.kron(torch.kron(*(L if i == j else eye for j in range(2))), L if i == 2 else eye)
        for i in range(3)
    )
    one = torch.eye(27, dtype=F64)
    u = torch.linalg.solve(one - 0.005 * big, (one + 0.005 * big) @ torch.ones(27, dtype=F64))
    assert float(u.sum()) == pytest.approx(19.677065765852, abs=1e-11)
    # … and in one dimension they are the same.
    line = ADIHeat([grid1d(3)], 0.01).step(torch.ones(3, dtype=F64))
    same = torch.linalg.solve(eye - 0.005 * L, (eye + 0.005 * L) @ torch.ones(3, dtype=F64))
    torch.testing.assert_close(line, same)


BSPLINE, FV = ("bspline", 2), ("fv", [0.0, 0.1, 0.3, 0.5, 0.8, 1.0])
AXES = [
    ("dirichlet", "fd2"), ("neumann", "fd2"), ("periodic", "fd2"), ("dirichlet-neumann", "fd2"),
    ("neumann-dirichlet", "fd2"), ("dirichlet", "compact4"), ("periodic", "compact6"),
    ("dirichlet", BSPLINE), ("neumann", BSPLINE), ("neumann", FV), ("periodic", FV),
]  # fmt: skip


@pytest.mark.parametrize(("bc", "scheme"), AXES)
@pytest.mark.parametrize("d", [2, 3])
def test_a_step_is_that_of_dense_matrices(bc, scheme, d):
    axes = [grid1d(5, 1.0, bc, scheme), grid1d(70, 2.0), grid1d(4, 1.0, "neumann")][:d]
    kappa = [1.0, 0.5, 2.0][:d]
    shape = [len(axis) for axis in axes]
    U, f = torch.randn(2, *shape, dtype=F64), torch.randn(shape, dtype=F64)
    L = [
        -k * (a.stiffness if a.mass is None else torch.linalg.solve(a.mass, a.stiffness))
        for k, a in zip(kappa, axes, strict=True)
    ]
    rate = f + sum(axis_apply([L[j] if i == j else None for j in range(d)], U) for i in range(d))
    factors = [torch.linalg.inv(torch.eye(len(A)) - 0.005 * A) for A in L]
    expected = U + axis_apply(factors, 0.01 * rate)
    found = ADIHeat(axes, 0.01, kappa).step(U, f)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("n", [6, 80])
@pytest.mark.parametrize("bc", ["dirichlet", "neumann", "periodic"])
def test_every_mode_is_multiplied_by_its_factor(bc, n):
    axes = [grid1d(n, 1.0, bc), grid1d(5, 1.0, "neumann")]
    modes = axes[0].eigenvectors[:, n // 2], axes[1].eigenvectors[:, 3]
    U = modes[0][:, None] * modes[1]
    dt, kappa = 0.3, (0.1, 0.2)
    halves = (
        dt * k * axis.eigenvalues[i] / 2
        for k, axis, i in zip(kappa, axes, (n // 2, 3), strict=True)
    )
    G = adi_amplification(*halves)
    torch.testing.assert_close(ADIHeat(axes, dt, kappa).step(U), G * U, rtol=0, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1e12), min_size=1, max_size=4))
def test_no_mode_grows(halves):
    assert -1 <= float(adi_amplification(*halves)) <= 1


def test_modes_as_tensors():
    a = torch.rand(4, 1, dtype=F64, requires_grad=True)
    G = adi_amplification(a, torch.rand(3, dtype=F64))
    assert G.shape == (4, 3)
    assert torch.autograd.gradcheck(lambda a: adi_amplification(a, 0.4), a)
    assert adi_amplification(torch.ones(2)).dtype == torch.float32
    for bad in ((), (-0.1,), (0.1, float("nan"))):
        with pytest.raises(ValueError, match="halves"):
            adi_amplification(*bad)


def test_second_order_in_time_as_on_the_sheet():
    axis = grid1d(31)
    sines = [torch.sin(k * math.pi * axis.points) for k in (1, 2, 3)]
    u0 = sines[0][:, None, None] * sines[1][:, None] * sines[2]
    decay = float(axis.eigenvalues[:3].sum())
    errors = []
    for steps in (8, 16, 32):
        stepper, u = ADIHeat([axis] * 3, 0.02 / steps), u0
        for _ in range(steps):
            u = stepper.step(u)
        errors.append(float((u - math.exp(-decay * 0.02) * u0).abs().max()))
    assert errors == pytest.approx([4.19e-4, 1.06e-4, 2.67e-5], rel=0.01)
    assert math.log2(errors[1] / errors[2]) == pytest.approx(2, abs=0.25)


def test_sources_in_the_middle_of_the_step_keep_the_order():
    """u = sin t · mode, f = (cos t + λ sin t) · mode."""
    axes = [grid1d(7), grid1d(9, 2.0, "neumann")]
    mode = axes[0].eigenvectors[:, 1][:, None] * axes[1].eigenvectors[:, 2]
    decay = float(axes[0].eigenvalues[1] + axes[1].eigenvalues[2])
    errors = []
    for steps in (40, 80):
        dt = 1 / steps
        stepper, u = ADIHeat(axes, dt), 0 * mode
        for i in range(steps):
            t = (i + 0.5) * dt
            u = stepper.step(u, (math.cos(t) + decay * math.sin(t)) * mode)
        errors.append(float((u - math.sin(1) * mode).abs().max()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.25)


def test_walls_without_flux_keep_the_heat_and_huge_steps_stay_bounded():
    stepper = ADIHeat([grid1d(8, 1, "neumann"), grid1d(9, 1, "periodic")], 1e4)
    u = torch.rand(3, 8, 9, dtype=F64)
    later = u
    for _ in range(20):
        later = stepper.step(later)
    torch.testing.assert_close(later.sum((1, 2)), u.sum((1, 2)), rtol=1e-6, atol=0)
    assert float((later - later.mean((1, 2), keepdim=True)).norm()) <= float(u.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_types(dtype):
    axes = [grid1d(6), grid1d(80, 1.0, "periodic")]
    U = torch.randn(6, 80, dtype=dtype)
    found = ADIHeat(axes, 0.01).step(U, U)
    assert found.dtype == dtype
    wide = ADIHeat(axes, 0.01).step(U.to(torch.complex128), U.to(torch.complex128))
    tolerance = 1e-4 if torch.finfo(dtype).eps > 1e-10 else 1e-12
    torch.testing.assert_close(found.to(wide.dtype), wide, rtol=tolerance, atol=tolerance)


def test_gradients():
    axes = [
        grid1d(3, 1.0, "neumann"),
        grid1d(5, 1.0, "periodic"),
        grid1d(4, 1, "dirichlet", BSPLINE),
    ]
    U, f = (torch.randn(3, 5, 4, dtype=F64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(ADIHeat(axes, 0.1).step, (U, f))


def test_a_step_changes_nothing_that_it_was_given():
    U, f = torch.rand(4, 5, dtype=F64), torch.rand(4, 5, dtype=F64)
    kept = U.clone(), f.clone()
    ADIHeat([grid1d(4), grid1d(5)], 0.1).step(U, f)
    assert torch.equal(U, kept[0])
    assert torch.equal(f, kept[1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dt": 0.0}, ValueError, "dt must be a positive"),
        ({"dt": -0.1}, ValueError, "dt must be a positive"),
        ({"dt": float("inf")}, ValueError, "dt must be a positive"),
        ({"diffusivity": 0}, ValueError, "diffusivity of axis 0 must be a positive"),
        ({"diffusivity": [1.0, -2.0]}, ValueError, "diffusivity of axis 1 must be a positive"),
        ({"diffusivity": [1.0]}, ValueError, "one value or one per axis"),
        ({"axes": []}, ValueError, "axes must be 1 to 4, got 0"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        ADIHeat(**{"axes": [grid1d(4), grid1d(5)], "dt": 0.1} | change)


def test_bad_fields():
    stepper = ADIHeat([grid1d(4), grid1d(5)], 0.1)
    good = torch.ones(2, 4, 5)
    with pytest.raises(ValueError, match="5 points along grid axis 1"):
        stepper.step(torch.ones(4, 4))
    with pytest.raises(ValueError, match="source must have 4 points along grid axis 0"):
        stepper.step(good, torch.ones(5, 5))
    with pytest.raises(ValueError, match="source must have the shape of U"):
        stepper.step(good, torch.ones(3, 4, 5))
    with pytest.raises(TypeError, match=r"source must be torch.float32 like U"):
        stepper.step(good, good.double())
    with pytest.raises(ValueError, match="source must be finite"):
        stepper.step(good, good * float("nan"))
    with pytest.raises(ValueError, match="U must be finite"):
        stepper.step(good * float("nan"))
