"""What matrix optimizers share: routing, checks, batches of equal shapes, AdamW for the rest."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from stiefel.linalg.schulz import Workspace
from stiefel.optim.groups import block_sizes, dimension_order, matrices, warn_of_empty_groups
from stiefel.optim.settings import (
    NONFINITE,
    check_adamw,
    check_at_least_zero,
    check_choice,
)

_LOW_PRECISION = (torch.float16, torch.bfloat16)
_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
_ADAMW = ("adamw_lr", "adamw_betas", "adamw_eps", "adamw_weight_decay")


@dataclass
class Batch:
    """Matrices of one shape, dtype and device, in step with one another."""

    params: list[Tensor]
    """Views (R, C) into parameters."""
    grads: list[Tensor]
    momenta: list[Tensor]
    """Views (R, C); :meth:`advance` brings them up to date."""
    states: list[dict[str, Tensor]]
    """Further state, each tensor one that belongs to this matrix alone."""
    variant: Hashable = None
    """What :meth:`MatrixOptimizer._variant` says of all of them."""

    def __getitem__(self, part: slice) -> Batch:
        return Batch(
            self.params[part],
            self.grads[part],
            self.momenta[part],
            self.states[part],
            self.variant,
        )

    def __len__(self) -> int:
        return len(self.params)

    def advance(self, momentum: float) -> None:
        """M ← μ M + (1 − μ) G. Left to the update, which then finds both in the cache."""
        torch._foreach_lerp_(self.momenta, self.grads, 1 - momentum)

    @property
    def shape(self) -> tuple[int, int]:
        """(R, C), rows being output neurons."""
        return self.params[0].shape[0], self.params[0].shape[1]


class MatrixOptimizer(torch.optim.Optimizer):
    """Base of optimizers that update hidden weight matrices as matrices.

    A parameter group's ``rule`` decides: ``"matrix"`` (the default) applies the method,
    ``"elementwise"`` applies AdamW with the ``adamw_…`` settings. :func:`split_parameters` makes
    the groups of a model. Groups of the matrix rule may have ``view`` (``"flatten"``, ``"batch"``,
    ``"transpose"``) and ``blocks`` (rows split into matrices of their own).

    Subclasses implement :meth:`_update` and, if they keep more than momentum, :meth:`_extra_state`.
    """

    _float32_state: tuple[str, ...] = ()
    """State that stays in float32 whatever the parameter's dtype, also through load_state_dict."""
    _exact_state: tuple[str, ...] = ()
    """State that keeps its own dtype through load_state_dict: indices, counts, codes."""
    _first_state = "momentum_buffer"
    """What the state of every matrix parameter has once it was updated."""
    _has_momentum = True
    """Whether that is a momentum of the parameter's shape, else one of :meth:`_extra_state`."""

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        maximize: bool = False,
    ) -> None:
        """Validate and route ``params``; ``defaults`` are those of the matrix rule and of AdamW."""
        if maximize:
            raise ValueError(
                f"{type(self).__name__} only minimizes: maximize must be False; negate the loss"
            )
        self._space = Workspace()
        params = list(params) if not isinstance(params, Tensor) else params
        explicit = any(isinstance(g, dict) and "rule" in g for g in params)
        super().__init__(params, {"rule": "matrix", "view": "flatten", "blocks": None, **defaults})
        warn_of_empty_groups(self.param_groups, explicit)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; settings it lacks come from the constructor.

        Raises:
            ValueError: an unknown rule or view, a setting out of range, a parameter that is no
                matrix in a matrix group (named). Nothing is added then.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
        group = dict(param_group)
        if group.get("maximize"):
            raise ValueError("maximize must be False; negate the loss")
        if isinstance(group["params"], Tensor):
            group["params"] = [group["params"]]
        elif isinstance(group["params"], Iterable) and not isinstance(group["params"], set):
            group["params"] = list(group["params"])
        rule = group.get("rule", self.defaults["rule"])
        if rule == "elementwise":
            for key in ("lr", "betas", "eps", "weight_decay"):
                group.setdefault(key, self.defaults[f"adamw_{key}"])
        elif rule != "matrix":
            raise ValueError(f"rule must be 'matrix' or 'elementwise', got {rule!r}")
        self._settle_names(group)
        super().add_param_group(group)
        group = self.param_groups[-1]
        for key in _ADAMW:  # settings of the constructor, not of this group
            group.pop(key, None)
        try:
            if rule == "matrix":
                self._check_group(group)
                self._check_matrices(group)
            else:
                check_adamw(group)
                check_choice(group, "nonfinite", NONFINITE)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore; settings that an older or foreign state lacks come from the defaults."""
        super().__setstate__(state)
        if not hasattr(self, "_space"):
            self._space = Workspace()
        for group in self.param_groups:
            for key, value in self.defaults.items():
                if key not in (*_ADAMW, "differentiable"):  # torch adds that one itself
                    group.setdefault(key, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As :class:`torch.optim.Optimizer`; statistics kept in float32 are not rounded.

        Settings that ``state_dict`` lacks, being older or of another optimizer, stay as they are
        in this one; further state that the method keeps starts at zero.

        Raises:
            ValueError: groups of other numbers or sizes; a group that maximizes.
        """
        loaded: list[dict[str, Any]] = []

        def complete(_: Any, saved: dict[str, Any]) -> dict[str, Any]:
            groups = list(saved["param_groups"])
            if any(group.get("maximize") for group in groups):
                raise ValueError("state_dict has a group with maximize=True; negate the loss")
            for i, own in enumerate(self.param_groups[: len(groups)]):
                kept = {k: v for k, v in own.items() if k not in ("params", "param_names")}
                groups[i] = {**kept, **groups[i]}
            loaded.append({**saved, "param_groups": groups})
            return loaded[-1]

        # Between the user's own hooks: they see, and may change, what is really loaded.
        with (
            self.register_load_state_dict_pre_hook(complete),
            self.register_load_state_dict_post_hook(
                lambda _: self._restore(loaded[-1]), prepend=True
            ),
        ):
            super().load_state_dict(state_dict)

    def _restore(self, saved: dict[str, Any]) -> None:
        """Take float32 state unrounded, and make state that ``saved`` does not have."""
        indices = iter(chain.from_iterable(g["params"] for g in saved["param_groups"]))
        for group in self.param_groups:
            for parameter in group["params"]:
                values = saved["state"].get(next(indices), {})
                wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
                for key in self._float32_state:
                    if key in values:
                        value = values[key].detach().to(parameter.device, wide, copy=True)
                        self.state[parameter][key] = value
                for key in self._exact_state:
                    if key in values:
                        value = values[key].detach().to(parameter.device, copy=True)
                        self.state[parameter][key] = value
                if group["rule"] != "matrix" or not values:
                    continue
                if self._first_state in values:
                    extra = self._extra_state(group, _sizes(group, parameter), parameter)
                    self.state[parameter] = {**extra, **self.state[parameter]}
                else:
                    del self.state[parameter]
                    warnings.warn(
                        f"the state of {self._name(group, parameter)} has no "
                        f"{self._first_state!r}, so it is of another method: it starts anew",
                        UserWarning,
                        stacklevel=2,
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns the loss if ``closure`` computes it.

        Raises:
            RuntimeError: a sparse or complex gradient. Nothing has changed then.
            FloatingPointError: NaN or Inf in a gradient and ``nonfinite="raise"``. Nothing has
                changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [
            (group, [p for p in group["params"] if p.grad is not None and p.numel()])
            for group in self.param_groups
        ]
        self._check_gradients(work)
        for group, params in work:
            if not params:
                continue
            if group["rule"] == "elementwise":
                self._adamw(group, params)
            else:
                self._update_group(group, params)
        return loss

    # What a method says of itself

    def _update_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Apply the method to parameters of a matrix group, all of which have gradients."""
        for batch in self._batches(group, params):
            self._update(group, batch)

    def _update(self, group: dict[str, Any], batch: Batch) -> None:
        """Advance the momenta of matrices of one shape and apply the method to them."""
        raise TypeError(f"{type(self).__name__} has no update rule; use one of its subclasses")

    def _extra_state(
        self, group: dict[str, Any], sizes: Sequence[tuple[int, int]], parameter: Tensor
    ) -> dict[str, Tensor]:
        """State besides momentum for a parameter of matrices of these sizes: flat tensors."""
        return {}

    def _extra_views(
        self, group: dict[str, Any], sizes: Sequence[tuple[int, int]], parameter: Tensor
    ) -> list[dict[str, Tensor]]:
        """The part of the extra state that belongs to each matrix, as views."""
        return [{} for _ in sizes]

    def _variant(self, group: dict[str, Any], parameter: Tensor, index: int) -> Hashable:
        """What keeps a parameter's ``index``-th matrix apart from others of its shape, if any."""
        return None

    def _momentum(self, group: dict[str, Any]) -> float:
        return group["momentum"]

    def _check_group(self, group: dict[str, Any]) -> None:
        """Refuse settings out of range."""
        check_at_least_zero(group, "lr", "weight_decay")
        check_choice(group, "nonfinite", NONFINITE)

    # The common machinery

    def _batches(self, group: dict[str, Any], params: list[Tensor]) -> list[Batch]:
        """Gather the matrices of equal shape, making the state of new parameters."""
        first, view, found = self._first_state, group["view"], {}
        for parameter in params:
            state, sizes = self.state[parameter], _sizes(group, parameter)
            if first not in state:
                if self._has_momentum:
                    state[first] = torch.zeros_like(parameter)
                for key, value in self._extra_state(group, sizes, parameter).items():
                    state.setdefault(key, value)
            elif self._has_momentum and state[first].stride() != parameter.stride():
                state[first] = torch.empty_like(parameter).copy_(state[first])  # another layout
            rows = tuple(r for r, _ in sizes)
            order = dimension_order(parameter)
            p, g = (matrices(t, view, rows, order) for t in (parameter, gradient(parameter)))
            m = matrices(state[first], view, rows, order) if self._has_momentum else []
            extra = self._extra_views(group, sizes, parameter)
            for i in range(len(sizes)):
                variant = self._variant(group, parameter, i)
                key = (*p[i].shape, p[i].dtype, p[i].device, variant)
                batch = found.setdefault(key, Batch([], [], [], [], variant))
                batch.params.append(p[i])
                batch.grads.append(g[i])
                batch.momenta += m[i : i + 1]
                batch.states.append(extra[i])
        return list(found.values())

    def _adamw(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """The elementwise rule: torch's own fused or foreach AdamW."""
        fused = all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in params)
        averages, squares, steps = [], [], []
        for parameter in params:
            state = self.state[parameter]
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            if fused:  # the fused kernels want the count beside the parameter
                state["step"] = state["step"].to(parameter.device)
            averages.append(state["exp_avg"])
            squares.append(state["exp_avg_sq"])
            steps.append(state["step"])
        beta1, beta2 = group["betas"]
        adamw(
            params,
            [gradient(p) for p in params],
            averages,
            squares,
            [],
            steps,
            fused=fused,
            foreach=not fused,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _check_gradients(self, work: list[tuple[dict[str, Any], list[Tensor]]]) -> None:
        """Refuse, before anything is changed, what no rule can use; drop what is to be skipped."""
        name = type(self).__name__
        for group, params in work:
            for parameter in params:
                grad = gradient(parameter)
                if grad.layout != torch.strided:
                    raise RuntimeError(
                        f"{name} does not support sparse gradients, got one of layout "
                        f"{grad.layout} for {self._name(group, parameter)}"
                    )
                if grad.is_complex():
                    raise RuntimeError(
                        f"{name} does not support complex gradients, got one of dtype "
                        f"{grad.dtype} for {self._name(group, parameter)}"
                    )
        for group, params in work:
            if not params or group["nonfinite"] == "propagate" or _all_finite(params):
                continue
            bad = [p for p in params if not bool(torch.isfinite(gradient(p)).all())]
            for parameter in bad:
                message = f"NaN or Inf in the gradient of {self._name(group, parameter)}"
                if group["nonfinite"] == "raise":
                    raise FloatingPointError(
                        f"{message}; nothing was updated. nonfinite='skip' leaves such parameters "
                        "as they are for this step"
                    )
                warnings.warn(f"{message}: skipped", RuntimeWarning, stacklevel=4)
            skipped = {id(p) for p in bad}
            params[:] = [p for p in params if id(p) not in skipped]

    def _check_matrices(self, group: dict[str, Any]) -> None:
        """Refuse parameters that are no matrices."""
        check_choice(group, "view", ("flatten", "batch", "transpose"))
        needed = {"flatten": 2, "batch": 3, "transpose": 2}[group["view"]]
        for parameter in group["params"]:
            name, shape = self._name(group, parameter), tuple(parameter.shape)
            if parameter.is_complex() or not parameter.is_floating_point():
                raise ValueError(f"{name} must be real floating point, got {parameter.dtype}")
            if parameter.ndim < needed or (parameter.ndim > needed and group["view"] != "flatten"):
                raise ValueError(
                    f"{name} has shape {shape}, which is no matrix (view={group['view']!r}). Put "
                    "it in a group with rule='elementwise'; split_parameters(model) makes such "
                    "groups"
                )
            if group["view"] == "flatten" and not _flattens(parameter):
                raise ValueError(
                    f"{name} has strides {parameter.stride()} for shape {shape}, which cannot be "
                    "seen as a matrix without a copy; make it contiguous first"
                )
            if group["view"] != "batch":
                block_sizes(name, shape[-1 if group["view"] == "transpose" else 0], group["blocks"])

    def _settle_names(self, group: dict[str, Any]) -> None:
        """Let empty groups stand beside groups with names and beside groups without."""
        named = any(isinstance(p, tuple) for p in group["params"])
        if named:
            for other in self.param_groups:
                if not other["params"]:
                    other.setdefault("param_names", [])
        elif not len(group["params"]) and any("param_names" in g for g in self.param_groups):
            group.setdefault("param_names", [])

    def _name(self, group: dict[str, Any], parameter: Tensor) -> str:
        index = next(i for i, p in enumerate(group["params"]) if p is parameter)
        names = group.get("param_names")
        if names:
            return f"parameter {names[index]!r}"
        number = next((i for i, g in enumerate(self.param_groups) if g is group), 0)
        return f"parameter {index} of group {number}"


def gradient(parameter: Tensor) -> Tensor:
    """The gradient of a parameter that has one."""
    assert parameter.grad is not None  # noqa: S101 - only for the type checker
    return parameter.grad


def apply_update(
    params: list[Tensor], direction: Tensor, factor: Tensor | list[float] | float, decay: float
) -> None:
    """p ← decay·p − factor ∘ direction for each p, with one rounding for low-precision parameters.

    Args:
        params: k matrices (R, C).
        direction: (k, R, C), of any floating dtype.
        factor: A number, one number per matrix, or a tensor that broadcasts against ``direction``,
            one entry per matrix.
        decay: 1 − lr·weight_decay.
    """
    factors = factor if isinstance(factor, Tensor | list) else [factor] * len(params)
    for i, parameter in enumerate(params):  # one after the other: each stays in the cache
        target = parameter.float() if parameter.dtype in _LOW_PRECISION else parameter
        if decay != 1.0:
            target.mul_(decay)
        own = factors[i]
        if isinstance(own, Tensor):
            target.addcmul_(own, direction[i], value=-1)
        else:
            target.add_(direction[i], alpha=-own)
        if target is not parameter:
            parameter.copy_(target)


def _sizes(group: dict[str, Any], parameter: Tensor) -> list[tuple[int, int]]:
    """(R, C) of every matrix that the parameter holds."""
    if group["view"] == "batch":
        count, rows, cols = parameter.shape
        return [(rows, cols)] * count
    if group["view"] == "transpose":
        cols, rows = parameter.shape
    else:
        rows = parameter.shape[0]
        cols = parameter.numel() // rows
    return [(r, cols) for r in block_sizes("parameter", rows, group["blocks"])]


def _flattens(parameter: Tensor) -> bool:
    """Whether (out, rest) is a view: an update of a copy would be lost."""
    if parameter.ndim == 2 or not parameter.numel():
        return True
    rows = parameter.detach().permute(dimension_order(parameter))
    return rows.flatten(1).data_ptr() == rows.data_ptr()


def _all_finite(params: list[Tensor]) -> bool:
    """Whether all gradients are finite, by one reduction and one look at the result."""
    norms = torch._foreach_norm([gradient(p) for p in params])
    device = norms[0].device
    total = torch.stack([n.to(device, torch.float32) for n in norms]).sum()
    # A sum of squares may overflow without any Inf: the caller then looks at each gradient.
    return math.isfinite(float(total))
