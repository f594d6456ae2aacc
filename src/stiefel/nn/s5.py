"""S5: one diagonal state space for all channels, computed by a parallel scan.

Sources: Smith et al., arXiv 2208.04933, "Simplified State Space Layers for Sequence Modeling", and
the authors' code; start ``"ptd"``: Yu et al., arXiv 2310.01698.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Complex, Float, Shaped
from torch import Tensor, nn

from stiefel.linalg._checks import HALF_TYPES
from stiefel.linalg.autocast import without_autocast
from stiefel.nn.s4d import check_finite_input, check_sequence, length_mask
from stiefel.nn.s4d_init import check_discretisation, discretize
from stiefel.nn.s4d_kernel import check_rate
from stiefel.nn.s5_init import s5_init
from stiefel.nn.scan import scan

_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}
# `clip_eigs`: slowest decay allowed (authors' code).
CLIPPED = -1e-4
TRAINED_SLOWLY = ("log_dt", "a_re", "a_im", "B")


class S5System(NamedTuple):
    """One step: x_t = a x_{t-1} + b u_t, y_t = Re Σ c x_t (weights of pairs are in c)."""

    a: Complex[Tensor, " modes"]
    b: Complex[Tensor, "modes H"]
    c: Complex[Tensor, "directions H modes"]


class S5(nn.Module):
    """A linear sequence layer: H channels in, one state of P complex modes, H channels out.

        x_t = Ā x_{t-1} + B̄ u_t,   y_t = Re Σ w C̃ x_t + D u_t

    with Ā = exp(A dt), B̄ = (Ā - 1)/A · B̃ (``"zoh"``), and a step size dt for every mode. The
    nonlinearity and the gate around it are in :class:`~stiefel.nn.S5Block`.

    Parameters: ``log_dt``, ``a_re``, ``a_im`` [M] with A = -exp(a_re) + i a_im, so that the layer
    is stable whatever training does; ``B`` [M, H, 2] and ``C`` [directions, H, M, 2], complex as
    real pairs; ``D`` [H]; buffer ``weights`` [M]. M is P/2 with ``conj_sym`` (more if eigenvalues
    are real), else P. They stay in float32 or float64 whatever the model around them is cast to.

    Args:
        d_model: H.
        d_state: P, size of the real state that is diagonalised.
        blocks: the start is this many copies of LegS of order P / blocks.
        init: ``"legs-normal"`` (S5) or ``"ptd"`` (S5-PTD).
        disc: ``"zoh"`` or ``"bilinear"``.
        conj_sym: store one of each conjugate pair. Without, all: the same function at the start,
            twice the work, and outputs are real parts of an unconstrained complex system later.
        bidirectional: a second output map reads a scan from the future; no states, no steps then.
        clip_eigs: keep Re A ≤ -1e-4.
        dt_min, dt_max: step sizes start log-uniform between these; 1/dt should cover the time
            scales of the task.
        t: of ``"ptd"``, the part of P Pᵀ that is added to LegS, in (0, 1].
        lr: learning rate for dt, A, B that ``ssm_param_groups`` takes over; 0 freezes them.
        generator: for all random numbers of the start.

    Raises:
        ValueError: a setting out of range; the message says what is allowed.
        TypeError: ``dtype`` is neither float32 nor float64.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        blocks: int = 1,
        init: str = "legs-normal",
        disc: str = "zoh",
        conj_sym: bool = True,
        bidirectional: bool = False,
        clip_eigs: bool = False,
        dt_min: float | int = 1e-3,
        dt_max: float | int = 1e-1,
        *,
        t: float | int = 0.1,
        lr: float | int | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dtype = dtype or torch.get_default_dtype()
        check_discretisation(disc)
        if not (0 < dt_min <= dt_max and math.isfinite(dt_max)):
            raise ValueError(
                f"0 < dt_min ≤ dt_max is needed, got dt_min={dt_min} and dt_max={dt_max}"
            )
        if lr is not None and not (lr >= 0 and math.isfinite(lr)):
            raise ValueError(f"lr must be None or finite and ≥ 0, got {lr}")
        if dtype not in _COMPLEX:
            raise TypeError(f"dtype must be float32 or float64 (phases need it), got {dtype}")
        start = s5_init(
            d_model, d_state, blocks, init,
            t=t, conj_sym=conj_sym, directions=2 if bidirectional else 1, generator=generator,
        )  # fmt: skip
        uniform = torch.rand(len(start.a), generator=generator, dtype=torch.float64)
        log_dt = math.log(dt_min) + uniform * (math.log(dt_max) - math.log(dt_min))
        d = torch.randn(d_model, generator=generator, dtype=torch.float64)
        self.d_model, self.d_state, self.blocks = d_model, d_state, blocks
        self.init, self.disc, self.conj_sym = init, disc, conj_sym
        self.bidirectional, self.clip_eigs, self.lr = bidirectional, clip_eigs, lr

        def parameter(x: Tensor, trained: bool = lr != 0) -> nn.Parameter:
            return nn.Parameter(x.to(device=device, dtype=dtype), requires_grad=trained)

        self.log_dt = parameter(log_dt)
        self.a_re, self.a_im = parameter((-start.a.real).log()), parameter(start.a.imag)
        self.B = parameter(torch.view_as_real(start.b))
        self.C = parameter(torch.view_as_real(start.c), trained=True)
        self.D = parameter(d, trained=True)
        self.weights: Tensor
        self.register_buffer("weights", start.weights.to(device=device, dtype=dtype))
        self._frozen: tuple[tuple[Any, ...], S5System] | None = None

    @property
    def A(self) -> Complex[Tensor, " modes"]:
        """The diagonal in continuous time, in float64's precision."""
        real = -_double(self.a_re).exp()
        if self.clip_eigs:
            real = real.clamp(max=CLIPPED)
        return torch.complex(real, _double(self.a_im))

    @property
    def dt(self) -> Float[Tensor, " modes"]:
        """Step sizes, in float64's precision."""
        return _double(self.log_dt).exp()

    @property
    def modes(self) -> int:
        """M, complex numbers in a state."""
        return len(self.log_dt)

    @property
    def complex_dtype(self) -> torch.dtype:
        """Of states."""
        return _COMPLEX[self.D.dtype]

    @property
    def optim_hints(self) -> dict[str, dict[str, float | None]]:
        """Learning rate (None: the caller's limit) and weight decay, for ``ssm_param_groups``."""
        return {name: {"lr": self.lr, "weight_decay": 0.0} for name in TRAINED_SLOWLY}

    def system(self, rate: float | int = 1.0) -> S5System:
        """The discrete system, computed in float64, in the precision of states.

        Raises:
            RuntimeError: a parameter holds NaN or infinities; the message names it.
            ValueError: ``rate`` is not positive and finite.
        """
        check_rate(rate)
        if not torch.compiler.is_compiling():
            self._check_parameters()
        a = self.A
        log_a, unit = discretize(a, torch.ones_like(a), rate * self.dt, self.disc)
        b = unit[:, None] * torch.view_as_complex(_double(self.B))
        c = torch.view_as_complex(self.C) * self.weights
        dtype = self.complex_dtype
        return S5System(log_a.exp().to(dtype), b.to(dtype), c)

    def forward(
        self,
        u: Shaped[Tensor, "batch length H"],
        state: Tensor | None = None,
        rate: float | int = 1.0,
        *,
        lengths: Shaped[Tensor, " batch"] | None = None,
    ) -> tuple[Float[Tensor, "batch length H"], Complex[Tensor, "batch modes"] | None]:
        """Whole sequences at once; ``(y, new_state)``, y of the shape and dtype of u.

        Args:
            u: ``[batch, length, H]``.
            state: ``[batch, M]`` complex, what an earlier part of the sequence ended with.
            rate: factor on the step sizes: 2 for sequences sampled half as often.
            lengths: ``[batch]`` integers, 1 to length: what comes later in a sequence is not
                looked at, gives 0, and leaves the state alone.

        Raises:
            TypeError: u is not real floating point, state not complex, or lengths not integers.
            ValueError: wrong shape, length 0, NaN or infinities in u, lengths out of range, a state
                of the wrong shape or for a bidirectional layer (which has none: new_state is None).
            RuntimeError: a parameter holds NaN or infinities.
        """
        check_sequence(u, self.d_model, channel_dim=2)
        x, inside = u, None
        if lengths is not None:
            inside = length_mask(lengths, u.shape[0], u.shape[1])[..., None]
            x = torch.where(inside, u, 0.0)
        check_finite_input(x)
        self._check_state(state, u.shape[0])
        with without_autocast(x):
            x = x.to(self.D.dtype)
            system = self.system(rate)
            # Complex maps as real ones with (Re, Im) side by side: only the scan is complex.
            into = torch.view_as_real(system.b).permute(1, 0, 2).flatten(1)
            drive = (x @ into).unflatten(-1, (self.modes, 2))
            drive = torch.view_as_complex(drive.contiguous())
            states = scan(system.a, drive, state)
            y = _read(system.c[0], states) + self.D * x
            if self.bidirectional:
                y = y + _read(system.c[1], scan(system.a, drive, reverse=True))
        y = y.to(u.dtype)
        if inside is not None:
            y = torch.where(inside, y, 0.0)
        if self.bidirectional:
            return y, None
        if lengths is None:
            return y, states[:, -1].clone()  # a view would keep all states alive
        last = lengths.to(u.device)[:, None, None].long() - 1
        return y, torch.take_along_dim(states, last, dim=1)[:, 0]

    def step(
        self, u: Shaped[Tensor, "batch H"], state: Tensor | None = None, rate: float | int = 1.0
    ) -> tuple[Float[Tensor, "batch H"], Complex[Tensor, "batch modes"]]:
        """One sample per sequence: time and memory do not depend on the past.

        ``state`` is what the last call returned, ``[batch, M]`` complex; None at the start.

        Raises:
            TypeError, ValueError: as :meth:`forward`; also for a bidirectional layer.
        """
        self._check_direction()
        check_sequence(u, self.d_model, channel_dim=1)
        check_finite_input(u)
        self._check_state(state, u.shape[0])
        if state is None:
            state = self.initial_state(u.shape[0])
        with without_autocast(u):
            system, x = self._step_system(rate), u.to(self.D.dtype)
            state = system.a * state + x.to(system.b.dtype) @ system.b.mT
            y = (state @ system.c[0].mT).real + self.D * x
        return y.to(u.dtype), state

    def initial_state(self, batch: int) -> Complex[Tensor, "batch modes"]:
        """Zeros ``[batch, M]``: nothing seen yet."""
        return torch.zeros(batch, self.modes, dtype=self.complex_dtype, device=self.D.device)

    def setup_step(self, rate: float | int = 1.0) -> None:
        """Compute Ā, B̄ and C once for all following steps at this ``rate``.

        They are dropped by :meth:`train`, by loading or moving parameters, and by optimizer steps;
        after writing to ``parameter.data`` call this again.

        Raises:
            ValueError: the layer is bidirectional, or ``rate`` is not positive.
        """
        self._check_direction()
        with torch.no_grad():
            self._frozen = (self._versions(rate), self.system(rate))

    def train(self, mode: bool = True) -> S5:
        """Switch between training and evaluation; what :meth:`setup_step` kept is dropped."""
        self._frozen = None
        return super().train(mode)

    def _step_system(self, rate: float | int) -> S5System:
        # A compiled step must not hold on to numbers, and cannot see versions.
        if self._frozen is not None and not torch.compiler.is_compiling():
            versions, system = self._frozen
            if versions == self._versions(rate):
                return system
        return self.system(rate)

    def _versions(self, rate: float | int) -> tuple[Any, ...]:
        """Changes whenever a parameter or the weights are written to or replaced."""
        kept = (*self.parameters(), self.weights)
        # What was made under inference_mode carries no version; it cannot be trained either.
        return rate, *((x.data_ptr(), 0 if x.is_inference() else x._version) for x in kept)

    def _check_parameters(self) -> None:
        """One look at all parameters; only if it fails, which one it was."""
        parameters = dict(self.named_parameters())
        if any(p.is_meta for p in parameters.values()):
            return
        if not bool(torch.stack([p.detach().sum() for p in parameters.values()]).isfinite().all()):
            for name, p in parameters.items():
                if not bool(p.detach().isfinite().all()):
                    raise RuntimeError(
                        f"{name} of S5 holds NaN or infinities, probably after too large an "
                        "optimizer step: ssm_param_groups gives dt, A and B a small learning rate"
                    )

    def _check_direction(self) -> None:
        if self.bidirectional:
            raise ValueError("a bidirectional layer needs the whole sequence: it has no step")

    def _check_state(self, state: Tensor | None, batch: int) -> None:
        if state is None:
            return
        if self.bidirectional:
            raise ValueError("a bidirectional layer has no state to start from")
        if tuple(state.shape) != (batch, self.modes):
            raise ValueError(
                f"state must have shape {(batch, self.modes)}, got {tuple(state.shape)}"
            )
        if not state.is_complex():
            raise TypeError(f"state must be complex, got {state.dtype}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> S5:
        """Move and cast like any module, but never to half precision."""

        def kept(x: Tensor) -> Tensor:
            out = fn(x)
            if out.dtype in HALF_TYPES and x.dtype not in HALF_TYPES:
                return x.to(out.device)
            return out

        return super()._apply(kept, recurse)

    def extra_repr(self) -> str:
        """Sizes and choices, for ``print(model)``."""
        text = f"{self.d_model}, d_state={self.d_state}, blocks={self.blocks}, init={self.init!r}"
        return f"{text}, disc={self.disc!r}, bidirectional={self.bidirectional}"


def _double(x: Tensor) -> Tensor:
    return x if x.device.type == "mps" else x.to(torch.float64)


def _read(c: Tensor, states: Tensor) -> Tensor:
    """Re(states @ cᵀ) as a real product: Re(c x) = Re c Re x - Im c Im x."""
    table = torch.view_as_real(c.conj().resolve_conj()).flatten(-2)
    return torch.view_as_real(states).flatten(-2) @ table.mT
