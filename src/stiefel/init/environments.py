"""Logits and labels sorted by environment: what the penalties and the training of heads share."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stiefel.linalg._checks import check_finite, check_floating, compute_dtype

# Confidences differ by less than 1; up to this 1 / scale the factors exp(confidence / scale) are
# far from overflow in float32, so the kernel can be summed in sorted order.
_LARGEST_EXPONENT = 40.0


class Part(NamedTuple):
    """What one environment holds: ``c`` channels (1 if binary) of ``n`` examples."""

    z: Tensor
    """Logits ``[..., c, n]``."""
    target: Tensor
    """``[..., c, n]``: the label in {0, 1} if c = 1, otherwise one-hot."""

    def probability(self) -> Tensor:
        """Predicted probabilities ``[..., c, n]``."""
        return self.z.sigmoid() if self.z.shape[-2] == 1 else self.z.softmax(-2)

    def residual(self) -> Tensor:
        """Derivative of every example's loss by its logits, ``[..., c, n]``."""
        return self.probability() - self.target

    def losses(self) -> Tensor:
        """Cross-entropy of every example, nats, ``[..., n]``."""
        if self.z.shape[-2] == 1:
            return -nn.functional.logsigmoid((2 * self.target - 1) * self.z)[..., 0, :]
        return self.z.logsumexp(-2) - (self.z * self.target).sum(-2)


def through_link(p: Tensor, v: Tensor) -> Tensor:
    """The derivative of the probabilities by the logits, applied to ``v``; it is symmetric."""
    if p.shape[-2] == 1:
        return torch.ops.aten.sigmoid_backward(v, p)  # v p (1 − p) in one pass
    return p * (v - (p * v).sum(-2, keepdim=True))


def channels(z: Tensor, multiclass: bool) -> Tensor:
    """Checked logits as ``[..., c, n]``, in at least float32.

    Raises:
        ValueError: too few dimensions, one class only, NaN or infinities.
        TypeError: not real floating point.
    """
    check_floating(z, "z")
    if z.ndim < 1 + multiclass or (multiclass and z.shape[-1] < 2):
        wanted = "[..., n, c] with c ≥ 2" if multiclass else "[..., n]"
        raise ValueError(f"z must be {wanted}, got shape {tuple(z.shape)}")
    if not math.isfinite(z.detach().sum()):  # one operation; or a sum that overflows
        check_finite(z, "z")
    work = z.to(compute_dtype(z.dtype))
    return work.mT if multiclass else work.unsqueeze(-2)


class Groups(NamedTuple):
    """Which environment every example belongs to, environments in order of their ids."""

    place: Tensor
    """``[n]``: 0 for the environment with the smallest id, and so on."""
    counts: list[int]
    """Examples of each environment."""

    def rows(self) -> list[Tensor]:
        """Indices of the examples of each environment."""
        return [(self.place == i).nonzero()[:, 0] for i in range(len(self.counts))]


def groups(env: Tensor, n: int, *, least: int = 2) -> Groups:
    """Examples sorted by environment.

    Raises:
        ValueError: ``env`` is not ``[n]``, or holds fewer than ``least`` environments.
        TypeError: ``env`` is not integer.
    """
    if env.is_floating_point() or env.is_complex():
        raise TypeError(f"env must hold integer ids, got {env.dtype}")
    if env.shape != (n,):
        raise ValueError(
            f"env must hold one id for each of the {n} examples, got shape {tuple(env.shape)}"
        )
    place, counts = env.long(), [0]
    low, high = (int(i) for i in place.aminmax()) if n else (0, 0)
    if high - low <= n:  # ids as 0, 1, 2 are counted; the rest is sorted
        place = place - low if low else place
        if high - low == 1:
            ones = int(place.sum())
            counts = [n - ones, ones]
        else:
            counts = place.bincount().tolist()
    if 0 in counts:
        _, place, found = env.unique(return_inverse=True, return_counts=True)
        counts = found.tolist()
    if len(counts) < least:
        raise ValueError(f"a penalty needs at least {least} environments, env holds {len(counts)}")
    return Groups(place, counts)


def members(env: Tensor, n: int, *, least: int = 2) -> list[Tensor]:
    """Indices of the examples of each environment, in order of the environments' ids.

    Errors as in :func:`groups`.
    """
    return groups(env, n, least=least).rows()


def targets(y: Tensor, n: int, classes: int, dtype: torch.dtype) -> Tensor:
    """Labels ``[..., n]`` as ``[..., c, n]``: one channel of 0 and 1, or one-hot.

    Raises:
        ValueError: not one label an example, or labels other than 0 and 1 (c = 1), or than the
            class ids 0 to ``classes`` − 1.
    """
    if y.ndim == 0 or y.shape[-1] != n:
        raise ValueError(
            f"y must hold one label for each of the {n} examples, got shape {tuple(y.shape)}"
        )
    highest = max(classes, 2) - 1
    if y.is_floating_point() or not y.numel():
        right = bool(_known(y, highest).all())
    else:  # the same in one operation
        low, high = (int(i) for i in y.aminmax())
        right = low >= 0 and high <= highest
    if not right:
        allowed = "0 and 1 (binary)" if classes == 1 else f"class ids 0 to {highest}"
        raise ValueError(f"y must hold {allowed}, got {y[~_known(y, highest)][0].item()}")
    if classes == 1:
        return y.to(dtype).unsqueeze(-2)
    return nn.functional.one_hot(y.long(), classes).to(dtype).mT


def _known(y: Tensor, highest: int) -> Tensor:
    known = (y >= 0) & (y <= highest)
    return known & (y == y.round()) if y.is_floating_point() else known


def whole(z: Tensor, y: Tensor, env: Tensor, *, multiclass: bool) -> tuple[Part, Groups]:
    """All examples as one part, and which of them belong together; checked."""
    logits = channels(z, multiclass)
    classes, n = logits.shape[-2:]
    together = groups(env, n)
    return Part(logits, targets(y, n, classes, logits.dtype)), together


def split(z: Tensor, y: Tensor, env: Tensor, *, multiclass: bool) -> list[Part]:
    """A part for each environment, in order of their ids; arguments as the penalties take them."""
    (logits, target), together = whole(z, y, env, multiclass=multiclass)
    return [Part(logits[..., i], target[..., i]) for i in together.rows()]


def confidence(part: Part) -> tuple[Tensor, Tensor]:
    """Largest probability ``[..., n]``, and 1 where the class it belongs to is right, else 0."""
    p = part.probability()
    if p.shape[-2] == 1:
        right = (p > 0.5) == (part.target > 0.5)
        # At p = 1/2 both probabilities are largest, and the maximum has slope 0.
        return torch.maximum(p, 1 - p)[..., 0, :], right[..., 0, :].to(p)
    value, label = p.max(-2, keepdim=True)
    right = part.target.expand_as(p).gather(-2, label)
    return value[..., 0, :], right[..., 0, :]


def kernel_sums(conf: Tensor, gap: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Σ_j gap_j exp(−|conf_i − conf_j| / scale) for every i, over smaller, equal, larger conf_j.

    All ``[..., n]``. For ``scale`` ≥ 1/40 the examples are sorted, and the sums on either side
    are cumulative sums of gap · exp(±conf / scale): O(n log n).
    """
    if 1 / scale > _LARGEST_EXPONENT:
        distance = conf.unsqueeze(-1) - conf.unsqueeze(-2)
        kernel = torch.exp(-distance.abs() / scale) * gap.unsqueeze(-2)
        zero = kernel.new_zeros(())
        return (
            torch.where(distance > 0, kernel, zero).sum(-1),
            torch.where(distance == 0, kernel, zero).sum(-1),
            torch.where(distance < 0, kernel, zero).sum(-1),
        )
    ordered = conf.detach().sort(dim=-1).values.contiguous()
    place = conf.detach().argsort(dim=-1)
    here = conf.detach().contiguous()
    # Equal confidences are a group of their own, [first, last): the kernel is 1 and flat there.
    first = torch.searchsorted(ordered, here)
    last = torch.searchsorted(ordered, here, right=True)
    # Centred exponents keep both factors small.
    shift = (conf - ordered.mean(-1, keepdim=True)) / scale
    rising, falling = shift.exp(), (-shift).exp()

    def running(weights: Tensor, *, backwards: bool = False) -> Tensor:
        """Entry k: the sum over the first k in order, or over all from k on."""
        total = weights.gather(-1, place)
        if backwards:
            # Summed from its small end: a difference from the whole would cancel.
            return nn.functional.pad(total.flip(-1).cumsum(-1).flip(-1), (0, 1))
        return nn.functional.pad(total.cumsum(-1), (1, 0))

    lower = falling * running(gap * rising).gather(-1, first)
    upper = rising * running(gap * falling, backwards=True).gather(-1, last)
    flat = running(gap)
    return lower, flat.gather(-1, last) - flat.gather(-1, first), upper
