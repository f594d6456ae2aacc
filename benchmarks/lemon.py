"""Meta-learning against one clone per task, and what reuse of equations saves, with the bounds.

    python benchmarks/lemon.py --json build/lemon.json

Times are CPU times of one thread, candidates in turn, median over rounds: on a shared machine only
the ratios mean something. A peer that is not installed is left out and named.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from timing import in_turn, run_sections
from torch import Tensor, nn

from stiefel.nn.lemon import PROSE, MetaLearner, OperatorData, split_task
from stiefel.nn.lemon.training import Data, split

TASKS, INNER_STEPS, INNER_LR = 5, 5, 0.05
SUPPORT, QUERY = 10, 20
N_X, SLICES, LENGTH, VOCAB = 32, 8, 24, 1036


def row(what: str, ours: float, peer: float | str, ratio: float, bound: str, unit: str) -> dict:
    """One line of the result; ``bound`` is ``"≥ 2"`` or ``"≤ 0.25"`` of the ratio, or ``"–"``."""
    met = "–"
    if bound != "–":
        relation, limit = bound.split()
        met = "yes" if (ratio >= float(limit)) == (relation == "≥") else "NO"
    return {
        "what": what, "ours": ours, "peer": peer, "unit": unit,
        "ratio": ratio, "bound": bound, "met": met,
    }  # fmt: skip


def tiny(seed: int = 0) -> PROSE:
    """The network of the laptop experiment."""
    generator = torch.Generator().manual_seed(seed)
    return PROSE(N_X, VOCAB, 32, 4, (1, 1, 1, 2), ffn=64, generator=generator)


def random_data(samples: int, formulas: int, generator: torch.Generator) -> OperatorData:
    """Smooth fields and random equations: time does not depend on what they say."""
    x = torch.linspace(0, 2, N_X)
    t = torch.linspace(0, 2, 2 * SLICES)
    shift = torch.rand(samples, 1, 1, generator=generator)
    u = torch.sin(torch.pi * (x - t[:, None] - shift))[..., None]
    equations = torch.randint(1, VOCAB, (formulas, LENGTH), generator=generator)
    times = t.expand(samples, -1)
    return OperatorData(
        u[:, :SLICES], times[:, :SLICES], u[:, SLICES:], times[:, SLICES:],
        equations[torch.arange(samples) % formulas],
    )  # fmt: skip


Task = tuple[Data, Data]


def plain(data: Data) -> Data:
    """What a model sees, prepared once: trajectories normalised by their inputs."""
    return split(data.normalised()[0]) if isinstance(data, OperatorData) else data


def mse(model: nn.Module, data: Data) -> Tensor:
    inputs, target = data
    inputs = (inputs,) if isinstance(inputs, Tensor) else inputs
    return nn.functional.mse_loss(model(*inputs), target)


def cloned(module: nn.Module) -> nn.Module:
    """A module whose parameters are clones with a graph to the original, as learn2learn's."""
    twin = copy.copy(module)
    twin.__dict__ = module.__dict__.copy()
    twin._parameters = {n: None if p is None else p.clone() for n, p in module._parameters.items()}
    twin._modules = {n: None if m is None else cloned(m) for n, m in module._modules.items()}
    return twin


def moved(module: nn.Module, change: dict[str, Tensor], prefix: str = "") -> None:
    """Add a change to every parameter, keeping the graph."""
    for name in module._parameters:
        if module._parameters[name] is not None:
            module._parameters[name] = module._parameters[name] + change[prefix + name]
    for name, child in module._modules.items():
        if child is not None:
            moved(child, change, f"{prefix}{name}.")


def tensors(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Parameters of a clone, which are no ``nn.Parameter`` any more."""
    found = {prefix + n: p for n, p in module._parameters.items() if p is not None}
    for name, child in module._modules.items():
        if child is not None:
            found |= tensors(child, f"{prefix}{name}.")
    return found


class CloneLoop:
    """First-order MAML with one clone of the module per task, one task after the other."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, eps=1e-6, fused=True)

    def adapted(self, support: Data) -> nn.Module:
        clone = cloned(self.model)
        for _ in range(INNER_STEPS):
            named = tensors(clone)
            grads = torch.autograd.grad(mse(clone, support), list(named.values()))
            moved(clone, {n: -INNER_LR * g for n, g in zip(named, grads, strict=True)})
        return clone

    def outer_step(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            support, query = map(plain, task)
            (mse(self.adapted(support), query) / len(tasks)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Learn2Learn(CloneLoop):
    """The same with learn2learn."""

    def adapted(self, support: Data) -> nn.Module:
        import learn2learn

        maml = learn2learn.algorithms.MAML(self.model, lr=INNER_LR, first_order=True)
        clone = maml.clone()
        for _ in range(INNER_STEPS):
            clone.adapt(mse(clone, support))
        return clone


def sines(generator: torch.Generator) -> Task:
    """The usual regression of MAML: a sine of random amplitude and phase."""
    x = 10 * torch.rand(SUPPORT + QUERY, 1, generator=generator) - 5
    amplitude, phase = torch.rand(2, generator=generator).tolist()
    y = (0.1 + 4.9 * amplitude) * torch.sin(x - 3.14 * phase)
    return (x[:SUPPORT], y[:SUPPORT]), (x[SUPPORT:], y[SUPPORT:])


def small_mlp() -> nn.Module:
    """The network of that regression."""
    torch.manual_seed(0)
    sizes = (1, 40, 40, 1)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def meta(rounds: int) -> list[dict]:
    """Tasks a second of one outer step: 5 tasks × 5 inner steps of 10 samples."""
    generator = torch.Generator().manual_seed(1)

    def operators(formulas: int) -> list[Task]:
        every = [random_data(SUPPORT + QUERY, formulas, generator) for _ in range(TASKS)]
        return [split_task(d, SUPPORT, QUERY, generator=generator) for d in every]

    cases = {
        "PROSE, one equation a task": (tiny, operators(1)),
        "PROSE, an equation a sample": (tiny, operators(SUPPORT + QUERY)),
        "MLP 1-40-40-1": (small_mlp, [sines(generator) for _ in range(TASKS)]),
        "MLP 1-40-40-1, 25 tasks": (small_mlp, [sines(generator) for _ in range(25)]),
    }
    found = []
    for label, (model, tasks) in cases.items():
        candidates = {
            "ours": MetaLearner(model(), INNER_LR, INNER_STEPS).outer_step,
            "clones": CloneLoop(model()).outer_step,
        }
        if importlib.util.find_spec("learn2learn"):
            candidates["learn2learn"] = Learn2Learn(model()).outer_step
        calls = {n: lambda f=f, t=tasks: f(t) for n, f in candidates.items()}
        seconds = in_turn(calls, rounds, fill=0.5)
        ours = seconds.pop("ours")
        found += [
            row(
                f"{label}, against {n}",
                len(tasks) / ours,
                len(tasks) / t,
                t / ours,
                "≥ 2" if len(tasks) == TASKS else "–",
                "tasks/s",
            )
            for n, t in seconds.items()
        ]
    return found


def equations(rounds: int) -> list[dict]:
    """Forward and backward of 64 samples that share 4 equations, padded to 64 tokens."""
    generator = torch.Generator().manual_seed(2)
    model = tiny()
    data = random_data(64, 4, generator).padded(64).normalised()[0]

    def ours() -> None:
        mse(model, split(data)).backward()

    def plain() -> None:
        u, t_in, t_out, tokens = data.inputs
        y = model(u, t_in, t_out, symbols=model._encode(tokens))
        nn.functional.mse_loss(y, data.target).backward()

    seconds = in_turn({"ours": ours, "plain": plain}, rounds, fill=0.2)
    return [
        row(
            "64 samples, 4 equations of 24 in 64 tokens: padding cut, each encoded once",
            1e3 * seconds["ours"], 1e3 * seconds["plain"], seconds["plain"] / seconds["ours"],
            "–", "ms",
        )
    ]  # fmt: skip


SECTIONS = {"meta": meta, "equations": equations}
PEERS = {"learn2learn": "pip install learn2learn (its last release does not build for Python 3.11)"}

if __name__ == "__main__":
    run_sections(
        "LeMON", __doc__ or "", SECTIONS, PEERS, Path("build/lemon.json"),
        about={"network": "PROSE, width 32, 4 heads, layers 1/1/1/2"},
    )  # fmt: skip
