"""Fourier neural operators: blocks of a spectral convolution and a map of the channels.

Source: sheet of arXiv 2506.10973, "FNO block"; Li et al., arXiv 2010.08895. Arguments are named
as in the package ``neuraloperator``, whose weights fit.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from stiefel.nn.operators.checks import Sizes, check_field, positive, sizes
from stiefel.nn.operators.point_wise import (
    Activation,
    PointwiseLinear,
    PointwiseMLP,
    append_coordinates,
    autocast_on,
)
from stiefel.nn.operators.resample import resample
from stiefel.nn.operators.spectral import SpectralConv


class FNOBlock(nn.Module):
    """y = σ(SpectralConv(v) + W v), then, optionally, σ(MLP(y) + g ⊙ v).

    The second part is the channel MLP of later FNOs, with a gate g per channel on its skip.

    Args:
        in_channels: C_in.
        out_channels: C_out; with a channel MLP it must be C_in, for the gate.
        n_modes: As in :class:`SpectralConv`.
        ndim: Grid axes; default: as many as ``n_modes`` has numbers.
        activation: σ; None for a last block: between W v and the MLP there is none either then.
        channel_mlp_expansion: Hidden over outer channels of the MLP; None leaves it out.
        generator: For the start.

    Raises:
        TypeError, ValueError: as :class:`SpectralConv`; expansion not positive, unequal channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        n_modes: Sizes,
        ndim: int | None = None,
        *,
        activation: Activation | None = nn.functional.gelu,
        channel_mlp_expansion: float | int | None = 0.5,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"generator": generator, "device": device, "dtype": dtype}
        self.spectral = SpectralConv(in_channels, out_channels, n_modes, ndim, bias=True, **place)
        self.skip = PointwiseLinear(in_channels, out_channels, bias=False, **place)
        self.activation = activation
        self.mlp: PointwiseMLP | None = None
        self.gate: nn.Parameter | None = None
        if channel_mlp_expansion is not None:
            if in_channels != out_channels:
                raise ValueError(
                    "in_channels and out_channels must be equal with a channel MLP, got "
                    f"{in_channels} and {out_channels}; pass channel_mlp_expansion=None"
                )
            hidden = max(
                1, round(out_channels * positive(channel_mlp_expansion, "channel_mlp_expansion"))
            )
            self.mlp = PointwiseMLP((out_channels, hidden, out_channels), **place)
            self.gate = nn.Parameter(torch.ones(out_channels, device=device, dtype=dtype))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights anew; gates are 1."""
        for part in (self.spectral, self.skip, self.mlp):
            if part is not None:
                part.reset_parameters(generator)
        if self.gate is not None:
            nn.init.ones_(self.gate)

    def forward(
        self, x: Shaped[Tensor, "batch channels *grid"], output_shape: Sizes | None = None
    ) -> Shaped[Tensor, "batch out *other"]:
        """``[batch, C_out, *output_shape]``, on the grid of x unless told.

        Raises:
            TypeError, ValueError: as :class:`SpectralConv`.
        """
        check_field(x, self.spectral.in_channels, self.spectral.ndim)
        y = self.spectral.flat(x, output_shape)
        if output_shape is not None:
            # Point-wise maps and resampling commute.
            x = resample(x, output_shape)
        flat = x.flatten(2)
        if autocast_on(x):
            y = y + self.skip(flat)
        else:  # into the memory of y
            y = y.baddbmm_(self.skip.weight.expand(x.shape[0], -1, -1), flat)
        if self.activation is not None:
            y = self.activation(y)
        if self.mlp is not None and self.gate is not None:
            y = torch.addcmul(self.mlp(y), self.gate[:, None], flat)
            if self.activation is not None:
                y = self.activation(y)
        return y.unflatten(2, x.shape[2:])


class FNO(nn.Module):
    """Lifting, Fourier blocks, projection: a map of functions on a periodic box.

    Args:
        n_modes: Kept frequencies, one number per grid axis; one number with ``ndim``.
        in_channels: Of the input function.
        out_channels: Of the output function.
        hidden_channels: Width of the blocks.
        n_layers: Number of blocks; the last one has no activation.
        ndim: Grid axes; default: as many as ``n_modes`` has numbers.
        lifting_channel_ratio: Hidden over ``hidden_channels`` of the lifting MLP.
        projection_channel_ratio: The same of the projection.
        positional_embedding: ``"grid"`` adds the coordinates as channels, None does not.
        channel_mlp_expansion: Of :class:`FNOBlock`; None leaves the channel MLPs out.
        activation: Everywhere; see also :class:`FilteredActivation`.
        generator: For the start.

    Raises:
        TypeError, ValueError: Numbers out of range; the message says what is allowed.
    """

    def __init__(
        self,
        n_modes: Sizes,
        in_channels: int,
        out_channels: int,
        hidden_channels: int,
        n_layers: int = 4,
        *,
        ndim: int | None = None,
        lifting_channel_ratio: float | int = 2,
        projection_channel_ratio: float | int = 2,
        positional_embedding: str | None = "grid",
        channel_mlp_expansion: float | int | None = 0.5,
        activation: Activation = nn.functional.gelu,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if positional_embedding not in ("grid", None):
            raise ValueError(
                f'positional_embedding must be "grid" or None, got {positional_embedding!r}'
            )
        self.n_modes = sizes(n_modes, ndim, "n_modes")
        self.ndim, self.positional_embedding = len(self.n_modes), positional_embedding
        self.in_channels = sizes(in_channels, 1, "in_channels")[0]
        width = sizes(hidden_channels, 1, "hidden_channels")[0]
        layers = sizes(n_layers, 1, "n_layers")[0]
        place: dict[str, Any] = {"generator": generator, "device": device, "dtype": dtype}
        inputs = in_channels + (self.ndim if positional_embedding else 0)
        up = max(1, int(width * positive(lifting_channel_ratio, "lifting_channel_ratio")))
        down = max(1, int(width * positive(projection_channel_ratio, "projection_channel_ratio")))
        self.lifting = PointwiseMLP((inputs, up, width), activation, **place)
        self.blocks: Any = nn.ModuleList(
            FNOBlock(
                width,
                width,
                self.n_modes,
                activation=activation if i < layers - 1 else None,
                channel_mlp_expansion=channel_mlp_expansion,
                **place,
            )
            for i in range(layers)
        )
        self.projection = PointwiseMLP((width, down, out_channels), activation, **place)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights anew."""
        for part in (self.lifting, *self.blocks, self.projection):
            part.reset_parameters(generator)

    def forward(
        self, x: Shaped[Tensor, "batch channels *grid"], output_shape: Sizes | None = None
    ) -> Shaped[Tensor, "batch out *other"]:
        """``[batch, out_channels, *grid]`` for x ``[batch, in_channels, *grid]`` on any grid j/N.

        ``output_shape`` asks for another grid; the last block changes to it.

        Raises:
            TypeError, ValueError: as :class:`SpectralConv`.
        """
        check_field(x, self.in_channels, self.ndim)
        x = self.lifting(append_coordinates(x) if self.positional_embedding else x)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.projection(self.blocks[-1](x, output_shape))
