"""The recurrent network of computational neuroscience: a leaky ReLU rate model.

h_0 = 0,  h_t = relu((1 − α) h_{t−1} + α (W_in x_t + W h_{t−1})),  o_t = W_out h_t, without biases.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stiefel.linalg._checks import check_finite, check_floating


class CTRNN(nn.Module):
    """Leaky recurrent network with ReLU units; outputs at every step.

    ``i2h``, ``h2h`` and ``h2o`` are Linear layers without bias: W_in, W and W_out. W_in and W_out
    start uniform in ±1/√fan_in; W at 1.25 · N(0, 1) / √n unless ``w0`` is given.

    Args:
        n_in, n_hidden, n_out: Sizes, at least 1.
        alpha: dt / τ in (0, 1]; 1 is a plain recurrent network.
        w0: ``[n_hidden, n_hidden]``, copied, for example from
            :func:`stiefel.init.low_rank_init`. Its dtype and device become the network's.
        generator: Source of the random weights, drawn on the CPU.
        check_finite: Look at the activity after every pass. Turn it off under ``torch.vmap`` or
            ``torch.compile``, which cannot ask what a number is.

    Raises:
        ValueError: a size below 1, ``alpha`` outside (0, 1], ``w0`` of another shape or not
            finite.

    Source: arXiv 2310.08513, eq. (1), and the authors' script.
    """

    def __init__(
        self,
        n_in: int,
        n_hidden: int,
        n_out: int,
        alpha: float | int = 1.0,
        w0: Float[Tensor, "n m"] | None = None,
        *,
        generator: torch.Generator | None = None,
        check_finite: bool = True,
    ) -> None:
        super().__init__()
        if min(n_in, n_hidden, n_out) < 1:
            raise ValueError(f"sizes must be at least 1, got {n_in}, {n_hidden} and {n_out}")
        _check_alpha(alpha)
        self.alpha, self.check_finite = float(alpha), check_finite
        options: dict = {"bias": False}
        if w0 is not None:
            _check_w0(w0, n_hidden)
            options |= {"dtype": w0.dtype, "device": w0.device}
        self.i2h = nn.Linear(n_in, n_hidden, **options)
        self.h2h = nn.Linear(n_hidden, n_hidden, **options)
        self.h2o = nn.Linear(n_hidden, n_out, **options)
        with torch.no_grad():
            for layer in (self.i2h, self.h2o):
                drawn = torch.rand(layer.weight.shape, generator=generator, dtype=torch.float64)
                layer.weight.copy_((2 * drawn - 1) / math.sqrt(layer.in_features))
            if w0 is None:
                shape = (n_hidden, n_hidden)
                drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
                self.h2h.weight.copy_(1.25 / math.sqrt(n_hidden) * drawn)
            else:
                self.h2h.weight.copy_(w0)

    def hidden(self, x: Float[Tensor, "samples steps inputs"]) -> Float[Tensor, "samples steps n"]:
        """Hidden activity h_1 … h_T.

        Raises:
            FloatingPointError: it is not finite, with the first such step (counted from 1).
        """
        h = ctrnn_states(self.i2h.weight, self.h2h.weight, x, self.alpha)
        if self.check_finite:
            check_activity(h)
        return h

    def forward(self, x: Float[Tensor, "samples steps inputs"]) -> Float[Tensor, "samples steps k"]:
        """Outputs o_1 … o_T.

        Raises:
            FloatingPointError: the hidden activity is not finite, with the first such step.
        """
        return self.h2o(self.hidden(x))

    def extra_repr(self) -> str:
        """What ``print`` shows of it."""
        return f"alpha={self.alpha:g}"


def ctrnn_states(
    w_in: Float[Tensor, "*nets n inputs"],
    w: Float[Tensor, "*nets n n"],
    x: Float[Tensor, "*batch steps inputs"],
    alpha: float | int = 1.0,
) -> Float[Tensor, "*out steps n"]:
    """Hidden activity of one network or of a stack of networks; differentiable.

    Args:
        w_in: ``[..., n, inputs]``.
        w: ``[..., n, n]``, of the same leading shape: one network each.
        x: ``[..., samples, steps, inputs]``; leading dimensions broadcast with those of ``w``, so
            a stack may share its input or have one each.
        alpha: dt / τ in (0, 1].

    Returns:
        ``[..., samples, steps, n]``. Non-finite values propagate: see :func:`check_activity`.

    Raises:
        ValueError: ``alpha`` outside (0, 1], or no step.

    Source: arXiv 2310.08513, eq. (1).
    """
    _check_alpha(alpha)
    if x.shape[-2] < 1:
        raise ValueError(f"x must have at least one step, got shape {tuple(x.shape)}")
    drive = alpha * (x @ w_in.mT.unsqueeze(-3))
    h = torch.relu(drive[..., 0, :])
    states = [h]
    # (1 − α) I + α W, once: a step is then a single product.
    step = alpha * w.mT
    if alpha < 1:
        step = step + (1 - alpha) * torch.eye(w.shape[-1], dtype=w.dtype, device=w.device)
    for t in range(1, x.shape[-2]):
        h = torch.relu(drive[..., t, :] + h @ step)
        states.append(h)
    return torch.stack(states, dim=-2)


def check_activity(h: Float[Tensor, "*batch steps n"]) -> None:
    """Raise ``FloatingPointError`` with the first step (from 1) at which ``h`` is not finite."""
    finite = h.detach().isfinite()
    if bool(finite.all()):
        return
    bad = ~finite.movedim(-2, 0).flatten(1).all(-1)
    raise FloatingPointError(
        f"hidden activity is not finite from step {int(bad.nonzero()[0, 0]) + 1} of {len(bad)}: "
        "the recurrent weights are too large for sequences of this length; use a smaller gain or "
        'low_rank_init(norm="spectral"), or clip gradients'
    )


def _check_alpha(alpha: float | int) -> None:
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha must be in (0, 1], got {alpha}")


def _check_w0(w0: Tensor, n: int) -> None:
    check_floating(w0, "w0")
    if w0.shape != (n, n):
        raise ValueError(f"w0 must be [{n}, {n}], got {tuple(w0.shape)}")
    check_finite(w0, "w0")
