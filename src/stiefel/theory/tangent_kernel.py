"""Tangent kernels of any module, and their alignment before and after training.

K = J Jᵀ with a row of J for every output of every sample: how the outputs move together when the
parameters take a small step. A network is lazy where K stays as it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stiefel.theory.gradient_factors import row_blocks
from stiefel.theory.kernel_rows import (
    Product,
    Readout,
    cosine,
    evaluating,
    kernel_rows,
    model_state,
    output_picker,
    parameter_names,
)


class AlignmentEstimate(NamedTuple):
    """An alignment from random probes."""

    value: float
    error: float
    """Standard error (jackknife over probes)."""


def tangent_kernel(
    model: nn.Module,
    x: Tensor,
    params: Sequence[str] | None = None,
    method: str = "auto",
    *,
    readout: Readout = None,
) -> Float[Tensor, "rows rows"]:
    """The tangent kernel K = J Jᵀ, rows ordered (sample, output).

    The model is measured in eval mode and left as it was.

    Args:
        model: Any module; its output has samples first.
        x: Its input, ``[samples, ...]``.
        params: Names of the parameters the gradient is taken for. By default ``h2h.weight`` of a
            :class:`CTRNN` (the paper's measure), all that require a gradient otherwise: the two
            give different numbers.
        method: ``"rnn"``: closed form for a CTRNN. ``"layers"``: products of activations and
            backward signals, for parameters of Linear layers in any module. Neither forms a
            gradient. ``"jvp"``: any module, two passes a row. ``"jacrev"``: all gradients at
            once, samples × outputs × parameters numbers; to compare. ``"auto"``: the first that
            applies, never ``"jacrev"``.
        readout: Which outputs: ``"last"`` the last step of ``[samples, steps, outputs]``,
            ``"all"`` everything, or a function of the model's output. By default the last step of
            a CTRNN and everything of other modules.

    Raises:
        KeyError: a name that is not a parameter; the message lists those there are.
        ValueError: another ``method``, or one that does not apply to this model, no sample, or
            outputs without samples first.
        FloatingPointError: non-finite outputs, or activity of a CTRNN, with the step.

    Source: arXiv 2310.08513, tangent kernel alignment.
    """
    with torch.no_grad(), evaluating(model):
        rows = kernel_rows(model, model_state(model), x, params, method, readout)
        k, size = rows.outputs, rows.samples * rows.outputs
        kernel = torch.empty(0)
        for start, stop in row_blocks(rows.samples, k):
            block = rows.block(start, stop).reshape((stop - start) * k, -1)
            if start == 0:
                kernel = block.new_empty(size, size)
            kernel[start * k :, start * k : stop * k] = block.mT
            kernel[start * k : stop * k, start * k :] = block
            own = kernel[start * k : stop * k, start * k : stop * k]
            own.copy_((own + own.mT) / 2)  # to the last bit
        return kernel


def tangent_kernel_alignment(
    model: nn.Module,
    before: Mapping[str, Tensor],
    x: Tensor,
    params: Sequence[str] | None = None,
    method: str = "auto",
    *,
    readout: Readout = None,
) -> float:
    """Cosine of the tangent kernels of the model with its own and with earlier parameters.

    The same as :func:`kernel_alignment` of two :func:`tangent_kernel`, without holding either: a
    block of rows at a time.

    Args:
        model: With the parameters of now.
        before: An earlier ``state_dict()``, its tensors cloned (or read from a checkpoint).
        x, params, method, readout: As for :func:`tangent_kernel`.

    Returns:
        In [0, 1]; 1 is lazy. NaN with a warning where a kernel is zero (all units dead).

    Raises:
        KeyError: ``before`` lacks a parameter or buffer of the model, or ``params`` an unknown.
        ValueError, FloatingPointError: as :func:`tangent_kernel`; a tensor of another shape.
    """
    with torch.no_grad(), evaluating(model):
        now = kernel_rows(model, model_state(model), x, params, method, readout)
        then = kernel_rows(model, model_state(model, before), x, params, now.method, readout)
        sums = [0.0, 0.0, 0.0]
        for start, stop in row_blocks(now.samples, now.outputs):
            new, old = now.block(start, stop), then.block(start, stop)
            own = slice(None, stop - start)
            for i, (a, b) in enumerate(((new, old), (new, new), (old, old))):
                # Columns right of the block stand for those below it too.
                inside = float((a[:, :, own] * b[:, :, own]).sum())
                sums[i] += 2 * float(torch.dot(a.flatten(), b.flatten())) - inside
        return cosine(sums[0], sums[1], sums[2], "tangent kernel")


def estimate_kernel_alignment(
    model: nn.Module,
    before: Mapping[str, Tensor],
    x: Tensor,
    params: Sequence[str] | None = None,
    *,
    readout: Readout = None,
    probes: int = 32,
    generator: torch.Generator | None = None,
) -> AlignmentEstimate:
    """Tangent-kernel alignment of a big net by Jacobian-vector products, with an error bar.

    With random signs v, ⟨K₀, K⟩ = E⟨K₀ v, K v⟩ and ‖K‖² = E‖K v‖², where K v = J (Jᵀ v) is one
    backward and one forward-mode pass: memory of a few passes, whatever the number of parameters,
    outputs and samples.

    Args:
        model, before, x, params, readout: As for :func:`tangent_kernel_alignment`.
        probes: Number of vectors v, at least 2.
        generator: Source of the signs, drawn where it is.

    Returns:
        The ratio of the means, and its standard error by the jackknife. The error falls like
        1 / √probes; the value's bias like 1 / probes.

    Raises:
        ValueError: fewer than 2 probes; KeyError and FloatingPointError as for
            :func:`tangent_kernel_alignment`.

    Source: Hutchinson's estimator of the traces tr(K₀ K), tr(K²).
    """
    if probes < 2:
        raise ValueError(f"probes must be at least 2 for an error bar, got {probes}")
    with torch.no_grad(), evaluating(model):
        names = parameter_names(model, params)
        pick = output_picker(model, readout, len(x))
        products = [
            Product(model, state, x, names, pick)
            for state in (model_state(model), model_state(model, before))
        ]
        sums = torch.empty(probes, 3, dtype=torch.float64)
        for i in range(probes):
            signs = torch.randint(
                2,
                products[0].shape,
                generator=generator,
                device=None if generator is None else generator.device,
            )
            v = (2 * signs - 1).to(products[0].outputs)
            new, old = (product(v).flatten() for product in products)
            sums[i] = torch.stack([new @ old, new @ new, old @ old]).double().cpu()
    total = sums.sum(0)
    value = _ratio(total)
    without = [_ratio(total - row) for row in sums]
    centre = math.fsum(without) / probes
    spread = math.fsum((w - centre) ** 2 for w in without)
    return AlignmentEstimate(value, math.sqrt((probes - 1) / probes * spread))


def _ratio(sums: Tensor) -> float:
    """The cosine that the three sums of products make."""
    inner, new, old = sums.tolist()
    return cosine(inner, new, old, "tangent kernel")
