"""Models and helpers for the tests of parameter routing."""

from torch import nn

from stiefel.optim import split_parameters


def routes(groups):
    """Name → (rule, view, blocks)."""
    return {
        name: (g["rule"], g.get("view"), g.get("blocks")) for g in groups for name, _ in g["params"]
    }


def matrix_names(model, **kwargs):
    return {n for n, r in routes(split_parameters(model, **kwargs)).items() if r[0] == "matrix"}


def check_partition(model, groups):
    """Every trainable parameter in one group, once, and the optimizers take the groups."""
    found = [p for g in groups for _, p in g["params"]]
    expected = [p for p in model.parameters() if p.requires_grad]
    assert len(found) == len(expected)
    assert {id(p) for p in found} == {id(p) for p in expected}
    names = dict(model.named_parameters())
    assert all(names[name] is p for g in groups for name, p in g["params"])


class Attention(nn.Module):
    def __init__(self, width, fused_rows):
        super().__init__()
        self.qkv = nn.Linear(width, fused_rows, bias=False)
        self.out = nn.Linear(width, width, bias=False)


class Block(nn.Module):
    def __init__(self, width, fused_rows):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = Attention(width, fused_rows)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


class GPT(nn.Module):
    """Tokens, learned positions, blocks, head; the parts that routing is about."""

    def __init__(self, *, tied=False, width=8, vocabulary=11, fused_rows=24):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(5, width)
        self.blocks = nn.ModuleList(Block(width, fused_rows) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.tokens.weight


BLOCK_MATRICES = {
    f"blocks.{i}.{name}.weight"
    for i in (0, 1)
    for name in ("attention.qkv", "attention.out", "up", "down")
}
