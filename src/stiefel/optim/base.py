"""What matrix optimizers share: routing, checks, batches of equal shapes, AdamW for the rest."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import chain
from operator import is_not
from typing import Any

import torch
from torch import Tensor

from stiefel.linalg.schulz import Workspace
from stiefel.optim.batch import Batch as Batch
from stiefel.optim.batch import apply_update as apply_update
from stiefel.optim.distributed.geometry import is_dtensor
from stiefel.optim.elementwise import adamw_state, update_elementwise
from stiefel.optim.gradients import bad_gradient, check_kind, nonfinite
from stiefel.optim.gradients import gradient as gradient
from stiefel.optim.groups import dimension_order, matrices, warn_of_empty_groups
from stiefel.optim.settings import (
    NONFINITE,
    check_adamw,
    check_at_least_zero,
    check_choice,
)
from stiefel.optim.shapes import VIEWS, check_matrix
from stiefel.optim.shapes import matrix_sizes as _sizes

_ADAMW = ("adamw_lr", "adamw_betas", "adamw_eps", "adamw_weight_decay")


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
    _sends = "momentum"
    """What one rank needs of the others for a matrix that they hold together: ``"momentum"`` (a
    step ahead, where the group has ``nesterov``), ``"gradient"`` (all state is the owner's), or
    ``"nothing"``: see :meth:`_update_shards`."""
    _needs_whole_sums = False
    """Whether a method that sends nothing sums over whole matrices, rather than over rows."""

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
        self._process_group: Any = None
        self._planned: list[Any] = []
        self._made: Any = None
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

    def distribute(self, process_group: Any = None) -> None:
        """Spread the work on replicated parameters (DDP) over the ranks of a process group.

        Each matrix is then updated by one rank, and its update sent to the others; what the method
        keeps besides momentum is that rank's alone. Without this call every rank updates all, and
        nothing is sent. DTensor parameters are always spread over their mesh. All ranks must call
        it, with equal parameters.

        Args:
            process_group: Default: all ranks.

        Raises:
            RuntimeError: no process group has been started; there is state already.
        """
        import torch.distributed as dist

        if not dist.is_initialized():
            raise RuntimeError("distribute() needs torch.distributed.init_process_group first")
        if self.state:
            raise RuntimeError("distribute() must be called before the first step")
        self._process_group, self._planned = process_group or dist.group.WORLD, []

    def _engine(self) -> Any:
        """What works on parameters that several ranks hold, or None; made anew for new ones.

        Frameworks that shard a model after its optimizer was made put other lists of parameters
        into the groups.
        """
        lists = [group["params"] for group in self.param_groups]
        if len(lists) != len(self._planned) or any(map(is_not, lists, self._planned)):
            self._planned, self._made = lists, None
            shared = any(is_dtensor(p) for params in lists for p in params)
            if shared or self._process_group is not None:
                from stiefel.optim.distributed.engine import Engine

                self._made = Engine(self, self._process_group)
        return self._made

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles.

        Raises:
            TypeError: after :meth:`distribute`: a process group belongs to its process.
        """
        if self._process_group is not None:
            raise TypeError("a distributed optimizer cannot be copied; use its state_dict()")
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore; settings that an older or foreign state lacks come from the defaults."""
        super().__setstate__(state)
        if not hasattr(self, "_space"):
            self._space = Workspace()
            self._process_group, self._planned, self._made = None, [], None
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

    def state_dict(self) -> dict[str, Any]:
        """As :class:`torch.optim.Optimizer`.

        Where parameters are DTensors, or their work is spread, it has what one process would have,
        as DTensors: every rank must call it, as the parts are brought together.
        """
        engine = self._engine()
        if engine is None:
            return super().state_dict()
        with engine.exposed():
            return super().state_dict()

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
        engine = self._engine()
        if engine is not None:
            engine.adopt()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns the loss if ``closure`` computes it.

        Raises:
            RuntimeError: a sparse or complex gradient. Nothing has changed then.
            FloatingPointError: NaN or Inf in a gradient and ``nonfinite="raise"``. Nothing has
                changed then.

        Where parameters are DTensors, what one rank raises the others raise as RuntimeError with
        that rank's number and message, in the same step if the method sends anything at all. Such
        steps cannot be compiled by ``torch.compile``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [
            (group, [p for p in group["params"] if p.grad is not None and p.numel()])
            for group in self.param_groups
        ]
        engine = self._engine()
        if engine is not None:
            engine.step(work)
            return loss
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

    # What a method says of itself where several ranks hold a parameter

    def _flops(self, group: dict[str, Any], rows: int, cols: int) -> float:
        """Floating-point operations of one update of a matrix, to balance the ranks by."""
        return 10.0 * rows * cols

    def _team(self, group: dict[str, Any], parameter: Tensor, index: int) -> Hashable:
        """What a parameter's ``index``-th matrix must be updated together with; None: nothing."""
        return None

    def _stand_in(
        self,
        worker: MatrixOptimizer,
        group: dict[str, Any],
        matrices: Sequence[tuple[Tensor, int, Tensor]],
    ) -> None:
        """Tell ``worker`` what this optimizer knows of (parameter, index of matrix, stand-in)."""

    def _update_shards(
        self,
        group: dict[str, Any],
        shards: Sequence[Any],
        total: Callable[[list[Tensor]], list[Tensor]],
    ) -> None:
        """Update what this rank holds; for methods that send nothing.

        Args:
            group: The parameter group.
            shards: One :class:`stiefel.optim.distributed.shards.Shard` per matrix, the same
                matrices on every rank.
            total: Sums tensors, of equal shapes on every rank, over the ranks.
        """
        raise TypeError(f"{type(self).__name__} has no rule for shards")

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
        """The elementwise rule."""
        grads = [gradient(p) for p in params]
        update_elementwise(group, params, grads, *adamw_state(self.state, params))

    def _check_kinds(self, work: list[tuple[dict[str, Any], list[Tensor]]]) -> None:
        """Refuse gradients that no rule can use."""
        for group, params in work:
            for parameter in params:
                grad = gradient(parameter)
                if grad.layout != torch.strided or grad.is_complex():
                    check_kind(type(self).__name__, self._name(group, parameter), grad)

    def _check_gradients(self, work: list[tuple[dict[str, Any], list[Tensor]]]) -> None:
        """Refuse, before anything is changed, what no rule can use; drop what is to be skipped."""
        self._check_kinds(work)
        for group, params in work:
            if not params or group["nonfinite"] == "propagate":
                continue
            bad = nonfinite(params, [gradient(p) for p in params])
            for parameter in bad:
                if group["nonfinite"] == "raise":
                    raise FloatingPointError(bad_gradient(self._name(group, parameter)))
                message = f"NaN or Inf in the gradient of {self._name(group, parameter)}"
                warnings.warn(f"{message}: skipped", RuntimeWarning, stacklevel=4)
            if bad:
                skipped = {id(p) for p in bad}
                params[:] = [p for p in params if id(p) not in skipped]

    def _check_matrices(self, group: dict[str, Any]) -> None:
        """Refuse parameters that are no matrices."""
        check_choice(group, "view", VIEWS)
        for parameter in group["params"]:
            check_matrix(group, parameter, self._name(group, parameter))

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
