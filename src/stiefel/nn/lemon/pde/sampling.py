"""Trajectories of a family: parameters, initial data, solutions and tokens in one call."""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stiefel.nn.lemon.pde import initial as start
from stiefel.nn.lemon.pde.family import STEPS, Family, Problem
from stiefel.nn.lemon.pde.grid import DURATION, LENGTH, Grid, centres
from stiefel.nn.lemon.pde.registry import FAMILIES
from stiefel.nn.lemon.tokenizer import PolishTokenizer

# The authors keep ‖u‖ in (10, 2000) over 64·128 values and |u| ≤ 1000; here per value.
SMALLEST, LARGEST = 10 / math.sqrt(64 * 128), 2000 / math.sqrt(64 * 128)
HIGHEST = 1e3
# Values of the fields that are solved at once: 256 samples on 128 points stay in the cache.
_CHUNK = 1 << 15
# Samples that may always be dropped; beyond them, no more than half.
_SPARE = 8


class TrajectoryError(RuntimeError):
    """Too many solutions blow up, vanish or are not finite."""


@dataclass(frozen=True)
class Trajectories:
    """Solutions of one family."""

    family: str
    u: Float[Tensor, "n times points"]
    params: dict[str, Tensor]
    """Parameters as drawn, ``[n]`` each, float64."""
    tokens: Int[Tensor, "n length"]
    """Each sample's formula, padded with 0."""
    t: Float[Tensor, " times"]
    """Relabelled, in [0, 2)."""
    x: Float[Tensor, " points"]
    formulas: tuple[str, ...]
    """Each sample's formula as text."""
    dropped: int
    """Samples thrown away and drawn anew: not finite, too small or too large."""

    def __len__(self) -> int:
        return len(self.u)


def sample(
    family: str,
    n: int,
    *,
    nx: int = 128,
    nt: int = 64,
    gamma: float | int = 0.1,
    ic: str | None = None,
    seed: int | torch.Generator = 0,
    parameters: Mapping[str, float | int] | None = None,
    per_draw: int = 50,
    grid: int | None = None,
    rough: float | int = 0.1,
    tokenizer: PolishTokenizer | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Trajectories:
    """``n`` solutions on x in [0, 2), t in [0, 2), solved in float64 all at once.

    x are the centres of ``nx`` cells, t_j = 2j/nt. A family's own final time is relabelled to 2,
    which its formula accounts for. Parameters are centre·(1 + γU(−1, 1)), rounded to three digits.

    Args:
        family: A name of ``FAMILIES``.
        n: Number of trajectories.
        nx: Points kept, at least 8.
        nt: Times, at least 2.
        gamma: γ in [0, 1): 0.1 in training, 0.3 out of distribution.
        ic: ``"sines"``, ``"gp"``, ``"bump"``, ``"one_shock"``, ``"two_shocks"`` or
            ``"rarefaction"`` as far as the family takes them; the family's usual one unless told.
        seed: The same seed gives the same data; families differ. Or a CPU generator.
        parameters: Other centres, e.g. ``{"eps": 0.03}``.
        per_draw: Initial conditions per drawn parameter set.
        grid: Points of the solver, a multiple of ``nx``; as many as the family needs unless told.
        rough: Part of the sines that is folded, and part that gets a window.
        tokenizer: For ``tokens``; all variables and operators of the paper unless told.
        dtype: Of ``u``, ``t`` and ``x``.
        device: Where the solver works and the result lives.

    Raises:
        KeyError: an unknown family or parameter (names the closest), or a formula that the
            tokenizer does not know.
        ValueError: an argument out of range, initial data that the family does not take.
        TypeError: ``dtype`` is no floating-point type.
        TrajectoryError: more than half of the solutions had to be dropped.
    """
    one = FAMILIES[family]
    kind = one.initial[0] if ic is None else ic
    points = _check(one, n, nx, nt, gamma, kind, per_draw, grid, rough, dtype)
    # Families that share a seed shall not share their initial data.
    generator = (
        seed
        if isinstance(seed, torch.Generator)
        else torch.Generator().manual_seed(
            (seed * 1_000_003 + zlib.crc32(one.name.encode())) % 2**63
        )
    )
    fields: list[Tensor] = []
    params: list[dict[str, Tensor]] = []
    solved = kept = 0
    while kept < n:
        missing = n - kept
        draws = math.ceil(missing / per_draw)
        drawn = one.draw(draws, per_draw, gamma, parameters or {}, generator)
        drawn = {name: value[:missing] for name, value in drawn.items()}
        u = _solutions(one, drawn, missing, kind, nx, nt, points, rough, generator, device)
        good = acceptable(u).cpu()
        fields.append(u[good.to(u.device)].to(dtype))
        params.append({name: value[good] for name, value in drawn.items()})
        solved, kept = solved + missing, kept + int(good.sum())
        if solved - kept > max(_SPARE, solved / 2):
            raise TrajectoryError(
                f"{solved - kept} of {solved} solutions of {one.name} were dropped (not finite, "
                "or outside the sizes allowed): use a finer grid, smaller steps or other "
                "parameters"
            )
    if solved > kept:
        warnings.warn(
            f"{solved - kept} of {solved} solutions of {one.name} were dropped and drawn anew",
            stacklevel=2,
        )
    together = {name: torch.cat([p[name] for p in params]) for name in one.parameters}
    formulas, tokens = _symbols(one, together, n, tokenizer or PolishTokenizer())
    return Trajectories(
        family=one.name,
        u=torch.cat(fields),
        params=together,
        tokens=tokens.to(device),
        t=(torch.arange(nt, dtype=torch.float64) * (DURATION / nt)).to(device, dtype),
        x=centres(nx, device).to(dtype),
        formulas=formulas,
        dropped=solved - kept,
    )


def solve(
    family: str,
    initial: Float[Tensor, "n points"],
    parameters: Mapping[str, float | int | Tensor] | None = None,
    *,
    nt: int = 64,
    periodic: bool = True,
    steps: float | int = 1.0,
) -> Float[Tensor, "n times points"]:
    """Solutions from your own initial data, at t_j = 2j/nt, float64.

    Args:
        family: A name of ``FAMILIES``.
        initial: Values at equidistant points of the period (centres of cells for finite volumes).
        parameters: A number or ``[n]`` each; the family's centres unless told.
        nt: Times, at least 2.
        periodic: ``False``: a copy of the outermost value beyond the ends (conservation laws).
        steps: Factor on the number of steps of the time-stepping solvers: 1/3 is faster, 3 more
            exact. Finite volumes choose theirs by the speed of the waves.

    Raises:
        KeyError: an unknown family or parameter.
        ValueError: a parameter out of range, values that are not finite, too few points or times,
            or ``periodic=False`` for a family that must be periodic.
    """
    one = FAMILIES[family]
    if nt < 2:
        raise ValueError(f"nt must be at least 2, got {nt}")
    if not 0 < steps < math.inf:
        raise ValueError(f"steps must be positive, got {steps}")
    if not initial.is_floating_point() or not bool(initial.isfinite().all()):
        raise ValueError("initial must be finite real numbers")
    if not periodic and STEPS[0] not in one.initial:
        raise ValueError(f"{one.name} is solved on a periodic domain only")
    n = len(initial)
    generator = torch.Generator().manual_seed(0)
    numbers = {k: v for k, v in (parameters or {}).items() if not isinstance(v, Tensor)}
    middles = {k: p.middle for k, p in one.parameters.items()}
    drawn = one.draw(1, n, 0.0, middles | numbers, generator)
    for name, value in (parameters or {}).items():
        if isinstance(value, Tensor):
            if name not in one.parameters:
                one.draw(1, 1, 0.0, {name: 0.0}, generator)  # raises, naming the closest
            one.parameters[name].check(name, one.name, float(value.min()), float(value.max()))
            drawn[name] = value.double().expand(n)
    return _run(one, drawn, initial.double(), 0.0, nt, periodic, steps=float(steps))


def acceptable(u: Float[Tensor, "n times points"]) -> Tensor:
    """Which solutions are finite and neither too small nor too large, ``[n]``."""
    size = u.square().mean((1, 2)).sqrt()
    largest = u.abs().amax((1, 2))
    return (
        u.isfinite().all(-1).all(-1) & (size > SMALLEST) & (size < LARGEST) & (largest <= HIGHEST)
    )


def _solutions(
    family: Family, params: dict[str, Tensor], n: int, kind: str, nx: int, nt: int, points: int,
    rough: float | int, generator: torch.Generator, device: torch.device | str | None,
) -> Tensor:  # fmt: skip
    """Initial data and their solutions at the points kept, float64."""
    volumes = family.cells or kind in STEPS
    # Values at points: the grid is laid so that it holds the centres of the cells kept.
    first = (0.5 * LENGTH / points) if volumes else 0.5 * LENGTH / nx
    x = Grid(points, first, device).x
    match kind:
        case "sines":
            u = start.sines(x, n, family.waves, generator, rough)
        case "gp":
            u = start.gaussian_process(x, n, generator)
        case "bump" if family.bumps:
            centre, width = (v[:, None].to(x.device) for v in family.bumps(params))
            u = start.bump(x, centre, width)
        case _:
            falling = family.convex == (kind != "rarefaction")
            u = start.steps(x, n, 2 if kind == "two_shocks" else 1, falling, generator)
    return _run(family, params, u, first, nt, kind not in STEPS, (points // nx, volumes))


def _run(
    family: Family, params: Mapping[str, Tensor], initial: Tensor, first: float | int, nt: int,
    periodic: bool, kept: tuple[int, bool] = (1, False), steps: float | int = 1.0,
) -> Tensor:  # fmt: skip
    """Solutions, chunk by chunk; ``kept``: every how many points, and whether as their mean."""
    n, points = initial.shape
    grid = Grid(points, first, initial.device)
    q = {
        name: value[:, None].to(initial.device)
        for name, value in family.coefficients(params).items()
    }
    times = torch.arange(nt, dtype=torch.float64, device=initial.device) * (family.horizon / nt)
    chunk = max(1, _CHUNK // points)
    parts = []
    for i in range(0, n, chunk):
        here = slice(i, i + chunk)
        some = {name: value[here] for name, value in q.items()}
        u = family.solver(Problem(initial[here], grid, some, times, periodic, steps))
        group, mean = kept
        parts.append(u.unflatten(-1, (-1, group)).mean(-1) if mean else u[..., ::group])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _symbols(
    family: Family, params: dict[str, Tensor], n: int, tokenizer: PolishTokenizer
) -> tuple[tuple[str, ...], Tensor]:
    """Every sample's formula; each distinct one is built once."""
    coefficients = {k: v.tolist() for k, v in family.coefficients(params).items()}
    seen: dict[tuple[float, ...], tuple[str, list[int]]] = {}
    rows = []
    for i in range(n):
        key = tuple(values[i] for values in coefficients.values())
        if key not in seen:
            tree = family.expression(dict(zip(coefficients, key, strict=True)))
            tokens = tokenizer.encode(tree)
            seen[key] = (tokenizer.decode(tokens), tokens)
        rows.append(seen[key])
    longest = max(len(tokens) for _, tokens in rows)
    padded = [tokens + [tokenizer.pad_id] * (longest - len(tokens)) for _, tokens in rows]
    return tuple(text for text, _ in rows), torch.tensor(padded, dtype=torch.int64)


def _check(
    family: Family, n: int, nx: int, nt: int, gamma: float | int, kind: str, per_draw: int,
    grid: int | None, rough: float | int, dtype: torch.dtype,
) -> int:  # fmt: skip
    """Refuse arguments out of range; the number of points of the solver."""
    for name, value, least in (
        ("n", n, 1),
        ("nx", nx, 8),
        ("nt", nt, 2),
        ("per_draw", per_draw, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not 0 <= gamma < 1:
        raise ValueError(f"gamma must be in [0, 1), got {gamma}")
    if not 0 <= rough <= 1:
        raise ValueError(f"rough must be in [0, 1], got {rough}")
    if kind not in family.initial:
        raise ValueError(
            f"ic of {family.name} must be one of {', '.join(family.initial)}, got {kind!r}"
        )
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point type, got {dtype}")
    points = nx * family.refine if grid is None else grid
    if points < nx or points % nx:
        raise ValueError(f"grid must be a multiple of nx = {nx}, got {grid}")
    return points
