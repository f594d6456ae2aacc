"""S4D: independent diagonal state spaces, trained as a long convolution, run as a recurrence.

Source: Gu et al., arXiv 2206.11893, "On the Parameterization and Initialization of Diagonal State
Space Models"; block and defaults follow the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Complex, Float, Shaped
from torch import Tensor, nn

from stiefel.linalg.autocast import without_autocast
from stiefel.nn._long_convolution import convolve
from stiefel.nn._vandermonde import block_length, gather, multiply
from stiefel.nn.s4d_kernel import S4DKernel, System

MODES = ("conv", "recurrent")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": nn.functional.gelu,
    "relu": nn.functional.relu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
    "none": lambda x: x,
}


class S4D(nn.Module):
    """A sequence layer: H diagonal state spaces, a nonlinearity, a gated mix of the channels.

        y = GLU(Linear(dropout(activation(K * u + D u))))

    Args:
        d_model: H, channels in and out.
        d_state: N, state size of every channel, even.
        dropout: between activation and linear map, in [0, 1).
        bidirectional: a second kernel runs from the future; no states, no steps then.
        activation: gelu, relu, silu, tanh or none.
        transposed: sequences are ``[batch, H, length]`` instead of ``[batch, length, H]``.
        mode: how ``forward`` computes, ``"conv"`` (FFT) or ``"recurrent"`` (step by step, the slow
            twin). Parameters are the same; may be changed at any time.
        generator: for all random numbers of the start.
        **kernel: ``init``, ``disc``, ``dt_min``, … of :class:`S4DKernel`.

    Raises:
        ValueError: a setting out of range; the message says what is allowed.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        dropout: float | int = 0.0,
        bidirectional: bool = False,
        activation: str = "gelu",
        transposed: bool = False,
        *,
        mode: str = "conv",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kernel: Any,
    ) -> None:
        super().__init__()
        if "channels" in kernel:
            raise TypeError("S4D has one kernel per direction; for more use S4DKernel(channels=…)")
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.kernel = S4DKernel(
            d_model, d_state, 2 if bidirectional else 1, generator=generator, **place, **kernel
        )
        self.d_model, self.d_state = d_model, d_state
        self.bidirectional, self.activation, self.transposed = bidirectional, activation, transposed
        self.mode = mode
        d = torch.randn(d_model, generator=generator, dtype=torch.float64)
        self.D = nn.Parameter(d.to(device=device, dtype=self.kernel.dtype))
        self.dropout = nn.Dropout(dropout)
        self.output = seeded_linear(d_model, 2 * d_model, generator, **place)
        self._frozen: tuple[tuple[Any, ...], System] | None = None

    @property
    def mode(self) -> str:
        """``"conv"`` or ``"recurrent"``: how :meth:`forward` computes.

        Raises:
            ValueError: set to anything else.
        """
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        self._mode = mode

    def forward(
        self,
        u: Shaped[Tensor, "batch rows columns"],
        state: Tensor | None = None,
        rate: float | int = 1.0,
        *,
        lengths: Shaped[Tensor, " batch"] | None = None,
        return_state: bool = True,
    ) -> tuple[Float[Tensor, "batch rows columns"], Complex[Tensor, "batch channels modes"] | None]:
        """Whole sequences at once; ``(y, new_state)``, y of the shape and dtype of u.

        Args:
            u: ``[batch, length, H]``, or ``[batch, H, length]`` if ``transposed``.
            state: ``[batch, H, N/2]`` complex, what an earlier part of the sequence ended with.
            rate: factor on the step sizes: 2 for sequences sampled half as often.
            lengths: ``[batch]`` integers, 1 to length: what comes later in a sequence is not
                looked at, gives 0, and leaves the state alone.
            return_state: without it new_state is None and costs nothing. Bidirectional layers
                have no state.

        Raises:
            TypeError: u is not real floating point, state not complex, or lengths not integers.
            ValueError: wrong shape, length 0, NaN or infinities in u, lengths out of range, a state
                of the wrong shape or for a bidirectional layer.
            RuntimeError: a parameter holds NaN or infinities.
        """
        check_sequence(u, self.d_model, channel_dim=1 if self.transposed else 2)
        x = u.mT if self.transposed else u
        inside = None
        if lengths is not None:
            inside = length_mask(lengths, x.shape[0], x.shape[1])
            x = torch.where(inside[..., None], x, 0.0)
        check_finite_input(x)
        self._check_state(state, x.shape[0])
        system = self.kernel.system(rate)
        with without_autocast(x):
            x = x.to(self.kernel.dtype).contiguous()
            if self.mode == "conv":
                y, new_state = self._convolved(x, system, state, lengths, return_state)
            else:
                y, new_state = self._stepped(x, system, state, inside)
        y = self._mixed(y.to(u.dtype)).to(u.dtype)
        if inside is not None:
            y = torch.where(inside[..., None], y, 0.0)
        return (y.mT if self.transposed else y), (new_state if return_state else None)

    def step(
        self,
        u: Shaped[Tensor, "batch H"],
        state: Tensor | None = None,
        rate: float | int = 1.0,
    ) -> tuple[Float[Tensor, "batch H"], Complex[Tensor, "batch H modes"]]:
        """One sample per sequence, ``[batch, H]``: time and memory do not depend on the past.

        ``state`` is what the last call returned, ``[batch, H, N/2]`` complex; None at the start.

        Raises:
            TypeError, ValueError: as :meth:`forward`; also for a bidirectional layer.
        """
        if self.bidirectional:
            raise ValueError("a bidirectional layer needs the whole sequence: it has no step")
        check_sequence(u, self.d_model, channel_dim=1)
        check_finite_input(u)
        self._check_state(state, u.shape[0])
        if state is None:
            state = self.initial_state(u.shape[0])
        with without_autocast(u):
            x = u.to(self.kernel.dtype)
            y, state = _advance(self._step_system(rate), x, state)
            y = y + self.D.to(x.dtype) * x
        return self._mixed(y.to(u.dtype)).to(u.dtype), state

    def initial_state(self, batch: int) -> Complex[Tensor, "batch H modes"]:
        """Zeros ``[batch, H, N/2]``: nothing seen yet."""
        shape = (batch, self.d_model, self.d_state // 2)
        return torch.zeros(shape, dtype=self.kernel.complex_dtype, device=self.D.device)

    def setup_step(self, rate: float | int = 1.0) -> None:
        """Compute Ā, B̄ and C once for all following steps at this ``rate``.

        They are dropped by :meth:`train`, by loading or moving parameters, and by optimizer steps;
        after writing to ``parameter.data`` call this again.

        Raises:
            ValueError: the layer is bidirectional, or ``rate`` is not positive.
        """
        if self.bidirectional:
            raise ValueError("a bidirectional layer needs the whole sequence: it has no step")
        with torch.no_grad():
            self._frozen = (self._versions(rate), self._rounded(self.kernel.system(rate)))

    def train(self, mode: bool = True) -> S4D:
        """Switch between training and evaluation; what :meth:`setup_step` kept is dropped."""
        self._frozen = None
        return super().train(mode)

    def _step_system(self, rate: float | int) -> System:
        # A compiled step must not hold on to numbers, and cannot see versions.
        if self._frozen is not None and not torch.compiler.is_compiling():
            versions, system = self._frozen
            if versions == self._versions(rate):
                return system
        return self._rounded(self.kernel.system(rate))

    def _versions(self, rate: float | int) -> tuple[Any, ...]:
        """Changes whenever a parameter is written to or replaced."""
        parameters = self.kernel.parameters()
        # Parameters made under inference_mode carry no version; they cannot be trained either.
        return rate, *((p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters)

    def _rounded(self, system: System) -> System:
        """Ā itself, B̄ and C, for one step, in the precision of states."""
        dtype = self.kernel.complex_dtype
        return System(*(x.to(dtype) for x in (system.log_a.exp(), system.b, system.c)))

    def _convolved(
        self,
        x: Tensor,
        system: System,
        state: Tensor | None,
        lengths: Tensor | None,
        return_state: bool,
    ) -> tuple[Tensor, Tensor | None]:
        length, dtype = x.shape[1], self.kernel.complex_dtype
        kernels = self.kernel.kernel(system, length)
        # D u_t is a kernel that looks at this sample only.
        past = kernels[0] + nn.functional.pad(self.D.to(x.dtype)[:, None], (0, length - 1))
        if self.bidirectional:
            return convolve(x, past, kernels[1]), None
        y = convolve(x, past)
        # Blocks this long keep the tables for states smaller than the sequence itself.
        block = block_length(length, least=self.d_state)
        if state is not None:
            # y_l gains 2 Re Σ C Ā^(l+1) x_0.
            weights = 2 * system.c * system.log_a.exp() * state.to(system.c.dtype)
            y = y + multiply(weights, system.log_a, length, dtype, block).mT
        if not return_state:
            return y, None
        # x_L = Ā^L x_0 + Σ_l Ā^(L-1-l) B̄ u_l.
        ending = x if lengths is None else _right_aligned(x, lengths)
        end = gather(ending, system.log_a, dtype, block) * system.b.to(dtype)
        if state is not None:
            count = length if lengths is None else lengths.to(x.device)[:, None, None]
            end = end + (count * system.log_a).exp().to(dtype) * state.to(dtype)
        return y, end

    def _stepped(
        self, x: Tensor, system: System, state: Tensor | None, inside: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The recurrence itself, from both ends where the layer is bidirectional."""
        step, length, d = self._rounded(system), x.shape[1], self.D.to(x.dtype)
        first = self.initial_state(x.shape[0]) if state is None else state
        outputs, current = [], first
        for t in range(length):
            y, after = _advance(step, x[:, t], current)
            if inside is not None:
                after = torch.where(inside[:, t, None, None], after, current)
            outputs.append(y)
            current = after
        y = torch.stack(outputs, dim=1) + d * x
        if not self.bidirectional:
            return y, current
        step = System(step.log_a, step.b, step.c[1:])
        outputs, current = [torch.zeros_like(x[:, 0])], self.initial_state(x.shape[0])
        for t in range(length - 1, 0, -1):
            later, current = _advance(step, x[:, t], current)
            outputs.append(later)
        return y + torch.stack(outputs[::-1], dim=1), None

    def _mixed(self, y: Tensor) -> Tensor:
        """Activation, dropout, linear map and gate on ``[..., H]``."""
        y = self.dropout(ACTIVATIONS[self.activation](y))
        return nn.functional.glu(self.output(y), dim=-1)

    def _check_state(self, state: Tensor | None, batch: int) -> None:
        if state is None:
            return
        if self.bidirectional:
            raise ValueError("a bidirectional layer has no state to start from")
        expected = (batch, self.d_model, self.d_state // 2)
        if tuple(state.shape) != expected:
            raise ValueError(f"state must have shape {expected}, got {tuple(state.shape)}")
        if not state.is_complex():
            raise TypeError(f"state must be complex, got {state.dtype}")

    def extra_repr(self) -> str:
        """Choices, for ``print(model)``."""
        return f"bidirectional={self.bidirectional}, mode={self.mode!r}"


def _advance(step: System, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """x_t = Ā x_{t-1} + B̄ u_t and 2 Re Σ C x_t, with Ā in place of its logarithm."""
    state = step.log_a * state + step.b * u[..., None]
    return 2 * (step.c[0] * state).sum(-1).real, state


def _right_aligned(x: Tensor, lengths: Tensor) -> Tensor:
    """Every sequence moved to the end, zeros before it."""
    length = x.shape[1]
    index = torch.arange(length, device=x.device) - (length - lengths.to(x.device)[:, None])
    taken = torch.take_along_dim(x, index.clamp(min=0)[..., None], dim=1)
    return torch.where(index[..., None] >= 0, taken, 0.0)


def seeded_linear(
    inputs: int,
    outputs: int,
    generator: torch.Generator | None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Linear:
    """``nn.Linear`` with torch's own distribution of weights, drawn from ``generator``."""
    # Made without numbers first: torch's own start would draw from the global generator.
    linear = nn.Linear(inputs, outputs, device="meta", dtype=dtype)
    linear = linear.to_empty(device=device or torch.get_default_device())
    bound = 1 / math.sqrt(inputs)
    for parameter in linear.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return linear


def check_sequence(u: Tensor, channels: int, channel_dim: Literal[1, 2]) -> None:
    """Raise unless u is real floating point (``TypeError``) with ``channels`` (``ValueError``)."""
    if not u.is_floating_point():
        raise TypeError(f"u must be a real floating-point tensor, got {u.dtype}")
    if u.shape[channel_dim] != channels:
        raise ValueError(
            f"u must have {channels} channels in dimension {channel_dim}, "
            f"got shape {tuple(u.shape)}"
        )
    if u.ndim == 3 and u.shape[3 - channel_dim] < 1:
        raise ValueError(f"u must hold at least one sample, got shape {tuple(u.shape)}")


def check_finite_input(u: Tensor) -> None:
    """Raise ``ValueError`` if u holds NaN or infinities; skipped where values are not known yet."""
    if torch.compiler.is_compiling() or u.is_meta:
        return
    # The sum is a cheap first look; it may overflow, so that only a second look raises.
    if not bool(u.detach().sum().isfinite()) and not bool(u.detach().isfinite().all()):
        raise ValueError(
            "u must be finite, got NaN or infinities (an FFT would spread them over all times)"
        )


def length_mask(
    lengths: Shaped[Tensor, " batch"], batch: int, length: int
) -> Shaped[Tensor, "batch length"]:
    """True inside each sequence, ``[batch, length]``.

    Raises:
        TypeError: lengths are not integers.
        ValueError: not ``[batch]``, or not between 1 and ``length``.
    """
    if lengths.dtype == torch.bool or lengths.is_floating_point() or lengths.is_complex():
        raise TypeError(f"lengths must be integers, got {lengths.dtype}")
    if lengths.shape != (batch,):
        raise ValueError(f"lengths must have shape ({batch},), got {tuple(lengths.shape)}")
    if not torch.compiler.is_compiling() and not lengths.is_meta:
        least, most = (int(x) for x in lengths.aminmax())
        if least < 1 or most > length:
            raise ValueError(f"lengths must be from 1 to {length}, got {least} to {most}")
    return torch.arange(length, device=lengths.device) < lengths[:, None]
