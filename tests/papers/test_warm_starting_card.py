import numpy as np
import pytest
import torch
from card_checks import (
    check_claims_follow_the_measurements,
    check_figure,
    check_smoke,
    check_snippet,
)
from scipy.io import savemat
from torch import nn
from torch.nn import functional as F

from stiefel.data import MissingDataError
from stiefel.papers import (
    Scale,
    UnavailableError,
    cluttered_mlp,
    get,
    warm_start_images,
    warm_starting,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def measurement():
    return check_smoke("warm-starting", race=False)


def test_metrics_follow_from_the_series(measurement):
    m, series = measurement.metrics, measurement.series
    last = {n: np.mean(series[f"accuracy {n}"][-3:]) for n in warm_starting.STARTS}
    assert m["warm_minus_fresh"] == pytest.approx(last["warm"] - last["fresh"])
    assert m["sp_minus_warm"] == pytest.approx(last["sp"] - last["warm"])
    assert m["sp_minus_fresh"] == pytest.approx(last["sp"] - last["fresh"])
    assert series["shrink"] == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert len(series["swept accuracy"]) == len(series["swept steps"]) == 6
    assert series["balance ratio"][-1] == m["gradient_ratio_warm"]
    assert series["balance ratio"][2] == m["gradient_ratio_sp"]
    assert len(measurement.config["data_sha256"]) == 2


def test_runs_are_compared_in_pairs():
    run = warm_starting.Run
    many, one = run([10.0, 20.0], [100, 300]), run([13.0], [50])
    assert one.gain(many) == 3
    assert one.cost(many) == 0.5
    assert run([11.0, 22.0], [50, 50]).gain(many) == 1.5
    assert run([11.0, 22.0], [50, 50]).cost(many) == 0.25


def test_claims_follow_the_measurements(measurement):
    check_claims_follow_the_measurements("warm-starting", measurement)


def test_figure(measurement):
    figure = check_figure("warm-starting", measurement)
    level = [line.get_ydata()[0] for line in figure.axes[2].lines if len(line.get_ydata()) == 2]
    assert 1.0 in level  # what vanishing logits give


def test_snippet_runs():
    assert not check_snippet("warm-starting")["optimizer"].state


def test_metadata_and_sizes():
    paper = get("warm-starting")
    assert (paper.arxiv, paper.published) == ("1910.08475", "2019-10")
    assert paper.claim.at_most == -2
    sizes = warm_starting.plan(Scale.LAPTOP, 2)
    assert (sizes["rounds"], sizes["round_size"], sizes["replicates"]) == (6, 500, 4)


# The batched trainer against one network at a time.


def small_task(replicates=2, samples=100):
    x = torch.randn(replicates, samples, 144, generator=seeded(1))
    return x, (x[..., :10]).argmax(-1)


def one_by_one(stack, data, replicate, generator, max_epochs):
    nets = [cluttered_mlp.module(stack, i) for i in range(len(replicate))]
    optimizers = [torch.optim.Adam(net.parameters(), lr=1e-3) for net in nets]
    active, steps = set(range(len(nets))), [0] * len(nets)
    x, y = data
    for _ in range(max_epochs):
        orders = [torch.randperm(y.shape[1], generator=generator) for _ in range(len(y))]
        for i in sorted(active):
            r, right = int(replicate[i]), 0
            for rows in orders[r].split(64):
                logits = nets[i](x[r][rows])
                optimizers[i].zero_grad()
                F.cross_entropy(logits, y[r][rows]).backward()
                optimizers[i].step()
                right += int((logits.argmax(-1) == y[r][rows]).sum())
                steps[i] += 1
            if right >= 0.99 * y.shape[1]:
                active.discard(i)
        if not active:
            break
    return nets, steps


def test_the_stack_trains_like_its_networks_one_by_one():
    stack = cluttered_mlp.fresh_stack(3, seeded(2))
    stack["0.weight"][2] *= 4  # leaves the stack at another time
    replicate, data = torch.tensor([0, 1, 0]), small_task()
    trained, steps = cluttered_mlp.train(stack, data, replicate, seeded(3), max_epochs=40)
    nets, slow_steps = one_by_one(stack, data, replicate, seeded(3), 40)
    assert steps.tolist() == slow_steps
    assert len(set(slow_steps)) > 1
    for i, net in enumerate(nets):
        ours = cluttered_mlp.module(trained, i)
        for a, b in zip(ours.parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)
        score = (net(data[0][replicate[i]]).argmax(-1) == data[1][replicate[i]]).float().mean()
        both = cluttered_mlp.accuracy(trained, data, replicate)[i]
        assert both.item() == pytest.approx(100 * score.item(), abs=1.01)


def test_training_changes_nothing_that_came_in_and_stops_at_the_cap():
    stack = cluttered_mlp.fresh_stack(2, seeded())
    before = {name: t.clone() for name, t in stack.items()}
    _, steps = cluttered_mlp.train(
        stack, small_task(), torch.tensor([0, 1]), seeded(), max_epochs=1
    )
    assert steps.tolist() == [2, 2]
    for name, t in stack.items():
        assert torch.equal(t, before[name])


def test_networks_start_as_linear_layers_do():
    stack = cluttered_mlp.fresh_stack(40, seeded())
    for layer, linear in ((0, nn.Linear(144, 100)), (2, nn.Linear(100, 10))):
        for name, p in linear.named_parameters():
            ours = stack[f"{layer}.{name}"]
            bound = linear.in_features**-0.5
            assert bound * 0.98 < ours.abs().max() <= bound
            assert ours[0].numel() == p.numel()


def test_every_network_of_a_mix_has_its_own_factors():
    old, fresh = cluttered_mlp.fresh_stack(3, seeded()), cluttered_mlp.fresh_stack(3, seeded(1))
    mixed = cluttered_mlp.mix(old, fresh, [(1, 0), (0, 1), (0.6, 0.01)])
    for name, t in mixed.items():
        assert torch.equal(t[0], old[name][0])
        assert torch.equal(t[1], fresh[name][1])
        torch.testing.assert_close(t[2], 0.6 * old[name][2] + 0.01 * fresh[name][2])


def test_replicates_have_data_of_their_own_and_missing_data_are_named(monkeypatch):
    config = {"seed": 1, "replicates": 2}
    (x, y), (test_x, _), sums = cluttered_mlp.load(config, 30)
    assert x.shape == (2, 20, 144)
    assert test_x.shape == (2, 10, 144)
    assert y.shape == (2, 20)
    assert len(set(sums)) == 2
    expected = cluttered_mlp.cluttered_digits(30, seed=3)
    assert torch.equal(x[1], (expected.train_x - 0.5) * 4)

    def missing(count, seed):
        raise MissingDataError("no scikit-learn")

    monkeypatch.setattr(cluttered_mlp, "cluttered_digits", missing)
    with pytest.raises(UnavailableError, match="no scikit-learn"):
        cluttered_mlp.load(config, 30)


# The authors' scale, on files of a few random images and without an accelerator.


def write_data(folder, count=12):
    random = np.random.default_rng(0)
    for path in warm_start_images.CIFAR10:
        (folder / path).parent.mkdir(exist_ok=True)
        rows = random.integers(0, 256, (count, 3073), dtype=np.uint8)
        rows[:, 0] %= 10
        rows.tofile(folder / path)
    (folder / "cifar-100-binary").mkdir()
    rows = random.integers(0, 256, (count, 3074), dtype=np.uint8)
    rows[:, 1] %= 100
    rows.tofile(folder / "cifar-100-binary/train.bin")
    images = random.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
    labels = np.arange(count)[:, None] % 10 + 1
    savemat(folder / "train_32x32.mat", {"X": images, "y": labels})
    return rows, images


def test_paper_scale_names_all_that_is_missing(monkeypatch, tmp_path):
    monkeypatch.delenv("STIEFEL_DATA", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnavailableError, match=r"CUDA device; and data: set STIEFEL_DATA"):
        get("warm-starting").experiment(Scale.PAPER, 0, None)
    monkeypatch.setenv("STIEFEL_DATA", str(tmp_path))
    with pytest.raises(UnavailableError, match=r"data_batch_1\.bin.*train_32x32\.mat"):
        warm_start_images.require()
    write_data(tmp_path)
    with pytest.raises(UnavailableError, match=r"needs a CUDA device$"):
        warm_start_images.require()


def test_files_are_read_as_their_pages_say(tmp_path):
    rows, images = write_data(tmp_path)
    x, y = warm_start_images.read("cifar100", tmp_path)
    assert torch.equal(y, torch.from_numpy(rows[:, 1].astype(np.int64)))
    assert x[3, 1, 2, 5] == rows[3, 2 + 1024 + 2 * 32 + 5]
    x, y = warm_start_images.read("svhn", tmp_path)
    assert y[9] == 0
    assert x[4, 2, 7, 8] == images[7, 8, 2, 4]
    assert len(warm_start_images.read("cifar10", tmp_path)[1]) == 60
    (tmp_path / "cifar-100-binary/train.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match="not a multiple of 3074"):
        warm_start_images.read("cifar100", tmp_path)


def test_networks_of_the_paper():
    def count(kind, data="cifar10"):
        net = warm_start_images.network({"network": kind, "data": data, "device": "cpu"})
        assert net(torch.zeros(2, 3, 32, 32)).shape == (2, warm_start_images.CLASSES[data])
        return sum(p.numel() for p in net.parameters())

    assert count("linear") == 30_730
    assert count("mlp", "cifar100") == 327_500
    assert 6.9e5 < count("resnet") < 7.1e5  # a sixteenth of the usual 11.2 million


def test_paper_scale_runs_on_what_it_is_given(monkeypatch, tmp_path):
    write_data(tmp_path)
    monkeypatch.setenv("STIEFEL_DATA", str(tmp_path))
    config = {"data": "cifar10", "network": "mlp", "device": "cpu", "max_epochs": 2, "seed": 0}
    config |= {"rounds": 2, "round_size": 16, "half": 16, "starts": [[1.0, 0.0, 1], [0.6, 0.01, 1]]}

    def quiet(fraction, message):
        assert 0 <= fraction <= 1

    online = warm_start_images.online(config, quiet)
    assert np.shape(online["accuracy"]) == (2, 1, 2)
    assert np.shape(online["steps"]) == (2, 1)
    balance = {**config, "network": "resnet", "starts": [[1.0, 0.0], [0.4, 0.1]]}
    result = warm_start_images.balance(balance, quiet)
    assert len(result["ratio"]) == len(result["old"]) == 2
    assert {"fresh", "warm"} == set(warm_start_images.logistic(config, quiet))
    phases = warm_start_images.two_phase({**config, "network": "linear"}, quiet)
    assert all(0 <= value <= 100 for value in phases.values())
