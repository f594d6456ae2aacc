"""Loss beside the Muon and NorMuon of `pytorch_optimizer`: the small GPT on Python's own source.

    python benchmarks/peer_loss.py               # about two minutes of one core
    python benchmarks/peer_loss.py --tiny        # seconds; shows that everything runs

One race (see docs/race.md): same initial weights, batches, schedule and number of steps for all, a
grid of learning rates for each, extended until the best lies inside, chosen on seed 0 by windows
that are not reported. Ours and the peer's use the same convention for the size of a step.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from stiefel.comparison import mean_and_half
from stiefel.data import python_source
from stiefel.optim import NorMuon, race
from stiefel.optim.race_contestants import BETAS, CONTESTANTS, Contestant, Groups, _ours
from stiefel.optim.race_result import RaceResult
from stiefel.optim.small_gpt import GPT, GPTSize, next_token_loss, windows

# Ours against theirs, settings alike; then our NorMuon as it comes, without Nesterov momentum (the
# paper has none, the package has).
PAIRS = (
    ("muon", "peer-muon"),
    ("normuon-nesterov", "peer-normuon"),
    ("normuon", "peer-normuon"),
)


def _peer(
    cls: type, settings: Mapping[str, Any], groups: Groups, lr: float, elementwise_lr: float
) -> list[torch.optim.Optimizer]:
    """The package's optimizer on groups of :func:`split_parameters`."""
    filled = []
    for group in groups:
        ours = {"params": [p for _, p in group["params"]], "use_muon": group["rule"] == "matrix"}
        ours["lr"] = lr if ours["use_muon"] else elementwise_lr
        if not ours["use_muon"]:
            ours["betas"] = BETAS
        if ours["params"]:
            filled.append(ours)
    return [cls(filled, weight_decay=0.0, **settings)]


def contestants() -> dict[str, Contestant]:
    """The package's optimizers, and our NorMuon with the package's Nesterov momentum.

    Raises:
        ImportError: pytorch_optimizer is not installed.
    """
    if not importlib.util.find_spec("pytorch_optimizer"):
        raise ImportError('this comparison needs pytorch_optimizer: pip install "stiefel[bench]"')
    import pytorch_optimizer as peer

    def theirs(name: str, cls: type, **settings: Any) -> Contestant:
        return Contestant(name, partial(_peer, cls, settings), factor=4.0)

    own = Contestant("normuon-nesterov", partial(_ours, partial(NorMuon, nesterov=True)), 4.0)
    found = (
        own,
        theirs("peer-muon", peer.Muon, use_adjusted_lr=True),  # ours: scale="rms"
        theirs("peer-normuon", peer.NorMuon, update_scale="match_rms"),
    )
    return {contestant.name: contestant for contestant in found}


def make(
    seed: int, *, size: GPTSize, limit: int, count: int, batch: int
) -> tuple[nn.Module, dict[str, list[Tensor]], Any]:
    """The race's factory: a byte GPT and windows of Python's standard library."""
    text, length = python_source(limit), size.context + 1
    generator = torch.Generator().manual_seed(seed)

    def rows(tokens: Tensor, number: int, source: torch.Generator) -> list[Tensor]:
        starts = torch.randint(len(tokens) - length, (number, batch), generator=source)
        return [windows(tokens, row.tolist(), length) for row in starts]

    batches = {
        "train": rows(text.train, count, generator),
        # The same windows for every seed.
        "validation": rows(text.validation, 8, torch.Generator().manual_seed(0)),
    }
    return GPT(size, seed), batches, next_token_loss


def compare(result: RaceResult, pairs: Sequence[tuple[str, str]] = PAIRS) -> list[dict[str, Any]]:
    """Final losses of every pair, and ours minus theirs seed by seed with a 95 % interval.

    The verdict is ``"worse"`` or ``"better"`` where that interval lies above or below zero, else
    ``"no worse"``.
    """
    by_name = {standing.name: standing for standing in result.standings}
    rows = []
    for own, other in pairs:
        differences = by_name[own].differences(by_name[other])
        mean, half = mean_and_half(differences)
        half = math.inf if half is None else half
        rows.append(
            {
                "ours": own,
                "peer": other,
                "loss": mean_and_half(by_name[own].finals),
                "peer_loss": mean_and_half(by_name[other].finals),
                "difference": (mean, half),
                "differences": differences,
                "verdict": "worse"
                if mean - half > 0
                else "better"
                if mean + half < 0
                else "no worse",
                "rates": (by_name[own].grid.best, by_name[other].grid.best),
                "bracketed": by_name[own].grid.bracketed and by_name[other].grid.bracketed,
            }
        )
    return rows


def show(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the comparison."""
    table = Table(title="Final validation loss, nats a byte", title_justify="left")
    for key in ("ours", "peer", "loss", "peer's", "ours − peer's", "verdict", "rates", "inside"):
        table.add_column(key)

    def interval(pair: tuple[float, float | None]) -> str:
        return f"{pair[0]:.4f}" + ("" if pair[1] is None else f" ± {pair[1]:.4f}")

    for row in rows:
        table.add_row(
            row["ours"],
            row["peer"],
            interval(row["loss"]),
            interval(row["peer_loss"]),
            interval(row["difference"]),
            row["verdict"],
            "{:g}, {:g}".format(*row["rates"]),
            "yes" if row["bracketed"] else "no",
        )
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Race, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="how many, at least 2")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--tiny", action="store_true", help="a model of test size, 4 steps")
    parser.add_argument("--json", type=Path, default=Path("build/peer_loss.json"))
    options = parser.parse_args(arguments)
    if options.seeds < 2:
        parser.error("--seeds must be at least 2")
    torch.set_num_threads(1)
    console = Console()
    try:
        peers = contestants()
    except ImportError as error:
        parser.error(str(error))
    size, limit, batch, steps = GPTSize(width=64, blocks=2), 2_000_000, 16, options.steps
    if options.tiny:
        size, limit, batch, steps = GPTSize(8, 1, 2, 8), 50_000, 4, 4
    CONTESTANTS.update(peers)  # of this process alone
    try:
        result = race(
            model=partial(make, size=size, limit=limit, count=steps, batch=batch),
            optimizers=list(dict.fromkeys(name for pair in PAIRS for name in pair)),
            steps=steps,
            seeds=range(options.seeds),
            lr=4e-3,
        )
    finally:
        for name in peers:
            del CONTESTANTS[name]
    rows = compare(result)
    show(console, rows)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    content = {"rows": rows, "race": result.to_json(), "torch": torch.__version__}
    options.json.write_text(json.dumps(content, indent=1) + "\n")
    console.print(f"written to {options.json}")


if __name__ == "__main__":
    main()
