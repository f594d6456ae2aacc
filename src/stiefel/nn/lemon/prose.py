"""PROSE: one network for many evolution equations, told by symbols which one it sees.

Source: Sun, Zhang and Schaeffer, "LeMON: Learning to Learn Multi-Operator Networks",
arXiv 2408.16168; sizes of every part follow the authors' "2-to-1" model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from stiefel.nn.lemon.checks import (
    check_choice,
    check_count,
    check_fields,
    check_finite,
    check_number,
    check_tokens,
    times,
    visible,
)
from stiefel.nn.lemon.layers import GridHead, PointHead, Stack, mlp, sinusoids

HEADS = ("grid", "points")


class Symbols(NamedTuple):
    """What the symbol encoder makes of equations; pass it as ``symbols`` to reuse it."""

    encoding: Float[Tensor, "batch length dim"]
    padding: Bool[Tensor, "batch length"]
    """True where a token is padding."""


class PROSE(nn.Module):
    """A transformer from some time slices and an equation in symbols to other time slices.

    1. Each input slice (n_x × channels values) and its time become one vector.
    2. Data encoder over slices; symbol encoder over tokens.
    3. Both sequences, marked by a learned vector each, are fused by self-attention.
    4. Each time asked for is a query that attends to the fused sequence. Queries do not see one
       another, so the answer for a time does not depend on which other times are asked for.

    Args:
        n_x: points of the grid.
        vocab: number of tokens, ``len(tokenizer)``.
        dim: width.
        heads: attention heads, a divisor of ``dim``.
        layers: of data encoder, symbol encoder, fusion, decoder.
        use_symbols: without, the model sees slices only.
        channels: fields per point.
        ffn: hidden width of the feed-forward maps; 4 · dim if None.
        max_len: longest equation, in tokens.
        pad: the token that fills short equations up.
        head: ``"grid"`` gives values at the n_x points, ``"points"`` anywhere (``x_out``).
        period: length of the periodic domain, for ``head="points"``.
        generator: for all random numbers of the start.

    Raises:
        TypeError, ValueError: a setting out of range; the message says what is allowed.
    """

    def __init__(
        self,
        n_x: int,
        vocab: int,
        dim: int = 512,
        heads: int = 8,
        layers: Sequence[int] = (2, 4, 8, 8),
        use_symbols: bool = True,
        *,
        channels: int = 1,
        ffn: int | None = None,
        max_len: int = 512,
        pad: int = 0,
        head: str = "grid",
        period: float | int = 2.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        ffn = 4 * dim if ffn is None else ffn
        sizes = {"n_x": n_x, "vocab": vocab, "dim": dim, "heads": heads, "channels": channels}
        for name, value in {**sizes, "ffn": ffn, "max_len": max_len}.items():
            check_count(name, value)
        if dim % heads:
            raise ValueError(f"dim must be a multiple of heads, got {dim} and {heads}")
        if len(layers) != 4:
            raise ValueError(f"layers must be four numbers, got {tuple(layers)}")
        for value in layers:
            check_count("layers", value)
        check_count("pad", pad, 0)
        if pad >= vocab:
            raise ValueError(f"pad must be one of the {vocab} tokens, 0..{vocab - 1}, got {pad}")
        check_choice("head", head, HEADS)
        check_number("period", period)
        self.n_x, self.vocab, self.channels = n_x, vocab, channels
        self.max_len, self.pad, self.use_symbols = max_len, pad, use_symbols
        data, symbols, fusion, decoder = layers

        self.slice_embedding = mlp(n_x * channels, dim, dim, generator)
        self.time_embedding = mlp(1, dim, dim, generator)
        self.data_encoder = Stack(data, dim, heads, ffn, generator=generator)
        self.types = nn.Parameter(0.02 * torch.randn(2, dim, generator=generator))
        if use_symbols:
            weight = torch.randn(vocab, dim, generator=generator)
            self.token_embedding = nn.Embedding.from_pretrained(weight, freeze=False)
            self.register_buffer("positions", sinusoids(max_len, dim), persistent=False)
            self.symbol_encoder = Stack(symbols, dim, heads, ffn, generator=generator)
        self.fusion = Stack(fusion, dim, heads, ffn, generator=generator)
        self.query_embedding = mlp(1, dim, dim, generator)
        self.query = nn.Parameter(0.02 * torch.randn(dim, generator=generator))
        self.decoder = Stack(decoder, dim, heads, ffn, cross=True, generator=generator)
        self.head: nn.Module = (
            GridHead(dim, n_x, channels, generator)
            if head == "grid"
            else PointHead(dim, n_x, channels, period, generator)
        )

    def encode_symbols(self, tokens: Shaped[Tensor, "rows length"]) -> Symbols:
        """Encode equations ``[batch, L]``; equal rows are encoded once, common padding is cut.

        Raises:
            TypeError, ValueError: as for :meth:`forward`; also for a model without symbols.
        """
        if not self.use_symbols:
            raise ValueError("this model has use_symbols=False: it encodes no equations")
        check_tokens(tokens, self.vocab, self.max_len, self.pad)
        tokens = tokens.to(self.token_embedding.weight.device)
        if not visible(tokens):
            return self._encode(tokens)
        tokens = tokens[:, : int((tokens != self.pad).any(0).nonzero().max()) + 1]
        rows, where = torch.unique(tokens, dim=0, return_inverse=True)
        if len(rows) == len(tokens):
            return self._encode(tokens)
        encoding, padding = self._encode(rows)
        return Symbols(encoding.index_select(0, where), padding.index_select(0, where))

    def _encode(self, tokens: Tensor) -> Symbols:
        padding = tokens == self.pad
        # A row of padding only is refused where it can be seen; elsewhere it must not give NaN.
        padding = padding & ~padding.all(1, keepdim=True)
        x = self.token_embedding(tokens) + self.positions[: tokens.shape[1]]
        return Symbols(self.symbol_encoder(x, padding=padding), padding)

    def encode(
        self,
        u: Float[Tensor, "batch times points channels"],
        t_in: Tensor,
        tokens: Shaped[Tensor, "rows length"] | None = None,
        *,
        which: Shaped[Tensor, " batch"] | None = None,
        symbols: Symbols | None = None,
    ) -> Symbols:
        """Slices and equation fused into one sequence, which any number of times may be asked of.

        Returns:
            The sequence ``[batch, T_in + L, dim]`` and where it is padding.

        Raises:
            TypeError, ValueError: as :meth:`forward`.
        """
        check_fields(u, self.n_x, self.channels)
        moments = times(t_in, u.shape[0], "t_in", u)
        if moments.shape[1] != u.shape[1]:
            raise ValueError(f"u has {u.shape[1]} times but t_in has {moments.shape[1]}")
        x = self.slice_embedding(u.flatten(2)) + self.time_embedding(moments[..., None])
        x = self.data_encoder(x) + self.types[0]
        slices = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        if not self.use_symbols:
            return Symbols(self.fusion(x), slices)
        if symbols is None:
            if tokens is None:
                raise ValueError("tokens (or symbols) are needed: this model has use_symbols=True")
            symbols = self.encode_symbols(tokens)
        if which is not None:
            symbols = Symbols(symbols.encoding[which], symbols.padding[which])
        if symbols.encoding.shape[0] != u.shape[0]:
            raise ValueError(
                f"u has {u.shape[0]} samples but there are {symbols.encoding.shape[0]} equations"
            )
        both = torch.cat([x, symbols.encoding + self.types[1]], 1)
        padding = torch.cat([slices, symbols.padding], 1)
        return Symbols(self.fusion(both, padding=padding), padding)

    def decode(
        self,
        fused: Symbols,
        t_out: Tensor,
        *,
        x_out: Tensor | None = None,
    ) -> Float[Tensor, "batch times points channels"]:
        """Values at the times ``t_out`` of what :meth:`encode` returned.

        Raises:
            ValueError: as :meth:`forward`.
        """
        context, padding = fused
        moments = times(t_out, context.shape[0], "t_out", context)
        if x_out is not None:
            if x_out.ndim not in (1, 2) or (x_out.ndim == 2 and len(x_out) != len(context)):
                raise ValueError(
                    f"x_out must have shape [points] or [{len(context)}, points], "
                    f"got {tuple(x_out.shape)}"
                )
            check_finite("x_out", x_out)
        queries = self.query_embedding(moments[..., None]) + self.query
        return self.head(self.decoder(queries, context, padding), x_out)

    def forward(
        self,
        u: Float[Tensor, "batch times points channels"],
        t_in: Tensor,
        t_out: Tensor,
        tokens: Shaped[Tensor, "rows length"] | None = None,
        which: Shaped[Tensor, " batch"] | None = None,
        *,
        x_out: Tensor | None = None,
        symbols: Symbols | None = None,
    ) -> Float[Tensor, "batch times_out points_out channels"]:
        """Predict the fields at the times ``t_out``.

        Args:
            u: ``[batch, T_in, n_x, channels]``, normalised (:func:`normalise`).
            t_in: ``[T_in]`` or ``[batch, T_in]``, physical times, not indices.
            t_out: ``[T_out]`` or ``[batch, T_out]``.
            tokens: ``[batch, L]`` integers; needed if ``use_symbols`` and no ``symbols``.
            which: ``[batch]`` row of ``tokens`` for each sample, where samples share equations and
                ``tokens`` holds each once. Without it equal rows are found and encoded once.
            x_out: ``[points]`` or ``[batch, points]``, for ``head="points"`` only.
            symbols: what :meth:`encode_symbols` returned, instead of tokens.

        Returns:
            ``[batch, T_out, n_x, channels]``, or as many points as ``x_out`` has.

        Raises:
            TypeError: u not floating point, tokens not integers.
            ValueError: wrong shapes, NaN or infinities, equations longer than ``max_len``, tokens
                out of range, equations missing.
        """
        fused = self.encode(u, t_in, tokens, which=which, symbols=symbols)
        return self.decode(fused, t_out, x_out=x_out)
