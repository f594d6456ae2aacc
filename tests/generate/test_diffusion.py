"""Training, sampling and files of the model, on a few digits."""

import copy
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from generate_models import small_network

from stiefel.generate import (
    DCTEncoder,
    ImageDatabase,
    RetrievalDiffusion,
    RetrievalUNet,
    ddim_grid,
    proposal_counts,
)
from stiefel.generate.training import Examples, Settings, Training


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def plain_sampler(model, n, seed, *, steps, guidance=1.0, k=4, prediction="x0"):
    """One full forward pass a branch and step, and the sheet's formulas."""
    network, db = model.network, model.database
    g = seeded(seed)
    rows = torch.randperm(len(db), generator=g)[:n]
    near, _ = db.search(db.embeddings[rows], k - 1, exclude_ids=db.ids[rows])
    context = db.embeddings[torch.cat([rows[:, None], near], dim=1)].to(network.null)
    x = torch.randn(n, 64, generator=g, dtype=network.null.dtype)
    grid = ddim_grid(model.bars, steps)
    before = [grid.final, *grid.bars[:-1].tolist()]
    with torch.no_grad():
        for step in reversed(range(steps)):
            t = grid.times[step].expand(n)
            out = network(x, t, context)
            if guidance > 1:
                null = network(x, t, network.null_context(n, k))
                out = null + guidance * (out - null)
            bar, last = grid.bars[step], torch.tensor(before[step], dtype=torch.float64)
            a, s = bar**0.5, (1 - bar) ** 0.5
            x0 = out.clamp(-1, 1)
            noise = (x - a * x0) / s
            x = last**0.5 * x0 + (1 - last) ** 0.5 * noise
    return x.reshape(n, 8, 8)


def test_cached_sampler_is_the_plain_one_bit_for_bit(exact_model):
    ours = exact_model.sample(20, steps=9, generator=seeded(3))
    assert ours.dtype == torch.float64
    assert torch.equal(ours, plain_sampler(exact_model, 20, 3, steps=9))


def test_guidance_in_one_batch_is_two_passes(exact_model):
    ours = exact_model.sample(20, steps=9, guidance=2.0, generator=seeded(3))
    expected = plain_sampler(exact_model, 20, 3, steps=9, guidance=2.0)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
    assert (ours - exact_model.sample(20, steps=9, generator=seeded(3))).abs().max() > 1e-2
    one = exact_model.sample(20, steps=9, guidance=1, generator=seeded(3))
    assert torch.equal(one, exact_model.sample(20, steps=9, generator=seeded(3)))


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_samples_do_not_depend_on_the_batch(model, exact_model, guidance):
    whole = exact_model.sample(23, steps=6, guidance=guidance, generator=seeded(1))
    for size in (1, 7, 23):
        part = exact_model.sample(
            23, steps=6, guidance=guidance, generator=seeded(1), batch_size=size
        )
        torch.testing.assert_close(part, whole, rtol=0, atol=1e-10)
    options = {"steps": 6, "guidance": guidance}
    whole = model.sample(23, generator=seeded(1), **options)
    part = model.sample(23, generator=seeded(1), batch_size=5, **options)
    assert part.dtype == torch.float32
    torch.testing.assert_close(part, whole, rtol=0, atol=1e-4)


def test_same_seed_same_samples(model):
    first = model.sample(5, steps=4, generator=seeded(8))
    assert torch.equal(first, model.sample(5, steps=4, generator=seeded(8)))
    assert not torch.equal(first, model.sample(5, steps=4, generator=seeded(9)))
    assert first.shape == (5, 8, 8)
    assert float(first.abs().max()) <= 1


def test_contexts_are_what_was_asked_for(model, small_set):
    images, rows = model.sample(30, steps=2, generator=seeded(2), return_neighbours=True)
    assert images.shape == (30, 8, 8)
    first = torch.randperm(120, generator=seeded(2))[:30]
    assert torch.equal(rows[:, 0], first)
    near, _ = small_set.search(small_set.embeddings[first], 3, exclude_ids=first)
    assert torch.equal(rows[:, 1:], near)

    options = {"steps": 2, "return_neighbours": True}
    _, rows = model.sample(30, include_query=False, generator=seeded(2), **options)
    near, _ = small_set.search(small_set.embeddings[first], 4, exclude_ids=first)
    assert torch.equal(rows, near)

    _, rows = model.sample(3, entries=torch.tensor([5, 5, 7]), k=1, **options)
    assert rows.tolist() == [[5], [5], [7]]

    query = small_set.images[:2] * 0.9
    _, rows = model.sample(5, query=query, k=3, **options)
    near, _ = small_set.search(small_set.encode(query), 2)
    assert rows[:, 0].tolist() == [-1] * 5
    assert torch.equal(rows[:, 1:], near[[0, 1, 0, 1, 0]])
    _, rows = model.sample(2, query=query[0], k=1, **options)
    assert rows.tolist() == [[-1], [-1]]
    _, rows = model.sample(2, query=query, include_query=False, **options)
    assert torch.equal(rows, small_set.search(small_set.encode(query), 4)[0])
    vectors = small_set.encode(query)
    a = model.sample(2, query=query, steps=3, generator=seeded(0))
    b = model.sample(2, query_embedding=vectors, steps=3, generator=seeded(0))
    assert torch.equal(a, b)


def test_top_m_and_counts(model, small_set):
    own, _ = small_set.search(small_set.embeddings, 4, exclude_ids=small_set.ids)
    counts = proposal_counts(own, 120)
    assert torch.equal(model.counts, counts)
    assert int(counts.sum()) == 4 * 120
    order = counts.argsort(descending=True, stable=True)
    _, rows = model.sample(40, top_m=3, steps=1, return_neighbours=True)
    assert set(rows[:, 0].tolist()) == set(order[:3].tolist())
    _, rows = model.sample(40, top_m=0.05, steps=1, return_neighbours=True)
    assert set(rows[:, 0].tolist()) == set(order[:6].tolist())
    _, rows = model.sample(400, weights=True, steps=1, return_neighbours=True)
    assert (counts[rows[:, 0]] > 0).all()
    part = model.swap_database(small_set.subset(torch.arange(30)))
    own, _ = part.database.search(part.database.embeddings, 4, exclude_ids=part.database.ids)
    assert torch.equal(part.counts, proposal_counts(own, 30))


def test_null_and_unconditional(model):
    learned = model.sample(6, steps=3, guidance=3.0, generator=seeded(0))
    zeros = model.sample(6, steps=3, guidance=3.0, null="zeros", generator=seeded(0))
    assert (learned - zeros).abs().max() > 1e-4
    alone = model.sample(6, steps=3, conditional=False, generator=seeded(0))
    other = model.swap_database(model.database.subset(torch.arange(60)))
    g = seeded(0)
    torch.randperm(120, generator=g)
    noise = torch.randn(6, 64, generator=g)
    context = model.network.null_context(6, 4)
    grid = ddim_grid(model.bars, 3)
    with torch.no_grad():
        last = model.network(noise, grid.times[2].expand(6), context).clamp(-1, 1)
    assert not torch.equal(alone.flatten(1), last)
    assert other.sample(6, steps=3, conditional=False).shape == (6, 8, 8)


@pytest.mark.parametrize("grid", ["linspace", "ldm"])
@pytest.mark.parametrize("prediction", ["x0", "eps", "v"])
def test_predictions_agree_for_a_perfect_network(small_set, prediction, grid):
    """A network that knows the image: whatever it predicts, DDIM must arrive there."""
    model = RetrievalDiffusion(small_network(), schedule="cosine").fit(
        small_set.images, small_set, steps=1, prediction=prediction
    )
    truth = small_set.images[:4].flatten(1).double() * 0.9
    bars = model.bars

    class Perfect(type(model.network)):
        def run(self, x, modulations, condition):
            bar = bars[self.times.pop()]
            a, s = bar**0.5, (1 - bar) ** 0.5
            noise = (x - a * truth) / s
            return {"x0": truth, "eps": noise, "v": a * noise - s * truth}[prediction]

    network = copy.deepcopy(model.network).double()
    network.__class__ = Perfect
    network.times = ddim_grid(bars, 5, grid).times.tolist()
    model._network = network
    found = model.sample(4, steps=5, grid=grid).flatten(1)
    # The authors' grid ends at ᾱ_0, with a little noise left.
    limit = 1e-6 if grid == "linspace" else 0.1
    assert (found - truth).abs().max() < limit


def test_swap_shares_weights_and_leaves_the_model(model, small_set, digits):
    images = digits[0][200:240]
    other = ImageDatabase(images, small_set.encoder, ids=torch.arange(200, 240))
    before = model.sample(4, steps=3, generator=seeded(0))
    swapped = model.swap_database(other)
    assert swapped.network is model.network
    assert swapped.database is other
    assert model.database is small_set
    assert torch.equal(model.sample(4, steps=3, generator=seeded(0)), before)
    a = swapped.sample(4, steps=3, generator=seeded(0))
    b = model.sample(4, database=other, steps=3, generator=seeded(0))
    assert torch.equal(a, b)
    assert not torch.equal(a, before)
    with pytest.raises(ValueError, match="another encoder"):
        model.swap_database(ImageDatabase(images, DCTEncoder(12).fit(images)))
    with pytest.raises(ValueError, match="width 12, got 10"):
        model.swap_database(ImageDatabase(images, DCTEncoder(10)))
    with pytest.raises(ValueError, match=r"shape \(8, 8\), got \(6, 6\)"):
        model.swap_database(ImageDatabase(images[:, :6, :6], small_set.encoder))


def test_training_lowers_the_loss_and_excludes_the_image(model, small_set):
    assert len(model.losses) == 60
    assert float(model.losses[-10:].mean()) < 0.7 * float(model.losses[:5].mean())
    # The same images given again are recognised as the database's own.
    again = RetrievalDiffusion(small_network()).fit(
        small_set.images.clone(), small_set, steps=60, batch_size=32, seed=1
    )
    assert torch.equal(again.losses, model.losses)
    ids = torch.arange(10, 50)
    part = RetrievalDiffusion(small_network()).fit(
        small_set.images[10:50], small_set, steps=1, ids=ids
    )
    near, _ = small_set.search(small_set.embeddings[10:50], 4, exclude_ids=ids)
    assert torch.equal(part.counts, proposal_counts(near, 120))


def test_null_gets_a_gradient_for_any_batch(small_set):
    """The published code raises unless the batch has k images, and never trains its null."""
    start = small_network()
    near, _ = small_set.search(small_set.embeddings, 4, exclude_ids=small_set.ids)
    settings = Settings(2, 7, 1e-3, 0.5, "x0", 5.0, 0)
    network = copy.deepcopy(start)
    data = Examples(small_set.images.flatten(1), small_set.embeddings, near)
    training = Training(network, data, RetrievalDiffusion().bars, settings)
    with torch.no_grad():  # it starts at zero, where nothing behind it gets a gradient
        network.leave.weight.normal_()
    training.loss().backward()
    assert network.null.grad.abs().max() > 0
    training.step()
    assert not torch.equal(network.null, start.null)


def test_loss_is_that_of_the_formula(small_set):
    near, _ = small_set.search(small_set.embeddings, 4, exclude_ids=small_set.ids)
    bars = RetrievalDiffusion().bars
    for prediction in ("x0", "eps", "v"):
        settings = Settings(2, 9, 1e-3, 0.3, prediction, 5.0, 4)
        network = small_network().double()
        with torch.no_grad():
            network.leave.weight.normal_(generator=seeded(1))
        images = small_set.images.flatten(1).double()
        twin = Training(network, Examples(images, small_set.embeddings, near), bars, settings)
        x0, t, noise, context, drop = twin.batch()
        twin.generator.manual_seed(4)
        total = 0.0
        for i in range(9):
            bar = bars[t[i]]
            rows = network.null_context(1, 4) if drop[i] else context[i : i + 1]
            noisy = bar**0.5 * x0[i] + (1 - bar) ** 0.5 * noise[i]
            out = network(noisy[None], t[i : i + 1], rows)[0]
            if prediction == "x0":
                total += (out - x0[i]).square().sum() * min(float(bar / (1 - bar)), 5.0)
            elif prediction == "eps":
                total += (out - noise[i]).square().sum()
            else:
                velocity = bar**0.5 * noise[i] - (1 - bar) ** 0.5 * x0[i]
                total += (out - velocity).square().sum()
        torch.testing.assert_close(twin.loss(), total / 9)


def test_averaged_weights_and_rates_are_those_of_the_sheet(small_set):
    near, _ = small_set.search(small_set.embeddings, 4, exclude_ids=small_set.ids)
    settings = Settings(400, 8, 2e-3, 0.1, "x0", 5.0, 0)
    assert settings.rate(0) == pytest.approx(2e-3 / 50, rel=1e-4)
    assert settings.rate(399) == pytest.approx(0.05 * 2e-3)
    assert max(settings.rate(i) for i in range(400)) < 2e-3
    network = small_network()
    data = Examples(small_set.images.flatten(1), small_set.embeddings, near)
    training = Training(network, data, RetrievalDiffusion().bars, settings)
    average = network.leave.weight.detach().clone()
    for i in range(12):
        training.step()
        keep = min(0.995, (1 + i) / (10 + i))
        average = keep * average + (1 - keep) * network.leave.weight.detach()
    training.finish()
    torch.testing.assert_close(network.leave.weight.detach(), average)


class StoppedError(Exception):
    pass


def test_interrupted_training_goes_on_bit_for_bit(small_set, tmp_path):
    path = tmp_path / "t.safetensors"
    options = {"steps": 50, "batch_size": 16, "seed": 3}

    def fit(**more):
        return RetrievalDiffusion(small_network()).fit(
            small_set.images, small_set, **options, **more
        )

    def stop(part, word):
        raise StoppedError

    with pytest.raises(StoppedError):
        fit(checkpoint=path, checkpoint_every=15, progress=stop)
    resumed = fit(checkpoint=path, checkpoint_every=15)
    whole = fit()
    assert torch.equal(resumed.losses, whole.losses)
    for a, b in zip(resumed.network.parameters(), whole.network.parameters(), strict=True):
        assert torch.equal(a, b)
    start = time.process_time()
    finished = fit(checkpoint=path)
    assert time.process_time() - start < 0.5
    assert torch.equal(finished.network.null, whole.network.null)
    options["lr"] = 1e-3
    with pytest.raises(ValueError, match="checkpoint of another training: lr differ"):
        fit(checkpoint=path)


WORKER = """
import sys, torch
sys.path.insert(0, {tests!r})
from generate_models import small_network
from stiefel.generate import DCTEncoder, ImageDatabase, RetrievalDiffusion
torch.set_num_threads(1)
g = torch.Generator().manual_seed(0)
images = torch.rand(60, 8, 8, generator=g) * 2 - 1
db = ImageDatabase(images, DCTEncoder(12).fit(images))
model = RetrievalDiffusion(small_network()).fit(
    images, db, steps=int(sys.argv[2]), batch_size=8, checkpoint=sys.argv[1], checkpoint_every=1)
print(float(model.losses.sum()))
"""


def test_a_killed_training_leaves_a_whole_checkpoint(tmp_path):
    from stiefel.generate import files

    path = tmp_path / "t.safetensors"
    code = WORKER.format(tests=os.path.dirname(__file__))
    run = subprocess.Popen([sys.executable, "-c", code, str(path), "100000"])
    try:
        deadline = time.monotonic() + 100
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.05)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    settings, tensors = files.load(path, "training checkpoint")
    assert settings["done"] >= 1
    assert tensors["losses"][: settings["done"]].isfinite().all()


def test_a_saved_model_gives_the_same_samples_in_a_new_process(model, tmp_path):
    path = tmp_path / "model.safetensors"
    model.save(path)
    expected = model.sample(4, steps=4, guidance=1.5, generator=seeded(11))
    out = tmp_path / "out.npy"
    code = (
        "import torch, numpy, sys\n"
        "from stiefel.generate import RetrievalDiffusion\n"
        "torch.set_num_threads(1)\n"
        "model = RetrievalDiffusion.load(sys.argv[1])\n"
        "g = torch.Generator().manual_seed(11)\n"
        "numpy.save(sys.argv[2], model.sample(4, steps=4, guidance=1.5, generator=g).numpy())\n"
    )
    subprocess.run([sys.executable, "-c", code, str(path), str(out)], check=True)
    assert np.load(out).tolist() == expected.tolist()


def test_files_of_a_model(model, small_set, tmp_path):
    path = tmp_path / "model.safetensors"
    model.save(path)
    first = sorted(p.name for p in tmp_path.iterdir())
    assert len(first) == 2
    loaded = RetrievalDiffusion.load(path)
    assert torch.equal(loaded.counts, model.counts)
    assert (loaded.k, loaded.prediction) == (4, "x0")
    a, b = (m.sample(3, steps=3, top_m=0.2, generator=seeded(0)) for m in (loaded, model))
    assert torch.equal(a, b)
    # Another database takes the old one's place only when the model names it.
    part = model.swap_database(small_set.subset(torch.arange(50)))
    part.save(path)
    second = sorted(p.name for p in tmp_path.iterdir())
    assert len(second) == 2
    assert second != first
    assert len(RetrievalDiffusion.load(path).database) == 50
    assert len(RetrievalDiffusion.load(path, database=small_set).database) == 120
    beside = next(p for p in tmp_path.iterdir() if "database" in p.name)
    model.database.save(beside)
    with pytest.raises(ValueError, match="is not the database"):
        RetrievalDiffusion.load(path)
    beside.unlink()
    with pytest.raises(FileNotFoundError, match="needs its database"):
        RetrievalDiffusion.load(path)
    small_set.save(path)
    with pytest.raises(ValueError, match="holds 'image database', not a retrieval diffusion"):
        RetrievalDiffusion.load(path)


def test_unet_for_larger_images(tmp_path):
    images = torch.rand(24, 3, 16, 16, generator=seeded(0)) * 2 - 1
    database = ImageDatabase(images, DCTEncoder(8).fit(images))
    model = RetrievalDiffusion().fit(images, database, steps=3, batch_size=4, seed=0)
    assert isinstance(model.network, RetrievalUNet)
    samples = model.sample(3, steps=2, guidance=2.0, generator=seeded(0))
    assert samples.shape == (3, 3, 16, 16)
    model.save(tmp_path / "m.safetensors")
    loaded = RetrievalDiffusion.load(tmp_path / "m.safetensors")
    assert torch.equal(loaded.sample(3, steps=2, guidance=2.0, generator=seeded(0)), samples)
    grey = torch.rand(10, 18, 18, generator=seeded(0)) * 2 - 1
    model = RetrievalDiffusion().fit(
        grey, ImageDatabase(grey, DCTEncoder(8)), steps=1, batch_size=2
    )
    assert model.network.input_shape == (1, 18, 18)
    assert model.sample(1, steps=1).shape == (1, 18, 18)


def test_bad_training_is_named(small_set):
    images = small_set.images

    def fit(x=images, network=None, **more):
        return RetrievalDiffusion(network).fit(x, small_set, **{"steps": 1, **more})

    with pytest.raises(TypeError, match=r"X / 127\.5 - 1"):
        fit((images * 100).to(torch.int16))
    with pytest.raises(ValueError, match=r"images of shape \(8, 8\), got \(6, 8\)"):
        fit(images[:, :6])
    with pytest.raises(ValueError, match=r"pixels in \[-1, 1\], got \[-8, 8\]"):
        fit(images * 8)
    broken = images.clone()
    broken[3, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="X has NaN or infinite pixels in rows 3 "):
        fit(broken)
    with pytest.raises(ValueError, match="X is empty"):
        fit(images[:0])
    with pytest.raises(ValueError, match="k=120 neighbours of a database of 120 images, less 1"):
        fit(k=120)
    with pytest.raises(ValueError, match="k must be at least 1"):
        fit(k=0)
    for name, value in (("p_uncond", 1.5), ("lr", -1.0), ("min_snr", float("nan"))):
        with pytest.raises(ValueError, match=f"{name} must be finite"):
            fit(**{name: value})
    with pytest.raises(ValueError, match="prediction must be one of x0, eps, v"):
        fit(prediction="noise")
    with pytest.raises(ValueError, match="steps must be at least 1"):
        fit(steps=0)
    with pytest.raises(ValueError, match=r"neighbours must be \[120, k\]"):
        fit(neighbours=torch.zeros(3, 4).long())
    with pytest.raises(ValueError, match=r"must be in 0\.\.119"):
        fit(neighbours=torch.full((120, 4), 120))
    with pytest.raises(ValueError, match="network takes images of shape"):
        fit(network=RetrievalUNet((1, 4, 4), 12, multipliers=(1,)))
    with pytest.raises(ValueError, match="network takes embeddings of width 5"):
        fit(network=RetrievalUNet((1, 8, 8), 5, multipliers=(1,)))
    network = small_network()
    with torch.no_grad():
        network.leave.bias.fill_(1e30)
    with pytest.raises(FloatingPointError, match=r"loss is (inf|nan) at step 0"):
        fit(network=network)


def test_bad_sampling_is_named(model, small_set, tmp_path):
    with pytest.raises(RuntimeError, match="call fit or load"):
        RetrievalDiffusion().sample(1)
    with pytest.raises(ValueError, match="guidance must be finite, at least 1"):
        model.sample(1, guidance=0.9)
    with pytest.raises(ValueError, match="k=121 neighbours of a database of 120"):
        model.sample(1, k=121)
    with pytest.raises(ValueError, match="k=120 neighbours of a database of 120 images, less 1"):
        model.sample(1, k=120, include_query=False)
    assert model.sample(1, k=120, steps=1).shape == (1, 8, 8)
    with pytest.raises(ValueError, match="n must be at least 1"):
        model.sample(0)
    with pytest.raises(ValueError, match="null must be one of"):
        model.sample(1, null="mean")
    with pytest.raises(TypeError, match=r"query / 127\.5 - 1"):
        model.sample(1, query=torch.zeros(8, 8).byte())
    with pytest.raises(ValueError, match=r"query must hold images of shape \(8, 8\)"):
        model.sample(1, query=torch.zeros(1, 6, 8))
    with pytest.raises(ValueError, match="query must have pixels in"):
        model.sample(1, query=torch.full((8, 8), 3.0))
    with pytest.raises(ValueError, match=r"query_embedding must be \[12\]"):
        model.sample(1, query_embedding=torch.zeros(3))
    with pytest.raises(ValueError, match="give only one of"):
        model.sample(1, query=small_set.images[0], entries=torch.tensor([0]))
    with pytest.raises(ValueError, match="entries must be one for each of 2 samples"):
        model.sample(2, entries=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"must be in 0\.\.119"):
        model.sample(1, entries=torch.tensor([500]))

    other = copy.copy(model)
    other._network = copy.deepcopy(model.network)
    other._network.settings = {"kind": "own"}
    with pytest.raises(ValueError, match="cannot save a network of the class RetrievalDenoiser"):
        other.save(tmp_path / "m.safetensors")


def test_missing_diffusers_names_the_extra(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"stiefel\[generate\]"):
        model.sample(1)
