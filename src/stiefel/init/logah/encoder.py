"""What a hypernetwork knows about each node: its operation, its size, its place in the graph."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from stiefel.init.logah.graph import NetGraph, Shape

# Widths up to 8192 on a grid that coarsens, and the sizes that images and their classes have.
CHANNEL_BINS = (
    1, 3, 10, 100, *range(8, 64, 8), *range(64, 4096, 16), *range(4096, 8193, 32), 50257,
)  # fmt: skip
KERNEL_BINS = (1, 2, 3, 4, 5, 7, 8, 14, 16)
_MOST_DEGREE, _MOST_DISTANCE, _MOST_PATH = 100, 1000, 256


def sizes(shape: Shape | None) -> tuple[int, int, int, int]:
    """(channels out, channels in, kernel height, kernel width) of a parameter; zeros for none.

    A vector counts as (n, 1, 1, 1). A code of positions (1, T, D) counts as D channels on a square
    of T positions, as in GHN-3.
    """
    if shape is None:
        return 0, 0, 0, 0
    if len(shape) == 3 and shape[0] == 1:
        side = int(shape[1] ** 0.5)
        return 1, shape[2], side, side
    padded = (*shape, 1, 1, 1, 1)
    return padded[0], padded[1], padded[2], padded[3]


class BinTable(nn.Module):
    """One vector for each of some sizes, and one for "no size"; a size takes the nearest."""

    def __init__(self, bins: Sequence[int], width: int) -> None:
        super().__init__()
        ordered = sorted(set(bins))
        self.table = nn.Embedding(len(ordered) + 1, width)
        middles = torch.tensor([(a + b) / 2 for a, b in pairwise(ordered)])
        self.register_buffer("middles", middles, persistent=False)

    def forward(self, size: Int[Tensor, " N"]) -> Float[Tensor, "N W"]:
        """The vectors of these sizes; of 0, the vector of "no size"."""
        index = torch.bucketize(size.to(self.middles.dtype), self.middles) + 1
        return self.table(torch.where(size > 0, index, 0))


class GraphFormerLayer(nn.Module):
    """Pre-norm self-attention with a bias for every pair of nodes, and a perceptron."""

    def __init__(self, hid: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(hid), nn.LayerNorm(hid)
        self.qkv, self.out = nn.Linear(hid, 3 * hid, bias=False), nn.Linear(hid, hid)
        self.up, self.down = nn.Linear(hid, 4 * hid), nn.Linear(4 * hid, hid)

    def forward(
        self, x: Float[Tensor, "N D"], bias: Float[Tensor, "H N N"]
    ) -> Float[Tensor, "N D"]:
        """One layer."""
        n, width = x.shape
        q, k, v = self.qkv(self.ln1(x)).view(n, 3, self.heads, width // self.heads).unbind(1)
        mixed = F.scaled_dot_product_attention(
            *(t.transpose(0, 1)[None] for t in (q, k, v)), attn_mask=bias[None]
        )
        x = x + self.out(mixed[0].transpose(0, 1).reshape(n, width))
        return x + self.down(F.gelu(self.up(self.ln2(x))))


class GraphEncoder(nn.Module):
    """Embeds the nodes of a graph (Graphormer as in GHN-3).

    A node's vector starts from tables for its operation, its sizes, its degrees and its distance
    from the input. The logits of all layers share one bias per pair of nodes, a perceptron of the
    path lengths from one to the other and back; it is evaluated once for each distinct pair of
    lengths, of which a graph of N nodes has far fewer than N².

    Args:
        ops: How many operations there are.
        hid: Width D; a multiple of 4 and of ``heads``.
        layers: Attention layers.
        heads: Attention heads H.
    """

    def __init__(self, ops: int, hid: int, layers: int, heads: int) -> None:
        super().__init__()
        self.ops = nn.Embedding(ops, hid)
        self.channels = BinTable(CHANNEL_BINS, hid // 4)
        self.kernels = BinTable(KERNEL_BINS, hid // 4)
        self.indegree = nn.Embedding(_MOST_DEGREE + 1, hid)
        self.outdegree = nn.Embedding(_MOST_DEGREE + 1, hid)
        self.distance = nn.Embedding(_MOST_DISTANCE + 1, hid)
        self.path = nn.Embedding(_MOST_PATH + 1, hid)
        self.edge = nn.Sequential(nn.Linear(2 * hid, hid), nn.ReLU(), nn.Linear(hid, heads))
        self.layers = nn.ModuleList(GraphFormerLayer(hid, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(hid)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=module.embedding_dim**-0.5)

    def forward(self, graph: NetGraph, ops: Int[Tensor, " N"]) -> Float[Tensor, "N D"]:
        """Vectors of the nodes.

        Args:
            graph: The graph.
            ops: Of each node, the row of its operation.
        """
        device = self.norm.weight.device
        out, inside, high, wide = torch.tensor([sizes(s) for s in graph.shapes], device=device).T
        indegree, outdegree = (d.clamp(max=_MOST_DEGREE).to(device) for d in graph.degrees)
        x = self.ops(ops.to(device)) + torch.cat(
            [self.channels(out), self.channels(inside), self.kernels(high), self.kernels(wide)], -1
        )
        far = graph.A[0].long().clamp(max=_MOST_DISTANCE).to(device)
        x = x + self.indegree(indegree) + self.outdegree(outdegree) + self.distance(far)
        bias = self.pair_bias(graph)
        for layer in self.layers:
            x = layer(x, bias)
        return self.norm(x)

    def pair_bias(self, graph: NetGraph) -> Float[Tensor, "H N N"]:
        """What is added to the logits of each pair of nodes, in every layer."""
        pairs, index = graph.pairs
        device = self.norm.weight.device
        # The published tables begin two rows later; so rows 0 and 1 are never read.
        rows = (pairs + 2).clamp(max=_MOST_PATH).to(device)
        return self.edge(self.path(rows).flatten(1)).T.contiguous()[:, index.to(device)]
