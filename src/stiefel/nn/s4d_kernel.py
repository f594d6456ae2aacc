"""The convolution kernel of diagonal state spaces: K[l] = 2 Re Σ_n C_n B̄_n Ā_n^l.

Source: Gu et al., arXiv 2206.11893, section 3; Algorithm 1 is the plain Vandermonde that the block
form here replaces.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn

from stiefel.linalg._checks import HALF_TYPES
from stiefel.linalg.autocast import without_autocast
from stiefel.nn._vandermonde import multiply
from stiefel.nn.s4d_init import (
    check_discretisation,
    check_state_size,
    discretize,
    s4d_init,
)

_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}
# relu alone would let a mode stop decaying (authors' code).
RELU_FLOOR = 1e-4
# -Re A from the stored number, and back.
REAL_TRANSFORMS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "exp": (torch.exp, torch.log),
    "relu": (lambda x: torch.relu(x) + RELU_FLOOR, lambda r: r - RELU_FLOOR),
    "softplus": (nn.functional.softplus, lambda r: r + torch.log(-torch.expm1(-r))),
    "sigmoid": (torch.sigmoid, torch.logit),
    "none": (lambda x: x, lambda r: r),
}


class System(NamedTuple):
    """One step of all channels: x_t = exp(log_a) x_{t-1} + b u_t, y_t = 2 Re Σ_n c x_t."""

    log_a: Complex[Tensor, "channels modes"]
    b: Complex[Tensor, "channels modes"]
    c: Complex[Tensor, "kernels channels modes"]


def vandermonde_kernel(
    A: Complex[Tensor, "#H modes"],
    B: Complex[Tensor, "#H modes"],
    C: Complex[Tensor, "kernels H modes"],
    dt: Float[Tensor, " H"] | Float[Tensor, "H 1"],
    L: int,
    disc: str = "zoh",
    rate: float | int = 1.0,
) -> Float[Tensor, "kernels H L"]:
    """K[l] = 2 Re Σ_n C_n B̄_n Ā_n^l for l = 0 … L - 1, one kernel per channel and row of C.

    Time and memory are those of two tables of about √L rows: nothing of size H × modes × L is made.

    Args:
        A, B: ``[H, modes]`` or ``[1, modes]``, one of each conjugate pair.
        C: ``[kernels, H, modes]``; its precision is that of the kernel, the exponents are computed
            in float64 where the device has it.
        dt: step sizes, ``[H]`` or ``[H, 1]``, in units of time per sample.
        rate: factor on ``dt``.

    Raises:
        ValueError: ``L`` below 1, ``rate`` not positive, unknown ``disc``.
    """
    L = check_length(L)
    check_rate(rate)
    real = _work_dtype(C)
    work = _COMPLEX[real]
    step = rate * dt.reshape(-1, 1).to(real)
    log_a, b = discretize(A.to(work), B.to(work), step, disc)
    return multiply(2 * C.to(work) * b, log_a.expand(C.shape[1:]), L, C.dtype)


def check_length(length: int) -> int:
    """Raise ``ValueError`` unless ``length`` is at least 1."""
    if not torch.compiler.is_compiling():
        length = operator.index(length)
    if length < 1:
        raise ValueError(f"the length L must be at least 1, got {length}")
    return length


def check_rate(rate: float | int) -> None:
    """Raise ``ValueError`` unless ``rate`` is positive and finite."""
    if not (rate > 0 and math.isfinite(rate)):
        raise ValueError(f"rate must be positive and finite, got {rate}")


def _work_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


class S4DKernel(nn.Module):
    """Trainable kernel of ``d_model`` independent diagonal systems with ``d_state / 2`` modes each.

    Parameters: ``log_dt`` [H, 1]; ``a_re``, ``a_im`` [S, N/2] with A = -transform(a_re) + i a_im;
    ``B`` [S, N/2, 2] and ``C`` [channels, H, N/2, 2], complex as real pairs, so that sharding,
    optimizers and ``state_dict`` see real numbers only. They stay in float32 or float64 whatever
    the model around them is cast to: in half precision the phases l · dt · Im A would be noise.

    Args:
        d_model: H, number of channels.
        d_state: N, even.
        channels: kernels per channel of the input.
        init: a name of :func:`s4d_init`, or ``(A, B)``, complex ``[N/2]`` each.
        disc: ``"zoh"`` or ``"bilinear"``.
        dt_min, dt_max: step sizes start log-uniform between these, in units of time per sample.
            1/dt should cover the time scales of the task: ``dt_min`` about 1/L.
        real_transform: how Re A < 0 is kept: exp, relu, softplus, sigmoid, none.
        n_ssm: S, how many different (A, B) the channels share; H by default. Must divide H.
        bandlimit: drop modes with dt |Im A|/2π ≥ bandlimit/2 (dt without ``rate``); 1 is Nyquist.
        lr: learning rate for dt, A, B that :func:`ssm_param_groups` takes over; 0 freezes them.
        scale_real, scale_imag, official_clip: as in :func:`s4d_init`.
        generator: for every random number.

    Raises:
        ValueError: sizes, names or ranges out of what is said here.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        channels: int = 1,
        init: str | tuple[Tensor, Tensor] = "legs",
        disc: str = "zoh",
        dt_min: float | int = 1e-3,
        dt_max: float | int = 1e-1,
        real_transform: str = "exp",
        n_ssm: int | None = None,
        bandlimit: float | int | None = None,
        lr: float | int | None = None,
        *,
        scale_real: float | int = 1.0,
        scale_imag: float | int = 1.0,
        official_clip: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        d_state = check_state_size(d_state)
        n_ssm = d_model if n_ssm is None else n_ssm
        dtype = dtype or torch.get_default_dtype()
        _check_settings(d_model, channels, n_ssm, dt_min, dt_max, bandlimit, lr, dtype)
        check_discretisation(disc)
        if real_transform not in REAL_TRANSFORMS:
            raise ValueError(
                f"real_transform must be one of {', '.join(REAL_TRANSFORMS)}, "
                f"got {real_transform!r}"
            )
        self.d_model, self.d_state, self.channels = d_model, d_state, channels
        self.disc, self.real_transform, self.bandlimit = disc, real_transform, bandlimit
        self.lr = lr
        uniform = torch.rand(d_model, 1, generator=generator, dtype=torch.float64)
        log_dt = math.log(dt_min) + uniform * (math.log(dt_max) - math.log(dt_min))
        scales: dict[str, Any] = {"scale_real": scale_real, "scale_imag": scale_imag}
        a, b = _start(init, d_state, n_ssm, generator, official_clip=official_clip, **scales)
        shape = (channels, d_model, d_state // 2, 2)
        c = torch.randn(shape, generator=generator, dtype=torch.float64) * math.sqrt(0.5)
        trained = lr != 0

        def parameter(x: Tensor, trained: bool = True) -> nn.Parameter:
            return nn.Parameter(x.to(device=device, dtype=dtype), requires_grad=trained)

        self.log_dt = parameter(log_dt, trained)
        self.a_re = parameter(_stored_real(a, real_transform), trained)
        self.a_im = parameter(a.imag, trained)
        self.B = parameter(torch.view_as_real(b), trained)
        self.C = parameter(c)

    @property
    def A(self) -> Complex[Tensor, "systems modes"]:
        """The diagonal in continuous time, ``[S, N/2]`` complex, in float64's precision."""
        transform = REAL_TRANSFORMS[self.real_transform][0]
        decay = transform(self.a_re.to(_work_dtype(self.a_re)))
        return torch.complex(-decay, self.a_im.to(decay.dtype))

    @property
    def dt(self) -> Float[Tensor, "H 1"]:
        """Step sizes ``[H, 1]``, in float64's precision."""
        return self.log_dt.to(_work_dtype(self.log_dt)).exp()

    @property
    def dtype(self) -> torch.dtype:
        """Of kernels: that of the parameters."""
        return self.C.dtype

    @property
    def complex_dtype(self) -> torch.dtype:
        """Of states."""
        return _COMPLEX[self.C.dtype]

    @property
    def optim_hints(self) -> dict[str, dict[str, float | None]]:
        """Learning rate (None: the caller's limit) and weight decay by parameter name."""
        return {
            name: {"lr": self.lr, "weight_decay": 0.0} for name in ("log_dt", "a_re", "a_im", "B")
        }

    def system(self, rate: float | int = 1.0) -> System:
        """The discrete system of every channel, complex128 (complex64 on MPS).

        Raises:
            RuntimeError: a parameter holds NaN or infinities; the message names it.
            ValueError: ``rate`` is not positive.
        """
        check_rate(rate)
        if not torch.compiler.is_compiling():
            self._check_parameters()
        with without_autocast(self.C):
            a, dt = self.A, self.dt
            repeats = self.d_model // a.shape[0]
            a = a.repeat(repeats, 1)
            b = torch.view_as_complex(self.B.to(dt.dtype)).repeat(repeats, 1)
            c = torch.view_as_complex(self.C.to(dt.dtype))
            if self.bandlimit is not None:
                c = c * (dt * a.imag.abs() / (2 * math.pi) < self.bandlimit / 2)
            log_a, b = discretize(a, b, rate * dt, self.disc)
        return System(log_a, b, c)

    def forward(self, L: int, rate: float | int = 1.0) -> Float[Tensor, "kernels H L"]:
        """K ``[channels, H, L]``, in the precision of the parameters, also under autocast.

        Raises:
            ValueError: ``L`` below 1 or ``rate`` not positive.
            RuntimeError: a parameter holds NaN or infinities.
        """
        return self.kernel(self.system(rate), L)

    def kernel(self, system: System, length: int) -> Float[Tensor, "kernels H L"]:
        """K of a system that :meth:`system` gave."""
        length = check_length(length)
        with without_autocast(self.C):
            return multiply(2 * system.c * system.b, system.log_a, length, self.complex_dtype)

    def _check_parameters(self) -> None:
        """One look at all parameters; only if it fails, which one it was."""
        parameters = dict(self.named_parameters(recurse=False))
        if any(p.is_meta for p in parameters.values()):
            return
        sums = torch.stack([p.detach().sum() for p in parameters.values()])
        if not bool(sums.isfinite().all()):
            for name, p in parameters.items():
                if not bool(p.detach().isfinite().all()):
                    raise RuntimeError(
                        f"{name} of S4DKernel holds NaN or infinities, probably after too large an "
                        "optimizer step: ssm_param_groups gives dt, A and B a small learning rate"
                    )
        if self.real_transform == "none" and bool((self.a_re.detach() <= 0).any()):
            warnings.warn(
                "Re A ≥ 0: the system is unstable; real_transform='none' does not prevent it",
                RuntimeWarning,
                stacklevel=3,
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> S4DKernel:
        """Move and cast like any module, but never to half precision."""

        def kept(t: Tensor) -> Tensor:
            out = fn(t)
            if out.dtype in HALF_TYPES and t.dtype not in HALF_TYPES:
                return t.to(out.device)
            return out

        return super()._apply(kept, recurse)

    def extra_repr(self) -> str:
        """Sizes and choices, for ``print(model)``."""
        text = f"{self.d_model}, d_state={self.d_state}, channels={self.channels}"
        return f"{text}, disc={self.disc!r}, real_transform={self.real_transform!r}"


def _check_settings(
    d_model: int,
    channels: int,
    n_ssm: int,
    dt_min: float | int,
    dt_max: float | int,
    bandlimit: float | int | None,
    lr: float | int | None,
    dtype: torch.dtype,
) -> None:
    for name, size in (("d_model", d_model), ("channels", channels), ("n_ssm", n_ssm)):
        if operator.index(size) < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if d_model % n_ssm:
        raise ValueError(f"n_ssm must divide d_model = {d_model}, got {n_ssm}")
    if not (0 < dt_min <= dt_max and math.isfinite(dt_max)):
        raise ValueError(f"0 < dt_min ≤ dt_max is needed, got dt_min={dt_min} and dt_max={dt_max}")
    if bandlimit is not None and not (bandlimit > 0 and math.isfinite(bandlimit)):
        raise ValueError(f"bandlimit must be positive and finite, got {bandlimit}")
    if lr is not None and not (lr >= 0 and math.isfinite(lr)):
        raise ValueError(f"lr must be None or finite and ≥ 0, got {lr}")
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype must be float32 or float64 (phases need it), got {dtype}")


def _start(
    init: str | tuple[Tensor, Tensor],
    d_state: int,
    n_ssm: int,
    generator: torch.Generator | None,
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    """A and B of all systems, ``[n_ssm, d_state / 2]``."""
    if isinstance(init, str):
        if init == "random":
            drawn = [s4d_init(init, d_state, generator=generator, **settings) for _ in range(n_ssm)]
            a, b = (torch.stack(parts) for parts in zip(*drawn, strict=True))
            return a, b
        a, b = s4d_init(init, d_state, **settings)
    else:
        a, b = (torch.as_tensor(x, dtype=torch.complex128, device="cpu").detach() for x in init)
        if a.shape != (d_state // 2,) or b.shape != a.shape:
            raise ValueError(
                f"init = (A, B) needs d_state / 2 = {d_state // 2} entries each, got shapes "
                f"{tuple(a.shape)} and {tuple(b.shape)}"
            )
        if not bool((a.isfinite() & b.isfinite()).all()):
            raise ValueError("init = (A, B) must be finite, got NaN or infinite entries")
    return a.repeat(n_ssm, 1), b.repeat(n_ssm, 1)


def _stored_real(a: Tensor, transform: str) -> Tensor:
    """The number whose transform is -Re A."""
    stored = REAL_TRANSFORMS[transform][1](-a.real)
    if not bool(stored.isfinite().all()):
        raise ValueError(
            f"real_transform {transform!r} cannot give Re A between {float(a.real.min()):.3g} and "
            f"{float(a.real.max()):.3g}"
            + ("; sigmoid reaches -1 only" if transform == "sigmoid" else "; Re A must be negative")
        )
    return stored
