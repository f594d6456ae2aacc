"""Residual networks of which every layer acts in the Poincaré ball.

Source: van Spengler et al., arXiv 2303.14027, and the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from stiefel.linalg._checks import compute_dtype
from stiefel.linalg.autocast import without_autocast
from stiefel.nn.poincare.ball import PoincareBall
from stiefel.nn.poincare.batch_norm import PoincareBatchNorm2d
from stiefel.nn.poincare.conv import PoincareConv2d, check_images
from stiefel.nn.poincare.functions import translate
from stiefel.nn.poincare.linear import PoincareLinear

SKIPS = ("fr", "rf")
# Curvatures of one block that differ by more than this are a mistake.
_SAME = 1e-6


def check_one_curvature(module: nn.Module) -> None:
    """Raise ``ValueError`` if the layers in ``module`` act in balls of different curvature."""
    found: dict[str, float] = {}
    for name, part in module.named_modules():
        ball = getattr(part, "ball", None)
        if isinstance(ball, PoincareBall) and not ball.raw_c.is_meta:
            found[name] = float(ball.c.detach())
    if found and max(found.values()) > (1 + _SAME) * min(found.values()):
        listed = ", ".join(f"{name or 'block'} c={c:g}" for name, c in found.items())
        raise ValueError(f"all layers of one block must share one curvature, got {listed}")


class PoincareResidualBlock(nn.Module):
    """conv 3×3 (stride) – norm – ReLU – conv 3×3 – norm, ⊕ the input, ReLU.

    ReLU acts on the tangent vectors, ⊕ on the points that they stand for. Where the shape changes
    the input goes through a Poincaré 1 × 1 convolution.

    Args:
        in_ch: Channels in.
        out_ch: Channels out.
        ball: Of all layers.
        stride: Of the first convolution.
        skip: ``"fr"``: f ⊕ x, as in the paper; ``"rf"``: x ⊕ f.
        shortcut: In place of what acts on the input; must give the block's shape.
        mean: Of the norms.
        init: Of the convolutions.
        generator: For the start.
        **settings: ``bias``, ``clip``, ``jitter``, ``device``, ``dtype`` of the convolutions.

    Raises:
        ValueError: an unknown skip, numbers below 1, a shortcut with another curvature.
    """

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
        ball: PoincareBall,
        stride: int = 1,
        skip: str = "fr",
        *,
        shortcut: nn.Module | None = None,
        mean: str = "midpoint",
        init: str = "identity",
        track_running_stats: bool = True,
        generator: torch.Generator | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if skip not in SKIPS:
            raise ValueError(f"skip must be one of {', '.join(SKIPS)}, got {skip!r}")
        settings |= {"init": init, "generator": generator}
        place = {name: settings.get(name) for name in ("device", "dtype")}
        norm: dict[str, Any] = {
            "mean": mean, "track_running_stats": track_running_stats, **place,
        }  # fmt: skip
        self.ball, self.skip = ball, skip
        self.conv1 = PoincareConv2d(in_ch, out_ch, 3, ball, stride, 1, **settings)
        self.norm1 = PoincareBatchNorm2d(out_ch, ball, **norm)
        self.conv2 = PoincareConv2d(out_ch, out_ch, 3, ball, 1, 1, **settings)
        self.norm2 = PoincareBatchNorm2d(out_ch, ball, **norm)
        if shortcut is None and (stride != 1 or in_ch != out_ch):
            shortcut = PoincareConv2d(in_ch, out_ch, 1, ball, stride, **settings)
        self.shortcut = nn.Identity() if shortcut is None else shortcut
        check_one_curvature(self)

    def forward(
        self, x: Shaped[Tensor, ...]
    ) -> Float[Tensor, "batch outputs new_height new_width"]:
        """``[batch, in_ch, H, W]`` to ``[batch, out_ch, ⌈H/stride⌉, ⌈W/stride⌉]``, tangent.

        Raises:
            TypeError: x is not floating point.
            ValueError: other channels, or a shortcut that gives another shape.
        """
        f = self.norm1(self.conv1(x)).relu()
        f = self.norm2(self.conv2(f))
        x = self.shortcut(x)
        if x.shape != f.shape:
            raise ValueError(f"the shortcut gave {tuple(x.shape)}, the block {tuple(f.shape)}")
        left, right = (f, x) if self.skip == "fr" else (x, f)
        work = compute_dtype(torch.promote_types(f.dtype, x.dtype))
        with without_autocast(x):
            out = translate(left.to(work), right.to(work), self.ball.c.to(work), 1)
        return out.to(f.dtype).relu()

    def extra_repr(self) -> str:
        """Order of the sum, for ``print(model)``."""
        return f"skip={self.skip!r}"


class PoincareResNet(nn.Module):
    """conv – norm – ReLU, groups of residual blocks, average of the tangent vectors, linear layer.

    The last layer's tangent vectors are the logits. Groups after the first halve the image.

    Args:
        classes: Logits.
        channels: Of every group.
        depths: Blocks of every group; 3 groups of d blocks are a ResNet-(6d + 2).
        in_ch: Channels of the images.
        c: Of the one ball that all layers share; or the ball itself.
        skip: As of :class:`PoincareResidualBlock`.
        learnable: Whether c is learned.
        mean: Of the norms.
        init: Of convolutions and linear layer.
        generator: For the start.
        **settings: ``track_running_stats``; ``bias``, ``clip``, ``jitter``, ``device``, ``dtype``.

    Raises:
        ValueError: channels and depths of different number, numbers below 1, c ≤ 0.
    """

    def __init__(
        self,
        classes: int,
        channels: Sequence[int] = (8, 16, 32),
        depths: Sequence[int] = (3, 3, 3),
        in_ch: int = 3,
        c: float | int | PoincareBall = 0.1,
        skip: str = "fr",
        *,
        learnable: bool = False,
        mean: str = "midpoint",
        init: str = "identity",
        track_running_stats: bool = True,
        generator: torch.Generator | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if not channels or len(channels) != len(depths) or min(depths) < 1:
            raise ValueError(
                f"channels and depths must be equally many, depths at least 1, got "
                f"channels={tuple(channels)}, depths={tuple(depths)}"
            )
        place = {name: settings.get(name) for name in ("device", "dtype")}
        if not isinstance(c, PoincareBall):
            c = PoincareBall(c, learnable, device=place["device"], dtype=place["dtype"])
        self.ball = c
        layer: dict[str, Any] = {**settings, "init": init, "generator": generator}
        block: dict[str, Any] = {
            **layer, "skip": skip, "mean": mean, "track_running_stats": track_running_stats,
        }  # fmt: skip
        self.stem = nn.Sequential(
            PoincareConv2d(in_ch, channels[0], 3, c, 1, 1, **layer),
            PoincareBatchNorm2d(channels[0], c, mean, 1e-6, 0.1, track_running_stats, **place),
            nn.ReLU(),
        )
        groups, width = [], channels[0]
        for group, (out_ch, depth) in enumerate(zip(channels, depths, strict=True)):
            blocks = []
            for index in range(depth):
                stride = 2 if group and not index else 1
                blocks.append(PoincareResidualBlock(width, out_ch, c, stride, **block))
                width = out_ch
            groups.append(nn.Sequential(*blocks))
        self.groups = nn.Sequential(*groups)
        self.head = PoincareLinear(width, classes, c, **layer)
        self.in_ch = in_ch

    def forward(self, x: Shaped[Tensor, ...]) -> Float[Tensor, "batch classes"]:
        """Logits of images ``[batch, in_ch, H, W]``, any size.

        Raises:
            TypeError: x is not floating point.
            ValueError: other channels.
        """
        check_images(x, self.in_ch)
        return self.head(self.groups(self.stem(x)).mean((2, 3)))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Start every layer again."""
        for module in self.modules():
            if isinstance(module, (PoincareConv2d, PoincareLinear)):
                module.reset_parameters(generator)
            elif isinstance(module, PoincareBatchNorm2d):
                module.reset_parameters()


def poincare_resnet20(classes: int = 10, **settings: Any) -> PoincareResNet:
    """Three groups of three blocks, 8, 16 and 32 channels unless ``settings`` says otherwise."""
    return PoincareResNet(classes, depths=settings.pop("depths", (3, 3, 3)), **settings)


def poincare_resnet32(classes: int = 10, **settings: Any) -> PoincareResNet:
    """Three groups of five blocks, 8, 16 and 32 channels unless ``settings`` says otherwise."""
    return PoincareResNet(classes, depths=settings.pop("depths", (5, 5, 5)), **settings)
