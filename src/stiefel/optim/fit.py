"""Fit Newton–Schulz coefficients to singular value spectra, under guards that keep them safe."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from stiefel.linalg.coefficients import (
    CLASSIC,
    Triple,
    as_table,
    check_guards,
    scalar_image,
    table,
)

# The worst ratio over spectra as a smooth function: a p-norm.
_P = 20.0
# A spectrum is represented by at most this many of its quantiles.
_POINTS = 384
_STARTS = {False: 8, True: 4}  # by per_step: more unknowns, more work for each
_SPREAD = {False: 0.05, True: 0.015}  # of the starts, relative; by per_step
_ITERATIONS = 200
_BOX = (0.4, 1.8)  # how far coefficients may go from the start, relative
# Values are held within this on the way, so that a bad step of the search cannot overflow.
_BOUND = 2.0
# The grid of starting values σ₀ on which the guards are imposed; a little beyond 1, since rounding
# of the norm in bfloat16 may take σ₀ there.
_GRID = np.concatenate([np.geomspace(1e-3, 0.1, 40), np.linspace(0.1, 1.03, 240)])
_DEAD_ZONE = 0.02
# (largest output, smallest intermediate, smallest output, noise of each step's result)
_GUARDS = {False: (1.27, 0.04, 0.5, 0.005), True: (1.27, 0.1, 0.6, 0.02)}
_LOOSE = 1.0  # weight of a violated guard at first: the search can still pass through the walls
_WEIGHTS = (1e2, 1e4)  # then; the larger one where the smaller did not hold

Spectrum = np.ndarray | Sequence[float]


def fit_coefficients(
    rows: int,
    cols: int,
    steps: int = 5,
    spectrum: Spectrum | Sequence[Spectrum] | None = None,
    per_step: bool = False,
    alphas: Sequence[float] = (0.5, 1.0),
) -> np.ndarray:
    """Triples (a, b, c) of σ ← aσ + bσ³ + cσ⁵ that bring the spectra of a shape closest to 1.

    Minimises the worst ratio, over spectra, of the mean (σ_K − 1)² to that of five classic steps,
    by L-BFGS from several starts. Fits that break a guard (outputs far above or below 1, negative
    ones, values crushed on the way) are thrown away, since a fit to a few spectra can look perfect
    and still send a singular value to −1.

    Small matrices invite over-fitting. For training, give ``alphas`` a 1.5 or more or recorded
    spectra, never Gaussian ones alone: the first steps have singular values down to 1e-4.

    Args:
        rows: R, ≥ 1.
        cols: C, ≥ 1; only the pair (min, max) matters.
        steps: K, number of iterations, ≥ 1.
        spectrum: Singular values (one array) or a list of such arrays to fit instead of the
            default: Marchenko–Pastur of the shape and power laws i^−α. Each is scaled to norm 1.
        per_step: One triple for every step instead of one for all.
        alphas: Exponents of the power laws.

    Returns:
        Shape (1, 3), or (steps, 3) with ``per_step``, in float64; the same array of the cache for
        the same arguments, read-only. Takes some seconds the first time.

    Raises:
        ValueError: a size or number of steps below 1; a spectrum that is empty, negative, zero or
            not finite; no spectrum at all.
        RuntimeError: no start led to coefficients that keep the guards.
    """
    for name, value in (("rows", rows), ("cols", cols), ("steps", steps)):
        if value < 1:
            raise ValueError(f"{name} must be ≥ 1, got {value}")
    given = None if spectrum is None else tuple(tuple(s) for s in _spectra(spectrum))
    shape = (min(rows, cols), max(rows, cols))
    return _fit(shape, steps, given, bool(per_step), tuple(float(a) for a in alphas))


def marchenko_pastur(rows: int, cols: int) -> np.ndarray:
    """Singular values of a large Gaussian matrix of this shape: quantiles (i + ½)/m, norm 1.

    λ = σ² has density ∝ sqrt((λ₊ − λ)(λ − λ₋))/λ on ((1 − √y)², (1 + √y)²), y = m/n.
    """
    m, n = min(rows, cols), max(rows, cols)
    root = (m / n) ** 0.5
    # λ = 1 + y − 2√y cos θ takes the singular ends out of the integrand.
    theta = np.linspace(0.0, np.pi, 20_001)
    middle = (theta[1:] + theta[:-1]) / 2
    eigenvalue = 1 + root**2 - 2 * root * np.cos(middle)
    mass = np.concatenate([[0.0], np.cumsum(np.sin(middle) ** 2 / eigenvalue)])
    at = np.interp((np.arange(m) + 0.5) / m, mass / mass[-1], theta)
    sigma = np.sqrt(1 + root**2 - 2 * root * np.cos(at))[::-1]
    return sigma / np.linalg.norm(sigma)


def spectrum_ratio(coefficients: np.ndarray, spectrum: Spectrum) -> float:
    """Mean (σ − 1)² after these coefficients (one row: five times) over that of five classic ones.

    Args:
        coefficients: Shape (K, 3), as from :func:`fit_coefficients`.
        spectrum: Singular values of any scale.
    """
    sigma = _spectra(spectrum)[0]
    triples = as_table(coefficients, 5 if len(coefficients) == 1 else None).triples
    return _error(sigma, triples) / _error(sigma, (CLASSIC,) * 5)


def _error(sigma: np.ndarray, triples: Sequence[Triple]) -> float:
    return float(np.mean((scalar_image(sigma, triples) - 1) ** 2))


def _spectra(spectrum: Spectrum | Sequence[Spectrum]) -> list[np.ndarray]:
    """Arrays of norm 1, checked."""
    many = not isinstance(spectrum, np.ndarray) or spectrum.ndim > 1
    items = list(spectrum)
    if not many or (items and np.ndim(items[0]) == 0):
        items = [spectrum]
    found = []
    for item in items:
        sigma = np.asarray(item, dtype=np.float64)
        norm = np.linalg.norm(sigma)
        if sigma.ndim != 1 or not sigma.size or not np.isfinite(norm) or (sigma < 0).any():
            raise ValueError(
                "spectrum must hold one-dimensional arrays of finite singular values ≥ 0, got one "
                f"of shape {sigma.shape}"
            )
        if norm == 0:
            raise ValueError("spectrum must not be zero")
        found.append(sigma / norm)
    if not found:
        raise ValueError("spectrum must hold at least one array")
    return found


@lru_cache(maxsize=64)
def _fit(
    shape: tuple[int, int],
    steps: int,
    given: tuple[tuple[float, ...], ...] | None,
    per_step: bool,
    alphas: tuple[float, ...],
) -> np.ndarray:
    if given is None:
        laws = [np.arange(1.0, shape[0] + 1) ** -alpha for alpha in alphas]
        spectra = _spectra([marchenko_pastur(*shape), *laws])
    else:
        spectra = [np.asarray(s) for s in given]
    goal = _Goal(spectra, steps, per_step)
    best, lowest = None, np.inf
    for start in _starts(steps, per_step):
        # With fifteen unknowns the walls leave ways around them.
        found = start if per_step else goal.minimise(start, _LOOSE)
        for weight in _WEIGHTS:
            found = goal.minimise(found, weight)
            if not _is_safe(found, steps):
                continue
            worst = goal.worst(found)
            if worst < lowest:
                best, lowest = found, worst
            break
    if best is None:
        raise RuntimeError(
            f"no start led to safe coefficients for shape {shape}, steps={steps}, "
            f"per_step={per_step}"
        )
    best.setflags(write=False)
    return best


def _starts(steps: int, per_step: bool) -> list[np.ndarray]:
    """Known tables and neighbours of them; the same ones every time."""
    centre = np.array([CLASSIC])
    if per_step:
        # The first and last steps of `fitted`: more steps repeat one in the middle.
        rows = list(table("fitted").triples)
        while len(rows) < steps:
            rows.insert(2, rows[2])
        centre = np.array(rows[:1] + rows[len(rows) - steps + 1 :] if steps > 1 else rows[:1])
    random = np.random.default_rng(0)
    factors = 1 + _SPREAD[per_step] * random.uniform(-1, 1, (_STARTS[per_step], *centre.shape))
    factors[0] = 1
    return list(centre * factors)


def _is_safe(coefficients: np.ndarray, steps: int) -> bool:
    """Whether all three guards hold on the fine grid."""
    if not np.isfinite(coefficients).all():
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        try:
            check_guards(as_table(coefficients, steps if len(coefficients) == 1 else None))
        except (ValueError, UserWarning):
            return False
    return True


class _Goal:
    """The function to minimise: worst ratio plus penalties for the guards."""

    def __init__(self, spectra: list[np.ndarray], steps: int, per_step: bool) -> None:
        self.steps = steps
        middles = (np.arange(_POINTS) + 0.5) / _POINTS
        kept = [s if len(s) <= _POINTS else np.quantile(s, middles) for s in spectra]
        self.sigma = torch.from_numpy(np.concatenate(kept))
        self.sizes = [len(s) for s in kept]
        self.classic = torch.tensor([_error(s, (CLASSIC,) * 5) for s in kept]).double()
        self.most, self.floor, self.least, noise = _GUARDS[per_step]
        # Every step exact, all too large, all too small, alternating both ways.
        signs = [(0, 0), (1, 1), (-1, -1), (1, -1), (-1, 1)]
        self.noise = 1 + noise * torch.tensor(signs, dtype=torch.float64)[:, :, None]
        self.grid = torch.from_numpy(_GRID).expand(len(signs), -1)
        self.alive = torch.from_numpy(_GRID > _DEAD_ZONE)

    def __call__(self, coefficients: Tensor, weight: float) -> Tensor:
        rows = coefficients.expand(self.steps, 3)
        x, y, penalty = self.sigma, self.grid, torch.zeros((), dtype=torch.float64)
        for k in range(self.steps):
            a, b, c = rows[k]
            square = x * x
            x = (x * (a + square * (b + c * square))).clamp(-_BOUND, _BOUND)
            square = y * y
            y = y * (a + square * (b + c * square)) * self.noise[:, k % 2]
            last = k == self.steps - 1
            penalty = penalty + _excess(y.abs() - _BOUND)
            y = y.clamp(-_BOUND, _BOUND)
            low = y[:, self.alive]
            penalty = penalty + _excess((self.least if last else self.floor) - low)
            if last:
                penalty = penalty + _excess(y - self.most) + _excess(-y)
        errors = torch.stack([(part - 1).square().mean() for part in x.split(self.sizes)])
        # The p-norm with its largest term taken out cannot overflow.
        ratios = errors / self.classic
        largest = ratios.max().detach()
        worst = largest * (ratios / largest).pow(_P).sum().pow(1 / _P)
        return worst + weight * penalty

    def worst(self, coefficients: np.ndarray) -> float:
        """The objective without penalties."""
        with torch.no_grad():
            return float(self(torch.from_numpy(coefficients), 0.0))

    def minimise(self, start: np.ndarray, weight: float) -> np.ndarray:
        """The best point that L-BFGS finds from ``start``."""
        from scipy.optimize import minimize  # only here, and costly to import

        centre = torch.from_numpy(start)

        def value_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
            # Relative to the start, since b is ten times c.
            scale = torch.from_numpy(flat).reshape(centre.shape).requires_grad_()
            # The logarithm evens out the walls that penalties build.
            value = torch.log(self(centre * scale, weight))
            (gradient,) = torch.autograd.grad(value, scale)
            return value.item(), gradient.flatten().numpy()

        found = minimize(
            value_and_gradient,
            np.ones(centre.numel()),
            jac=True,
            method="L-BFGS-B",
            bounds=[_BOX] * centre.numel(),
            options={"maxiter": _ITERATIONS, "maxcor": 30, "ftol": 1e-12, "gtol": 1e-8},
        )
        return start * found.x.reshape(start.shape)


def _excess(x: Tensor) -> Tensor:
    return x.clamp_min(0).square().mean()
