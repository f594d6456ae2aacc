"""PDE-agnostic meta-learning: weights from which few gradient steps suffice.

MAML over tasks drawn from families; nothing but the symbols tells the inner loop which one. All
tasks of an outer step run at once: their weights are stacked, the model is called through
``torch.func.functional_call`` under ``vmap``, and one backward pass gives every task its gradient.

Source: Sun, Zhang and Schaeffer, arXiv 2408.16168 (PAML, LeMONS); Finn et al. 2017 (MAML); Li et
al. 2017 (Meta-SGD).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from stiefel.nn.lemon.checks import check_count, check_number
from stiefel.nn.lemon.meta_step_size import SymbolicStepSize
from stiefel.nn.lemon.meta_tasks import Group, Part, Task, examples, stacked
from stiefel.nn.lemon.training import ADAM_EPS, CLIP, WEIGHT_DECAY, Data, Loss

PER_PARAMETER = "per-parameter"
# LeMONS keeps what reads the equation outside of the inner loop.
SYMBOLS = r"(^|\.)(token_embedding|symbol_encoder)\."


class MetaLearner(nn.Module):
    """Learns weights (and step sizes) that adapt to a new task in ``inner_steps`` steps.

    Inner loop, for each task, from the shared weights θ:
    θ′ ← θ′ − α ∇ loss(θ′; support) (+ sqrt(2αη) z with ``langevin`` η).
    Outer step: AdamW with the mean over tasks of the gradient of loss(θ′; query), at θ′ with
    ``first_order``, else through the inner loop.

    Args:
        model: Any module, called as ``model(*inputs)``; must not write to its buffers.
        inner_lr: α: a number, ``"per-parameter"`` (Meta-SGD: one α per weight, learned, from
            ``start_lr``), or a :class:`SymbolicStepSize` (LeMONS: one α per equation, learned).
        inner_steps: Gradient steps on the support, at least 1.
        first_order: Drop second derivatives; the step sizes are learned either way.
        inner: Regular expression for the parameters that the inner loop moves. All that require a
            gradient if None; with a SymbolicStepSize all but the symbol encoder.
        start_lr: Where ``"per-parameter"`` starts.
        clamp: Bound on every entry of an inner gradient.
        langevin: η, noise of the inner steps.
        outer_lr, weight_decay, clip: Of AdamW. Step sizes do not decay.
        loss: Of prediction and target.
        generator: For the noise.

    Raises:
        TypeError, ValueError: a setting out of range, or a model without what the setting needs.
    """

    def __init__(
        self,
        model: nn.Module,
        inner_lr: float | int | str | SymbolicStepSize = 1e-2,
        inner_steps: int = 5,
        first_order: bool = True,
        *,
        inner: str | None = None,
        start_lr: float | int = 1e-2,
        clamp: float | int | None = None,
        langevin: float | int = 0.0,
        outer_lr: float | int = 1e-4,
        weight_decay: float | int = WEIGHT_DECAY,
        clip: float | int = CLIP,
        loss: Loss = nn.functional.mse_loss,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_count("inner_steps", inner_steps)
        check_number("start_lr", start_lr)
        check_number("langevin", langevin, open_low=False)
        check_number("outer_lr", outer_lr)
        check_number("weight_decay", weight_decay, open_low=False)
        check_number("clip", clip)
        if clamp is not None:
            check_number("clamp", clamp)
        self.model, self.inner_steps, self.first_order = model, inner_steps, first_order
        self.clamp, self.langevin, self.clip = clamp, float(langevin), float(clip)
        self.loss, self.generator = loss, generator
        symbolic = isinstance(inner_lr, SymbolicStepSize)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        moved = {n: p for n, p in trained.items() if _moves(n, inner, symbolic)}
        if not moved:
            raise ValueError(f"inner={inner!r} fits no parameter of model that requires a gradient")
        if len({(p.dtype, p.device) for p in moved.values()}) > 1:
            raise ValueError("the parameters of the inner loop must have one dtype and one device")
        self._names = list(moved)
        every = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
        self._tied = len(set(every)) < len(every)
        self._shapes = [p.shape for p in moved.values()]
        self._counts = [p.numel() for p in moved.values()]
        self.inner_lr: float | None = None
        self.step_sizes: nn.Module | nn.Parameter | None = None
        if isinstance(inner_lr, SymbolicStepSize):
            if not hasattr(model, "encode_symbols"):
                raise TypeError("SymbolicStepSize needs a model with encode_symbols(tokens)")
            self.step_sizes = inner_lr
        elif inner_lr == PER_PARAMETER:
            like = next(iter(moved.values())).detach()
            self.step_sizes = nn.Parameter(like.new_full((sum(self._counts),), start_lr))
        elif isinstance(inner_lr, float | int):
            check_number("inner_lr", inner_lr)
            self.inner_lr = float(inner_lr)
        else:
            raise TypeError(
                f"inner_lr must be a number, {PER_PARAMETER!r} or a SymbolicStepSize, "
                f"got {inner_lr!r}"
            )
        known = set(map(id, model.parameters()))
        sizes = [p for p in self.parameters() if id(p) not in known]
        groups = [{"params": list(trained.values()), "weight_decay": weight_decay}]
        groups += [{"params": sizes, "weight_decay": 0.0}] if sizes else []
        # One kernel for all parameters, where there is one for their device.
        fused = all(p.device.type in ("cpu", "cuda") for p in trained.values())
        self.optimizer = torch.optim.AdamW(groups, lr=outer_lr, eps=ADAM_EPS, fused=fused)

    def outer_step(self, tasks: Sequence[Task]) -> float:
        """One step of AdamW on the query loss after adapting to each support.

        Args:
            tasks: Pairs (support, query), each OperatorData (normalised here) or
                ``(inputs, target)``. Tasks of equal sizes run at once, others group by group.

        Returns:
            Query loss, mean over tasks.

        Raises:
            TypeError, ValueError: no tasks, empty support or query, data the model refuses.
            FloatingPointError: a query loss is not finite; names the task.
        """
        value = self.gradients(tasks)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, self.clip, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return value

    def gradients(self, tasks: Sequence[Task]) -> float:
        """Put the outer gradient, mean over tasks, into ``.grad``; arguments as :meth:`outer_step`.

        Raises:
            TypeError, ValueError, FloatingPointError: as :meth:`outer_step`.
        """
        device = next(self.model.parameters()).device
        self.optimizer.zero_grad()
        total = 0.0
        for group in stacked(self.model, tasks, device):
            with _differentiable_attention():
                losses = self._query_losses(group)
            if not bool(losses.isfinite().all()):
                worst = int((~losses.isfinite()).nonzero()[0])
                raise FloatingPointError(
                    f"the query loss of task {group.places[worst]} is {losses[worst].item()} after "
                    f"{self.inner_steps} inner steps; smaller step sizes may help"
                )
            share = losses.sum() / len(tasks)
            share.backward()
            total += share.item()
        return total

    def adapt(self, support: Data, steps: int | None = None) -> nn.Module:
        """A copy of the model after ``steps`` inner steps (``inner_steps`` if None) on support.

        Raises:
            TypeError, ValueError: steps below 1, empty support, data the model refuses.
        """
        steps = self.inner_steps if steps is None else steps
        check_count("steps", steps)
        device = next(self.model.parameters()).device
        part = examples(self.model, support, "support")
        part = Part(tuple(x[None].to(device) for x in part.inputs), part.target[None].to(device))
        with _differentiable_attention():
            moved = self._adapted(part, steps, first_order=True)
        model = copy.deepcopy(self.model)
        with torch.no_grad():
            for name, value in zip(self._names, self._shaped(moved), strict=True):
                model.get_parameter(name).copy_(value[0])
        model.zero_grad()
        return model

    def _query_losses(self, group: Group) -> Tensor:
        moved = self._adapted(group.support, self.inner_steps, first_order=self.first_order)
        return self._losses(moved, group.query)

    def _losses(self, weights: Float[Tensor, "tasks P"], part: Part) -> Float[Tensor, " tasks"]:
        """Loss of every task, each with its own weights."""
        return self._shaped_losses(self._shaped(weights), part)

    def _shaped_losses(self, weights: list[Tensor], part: Part) -> Float[Tensor, " tasks"]:
        """The same from one tensor ``[tasks, …]`` for each parameter."""

        def one(moved: list[Tensor], inputs: tuple[Tensor, ...], target: Tensor) -> Tensor:
            named = dict(zip(self._names, moved, strict=True))
            found = functional_call(self.model, named, inputs, tie_weights=self._tied)
            return self.loss(found, target)

        return vmap(one, randomness="different")(weights, part.inputs, part.target)

    def _shaped(self, weights: Float[Tensor, "tasks P"]) -> list[Tensor]:
        """Rows of all weights as one tensor ``[tasks, …]`` for each parameter."""
        parts = weights.split(self._counts, 1)
        return [
            x.unflatten(1, n) if n else x[:, 0] for x, n in zip(parts, self._shapes, strict=True)
        ]

    def _adapted(self, part: Part, steps: int, *, first_order: bool) -> Float[Tensor, "tasks P"]:
        """All weights after the inner loop, as a function of θ and of the step sizes."""
        named = dict(self.model.named_parameters())
        theta = torch.cat([named[n].flatten() for n in self._names])
        start = theta.expand(len(part.target), -1)
        size = self._size(part)
        if not first_order:
            moved = start
            for _ in range(steps):
                # Tasks do not touch one another: the gradient of the sum holds that of each.
                loss = self._losses(moved, part).sum()
                (gradient,) = torch.autograd.grad(loss, moved, create_graph=True)
                moved = self._step(moved, size, *self._direction(gradient))
            return moved
        # Without second derivatives θ′ = θ + α Σ directions: the loop itself needs no graph.
        fixed = size if isinstance(size, float) else size.detach()
        moved, directions, noises = self._walk(start.detach(), fixed, part, steps)
        if isinstance(size, float):
            return start + (moved - start.detach())
        return self._step(start, size, directions, noises)

    def _walk(
        self, start: Float[Tensor, "tasks P"], size: float | Tensor, part: Part, steps: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The inner loop in place: weights at its end, and sums of directions and noises.

        The sum of directions stays empty for a number as step size, which does not need it.
        """
        plain = self.clamp is None and not self.langevin
        step = -size if isinstance(size, float) and plain else None
        moved, directions, noises = start.clone(), torch.zeros_like(start), None
        leaves = [x.detach() for x in self._shaped(moved)]  # views: what moves, moves them too
        for _ in range(steps):
            for leaf in leaves:
                leaf.requires_grad_()
            with torch.enable_grad():
                loss = self._shaped_losses(leaves, part).sum()
                found = torch.autograd.grad(loss, leaves, allow_unused=True)
            for leaf in leaves:
                leaf.requires_grad_(False)
            used = [(x, g) for x, g in zip(leaves, found, strict=True) if g is not None]
            if step is not None:
                torch._foreach_add_([x for x, _ in used], [g for _, g in used], alpha=step)
                continue
            gradient = self._flat(found, moved)
            direction, noise = self._direction(gradient)
            moved.copy_(self._step(moved, size, direction, noise))
            directions += direction
            noises = noise if noises is None or noise is None else noises + noise
        return moved, directions, noises

    def _flat(
        self, found: Sequence[Tensor | None], like: Float[Tensor, "tasks P"]
    ) -> Float[Tensor, "tasks P"]:
        """Gradients by parameter as rows; 0 where a parameter is not used."""
        rows = [
            like.new_zeros(len(like), n) if g is None else g.reshape(len(like), n)
            for g, n in zip(found, self._counts, strict=True)
        ]
        return torch.cat(rows, 1)

    def _direction(
        self, gradient: Float[Tensor, "tasks P"]
    ) -> tuple[Float[Tensor, "tasks P"], Tensor | None]:
        """Minus the gradient, bounded, and normal noise if there is any."""
        if self.clamp is not None:
            gradient = gradient.clamp(-self.clamp, self.clamp)
        if not self.langevin:
            return -gradient, None
        noise = torch.randn(gradient.shape, generator=self.generator, dtype=gradient.dtype)
        return -gradient, noise.to(gradient.device)

    def _step(
        self,
        weights: Float[Tensor, "tasks P"],
        size: float | Tensor,
        direction: Float[Tensor, "tasks P"],
        noise: Tensor | None,
    ) -> Float[Tensor, "tasks P"]:
        if noise is None:
            return weights + size * direction
        # A learned α may pass 0; noise has no size there, and sqrt no slope.
        positive = max(size, 0.0) if isinstance(size, float) else size.clamp_min(1e-12)
        return weights + size * direction + (2 * self.langevin * positive) ** 0.5 * noise

    def _size(self, part: Part) -> float | Tensor:
        """α: a number, ``[P]`` for Meta-SGD, or ``[tasks, 1]`` for LeMONS."""
        if self.inner_lr is not None:
            return self.inner_lr
        if isinstance(self.step_sizes, nn.Parameter):
            return self.step_sizes
        tokens = part.inputs[3]
        encoding, padding = self.model.encode_symbols(tokens.flatten(0, 1))  # pyrefly: ignore
        size = self.step_sizes(encoding, padding).unflatten(0, tokens.shape[:2])  # pyrefly: ignore
        if len(part.inputs) == 5:  # equations once each: one value for each sample
            size = size.gather(1, part.inputs[4])
        return size.mean(1, keepdim=True)


def _moves(name: str, inner: str | None, symbolic: bool) -> bool:
    if inner is not None:
        return re.search(inner, name) is not None
    return not (symbolic and re.search(SYMBOLS, name))


@contextmanager
def _differentiable_attention() -> Iterator[None]:
    """Fused attention has neither a rule for ``vmap`` nor second derivatives on every device."""
    with sdpa_kernel(SDPBackend.MATH):
        yield
