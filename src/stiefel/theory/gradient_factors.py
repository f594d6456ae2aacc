"""Inner products of weight gradients that are never formed.

The gradient of an output with respect to the weight of a Linear layer is a sum of outer products,
∂o/∂W = Σ_t δ_t f_tᵀ: over the steps of a recurrent network, the positions of a sequence, the calls
of a shared layer. Two such gradients have the inner product Σ_{t,s} ⟨δ_t, δ'_s⟩ ⟨f_t, f'_s⟩, which
needs δ and f only, samples × (m + n) numbers in place of samples × m n.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.theory.ctrnn import check_activity, ctrnn_states

# Temporaries of a block stay below this many numbers where one sample allows it: a few MB, which
# the cache of a core or two holds.
BLOCK = 2**19


@dataclass(frozen=True)
class Factors:
    """∂o[b, k]/∂W = Σ_t deltas[b, k, t] features[b, t]ᵀ for samples b and outputs k."""

    deltas: Float[Tensor, "samples outputs steps m"]
    features: Float[Tensor, "samples steps n"]
    per_step: int | None = None
    """Of causal outputs: how many belong to a step. Output k is read at step k // per_step, and
    its deltas are zero after that."""
    skipped: int = 0
    """Steps left out at the start because their features are zero."""

    def upper_rows(self, start: int, stop: int) -> Float[Tensor, "rows outputs rest outputs"]:
        """Inner products of samples ``start`` … ``stop − 1`` with samples ``start`` and after."""
        if self.deltas.shape[2] == 1 and self.per_step is None:
            return self._single(start, stop)
        count, k, steps, m = self.deltas.shape
        result = self.deltas.new_empty(stop - start, k, count - start, k)
        group = max(1, BLOCK // ((count - start) * k * steps * m))
        for first in range(start, stop, group):
            last, at = min(first + group, stop), first - start
            rows = slice(at, last - start)
            result[rows, :, at:] = self._folded(first, last)
            result[rows, :, :at] = result[:at, :, rows].permute(2, 3, 0, 1)  # by symmetry
        return result

    def _single(self, start: int, stop: int) -> Tensor:
        """One step: (δ δᵀ) ∘ (f fᵀ)."""
        deltas, features = self.deltas[:, :, 0], self.features[:, 0]
        rest, k = deltas.shape[0] - start, deltas.shape[1]
        product = deltas[start:stop].flatten(0, 1) @ deltas[start:].flatten(0, 1).mT
        product = product.view(stop - start, k, rest, k)
        return product.mul_((features[start:stop] @ features[start:].mT)[:, None, :, None])

    def _folded(self, first: int, last: int) -> Tensor:
        """Samples ``first`` … ``last − 1`` against ``first`` and after, by summing over their own
        steps t first, x_s = Σ_t ⟨f_t, f'_s⟩ δ_t, and then Σ_s ⟨x_s, δ'_s⟩: a factor
        (steps · outputs) / (steps + outputs) less work than over all pairs (t, s)."""
        count, k, steps, m = self.deltas.shape
        own, own_features = self.deltas[first:last], self.features[first:last]
        result = self.deltas.new_empty(last - first, k, count - first, k)
        size = max(1, BLOCK // ((last - first) * k * steps * m))
        for start in range(first, count, size):
            others = slice(start, min(start + size, count))
            features = self.features[others].flatten(0, 1)
            if steps <= features.shape[-1]:  # (F' Fᵀ) D costs less than F' (Fᵀ D)
                x = self._fold(features @ own_features.mT, own)
            else:
                x = features @ (own_features.mT.unsqueeze(1) @ own)
            part = self._contract(x.view((last - first) * k, -1, steps, m), self.deltas[others])
            at = start - first
            result[:, :, at : at + len(part)] = part.view(len(part), -1, k, k).movedim(0, 2)
        return result

    def _fold(self, weights: Tensor, own: Tensor) -> Tensor:
        """Σ_t weights[b, :, t] own[b, :, t], ``[samples, outputs, positions, m]``; causal: t up to
        the readout."""
        weights = weights.unsqueeze(1)
        if self.per_step is None:
            return weights @ own
        parts = []
        for r, block in enumerate(own.split(self.per_step, dim=1)):
            until = max(r + 1 - self.skipped, 0)
            parts.append(weights[..., :until] @ block[:, :, :until])
        return torch.cat(parts, dim=1)

    def _contract(self, x: Tensor, deltas: Tensor) -> Tensor:
        """Σ_s ⟨x[k, b, s], deltas[b, k', s]⟩ as ``[b, k, k']``; causal: s up to the readout."""
        x = x.transpose(0, 1)
        if self.per_step is None:
            return x.flatten(2) @ deltas.flatten(2).mT
        result = x.new_zeros(x.shape[0], x.shape[1], deltas.shape[1])
        for s in range(x.shape[2]):
            later = (s + self.skipped) * self.per_step
            result[:, :, later:] += x[:, :, s] @ deltas[:, later:, s].mT
        return result


def row_blocks(samples: int, outputs: int) -> list[tuple[int, int]]:
    """Bounds of blocks of samples whose rows of the kernel hold about ``BLOCK`` numbers.

    At least eight blocks, since within a block the kernel's symmetry may go unused.
    """
    size = max(1, min(BLOCK // max(1, samples * outputs**2), -(-samples // 8)))
    return [(start, min(start + size, samples)) for start in range(0, samples, size)]


def upper_rows(factors: Sequence[Factors], start: int, stop: int) -> Tensor:
    """The sum over parameters of their blocks."""
    total = factors[0].upper_rows(start, stop)
    for other in factors[1:]:
        total += other.upper_rows(start, stop)
    return total


def recurrent_factors(
    w_in: Float[Tensor, "n inputs"],
    w: Float[Tensor, "n n"],
    w_out: Float[Tensor, "k n"],
    x: Float[Tensor, "samples steps inputs"],
    alpha: float | int = 1.0,
    *,
    wanted: Sequence[str] = ("w",),
    every_step: bool = False,
) -> list[Factors]:
    """Gradient factors of a leaky ReLU network (:class:`stiefel.theory.CTRNN`).

    δ_T = W_outᵀ e_k ∘ 1[h_T > 0] and δ_{t−1} = ((1 − α) I + α Wᵀ) δ_t ∘ 1[h_{t−1} > 0], all
    outputs at once; ∂o/∂W = Σ_t α δ_t h_{t−1}ᵀ.

    Args:
        w_in, w, w_out, x, alpha: The network and its input.
        wanted: Which of ``"w_in"``, ``"w"``, ``"w_out"`` the gradient is taken for.
        every_step: Outputs at all steps (ordered step, unit) in place of the last step's.

    Raises:
        FloatingPointError: the activity is not finite, with the step.

    Source: arXiv 2310.08513, tangent kernel of the recurrent weights.
    """
    with torch.no_grad():
        h = ctrnn_states(w_in, w, x, alpha)
        check_activity(h)
        factors = []
        if "w" in wanted or "w_in" in wanted:
            deltas = alpha * _deltas(w, w_out, h, alpha, every_step)
            features = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], dim=1)
            # h_0 = 0: the first step's gradient with respect to W is zero.
            skipped = int("w_in" not in wanted and h.shape[1] > 1)
            if "w" not in wanted:
                features = x.to(h)
            elif "w_in" in wanted:  # one deltas for both, the features side by side
                features = torch.cat([features, x.to(h)], dim=-1)
            deltas, features = deltas[:, :, skipped:].contiguous(), features[:, skipped:]
            per_step = w_out.shape[0] if every_step else None
            factors.append(Factors(deltas, features, per_step, skipped))
        if "w_out" in wanted:
            factors.append(_readout_factors(h, w_out.shape[0], every_step))
        return factors


def _deltas(w: Tensor, w_out: Tensor, h: Tensor, alpha: float, every_step: bool) -> Tensor:
    """∂o/∂(pre-activation) as ``[samples, outputs, steps, n]``; outputs (step, unit) if all."""
    samples, steps, n = h.shape
    k = w_out.shape[0]
    readouts = steps if every_step else 1
    active = (h > 0).to(h.dtype)
    step = alpha * w
    if alpha < 1:
        step = step + (1 - alpha) * torch.eye(n, dtype=w.dtype, device=w.device)
    deltas = h.new_zeros(samples, readouts, k, steps, n)
    last = (w_out * active[:, -1:]).unsqueeze(1)
    deltas[:, -1:, :, -1] = last
    for t in range(steps - 2, -1, -1):
        # Readouts after step t (all that there is, if only the last step is read) are passed on.
        later = slice(t + 1, None) if every_step else slice(None)
        deltas[:, later, :, t] = (deltas[:, later, :, t + 1] @ step) * active[:, None, t : t + 1]
        if every_step:
            deltas[:, t, :, t] = w_out * active[:, t : t + 1]
    return deltas.flatten(1, 2)


def _readout_factors(h: Tensor, k: int, every_step: bool) -> Factors:
    """∂o[b, (t, k)]/∂W_out = e_k h_tᵀ."""
    samples, steps = h.shape[:2]
    eye = torch.eye(k, dtype=h.dtype, device=h.device)
    if not every_step:
        return Factors(eye[:, None].expand(samples, k, 1, k), h[:, -1:])
    deltas = h.new_zeros(steps, k, steps, k)
    deltas[range(steps), :, range(steps)] = eye
    return Factors(deltas.flatten(0, 1).expand(samples, -1, -1, -1), h, k)
