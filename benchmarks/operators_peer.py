"""Layers of stiefel.nn.operators and of neuraloperator with the same weights, on the same input."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stiefel.nn.operators import (
    FNO,
    DifferentialConv,
    FNOBlock,
    IntegralAttention,
    KernelIntegral,
    SpectralConv,
)


def has_peer() -> bool:
    return importlib.util.find_spec("neuralop") is not None


def filled(module: nn.Module, size_of_weights: float = 0.3) -> Any:
    """Every parameter 0.3 sin(1.7 i + its number), i counting its entries; twice if complex.

    The same recipe makes the reference values of tests/nn/test_operators_layers_peer.py.
    """
    with torch.no_grad():
        for number, p in enumerate(module.parameters()):
            size = p.numel() * (2 if p.is_complex() else 1)
            values = torch.sin(1.7 * torch.arange(size, dtype=torch.float64) + number)
            values = size_of_weights * values
            values = torch.view_as_complex(values.view(-1, 2)) if p.is_complex() else values
            p.copy_(values.view(p.shape))
    return module


def sample(*shape: int) -> Tensor:
    """cos(0.9 i), i counting entries."""
    count = torch.Size(shape).numel()
    return torch.cos(0.9 * torch.arange(count, dtype=torch.float64)).view(shape).float()


def places(count: int, ndim: int) -> Tensor:
    """Low-discrepancy points in the unit box."""
    roots = torch.tensor([0.7548776662466927, 0.5698402909980532])[:ndim]
    return (torch.arange(1, count + 1)[:, None] * roots) % 1


def copy(ours: Tensor, theirs: Tensor) -> None:
    with torch.no_grad():
        theirs.copy_(ours.reshape(theirs.shape))


def copy_block(ours: FNOBlock, peer: Any, i: int) -> None:
    """Weights of a Fourier block into block ``i`` of the peer."""
    copy(ours.spectral.weight, peer.convs[i].weight.tensor)
    copy(ours.spectral.bias, peer.convs[i].bias)
    copy(ours.skip.weight, peer.fno_skips[i].conv.weight)
    copy(ours.gate, peer.channel_mlp_skips[i].weight)
    for mine, his in zip(ours.mlp.layers, peer.channel_mlp[i].fcs, strict=True):
        copy(mine.weight, his.weight)
        copy(mine.bias, his.bias)


def copy_model(ours: FNO, peer: Any) -> None:
    """Weights of a whole FNO."""
    for mine, his in ((ours.lifting, peer.lifting), (ours.projection, peer.projection)):
        for a, b in zip(mine.layers, his.fcs, strict=True):
            copy(a.weight, b.weight)
            copy(a.bias, b.bias)
    for i, block in enumerate(ours.blocks):
        copy_block(block, peer.fno_blocks, i)


def spectral_pair(ndim: int) -> tuple[Tensor, Tensor]:
    from neuralop.layers.spectral_convolution import SpectralConv as Peer

    modes = (6, 4, 4)[:ndim]
    ours, peer = filled(SpectralConv(2, 3, modes, bias=True)), Peer(2, 3, modes)
    copy(ours.weight, peer.weight.tensor)
    copy(ours.bias, peer.bias)
    x = sample(2, 2, *(8, 10, 6)[:ndim])
    return ours(x), peer(x)


def block_pair() -> tuple[Tensor, Tensor]:
    from neuralop.layers.fno_block import FNOBlocks

    ours, peer = filled(FNOBlock(4, 4, (4, 4))), FNOBlocks(4, 4, (4, 4), n_layers=2)
    copy_block(ours, peer, 0)
    x = sample(2, 4, 8, 6)
    return ours(x), peer(x, 0)


def model_pair() -> tuple[Tensor, Tensor]:
    from neuralop.models import FNO as Peer

    ours, peer = filled(FNO((4, 4), 2, 1, 6, n_layers=2), 0.6), Peer((4, 4), 2, 1, 6, n_layers=2)
    copy_model(ours, peer)
    x = sample(2, 2, 8, 10)
    return ours(x), peer(x)


def graph_pair(transform: str) -> tuple[Tensor, Tensor]:
    from neuralop.layers.integral_transform import IntegralTransform
    from neuralop.layers.neighbor_search import NeighborSearch

    values = transform == "nonlinear"
    ours = filled(
        KernelIntegral(3, 3, 0.4, (6,), ndim=2, embedding=None, use_values=values, reduction="sum")
    )
    peer = IntegralTransform(
        channel_mlp_layers=[7 if values else 4, 6, 3], transform_type=transform,
        use_torch_scatter=False,
    )  # fmt: skip
    for mine, his in zip(ours.layers, peer.channel_mlp.fcs, strict=True):
        copy(mine.weight, his.weight)
        copy(mine.bias, his.bias)
    y, x = places(30, 2), places(40, 2)[30:]
    v, w = sample(1, 3, 30), 0.1 + sample(30).abs()
    found = NeighborSearch(use_open3d=False)(y, x, 0.4)
    # The peer weighs pairs, not points.
    found["weights"] = w[found["neighbors_index"]]
    return ours(v, y, x, w).mT, peer(y, found, x, v.mT)


def attention_pair() -> tuple[Tensor, Tensor]:
    from neuralop.layers.attention_kernel_integral import AttentionKernelIntegral

    ours = filled(IntegralAttention(8, 2, "linear", head_dim=3, norm="channels"))
    peer = AttentionKernelIntegral(8, 8, 2, 3)
    for name in ("to_q", "to_k", "to_v"):
        copy(getattr(ours, name), getattr(peer, name).weight)
    copy(ours.to_out, peer.to_out.weight)
    copy(ours.bias, peer.to_out.bias)
    u = sample(2, 8, 12)
    with warnings.catch_warnings():
        # Its norm is built for one number of channels and fed another.
        warnings.simplefilter("ignore")
        return ours(u), peer(u.mT, torch.zeros(2, 12, 1)).mT


def differential_pair() -> tuple[Tensor, Tensor]:
    from neuralop.layers.differential_conv import FiniteDifferenceConvolution

    ours = filled(DifferentialConv(2, 3, 3, base_spacing=1.0, ndim=2))
    peer = FiniteDifferenceConvolution(2, 3, 2)
    copy(ours.weight, peer.conv.weight)
    x = sample(2, 2, 8, 8)
    return ours(x), peer(x, 1 / 8)


PAIRS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "SpectralConv, 1-D": lambda: spectral_pair(1),
    "SpectralConv, 2-D": lambda: spectral_pair(2),
    "SpectralConv, 3-D": lambda: spectral_pair(3),
    "FNOBlock": block_pair,
    "FNO": model_pair,
    "KernelIntegral, linear": lambda: graph_pair("linear"),
    "KernelIntegral, nonlinear": lambda: graph_pair("nonlinear"),
    "IntegralAttention, equal weights": attention_pair,
    "DifferentialConv": differential_pair,
}
