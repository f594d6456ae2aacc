"""A tangent kernel's rows, block by block, by the method that suits the model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stiefel.theory.ctrnn import CTRNN
from stiefel.theory.gradient_factors import Factors, recurrent_factors, upper_rows
from stiefel.theory.layer_factors import LayersError, canonical_names, layer_factors

METHODS = ("auto", "rnn", "layers", "jvp", "jacrev")
Readout = Callable[[Tensor], Tensor] | str | None
# Names of a CTRNN's parameters, as its factors call them.
_RECURRENT = {"i2h.weight": "w_in", "h2h.weight": "w", "h2o.weight": "w_out"}


@dataclass(frozen=True)
class KernelRows:
    """A kernel by its rows: ``block(a, b)`` has those of samples a … b − 1, columns from a on."""

    samples: int
    outputs: int
    block: Callable[[int, int], Tensor]
    method: str


def cosine(inner: float, first: float, second: float, what: str) -> float:
    """inner / √(first · second) within [−1, 1]; NaN with a warning where that is 0/0."""
    if not all(map(math.isfinite, (inner, first, second))):
        raise FloatingPointError(f"the {what} is not finite")
    if first <= 0 or second <= 0:
        warnings.warn(
            f"the {what} is zero before or after (all units dead?): its alignment is undefined",
            RuntimeWarning,
            stacklevel=3,
        )
        return math.nan
    return max(-1.0, min(1.0, inner / math.sqrt(first) / math.sqrt(second)))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; every submodule's own mode comes back.

    Attention's fused inference path has no derivative and is off in the meantime.
    """
    modes = [(module, module.training) for module in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes:
            module.training = mode


def kernel_rows(
    model: nn.Module,
    state: Mapping[str, Tensor],
    x: Tensor,
    params: Sequence[str] | None,
    method: str,
    readout: Readout,
) -> KernelRows:
    """The kernel's rows by the method asked for or the first that applies."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if x.ndim < 1 or len(x) < 1:
        raise ValueError(f"x must have at least one sample, got shape {tuple(x.shape)}")
    names, pick = parameter_names(model, params), output_picker(model, readout, len(x))
    named = readout is None or isinstance(readout, str)
    recurrent = isinstance(model, CTRNN) and named
    if method == "rnn" and not recurrent:
        raise ValueError(
            'method "rnn" needs a CTRNN and readout "last" or "all", got '
            f'{type(model).__name__} and {readout!r}; use method="layers"'
        )
    if recurrent and method in ("auto", "rnn"):
        w_in, w, w_out = (state[name] for name in _RECURRENT)
        factors = recurrent_factors(
            w_in,
            w,
            w_out,
            x,
            float(model.alpha),  # pyrefly: ignore
            wanted=[_RECURRENT[name] for name in names],
            every_step=readout == "all",
        )
        return _factor_rows(factors, "rnn")
    if method in ("auto", "layers"):
        try:
            return _factor_rows(layer_factors(model, state, x, names, pick), "layers")
        except LayersError:
            if method == "layers":
                raise
    if method == "jacrev":
        return _jacobian_rows(model, state, x, names, pick)
    product = Product(model, state, x, names, pick)
    return KernelRows(product.shape[0], product.shape[1], product.rows, "jvp")


def _factor_rows(factors: list[Factors], method: str) -> KernelRows:
    samples, outputs = factors[0].deltas.shape[:2]
    for f in factors:
        if not bool(f.deltas.isfinite().all()) or not bool(f.features.isfinite().all()):
            raise FloatingPointError("activations or their gradients are not finite")
    return KernelRows(samples, outputs, lambda a, b: upper_rows(factors, a, b), method)


class Product:
    """v → J (Jᵀ v) at one set of parameters."""

    def __init__(
        self,
        model: nn.Module,
        state: Mapping[str, Tensor],
        x: Tensor,
        names: Sequence[str],
        pick: Callable[[Tensor], Tensor],
    ) -> None:
        self._at = {name: state[name] for name in names}
        self._function = _function(model, state, x, pick)
        self.outputs, self._pullback = torch.func.vjp(self._function, self._at)  # pyrefly: ignore
        self.shape = self.outputs.shape
        if not bool(self.outputs.isfinite().all()):
            raise FloatingPointError("the model's outputs are not finite")

    def __call__(self, v: Tensor) -> Tensor:
        """J (Jᵀ v), of the outputs' shape."""
        (gradient,) = self._pullback(v)
        with warnings.catch_warnings():
            # torch's own forward-mode rules still go through torch.jit.script when first used.
            warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
            return torch.func.jvp(self._function, (self._at,), (gradient,))[1]

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of the kernel, a product each, as :attr:`KernelRows.block` has them."""
        samples, k = self.shape
        result = self.outputs.new_empty(stop - start, k, samples - start, k)
        for b in range(start, stop):
            for unit in range(k):
                v = torch.zeros_like(self.outputs)
                v[b, unit] = 1
                result[b - start, unit] = self(v)[start:]
        return result


def _jacobian_rows(
    model: nn.Module,
    state: Mapping[str, Tensor],
    x: Tensor,
    names: Sequence[str],
    pick: Callable[[Tensor], Tensor],
) -> KernelRows:
    """All gradients at once: the slow and obvious way."""
    function = _function(model, state, x, pick)
    parts = torch.func.jacrev(function)({name: state[name] for name in names})
    jacobian = torch.cat([part.flatten(2) for part in parts.values()], dim=-1)
    if not bool(jacobian.isfinite().all()):
        raise FloatingPointError("the gradients are not finite")
    samples, k = jacobian.shape[:2]

    def block(start: int, stop: int) -> Tensor:
        return torch.einsum("bkp,clp->bkcl", jacobian[start:stop], jacobian[start:])

    return KernelRows(samples, k, block, "jacrev")


def _function(
    model: nn.Module, state: Mapping[str, Tensor], x: Tensor, pick: Callable[[Tensor], Tensor]
) -> Callable[[dict[str, Tensor]], Tensor]:
    """Chosen parameters → outputs ``[samples, outputs]``."""

    def function(chosen: dict[str, Tensor]) -> Tensor:
        # Of the attention kernels only the plain one has forward-mode derivatives.
        with sdpa_kernel(SDPBackend.MATH):
            outputs = torch.func.functional_call(model, {**state, **chosen}, (x,))
        return pick(outputs).flatten(1)

    return function


def output_picker(model: nn.Module, readout: Readout, samples: int) -> Callable[[Tensor], Tensor]:
    """The readout as a function that also checks the samples."""
    if readout is None:
        readout = "last" if isinstance(model, CTRNN) else "all"
    if isinstance(readout, str) and readout not in ("last", "all"):
        raise ValueError(f"readout must be 'last', 'all' or a function, got {readout!r}")

    def pick(outputs: Tensor) -> Tensor:
        if readout == "last":
            if outputs.ndim != 3:
                raise ValueError(
                    "readout 'last' needs outputs [samples, steps, outputs], got shape "
                    f"{tuple(outputs.shape)}"
                )
            outputs = outputs[:, -1]
        elif callable(readout):
            outputs = readout(outputs)
        if outputs.ndim < 1 or outputs.shape[0] != samples:
            raise ValueError(
                f"outputs must have the {samples} samples first, got shape {tuple(outputs.shape)}"
            )
        return outputs.unsqueeze(-1) if outputs.ndim == 1 else outputs

    return pick


def parameter_names(model: nn.Module, params: Sequence[str] | None) -> list[str]:
    """First names of the chosen parameters, without repetition."""
    canonical = canonical_names(model)
    if params is None:
        if isinstance(model, CTRNN):
            return ["h2h.weight"]
        params = [name for name, p in model.named_parameters() if p.requires_grad]
    elif isinstance(params, str):
        params = [params]
    for name in params:
        if name not in canonical:
            raise KeyError(f"no parameter {name!r}; there are: {', '.join(canonical) or 'none'}")
    if not params:
        raise ValueError("params must name at least one parameter; the model has none to train")
    return list(dict.fromkeys(canonical[name] for name in params))


def model_state(model: nn.Module, given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Parameters and buffers, detached: the model's own or those of an earlier state."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if given is None:
        return {name: tensor.detach() for name, tensor in own.items()}
    stored = set(model.state_dict())
    state = {}
    for name, tensor in own.items():
        if name not in given:
            if name in stored:
                raise KeyError(f"the earlier state has no {name!r}")
            state[name] = tensor.detach()  # a buffer that state dicts leave out
            continue
        if given[name].shape != tensor.shape:
            raise ValueError(
                f"{name} is {tuple(given[name].shape)} in the earlier state, "
                f"{tuple(tensor.shape)} in the model"
            )
        state[name] = given[name].detach().to(tensor)
    return state
