"""The search for a perturbation that balances condition number against size (PTD, method 3).

    min_E  κ(V) + γ ‖E‖/‖A‖,   A + E = V diag(λ) V⁻¹

Source: Yu et al., arXiv 2310.01698. The barrier that keeps eigenvalues stable is ours: without it
the minimum for HiPPO-LegS lies in the right half plane.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor

# First step of Adam, in parts of ‖A‖/n; it falls linearly to zero.
STEP = 1e-3
BETAS, EPSILON = (0.9, 0.999), 1e-12
# Barrier: weight · Σ softplus((Re λ + margin)/width), with margin and width in parts of the decay
# that A has by itself; what ends nearer to the axis than `accepted` of it is not taken. For LegS
# that decay is 1/2: the numbers there are 0.25, 0.05 and 0.01.
BARRIER, MARGIN, WIDTH, ACCEPTED = 10.0, 0.5, 0.1, 0.02
# Unit of decay, in parts of ‖A‖, where neither A nor the start has any.
SMALLEST_DECAY = 1e-3


def search_perturbation(a: Tensor, start: Tensor, gamma: float, stable: bool, steps: int) -> Tensor:
    """The E of the lowest κ(V) + ``gamma`` ‖E‖/‖A‖ seen in ``steps`` steps of Adam from ``start``.

    Args:
        a, start: ``[n, n]``, float64 or complex128.
        gamma: price of the relative size of E.
        stable: only accept E with every Re λ clearly negative.

    Raises:
        ValueError: ``steps`` below 1, or A is zero (nothing to be relative to).
        RuntimeError: no E on the way was stable, or none had finite gradients.
    """
    if operator.index(steps) < 1:
        raise ValueError(f"max_iter must be at least 1, got {steps}")
    norm = torch.linalg.matrix_norm(a, 2)
    if not float(norm) > 0:
        raise ValueError("A must not be zero: the search weighs ‖E‖ against ‖A‖")
    decay = _decay(a, start, float(norm))
    e = start.clone()
    first, second = torch.zeros_like(e), torch.zeros_like(e.abs())
    best, lowest, rightmost = None, float("inf"), float("inf")
    rate = STEP * float(norm) / a.shape[0]
    for step in range(steps):
        with torch.enable_grad():
            leaf = e.detach().requires_grad_()
            spectrum, v = torch.linalg.eig(a + leaf)
            values = torch.linalg.svdvals(v)
            loss = values[0] / values[-1] + gamma * torch.linalg.matrix_norm(leaf, 2) / norm
            objective = loss
            if stable:
                distance = (spectrum.real + MARGIN * decay) / (WIDTH * decay)
                objective = loss + BARRIER * torch.nn.functional.softplus(distance).sum()
            (gradient,) = torch.autograd.grad(objective, leaf)
        right = float(spectrum.detach().real.max())
        rightmost = min(rightmost, right)
        value = float(loss.detach())
        if value < lowest and (not stable or right < -ACCEPTED * decay):
            best, lowest = e, value
        size = torch.linalg.matrix_norm(gradient)
        if not bool(size.isfinite()):
            break  # two eigenvalues have met: there is no way on from here
        gradient = gradient / size.clamp_min(torch.finfo(size.dtype).tiny)
        first = BETAS[0] * first + (1 - BETAS[0]) * gradient
        second = BETAS[1] * second + (1 - BETAS[1]) * gradient.abs().square()
        corrected = first / (1 - BETAS[0] ** (step + 1))
        spread = (second / (1 - BETAS[1] ** (step + 1))).sqrt()
        e = e - rate * (1 - step / steps) * corrected / (spread + EPSILON)
    if best is None:
        raise RuntimeError(
            f"the search ended unstable: its most stable E leaves an eigenvalue with real part "
            f"{rightmost:.3g}. Give low_rank to start from, a larger gamma, or stable=False"
        )
    return best


def _decay(a: Tensor, start: Tensor, norm: float) -> float:
    """What a stable A is expected to decay by: of its numerical range, else of the start."""
    numerical = float(torch.linalg.eigvalsh((a + a.mH) / 2)[-1])
    if numerical < 0:
        return -numerical
    spectral = float(torch.linalg.eigvals(a + start).real.max())
    return max(-spectral, SMALLEST_DECAY * norm)
