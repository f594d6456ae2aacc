"""How much did training change a network? Weights, representation, tangent kernel.

Lazy: weights hardly move, alignments stay near 1. Rich: features are learned, alignments fall.
Compare runs at equal loss, not after equally many steps: richer runs are slower.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TypedDict

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from stiefel.linalg._checks import (
    check_finite,
    check_matrix,
    check_pair,
    check_square,
    compute_dtype,
    in_batch,
)
from stiefel.theory.ctrnn import CTRNN, check_activity
from stiefel.theory.kernel_rows import (
    Readout,
    evaluating,
    model_state,
    output_picker,
    parameter_names,
)
from stiefel.theory.tangent_kernel import estimate_kernel_alignment, tangent_kernel_alignment

Hidden = Callable[[nn.Module, Tensor], Tensor]


def kernel_alignment(
    K1: Float[Tensor, "*batch p q"], K2: Float[Tensor, "*batch2 p2 q2"], center: bool = False
) -> Float[Tensor, "*batch"]:
    """⟨K₁, K₂⟩ / (‖K₁‖ ‖K₂‖): cosine of two kernels, 1 if they are proportional.

    Args:
        K1, K2: ``[..., p, p]``.
        center: Subtract row and column means first, as CKA does. The paper does not.

    Returns:
        ``[...]``; NaN with a warning where a kernel is zero. Differentiable.

    Raises:
        ValueError: not square, of two sizes, or not finite. TypeError: of two dtypes.

    Source: arXiv 2310.08513, kernel alignment; with ``center`` Kornblith et al. 2019 (CKA).
    """
    check_pair(K1, "K1", K2, "K2")
    check_square(K1, "K1")
    first, second = (_unit(k, name, center) for k, name in ((K1, "K1"), (K2, "K2")))
    return (first * second).sum((-2, -1)).to(K1.dtype)


def representation_alignment(
    H1: Float[Tensor, "*batch samples n1"],
    H2: Float[Tensor, "*batch2 samples2 n2"],
    center: bool = False,
) -> Float[Tensor, "*batch"]:
    """Alignment of the kernels H₁ H₁ᵀ and H₂ H₂ᵀ of two sets of activities.

    Not changed by scaling or by a rotation of the units; the numbers of units may differ. The
    smaller Gram matrices are formed: samples × samples or units × units.

    Args:
        H1, H2: ``[..., samples, units]``, the same samples in the same order.
        center: Subtract the mean over samples first, which makes it linear CKA.

    Returns:
        ``[...]`` in [0, 1]; NaN with a warning where the activity is zero. Differentiable.

    Raises:
        ValueError: other numbers of samples, or not finite. TypeError: of two dtypes.

    Source: arXiv 2310.08513, representation alignment.
    """
    for h, name in ((H1, "H1"), (H2, "H2")):
        check_matrix(h, name)
        check_finite(h, name)
    if H1.shape[:-1] != H2.shape[:-1]:
        raise ValueError(
            f"H1 and H2 must have the same samples, got shapes {tuple(H1.shape)} and "
            f"{tuple(H2.shape)}"
        )
    if H1.dtype != H2.dtype:
        raise TypeError(f"H1 is {H1.dtype} but H2 is {H2.dtype}")
    if H1.shape[-2] <= max(H1.shape[-1], H2.shape[-1]):
        first, second = (_scaled(h, center) for h in (H1, H2))
        first, second = (_unit(h @ h.mT, "activity", False) for h in (first, second))
        return (first * second).sum((-2, -1)).to(H1.dtype)
    first, second = (_scaled(h, center) for h in (H1, H2))
    inner = (first.mT @ second).square().sum((-2, -1))
    sizes = [torch.linalg.matrix_norm(h.mT @ h) for h in (first, second)]
    _warn_of_zeros(sizes[0] * sizes[1], "activity")
    return (inner / (sizes[0] * sizes[1])).to(H1.dtype)


class LazinessReport(TypedDict):
    """What :meth:`LazinessProbe.compare` gives."""

    dW: float
    """Frobenius norm of the change of the chosen parameters."""
    rel_dW: float
    """The same over their norm at the snapshot; NaN with a warning where that is zero."""
    RA: float
    """Representation alignment, not centred."""
    KA: float
    """Tangent-kernel alignment with respect to the chosen parameters."""
    KA_error: float
    """Standard error of KA where it is estimated; 0 where it is exact."""
    sign: float
    """Share of hidden units × samples with the sign they had; two zeros count as equal."""
    loss: float
    """Of the model now; NaN without outputs."""
    params: tuple[str, ...]
    """The parameters that dW and KA are about."""


class LazinessProbe:
    """Laziness of a training run: take a snapshot, train, compare.

    Every measurement runs in eval mode on the same inputs and leaves the model as it was. The
    snapshot holds a copy of the parameters and buffers.

    Args:
        model: Any module; its output has samples first.
        inputs: Probe inputs, ``[samples, ...]``; a few dozen do.
        outputs: Targets of the probe inputs, for the loss in the report.
        params: Names of parameters that dW and KA are about. By default ``h2h.weight`` of a
            :class:`CTRNN`, as in the paper, and all that require a gradient otherwise.
        hidden: ``hidden(model, inputs)`` gives the activity ``[samples, ...]``. By default that of
            the last step of a CTRNN, and what goes into the Linear layer called last otherwise.
        loss: ``loss(model_output, outputs)``. By default cross-entropy for integer outputs (the
            last dimension of the model's output are the classes, targets of −100 are left out),
            mean square error otherwise.
        method, readout: As for :func:`tangent_kernel`.
        probes: Estimate KA from so many random vectors, for nets too big for an exact kernel.
        generator: Source of these vectors.

    Raises:
        KeyError: a name that is not a parameter; the message lists those there are.
        ValueError: no input, or bad ``method``, ``readout`` or ``probes`` (when measured).

    Source: arXiv 2310.08513, section 3.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        outputs: Tensor | None = None,
        params: Sequence[str] | None = None,
        hidden: Hidden | None = None,
        *,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        method: str = "auto",
        readout: Readout = None,
        probes: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if inputs.ndim < 1 or len(inputs) < 1:
            raise ValueError(f"inputs must have a sample, got shape {tuple(inputs.shape)}")
        if outputs is not None and len(outputs) != len(inputs):
            raise ValueError(f"outputs are {len(outputs)} but inputs {len(inputs)}")
        self.model, self.inputs, self.outputs = model, inputs, outputs
        self.params = tuple(parameter_names(model, params))
        output_picker(model, readout, len(inputs))  # refuses an unknown readout now
        self._hidden, self._loss = hidden, loss or _default_loss
        self._method, self._readout = method, readout
        self._probes, self._generator = probes, generator
        self._before: dict[str, Tensor] | None = None
        self._activity = torch.empty(0)

    def snapshot(self) -> LazinessProbe:
        """Remember the model as it is now; replaces an earlier snapshot. Returns the probe.

        Raises:
            FloatingPointError: the hidden activity is not finite (of a CTRNN: with the step).
        """
        self._activity = self._measure_hidden()
        self._before = {n: t.clone() for n, t in model_state(self.model).items()}
        return self

    def compare(self) -> LazinessReport:
        """Measure the model against the snapshot.

        Raises:
            RuntimeError: there is no snapshot.
            FloatingPointError: activity, outputs or weights are not finite.
        """
        if self._before is None:
            raise RuntimeError("there is nothing to compare with: call snapshot() before training")
        activity = self._measure_hidden()  # first: its error names the step
        before, now = self._before, model_state(self.model)
        moved = [torch.linalg.vector_norm((now[n] - before[n]).double()) for n in self.params]
        sizes = [torch.linalg.vector_norm(before[n].double()) for n in self.params]
        change, size = (math.hypot(*map(float, values)) for values in (moved, sizes))
        if not math.isfinite(change):
            raise FloatingPointError(f"{', '.join(self.params)}: the change is not finite")
        if size == 0:
            warnings.warn("the parameters were zero: no relative change", RuntimeWarning, 2)
        old, new = self._activity.flatten(1), activity.flatten(1)
        alignment, error = self._kernel_alignment(before)
        return {
            "dW": change,
            "rel_dW": change / size if size else math.nan,
            "RA": float(representation_alignment(old, new)),
            "KA": alignment,
            "KA_error": error,
            "sign": sign_similarity(old, new),
            "loss": self._measure_loss(),
            "params": self.params,
        }

    def _kernel_alignment(self, before: dict[str, Tensor]) -> tuple[float, float]:
        arguments = (self.model, before, self.inputs, self.params)
        if self._probes is None:
            value = tangent_kernel_alignment(*arguments, self._method, readout=self._readout)
            return value, 0.0
        return estimate_kernel_alignment(
            *arguments, readout=self._readout, probes=self._probes, generator=self._generator
        )

    def _measure_hidden(self) -> Tensor:
        with torch.no_grad(), evaluating(self.model):
            activity = (self._hidden or _default_hidden)(self.model, self.inputs)
        if activity.ndim < 2 or len(activity) != len(self.inputs):
            raise ValueError(
                f"hidden must give [{len(self.inputs)}, ...], got {tuple(activity.shape)}"
            )
        if activity.ndim == 3:
            check_activity(activity)
        if not bool(activity.isfinite().all()):
            raise FloatingPointError("hidden activity is not finite")
        return activity.clone()

    def _measure_loss(self) -> float:
        if self.outputs is None:
            return math.nan
        with torch.no_grad(), evaluating(self.model):
            loss = float(self._loss(self.model(self.inputs), self.outputs))
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is not finite: {loss}")
        return loss


def sign_similarity(h1: Tensor, h2: Tensor) -> float:
    """Share of entries with equal signs; 0 is a sign of its own, so two dead units agree.

    Raises:
        ValueError: two shapes.

    Source: arXiv 2310.08513 (authors' script).
    """
    if h1.shape != h2.shape:
        raise ValueError(f"h1 and h2 must match, got {tuple(h1.shape)} and {tuple(h2.shape)}")
    return float((h1.sign() == h2.sign()).double().mean())


def _default_loss(prediction: Tensor, target: Tensor) -> Tensor:
    if target.is_floating_point():
        return functional.mse_loss(prediction, target)
    if prediction.ndim == target.ndim + 2:  # steps of outputs, a class a sample: the last step
        prediction = prediction[:, -1]
    return functional.cross_entropy(prediction.flatten(0, -2), target.flatten())


def _default_hidden(model: nn.Module, inputs: Tensor) -> Tensor:
    """Last step of a CTRNN; otherwise the input of the Linear layer that is called last."""
    if isinstance(model, CTRNN):
        return model.hidden(inputs)[:, -1]
    seen: list[Tensor] = []
    handles = [
        module.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise ValueError("the model calls no Linear layer; pass hidden=")
    return seen[-1]


def _scaled(h: Tensor, center: bool) -> Tensor:
    """In working precision, the largest entry 1, so that no fourth power overflows."""
    work = h.to(compute_dtype(h.dtype))
    if center:
        work = work - work.mean(-2, keepdim=True)
    largest = work.detach().abs().amax((-2, -1), keepdim=True)
    return work / torch.where(largest > 0, largest, 1.0)


def _unit(k: Tensor, name: str, center: bool) -> Tensor:
    """The kernel at Frobenius norm 1, NaN if it is zero."""
    check_finite(k, name)
    work = k.to(compute_dtype(k.dtype))
    if center:
        work = work - work.mean(-1, keepdim=True)
        work = work - work.mean(-2, keepdim=True)
    largest = work.detach().abs().amax((-2, -1), keepdim=True)
    work = work / torch.where(largest > 0, largest, 1.0)
    size = torch.linalg.matrix_norm(work, keepdim=True)
    _warn_of_zeros(size[..., 0, 0], name)
    return work / size


def _warn_of_zeros(size: Tensor, name: str) -> None:
    zero = size.detach() == 0
    if bool(zero.any()):
        warnings.warn(
            f"{name} is zero{in_batch(zero)} (all units dead?): its alignment is undefined",
            RuntimeWarning,
            stacklevel=4,
        )
