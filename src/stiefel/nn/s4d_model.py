"""A small sequence model of S4D layers, and the parameter groups that they need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from stiefel.nn.s4d import S4D, check_finite_input, check_sequence, length_mask, seeded_linear

POOLS = ("mean", "last", "none")


class S4DBlock(nn.Module):
    """Layer norm, :class:`S4D`, dropout, and a connection around them; ``[batch, length, H]``.

    Args:
        d_model: H.
        prenorm: normalise what goes into the layer; otherwise the sum that comes out.
        dropout: also inside the layer.
        **layer: as :class:`S4D`, except ``transposed``.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        dropout: float | int = 0.0,
        prenorm: bool = True,
        **layer: Any,
    ) -> None:
        super().__init__()
        if layer.get("transposed"):
            raise ValueError("S4DBlock works on [batch, length, H]; transposed is not supported")
        self.prenorm = prenorm
        self.layer = S4D(d_model, d_state, dropout, **layer)
        place = {"device": layer.get("device"), "dtype": layer.get("dtype")}
        self.norm = nn.LayerNorm(d_model, **place)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, u: Shaped[Tensor, "batch length H"], state: Tensor | None = None, **options: Any
    ) -> tuple[Float[Tensor, "batch length H"], Tensor | None]:
        """Arguments, result and errors as of :meth:`S4D.forward`."""
        # Norms turn Inf into NaN and hide which it was; and beyond `lengths` anything may stand.
        if options.get("lengths") is not None:
            inside = length_mask(options["lengths"], u.shape[0], u.shape[1])
            u = torch.where(inside[..., None], u, 0.0)
        y, state = self.layer(self.norm(u) if self.prenorm else u, state, **options)
        y = u + self.dropout(y)
        return (y if self.prenorm else self.norm(y)), state

    def step(
        self, u: Shaped[Tensor, "batch H"], state: Tensor | None = None, rate: float | int = 1.0
    ) -> tuple[Float[Tensor, "batch H"], Tensor]:
        """One sample, as :meth:`S4D.step`."""
        y, state = self.layer.step(self.norm(u) if self.prenorm else u, state, rate)
        y = u + self.dropout(y)
        return (y if self.prenorm else self.norm(y)), state


class S4DModel(nn.Module):
    """Linear map, blocks, pooling over time, linear map.

    Args:
        d_input: channels of the input.
        d_output: classes or quantities to predict.
        d_model, d_state, dropout, prenorm: of every block.
        n_layers: number of blocks.
        pool: over time: ``"mean"``, ``"last"``, or ``"none"`` for one output per sample.
        last_norm: normalise what the last block gives; by default after prenorm blocks.
        generator: for all random numbers of the start.
        **layer: as :class:`S4D`: ``init``, ``disc``, ``dt_min``, ``dt_max``, ``bidirectional``, ….

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        d_input: int,
        d_output: int,
        d_model: int = 32,
        n_layers: int = 2,
        d_state: int = 64,
        dropout: float | int = 0.0,
        prenorm: bool = True,
        pool: str = "mean",
        *,
        last_norm: bool | None = None,
        generator: torch.Generator | None = None,
        **layer: Any,
    ) -> None:
        super().__init__()
        for name, size in (("d_input", d_input), ("d_output", d_output), ("n_layers", n_layers)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {pool!r}")
        last_norm = prenorm if last_norm is None else last_norm
        self.d_input, self.pool = d_input, pool
        place = {"device": layer.get("device"), "dtype": layer.get("dtype")}
        self.encoder = seeded_linear(d_input, d_model, generator, **place)
        self.blocks = nn.ModuleList(
            S4DBlock(d_model, d_state, dropout, prenorm, generator=generator, **layer)
            for _ in range(n_layers)
        )
        self.norm = nn.LayerNorm(d_model, **place) if last_norm else nn.Identity()
        self.decoder = seeded_linear(d_model, d_output, generator, **place)

    def forward(
        self,
        u: Shaped[Tensor, "batch length d_input"],
        *,
        lengths: Shaped[Tensor, " batch"] | None = None,
        rate: float | int = 1.0,
    ) -> Float[Tensor, "batch ..."]:
        """``[batch, d_output]``, or ``[batch, length, d_output]`` without pooling.

        ``lengths`` and ``rate`` as :meth:`S4D.forward`; pooling looks inside ``lengths`` only.

        Raises:
            TypeError, ValueError, RuntimeError: as :meth:`S4D.forward`.
        """
        check_sequence(u, self.d_input, channel_dim=2)
        inside = None
        if lengths is not None:
            inside = length_mask(lengths, u.shape[0], u.shape[1])[..., None]
            u = torch.where(inside, u, 0.0)
        check_finite_input(u)
        x = self.encoder(u)
        for block in self.blocks:
            x, _ = block(x, rate=rate, lengths=lengths, return_state=False)
        if self.pool == "last":
            last = u.new_full((len(u),), u.shape[1]).long() if lengths is None else lengths
            x = torch.take_along_dim(x, last.to(x.device)[:, None, None].long() - 1, dim=1)[:, 0]
        x = self.norm(x)
        if inside is not None and self.pool != "last":
            x = torch.where(inside, x, 0.0)
        if self.pool == "mean":
            x = x.mean(1) if inside is None else x.sum(1) / inside.sum(1)
        return self.decoder(x)

    def step(
        self,
        u: Shaped[Tensor, "batch d_input"],
        states: Sequence[Tensor | None] | None = None,
        rate: float | int = 1.0,
    ) -> tuple[Float[Tensor, "batch d_output"], list[Tensor]]:
        """The output after one more sample, and the states of all blocks.

        Raises:
            ValueError: mean pooling, which needs the whole sequence; else as :meth:`S4D.step`.
        """
        if self.pool == "mean":
            raise ValueError("mean pooling needs the whole sequence; use pool='last' or 'none'")
        check_sequence(u, self.d_input, channel_dim=1)
        states = [None] * len(self.blocks) if states is None else states
        if len(states) != len(self.blocks):
            raise ValueError(f"{len(self.blocks)} states are needed, got {len(states)}")
        x, after = self.encoder(u), []
        for block, state in zip(self.blocks, states, strict=True):
            x, state = cast(S4DBlock, block).step(x, state, rate)
            after.append(state)
        return self.decoder(self.norm(x)), after


def ssm_param_groups(
    model: nn.Module, lr: float | int, ssm_lr: float | int = 1e-3, weight_decay: float | int = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: step sizes and state matrices learn slowly and never decay.

    Modules say what they need by ``optim_hints``, a dictionary of parameter names to
    ``{"lr": …, "weight_decay": …}`` (:class:`S4DKernel` does), or parameters by an attribute
    ``_optim`` of the same form. A hint without learning rate, or with None, gets
    ``min(lr, ssm_lr)``.

    Returns:
        One group with everything else, then one for each hinted pair of settings. Shared
        parameters appear once, frozen ones not at all.

    Raises:
        ValueError: a rate or the decay is negative or not finite, or nothing is to be trained.
    """
    for name, value in (("lr", lr), ("ssm_lr", ssm_lr), ("weight_decay", weight_decay)):
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be finite and ≥ 0, got {value}")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    rest: list[nn.Parameter] = []
    seen: set[int] = set()
    for module in model.modules():
        hints = getattr(module, "optim_hints", {})
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            hint = hints.get(name, getattr(parameter, "_optim", None))
            if hint is None:
                rest.append(parameter)
                continue
            rate = hint.get("lr")
            rate = min(lr, ssm_lr) if rate is None else float(rate)
            groups.setdefault((rate, float(hint.get("weight_decay", 0.0))), []).append(parameter)
    if not seen:
        raise ValueError("model has no parameter that requires a gradient")
    listed = [{"params": rest, "lr": lr, "weight_decay": weight_decay}] if rest else []
    for (rate, decay), parameters in groups.items():
        listed.append({"params": parameters, "lr": rate, "weight_decay": decay})
    return listed
