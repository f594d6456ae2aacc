"""Penalties and frozen heads of rich features against what they replace.

    python benchmarks/rich_features.py --json build/rich_features.json

CPU times of one thread, both sides of a ratio in turn, median over rounds: on a shared machine only
the ratios mean something. Peers that are not installed are left out and named
(``pip install --no-deps backpack-for-pytorch einops unfoldNd``).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table as RichTable
from timing import SHORT, in_turn
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from stiefel.init import (
    averaging_matrix,
    clove,
    discovery_sets,
    fishr,
    fishr_linear,
    group_dro_loss,
    penalised_loss,
    train_heads,
)
from stiefel.init.penalties import PENALTIES

# The digits of the card, and a larger network on more of them.
SIZES = {"1347 × 128": (1347, 128), "10000 × 390": (10_000, 390)}
STEPS = 20
PENALTY_WEIGHTS = (1e3, 5e3, 1e4, 5e4, 1e5)


def features(n: int, h: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    phi = torch.rand(n, h, generator=generator)
    y = (torch.rand(n, generator=generator) < 0.5).long()
    return phi, y, torch.arange(n) % 2


def spread_by_environment(squares: Tensor, env: Tensor) -> Tensor:
    means = torch.stack([squares[env == e].mean(0) for e in (0, 1)])
    return (means - means.mean(0)).square().sum()


def fishr_rows(rounds: int) -> list[dict]:
    """Penalty and its gradient by the head: closed form against gradients of each example."""
    rows = []
    for size, (n, h) in SIZES.items():
        phi, y, env = features(n, h)
        head = nn.Linear(h, 1)
        parameters = list(head.parameters())

        def ours(head=head, phi=phi, y=y, env=env, parameters=parameters) -> object:
            value = fishr_linear(phi, head(phi)[:, 0], y, env)
            return value, torch.autograd.grad(value, parameters)

        def vmapped(head=head, phi=phi, y=y, env=env, parameters=parameters) -> object:
            value = fishr(head, phi, y, env)
            return value, torch.autograd.grad(value, parameters)

        tasks: dict[str, Callable[[], object]] = {"fishr_linear": ours, "torch.func": vmapped}
        if importlib.util.find_spec("backpack"):
            tasks["BackPACK"] = backpack_task(head, phi, y, env)
            (value, gradients), (wanted, expected) = ours(), tasks["BackPACK"]()  # type: ignore
            torch.testing.assert_close(value, wanted, rtol=1e-3, atol=0.0)
            for a, b in zip(gradients, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
        seconds = in_turn(tasks, rounds, fill=SHORT)
        rows += [
            row(f"Fishr, {size}", peer, seconds[peer], seconds["fishr_linear"], bound)
            for peer, bound in (("BackPACK", 5.0), ("torch.func", None))
            if peer in seconds
        ]
        if "BackPACK" in tasks:
            rows.append(fishr_training(rounds, size, head, tasks["BackPACK"]))
    return rows


def fishr_training(rounds: int, size: str, head: nn.Linear, penalty: Callable[[], object]) -> dict:
    """The same in training: losses, penalty and Adam of a frozen head, by ours and by BackPACK."""
    phi, y, env = features(*SIZES[size])
    parameters = list(head.parameters())
    optimizer = torch.optim.Adam(parameters, lr=5e-4)
    labels = y.float()

    def theirs() -> None:
        for _ in range(STEPS):
            z = head(phi)[:, 0]
            loss = bce(z[env == 0], labels[env == 0]) + bce(z[env == 1], labels[env == 1])
            plain = torch.autograd.grad(loss, parameters)
            _, extra = penalty()  # type: ignore[misc]
            for p, a, b in zip(parameters, plain, extra, strict=True):
                p.grad = (a + 1e4 * b) / 1e4
            optimizer.step()

    def ours() -> None:
        train_heads(phi, y, env, ["fishr"], [1e4], steps=STEPS)

    seconds = in_turn({"theirs": theirs, "ours": ours}, rounds, fill=SHORT)
    what = f"training with Fishr, {size}"
    return row(what, "BackPACK", seconds["theirs"], seconds["ours"], 5.0)


def backpack_task(head: nn.Linear, phi: Tensor, y: Tensor, env: Tensor) -> Callable[[], object]:
    """As the authors' code does it: gradients of each example of the head, with their graph."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from backpack import backpack, extend
        from backpack.extensions import BatchGrad

    copy = nn.Linear(head.in_features, 1)
    copy.load_state_dict(head.state_dict())
    extended, loss = extend(copy), extend(nn.BCEWithLogitsLoss(reduction="sum"))
    parameters = list(extended.parameters())
    labels = y.float()[:, None]

    def task() -> object:
        with warnings.catch_warnings():
            # Of create_graph in backward, and of BackPACK's hooks on a module without gradients
            # by its inputs.
            warnings.simplefilter("ignore")
            with backpack(BatchGrad()):
                loss(extended(phi), labels).backward(retain_graph=True, create_graph=True)
            single = torch.cat([p.grad_batch.flatten(1) for p in parameters], 1)
            value = spread_by_environment(single.square(), env)
            gradients = torch.autograd.grad(value, parameters)
        for p in parameters:
            del p.grad_batch
            p.grad = None
        return value, gradients

    return task


def frozen_rows(rounds: int) -> list[dict]:
    """V-REx on cached features against the full network; a grid at once against one by one."""
    rows = []
    for size, (n, h) in SIZES.items():
        phi, y, env = features(n, h)
        inputs = torch.rand(n, h, generator=torch.Generator().manual_seed(1))

        def network(inputs=inputs, y=y, env=env, h=h) -> None:
            model = nn.Sequential(
                nn.Linear(h, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, 1)
            )
            optimizer = torch.optim.Adam(model.parameters(), lr=5e-4, weight_decay=2.2e-7)
            for _ in range(STEPS):
                optimizer.zero_grad()
                penalised_loss("vrex", 1e4, model(inputs)[:, 0], y, env).backward()
                optimizer.step()

        def head(phi=phi, y=y, env=env) -> None:
            train_heads(phi, y, env, ["vrex"], [1e4], steps=STEPS)

        grid = [(name, weight) for name in PENALTIES if name != "erm" for weight in PENALTY_WEIGHTS]
        names, weights = zip(*grid, strict=True)

        def together(phi=phi, y=y, env=env, names=names, weights=weights) -> None:
            train_heads(phi, y, env, names, weights, steps=STEPS)

        def singly(phi=phi, y=y, env=env, grid=grid) -> None:
            for name, weight in grid:
                train_heads(phi, y, env, [name], [weight], steps=STEPS)

        seconds = in_turn({"network": network, "head": head, "grid": together}, rounds, fill=SHORT)
        one = in_turn({"singly": singly}, 1 if n > 5000 else rounds, fill=SHORT)["singly"]
        per_run = seconds["grid"] / len(grid)
        rows += [
            row(f"V-REx frozen, {size}", "full network", seconds["network"], seconds["head"], 10.0),
            row(f"one of a grid of 30, {size}", "full network", seconds["network"], per_run, 10.0),
            row(f"grid of 30 heads, {size}", "30 trainings", one, seconds["grid"], None),
        ]
    return rows


def other_rows(rounds: int) -> list[dict]:
    """CLOvE in sorted order, and the sets' means by one product."""
    n = 4000
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n, generator=generator, requires_grad=True)
    _, y, env = features(n, 1)

    def by_matrix() -> object:
        total = z.new_zeros(())
        for e in (0, 1):
            p = z[env == e].sigmoid()
            conf = torch.maximum(p, 1 - p)
            gap = ((p > 0.5) == (y[env == e] > 0)).to(p) - conf
            kernel = torch.exp(-(conf[:, None] - conf[None]).abs() / 0.4)
            total = total + (gap[:, None] * gap[None] * kernel).mean()
        return torch.autograd.grad(total, z)

    def sorted_order() -> object:
        return torch.autograd.grad(clove(z, y, env), z)

    phi, labels, _ = features(1347, 128)
    net = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1))
    correct = torch.rand(1347, 2, generator=generator) < 0.85
    sets = discovery_sets(correct)
    matrix, parameters = averaging_matrix(sets, 1347), list(net.parameters())

    def one_pass() -> object:
        losses = bce(net(phi)[:, 0], labels.float(), reduction="none")
        return torch.autograd.grad(group_dro_loss(losses, matrix), parameters)

    def a_pass_for_each_set() -> object:
        means = [bce(net(phi[rows])[:, 0], labels[rows].float()) for rows in sets]
        return torch.autograd.grad(torch.stack(means).max(), parameters)

    pairs = (
        ("CLOvE, 2 × 2000", "kernel matrix", by_matrix, sorted_order),
        ("DRO on 4 sets", "a forward for each", a_pass_for_each_set, one_pass),
    )
    rows = []
    for what, peer, theirs, ours in pairs:
        seconds = in_turn({"theirs": theirs, "ours": ours}, rounds, fill=SHORT)
        rows.append(row(what, peer, seconds["theirs"], seconds["ours"], None))
    return rows


def row(what: str, peer: str, theirs: float, ours: float, bound: float | None) -> dict:
    return {
        "what": what,
        "peer": peer,
        "peer_ms": 1e3 * theirs,
        "ours_ms": 1e3 * ours,
        "ratio": theirs / ours,
        "bound": bound,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = fishr_rows(arguments.rounds) + frozen_rows(arguments.rounds)
    rows += other_rows(arguments.rounds)
    table = RichTable(title="CPU time, one thread: peer / ours")
    for name in ("what", "peer", "peer ms", "ours ms", "ratio", "bound"):
        table.add_column(name, justify="left" if name in ("what", "peer") else "right")
    for r in rows:
        bound = "" if r["bound"] is None else f"≥ {r['bound']:g}"
        numbers = (f"{r['peer_ms']:.2f}", f"{r['ours_ms']:.2f}", f"{r['ratio']:.1f}", bound)
        table.add_row(r["what"], r["peer"], *numbers)
    console = Console()
    console.print(table)
    if not importlib.util.find_spec("backpack"):
        console.print("Not installed, left out: backpack-for-pytorch")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
