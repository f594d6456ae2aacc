"""Small networks and data for the tests of LeMON."""

import torch

from stiefel.nn.lemon import PROSE, OperatorData

VOCAB = 50


def tiny(seed=0, **options):
    settings = {"dim": 16, "heads": 2, "layers": (1, 1, 1, 2), "ffn": 24} | options
    generator = torch.Generator().manual_seed(seed)
    return PROSE(8, VOCAB, generator=generator, **settings)


def inputs(batch=5, seed=1, length=9, channels=1, dtype=torch.float32):
    """u, t_in, t_out, tokens; rows 0 and 1 share an equation, row 2 has a shorter one."""
    g = torch.Generator().manual_seed(seed)
    u = torch.randn(batch, 4, 8, channels, generator=g, dtype=dtype)
    tokens = torch.randint(1, VOCAB, (batch, length), generator=g)
    if batch > 2:
        tokens[1] = tokens[0]
        tokens[2, 5:] = 0
    t_in = torch.linspace(0, 1, 4, dtype=dtype)
    return u, t_in, torch.tensor([1.2, 1.7, 2.0], dtype=dtype), tokens


def data(samples=12, seed=2, formulas=3, length=7):
    """Travelling sines, whose equations are random tokens."""
    g = torch.Generator().manual_seed(seed)
    x, t = torch.linspace(0, 2, 9)[:8], torch.linspace(0, 2, 8)
    shift = torch.rand(samples, 1, 1, generator=g)
    u = 1 + torch.sin(torch.pi * (x - 0.5 * t[:, None] - 2 * shift))[..., None]
    equations = torch.randint(1, VOCAB, (formulas, length), generator=g)
    tokens = equations[torch.arange(samples) % formulas]
    times = t.expand(samples, -1)
    return OperatorData(u[:, :4], times[:, :4], u[:, 4:], times[:, 4:], tokens)
