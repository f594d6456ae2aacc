"""Converted normalisation and attention: a point of weight w is two points of weight w / 2."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stiefel.nn.operators import convert, quadrature

DOUBLE = {"dtype": torch.float64}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **DOUBLE)


POINTS = torch.tensor([0.0, 0.1, 0.4, 1.0], **DOUBLE)
WEIGHTS = quadrature("trapezoid", POINTS)
SPLIT = torch.tensor([0.05, 0.2, 0.45, 0.15, 0.15], **DOUBLE)


class Attention(nn.Module):
    """Self-attention over the points of a field ``[batch, channels, N]``."""

    def __init__(self, batch_first=True, **options):
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=batch_first, **options)

    def forward(self, x, **options):
        order = (0, 2, 1) if self.inner.batch_first else (2, 0, 1)
        tokens = x.permute(order)
        y, _ = self.inner(tokens, tokens, tokens, **options)
        return y.permute(order if self.inner.batch_first else (1, 2, 0))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

    def forward(self, x):
        return self.layer(x.mT).mT


LAYERS = {
    "attention": Attention,
    "attention, batch second": lambda: Attention(False),
    "attention, more keys": lambda: Attention(add_bias_kv=True, add_zero_attn=True),
    "encoder": Encoder,
    "batch": lambda: nn.BatchNorm1d(4),
    "batch, no statistics": lambda: nn.BatchNorm1d(4, affine=False, track_running_stats=False),
    "instance": lambda: nn.InstanceNorm1d(4, affine=True),
    "group": lambda: nn.GroupNorm(2, 4),
    "layer": lambda: nn.LayerNorm(4, elementwise_affine=False),
    "layer, channels too": lambda: nn.LayerNorm((4, 4), elementwise_affine=False),
    "mean": lambda: nn.AdaptiveAvgPool1d(1),
}


def converted(name, training=True):
    torch.manual_seed(0)
    net = LAYERS[name]().double()
    for m in net.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
        if isinstance(m, nn.MultiheadAttention):
            m.dropout = 0.0
    for p in net.parameters():
        nn.init.normal_(p)
    return net.train(training), convert(net, 4).train(training)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_splitting_a_point_changes_nothing(name, training):
    _, net = converted(name, training)
    x = drawn(3, 4, 4)
    both = torch.cat((x, x[..., -1:]), -1)
    with torch.no_grad():
        y, z = net(x, weights=WEIGHTS), net(both, weights=SPLIT)
        torch.testing.assert_close(z[..., : y.shape[-1]], y)
        torch.testing.assert_close(net(x, weights=WEIGHTS.expand(3, 4)), y)
        torch.testing.assert_close(net(x, weights=5 * WEIGHTS), y)
        counts = training or name not in ("batch",)
        assert counts != torch.allclose(net(x), y)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_equal_weights_are_torchs(name, training):
    net, operator = converted(name, training)
    x = drawn(3, 4, 4)
    with torch.no_grad():
        assert torch.equal(operator(x), copy.deepcopy(net)(x))
        found = operator(x, weights=torch.full((4,), 0.25, **DOUBLE))
        torch.testing.assert_close(found, copy.deepcopy(net)(x))


def test_running_statistics_are_moments():
    net, operator = converted("batch")
    x = drawn(3, 4, 6)
    operator(x, weights=torch.full((6,), 1 / 6, **DOUBLE))
    net(x)
    torch.testing.assert_close(operator.running_mean, net.running_mean)
    torch.testing.assert_close(operator.running_var, net.running_var)
    assert int(operator.num_batches_tracked) == 1
    operator.momentum = None
    operator(x[..., :4], weights=WEIGHTS)
    share = (WEIGHTS / WEIGHTS.sum() / 3)[None, None]
    mean = (share * x[..., :4]).sum((0, 2))
    torch.testing.assert_close(operator.running_mean, (net.running_mean + mean) / 2)


def test_attention_is_that_of_the_sheet():
    """q, k and v of the sheet through an attention layer without projections."""
    inner = nn.MultiheadAttention(2, 1, bias=False, batch_first=True, **DOUBLE)
    with torch.no_grad():
        inner.in_proj_weight.copy_(torch.eye(2, **DOUBLE).repeat(3, 1))
        inner.out_proj.weight.copy_(torch.eye(2, **DOUBLE))

    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, key, query, value):
            return self.inner(query, key.mT, value)

    q = torch.eye(2, **DOUBLE)[None]
    k = torch.tensor([[1.0, 0], [0, 1], [1, 1], [-1, 0]], **DOUBLE)[None]
    v = torch.tensor([[1.0], [2], [3], [4]], **DOUBLE)[None].expand(1, 4, 2)
    net = convert(Cross(), 4)
    found, weights = net(k.mT, q, v, weights=WEIGHTS)
    exact = torch.tensor([2.812852, 2.876745], **DOUBLE)
    torch.testing.assert_close(found[0, :, 0], exact, rtol=0, atol=5e-7)
    slow = F.scaled_dot_product_attention(q, k, v, attn_mask=WEIGHTS.log().expand(2, 4))
    torch.testing.assert_close(found, slow)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, **DOUBLE))
    plain = torch.tensor([2.177705, 2.5], **DOUBLE)
    torch.testing.assert_close(net(k.mT, q, v)[0][0, :, 0], plain, rtol=0, atol=5e-7)


def test_weights_join_masks():
    _, net = converted("attention")
    x = drawn(2, 4, 4)
    left_out = torch.tensor([[False, False, False, True]]).expand(2, 4)
    some = net(x[..., :3], weights=WEIGHTS[:3])
    found = net(x, weights=WEIGHTS, key_padding_mask=left_out)
    torch.testing.assert_close(found[..., :3], some)
    added = torch.zeros(2, 4, **DOUBLE).masked_fill(left_out, float("-inf"))
    torch.testing.assert_close(net(x, weights=WEIGHTS, key_padding_mask=added), found)
    pairs = left_out[:1].expand(4, 4)
    torch.testing.assert_close(net(x, weights=WEIGHTS, attn_mask=pairs, need_weights=False), found)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (torch.ones(5, **DOUBLE), ValueError, r"\(4,\)"),
        (torch.ones(2, 4, **DOUBLE), ValueError, "one entry per point"),
        (torch.tensor([1.0, 1, 1, 0]), ValueError, "positive"),
        (torch.tensor([1.0, 1, 1, torch.nan]), ValueError, "positive and finite"),
        (torch.ones(4, dtype=torch.int64), TypeError, "floating"),
    ],
)
def test_bad_weights(weights, error, message):
    _, net = converted("attention")
    with pytest.raises(error, match=message):
        net(drawn(3, 4, 4), weights=weights)
    assert net(drawn(3, 4, 4)).shape == (3, 4, 4)


def test_weights_where_the_points_are_others():
    class Down(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x[..., ::2])

    x = drawn(3, 4, 4)
    with pytest.raises(ValueError, match=r"'layer\.inner' has 2 keys"):
        convert(Down(Attention().double()), 4)(x, weights=WEIGHTS)
    with pytest.raises(ValueError, match="'layer' normalises over 2 points"):
        convert(Down(nn.GroupNorm(2, 4)).double(), 4)(x, weights=WEIGHTS)


def test_convolutions_want_a_uniform_grid():
    conv = nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular", **DOUBLE)
    net = convert(conv, 4)
    with pytest.raises(ValueError, match="uniform grid"):
        net(drawn(3, 4, 4), weights=WEIGHTS)
    assert torch.equal(net(drawn(3, 4, 4), weights=torch.ones(4)), conv(drawn(3, 4, 4)))


def test_gradients_with_weights():
    for name in ("batch", "instance", "group", "layer", "attention"):
        _, net = converted(name)
        net.track_running_stats = False
        x = drawn(2, 4, 4).requires_grad_()
        assert torch.autograd.gradcheck(lambda x, net=net: net(x, weights=WEIGHTS), (x,))
