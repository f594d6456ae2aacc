"""Racing optimizers fairly: one text, one model, equal grids of rates, the best rate of each.

Nothing here imports torch, so that papers can be listed at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stiefel import comparison
from stiefel.comparison import Rates
from stiefel.papers.paper import Scale
from stiefel.papers.progress import Progress

Config = dict[str, Any]
Run = dict[str, Any]
Trainer = Callable[[Mapping[str, Any], Callable[[float, str], None]], dict[str, Any]]

# Rates are chosen on this seed, by windows that are not reported.
GRID_SEED = 0
# Factor-2 grids around the best rate known from earlier runs at this size; extended when they do
# not bracket.
LAPTOP_GRIDS = {
    "adamw": (1e-3, 2e-3, 4e-3),
    "muon": (7e-3, 1.4e-2, 2.8e-2),
    "normuon": (7e-3, 1.4e-2, 2.8e-2),
    "rmnp": (1.75e-3, 3.5e-3, 7e-3),
    "aro": (5e-3, 1e-2, 2e-2),
    "dct-adamw": (3e-3, 6e-3, 1.2e-2),
    "svd-adamw": (3e-3, 6e-3, 1.2e-2),
    "random-columns-adamw": (3e-3, 6e-3, 1.2e-2),
    "root": (7e-3, 1.4e-2, 2.8e-2),
    "auon": (2e-2, 4e-2, 8e-2),
    "hybrid-auon": (1e-2, 2e-2, 4e-2),
    "hybrid-auon-normalized": (1.5e-2, 3e-2, 6e-2),
}
# GPT-2 small: the rates of the papers' recipes in the middle.
PAPER_GRIDS = {
    "adamw": (6e-4, 1.2e-3, 2.4e-3),
    "muon": (2.5e-3, 5e-3, 1e-2),
    "normuon": (2.5e-3, 5e-3, 1e-2),
    "rmnp": (2e-3, 4e-3, 8e-3),
    "aro": (2.5e-3, 5e-3, 1e-2),
    "dct-adamw": (6e-4, 1.2e-3, 2.4e-3),
    "svd-adamw": (6e-4, 1.2e-3, 2.4e-3),
    "random-columns-adamw": (6e-4, 1.2e-3, 2.4e-3),
    "root": (2.5e-3, 5e-3, 1e-2),
    "auon": (2.75e-2, 5.5e-2, 1.1e-1),
    "hybrid-auon": (2.75e-2, 5.5e-2, 1.1e-1),
    "hybrid-auon-normalized": (2.75e-2, 5.5e-2, 1.1e-1),
}
# For the card of every paper that races.
RULES = (
    "All methods see the same text, model, initial weights and batches. Each has a grid of three "
    "rates a factor 2 apart, extended until the best lies inside; rates are chosen on seed 0 by "
    "validation windows that are not reported. Embeddings and head are AdamW's at 3e-3."
)


@dataclass(frozen=True)
class Plan:
    """How a race is run at one scale."""

    kind: str
    """Names the runs among the shared results."""
    settings: Mapping[str, Any]
    """What all runs have in common."""
    grids: Mapping[str, Sequence[float]]
    trainer: Trainer
    rounds: int
    """How often a grid that does not bracket is extended."""
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Further names that may stand for a method, with the settings they mean (``method`` among
    them)."""

    def config(self, method: str, lr: float, seed: int, steps: int | None = None) -> Config:
        """The whole input of one run of a method or a variant."""
        config: Config = {**self.settings, "method": method, **self.variants.get(method, {})}
        config |= {"lr": lr, "seed": seed}
        if steps is not None:
            config["steps"] = steps
        return config

    @property
    def steps(self) -> int:
        """Length of a full run."""
        return int(self.settings["steps"])


def plan(scale: Scale) -> Plan:
    """The race at this scale. Reads the text, so that its checksum is part of every config.

    Raises:
        UnavailableError: what the scale needs is not on this machine.
    """
    if scale is Scale.PAPER:
        from stiefel.papers import web_gpt

        return Plan("web-gpt", web_gpt.settings(), PAPER_GRIDS, web_gpt.launch, rounds=3)
    from stiefel.papers import byte_gpt

    size: dict[str, Any] = {"width": 96, "blocks": 3, "heads": 4, "context": 64}
    run: dict[str, Any] = {"batch": 16, "steps": 200, "warmup": 10, "every": 10, "windows": 64}
    limit, rounds = 2_000_000, 3
    if scale is Scale.SMOKE:
        size = {"width": 16, "blocks": 1, "heads": 2, "context": 16}
        run = {"batch": 4, "steps": 20, "warmup": 2, "every": 5, "windows": 8}
        limit, rounds = 100_000, 0
    data = byte_gpt.text(limit)
    settings = {
        **size,
        **run,
        "schedule": "linear",
        "clip": None,
        "limit": limit,
        "text_sha256": data.sha256,
        "text_version": data.version,
    }
    return Plan("byte-gpt", settings, LAPTOP_GRIDS, byte_gpt.train, rounds)


@dataclass
class Choice(Rates):
    """The rate chosen for a method, and what it was chosen from."""

    method: str
    tried: dict[float, float | None] = field(default_factory=dict)
    reported: dict[float, float | None] = field(default_factory=dict)
    """Rate to loss on the windows that are reported."""

    @property
    def lr(self) -> float:
        """The rate with the least loss.

        Raises:
            ValueError: every run diverged.
        """
        if self.best is None:
            raise ValueError(f"{self.method} diverged at every rate tried: {sorted(self.tried)}")
        return self.best

    @property
    def bracketed(self) -> bool:
        """As in a grid.

        Raises:
            ValueError: every run diverged, so that other rates would hardly help.
        """
        return min(self.tried) < self.lr < max(self.tried)


def choose(
    progress: Progress,
    race: Plan,
    methods: Sequence[str],
    *,
    span: tuple[float, float],
) -> dict[str, Choice]:
    """Run the grids of ``methods`` on seed 0 and extend them until each brackets its best rate.

    Args:
        progress: Shares the runs with other seeds and papers.
        race: Grids, settings and trainer.
        methods: Which grids.
        span: Part of the experiment's progress.
    """
    choices = {method: Choice(method) for method in methods}
    wanted = [(m, lr) for m in methods for lr in race.grids[m]]
    start, end = span
    for turn in range(race.rounds + 1):
        configs = [race.config(m, lr, GRID_SEED) for m, lr in wanted]
        middle = start + 0.8 * (end - start)
        runs = progress.shared(race.kind, configs, race.trainer, span=(start, middle))
        start = middle
        for (method, lr), run in zip(wanted, runs, strict=True):
            choices[method].tried[lr] = run["select"]
            choices[method].reported[lr] = run["final"]
        wanted = [(c.method, c.next_rate()) for c in choices.values() if not c.bracketed]
        if not wanted or turn == race.rounds:
            break
    return choices


def final(run: Run) -> float:
    """The loss at the end of a run.

    Raises:
        RuntimeError: it diverged, so that there is nothing to compare.
    """
    if run["final"] is None:
        raise RuntimeError(f"a run at the chosen rate diverged after step {run['steps'][-1:]}")
    return float(run["final"])


def crossing(run: Run, level: float) -> float | None:
    """First step at which the loss is at or below ``level``, on lines between evaluations.

    None if it never is.
    """
    return comparison.crossing(run["steps"], run["losses"], level)


def settings_of(race: Plan, choices: Mapping[str, Choice]) -> dict[str, object]:
    """What a reader needs to repeat the race, for :attr:`Measurement.config`."""
    return {
        **race.settings,
        "rates": {name: choice.lr for name, choice in choices.items()},
        "bracketed": {name: choice.bracketed for name, choice in choices.items()},
        "grids": {
            name: {f"{lr:g}": choice.reported[lr] for lr in sorted(choice.tried)}
            for name, choice in choices.items()
        },
    }
