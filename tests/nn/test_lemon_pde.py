"""Samples of families: shapes, seeds, ranges, refusals; equations of a user's own."""

import math
import warnings

import pytest
import torch

from stiefel.nn.lemon import pde
from stiefel.nn.lemon.pde import initial
from stiefel.nn.lemon.pde.grid import Grid, centres
from stiefel.nn.lemon.pde.residual import residual
from stiefel.nn.lemon.pde.sampling import acceptable
from stiefel.nn.lemon.pde.shock import limited_slope
from stiefel.nn.lemon.pde.spectral import integrating_factor
from stiefel.nn.lemon.pde.split import split, template
from stiefel.nn.lemon.tokenizer import LAPTOP_OPERATORS, LAPTOP_VARIABLES, PolishTokenizer

CARD = (
    "advection", "sin flux", "bistable", "heat", "Klein–Gordon", "logistic", "KdV", "Burgers",
    "wave", "sine-Gordon",
)  # fmt: skip
CHEAP = [name for name in pde.FAMILIES if name != "cahn_hilliard"]


@pytest.fixture
def own():
    """Names of families that the test registers; taken out again."""
    before = set(pde.FAMILIES)
    yield
    for name in set(pde.FAMILIES) - before:
        pde.FAMILIES.remove(name)


def test_the_families_of_the_paper_are_there():
    assert len(pde.FAMILIES) == 21
    assert all(name in pde.FAMILIES for name in CARD)
    assert pde.FAMILIES["Klein–Gordon"] is pde.FAMILIES["klein_gordon"]
    assert 3 not in pde.FAMILIES


@pytest.mark.parametrize("family", CHEAP)
def test_samples_have_the_shapes_promised(family):
    s = pde.sample(family, 3, nx=16, nt=5, grid=64, seed=1, per_draw=2)
    assert s.u.shape == (3, 5, 16)
    assert s.u.dtype == s.t.dtype == s.x.dtype == torch.float32
    assert s.u.isfinite().all()
    assert len(s) == len(s.tokens) == len(s.formulas) == 3
    assert s.dropped == 0
    torch.testing.assert_close(s.t, torch.arange(5) * 0.4)
    torch.testing.assert_close(s.x, (torch.arange(16) + 0.5) / 8)
    assert set(s.params) == set(pde.FAMILIES[family].parameters)
    assert all(v.shape == (3,) and v.dtype == torch.float64 for v in s.params.values())
    for row, text in zip(s.tokens, s.formulas, strict=True):
        assert PolishTokenizer().decode(row) == text
    if not any(p.initial for p in pde.FAMILIES[family].parameters.values()):
        assert torch.equal(s.tokens[0], s.tokens[1])  # one parameter set


def test_cahn_hilliard_samples_stay_between_the_phases():
    s = pde.sample("cahn_hilliard", 2, nx=32, nt=4, grid=128, parameters={"eps": 0.03}, rough=0)
    assert s.u.abs().max() < 1.05
    assert s.u[:, -1].std() > s.u[:, 0].std()


def test_laptop_vocabulary_writes_the_card_s_families():
    tokenizer = PolishTokenizer(LAPTOP_VARIABLES, LAPTOP_OPERATORS)
    used, longest = set(), 0
    for family in CARD:
        s = pde.sample(family, 2, nx=8, nt=2, grid=32, tokenizer=tokenizer)
        used |= set(tokenizer.words(s.formulas[0]))
        longest = max(longest, s.tokens.shape[1])
    assert longest == 29
    assert {f"{v}_0" for v in LAPTOP_VARIABLES} <= used
    with pytest.raises(KeyError, match="'uxxxx'"):
        pde.sample("cahn_hilliard", 1, nx=16, nt=2, grid=16, tokenizer=tokenizer,
                   parameters={"eps": 0.2})  # fmt: skip


def test_seeds_decide_everything():
    a, b = (pde.sample("heat", 4, seed=5) for _ in range(2))
    assert torch.equal(a.u, b.u)
    assert torch.equal(a.tokens, b.tokens)
    assert not torch.equal(a.u, pde.sample("heat", 4, seed=6).u)
    advection = pde.sample("advection", 4, seed=5)
    assert not torch.allclose(a.u[:, 0], advection.u[:, 0])
    first = pde.sample("heat", 4, seed=torch.Generator().manual_seed(3))
    again = pde.sample("heat", 4, seed=torch.Generator().manual_seed(3))
    assert torch.equal(first.u, again.u)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_precision_is_the_double_one_rounded(dtype):
    double = pde.sample("burgers", 2, nx=32, nt=4, grid=64, dtype=torch.float64)
    s = pde.sample("burgers", 2, nx=32, nt=4, grid=64, dtype=dtype)
    assert s.u.dtype == dtype
    assert torch.equal(s.u, double.u.to(dtype))


def test_parameters_spread_by_gamma_and_have_three_digits():
    s = pde.sample("advection", 200, nx=8, nt=2, per_draw=1, gamma=0.3)
    beta = s.params["beta"]
    assert float(beta.min()) >= 0.5 * 0.7 - 1e-3
    assert float(beta.max()) <= 0.5 * 1.3 + 1e-3
    assert float(beta.std()) == pytest.approx(0.5 * 0.3 / math.sqrt(3), rel=0.15)
    assert all(float(f"{b:.2e}") == b for b in beta.tolist())
    exact = pde.sample("advection", 3, nx=8, nt=2, per_draw=1, gamma=0)
    assert exact.params["beta"].tolist() == [0.5] * 3
    assert pde.sample("bistable", 50, nx=8, nt=2, per_draw=1).params["a"].max() > 0.7
    other = pde.sample("burgers", 2, nx=32, nt=2, grid=32, gamma=0, parameters={"eps": 0.03})
    assert "0.00955*uxx" in other.formulas[0]


def test_relabelling_puts_its_factor_before_the_time_derivative():
    for family, factor in (("kdv", 2), ("fokker_planck", 20), ("heat", 1), ("wave", 4)):
        text = pde.sample(family, 1, nx=16, nt=2, grid=32, gamma=0).formulas[0]
        assert text.startswith(f"{factor}*ut")


def test_points_kept_are_those_of_the_fine_grid():
    """32 of 128 points: the solver's values there; finite volumes: means over cells."""
    s = pde.sample("heat", 1, nx=32, nt=3, grid=128, gamma=0, dtype=torch.float64, rough=0)
    fine = pde.sample("heat", 1, nx=32, nt=3, grid=256, gamma=0, dtype=torch.float64, rough=0)
    # Both see the same sines, normalised on their own grids.
    torch.testing.assert_close(s.u, fine.u, rtol=0, atol=2e-3)
    law = pde.sample("inviscid_burgers", 4, nx=16, nt=3, grid=64, dtype=torch.float64)
    mean = law.u.mean(-1)
    torch.testing.assert_close(mean, mean[:, :1].expand_as(mean), rtol=0, atol=1e-13)


def test_initial_data():
    x, g = centres(64), torch.Generator().manual_seed(0)
    for u in (initial.sines(x, 50, 4, g), initial.gaussian_process(x, 50, g)):
        torch.testing.assert_close(u.amin(-1), torch.zeros(50, dtype=torch.float64))
        torch.testing.assert_close(u.amax(-1), torch.ones(50, dtype=torch.float64))
    smooth = initial.sines(x, 50, 2, g, rough=0)
    spectrum = torch.fft.rfft(smooth).abs()
    assert float(spectrum[:, 3:].max()) < 1e-10
    shocks = initial.steps(x, 50, 2, True, g)
    assert bool((shocks.diff(dim=-1) <= 0).all())
    assert bool(((shocks.diff(dim=-1) != 0).sum(-1) <= 2).all())
    assert bool((shocks[:, x < 0.4] == shocks[:, :1]).all())
    rising = initial.steps(x, 50, 1, False, g)
    assert bool((rising.diff(dim=-1) >= 0).all())
    bump = initial.bump(x, x.new_tensor([[0.1]]), x.new_tensor([[0.3]]))
    torch.testing.assert_close(bump[0, 0], bump[0, 5], rtol=0, atol=0.2)  # wraps around


def test_gaussian_process_has_the_correlation_of_its_kernel():
    """exp(−d²/2ℓ²) at distance d, ℓ = .2, and around the other side."""
    x, g = centres(40), torch.Generator().manual_seed(0)
    u = initial.gaussian_field(x, 20_000, g)
    for places in (0, 2, 4, 8, 38):
        d = min(places, 40 - places) / 20
        seen = float((u * u.roll(places, -1)).mean() / u.square().mean())
        assert seen == pytest.approx(math.exp(-((d / 0.2) ** 2) / 2), abs=0.02)


def test_shock_data_stay_on_their_side():
    for kind, falling in (("one_shock", True), ("two_shocks", True), ("rarefaction", False)):
        s = pde.sample("burgers", 5, nx=32, nt=6, grid=128, ic=kind, parameters={"eps": 0.03})
        slope = s.u.diff(dim=-1)
        assert bool((slope <= 1e-6).all() if falling else (slope >= -1e-6).all())
        law = pde.sample("inviscid_sin_flux", 5, nx=32, nt=6, ic=kind)
        slope = law.u.diff(dim=-1)  # concave flux: rising steps are shocks
        assert bool((slope >= -1e-6).all() if falling else (slope <= 1e-6).all())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"family": "haet"}, KeyError, "'haet'.*'heat'"),
        ({"family": 3}, TypeError, "int"),
        ({"n": 0}, ValueError, "n must be at least 1"),
        ({"nx": 4}, ValueError, "nx must be at least 8"),
        ({"nt": 1}, ValueError, "nt must be at least 2"),
        ({"per_draw": 0}, ValueError, "per_draw"),
        ({"gamma": 1.0}, ValueError, r"gamma must be in \[0, 1\)"),
        ({"gamma": -0.1}, ValueError, "gamma"),
        ({"gamma": math.nan}, ValueError, "gamma"),
        ({"rough": 1.5}, ValueError, "rough"),
        ({"grid": 100}, ValueError, "multiple of nx = 128"),
        ({"grid": 64}, ValueError, "multiple"),
        ({"ic": "one_shock"}, ValueError, "sines, gp, got 'one_shock'"),
        ({"ic": "bump"}, ValueError, "'bump'"),
        ({"dtype": torch.int64}, TypeError, "floating"),
        ({"parameters": {"c2": 1.0}}, KeyError, "'c2'.*'c1'"),
        ({"parameters": {"c1": -1e-3}}, ValueError, r"c1 of heat must be in \[0, 1000\]"),
        ({"parameters": {"c1": math.nan}}, ValueError, "nan"),
        ({"family": "bistable", "parameters": {"a": 1.2}}, ValueError, r"a of bistable.*\[0, 1\]"),
        ({"family": "porous_medium", "parameters": {"m": 2.5}}, ValueError, "one of 2, 3, 4"),
        ({"family": "burgers", "parameters": {"eps": -0.03}}, ValueError, "eps of burgers"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        pde.sample(**({"family": "heat", "n": 2} | arguments))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"initial": torch.full((1, 16), math.nan)}, ValueError, "finite"),
        ({"initial": torch.ones(1, 4)}, ValueError, "at least 8 points"),
        ({"initial": torch.ones(1, 16, dtype=torch.int64)}, None, ""),
        ({"nt": 1}, ValueError, "nt"),
        ({"steps": 0}, ValueError, "steps"),
        ({"periodic": False}, ValueError, "periodic domain only"),
        ({"parameters": {"c3": torch.ones(1)}}, KeyError, "'c3'.*'c1'"),
        ({"parameters": {"c1": -torch.ones(1)}}, ValueError, "c1 of heat"),
        ({"family": "porous_medium", "initial": -torch.ones(1, 16)}, ValueError, "negative"),
    ],
)
def test_solve_refuses_bad_input(arguments, error, message):
    given = {"family": "heat", "initial": torch.ones(1, 16)} | arguments
    family, u0 = given.pop("family"), given.pop("initial")
    if error is None:  # the shapes of the signature refuse integers while tests run
        with pytest.raises(Exception, match="initial"):
            pde.solve(family, u0, **given)
        return
    with pytest.raises(error, match=message):
        pde.solve(family, u0, **given)


def test_solve_takes_a_parameter_for_every_sample():
    u0 = torch.sin(math.pi * centres(32)).expand(2, -1)
    u = pde.solve("heat", u0, {"c1": torch.tensor([1e-3, 1e-2])}, nt=4)
    for i, c in enumerate((1e-3, 1e-2)):
        torch.testing.assert_close(u[i], pde.solve("heat", u0[i : i + 1], {"c1": c}, nt=4)[0])


def test_ill_posed_linear_parts_are_refused():
    grid = Grid(32)
    u0 = torch.ones(1, 32, dtype=torch.float64)
    times = torch.linspace(0, 1, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="viscosity is negative"):
        integrating_factor(u0, grid, 0.01 * grid.k[None] ** 2, torch.zeros_like, times, 0.1)


def test_products_of_two_fields_are_not_aliased():
    """Galerkin: the square's modes below N/3 as on a grid twice as fine."""
    coarse, fine = Grid(32), Grid(64)
    spectrum = torch.randn(
        coarse.modes, dtype=torch.complex128, generator=torch.Generator().manual_seed(0)
    )
    spectrum[0] = 1.0
    exact = fine.spectrum(fine.field(2 * spectrum) ** 2)[: coarse.modes] / 2
    torch.testing.assert_close(coarse.spectrum(coarse.field(spectrum) ** 2), exact)


def test_limiter_is_exact_on_lines_and_zero_at_extrema():
    line = torch.arange(6, dtype=torch.float64)[None] * 0.3
    torch.testing.assert_close(limited_slope(line), torch.full((1, 4), 0.3, dtype=torch.float64))
    peak = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64)
    assert float(limited_slope(peak)) == 0
    step = torch.tensor([[0.0, 0.1, 1.0]], dtype=torch.float64)
    assert float(limited_slope(step)) == pytest.approx(0.2)


def test_solutions_that_vanish_explode_or_are_not_finite_do_not_count():
    u = torch.ones(6, 4, 8, dtype=torch.float64)
    u[1] *= 0.1
    u[2] *= 23
    u[3, 2, 1] = math.nan
    u[4, 0, 0] = math.inf
    u[5] *= 22
    assert acceptable(u).tolist() == [True, False, False, False, False, True]


def test_blow_ups_are_dropped_counted_and_refused_when_too_many(own):
    pde.register("blowing", None, "ut - r*u**2", {"r": 0.4}, waves=1)
    with pytest.warns(UserWarning, match=r"\d+ of \d+ solutions of blowing were dropped"):
        s = pde.sample("blowing", 40, nx=16, nt=8, gamma=0.6, per_draw=1)
    assert len(s) == 40
    assert s.dropped > 0
    assert s.u.abs().max() <= 1e3
    with pytest.raises(pde.TrajectoryError, match="solutions of blowing were dropped"):
        pde.sample("blowing", 20, nx=16, nt=8, parameters={"r": 5.0})


@pytest.mark.parametrize(
    "family",
    ["burgers", "cubic_flux", "sin_flux", "cos_flux", "logistic", "square_logistic", "bistable",
     "kdv", "fokker_planck", "heat", "advection", "wave", "klein_gordon", "sine_gordon"],
)  # fmt: skip
def test_solvers_made_from_the_formula_agree_with_the_families_own(family, own):
    """The formula alone, through ``register``: an independent route to the same data."""
    f = pde.FAMILIES[family]
    q = {k: float(v) for k, v in f.at_centres().items()}
    mine = pde.register("mine", None, f.formula, {k: pde.Parameter(v) for k, v in q.items()},
                        horizon=f.horizon, substeps=40)  # fmt: skip
    x = centres(128)
    u0 = (0.5 + 0.3 * torch.sin(math.pi * x) + 0.1 * torch.cos(2 * math.pi * x))[None]
    values = {"eps": 0.2} if "eps" in f.parameters else {}
    if values:
        q["d"] = float(f"{0.2 / math.pi:.2e}")
    ours, theirs = pde.solve(mine.name, u0, q, nt=4), pde.solve(family, u0, values, nt=4)
    allowed = {"fokker_planck": 5e-3, "sine_gordon": 1e-5, "kdv": 1e-5}.get(family, 1e-7)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=allowed)


def test_a_new_equation_by_its_right_hand_side(own):
    family = pde.register(
        "damped_burgers",
        lambda u, dx, q: q["nu"] * dx(u, 2) - dx(u * u) / 2 - q["r"] * u,
        "ut + u*ux - nu*uxx + r*u",
        {"nu": 0.05, "r": pde.Parameter(0.2, low=0.0, high=2.0)},
        horizon=1.0,
    )
    s = pde.sample("damped_burgers", 3, nt=200, rough=0, dtype=torch.float64)
    assert s.formulas[0].startswith("2*ut + u*ux - ")
    assert float(residual(s.formulas, s.u, s.t, s.x).max()) < 1e-6
    assert pde.FAMILIES["damped burgers"] is family
    with pytest.raises(ValueError, match="nu of damped_burgers"):
        pde.sample("damped_burgers", 1, parameters={"nu": -0.05})


def test_a_second_order_equation_of_one_s_own(own):
    pde.register("cubic_wave", None, "utt - uxx + u + b*u**3", {"b": 0.5}, horizon=1.0)
    s = pde.sample("cubic_wave", 3, nt=400, rough=0, dtype=torch.float64)
    assert float(residual(s.formulas, s.u, s.t, s.x).max()) < 1e-4


@pytest.mark.parametrize(
    ("rhs", "formula", "parameters", "error", "message"),
    [
        (lambda u, dx, q: dx(u, 2), "ut + uxx", {}, ValueError, "viscosity is negative"),
        (lambda u, dx, q: dx(u, 2), "ut - 0.5*uxx", {}, ValueError, "disagree by"),
        (lambda u, dx, q: -u * dx(u), "ut - u*ux", {}, ValueError, "disagree by"),
        (None, "u + ux", {}, ValueError, "exactly one term with ut"),
        (None, "ut + utt", {}, ValueError, "has 2"),
        (None, "u*ut - uxx", {}, ValueError, "only be multiplied by constants"),
        (None, "ut - nu*uxx", {}, KeyError, "'nu'"),
        (None, "ut - nu*uxx", {"nu": -0.1}, ValueError, "negative"),
        (None, "ut - nu*uxx", {"nu": math.nan}, ValueError, "finite"),
        (None, "ut - uxx", {"u": 1.0}, ValueError, "called 'u'"),
        (None, "utt + uxx", {}, ValueError, "ill-posed"),
        (None, "utt - uxx + ux", {}, ValueError, "ux or uxxx"),
        (None, "ut - uxx +", {}, ValueError, "formula ends"),
    ],
)
def test_bad_equations_are_refused(rhs, formula, parameters, error, message, own):
    with pytest.raises(error, match=message):
        pde.register("bad", rhs, formula, parameters)
    assert "bad" not in pde.FAMILIES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "heat"}, "already"), ({"name": "Not good"}, "lower-case"),
        ({"horizon": 0.0}, "horizon"), ({"substeps": 0}, "substeps"), ({"waves": 0}, "waves"),
        ({"initial": ("one_shock",)}, "initial"), ({"initial": ()}, "initial"),
        ({"refine": -1}, "refine"), ({"name": "heat", "replace": True}, "already"),
    ],
)  # fmt: skip
def test_bad_registrations_are_refused(options, message, own):
    given = {"name": "bad", "rhs": None, "formula": "ut - uxx"} | options
    with pytest.raises(ValueError, match=message):
        pde.register(**given)


def test_families_of_the_paper_stay_and_own_ones_may_change(own):
    with pytest.raises(ValueError, match="stays"):
        pde.FAMILIES.remove("heat")
    pde.register("mine", None, "ut - 0.1*uxx")
    with pytest.raises(ValueError, match="already"):
        pde.register("mine", None, "ut - 0.2*uxx")
    pde.register("mine", None, "ut - 0.2*uxx", replace=True)
    assert pde.FAMILIES["mine"].formula == "ut - 0.2*uxx"


def test_linear_parts_are_found_in_formulas():
    q = ("a", "b")
    parts = split(template("2*ut - a*b*uxx + 3*u - uxxx*b + u*ux - x*u", q), q)
    assert parts.order == 1
    assert {m: str(e) for m, e in parts.linear.items()} == {2: "a*b", 0: "-3", 3: "b"}
    assert str(parts.rest) == "-(u*ux) + x*u"


def test_residual_refuses_what_it_cannot_judge():
    s = pde.sample("heat", 2, nx=16, nt=8, grid=32, dtype=torch.float64)
    with pytest.raises(ValueError, match="at least 7"):
        residual(s.formulas, s.u[:, :6], s.t[:6], s.x)
    with pytest.raises(ValueError, match="one or 2 formulas"):
        residual([*s.formulas, "ut"], s.u, s.t, s.x)
    with pytest.raises(KeyError, match="'w'"):
        residual("w", s.u, s.t, s.x)


def test_nothing_is_said_when_nothing_is_dropped():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pde.sample("wave", 3).dropped == 0
