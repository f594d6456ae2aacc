"""``race``: which optimizer for this model? All of them under one protocol.

1. AdamW's grid: one rate for all parameters. The best, e, is from then on everyone's rate for
   embeddings, heads, norms and biases.
2. Every contestant's grid for the hidden matrices, AdamW's included: three rates a factor 2 apart
   around a centre converted from e, extended until the best lies inside.
3. Every contestant at its best rate on every seed.

Grids run on seed 0 and are judged by a slice of the validation data that is not reported.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stiefel.comparison import Grid, first_grid
from stiefel.optim.race_contestants import (
    BASELINE,
    Contestant,
    chosen,
    groups_of,
    typical_inputs,
)
from stiefel.optim.race_result import RaceResult, Standing
from stiefel.optim.race_run import train
from stiefel.optim.race_task import build, factory_settings, text_settings

GRID_SEED = 0
TEXT_LR, MODEL_LR = 4e-3, 1e-3
# How often a grid that does not bracket is extended.
EXTENSIONS = 8

Config = dict[str, Any]
Run = dict[str, Any]
Compute = Callable[[Mapping[str, Any], Callable[[float, str], None]], Run]
RunAll = Callable[..., list[Run]]
Report = Callable[[float, str], None]


def race(
    *,
    text: str | Path | Sequence[str | Path] | None = None,
    model: str | Callable[[int], Any] | None = None,
    optimizers: Sequence[str] | None = None,
    steps: int = 200,
    seeds: Sequence[int] = (0, 1, 2),
    lr: float | None = None,
    split: str = "position",
    size: Mapping[str, int] | None = None,
    on_progress: Report | None = None,
) -> RaceResult:
    """Race AdamW, ``torch.optim.Muon`` and Stiefel's optimizers on a text or on a model.

    All see the same initial weights, batches, schedule (5 % warm-up, constant to half, then down to
    a tenth) and number of steps, without weight decay. See :mod:`stiefel.optim.racing` for how
    rates are chosen.

    >>> from stiefel.optim import race
    >>> result = race(text="README.md", optimizers=["muon"], steps=50)     # doctest: +SKIP
    >>> print(result.to_json()["optimizers"][0]["optimizer"])            # doctest: +SKIP

    Args:
        text: UTF-8 text files, for a small byte-level GPT. Either this or ``model``.
        model: ``make(seed)``, or its name as ``"module:make"``, that returns ``(model, batches,
            loss)``: an ``nn.Module`` whose weights depend on the seed only; a dict with ``"train"``
            (a sequence of batches, taken in order, round and round, or a function of the step) and
            ``"validation"`` (at least two batches: every other one chooses rates, the rest is
            reported); and ``loss(model, batch)``, a scalar tensor. Called anew for every run.
        optimizers: Names from ``stiefel race --help``; None for all. AdamW always races.
        steps: Training steps of every run.
        seeds: Of weights and batches; different and non-negative.
        lr: Centre of AdamW's first grid. Default: 4e-3 for text, 1e-3 for a model.
        split: Of text: ``"position"`` (the last tenth of every file validates) or ``"file"``
            (whole files from the end of the list, until they hold a tenth).
        size: Of the byte GPT: ``width`` 96, ``blocks`` 3, ``heads`` 4, ``context`` 64, ``batch`` 16
            where not given.
        on_progress: Told the fraction done and a word on it.

    Returns:
        Standings, best first: :class:`stiefel.optim.race_result.RaceResult`.

    Raises:
        ValueError: both or neither of ``text`` and ``model``, unknown optimizers (near matches are
            given), text too short for the context, settings out of range, AdamW diverging at every
            rate, a factory that makes other weights each time.
        TypeError: the factory returned something else than agreed.
        FactoryError: the factory or its loss raised something (its cause).
        OSError: a text file cannot be read.
    """
    course = plan(
        text=text,
        model=model,
        optimizers=optimizers,
        steps=steps,
        seeds=seeds,
        lr=lr,
        split=split,
        size=size,
    )
    return course.run(_Here(on_progress or (lambda _fraction, _message: None)))


def plan(
    *,
    text: str | Path | Sequence[str | Path] | None = None,
    model: str | Callable[[int], Any] | None = None,
    optimizers: Sequence[str] | None = None,
    steps: int = 200,
    seeds: Sequence[int] = (0, 1, 2),
    lr: float | None = None,
    split: str = "position",
    size: Mapping[str, int] | None = None,
) -> Course:
    """A race that is checked and ready to run; arguments and errors are those of :func:`race`."""
    contestants = chosen(optimizers)
    settings = _settings(text, model, split, dict(size or {}))
    _check(steps, list(seeds), lr)
    make = model if callable(model) else None
    if lr is None:
        lr = TEXT_LR if text is not None else MODEL_LR
    return Course(
        {"task": settings, "steps": steps},
        partial(train, make=make) if make is not None else train,
        contestants,
        lr,
        _look(settings, steps, make),
        list(seeds),
    )


def _settings(text: Any, model: Any, split: str, size: dict[str, int]) -> dict[str, Any]:
    if (text is None) == (model is None):
        raise ValueError("give either text (files) or model (a factory)")
    if text is None:
        return factory_settings(model)
    allowed = ("width", "blocks", "heads", "context", "batch")
    unknown = sorted(set(size) - set(allowed))
    if unknown:
        raise ValueError(f"size takes {', '.join(allowed)}; got {', '.join(unknown)}")
    return text_settings([text] if isinstance(text, str | Path) else list(text), split, **size)


def _check(steps: int, seeds: list[int], lr: float | None) -> None:
    if steps < 2:
        raise ValueError(f"steps must be at least 2, got {steps}")
    bad = [s for s in seeds if isinstance(s, bool) or not isinstance(s, int) or s < 0]
    if bad or not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be different non-negative integers, got {seeds}")
    if lr is not None and not 0 < lr < 1:
        raise ValueError(f"lr must lie between 0 and 1, got {lr}")


def _look(settings: Mapping[str, Any], steps: int, make: Any) -> float:
    """Make and try the task once, so that what is wrong shows before hours of work.

    Returns:
        Typical number of columns of its hidden matrices.
    """
    with torch.random.fork_rng():
        torch.manual_seed(GRID_SEED)
        task = build(settings, GRID_SEED, steps, make)
        task.try_out()
        return typical_inputs(groups_of(task.model))


class RaceError(ValueError):
    """A race whose runs can be made but not compared; the message says why."""


class _Here:
    """Computes runs in this process, each once."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._done: dict[str, Run] = {}

    def __call__(
        self, configs: Sequence[Config], compute: Compute, *, span: tuple[float, float]
    ) -> list[Run]:
        keys = [json.dumps(config, sort_keys=True) for config in configs]
        width = (span[1] - span[0]) / len(configs)
        for i, (key, config) in enumerate(zip(keys, configs, strict=True)):
            start = span[0] + i * width

            def report(fraction: float, message: str, start: float = start) -> None:
                self._report(start + width * fraction, message)

            if key not in self._done:
                self._done[key] = compute(config, report)
        return [self._done[key] for key in keys]


class Course:
    """One race: which runs it needs, in what order."""

    def __init__(
        self,
        common: Config,
        compute: Compute,
        contestants: list[Contestant],
        lr: float,
        inputs: float,
        seeds: list[int],
    ) -> None:
        """Keep what :func:`plan` has checked.

        Args:
            common: What every run's config holds.
            compute: Makes a run of a config.
            contestants: AdamW among them.
            lr: Centre of AdamW's first grid.
            inputs: Typical number of columns of the hidden matrices.
            seeds: Of the reported runs.
        """
        self._common, self._compute, self._contestants = common, compute, contestants
        self._lr, self._inputs, self._seeds = lr, inputs, seeds
        self._done = 0.0

    def run(self, run_all: RunAll) -> RaceResult:
        """Run the race.

        Args:
            run_all: ``run_all(configs, compute, span=(from, to))`` returns ``compute(config,
                report)`` for each config; ``span`` is their part of the race's progress. It may
                share the work with other processes that run the same course.

        Raises:
            RaceError: AdamW diverged at every rate; runs of one seed started from other losses.
        """
        self._run_all, self._done = run_all, 0.0
        seeds = self._seeds
        count = len(self._contestants)
        joint = Grid()
        # Two rates of AdamW's second grid are new, three of everyone else's.
        later = 3 * count - 1 + count * len(set(seeds) - {GRID_SEED})
        self._extend({BASELINE: joint}, {BASELINE: first_grid(self._lr)}, None, later)
        best = joint.best
        if best is None:
            raise RaceError(
                f"adamw diverged at every rate tried: {sorted(joint.tried)}; give a lower lr"
            )
        grids = {c.name: Grid() for c in self._contestants}
        first = {c.name: first_grid(c.centre(best, self._inputs)) for c in self._contestants}
        later = count * len(set(seeds) - {GRID_SEED})
        self._extend(grids, first, best, later)

        wanted = [
            self._config(name, grid.best, best, seed)
            for name, grid in grids.items()
            if grid.best is not None
            for seed in seeds
        ]
        runs = iter(self._all(wanted, 0))
        standings = [
            Standing(name, best, grid, {s: next(runs) for s in seeds if grid.best is not None})
            for name, grid in grids.items()
        ]
        self._same_start(standings, seeds)
        settings = {**self._common, "seeds": seeds, "adamw_rates": sorted(joint.tried)}
        return RaceResult.of(standings, settings)

    def _extend(
        self,
        grids: dict[str, Grid],
        first: Mapping[str, Sequence[float]],
        elementwise_lr: float | None,
        later: int,
    ) -> None:
        """Run first grids, then further rates of those whose best lies at an end."""
        wanted = [(name, lr) for name, rates in first.items() for lr in rates]
        for _ in range(EXTENSIONS + 1):
            configs = [self._config(n, lr, elementwise_lr or lr, GRID_SEED) for n, lr in wanted]
            for (name, lr), run in zip(wanted, self._all(configs, later), strict=True):
                grids[name].tried[lr] = run["select"]
            wanted = [(name, g.next_rate()) for name, g in grids.items() if not g.bracketed]
            if not wanted:
                return

    def _config(self, name: str, lr: float, elementwise_lr: float, seed: int) -> Config:
        own = {"optimizer": name, "lr": lr, "elementwise_lr": elementwise_lr, "seed": seed}
        return {**self._common, **own}

    def _all(self, configs: list[Config], later: int) -> list[Run]:
        """Compute ``configs``; ``later`` as many runs are known to follow."""
        start = self._done
        self._done += (1.0 - start) * len(configs) / (len(configs) + later)
        return self._run_all(configs, self._compute, span=(start, self._done))

    def _same_start(self, standings: list[Standing], seeds: list[int]) -> None:
        for seed in seeds:
            starts = {s.name: s.runs[seed]["losses"][0] for s in standings if seed in s.runs}
            low, high = min(starts.values()), max(starts.values())
            if not high - low <= 1e-5 * abs(high):
                raise RaceError(
                    f"runs with seed {seed} started at losses from {low:.6g} to {high:.6g}: the "
                    "factory must make the same weights and batches whenever it gets the same seed"
                )
