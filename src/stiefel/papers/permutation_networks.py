"""Experiments of the permutation card: networks against theory, exactness, bytes, growth of N."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stiefel.data import MissingDataError, Text, python_source
from stiefel.papers.paper import Scale, UnavailableError
from stiefel.theory import (
    PermutationEnsemble,
    ensemble_size,
    nonzero_inputs,
    ntk_relu,
    permutation_moments,
)
from stiefel.theory.permutation import REGIMES
from stiefel.theory.permutation_ensemble import READ_AS_ZERO

BITS = 8
REVERSAL = tuple(range(BITS - 1, -1, -1))
DELTA = 0.1
# Finite width: how far a mean may lie from the limit, beyond four standard errors (sheet).
MEAN_ALLOWANCE = 0.01
# Sizes over which the growth of N is measured, and all that the figure draws.
GROWTH = (64, 128, 256, 512, 1024)
DRAWN = (5, 8, 10, 16, 20, 32, *GROWTH)
# Members that are evaluated at one time where the number needed is not known beforehand.
BLOCK = 16
# Draws of the infinitely wide ensemble at one time: 20 MB.
SAMPLES = 10_000


@dataclass(frozen=True)
class Task:
    """An ensemble that must be right on all inputs."""

    k: int
    members: int
    width: int
    regime: str

    @property
    def name(self) -> str:
        """As in the names of metrics."""
        return f"{self.regime}_{self.k}"


@dataclass(frozen=True)
class Plan:
    """Sizes of one scale."""

    tasks: tuple[Task, ...]
    moment_members: int
    widths: dict[str, int]
    """Width for each regime."""
    repeats: int
    """Ensembles of the certified size, for the share that is right everywhere."""
    limit_samples: int
    """The same of infinite width, sampled."""
    stopping: tuple[int, ...]
    """Values of k at which the number of networks is measured."""
    stopping_repeats: int
    text_bytes: int | None


def plan(scale: Scale) -> Plan:
    """The sheet's sizes at laptop scale; the official width at the paper's.

    At the paper's scale the 10,000 epochs of the official scripts are replaced by the solution
    that they converge to; both layers are trained at a width of 8192.
    """
    paper, smoke = scale is Scale.PAPER, scale is Scale.SMOKE
    narrow, wide = (256, 256) if smoke else (50_000, 50_000) if paper else (1024, 2048)
    both = 256 if smoke else 8192 if paper else 1024
    return Plan(
        tasks=(
            Task(8, 128, narrow, "last_layer"),
            Task(10, 139, wide, "last_layer"),
            Task(6, 540, both, "ntk"),
        ),
        moment_members=64 if smoke else 512,
        widths={"last_layer": narrow, "ntk": both},
        repeats=3 if smoke else 200,
        limit_samples=500 if smoke else 50_000,
        stopping=(5, 8) if smoke else (5, 8, 10, 15, 20, 25, 30),
        stopping_repeats=1 if smoke else 5,
        text_bytes=100_000 if smoke else None,
    )


def device() -> str:
    """An accelerator if there is one: only the paper's scale is large enough to want it."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def random_permutation(k: int, seed: int) -> Tensor:
    """A permutation of k bits that is not the identity."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        perm = torch.randperm(k, generator=generator)
        if not torch.equal(perm, torch.arange(k)):
            return perm


def exactness(task: Task, seed: int) -> dict[str, float]:
    """Shares of the unseen inputs that come out right: of the ensemble, of one network (mean)."""
    perm = random_permutation(task.k, seed)
    ensemble = PermutationEnsemble(
        task.k, task.members, task.width, task.regime, seed, device=device()
    ).fit(perm)
    inputs = nonzero_inputs(task.k)
    unseen = inputs[inputs.sum(1) > 1].to(device())
    seen = inputs[inputs.sum(1) == 1].to(device())
    right = unseen[:, ensemble.perm].bool()
    some = PermutationEnsemble(task.k, BLOCK, task.width, task.regime, seed, device=device()).fit(
        perm
    )
    alone = ((some.member_outputs(unseen) > READ_AS_ZERO) == right).all(-1).double().mean()
    return {
        "share": ensemble.score(unseen),
        "trained": ensemble.score(seen),
        "single": float(alone),
        "have_over_needed": task.members / ensemble.certificate(DELTA).needed,
    }


def certified_share(k: int, width: int, repeats: int, seed: int) -> float:
    """Share of last-layer ensembles of exactly the certified size that are right on all inputs.

    Each has members and a permutation of its own.
    """
    size = ensemble_size(k, DELTA, n_ones="all", regime="last_layer")
    right = 0
    for i in range(repeats):
        ensemble = PermutationEnsemble(
            k, size, width, "last_layer", seed, first=i * size, device=device()
        )
        perm = random_permutation(k, 1000 * seed + i)
        right += ensemble.fit(perm).score() == 1.0
    return right / repeats


def limit_share(k: int, regime: str, samples: int, seed: int) -> float:
    """Probability that certified ensembles of infinite width are right on all unseen inputs.

    The averaged outputs at all inputs together are Gaussian, with the covariance
    K − A Kᵀ − K Aᵀ + A K Aᵀ of networks trained to the end (A: coefficients of the examples).
    That is sampled, where the certificate only adds up the inputs' error probabilities.
    """
    size = ensemble_size(k, DELTA, n_ones="all", regime=regime)
    inputs = nonzero_inputs(k)
    inputs = inputs[inputs.sum(1) > 1].double()
    unit = inputs / inputs.norm(dim=1, keepdim=True)
    eye = torch.eye(k, dtype=torch.float64)
    trained = "ntk" if regime == "ntk" else "nngp"
    weights = torch.linalg.solve(ntk_relu(eye, kind=trained), ntk_relu(eye, unit, kind=trained)).mT
    cross = weights @ ntk_relu(eye, unit, kind="nngp")
    start = weights @ ntk_relu(eye, kind="nngp") @ weights.mT
    values, vectors = torch.linalg.eigh(ntk_relu(unit, kind="nngp") - cross - cross.mT + start)
    root = vectors * (values.clamp_min(0) / size).sqrt()
    generator = torch.Generator().manual_seed(seed)
    right = 0
    for start in range(0, samples, SAMPLES):
        draws = min(SAMPLES, samples - start)
        exact = torch.ones(draws, dtype=torch.bool)
        for bit in range(k):  # outputs are independent
            noise = torch.randn(draws, len(unit), generator=generator, dtype=torch.float64)
            exact &= ((noise @ root.mT + weights[:, bit] > 0) == inputs[:, bit].bool()).all(1)
        right += int(exact.sum())
    return right / samples


def moments(regime: str, members: int, width: int, seed: int) -> list[dict[str, float]]:
    """Measured and predicted means and variances for n = 2 … 8 ones of 8 bits.

    ``mean_ratio`` is the worst of all single outputs at all inputs with n ones: the distance of
    the members' mean from theory over 4σ/√N + 0.01. The variance is that of an output over
    members, averaged over outputs and inputs.
    """
    perm = random_permutation(BITS, seed)
    ensemble = PermutationEnsemble(BITS, members, width, regime, seed, device=device()).fit(perm)
    inputs = nonzero_inputs(BITS).to(device())
    outputs = ensemble.member_outputs(inputs).double()
    mean, var = outputs.mean(0).cpu(), outputs.var(0).cpu()
    source = inputs[:, ensemble.perm].bool().cpu()
    ones = source.sum(1)
    rows = []
    for n in range(2, BITS + 1):
        mu_on, mu_off, sigma2 = (float(v) for v in permutation_moments(BITS, n, regime=regime))
        chosen, on = mean[ones == n], source[ones == n]
        distance = (chosen - torch.where(on, mu_on, mu_off)).abs().max()
        allowed = 4 * math.sqrt(sigma2 / members) + MEAN_ALLOWANCE
        rows.append(
            {
                "n": n,
                "on": float(chosen[on].mean()),
                # No output is off where all bits are ones.
                "off": float(chosen[~on].mean()) if n < BITS else mu_off,
                "var": float(var[ones == n].mean()),
                "mu_on": mu_on,
                "mu_off": mu_off,
                "sigma2": sigma2,
                "mean_ratio": float(distance) / allowed,
                "variance_error": abs(float(var[ones == n].mean()) / sigma2 - 1),
            }
        )
    return rows


def stopping_size(k: int, width: int, accuracy: float, seed: int, first: int) -> int:
    """How many last-layer networks until ``accuracy`` of the inputs with two ones are right.

    Networks are averaged one after the other and the first number that reaches it counts, as in
    the official experiment, which draws 1000 of these inputs where all of them are taken here.

    Raises:
        RuntimeError: twenty times the predicted number does not suffice.
    """
    perm = random_permutation(k, seed + first)
    pairs = torch.combinations(torch.arange(k), 2)
    inputs = torch.zeros(len(pairs), k).scatter_(1, pairs, 1.0).to(device())
    right = inputs[:, perm.to(device())].bool()
    limit = 20 * ensemble_size(k, 1 - accuracy, regime="last_layer")
    total = torch.zeros(inputs.shape, dtype=torch.float64, device=device())
    for count in range(0, limit, BLOCK):
        block = PermutationEnsemble(
            k, BLOCK, width, "last_layer", seed, first=first + count, device=device()
        ).fit(perm)
        running = total + block.member_outputs(inputs).double().cumsum(0)
        shares = ((running > 0) == right).all(-1).double().mean(1)
        reached = (shares >= accuracy).nonzero()
        if len(reached):
            return count + int(reached[0]) + 1
        total = running[-1]
    raise RuntimeError(f"{limit} networks do not reach accuracy {accuracy} at k = {k}")


def growth() -> dict[str, float]:
    """Log–log slopes of the closed-form N over k = 64 … 1024, and the seconds that took."""
    start = time.thread_time()
    sizes = {
        (regime, n_ones): [ensemble_size(k, DELTA, n_ones=n_ones, regime=regime) for k in DRAWN]
        for regime in REGIMES
        for n_ones in (2, "all")
    }
    result = {"closed_form_seconds": time.thread_time() - start}
    low, high = DRAWN.index(GROWTH[0]), DRAWN.index(GROWTH[-1])
    for (regime, n_ones), values in sizes.items():
        slope = math.log(values[high] / values[low]) / math.log(GROWTH[-1] / GROWTH[0])
        result[f"slope_{'all' if n_ones == 'all' else 'single'}_{regime}"] = slope
    return result


def source_text(limit: int | None) -> Text:
    """Python's own library as bytes.

    Raises:
        UnavailableError: this Python comes without its source.
    """
    try:
        return python_source(limit)
    except MissingDataError as error:
        raise UnavailableError(str(error)) from error


def reverse_bytes(text: Text, members: int, width: int, seed: int) -> dict[str, float]:
    """Learn bit reversal from 8 bytes, reverse a text with it, and count the wrong bytes.

    All methods see the same 8 examples: the ensemble, one network, ridge regression without
    intercept, and kernel regression with the NTK (the ensemble in the limit). Each fills a table
    of the 255 nonzero bytes, through which the text then goes.
    """
    tokens = torch.cat([text.train, text.validation]).long()
    tokens = tokens[tokens > 0]  # the zero input has no direction and is not part of the task
    inputs = nonzero_inputs(BITS)
    unit = inputs.double() / inputs.double().norm(dim=1, keepdim=True)
    eye = torch.eye(BITS, dtype=torch.float64)
    targets = eye[list(REVERSAL)].mT

    def network(count: int) -> Callable[[], Tensor]:
        return lambda: (
            PermutationEnsemble(BITS, count, width, "last_layer", seed)
            .fit(REVERSAL)
            .predict(inputs)
        )

    def kernel() -> Tensor:
        return ntk_relu(unit, eye) @ torch.linalg.solve(ntk_relu(eye), targets) > READ_AS_ZERO

    methods: dict[str, Callable[[], Tensor]] = {
        "ensemble": network(members),
        "single": network(1),
        "kernel": kernel,
        "ridge": lambda: unit @ torch.linalg.solve(2 * eye, targets) > READ_AS_ZERO,  # penalty 1
    }
    wanted = torch.tensor([int(f"{byte:08b}"[::-1], 2) for byte in range(256)])
    result = {"bytes": float(len(tokens)), "distinct": float(len(tokens.unique()))}
    weights = 2 ** torch.arange(BITS - 1, -1, -1)
    for name, table_of in methods.items():
        table = torch.cat([torch.zeros(1).long(), (table_of().long() * weights).sum(1)])
        result[f"{name}_errors"] = float((table[tokens] != wanted[tokens]).sum())
        result[f"{name}_table"] = float((table[1:] == wanted[1:]).double().mean())
    return result


def geometric_mean(values: Sequence[float]) -> float:
    """exp of the mean logarithm."""
    return math.exp(math.fsum(math.log(v) for v in values) / len(values))
