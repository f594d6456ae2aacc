"""Spaces of functions over real and made-up candidates, and how designs do in them."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import combinations, combinations_with_replacement
from typing import Any

import numpy as np

from stiefel.data import MissingDataError, carbon_dioxide, photograph, table
from stiefel.numerics import (
    Basis,
    fit_basis,
    hyperbolic_cross,
    orthonormal_polynomials,
    sample_design,
    sample_dpp,
    solve_design,
    tensor_polynomials,
    total_degree,
)
from stiefel.numerics.dpp_sampling import SAMPLERS
from stiefel.papers.paper import UnavailableError

Report = Callable[[float, str], None]

CO2_DIMENSION = 20
CHINA_DEGREES, CHINA_STEP = 6, 4
LINE_CANDIDATES = 20_000
# Candidates in d variables at the authors' scale, and what their bases and points may take.
CANDIDATES = {2: 100_000, 3: 200_000, 4: 500_000, 5: 1_000_000, 6: 1_000_000}
MEMORY_NEEDED = 3 << 30
# Candidates and dimension of problems in which everything can be counted.
COUNTED, COUNTED_DIMENSION = 9, 3


@dataclass(frozen=True, eq=False)
class Space:
    """Candidates with their basis, a function on them and the best that the space can do."""

    basis: Basis
    values: np.ndarray
    """f (N,)."""
    best: np.ndarray
    """Coefficients of P f (m,)."""
    error: float
    """‖f − P f‖², mean over μ."""
    sha256: str
    """Of f."""


@cache
def space(name: str) -> Space:
    """``co2``, ``china``, ``diabetes``, ``digits``; ``legendre M``, ``hermite M``, ``total D P``,
    ``cross D P``.

    Raises:
        UnavailableError: the data of a real one are not on this machine.
        ValueError: another name.
    """
    kind, *numbers = name.split()
    if kind not in _SPACES:
        raise ValueError(f"space must be one of {', '.join(_SPACES)}, got {name!r}")
    try:
        features, values = _SPACES[kind](*(int(number) for number in numbers))
    except MissingDataError as error:
        raise UnavailableError(str(error)) from error
    if callable(features):
        basis = fit_basis(features, size=len(values), keep=False)
    else:
        basis = fit_basis(features, rank="drop")
    best = basis.project(values)
    # ‖f‖² − ‖P f‖² would cancel: of CO2's 340 ppm the space leaves 2.
    total = 0.0
    for start in range(0, basis.size, 65_536):
        index = np.arange(start, min(start + 65_536, basis.size))
        fitted = (basis.rows(index) / np.sqrt(basis.mu[index])[:, None]) @ best
        total += float(basis.mu[index] @ (values[index] - fitted) ** 2)
    return Space(basis, values, best, total, hashlib.sha256(values.tobytes()).hexdigest())


def sweep(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Many designs of one kind and size: error over the best possible one, and stability.

    The error ratio of a fit with coefficients c is 1 + ‖c − c*‖² / ‖f − P f‖².
    """
    where = space(config["space"])
    m = where.basis.dimension
    rng = _generator(config)
    ratios, smallest = [], []
    for draw in range(config["draws"]):
        design = sample_design(
            where.basis, config["times"] * m, method=config["method"], generator=rng
        )
        smallest.append(design.lambda_min)
        if config["fit"]:
            ratios.append(error_ratio(where, design))
        if draw % 50 == 0:
            report(draw / config["draws"], f"{config['space']}, {config['method']}")
    result = {
        "m": m,
        "stable": float(np.mean(np.array(smallest) >= 0.5)),
        "lambda_min": float(np.median(smallest)),
    }
    if config["fit"]:
        result |= {
            "mean": float(np.mean(ratios)),
            "median": float(np.median(ratios)),
            "q95": float(np.quantile(ratios, 0.95)),
            "best": where.error**0.5,
            "sha256": where.sha256,
        }
    return result


def error_ratio(where: Space, design: Any) -> float:
    """‖f − f̂‖² / ‖f − P f‖²; where points do not determine a fit, of the smallest one."""
    basis, f = where.basis, where.values[design.indices]
    try:
        found = solve_design(basis, design, f).orthonormal
    except ValueError:  # random pixels leave some column constant; lstsq then goes on like this
        scale = np.sqrt(design.weights)
        rows = basis.rows(design.indices) / np.sqrt(basis.mu[design.indices])[:, None]
        found = np.linalg.lstsq(scale[:, None] * rows, scale * f)[0]
    return 1 + float(np.sum((found - where.best) ** 2)) / where.error


def counted(seed: int, problems: int, draws: int) -> dict[str, float]:
    """Problems small enough to list every outcome: what one draw gives on average, and its law.

    ``gap`` |E ratio / (m + 1) − 1| and ``bias`` max |E ĉ − c*| over all sets of m candidates, the
    largest of all problems; ``chi2`` χ² per degree of freedom of draws against the exact law, mean
    over problems and samplers.
    """
    rng = np.random.default_rng([seed, problems])
    n, m = COUNTED, COUNTED_DIMENSION
    sets = np.array(list(combinations(range(n), m)))
    code = {tuple(s): k for k, s in enumerate(sets)}
    gaps, biases, chi2 = [], [], []
    for _ in range(problems):
        basis = fit_basis(rng.standard_normal((n, m)), rng.random(n) + 0.5)
        f = rng.standard_normal(n)
        best = basis.project(f)
        phi = basis.rows(np.arange(n)) / np.sqrt(basis.mu)[:, None]
        error = float(basis.mu @ (f - phi @ best) ** 2)
        chance = np.linalg.det(basis.rows(np.arange(n))[sets]) ** 2
        fits = np.linalg.solve(phi[sets], f[sets][..., None])[..., 0]
        ratio = 1 + np.sum((fits - best) ** 2, axis=1) / error
        gaps.append(abs(float(chance @ ratio) / (m + 1) - 1))
        biases.append(float(np.abs(chance @ fits - best).max()))
        for sampler in SAMPLERS:
            drawn = np.sort(sample_dpp(basis, draws, generator=rng, sampler=sampler), axis=1)
            seen = np.bincount([code[tuple(d)] for d in drawn], minlength=len(sets))
            chi2.append(_chi_square(seen, draws * chance))
    return {"gap": max(gaps), "bias": max(biases), "chi2": float(np.mean(chi2))}


def _chi_square(seen: np.ndarray, expected: np.ndarray) -> float:
    """Per degree of freedom; cells that expect fewer than five are taken together."""
    rare = expected < 5
    s, e = (
        np.append(seen[~rare], seen[rare].sum()),
        np.append(expected[~rare], expected[rare].sum()),
    )
    s, e = (s, e) if e[-1] >= 5 else (s[:-1], e[:-1])
    return float(np.sum((s - e) ** 2 / e) / (len(e) - 1))


def check_memory() -> None:
    """Raise ``UnavailableError`` where the authors' scale does not fit into memory."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not told on this system
        return
    if memory < MEMORY_NEEDED:
        raise UnavailableError(
            f"a million candidates need {MEMORY_NEEDED >> 30} GiB of memory, this machine has "
            f"{memory / 2**30:.1f} GiB"
        )


def _generator(config: Mapping[str, Any]) -> np.random.Generator:
    """Of its own for every config, the same in every process."""
    words = [zlib.crc32(str(config[key]).encode()) for key in ("space", "method", "times")]
    return np.random.default_rng([config["seed"], *words])


def _co2() -> tuple[Any, np.ndarray]:
    """Degree < 20 over the observed weeks; f in ppm."""
    values = carbon_dioxide().values.numpy()
    x = 2 * np.arange(len(values)) / (len(values) - 1) - 1
    seen = ~np.isnan(values)
    return orthonormal_polynomials(x[seen], CO2_DIMENSION), values[seen]


def _china() -> tuple[Any, np.ndarray]:
    """Grey values of every fourth pixel; products of degree < 6 in both directions."""
    grey = photograph("china").pixels.numpy().astype(np.float64).mean(-1) / 255
    grey = grey[::CHINA_STEP, ::CHINA_STEP]
    sides = [orthonormal_polynomials(np.linspace(-1, 1, n), CHINA_DEGREES) for n in grey.shape]
    features = np.einsum("ia,jb->ijab", *sides)
    return features.reshape(grey.size, -1), grey.ravel()


def _diabetes() -> tuple[Any, np.ndarray]:
    """All monomials of degree ≤ 2 of ten measurements; sex squared is no new one."""
    data = table("diabetes")
    x = data.x.numpy()
    x = (x - x.mean(0)) / x.std(0)
    pairs = combinations_with_replacement(range(x.shape[1]), 2)
    features = [np.ones(len(x)), *x.T, *(x[:, i] * x[:, j] for i, j in pairs)]
    return np.stack(features, axis=1), data.y.numpy()


def _digits() -> tuple[Any, np.ndarray]:
    """Pixels and a constant, for even (1) or odd (−1)."""
    data = table("digits")
    x = data.x.numpy()
    x = x[:, x.std(0) > 0]
    return np.column_stack((np.ones(len(x)), x)), 1.0 - 2.0 * (data.y.numpy() % 2)


def _legendre(m: int) -> tuple[Any, np.ndarray]:
    """Runge's function, uniform measure."""
    x = (2 * np.arange(LINE_CANDIDATES) + 1) / LINE_CANDIDATES - 1
    return orthonormal_polynomials(x, m), 1 / (1 + 25 * x**2)


def _hermite(m: int) -> tuple[Any, np.ndarray]:
    """The same function, normal measure, at its quantiles."""
    from scipy.special import ndtri

    x = ndtri((np.arange(LINE_CANDIDATES) + 0.5) / LINE_CANDIDATES)
    return orthonormal_polynomials(x, m, "hermite"), 1 / (1 + 25 * x**2)


def _products(index_set: Callable[[int, int], np.ndarray], d: int, p: int) -> tuple[Any, Any]:
    """A peak in d variables at uniformly random candidates, features computed when asked for."""
    points = np.random.default_rng(d).uniform(-1, 1, (CANDIDATES[d], d))
    index = index_set(d, p)
    f = 1 / (1 + 5 * np.mean(points**2, axis=1))
    return lambda rows: tensor_polynomials(points[rows], index), f


_SPACES: Mapping[str, Callable[..., tuple[Any, np.ndarray]]] = {
    "co2": _co2,
    "china": _china,
    "diabetes": _diabetes,
    "digits": _digits,
    "legendre": _legendre,
    "hermite": _hermite,
    "total": lambda d, p: _products(total_degree, d, p),
    "cross": lambda d, p: _products(hyperbolic_cross, d, p),
}
