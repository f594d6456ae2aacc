import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from stiefel.init import (
    Epoch,
    ShrinkPerturb,
    TrainAccuracy,
    TrainLoss,
    gradient_balance,
    shrink_perturb_,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def blobs(count, seed=0):
    x = torch.randn(count, 4, generator=seeded(seed))
    return x, (x[:, 0] > 0).long()


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01)


def keeper(**options):
    return ShrinkPerturb(make_net, adam, batch_size=32, generator=seeded(), **options)


def test_rounds_reach_the_stop_rule_and_report():
    keep, (x, y) = keeper(max_epochs=200), blobs(300)
    first = keep.fit_round((x[:100], y[:100]))
    second = keep.fit_round((x, y))
    assert (first.round, second.round) == (1, 2)
    assert first.stopped
    assert first.acc >= 0.99
    assert first.steps == 4 * first.epochs
    assert second.steps == 10 * second.epochs
    assert first.grad_ratio is None
    assert second.grad_ratio > 0
    assert second.seconds > 0
    assert second.loss > 0


def test_a_warm_start_is_the_plain_loop_with_a_new_optimizer():
    keep, data = keeper(shrink=1, perturb=0, max_epochs=2), [blobs(64), blobs(96)]
    for part in data:
        keep.fit_round(part)
    twin, generator = make_net(), seeded()
    for x, y in data:
        optimizer = adam(twin.parameters())
        for _ in range(2):
            for rows in torch.randperm(len(x), generator=generator).split(32):
                optimizer.zero_grad()
                F.cross_entropy(twin(x[rows]), y[rows]).backward()
                optimizer.step()
    for a, b in zip(keep.model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_first_round_is_skipped_unless_parity_is_asked_for():
    start = make_net()[0].weight.detach().clone()
    keep = keeper()
    keep.start_round()
    assert torch.equal(keep.model[0].weight, start)
    keep.start_round()
    assert not torch.equal(keep.model[0].weight, start)
    keep = keeper(skip_first=False, perturb=0)
    keep.start_round()
    torch.testing.assert_close(keep.model[0].weight.detach(), 0.4 * start)


def test_start_round_hands_over_a_new_optimizer_of_the_same_parameters():
    keep = keeper()
    identities = [id(p) for p in keep.model.parameters()]
    keep.fit_round(blobs(40))
    optimizer = keep.start_round()
    assert not optimizer.state
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == identities


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(4, 2))

    def forward(self, x):
        return x @ self.w


def test_a_layer_that_cannot_reset_itself_gets_a_fresh_network():
    keep = ShrinkPerturb(Bare, adam, 0.5, 0.25)
    keep.start_round()
    keep.start_round()
    torch.testing.assert_close(keep.model.w.detach(), torch.full((4, 2), 0.75))


class Items(Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


def test_a_data_set_of_items_trains_like_the_tensors():
    data, nets = blobs(50), []
    for part in (data, Items(*data)):
        keep = keeper(max_epochs=2)
        keep.fit_round(part)
        nets.append(keep.model)
    assert torch.equal(nets[0][0].weight, nets[1][0].weight)


def test_regression_stops_by_loss():
    x = torch.randn(64, 4, generator=seeded())
    keep = ShrinkPerturb(
        lambda: nn.Linear(4, 1), adam, stop=TrainLoss(0.05), max_epochs=500, loss_fn=F.mse_loss
    )
    report = keep.fit_round((x, x.sum(1, keepdim=True)))
    assert report.stopped
    assert report.loss <= 0.05
    assert math.isnan(report.acc)


def test_the_cap_ends_a_round():
    report = keeper(max_epochs=1).fit_round(blobs(40))
    assert not report.stopped
    assert report.epochs == 1


def test_stop_rules():
    assert TrainAccuracy(0.9)(Epoch(1, 0.9, 3.0))
    assert not TrainAccuracy()(Epoch(1, 0.98, 0.0))
    assert TrainLoss(0.1)(Epoch(1, 0.0, 0.1))
    assert not TrainLoss(0.1)(Epoch(1, 1.0, 0.2))
    assert not TrainAccuracy()(Epoch(1, math.nan, 0.0))
    for bad in (0, 1.01, math.nan):
        with pytest.raises(ValueError, match=r"target must be in \(0, 1\]"):
            TrainAccuracy(bad)
    with pytest.raises(ValueError, match="target must be finite"):
        TrainLoss(math.nan)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shrink": 2}, "shrink must be"),
        ({"perturb": -1}, "perturb must be"),
        ({"max_epochs": 0}, "max_epochs must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        ShrinkPerturb(make_net, adam, **options)


def test_bad_data():
    with pytest.raises(ValueError, match="dataset is empty"):
        keeper().fit_round(blobs(0))
    x, y = blobs(8)
    with pytest.raises(ValueError, match="the loss became nan in epoch 1"):
        keeper().fit_round((x * torch.nan, y))


def plain_ratio(model, old, new):
    norms = []
    for x, y in (new, old):
        grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        norms.append(math.sqrt(sum(float(g.square().sum()) for g in grads)))
    return norms[0] / norms[1]


def test_balance_is_the_ratio_of_norms_in_one_pass_or_several():
    model, old, new = make_net().double(), blobs(70, 1), blobs(50, 2)
    old, new = ((x.double(), y) for x, y in (old, new))
    expected = plain_ratio(model, old, new)
    assert gradient_balance(model, F.cross_entropy, old, new) == pytest.approx(expected, rel=1e-12)

    def parts(data):
        return lambda: zip(data[0].split(16), data[1].split(16), strict=True)

    several = gradient_balance(model, F.cross_entropy, parts(old), parts(new))
    assert several == pytest.approx(expected, rel=1e-12)
    assert gradient_balance(model, F.cross_entropy, old, old) == pytest.approx(1)


def test_balance_leaves_gradients_and_statistics_alone():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    model[0].weight.grad = torch.ones(3, 4)
    before = {n: b.clone() for n, b in model.named_buffers()}
    with torch.no_grad():
        gradient_balance(model, F.cross_entropy, blobs(20), blobs(20, 1))
    assert torch.equal(model[0].weight.grad, torch.ones(3, 4))
    assert model[0].bias.grad is None
    for name, b in model.named_buffers():
        assert torch.equal(b, before[name])


def test_shrinking_evens_the_gradients_out():
    keep, old = keeper(max_epochs=300), blobs(40)
    keep.fit_round(old)
    new = blobs(40, 9)[0], 1 - blobs(40, 9)[1]  # what the network does not know
    before = gradient_balance(keep.model, F.cross_entropy, old, new)
    shrink_perturb_(keep.model, 0.3, 0)
    after = gradient_balance(keep.model, F.cross_entropy, old, new)
    assert before > 3
    assert after < before / 2


def test_balance_refusals():
    model = nn.Linear(4, 2)
    batch = blobs(5)
    with pytest.raises(ValueError, match="no parameter that requires"):
        gradient_balance(nn.Linear(4, 2).requires_grad_(False), F.cross_entropy, batch, batch)
    with pytest.raises(ValueError, match="new_batch is empty"):
        gradient_balance(model, F.cross_entropy, batch, blobs(0))
    with pytest.raises(ValueError, match="gradient on old_batch is not finite"):
        gradient_balance(model, F.cross_entropy, (batch[0] * torch.nan, batch[1]), batch)
    zero = nn.Linear(4, 1)

    def flat(output, y):
        return (output * y[:, None]).sum()

    nothing = batch[0], torch.zeros(5)
    with pytest.raises(ValueError, match="both zero"):
        gradient_balance(zero, flat, nothing, nothing)
    assert gradient_balance(zero, flat, nothing, (batch[0], torch.ones(5))) == math.inf
