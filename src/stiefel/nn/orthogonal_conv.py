"""Convolutions that are orthogonal by construction, or on the way there.

After Achour, Malgouyres, Mamalet (arXiv 2108.05623) for what can be orthogonal, Li et al. (2019)
for composed kernels, Trockman and Kolter (2021) for the Cayley transform.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stiefel.linalg._checks import check_finite, compute_dtype
from stiefel.linalg.autocast import without_autocast
from stiefel.linalg.block_conv import BlockPlan, block_kernel, block_plan, cayley_convolve
from stiefel.linalg.conv_geometry import check_channels, orthogonal_conv_exists, per_axis
from stiefel.linalg.conv_penalty import lorth
from stiefel.linalg.orthonormal_stack import orthonormal_stack
from stiefel.regularize.layer_kernels import layer_kernel

METHODS = ("bcop", "cayley", "penalty")
PADDINGS = ("circular", "valid")


class BlockOrthogonal(nn.Module):
    """Parametrisation of a kernel ``[M, C/groups, *k]``: orthogonal whatever its factors are.

    For :func:`torch.nn.utils.parametrize.register_parametrization`; :func:`orthogonal_conv` does
    that. The originals are a matrix and, where patches overlap, the bases of projectors (see
    :mod:`stiefel.linalg.block_conv`); they start uniformly distributed.

    Args:
        plan: From :func:`stiefel.linalg.block_conv.block_plan`.
        groups: Of the layer.
        generator: For the start.
    """

    exactly_orthogonal = True

    def __init__(
        self, plan: BlockPlan, groups: int = 1, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.plan, self.groups = plan, groups
        self._generator, self._started = generator, False

    def forward(self, *factors: Tensor) -> Float[Tensor, "*kernel"]:
        """The kernel ``[M, C/groups, *k]`` of these factors; half types in float32 inside."""
        dtype = factors[0].dtype
        with without_autocast(factors[0]):
            given = iter([x.to(compute_dtype(dtype)) for x in factors])
            base = next(given)
            right, left = (
                next(given) if shape[0] else base.new_empty(self.groups, *shape)
                for shape in (self.plan.right_shape, self.plan.left_shape)
            )
            return block_kernel(self.plan, base, right, left).flatten(0, 1).to(dtype)

    def right_inverse(self, weight: Float[Tensor, "*kernel"]) -> tuple[Tensor, ...]:
        """The start, when registered; of ``weight`` only shape, dtype and device are used.

        Raises:
            RuntimeError: later, as a kernel does not tell its factors. Assign those:
                ``conv.parametrizations.weight.original0`` and so on, or load a ``state_dict``.
        """
        if self._started:
            raise RuntimeError(
                "the weight of an orthogonal convolution cannot be assigned: it is computed from "
                "conv.parametrizations.weight.original0, …; assign those or load a state_dict"
            )
        drawn = start_factors(self.plan, self.groups, self._generator)
        self._started, self._generator = True, None
        return tuple(x.to(weight) for x in drawn if x.shape[1])


def start_factors(
    plan: BlockPlan, groups: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal factors for :func:`stiefel.linalg.block_conv.block_kernel`, uniform, float64."""
    base = orthonormal_stack(groups, *plan.base_shape, generator=generator, dtype=torch.float64)
    sides = []
    for count, n, half in (plan.right_shape, plan.left_shape):
        drawn = orthonormal_stack(groups * count, n, half, generator=generator, dtype=torch.float64)
        sides.append(drawn.reshape(groups, count, n, half))
    return base, sides[0], sides[1]


def orthogonal_conv(conv: nn.Module, *, generator: torch.Generator | None = None) -> nn.Module:
    """Make the kernel of a convolution orthogonal by construction, in place; returns ``conv``.

    As :func:`torch.nn.utils.parametrizations.orthogonal`, for the whole layer instead of the
    flattened kernel. With circular padding the layer is orthogonal; with zeros its singular values
    are at most 1. Whatever ``weight`` was is replaced by a random orthogonal kernel.
    ``torch.nn.utils.parametrize.cached()`` computes it once for several calls,
    ``remove_parametrizations(conv, "weight")`` leaves a plain layer with that kernel.

    Args:
        conv: ``nn.Conv1d``, ``nn.Conv2d`` or a transposed one, of stride 1 where dilated.
        generator: For the start.

    Raises:
        TypeError: not a convolution.
        ValueError: no orthogonal kernel exists for its numbers; the weight has a parametrisation.
        NotImplementedError: stride and dilation both above 1.
    """
    layer = layer_kernel(conv, "conv")
    if isinstance(conv, nn.Linear):
        raise TypeError("conv must be a convolution, got Linear (torch has one for those)")
    if parametrize.is_parametrized(conv, "weight"):
        raise ValueError("the weight of conv already has a parametrisation")
    plan = block_plan(layer.out_ch, layer.in_ch, layer.kernel_size, layer.stride)
    rule = BlockOrthogonal(plan, layer.groups, generator)
    return parametrize.register_parametrization(conv, "weight", rule)


class _OrthogonalConv(nn.Module):
    """What the layers of one and two axes share; comes before ``nn.Conv1d`` or ``nn.Conv2d``."""

    dim: int
    weight: Any
    bias: Any
    groups: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    _convolve: Any

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
        kernel_size: int | Iterable[int],
        stride: int | Iterable[int] = 1,
        groups: int = 1,
        bias: bool = True,
        method: str = "bcop",
        *,
        padding_mode: str = "circular",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        m, c = check_channels(out_ch, in_ch, groups)
        k = per_axis(kernel_size, self.dim, "kernel_size")
        s = per_axis(stride, self.dim, "stride")
        check_padding(m, c, k, s, padding_mode, method)
        circular = padding_mode == "circular"
        # What torch would pad with for odd kernels; forward pads by itself, for even ones too.
        place: dict[str, Any] = {
            "padding": tuple((n - 1) // 2 for n in k) if circular else 0,
            "padding_mode": "circular" if circular else "zeros",
        }
        # Made without numbers: torch's own start would draw from the global generator.
        super().__init__(
            in_ch, out_ch, k, s, groups=groups, bias=bias, device="meta", dtype=dtype, **place
        )
        self.to_empty(device=device or torch.get_default_device())
        self.method, self.boundary = method, padding_mode
        if method == "bcop":
            orthogonal_conv(self, generator=generator)
        self._start(m, c, generator)

    def _start(self, m: int, c: int, generator: torch.Generator | None) -> None:
        with torch.no_grad():
            if self.bias is not None:
                self.bias.zero_()
            if self.method == "cayley":
                nn.init.xavier_uniform_(self.weight, generator=generator)
                self.gain = nn.Parameter(self.weight.norm())
            elif self.method == "penalty":
                plan = block_plan(m, c, self.kernel_size, self.stride)
                kernel = block_kernel(plan, *start_factors(plan, self.groups, generator))
                self.weight.copy_(kernel.flatten(0, 1))

    @property
    def exactly_orthogonal(self) -> bool:
        """Whether the layer is orthogonal by construction: not with ``method="penalty"``."""
        return self.method != "penalty"

    def lorth(self) -> Float[Tensor, ""]:
        """L_orth of the kernel, for the loss of a layer with ``method="penalty"``.

        Raises:
            ValueError: the weight holds NaN or infinities, or is not the kernel (``"cayley"``).
        """
        if self.method == "cayley":
            raise ValueError("the weight of a Cayley layer is not its kernel; it is orthogonal")
        return lorth(self.weight, self.stride, self.groups)

    def forward(self, input: Float[Tensor, "*image"]) -> Float[Tensor, "*output"]:
        """``[batch, C, *S·N]`` or without batch to ``[…, M, *N]``; without padding, as torch does.

        Raises:
            ValueError: a wrong number of axes or channels, sizes that the stride does not divide
                (circular) or smaller than the kernel; with ``"cayley"`` NaN or Inf in ``input``.
        """
        self._check_input(input)
        if self.method == "cayley":
            return self._by_frequency(input)
        if self.boundary == "circular":
            ends = [n for k in reversed(self.kernel_size) for n in ((k - 1) // 2, k // 2)]
            if any(ends):
                input = nn.functional.pad(input, ends, mode="circular")
        return self._convolve(input, self.weight, self.bias, self.stride, groups=self.groups)

    def _by_frequency(self, input: Tensor) -> Tensor:
        # An FFT would spread them over the image.
        if not torch.compiler.is_compiling() and not input.is_meta:
            check_finite(input, "input")
        x = input if input.ndim == self.dim + 2 else input[None]
        with without_autocast(x):
            work = compute_dtype(self.weight.dtype)
            weight, gain = self.weight.to(work), self.gain.to(work)
            y = cayley_convolve(x.to(work), weight, gain, self.stride, self.groups)
            if self.bias is not None:
                y = y + self.bias.to(work).reshape(-1, *(1,) * self.dim)
        return (y if input.ndim == self.dim + 2 else y[0]).to(input.dtype)

    def _check_input(self, input: Tensor) -> None:
        image, channels = input.shape[-self.dim :], self.weight.shape[1] * self.groups
        if input.ndim not in (self.dim + 1, self.dim + 2) or input.shape[-self.dim - 1] != channels:
            raise ValueError(
                f"input must be [batch, {channels}, {', '.join('n' * self.dim)}] or without batch, "
                f"got shape {tuple(input.shape)}"
            )
        for n, k, s in zip(image, self.kernel_size, self.stride, strict=True):
            if self.boundary == "circular" and n % s:
                raise ValueError(
                    f"image sizes must be divisible by stride {tuple(self.stride)}, "
                    f"got {tuple(image)}"
                )
            if n < k:
                raise ValueError(
                    f"image sizes must be at least the kernel's {tuple(self.kernel_size)}, "
                    f"got {tuple(image)}"
                )

    def extra_repr(self) -> str:
        """Choices, for ``print(model)``."""
        return f"{super().extra_repr()}, method={self.method!r}, boundary={self.boundary!r}"


class OrthogonalConv1d(_OrthogonalConv, nn.Conv1d):
    """:class:`OrthogonalConv2d` with one axis: ``[batch, C, length]``."""

    dim = 1
    _convolve = staticmethod(nn.functional.conv1d)


class OrthogonalConv2d(_OrthogonalConv, nn.Conv2d):
    """A convolution whose matrix has orthonormal rows (M ≤ C·S²) or columns (M ≥ C·S²).

    A drop-in for ``nn.Conv2d(…, padding=(k − 1)//2, padding_mode="circular")``, with even kernels
    as well: the output is the input's size over S. All singular values are 1, at any image size.

    Args:
        in_ch: C.
        out_ch: M.
        kernel_size: k, one or one per axis.
        stride: S, one or one per axis.
        groups: The conditions hold for each group.
        bias: Learnable, starts at 0.
        method: ``"bcop"``: a k × k kernel composed of orthonormal factors, a parametrisation of
            ``weight``. ``"cayley"``: an orthogonal matrix per frequency, for every M, C, k, S; the
            kernel that acts is as large as the image, and time grows with its pixels.
            ``"penalty"``: a plain kernel with an orthogonal start, to be kept there by
            :class:`stiefel.regularize.OrthogonalityPenalty`.
        padding_mode: ``"circular"``, or ``"valid"``: rows that do not wrap around, still
            orthonormal; no such columns exist unless k = S.
        generator: For the start.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: no orthogonal kernel exists (the message names the inequality), numbers below 1,
            channels that groups does not divide, an unknown method or padding.
        TypeError: a size is not an integer.
    """

    dim = 2
    _convolve = staticmethod(nn.functional.conv2d)


def check_padding(
    m: int, c: int, k: tuple[int, ...], s: tuple[int, ...], padding_mode: str, method: str
) -> None:
    """Raise ``ValueError`` where the layer cannot be orthogonal under this padding."""
    if padding_mode in ("zeros", "zeros_same", "same"):
        raise ValueError(
            f"padding_mode must be one of {', '.join(PADDINGS)}, got {padding_mode!r}: zeros at "
            "the border leave only kernels that do not overlap (see orthogonal_conv_exists); "
            "orthogonal_conv(nn.Conv2d(…)) keeps singular values at most 1 with them"
        )
    if padding_mode not in PADDINGS:
        raise ValueError(f"padding_mode must be one of {', '.join(PADDINGS)}, got {padding_mode!r}")
    if method == "cayley":
        if padding_mode != "circular":
            raise ValueError("method='cayley' needs padding_mode='circular': it acts by FFT")
        return
    report = orthogonal_conv_exists(m, c, k, s, padding_mode, dim=len(k))
    if not report:
        raise ValueError(
            f"no orthogonal kernel exists: {report.reason}; the smallest L_orth is "
            f"{report.minimum:g}"
        )


def orthogonalize_(conv: nn.Module, steps: int = 500, tol: float = 1e-6) -> float:
    """Minimise L_orth of the kernel in place (L-BFGS in float64), for a start; returns L_orth.

    Stops at ``tol`` or after ``steps`` iterations. Unlike :func:`orthogonal_conv` it keeps close to
    the kernel that is there. Square architectures have local minima.

    Args:
        conv: A convolution of one or two axes, a transposed one, or ``nn.Linear``.
        steps: ≥ 1.
        tol: > 0.

    Warns:
        RuntimeWarning: stopped above ``tol``; says so for M = C·∏S, where another start may help.

    Raises:
        TypeError: another module.
        ValueError: no orthogonal kernel exists, a parametrised weight, ``steps`` or ``tol`` out of
            range, NaN or Inf.
        NotImplementedError: stride and dilation both above 1.
    """
    if steps < 1 or not 0 < tol < float("inf"):
        raise ValueError(f"steps must be at least 1 and tol above 0, got {steps} and {tol}")
    layer = layer_kernel(conv, "conv")
    if parametrize.is_parametrized(conv, "weight"):
        raise ValueError("the weight of conv is parametrised: it cannot be set")
    report = orthogonal_conv_exists(
        layer.out_ch, layer.in_ch, layer.kernel_size, layer.stride, dim=len(layer.stride)
    )
    if not report:
        raise ValueError(f"{report.reason}; the smallest L_orth is {report.minimum:g}")
    kernel = layer.weight().detach().to(torch.float64).clone().requires_grad_()

    def loss() -> Tensor:
        return lorth(kernel, layer.stride, layer.groups)

    def closure() -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return float(value.detach())

    optimizer = torch.optim.LBFGS(
        [kernel], max_iter=10, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe"
    )
    with torch.enable_grad():
        for _ in range(-(-steps // 10)):
            if float(loss().detach()) <= tol:
                break
            optimizer.step(closure)
    with torch.no_grad():
        layer.assign(kernel)
    reached = float(loss().detach())
    if reached > tol:
        hint = ": a local minimum of M = C·∏S?" if report.case == "square" else ""
        warnings.warn(
            f"L_orth is {reached:.2e} after {steps} steps, above tol = {tol:g}{hint}",
            RuntimeWarning,
            stacklevel=2,
        )
    return reached
