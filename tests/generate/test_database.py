import pytest
import torch
from torch import nn

from stiefel.generate import DCTEncoder, ImageDatabase, PCAEncoder, proposal_counts, top_m
from stiefel.generate.encoders import probe, zigzag


def identity(x):
    return x.flatten(1)


@pytest.fixture
def images():
    return torch.rand(20, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_zigzag_is_that_of_the_sheet():
    start = "(0,0)(0,1)(1,0)(2,0)(1,1)(0,2)(0,3)(1,2)(2,1)(3,0)(4,0)(3,1)"
    assert "".join(f"({i},{j})" for i, j in zigzag(8, 8)[:12]) == start
    assert sorted(zigzag(3, 5)) == [(i, j) for i in range(3) for j in range(5)]


def test_dct_of_the_sheet():
    i = torch.arange(8, dtype=torch.float64)
    image = torch.sin(0.5 * i[:, None] + 0.3 * i)
    found = DCTEncoder(24)(image)
    expected = [0.959868, 2.067112, 4.531644, -0.90058, -1.23356, -0.225653, 0.096263, -1.065332]
    torch.testing.assert_close(
        found[:8], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6
    )
    share = float(found.square().sum() / image.square().sum())
    assert share == pytest.approx(0.999497, abs=5e-7)


def test_dct_with_all_coefficients_keeps_distances(images):
    encoder = DCTEncoder(36)
    x = images.double()
    torch.testing.assert_close(
        torch.cdist(encoder(x), encoder(x)), torch.cdist(*[x.flatten(1)] * 2)
    )


@pytest.mark.parametrize("encoder", [DCTEncoder(10), PCAEncoder(10)])
def test_fitted_encoders_are_centred_and_of_unit_spread(encoder, images):
    out = encoder.fit(images)(images.double())
    torch.testing.assert_close(out.mean(0), torch.zeros(10).double(), rtol=0, atol=1e-12)
    assert float(out.square().mean()) == pytest.approx(1)
    assert encoder(images).dtype == torch.float32
    assert encoder(images.double()[3]).shape == (10,)
    torch.testing.assert_close(encoder(images.double()[3]), out[3])


def test_pca_is_that_of_scikit_learn(images):
    from sklearn.decomposition import PCA

    ours = PCAEncoder(5).fit(images)
    peer = PCA(5).fit(images.double().flatten(1).numpy())
    a, b = ours.components.mT, torch.tensor(peer.components_)
    torch.testing.assert_close((a * b).sum(1).abs(), torch.ones(5).double())
    largest = a.gather(1, a.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()


def test_colour_images_are_encoded_by_channel():
    x = torch.rand(7, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    database = ImageDatabase(x, DCTEncoder(5))
    assert database.embeddings.shape == (7, 15)
    torch.testing.assert_close(database.embeddings[:, 5:10], DCTEncoder(5)(x[:, 1]))


def test_bad_encoders_are_named(images):
    with pytest.raises(ValueError, match="keep must be at least 1"):
        DCTEncoder(0)
    with pytest.raises(TypeError, match="keep must be a whole number"):
        DCTEncoder(True)
    with pytest.raises(ValueError, match="keep=40 of an image of 6 × 6"):
        DCTEncoder(40)(images)
    with pytest.raises(ValueError, match="std must be one positive number"):
        DCTEncoder(4).fit(torch.ones(3, 4, 4))
    with pytest.raises(ValueError, match="mean must be 4 finite numbers"):
        DCTEncoder(4, mean=torch.zeros(3))
    with pytest.raises(ValueError, match="keep=24 components of 20 images"):
        PCAEncoder().fit(images)
    with pytest.raises(ValueError, match="call fit first"):
        PCAEncoder()(images)
    with pytest.raises(ValueError, match="images of shape"):
        PCAEncoder(2).fit(images)(torch.ones(3, 4, 4))
    with pytest.raises(TypeError, match="must be floating point"):
        DCTEncoder(4).fit(torch.ones(3, 4, 4).byte())
    with pytest.raises(TypeError, match="encoder"):
        ImageDatabase(images, 3)
    with pytest.raises(TypeError, match="encoder must return a floating-point tensor"):
        ImageDatabase(images, lambda x: x.flatten(1).byte())
    with pytest.raises(ValueError, match="encoder must return one vector an image"):
        ImageDatabase(images, lambda x: x[:3].flatten(1))


def test_bad_databases_are_named(images):
    with pytest.raises(TypeError, match=r"images / 127\.5 - 1"):
        ImageDatabase((images * 100).to(torch.uint8), identity)
    with pytest.raises(ValueError, match="images is empty"):
        ImageDatabase(images[:0], identity)
    with pytest.raises(ValueError, match=r"got shape \(20,\)"):
        ImageDatabase(images[:, 0, 0], identity)
    broken = images.clone()
    broken[[4, 9], 2, 2] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinite pixels in rows 4, 9 \(2 in all\)"):
        ImageDatabase(broken, identity)
    with pytest.raises(ValueError, match="embeddings has NaN or infinities in rows 2 "):
        ImageDatabase(images, lambda x: x.flatten(1) / (torch.arange(len(x)) != 2)[:, None])
    flat = images.clone()
    flat[5] = 0
    with pytest.raises(ValueError, match="zero vectors, which have no direction, in rows 5 "):
        ImageDatabase(flat, identity)
    assert len(ImageDatabase(flat, identity, metric="l2")) == 20
    with pytest.raises(ValueError, match="metric must be one of"):
        ImageDatabase(images, identity, metric="dot")
    with pytest.raises(TypeError, match="dtype must be floating"):
        ImageDatabase(images, identity, dtype=torch.int8)
    with pytest.raises(ValueError, match="ids must be one for each image"):
        ImageDatabase(images, identity, ids=torch.arange(3))


def test_subset_and_concat_encode_nothing_again(images):
    calls = []

    def counted(x):
        calls.append(len(x))
        return x.flatten(1)

    database = ImageDatabase(images, counted, ids=torch.arange(20) * 2)
    mask = torch.arange(20) % 3 == 0
    part = database.subset(mask)
    assert torch.equal(part.images, images[mask])
    assert torch.equal(part.ids, torch.arange(20)[mask] * 2)
    assert torch.equal(database.subset(torch.tensor([7, 2])).images, images[[7, 2]])
    both = part.concat(database.subset(~mask))
    assert len(both) == 20
    assert [c for c in calls if c > 1] == [20]  # the others are probes of the fingerprint
    with pytest.raises(ValueError, match="7 ids of other are taken"):
        part.concat(part)
    twice = part.concat(part, renumber=True)
    assert twice.ids.tolist() == [*range(0, 42, 6), *range(37, 44)]
    with pytest.raises(ValueError, match="empty"):
        database.subset(torch.zeros(20, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask must be"):
        database.subset(torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="another encoder"):
        part.concat(ImageDatabase(images, lambda x: 2 * x.flatten(1), ids=torch.arange(100, 120)))
    with pytest.raises(ValueError, match="the metric"):
        part.concat(ImageDatabase(images, counted, metric="l2"))


def test_fingerprint_tells_statistics_apart(images):
    a = ImageDatabase(images, DCTEncoder(8).fit(images))
    b = ImageDatabase(images[:10], DCTEncoder(8).fit(images[:10]))
    with pytest.raises(ValueError, match="statistics included"):
        a.check_same_encoder(b)
    a.check_same_encoder(ImageDatabase(images[:10], a.encoder))
    low, high = probe((6, 6)).aminmax()
    assert -1 <= low < -0.9
    assert 0.9 < high < 1


@pytest.mark.parametrize("kind", ["dct", "pca", "own"])
def test_file_gives_the_same_database(kind, images, tmp_path):
    makers = {"dct": DCTEncoder(8), "pca": PCAEncoder(8)}
    encoder = makers[kind].fit(images) if kind in makers else nn.Flatten()
    database = ImageDatabase(images, encoder, ids=torch.arange(20) + 5, metric="l2")
    path = tmp_path / "sub" / "d.safetensors"
    database.save(path)
    loaded = ImageDatabase.load(path, encoder=None if kind in makers else encoder)
    assert torch.equal(loaded.images, images)
    assert torch.equal(loaded.embeddings, database.embeddings)
    assert torch.equal(loaded.ids, database.ids)
    assert loaded.digest == database.digest
    assert torch.equal(loaded.encode(images), database.encode(images))
    assert list(path.parent.iterdir()) == [path]
    if kind == "own":
        with pytest.raises(ValueError, match="give encoder="):
            ImageDatabase.load(path)
        with pytest.raises(ValueError, match="encoder is not the one"):
            ImageDatabase.load(path, encoder=lambda x: 1.01 * x.flatten(1))


def test_damaged_files_are_named(images, tmp_path):
    path = tmp_path / "d.safetensors"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ImageDatabase.load(path)
    ImageDatabase(images, DCTEncoder(8)).save(path)
    content = path.read_bytes()
    for cut in (0, 5, 200, len(content) - 7):
        path.write_bytes(content[:cut])
        with pytest.raises(ValueError, match="is damaged"):
            ImageDatabase.load(path)
    from safetensors.torch import save_file

    save_file({"images": images}, path)
    with pytest.raises(ValueError, match=r"not a file of stiefel\.generate"):
        ImageDatabase.load(path)


def test_proposals_of_the_sheet():
    neighbours = torch.tensor([[4, 2], [2, 4], [4, 0], [1, 2], [0, 2]])
    counts = proposal_counts(neighbours, 5)
    assert counts.tolist() == [2, 1, 4, 0, 3]
    assert (counts / counts.sum()).tolist() == pytest.approx([0.2, 0.1, 0.4, 0, 0.3])
    assert top_m(counts, 1.0).entries.tolist() == [2, 4, 0, 1, 3]
    # A float is a share, an int a number.
    assert top_m(counts, 1).entries.tolist() == [2]
    assert top_m(counts, 0.5).entries.tolist() == [2, 4]
    assert top_m(counts, 0.01).entries.tolist() == [2]
    assert top_m(torch.ones(100).long(), 0.29).entries.tolist() == list(range(29))


def test_even_draws_go_round_and_weighted_ones_follow_the_counts():
    counts = torch.tensor([2, 1, 4, 0, 3])
    g = torch.Generator().manual_seed(0)
    drawn = top_m(counts, 1.0, generator=g)(13)
    for start in (0, 5):
        assert sorted(drawn[start : start + 5].tolist()) == [0, 1, 2, 3, 4]
    drawn = top_m(counts, 1.0, weights=True, generator=g)(4000)
    shares = drawn.bincount(minlength=5) / 4000
    torch.testing.assert_close(shares, counts / 10, rtol=0, atol=0.03)
    assert shares[3] == 0
    first = [top_m(counts, 0.6, generator=torch.Generator().manual_seed(7))(9) for _ in range(2)]
    assert torch.equal(*first)


def test_bad_proposals_are_named():
    counts = torch.tensor([1, 2])
    for m in (0.0, -0.5, 1.5, float("nan")):
        with pytest.raises(ValueError, match="m as a share"):
            top_m(counts, m)
    for m in (0, -2, 3):
        with pytest.raises(ValueError, match="m must be at least 1 and at most 2"):
            top_m(counts, m)
    with pytest.raises(TypeError, match="m must be a whole number"):
        top_m(counts, True)
    with pytest.raises(ValueError, match="all counts are 0"):
        top_m(torch.zeros(3).long(), 1.0, weights=True)
    with pytest.raises(ValueError, match=r"must be in 0\.\.2"):
        proposal_counts(torch.tensor([[3]]), 3)
    with pytest.raises(ValueError, match="n must be at least 1"):
        top_m(counts, 1.0)(0)
