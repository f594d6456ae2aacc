"""What a tensor does in its model, read off its name; and how fused ones come apart.

A table of patterns, searched in order; :func:`classify_name` takes rules of your own before it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Kinds by what they do with a signal (arXiv 2605.18898): attention's queries and keys select, the
# output and the feed-forward matrices pass on.
SELECTION = ("q", "k", "qkv")
TRANSMISSION = ("o", "gate", "up", "down")
FEED_FORWARD = ("gate", "up", "down")
KINDS = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "router", "conv")
EMBEDDINGS = ("embedding", "unembedding")


class Rule(NamedTuple):
    """A tensor whose name has ``pattern`` (a regular expression, searched) is a ``kind``."""

    pattern: str
    kind: str


# More special names first: BERT's attention.output.dense before its output.dense.
RULES: tuple[Rule, ...] = (
    Rule(r"(?i:norm|\bln_?\d?|\bln_f|_ln)\b(?!.*(?:proj|dense|fc))", "norm"),
    Rule(r"(?:position|pos_embed|wpe|token_type|rotary|relative_attention)", "position"),
    Rule(
        r"(?:embed_tokens|word_embeddings?|tok_embeddings|embed_in|\bwte|token_embd|shared)\b",
        "embedding",
    ),
    Rule(r"(?:lm_head|embed_out|output_projection|cls\.predictions\.decoder)\b", "unembedding"),
    Rule(r"patch_embed|\bconv_?proj", "conv"),
    Rule(r"(?:gate_up_proj|gate_and_up)", "gate_up"),
    Rule(r"(?:\brouter|mlp\.gate|block_sparse_moe\.gate)\b", "router"),
    Rule(r"(?:query_key_value|c_attn|in_proj|qkv|Wqkv|W_pack)", "qkv"),
    Rule(r"(?:\bq_proj|query|\bwq|\bq_lin|attn_q|to_q|\bq)\b", "q"),
    Rule(r"(?:\bk_proj|key|\bwk|\bk_lin|attn_k|to_k|\bk)\b", "k"),
    Rule(r"(?:\bv_proj|value|\bwv|\bv_lin|attn_v|to_v|\bv)\b", "v"),
    Rule(
        r"(?:\bo_proj|attention\.output\.dense|attention\.dense|self_attn\.dense|out_proj|\bwo"
        r"|out_lin|attn_output|attn\.c_proj|attn\.proj|to_out(?:\.0)?|self_attention\.dense|\bo)\b",
        "o",
    ),
    Rule(r"(?:gate_proj|ffn_gate|\bw1(?=.*experts)|feed_forward\.w1|\bgate)\b", "gate"),
    Rule(
        r"(?:up_proj|h_to_4h|intermediate\.dense|\bfc1|c_fc|lin1|ffn_up|linear1|fc_in|wi(?:_0|_1)?"
        r"|feed_forward\.w3)\b",
        "up",
    ),
    Rule(
        r"(?:down_proj|4h_to_h|output\.dense|\bfc2|mlp\.c_proj|lin2|ffn_down|linear2|fc_out"
        r"|feed_forward\.w2)\b",
        "down",
    ),
    Rule(r"conv", "conv"),
)

_BLOCK = re.compile(
    r"(?:layers?|blocks?|h|blk|encoder|decoder|resblocks|transformer)[._](\d+)(?=[._])"
)


class Component(NamedTuple):
    """A tensor's part in the model.

    Attributes:
        kind: One of :data:`KINDS`, :data:`EMBEDDINGS`, ``"norm"``, ``"position"``, ``"other"``, or
            what an own rule says.
        block: Number of its block; None outside of blocks.
    """

    kind: str
    block: int | None


def classify_name(name: str, rules: Iterable[Rule] = ()) -> Component:
    """What a tensor is, by its name.

    Args:
        name: As in the checkpoint or the state dict.
        rules: Own rules, searched before :data:`RULES`.

    Raises:
        ValueError: a pattern that is not a regular expression.
    """
    found = _BLOCK.search(name)
    block = int(found.group(1)) if found else None
    for rule in (*rules, *RULES):
        try:
            hit = re.search(rule.pattern, name)
        except re.error as error:
            raise ValueError(
                f"the pattern {rule.pattern!r} of kind {rule.kind!r} is not a regular expression: "
                f"{error}"
            ) from error
        if hit:
            return Component(rule.kind, block)
    return Component("other", block)


class Piece(NamedTuple):
    """Part of a matrix that is fitted by itself.

    Attributes:
        kind: Of that part.
        rows: Which rows, bool ``[out]``; None: all.
        columns: Which columns; None: all.
    """

    kind: str
    rows: Tensor | None = None
    columns: slice | None = None

    def of(self, chunk: Tensor, start: int) -> Tensor:
        """The part's entries within rows ``start`` on of its matrix."""
        if self.rows is not None:
            chunk = chunk[self.rows[start : start + len(chunk)]]
        return chunk if self.columns is None else chunk[:, self.columns]


def split_fused(
    name: str, kind: str, shape: Sequence[int], config: Mapping[str, Any] | None
) -> list[Piece] | None:
    """The parts of a fused matrix; None where it is not fused or the layout is not known.

    Known: GPT-2's ``c_attn`` (columns q, k, v), ``query_key_value`` of GPT-NeoX and its kin (by
    head), ``in_proj_weight``, ``qkv`` and ``qkv_proj`` (rows q, then k, v), ``gate_up_proj``. Where
    keys have fewer heads than queries, the configuration has to say so; without it, or where the
    numbers do not fit, the matrix stays whole: a mixture, as the paper says of such fits.
    """
    if len(shape) != 2:
        return None
    out, width = shape
    if kind == "gate_up":
        if out % 2:
            return None
        first = torch.arange(out) < out // 2
        return [Piece("gate", first), Piece("up", ~first)]
    if kind != "qkv":
        return None
    settings = config or {}
    heads = _number(settings, "num_attention_heads", "n_head")
    kv_heads = _number(settings, "num_key_value_heads") or heads
    if "c_attn" in name and width % 3 == 0 and width != out:
        third = width // 3
        return [
            Piece(kind, None, slice(i * third, (i + 1) * third)) for i, kind in enumerate("qkv")
        ]
    if "query_key_value" in name:
        if not heads or out % (3 * heads) or kv_heads != heads:
            return None
        part = torch.arange(out) // (out // heads // 3) % 3
        return [Piece(kind, part == i) for i, kind in enumerate("qkv")]
    if heads and kv_heads and kv_heads != heads:
        size = out / (heads + 2 * kv_heads)
        ends = [heads * size, (heads + kv_heads) * size]
        if size != int(size):
            return None
    elif out == 3 * width or (heads and out % 3 == 0):
        ends = [out / 3, 2 * out / 3]
    else:
        return None
    row = torch.arange(out)
    return [
        Piece("q", row < ends[0]),
        Piece("k", (row >= ends[0]) & (row < ends[1])),
        Piece("v", row >= ends[1]),
    ]


def _number(settings: Mapping[str, Any], *names: str) -> int | None:
    """The first of these settings that is a positive whole number; also of a nested text model."""
    for place in (settings, settings.get("text_config")):
        if isinstance(place, Mapping):
            for name in names:
                value = place.get(name)
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    return value
    return None


def heads(config: Mapping[str, Any] | None) -> tuple[int, int] | None:
    """Query and key-value heads that a configuration names, if it does and they fit."""
    queries = _number(config or {}, "num_attention_heads", "n_head")
    if queries is None:
        return None
    kv = _number(config or {}, "num_key_value_heads") or queries
    return (queries, kv) if queries % kv == 0 else None


def is_matrix(kind: str, shape: Sequence[int]) -> bool:
    """Whether a tensor has a distribution worth fitting: two dimensions or more, no position."""
    return len(shape) >= 2 and kind not in ("norm", "position") and math.prod(shape) > 0
