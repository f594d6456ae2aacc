"""What gradient descent on k examples makes of all 2^k − 1 inputs of a bit permutation.

Giapitzakis, Back de Luca, Fountoulakis, arXiv 2502.16763. A network with one hidden ReLU layer
learns y = x[perm] from the k basis vectors alone. Test inputs are scaled to length 1; the outputs
of N independent networks are averaged and an output bit is 1 where the average is positive. In
the limit of infinite width the outputs are independent Gaussians whose mean and variance have the
closed form below, hence the number of networks that makes every answer right.

Two regimes: ``"ntk"``, both layers trained in NTK parametrisation; ``"last_layer"``, only the
output layer moves (what plain ``nn.Linear`` layers with one learning rate do when they are wide).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

REGIMES = ("ntk", "last_layer")
# The NNGP kernel K and the NTK Θ, times k, at equal and at orthogonal unit inputs.
K_SAME, K_ORTHOGONAL = 0.5, 1 / (2 * math.pi)
THETA_SAME, THETA_ORTHOGONAL = 1.0, 1 / (2 * math.pi)
# Step of the sheet in units of k/D; gradient descent converges below 2.
AUTO_STEP = 1.2
# 2^24 rows of 24 bytes are 400 MB; each further bit doubles that.
LARGEST_LISTED = 24


def check_bits(k: int) -> int:
    """``k`` as an integer of at least 2; ``TypeError`` or ``ValueError`` otherwise."""
    k = operator.index(k)
    if k < 2:
        raise ValueError(f"k must be at least 2 bits, got {k}")
    return k


def check_regime(regime: str) -> None:
    """Raise ``ValueError`` unless the regime is known."""
    if regime not in REGIMES:
        raise ValueError(f"regime must be one of {REGIMES}, got {regime!r}")


def spectrum(k: int, regime: str) -> tuple[float, float]:
    """(d − c, D): the training kernel's eigenvalues times k, k − 1 small ones and the largest."""
    same, cross = (THETA_SAME, THETA_ORTHOGONAL) if regime == "ntk" else (K_SAME, K_ORTHOGONAL)
    return same - cross, same - cross + cross * k


def check_step(lr: float | int, k: int, regime: str) -> float:
    """``lr`` if gradient descent converges with it: 0 < lr < 2k/D; ``ValueError`` otherwise."""
    limit = 2 * k / spectrum(k, regime)[1]
    if not 0 < lr < limit:
        raise ValueError(
            f"lr must be positive and below 2k/D = {limit:.6g} for k = {k}, regime {regime!r} "
            f"(gradient descent diverges from there on), got {lr}"
        )
    return float(lr)


def auto_step(k: int, regime: str) -> float:
    """The step 1.2 k/D: well below divergence at any width, few steps at small k."""
    return AUTO_STEP * k / spectrum(k, regime)[1]


def permutation_moments(
    k: int,
    n_ones: int | Sequence[int] | np.ndarray | Tensor,
    *,
    regime: str = "ntk",
    t: float | int | None = None,
    lr: float | int | None = None,
) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n"], Float[Tensor, "*n"]]:
    """Mean and variance of one trained network's outputs at an input with ``n_ones`` ones.

    Infinite width, input scaled to length 1, squared loss ½ Σ (f − y)² over the k basis vectors.
    The k outputs are independent Gaussians of one variance; an output has the first mean if its
    source bit is 1, the second if it is 0. From n = 2 on the first is positive and the second
    negative; n = 1 is a training input and gives (1, 0, 0) exactly at t = ∞.

    Args:
        k: number of bits.
        n_ones: number of ones, 1 to k; an integer or any array of them. At k the mean of outputs
            with a zero source is the formula's value although no output has it.
        regime: ``"ntk"`` or ``"last_layer"``.
        t: training time in steps of gradient flow with step ``lr``; None means the limit t → ∞.
        lr: step size; None means 1.2 k/D, that of :meth:`PermutationEnsemble.fit`.

    Returns:
        ``(mu_on, mu_off, var)``, float64, each of the shape of ``n_ones``.

    Raises:
        TypeError: ``k`` or ``n_ones`` is not integer.
        ValueError: k < 2, n_ones outside 1..k, unknown regime, t negative or not finite, or
            lr outside (0, 2k/D).

    Source: arXiv 2502.16763; closed form by inverting the (d − c) I + c 11ᵀ of the basis vectors.
    """
    k = check_bits(k)
    check_regime(regime)
    # One count in Python's floats: a tenth of the time of tensors without dimensions.
    one = isinstance(n_ones, int)
    n = _counts(n_ones, k)
    root: Any = math.sqrt if one else torch.sqrt
    arccos: Any = math.acos if one else torch.acos
    step = auto_step(k, regime) if lr is None else check_step(lr, k, regime)
    if t is not None and not (t >= 0 and math.isfinite(t)):
        raise ValueError(f"t must be finite and at least 0 steps (None: to the end), got {t}")

    rho = 1 / root(n)
    rest = math.pi - arccos(rho)
    gauss = (root(1 - 1 / n) + rest * rho) / (2 * math.pi)  # g = K(1/√n)
    ntk = regime == "ntk"
    cross = THETA_ORTHOGONAL if ntk else K_ORTHOGONAL  # c
    f = gauss + rest * rho / (2 * math.pi) if ntk else gauss
    slow, fast = spectrum(k, regime)  # d − c and D
    lift = f - cross
    # (c − cS/D)/(d − c) with D − S = (d − c) − n(f − c), which is exactly 0 at n = 1.
    mu_off = cross * (slow - n * lift) / (fast * slow)
    mu_on = mu_off + lift / slow
    if t is not None:
        # Θ⁻¹(I − e^{−ηtΘ}): what is not learned yet along the ones, and across them.
        along = math.exp(-step * t * fast / k) * (k * cross + n * lift) / (k * fast)
        across = math.exp(-step * t * slow / k) * lift / slow
        mu_off = mu_off - along + across * n / k
        mu_on = mu_on - along - across * (1 - n / k)
    squares = n * mu_on**2 + (k - n) * mu_off**2
    total = n * mu_on + (k - n) * mu_off
    overlap = n * mu_on * gauss + (k - n) * mu_off * K_ORTHOGONAL
    start = (K_SAME - K_ORTHOGONAL) * squares + K_ORTHOGONAL * total**2
    var = (K_SAME + start - 2 * overlap) / k
    if t is None:
        var = var * (n != 1)
    moments = [torch.as_tensor(v, dtype=torch.float64) for v in (mu_on, mu_off, var)]
    return moments[0], moments[1], moments[2].clamp_min(0)


def _counts(n_ones: int | Sequence[int] | np.ndarray | Tensor, k: int) -> Any:
    """The counts as a float or a float64 tensor."""
    if isinstance(n_ones, int):
        wrong = [] if 1 <= n_ones <= k else [n_ones]
        n = float(n_ones)
    else:
        counts = torch.as_tensor(n_ones)
        if counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool:
            raise TypeError(f"n_ones must be integer, got {counts.dtype}")
        wrong = counts[(counts < 1) | (counts > k)]
        n = counts.to(torch.float64)
    if len(wrong):
        raise ValueError(f"n_ones must lie in 1..{k} for k = {k}, got {int(wrong[0])}")
    return n


def ensemble_size(k: int, delta: float = 0.1, *, n_ones: int | str = 2, regime: str = "ntk") -> int:
    """Smallest number of networks whose averaged, thresholded outputs are right.

    Infinitely wide networks trained to the end. For one input with ``n_ones`` ones the
    probability Φ(μ_on √N/σ)^n Φ(−μ_off √N/σ)^(k−n) ≥ 1 − δ is exact. ``n_ones="all"`` bounds the
    probability of any error on the 2^k − 1 − k unseen inputs by the sum over all of them (union
    bound), computed in logarithms: k in the thousands is fine.

    Args:
        k: number of bits.
        delta: allowed probability of an error, in (0, 1).
        n_ones: number of ones of the input, or ``"all"``. Two ones have the smallest margin.
        regime: ``"ntk"`` or ``"last_layer"``.

    Raises:
        TypeError: ``k`` or ``n_ones`` is not integer.
        ValueError: k < 2, delta outside (0, 1), n_ones outside 1..k and not "all", or unknown
            regime.

    Source: arXiv 2502.16763, whose bounds are O(k log k) and O(k²); here the numbers themselves.
    """
    k = check_bits(k)
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie strictly between 0 and 1, got {delta}")
    if isinstance(n_ones, str):
        if n_ones != "all":
            raise ValueError(f'n_ones must be an integer in 1..{k} or "all", got {n_ones!r}')
        return _size_for_all(k, delta, regime)
    from scipy.special import log_ndtr  # here: scipy would triple the time to import this home

    mu_on, mu_off, var = (float(v) for v in permutation_moments(k, n_ones, regime=regime))
    if var == 0:  # a training input: every network is right
        return 1
    sigma = math.sqrt(var)

    def excess(members: float | int) -> float:
        root = math.sqrt(members) / sigma
        on, off = n_ones * log_ndtr(mu_on * root), (k - n_ones) * log_ndtr(-mu_off * root)
        return math.log1p(-delta) - float(on + off)

    high = 1.0
    while excess(high) > 0:
        high *= 2
    return _smallest(excess, high / 2, high)


def _size_for_all(k: int, delta: float, regime: str) -> int:
    from scipy.special import gammaln, log_ndtr, logsumexp, ndtri_exp

    n = np.arange(2, k + 1)
    mu_on, mu_off, var = (v.numpy() for v in permutation_moments(k, n, regime=regime))
    inputs = gammaln(k + 1) - gammaln(n + 1) - gammaln(k - n + 1)
    # One entry for each number of ones and kind of output: how many there are, and their margin
    # in standard deviations of one network. The input of all ones has no output with a zero.
    count = np.concatenate([inputs + np.log(n), inputs[:-1] + np.log(k - n[:-1])])
    margin = np.concatenate([mu_on, -mu_off[:-1]]) / np.sqrt(np.concatenate([var, var[:-1]]))
    target = math.log(delta)

    def excess(members: float | int) -> float:
        return float(logsumexp(count + log_ndtr(-margin * math.sqrt(members)))) - target

    # Every term alone must stay below delta; all do together when each has its equal share.
    low, high = (
        float(np.max((np.minimum(ndtri_exp(np.minimum(allowed, -1e-300)), 0) / margin) ** 2))
        for allowed in (target - count, target - math.log(len(count)) - count)
    )
    return _smallest(excess, low, high)


def _smallest(excess: Callable[[float], float], low: float, high: float) -> int:
    """Smallest N ≥ 1 with excess(N) ≤ 0, for a falling function with its zero in [low, high]."""
    if excess(1.0) <= 0:
        return 1
    from scipy.optimize import brentq

    low, high = max(low * (1 - 1e-9), 1.0), high * (1 + 1e-9)  # rounding of the two ends
    # In N the logarithm of a Gaussian tail is nearly straight: a handful of evaluations.
    root = brentq(excess, low, high, xtol=0.1) if excess(low) > 0 else low
    size = math.ceil(root)  # pyrefly: ignore[no-matching-overload]
    while excess(size) > 0:
        size += 1
    while size > 1 and excess(size - 1) <= 0:
        size -= 1
    return size


def nonzero_inputs(k: int) -> UInt8[Tensor, "inputs k"]:
    """All 2^k − 1 nonzero binary vectors, row i − 1 the bits of i, most significant bit first.

    Raises:
        ValueError: k < 2, or k > 24, where the rows would not fit in memory.
    """
    k = check_bits(k)
    if k > LARGEST_LISTED:
        raise ValueError(
            f"the 2^{k} − 1 inputs of k = {k} bits do not fit in memory; at most "
            f"k = {LARGEST_LISTED} can be listed. Sample inputs instead"
        )
    numbers = np.arange(1, 2**k, dtype=">u4").view(np.uint8).reshape(-1, 4)
    return torch.from_numpy(np.unpackbits(numbers, axis=1)[:, 32 - k :].copy())
