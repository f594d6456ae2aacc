import math

import poincare_twins as twins
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from stiefel.nn import poincare
from stiefel.nn.poincare import (
    PoincareBall,
    conformal_factor,
    dist,
    expmap,
    expmap0,
    frechet_mean,
    gyration,
    logmap,
    logmap0,
    midpoint,
    mobius_add,
    project,
    tangent_add,
    transp,
)


def vec(*values):
    return torch.tensor(values, dtype=torch.float64)


X, Y, V, THIRD = vec(0.3, 0.4), vec(-0.1, 0.2), vec(0.5, -0.25), vec(0.2, -0.3)
POINTS = torch.stack([X, Y, THIRD])
# The sheet's exact values, by c.
EXACT = {
    1: {
        "mobius_add": (0.242696629213, 0.548314606742),
        "expmap0": (0.453696152406, -0.226848076203),
        "logmap0": (0.3295836866, 0.439444915467),
        "expmap": (0.723860151897, 0.324048980278),
        "logmap": (-0.320888493774, -0.205012093244),
        "dist": 1.015434256530,
        "conformal_factor": 2.666666666667,
        "transp": (0.553515981735, -0.441598173516),
        "midpoint": (0.132443485167, 0.100737687749),
        "frechet_mean": (0.128468037897, 0.104876263984),
        "dist_c": 0.141142564963,
    },
    0.1: {
        "mobius_add": (0.204925133028, 0.594975869323),
        "expmap": (0.798541915006, 0.167791169681),
        "dist": 0.905003106972,
        "midpoint": (0.133096351138, 0.099803439139),
        "frechet_mean": (0.132745869690, 0.100326529121),
        "dist_c": 0.107191886573,
    },
}
CALLS = {
    "mobius_add": lambda c: mobius_add(X, Y, c),
    "expmap0": lambda c: expmap0(V, c),
    "logmap0": lambda c: logmap0(X, c),
    "expmap": lambda c: expmap(X, V, c),
    "logmap": lambda c: logmap(X, Y, c),
    "dist": lambda c: dist(X, Y, c),
    "conformal_factor": lambda c: conformal_factor(X, c),
    "transp": lambda c: transp(X, Y, V, c),
    "midpoint": lambda c: midpoint(POINTS, c),
    "frechet_mean": lambda c: frechet_mean(POINTS, c),
}


@pytest.mark.parametrize(
    ("c", "name"), [(c, n) for c, found in EXACT.items() for n in found if n != "dist_c"]
)
def test_exact_values(c, name):
    wanted = torch.tensor(EXACT[c][name], dtype=torch.float64)
    torch.testing.assert_close(CALLS[name](c), wanted, rtol=0, atol=2e-12)


def test_exact_derivatives():
    for c in EXACT:
        at = vec(c)[0].requires_grad_()
        found = torch.autograd.grad(dist(X, Y, at), at)[0]
        assert float(found) == pytest.approx(EXACT[c]["dist_c"], abs=2e-12)
    c, x = vec(1.0)[0].requires_grad_(), X.clone().requires_grad_()
    torch.testing.assert_close(
        torch.autograd.grad(dist(x, Y, c), x)[0],
        vec(2.247190026166, 1.435704738939),
        rtol=0,
        atol=2e-12,
    )
    (found,) = torch.autograd.grad(mobius_add(X, Y, c).sum(), c)
    assert float(found) == pytest.approx(-0.016967554602, abs=2e-12)


def inside(generator, *shape, c=0.7, most=0.9):
    """Random points of the ball, up to ``most`` of its radius."""
    v = torch.randn(*shape, dtype=torch.float64, generator=generator)
    size = torch.rand(*shape[:-1], 1, dtype=torch.float64, generator=generator)
    return v / v.norm(dim=-1, keepdim=True) * size * most / math.sqrt(c)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), c=st.floats(0.05, 3), d=st.integers(1, 5))
def test_geometry(seed, c, d):
    g = torch.Generator().manual_seed(seed)
    x, y, z, w = (inside(g, 4, d, c=c, most=0.8) for _ in range(4))
    v = 0.1 * torch.randn(4, d, dtype=torch.float64, generator=g)
    close = {"rtol": 1e-8, "atol": 1e-9}
    torch.testing.assert_close(
        dist(mobius_add(z, x, c), mobius_add(z, y, c), c), dist(x, y, c), **close
    )
    torch.testing.assert_close(logmap(x, expmap(x, v, c), c), v, **close)
    length = logmap(x, y, c).norm(dim=-1) * conformal_factor(x, c)
    torch.testing.assert_close(length, dist(x, y, c), **close)
    carried = transp(x, y, v, c).norm(dim=-1) * conformal_factor(y, c)
    torch.testing.assert_close(carried, v.norm(dim=-1) * conformal_factor(x, c), **close)
    three = mobius_add(-mobius_add(x, y, c), mobius_add(x, mobius_add(y, w, c), c), c)
    torch.testing.assert_close(gyration(x, y, w, c), three, **close)
    torch.testing.assert_close(mobius_add(-x, mobius_add(x, y, c), c), y, **close)
    assert (dist(x, z, c) <= dist(x, y, c) + dist(y, z, c) + 1e-9).all()
    torch.testing.assert_close(
        logmap0(mobius_add(x, y, c), c), tangent_add(logmap0(x, c), logmap0(y, c), c), **close
    )


def test_agrees_with_plain_formulas(generator):
    x, v, c = inside(generator, 6, 3), torch.randn(6, 3, dtype=torch.float64), 0.7
    torch.testing.assert_close(expmap0(v, c), twins.exp0(v, c))
    torch.testing.assert_close(logmap0(x, c), twins.log0(x, c))
    torch.testing.assert_close(midpoint(x, c), twins.midpoint(x, c))
    torch.testing.assert_close(frechet_mean(x, c), twins.karcher(x, c), rtol=0, atol=1e-9)


GRADIENTS = {
    "mobius_add": (mobius_add, "pp"),
    "expmap0": (expmap0, "v"),
    "logmap0": (logmap0, "p"),
    "expmap": (expmap, "pv"),
    "logmap": (logmap, "pp"),
    "dist": (dist, "pp"),
    "conformal_factor": (conformal_factor, "p"),
    "transp": (transp, "ppv"),
    "gyration": (gyration, "ppv"),
    "tangent_add": (tangent_add, "vv"),
    "project": (project, "p"),
    "midpoint": (midpoint, "p"),
    "frechet_mean": (frechet_mean, "p"),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_also_of_the_curvature(name, generator):
    function, kinds = GRADIENTS[name]
    c = vec(0.7)[0].requires_grad_()
    arguments = [
        (inside(generator, 3, 2) if kind == "p" else vec(0.4, -0.3).repeat(3, 1) + i).detach()
        for i, kind in enumerate(kinds)
    ]
    arguments = [a.requires_grad_() for a in arguments]

    def call(*args):
        # Finite differences step across the check as little as across the ball.
        return (
            function(*args)
            if name in ("expmap0", "tangent_add", "project")
            else function(*args, check=False)
        )

    assert gradcheck(call, (*arguments, c))
    if name != "frechet_mean":
        assert gradgradcheck(call, (*arguments, c))


def test_gradients_broadcast_and_at_zero(generator):
    c = vec(0.7)[0].requires_grad_()
    x, one = inside(generator, 3, 2).requires_grad_(), inside(generator, 1, 2).requires_grad_()
    for function in (mobius_add, tangent_add, dist):
        assert gradcheck(function, (x, one, c))
        assert gradcheck(function, (one, x, c))
    zero = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    for function in (expmap0, logmap0):
        (slope,) = torch.autograd.grad(function(zero, 0.7)[0, 0], zero)
        assert slope[0, 0] == 1
        assert slope.count_nonzero() == 1
    (slope,) = torch.autograd.grad(dist(zero, zero, 0.7).sum(), zero)
    assert slope.isfinite().all()
    total = tangent_add(zero, zero, 0.7).sum()
    assert (torch.autograd.grad(total, zero)[0] == 2).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_close_to_float64(dtype, generator):
    x, y = inside(generator, 50, 4, most=0.7), inside(generator, 50, 4, most=0.7)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    for function in (mobius_add, dist, logmap):
        found = function(x.to(dtype), y.to(dtype), 0.7)
        assert found.dtype == dtype
        exact = function(x.to(dtype).double(), y.to(dtype).double(), 0.7)
        torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("c", [0.1, 1.0, 7.0])
def test_boundary_in_float32(c, generator):
    """Up to the last float below the radius: nothing infinite, neither values nor gradients."""
    direction = torch.randn(64, 5, generator=generator)
    direction /= direction.norm(dim=-1, keepdim=True)
    for below in (1e-2, 1e-4, 1e-6, 3e-7):
        x = (direction * (1 - below) / math.sqrt(c)).requires_grad_()
        y = x.flip(0)
        for out in (
            logmap0(x, c),
            dist(x, y.detach(), c),
            mobius_add(x, 0.9 * y, c),
            logmap(x, 0.5 * y, c),
            expmap(x, 0.1 * y, c),
            transp(x, 0.5 * y, y, c),
            midpoint(x, c),
            project(x, c),
        ):
            (slope,) = torch.autograd.grad(out.sum(), x)
            assert out.isfinite().all()
            assert slope.isfinite().all()
    # log₀ sees 1 - c|x|² to rounding; dist does not cancel.
    x = direction.double() * (1 - 1e-3) / math.sqrt(c)
    torch.testing.assert_close(
        dist(x.float(), -x.float(), c).double(), dist(x, -x, c), rtol=1e-4, atol=0
    )
    far = torch.full((3, 2), 1e4)
    assert (project(far, c).norm(dim=-1) < 1 / math.sqrt(c)).all()
    assert (expmap0(far, c).norm(dim=-1) < 1 / math.sqrt(c)).all()


def test_projection():
    for dtype, eps in ((torch.float32, 4e-3), (torch.float64, 1e-5)):
        out = project(torch.tensor([[3.0, 4.0], [0.1, 0.2]], dtype=dtype), 0.25)
        assert float(out[0].norm()) == pytest.approx(2 * (1 - eps), rel=1e-6)
        assert out[1].tolist() == torch.tensor([0.1, 0.2], dtype=dtype).tolist()
    assert float(project(vec(3.0, 4.0), 0.25, eps=0.5).norm()) == pytest.approx(1)


def test_means_with_weights_and_dimensions(generator):
    x = inside(generator, 3, 5, 4)
    torch.testing.assert_close(
        midpoint(x, 0.7, dim=1), torch.stack([twins.midpoint(p, 0.7) for p in x])
    )
    w = torch.tensor([1.0, 0, 2, 0, 0], dtype=torch.float64).repeat(3, 1)
    repeated = x[:, [0, 2, 2]]
    torch.testing.assert_close(midpoint(x, 0.7, w, dim=1), midpoint(repeated, 0.7, dim=1))
    # Isometries move the mean along.
    a = inside(generator, 1, 4)
    moved = frechet_mean(mobius_add(a, x[0], 0.7), 0.7)
    torch.testing.assert_close(moved, mobius_add(a[0], frechet_mean(x[0], 0.7), 0.7))
    assert frechet_mean(x[0].float(), 0.7).dtype == torch.float32
    torch.testing.assert_close(frechet_mean(x[0, :1], 0.7), x[0, 0])
    with pytest.raises(RuntimeError, match="max_iter = 1 "):
        frechet_mean(x[0], 0.7, max_iter=1)


def test_module_is_the_functions_and_learns_c():
    ball = PoincareBall(0.5, learnable=True, dtype=torch.float64)
    assert float(ball.c.detach()) == pytest.approx(0.5, rel=1e-12)
    for name in ("logmap0", "conformal_factor"):
        assert torch.equal(getattr(ball, name)(X), getattr(poincare, name)(X, ball.c))
    for name in ("mobius_add", "dist", "logmap"):
        assert torch.equal(getattr(ball, name)(X, Y), getattr(poincare, name)(X, Y, ball.c))
    for name in ("transp", "gyration"):
        assert torch.equal(getattr(ball, name)(X, Y, V), getattr(poincare, name)(X, Y, V, ball.c))
    assert torch.equal(ball.expmap(X, V), expmap(X, V, ball.c))
    assert torch.equal(ball.expmap0(V), expmap0(V, ball.c))
    assert torch.equal(ball.project(V), project(V, ball.c))
    assert torch.equal(ball.midpoint(POINTS), midpoint(POINTS, ball.c))
    assert torch.equal(ball.frechet_mean(POINTS), frechet_mean(POINTS, ball.c))
    ball.dist(X, Y).backward()
    assert ball.raw_c.grad != 0
    for c in (1e-6, 0.1, 1, 50.0, 1e4):
        assert float(PoincareBall(c, dtype=torch.float64).c) == pytest.approx(c, rel=1e-9)
    assert not list(PoincareBall(1.0).parameters())
    assert "c=0.5" in repr(ball)
    assert "learnable=True" in repr(ball)


def test_module_keeps_its_curvature_in_half_precision_and_in_state():
    ball = PoincareBall(0.1)
    assert float(ball.half().c) == pytest.approx(0.1, rel=1e-6)
    assert float(ball.bfloat16().c) == pytest.approx(0.1, rel=1e-6)
    assert ball.double().c.dtype == torch.float64
    other = PoincareBall(2.0)
    other.load_state_dict(PoincareBall(0.1).state_dict())
    assert float(other.c) == pytest.approx(0.1, rel=1e-6)


def test_bad_input():
    with pytest.raises(ValueError, match=r"c must be positive.*got -0\.1.*pass c=0\.1"):
        dist(X, Y, -0.1)
    with pytest.raises(ValueError, match="c must be positive"):
        PoincareBall(0)
    with pytest.raises(ValueError, match="c must be positive"):
        dist(X, Y, torch.tensor(-1.0))
    with pytest.raises(ValueError, match="one number"):
        dist(X, Y, torch.ones(2))
    with pytest.raises(ValueError, match="c must be positive"):
        PoincareBall(math.nan)
    far = vec(0.8, 0.8)
    for call in (
        lambda: mobius_add(far, X, 1),
        lambda: mobius_add(X, far, 1),
        lambda: logmap0(far, 1),
        lambda: dist(far, X, 1),
        lambda: expmap(far, V, 1),
        lambda: logmap(X, far, 1),
        lambda: transp(X, far, V, 1),
        lambda: gyration(far, X, V, 1),
        lambda: conformal_factor(far, 1),
        lambda: midpoint(torch.stack([X, far]), 1),
        lambda: frechet_mean(torch.stack([X, far]), 1),
        lambda: dist(vec(math.nan, 0), X, 1),
    ):
        with pytest.raises(ValueError, match=r"must lie inside the ball of radius 1/√c = 1"):
            call()
    assert float(dist(far, X, 0.1)) > 0
    with pytest.raises(
        TypeError, match=r"x must be a real floating-point tensor, got torch\.int64"
    ):
        mobius_add(torch.tensor([0, 0]), X, 1)
    with pytest.raises(ValueError, match="one last dimension"):
        mobius_add(X, vec(0, 0, 0), 1)
    with pytest.raises(ValueError, match="must broadcast"):
        mobius_add(torch.zeros(2, 2), torch.zeros(3, 2), 1)
    with pytest.raises(ValueError, match="without dimensions"):
        expmap0(torch.tensor(1.0), 1)
    for dim in (1, -1, 5):
        with pytest.raises(ValueError, match="not the last"):
            midpoint(POINTS, 1, dim=dim)
    with pytest.raises(ValueError, match="w must be"):
        midpoint(POINTS, 1, torch.ones(2))
    for bad in ({"tol": 0}, {"max_iter": 0}):
        with pytest.raises(ValueError, match="at least one point"):
            frechet_mean(POINTS, 1, **bad)
    with pytest.raises(ValueError, match="eps"):
        project(X, 1, eps=1.5)


def test_module_projects_or_debugs_when_asked():
    far = vec(0.8, 0.8)
    with pytest.raises(ValueError, match="inside the ball"):
        PoincareBall(1.0).dist(far, X)
    pulled = PoincareBall(1.0, project=True, dtype=torch.float64).dist(far, X)
    assert float(pulled) == pytest.approx(float(dist(project(far, 1), X, 1)))
    quiet = PoincareBall(1.0, check=False)
    assert quiet.dist(vec(math.nan, 0), X).isnan()
    with pytest.raises(RuntimeError, match="dist gave NaN"):
        PoincareBall(1.0, check=False, debug=True).dist(vec(math.nan, 0), X)
    with pytest.raises(RuntimeError, match="expmap0 gave NaN"):
        PoincareBall(1.0, debug=True).expmap0(vec(math.nan, 0))
