"""What matrix optimizers share: routing, checks, batches of equal shapes, AdamW for the rest."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from stiefel.linalg.schulz import Workspace
from stiefel.optim.groups import block_sizes, dimension_order, matrices, warn_of_empty_groups

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

    def __getitem__(self, part: slice) -> Batch:
        return Batch(self.params[part], self.grads[part], self.momenta[part], self.states[part])

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
        if isinstance(group["params"], Iterable) and not isinstance(group["params"], Tensor | set):
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
                if key not in _ADAMW:
                    group.setdefault(key, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As :class:`torch.optim.Optimizer`; statistics kept in float32 are not rounded."""
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(g["params"] for g in state_dict["param_groups"])
        params = chain.from_iterable(g["params"] for g in self.param_groups)
        for index, parameter in zip(saved, params, strict=True):
            for key in self._float32_state:
                value = state_dict["state"].get(index, {}).get(key)
                if value is not None:
                    self.state[parameter][key] = value.detach().clone().to(parameter.device)

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
                for batch in self._batches(group, params):
                    self._update(group, batch)
        return loss

    # What a method says of itself

    def _update(self, group: dict[str, Any], batch: Batch) -> None:
        """Advance the momenta of matrices of one shape and apply the method to them."""
        raise TypeError(f"{type(self).__name__} has no update rule; use one of its subclasses")

    def _extra_state(
        self, group: dict[str, Any], sizes: Sequence[tuple[int, int]], parameter: Tensor
    ) -> dict[str, Tensor]:
        """State besides momentum for a parameter of matrices of these sizes: flat tensors."""
        return {}

    def _extra_views(
        self, group: dict[str, Any], sizes: Sequence[tuple[int, int]], state: dict[str, Tensor]
    ) -> list[dict[str, Tensor]]:
        """The part of the extra state that belongs to each matrix, as views."""
        return [{} for _ in sizes]

    def _momentum(self, group: dict[str, Any]) -> float:
        return group["momentum"]

    def _check_group(self, group: dict[str, Any]) -> None:
        """Refuse settings out of range."""
        check_at_least_zero(group, "lr", "weight_decay")
        check_choice(group, "nonfinite", ("raise", "skip", "propagate"))

    # The common machinery

    def _batches(self, group: dict[str, Any], params: list[Tensor]) -> list[Batch]:
        """Gather the matrices of equal shape, making the state of new parameters."""
        momenta = []
        for parameter in params:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
                sizes = _sizes(group, parameter)
                state.update(self._extra_state(group, sizes, parameter))
            elif state["momentum_buffer"].stride() != parameter.stride():  # loaded, other layout
                momentum = torch.empty_like(parameter).copy_(state["momentum_buffer"])
                state["momentum_buffer"] = momentum
            momenta.append(state["momentum_buffer"])
        view, found = group["view"], {}
        for parameter, momentum in zip(params, momenta, strict=True):
            sizes = _sizes(group, parameter)
            rows = tuple(r for r, _ in sizes)
            order = dimension_order(parameter)
            extra = self._extra_views(group, sizes, self.state[parameter])
            triple = (parameter, gradient(parameter), momentum)
            parts = (matrices(t, view, rows, order) for t in triple)
            for p, g, m, e in zip(*parts, extra, strict=True):
                batch = found.setdefault((*p.shape, p.dtype, p.device), Batch([], [], [], []))
                batch.params.append(p)
                batch.grads.append(g)
                batch.momenta.append(m)
                batch.states.append(e)
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


def scale_factor(scale: str | None, rows: int, cols: int) -> float:
    """How a unit orthogonal update of shape (rows, cols) is sized.

    ``"spectral"`` sqrt(max(1, R/C)) (Jordan), ``"rms"`` 0.2·sqrt(max(R, C)) (Moonshot: AdamW's
    learning rate carries over), ``"dion"`` sqrt(R/C), ``None`` 1.
    """
    if scale == "spectral":
        return math.sqrt(max(1.0, rows / cols))
    if scale == "rms":
        return 0.2 * math.sqrt(max(rows, cols))
    return math.sqrt(rows / cols) if scale == "dion" else 1.0


def apply_update(
    params: list[Tensor], direction: Tensor, factor: Tensor | float, decay: float
) -> None:
    """p ← decay·p − factor ∘ direction for each p, with one rounding for low-precision parameters.

    Args:
        params: k matrices (R, C).
        direction: (k, R, C), of any floating dtype.
        factor: A number, or a tensor that broadcasts against ``direction``, one entry per matrix.
        decay: 1 − lr·weight_decay.
    """
    targets = [p.float() for p in params] if params[0].dtype in _LOW_PRECISION else params
    if decay != 1.0:
        torch._foreach_mul_(targets, decay)
    updates = list(direction.unbind(0))
    if isinstance(factor, Tensor):
        for target, row, update in zip(targets, factor.unbind(0), updates, strict=True):
            target.addcmul_(row, update, value=-1)
    else:
        torch._foreach_add_(targets, updates, alpha=-factor)
    if targets is not params:
        for parameter, target in zip(params, targets, strict=True):
            parameter.copy_(target)


def check_at_least_zero(group: dict[str, Any], *keys: str) -> None:
    """Refuse negative and non-finite settings."""
    for key in keys:
        value = float(group[key])
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{key} must be finite and ≥ 0, got {group[key]}")


def check_fraction(group: dict[str, Any], *keys: str) -> None:
    """Refuse decay rates outside [0, 1)."""
    for key in keys:
        values = group[key] if isinstance(group[key], tuple | list) else [group[key]]
        for value in values:
            if not 0 <= float(value) < 1:
                raise ValueError(f"{key} must be in [0, 1), got {group[key]}")


def check_choice(group: dict[str, Any], key: str, choices: tuple[Any, ...]) -> None:
    """Refuse what is not among the choices."""
    if group[key] not in choices:
        raise ValueError(f"{key} must be one of {choices}, got {group[key]!r}")


def check_adamw(group: dict[str, Any]) -> None:
    """Refuse AdamW settings out of range."""
    check_at_least_zero(group, "lr", "eps", "weight_decay")
    if len(group["betas"]) != 2:
        raise ValueError(f"betas must be two numbers, got {group['betas']}")
    check_fraction(group, "betas")


def adamw_defaults(
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> dict[str, Any]:
    """The ``adamw_…`` settings of a constructor, checked."""
    check_adamw({"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
    return {
        "adamw_lr": lr,
        "adamw_betas": tuple(betas),
        "adamw_eps": eps,
        "adamw_weight_decay": weight_decay,
    }


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


def _all_finite(params: list[Tensor]) -> bool:
    """Whether all gradients are finite, by one reduction and one look at the result."""
    norms = torch._foreach_norm([gradient(p) for p in params])
    device = norms[0].device
    total = torch.stack([n.to(device, torch.float32) for n in norms]).sum()
    # A sum of squares may overflow without any Inf: the caller then looks at each gradient.
    return math.isfinite(float(total))
