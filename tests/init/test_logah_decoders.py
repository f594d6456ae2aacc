"""Decoders against the sheet's numbers, and against slow twins."""

import numpy as np
import pytest
import torch
from torch import nn

from stiefel.init import LowRankDecoder, MeanFieldDecoder, TileDecoder
from stiefel.init.logah.decoders import as_kernel, places
from stiefel.init.logah.parts import Part, squash

F64 = torch.float64


def equal(found, expected, **tolerance):
    torch.testing.assert_close(
        found.detach(), torch.as_tensor(expected, dtype=found.dtype), rtol=0,
        **{"atol": 5e-9, **tolerance},
    )  # fmt: skip


def waves(p, shift=0):
    k = torch.arange(1, p.numel() + 1, dtype=p.dtype)
    return (0.5 * torch.sin(0.7 * k + shift)).view(p.shape)


@pytest.fixture
def published():
    """The authors' class with the sheet's parameters: in 4, hidden 16 and 32, r 2, K 8."""
    decoder = LowRankDecoder(4, 2, 8).to(F64)
    layers = (decoder.trunk[0], decoder.trunk[2], decoder.latent, decoder.widen)
    with torch.no_grad():
        for t, p in enumerate(p for layer in layers for p in (layer.weight, layer.bias)):
            p.copy_(waves(p, t))
    return decoder


X = torch.cos(0.5 * torch.arange(1, 9, dtype=F64)).view(2, 4)
H = X.float()


def test_matrices_of_the_published_class(published):
    equal(
        published(X, (3, 2)),
        [[[2.22461115, -1.58346025], [-0.71110824, 0.81935652], [-0.79600475, 0.26512043]],
         [[1.73896119, -1.18694595], [-0.38570105, 0.50100480], [-0.92706813, 0.46474018]]],
    )  # fmt: skip
    line = [2.22461115, -0.71110824, -0.79600475, -0.38260673, 2.80200329, -1.47982562]
    equal(published.pair(X, 3)[0].flatten(), line)


def test_kernels_of_the_published_class(published):
    equal(
        published(X, (2, 2, 3, 3))[0, 1, 0],
        [[-0.38260673, 0.43952130, -0.24518038], [2.80200329, -1.78319384, 0.57432951],
         [-1.47982562, 1.19602496, -0.51961630]],
    )  # fmt: skip


def test_the_tail_of_the_decoder():
    """From z on, by hand: r = 2, K = 3."""
    decoder = LowRankDecoder(1, 2, 3).to(F64)
    z = torch.tensor([1, -2, 3, -4, 5, -6, 7, 8], dtype=F64)
    with torch.no_grad():
        decoder.latent.weight.zero_()
        decoder.latent.bias.copy_(z)
        decoder.widen.weight.copy_(torch.tensor([[1, 0], [0, 1], [1, -1]]))
        decoder.widen.bias.copy_(torch.tensor([0.5, 0, -0.5]))
    h = torch.zeros(1, 1, dtype=F64)
    A, B = decoder.factors(decoder.codes(h), 3, 3)
    equal(A[0], [[1.5, 0], [0.5, 3.5], [0, 2.5]])
    equal(B[0], [[5.5, 0], [4.5, 7.5], [8, -1.5]])
    equal(decoder(h, (2, 3))[0], [[8.25, 6.75, 12], [2.75, 28.5, -1.25]])
    equal(decoder(h, (3, 1))[0, :, 0], [8.25, 2.75, 0])


def test_kernels_are_laid_out_as_published():
    factors = torch.arange(16, dtype=F64).view(8, 2)
    matrix = (factors[:4] @ factors[4:].T)[None]
    expected = [9, 11, 43, 53, 13, 15, 63, 73, 77, 95, 111, 137, 113, 131, 163, 189]
    equal(as_kernel(matrix, (2, 2, 2, 2)).flatten(), expected)


@pytest.mark.parametrize("shape", [(3, 5), (16, 16), (5, 2, 3, 3), (4, 3, 5), (2, 3, 2, 2, 2)])
@pytest.mark.parametrize(("rank", "width"), [(3, 16), (2, 64), (4, 46)])
def test_only_needed_rows_are_those_of_all_rows(shape, rank, width):
    """Against the whole tables that the paper writes down."""
    torch.manual_seed(0)
    decoder = LowRankDecoder(6, rank, width).to(F64)
    h = torch.randn(3, 6, dtype=F64)
    z = decoder.latent(torch.relu(decoder.trunk(h))).view(3, 2 * rank, rank)
    T = decoder.widen(torch.relu(z)).view(3, 2 * width, rank)
    high, wide = int(np.prod(shape[2:-1])), (shape[-1] if len(shape) > 2 else 1)
    A, B = T[:, : shape[0] * high], T[:, width : width + shape[1] * wide]
    W = A @ B.mT
    if len(shape) > 2:
        W = W.view(3, shape[0], high, shape[1], wide).transpose(2, 3).reshape(3, *shape)
    torch.testing.assert_close(decoder(h, shape), W)
    if 2 * shape[0] <= width:
        pair = (T[:, : 2 * shape[0]] @ T[:, width : width + 1].mT).view(3, 2, -1)
        torch.testing.assert_close(decoder.pair(h, shape[0]), pair)


@pytest.fixture
def mean_field():
    decoder = MeanFieldDecoder(4, 2, latent=2, table=3).to(F64)
    with torch.no_grad():
        decoder.M.copy_(waves(decoder.M))
        decoder.b.copy_(waves(decoder.b, 1))
    return decoder


ZA, ZB = torch.tensor([[0.3, 0.0]], dtype=F64), torch.tensor([[0.5, 0.8]], dtype=F64)


def test_mean_field_factors_of_the_sheet(mean_field):
    A, B = mean_field.rows(ZA, 4), mean_field.rows(ZB, 3)
    equal(
        A[0],
        [[0.59246506, 0.46721300], [0.20228243, -0.10810565], [-0.20223309, -0.39337381],
         [-0.48624297, -0.29350209]],
    )  # fmt: skip
    equal(
        B[0],
        [[1.05106672, 0.68752919], [-0.41553578, -0.80404875], [-0.22176694, 0.14715429]],
    )
    equal((A @ B.mT)[0, 0], [0.94394288, -0.62185246, -0.06263677])


def test_mean_field_approaches_a_limit_without_width(mean_field):
    limits = {8: 0.00209247, 16: 0.00237081, 32: 0.00244388, 64: 0.00246236}
    for n, expected in limits.items():
        means = [mean_field.rows(z, n).mean(1)[0] for z in (ZA, ZB)]
        equal(means[0] @ means[1], expected)


def test_places():
    for n, expected in ((4, [0, 0.625, 1.375, 2]), (2, [0.25, 1.75]), (3, [0, 1, 2])):
        below, weight = places(n, 3)
        equal(below + weight, expected)


def test_rows_by_tables_and_by_products_are_the_same(mean_field):
    """Wider axes interpolate products, narrower ones interpolate tables."""
    for n in (1, 2, 3, 7):
        below, weight = places(n, 3)
        T = mean_field.rows(ZA, 3)
        above = (below + 1).clamp(max=2)
        slow = T[:, below] * (1 - weight[:, None]) + T[:, above] * weight[:, None]
        equal(mean_field.rows(ZA, n), slow)


def test_a_pair_is_the_first_two_rows_of_the_other_factor(mean_field):
    h = torch.randn(2, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    A, B = mean_field.factors(mean_field.codes(h), 5, 3)
    # Row places 0 and 1 of a table of three are its rows 0 and 1.
    expected = B[:, :2] @ A.mT
    torch.testing.assert_close(mean_field.pair(h, 5), expected)


def test_absolute_rows_are_rows_of_the_table_or_of_the_vocabulary():
    decoder = MeanFieldDecoder(4, 2, latent=2, table=3, vocabulary=7)
    h = torch.randn(2, 4)
    z = decoder.codes(h)[:, 0]
    torch.testing.assert_close(decoder.rows(z, 2, True), decoder.rows(z, 3)[:, :2])
    torch.testing.assert_close(decoder.rows(z, 6, True)[1], decoder.words[:6])
    assert decoder(h, (6, 5), True).shape == (2, 6, 5)
    with pytest.raises(
        ValueError, match="8 rows with a meaning each need table or vocabulary >= 8"
    ):
        decoder(h, (8, 5), True)


@pytest.mark.parametrize(
    "decoder",
    [LowRankDecoder(8, 3, 64), MeanFieldDecoder(8, 3, latent=4, table=6), TileDecoder(8, 4)],
    ids=["reshape", "meanfield", "tile"],
)
def test_shapes_rank_and_gradients(decoder):
    decoder = decoder.to(F64)
    h = torch.randn(2, 8, dtype=F64, requires_grad=True)
    for shape in ((5, 7), (1, 1), (4, 3, 3, 3), (4, 3, 2)):
        W = decoder(h, shape)
        assert W.shape == (2, *shape)
        if len(shape) == 2 and not isinstance(decoder, TileDecoder):
            assert int(torch.linalg.matrix_rank(W).max()) <= 3
    assert decoder.pair(h, 5).shape == (2, 2, 5)
    assert torch.autograd.gradcheck(lambda x: decoder(x, (3, 4)), h)
    assert torch.autograd.gradcheck(lambda x: decoder.pair(x, 3), h)


def test_the_tile_repeats():
    decoder = TileDecoder(4, 24)
    with torch.no_grad():
        decoder.square.weight.zero_()
        decoder.square.bias.zero_()
        decoder.square.bias.view(24, 24)[:2, :3] = torch.arange(6.0).view(2, 3)
    W = decoder(torch.zeros(1, 4), (50, 27))[0]
    assert torch.equal(W[24:48, :24], W[:24, :24])
    assert W[:2, 24:27].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_scales_of_the_sheet():
    ones = LowRankDecoder(4, 2).gain

    def gain(shape):
        part = Part("w", 0, "matrix", shape)
        return ones(part.fan_in(), part.beta)

    assert gain((3, 8)) == pytest.approx(0.5)
    assert gain((6, 4, 3, 3)) == pytest.approx(0.2357022614)
    assert gain((8, 1, 3, 3)) == pytest.approx(1 / 3)
    mean_field = MeanFieldDecoder(4, 2, base_width=64).gain
    assert mean_field(64) == pytest.approx(ones(64))
    assert mean_field(256) == pytest.approx(ones(64) / 4)
    line = torch.tensor([0.0, 1.0, -3.0], dtype=F64)
    equal(squash("gain", line), [1, 1.2449187, 0.3648511], atol=1e-7)
    equal(squash("offset", line), [0, 0.1973753, -0.5370496], atol=1e-7)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LowRankDecoder(4, 0), "rank is 0"),
        (lambda: MeanFieldDecoder(4, 2, table=0), "table is 0"),
        (lambda: TileDecoder(4, 0), "tile is 0"),
        (lambda: LowRankDecoder(4, 2, 8)(H, (9, 3)), "9 rows needs max_width >= 9; it is 8"),
        (lambda: LowRankDecoder(4, 2, 8).pair(H, 5), "10 rows needs max_width >= 10"),
        (lambda: TileDecoder(4)(H, (3,)), r"shape is \(3,\)"),
        (lambda: TileDecoder(4)(H, (3, 0)), r"shape is \(3, 0\)"),
    ],
)
def test_bad_sizes_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_layers_are_reset_by_their_own_rule():
    torch.manual_seed(0)
    decoder = MeanFieldDecoder(4, 2, latent=4)
    assert decoder.M.abs().max() <= 0.5
    before = decoder.M.clone()
    decoder.reset_parameters()
    assert not torch.equal(before, decoder.M)
    assert isinstance(decoder.trunk[0], nn.Linear)
