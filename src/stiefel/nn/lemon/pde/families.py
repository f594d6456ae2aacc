"""The families of the paper: formulas, parameters, solvers.

Source: Sun, Zhang, Schaeffer, arXiv 2408.16168 and its code; Cahn–Hilliard and porous medium are
the equations their formulas should state, see ``docs/lemon_families.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from stiefel.nn.lemon.pde.degenerate import porous_medium
from stiefel.nn.lemon.pde.family import STEPS, Family, Parameter, Problem, Solver
from stiefel.nn.lemon.pde.shock import FLUXES, Flux, finite_volume
from stiefel.nn.lemon.pde.spectral import (
    exact_first_order,
    exact_second_order,
    integrating_factor,
    kick_drift_kick,
)

# Substeps per 1/32 of the horizon on 128 points (sheet); Fokker–Planck and Cahn–Hilliard are ours.
FLUX_SUBSTEPS, REACTION_SUBSTEPS, KDV_SUBSTEPS = 12, 4, 40
SINE_GORDON_SUBSTEPS, FOKKER_PLANCK_SUBSTEPS, CAHN_HILLIARD_SUBSTEPS = 8, 16, 400

EXACT = "exact in Fourier space"
STEPPED = "Fourier, 2/3 rule, integrating factor with RK4"
VOLUMES = "finite volumes: MUSCL (MC limiter), local Lax–Friedrichs, SSP-RK3"

BOLTZMANN = 1.380649e-23
TEMPERATURE = 300.0
# Of the diffusing sphere, in metres; the sheet names none: the value of the package fplanck's own
# example, with which the time of 0.1 s and a length unit of 1 µm fit [reconstructed].
RADIUS = 50e-9

Q = Mapping[str, Tensor]


def _positive(centre: float | int, high: float = 1e3) -> Parameter:
    return Parameter(centre, low=0.0, high=high)


def _first(symbol: Callable[[Tensor, Q], Tensor]) -> Solver:
    return lambda p: exact_first_order(p.initial, lambda k: symbol(k, p.q), p.times)


def _second(squared: Callable[[Tensor, Q], Tensor]) -> Solver:
    return lambda p: exact_second_order(p.initial, lambda k: squared(k, p.q).sqrt(), p.times)


def _viscous(flux: Flux) -> Solver:
    """Spectral for periodic data, finite volumes for steps."""

    def solve(p: Problem) -> Tensor:
        k, d = p.q["k"], p.q["d"]
        if not p.periodic:
            return finite_volume(p.initial, flux, k, p.times, viscosity=d, periodic=False)
        outward = -k * p.grid.ik
        return integrating_factor(
            p.initial,
            p.grid,
            -d * p.grid.k**2,
            lambda s: p.grid.spectrum(flux.value(p.grid.field(s))).mul_(outward),
            p.times,
            p.longest(FLUX_SUBSTEPS, 2.0),
        )

    return solve


def _inviscid(flux: Flux) -> Solver:
    return lambda p: finite_volume(p.initial, flux, p.q["k"], p.times, periodic=p.periodic)


def _reaction(rate: Callable[[Tensor, Q], Tensor]) -> Solver:
    def solve(p: Problem) -> Tensor:
        return integrating_factor(
            p.initial,
            p.grid,
            -p.q["nu"] * p.grid.k**2,
            lambda s: p.grid.spectrum(p.q["rho"] * rate(p.grid.field(s), p.q)),
            p.times,
            p.longest(REACTION_SUBSTEPS, 2.0),
        )

    return solve


def _kdv(p: Problem) -> Tensor:
    outward = -0.5 * p.grid.ik
    return integrating_factor(
        p.initial,
        p.grid,
        1j * p.q["d"] * p.grid.k**3,
        lambda s: p.grid.spectrum(p.grid.field(s).square_()).mul_(outward),
        p.times,
        p.longest(KDV_SUBSTEPS, 1.0),
    )


def _cahn_hilliard(p: Problem) -> Tensor:
    """u_t = ∂ₓₓ(u³ − u − ε² u_xx), linear around the phases u = ±1, where nothing is left over."""
    squared = p.grid.k**2
    return integrating_factor(
        p.initial,
        p.grid,
        -2 * squared - p.q["e"] * squared**2,
        lambda s: p.grid.spectrum(_cubic(p.grid.field(s))).mul_(-squared),
        p.times,
        p.longest(CAHN_HILLIARD_SUBSTEPS, 0.5),
    )


def _cubic(u: Tensor) -> Tensor:
    return u * u * u - 3 * u


def _sine_gordon(p: Problem) -> Tensor:
    return kick_drift_kick(
        p.initial,
        p.grid,
        p.grid.k[None] ** 2,
        lambda s: p.grid.spectrum(-p.q["c"] * torch.sin(p.grid.field(s))),
        p.times,
        p.longest(SINE_GORDON_SUBSTEPS, 1.0),
    )


def _fokker_planck(p: Problem) -> Tensor:
    """p_t = D p_xx − a ∂ₓ(sin(πx) p): drift down the potential v cos(πx) of kT, a = Dvπ."""
    force = torch.sin(math.pi * p.grid.x)
    outward = -p.q["a"] * p.grid.ik
    return integrating_factor(
        p.initial,
        p.grid,
        -p.q["D"] * p.grid.k**2,
        lambda s: p.grid.spectrum(force * p.grid.field(s)).mul_(outward),
        p.times,
        p.longest(FOKKER_PLANCK_SUBSTEPS, 0.1),
    )


def _drift(q: Q) -> dict[str, Tensor]:
    """D in µm²/s by Stokes and Einstein, and a = Dvπ; κ = π is 3.14 in the tokens."""
    thermal = BOLTZMANN * TEMPERATURE
    diffusion = thermal / (6 * math.pi * q["viscosity"] * RADIUS) * 1e12
    drift = diffusion * q["c"] / thermal * math.pi
    return {
        "D": diffusion,
        "a": drift,
        "b": drift * math.pi,
        "kappa": torch.full_like(drift, math.pi),
    }


def _medium(q: Mapping[str, float | int]) -> str:
    return {
        2: "ut - 2*u*uxx - 2*ux**2",
        3: "ut - 3*u**2*uxx - 6*u*ux**2",
        4: "ut - 4*u**3*uxx - 12*u**2*ux**2",
    }[round(q["m"])]


def _conservation_laws() -> list[Family]:
    every = ("sines", "gp", *STEPS)
    laws = []
    for name, flux in FLUXES.items():
        laws.append(
            Family(
                name, f"ut {flux.advection} - d*uxx",
                {"k": Parameter(1.0, -1e3, 1e3), "eps": _positive(0.01)},
                _viscous(flux), STEPPED + "; steps: " + VOLUMES,
                lambda q: {"k": q["k"], "d": q["eps"] / math.pi},
                initial=every, refine=4, convex=flux.convex,
            )
        )  # fmt: skip
        laws.append(
            Family(
                f"inviscid_{name}", f"ut {flux.advection}", {"k": Parameter(1.0, -1e3, 1e3)},
                _inviscid(flux), VOLUMES, initial=every, refine=2, cells=True, convex=flux.convex,
            )
        )  # fmt: skip
    return laws


def _reactions() -> list[Family]:
    nu, rho = _positive(3e-3), Parameter(1.0, -1e2, 1e2)
    return [
        Family(
            "linear_reaction", "ut - nu*uxx - rho*u", {"nu": nu, "rho": Parameter(0.1, -1e2, 1e2)},
            _first(lambda k, q: q["rho"] - q["nu"] * k**2), EXACT,
        ),
        Family(
            "logistic", "ut - nu*uxx - rho*u*(1 - u)", {"nu": nu, "rho": rho},
            _reaction(lambda u, q: u * (1 - u)), STEPPED,
        ),
        Family(
            "square_logistic", "ut - nu*uxx - rho*u**2*(1 - u)**2", {"nu": nu, "rho": rho},
            _reaction(lambda u, q: (u * (1 - u)) ** 2), STEPPED,
        ),
        Family(
            "bistable", "ut - nu*uxx - rho*u*(1 - u)*(u - a)",
            {"nu": nu, "rho": rho, "a": Parameter(0.5, 0.0, 1.0, span=(0.0, 1.0))},
            _reaction(lambda u, q: u * (1 - u) * (u - q["a"])), STEPPED,
        ),
    ]  # fmt: skip


def _waves() -> list[Family]:
    return [
        Family(
            "wave", "utt - b*uxx", {"beta": Parameter(0.5, -1e3, 1e3)},
            _second(lambda k, q: q["b"] * k**2), EXACT,
            lambda q: {"b": q["beta"] ** 2}, horizon=1.0,
        ),
        Family(
            "klein_gordon", "utt - a*uxx + b*u",
            {"c": Parameter(1.0, -1e2, 1e2), "m": Parameter(0.1, -1e2, 1e2)},
            _second(lambda k, q: q["a"] * k**2 + q["b"]), EXACT,
            lambda q: {"a": q["c"] ** 2, "b": q["m"] ** 2 * q["c"] ** 4}, horizon=1.0,
        ),
        Family(
            "sine_gordon", "utt - uxx + c*sin(u)", {"c": Parameter(1.0, -1e2, 1e2)},
            _sine_gordon, "Strang: kick, wave exactly in Fourier space, kick", horizon=1.0,
        ),
    ]  # fmt: skip


def _others() -> list[Family]:
    return [
        Family(
            "heat", "ut - c1*uxx", {"c1": _positive(3e-3)},
            _first(lambda k, q: -q["c1"] * k**2), EXACT, waves=4,
        ),
        Family(
            "advection", "ut + beta*ux", {"beta": Parameter(0.5, -1e3, 1e3)},
            _first(lambda k, q: -1j * q["beta"] * k), EXACT,
        ),
        Family(
            "kdv", "ut + d*uxxx + u*ux", {"delta": Parameter(0.022, 0.0, 1.0)}, _kdv, STEPPED,
            lambda q: {"d": q["delta"] ** 2}, horizon=1.0,
        ),
        Family(
            "cahn_hilliard", "ut - 3*u**2*uxx - 6*u*ux**2 + uxx + e*uxxxx",
            {"eps": Parameter(0.01, 0.005, 1.0)}, _cahn_hilliard, STEPPED,
            lambda q: {"e": q["eps"] ** 2}, horizon=0.5, refine=4,
        ),
        Family(
            "porous_medium", _medium,
            {
                "m": Parameter(2.0, 2.0, 4.0, choices=(2.0, 3.0, 4.0)),
                "A": Parameter(10.0, 1e-3, 1e3, initial=True),
                "centre": Parameter(1.0, 0.0, 2.0, initial=True),
                "width": Parameter(1.0, 1e-2, 1e2, initial=True),
            },
            lambda p: porous_medium(p.initial, p.q["m"], p.times),
            "finite volumes, three points; RKL2 in time",
            lambda q: {"m": q["m"]}, horizon=0.1, initial=("bump", "sines", "gp"), cells=True,
            bumps=lambda q: (q["centre"], q["width"] / q["A"].sqrt()),
        ),
        Family(
            "fokker_planck", "ut - D*uxx + a*sin(kappa*x)*ux + b*cos(kappa*x)*u",
            {
                "c": Parameter(5e-21, -1e-19, 1e-19),
                "viscosity": Parameter(1e-3, 1e-5, 10.0),
                "mean": Parameter(1.0, 0.0, 2.0, span=(0.5, 1.5), initial=True),
                "std": Parameter(0.3, 0.05, 2.0, span=(0.1, 0.5), initial=True),
            },
            _fokker_planck, STEPPED, _drift, horizon=0.1, initial=("bump", "sines", "gp"),
            bumps=lambda q: (q["mean"], q["std"]),
        ),
    ]  # fmt: skip


BUILT_IN: tuple[Family, ...] = (*_others(), *_conservation_laws(), *_reactions(), *_waves())
"""All families of the paper."""
