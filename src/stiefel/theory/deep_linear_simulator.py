"""Gradient descent on deep linear networks without their data, many runs at one time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.linalg.decoupled import decoupled_factors
from stiefel.linalg.orthonormal_stack import orthonormal_stack
from stiefel.theory.deep_linear_args import Reals, as_reals, check_at_least
from stiefel.theory.deep_linear_modes import TaskModes

INITS = ("orthogonal", "gaussian", "xavier", "decoupled")
RECORDS = ("modes", "loss", "excess")
# A loss that has grown by this factor never comes back.
_DIVERGED = 1e6


@dataclass(frozen=True)
class SimulatedRuns:
    """What :meth:`DeepLinearSimulator.run` recorded; leading dimensions are rates, then seeds."""

    steps: Tensor
    """Iterations at which it was recorded, ``[R]``; the first is 0."""
    values: Tensor
    """``[*rates, seeds, R]``, with modes as last dimension if those were recorded. Infinite from
    where a run diverged."""
    diverged: Tensor
    """Which runs did, ``[*rates, seeds]``."""


class DeepLinearSimulator:
    """Full-batch gradient descent on ½⟨|y − W_D…W_1 x|²⟩, from covariances alone.

    W_l ← W_l + λ (W_D…W_{l+1})ᵀ [Σ31 − (W_D…W_1) Σ11] (W_{l−1}…W_1)ᵀ. A step costs three products
    per layer whatever the number of examples, and all rates and seeds go through it together.

    Source: arXiv 1312.6120, eqs. 2 and 13.
    """

    def __init__(
        self,
        widths: Sequence[int],
        init: str | Sequence[Tensor] = "orthogonal",
        *,
        modes: TaskModes,
        gain: float | int = 1.0,
        std: float | None = None,
        u0: Reals = 1e-3,
        seeds: Sequence[int] = (0,),
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ) -> None:
        """Draw the weights of every seed; each seed gives the same weights in any company.

        Args:
            widths: Numbers of neurons [N_in, hidden …, N_out]: one more than weight layers. N_in is
                that of the whitened inputs where the task was whitened.
            init: ``"orthogonal"`` (Haar times gain), ``"gaussian"`` (variance gain²/fan-in, or
                std²), ``"xavier"`` (uniform in ±gain·√(6/(fan-in + fan-out))), ``"decoupled"``
                (every mode at ``u0``), or the weights themselves, ``[out, in]`` or
                ``[seeds, out, in]`` each.
            modes: The task.
            gain: Factor of random weights, > 0.
            std: Standard deviation of Gaussian weights instead of gain/√fan-in.
            u0: Strength of the modes at the start, for ``"decoupled"``; a number or one per mode.
            seeds: One run each.
            dtype: float32 or float64.
            device: Where it runs.

        Raises:
            ValueError: widths that do not fit the task or one another, an unknown init, settings
                out of range, weights of other shapes.
        """
        self.widths = [int(w) for w in widths]
        ends = (modes.V.shape[0], modes.U.shape[0])
        if len(self.widths) < 2 or min(self.widths) < 1:
            raise ValueError(f"widths must be at least two numbers ≥ 1, got {list(widths)}")
        if (self.widths[0], self.widths[-1]) != ends:
            raise ValueError(
                f"widths must start with the task's {ends[0]} inputs and end with its {ends[1]} "
                f"outputs, got {self.widths}"
            )
        if not seeds:
            raise ValueError("seeds must name at least one run")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be float32 or float64, got {dtype}")
        for name, value in (("gain", gain), ("std", std)):
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if std is not None and init != "gaussian":
            raise ValueError(f"std is for init='gaussian', got init={init!r}")
        self.modes, self.seeds = modes, tuple(int(seed) for seed in seeds)
        self._options = {"dtype": dtype, "device": device}
        if isinstance(init, str):
            if init not in INITS:
                raise ValueError(f"init must be one of {', '.join(INITS)} or weights, got {init!r}")
            (start,) = as_reals(u0=u0)
            check_at_least(start, "u0", 0, strictly=True)
            drawn = [self._draw(init, float(gain), std, start, seed) for seed in self.seeds]
            self.weights = [torch.stack(layer).to(**self._options) for layer in zip(*drawn)]  # noqa: B905
        else:
            self.weights = self._given(init)
        self._target = modes.sigma31.to(**self._options)
        white = modes.whitening is not None
        self._sigma11 = None if white else modes.sigma11.to(**self._options)

    @property
    def depth(self) -> int:
        """Number of weight layers."""
        return len(self.widths) - 1

    def run(
        self, lr: Reals, n_steps: int, record: str = "modes", *, every: int = 1
    ) -> SimulatedRuns:
        """Train from the start at every rate, for every seed.

        Args:
            lr: Learning rates > 0, a number or ``[...]``.
            n_steps: Iterations ≥ 0.
            record: ``"modes"`` (strengths uᵀWv), ``"loss"``, or ``"excess"`` over the loss floor.
            every: Iterations between records.

        Raises:
            ValueError: lr ≤ 0, negative steps, an unknown record, a loss whose floor the task does
                not know.
        """
        rates = self._rates(lr)
        if record not in RECORDS:
            raise ValueError(f"record must be one of {', '.join(RECORDS)}, got {record!r}")
        if record == "loss" and self.modes.loss_floor is None:
            raise ValueError("the task does not know ⟨|y|²⟩, so no loss; record 'excess' instead")
        if n_steps < 0 or every < 1:
            raise ValueError(f"n_steps must be ≥ 0 and every ≥ 1, got {n_steps} and {every}")
        weights, step_sizes = self._batch(rates)
        alive = torch.ones(step_sizes.shape[0], dtype=torch.bool, device=step_sizes.device)
        limit, kept, steps = None, [], []
        for step in range(n_steps + 1):
            partial = self._forward(weights)
            excess = self.modes.excess(partial[-1])
            limit = _DIVERGED * excess if limit is None else limit
            lost = alive & ~(excess <= limit)
            if bool(lost.any()):
                alive &= ~lost
                step_sizes[lost] = 0.0
                for weight in weights:
                    weight[lost] = 0.0
                partial = self._forward(weights)
            if step % every == 0:
                value = excess + (self.modes.loss_floor or 0.0) if record == "loss" else excess
                if record == "modes":
                    value = self.modes.strengths(partial[-1])
                mask = alive if value.ndim == 1 else alive[:, None]
                kept.append(torch.where(mask, value, math.inf))
                steps.append(step)
            if step < n_steps:
                self._backward(weights, partial, step_sizes)
        shape = (*rates.shape, len(self.seeds))
        values = torch.stack(kept, dim=1)
        return SimulatedRuns(
            torch.tensor(steps),
            values.reshape(*shape, *values.shape[1:]),
            ~alive.reshape(shape),
        )

    def learning_time(
        self, lr: Reals, max_steps: int, *, tolerance: float = 0.002, first: bool = False
    ) -> Float[Tensor, "*rates seeds"]:
        """Iterations until the excess loss is ``tolerance`` of that of the zero map.

        The zero map, not the weights at the start, so that all starts have the same goal.

        Args:
            lr: Learning rates > 0, a number or ``[...]``.
            max_steps: Where to give up.
            tolerance: In (0, 1).
            first: Stop a seed as soon as one of its rates is there (the fastest rate is asked for).

        Returns:
            ``[*rates, seeds]``: fractions of an iteration by log-linear interpolation (round up
            for the iteration itself), infinite where it was not reached, diverged or given up.

        Raises:
            ValueError: lr ≤ 0, a tolerance outside (0, 1), max_steps < 1.
        """
        rates = self._rates(lr)
        if not 0 < tolerance < 1:
            raise ValueError(f"tolerance must lie between 0 and 1, got {tolerance}")
        if max_steps < 1:
            raise ValueError(f"max_steps must be ≥ 1, got {max_steps}")
        weights, step_sizes = self._batch(rates)
        count, seeds = step_sizes.shape[0], len(self.seeds)
        times = torch.full((count,), math.inf, dtype=torch.float64)
        running = torch.arange(count)
        before = self.modes.excess(self._forward(weights)[-1])
        idle = self.modes.excess(torch.zeros_like(self._target))
        goal, limit = (tolerance * idle).expand_as(before), _DIVERGED * (before + idle)
        for step in range(max_steps + 1):
            partial = self._forward(weights)
            excess = self.modes.excess(partial[-1])
            there = excess <= goal
            if bool(there.any()):
                part = torch.log(before / goal) / torch.log(before / excess)
                part = part if step else torch.ones_like(part)  # there from the start
                times[running[there.cpu()]] = (step - 1 + part[there].double()).cpu()
            stay = ~there & (excess < limit)  # false for NaN
            if first and bool(there.any()):
                done = torch.zeros(seeds, dtype=torch.bool)
                done[running[there.cpu()] % seeds] = True
                stay &= ~done[running % seeds].to(stay.device)
            if not bool(stay.all()):
                weights, partial = ([x[stay] for x in group] for group in (weights, partial))
                step_sizes, excess, goal, limit = (
                    x[stay] for x in (step_sizes, excess, goal, limit)
                )
                running = running[stay.cpu()]
            if not len(running):
                break
            before = excess
            self._backward(weights, partial, step_sizes)
        return times.reshape(*rates.shape, seeds)

    def _rates(self, lr: Reals) -> Tensor:
        (rates,) = as_reals(lr=lr)
        check_at_least(rates, "lr", 0, strictly=True)
        return rates.detach()

    def _batch(self, rates: Tensor) -> tuple[list[Tensor], Tensor]:
        """Weights of every run, rates outside seeds, and their step sizes ``[B, 1, 1]``."""
        weights = [w.repeat(rates.numel(), 1, 1) for w in self.weights]
        sizes = rates.flatten().repeat_interleave(len(self.seeds)).to(weights[0])
        return weights, sizes[:, None, None]

    def _forward(self, weights: list[Tensor]) -> list[Tensor]:
        """W_l…W_1 for every l."""
        partial = [weights[0]]
        for weight in weights[1:]:
            partial.append(torch.bmm(weight, partial[-1]))
        return partial

    def _backward(self, weights: list[Tensor], partial: list[Tensor], sizes: Tensor) -> None:
        """One step, in place; layers from the last to the first, each read before it is changed."""
        product = partial[-1]
        seen = product if self._sigma11 is None else product @ self._sigma11
        error = (self._target - seen) * sizes
        after = None  # W_D…W_{l+1}
        for layer in range(len(weights) - 1, -1, -1):
            weight = weights[layer]
            change = error if layer == 0 else torch.bmm(error, partial[layer - 1].mT)
            if after is None:
                after = weight.clone()
                weight += change
            else:
                following = torch.bmm(after, weight) if layer else after
                weight.baddbmm_(after.mT, change)
                after = following

    def _draw(
        self, init: str, gain: float, std: float | None, u0: Tensor, seed: int
    ) -> list[Tensor]:
        """Weights ``[out, in]`` of one seed, in float64 on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        options = {"generator": generator, "dtype": torch.float64}
        if init == "decoupled":
            if u0.ndim and u0.shape != self.modes.S.shape:
                raise ValueError(
                    f"u0 must be a number or one for each of the {self.modes.S.numel()} modes, "
                    f"got shape {tuple(u0.shape)}"
                )
            amplitude = u0.double() ** (1 / self.depth)
            left, right = self.modes.U.cpu(), self.modes.V.cpu()
            stacks = decoupled_factors(
                left, right, self.widths[1:-1], amplitude.cpu(), generator=generator
            )
            return [stack[0] for stack in stacks]
        layers = []
        for columns, rows in zip(self.widths, self.widths[1:], strict=False):
            if init == "orthogonal":
                layers.append(gain * orthonormal_stack(1, rows, columns, **options)[0])
            elif init == "gaussian":
                size = gain / math.sqrt(columns) if std is None else std
                layers.append(size * torch.randn(rows, columns, **options))
            else:
                limit = gain * math.sqrt(6 / (rows + columns))
                layers.append(limit * (2 * torch.rand(rows, columns, **options) - 1))
        return layers

    def _given(self, init: Sequence[Tensor]) -> list[Tensor]:
        shapes = list(zip(self.widths[1:], self.widths, strict=False))
        found = [tuple(w.shape[-2:]) for w in init]
        sizes = {w.shape[0] if w.ndim == 3 else 1 for w in init}
        if found != shapes or not sizes <= {1, len(self.seeds)}:
            raise ValueError(
                f"weights must have shapes {shapes}, alone or one for each of {len(self.seeds)} "
                f"seeds, got {[tuple(w.shape) for w in init]}"
            )
        weights = [w.detach().to(**self._options) for w in init]
        return [w.expand(len(self.seeds), -1, -1).clone() for w in weights]
