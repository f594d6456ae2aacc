import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from stiefel.init import (
    Heads,
    RichFeatures,
    averaging_matrix,
    discovery_sets,
    group_dro_loss,
    penalised_loss,
    synthesis_sample,
    train_heads,
)


def two_cues(n=400, seed=0, wrong=(0.25, 0.15)):
    """Two columns that tell the label, each wrong for its own share of rows."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    flipped = torch.rand(n, 2, generator=g) < torch.tensor(wrong)
    return 2.0 * (y[:, None] ^ flipped) - 1, y


def rich(**settings):
    chosen = {"lr": 0.02, "erm_steps": 40, "dro_steps": 150, "synth_steps": 150}
    chosen |= {"generator": torch.Generator().manual_seed(0)} | settings
    return RichFeatures(
        chosen.pop("make_net", lambda: nn.Sequential(nn.Linear(2, 6), nn.ReLU())),
        chosen.pop("make_head", lambda: nn.Linear(6, 1)),
        **chosen,
    )


@pytest.fixture(scope="module")
def fitted():
    return rich().fit(*two_cues())


# Sets and samples


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 4))
def test_sets_split_the_examples_by_each_model(seed, k):
    correct = torch.rand(30, k, generator=torch.Generator().manual_seed(seed)) < 0.6
    correct[0], correct[1] = True, False  # no set is empty
    sets = discovery_sets(correct)
    assert len(sets) == 2 * k
    for i in range(k):
        right, wrong = sets[2 * i], sets[2 * i + 1]
        assert len(right) + len(wrong) == 30
        assert correct[right, i].all()
        assert not correct[wrong, i].any()
    # The accuracy of model i is 1 on A_i and 0 on B_i, by the averaging matrix.
    matrix = averaging_matrix(sets, 30, dtype=torch.float64)
    accuracies = matrix @ correct.double()
    for i in range(k):
        torch.testing.assert_close(
            accuracies[2 * i : 2 * i + 2, i], torch.tensor([1.0, 0.0], dtype=torch.float64)
        )


def test_empty_sets_are_left_out_with_a_warning():
    correct = torch.tensor([[True, True], [True, False], [True, True]])
    with pytest.warns(UserWarning, match="model 0 is wrong on no example"):
        sets = discovery_sets(correct)
    assert [rows.tolist() for rows in sets] == [[0, 1, 2], [0, 2], [1]]


def test_perfect_models_leave_nothing_to_discover():
    with pytest.raises(ValueError, match="round 1 fits the training set perfectly; lower erm"):
        discovery_sets(torch.ones(5, 2, dtype=torch.bool))


def test_group_dro_is_the_largest_mean_of_all_sets():
    g = torch.Generator().manual_seed(0)
    sets = discovery_sets(torch.rand(50, 3, generator=g) < 0.8)
    losses = torch.rand(2, 50, generator=g, dtype=torch.float64)
    ours = group_dro_loss(losses, averaging_matrix(sets, 50))
    twin = torch.stack([max(row[rows].mean() for rows in sets) for row in losses])
    torch.testing.assert_close(ours, twin, rtol=1e-6, atol=0)  # the matrix is float32
    assert group_dro_loss(losses[0], averaging_matrix(sets, 50)).shape == ()


def test_gradient_of_group_dro_goes_through_the_worst_set_only():
    sets = [torch.tensor([0, 1]), torch.tensor([2, 3, 4, 5])]
    losses = torch.tensor([1.0, 1.0, 3.0, 0.0, 2.0, 3.0], requires_grad=True)
    group_dro_loss(losses, averaging_matrix(sets, 6)).backward()
    assert losses.grad.tolist() == [0, 0, 0.25, 0.25, 0.25, 0.25]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), half=st.integers(1, 40), k=st.integers(2, 4))
def test_half_of_the_synthesis_sample_divides_the_models(seed, half, k):
    g = torch.Generator().manual_seed(seed)
    correct = torch.rand(25, k, generator=g) < 0.7
    correct[0], correct[1], correct[2] = True, False, torch.arange(k) == 0
    rows = synthesis_sample(correct, 2 * half, g)
    agree = (correct.all(1) | ~correct.any(1))[rows]
    assert agree[:half].all()
    assert not agree[half:].any()
    assert len(rows) == 2 * half


def test_synthesis_sample_is_uniform_and_repeatable():
    correct = torch.tensor([[True, True], [False, False], [True, False], [False, True]])
    rows = synthesis_sample(correct, 8000, torch.Generator().manual_seed(3))
    counts = rows.bincount(minlength=4)
    assert (counts - 2000).abs().max() < 6 * (4000 * 0.25) ** 0.5
    again = synthesis_sample(correct, 8000, torch.Generator().manual_seed(3))
    assert torch.equal(rows, again)


def test_samples_and_sets_refuse():
    correct = torch.tensor([[True, False], [True, True]])
    for n in (0, 3, -2):
        with pytest.raises(ValueError, match="n must be even"):
            synthesis_sample(correct, n)
    with pytest.raises(ValueError, match="models disagree: they are identical"):
        synthesis_sample(correct[:, :1].expand(2, 2), 2)
    with pytest.raises(ValueError, match="models agree: they are each other's opposite"):
        synthesis_sample(torch.tensor([[True, False]]), 2)
    for sets in ([], [torch.arange(0)]):
        with pytest.raises(ValueError, match="no empty one"):
            averaging_matrix(sets, 3)
    for bad in (3, -1):
        with pytest.raises(ValueError, match="indices from 0 to 2"):
            averaging_matrix([torch.tensor([0, bad])], 3)
    with pytest.raises(ValueError, match="per_sample_loss must be finite"):
        group_dro_loss(torch.tensor([float("nan")]), torch.ones(1, 1))


# RichFeatures


def test_second_round_finds_the_other_cue(fitted):
    x, y = two_cues()
    first, second = ((m(x)[:, 0] > 0).float() for m in fitted.models_)
    # Each of the first two follows one column, not the same one.
    followed = [
        [float(((z > 0.5) == (x[:, j] > 0)).float().mean()) for j in (0, 1)]
        for z in (first, second)
    ]
    assert followed[0][1] > 0.99 > followed[0][0]
    assert followed[1][0] > 0.9 > followed[1][1]
    assert fitted.worst_accuracies_[0] > 0.6
    assert fitted.error_shares_ == pytest.approx((~fitted.groups_).double().mean(0).tolist())
    for i, model in enumerate(fitted.models_):
        assert torch.equal((model(x)[:, 0] > 0).long() == y, fitted.groups_[:, i])


def test_joint_network_holds_both_cues_linearly(fitted):
    x, _ = two_cues(seed=1)
    phi = torch.cat([fitted.transform(x), torch.ones(len(x), 1)], 1)
    for column in (0, 1):
        fit = phi @ torch.linalg.lstsq(phi, x[:, column : column + 1], driver="gelsd").solution
        assert ((fit > 0) == (x[:, column : column + 1] > 0)).all()


def test_transform_is_the_networks_output_without_gradients(fitted):
    x, _ = two_cues()
    phi = fitted.transform(x)
    assert phi.shape == (400, 6)
    assert not phi.requires_grad
    torch.testing.assert_close(phi, fitted.features_(x).detach())
    chunked = copy.copy(fitted)
    chunked.batch_size = 37
    torch.testing.assert_close(chunked.transform(x), phi)


def test_same_generator_same_networks_and_torchs_own_generator_untouched():
    before = torch.get_rng_state()
    first, second = (rich(dro_steps=60, synth_steps=20).fit(*two_cues()) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    for a, b in zip(first.features_.parameters(), second.features_.parameters(), strict=True):
        assert torch.equal(a, b)


def test_stages_against_a_plain_loop():
    """Round 0, round 1 and synthesis, written out with explicit norms and one mean for each set."""
    x, y = two_cues(101)
    g = torch.Generator().manual_seed(0)
    ours = rich(dro_steps=80, synth_steps=30, l2=1e-3).fit(x, y)

    def build(make):
        seed = int(torch.randint(2**62, (), generator=g))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return make()

    def optimise(modules, objective, steps):
        parameters = [p for m in modules for p in m.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=0.02)
        for _ in range(steps):
            optimizer.zero_grad()
            (objective() + 1e-3 * sum(p.square().sum() for p in parameters)).backward()
            optimizer.step()

    models, correct = [], []
    for k, steps in ((0, 40), (1, 80)):
        net, head = build(ours.make_net), build(ours.make_head)

        def objective(net=net, head=head, k=k):
            z = head(net(x))[:, 0]
            loss = F.binary_cross_entropy_with_logits(z, y.float(), reduction="none")
            return max(loss[correct[0]].mean(), loss[~correct[0]].mean()) if k else loss.mean()

        optimise([net, head], objective, steps)
        models.append((net, head))
        correct.append((head(net(x))[:, 0] > 0) == y)
    rows = synthesis_sample(torch.stack(correct, 1), 100, g)
    net, heads = build(ours.make_net), [build(ours.make_head) for _ in range(2)]
    taught = [(h(f(x[rows]))[:, 0] > 0).float() for f, h in models]

    def distil():
        phi = net(x[rows])
        pairs = zip(heads, taught, strict=True)
        return sum(F.binary_cross_entropy_with_logits(h(phi)[:, 0], t) for h, t in pairs) / 2

    optimise([net, *heads], distil, 30)
    torch.testing.assert_close(ours.transform(x), net(x).detach(), rtol=2e-3, atol=2e-4)
    joint = (heads[0].weight + heads[1].weight) / 2
    torch.testing.assert_close(ours.head_.weight.detach(), joint.detach(), rtol=2e-3, atol=2e-4)
    mean = sum(h(net(x)) for h in heads) / 2
    torch.testing.assert_close(ours.head_(ours.features_(x)), mean, rtol=2e-3, atol=5e-4)


def test_three_classes_and_three_rounds():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(600) % 3
    other = torch.randint(3, (600, 3), generator=g)
    flipped = torch.rand(600, 3, generator=g) < torch.tensor([0.15, 0.2, 0.25])
    x = F.one_hot(torch.where(flipped, other, y[:, None]), 3).float().flatten(1)
    found = rich(
        make_net=lambda: nn.Linear(9, 8), make_head=lambda: nn.Linear(8, 3), rounds=3, dro_steps=250
    ).fit(x, y)
    assert len(found.models_) == 3
    assert found.groups_.shape == (600, 3)
    assert found.head_.weight.shape == (3, 8)
    assert all(worst > 1 / 3 for worst in found.worst_accuracies_)
    accuracy = (found.head_(found.transform(x)).argmax(1) == y).float().mean()
    assert accuracy > 0.8


def test_minibatches_find_both_cues_too():
    x, y = two_cues(600)
    found = rich(batch_size=128, dro_steps=200).fit(x, y)
    assert found.worst_accuracies_[0] > 0.6
    assert found.groups_.shape == (600, 2)


def test_networks_with_dropout_predict_without_it():
    x, y = two_cues()
    found = rich(make_net=lambda: nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Dropout(0.2))).fit(
        x, y
    )
    assert torch.equal(found.transform(x), found.transform(x))
    assert not any(module.training for module in found.features_.modules())


def test_discovery_stops_when_a_later_round_finds_nothing():
    with pytest.warns(UserWarning, match="round 2 is no better than chance .* stops with 2 models"):
        found = rich(rounds=3).fit(*two_cues())
    assert len(found.models_) == 2
    assert len(found.worst_accuracies_) == 2


def test_refusals_of_fit():
    x, y = two_cues(60)
    with pytest.raises(ValueError, match="X must be finite"):
        rich().fit(x * float("nan"), y)
    with pytest.raises(TypeError, match="X must be a real floating-point"):
        rich().fit(x.long(), y)
    with pytest.raises(ValueError, match="y has 3 entries, X has 60"):
        rich().fit(x, y[:3])
    with pytest.raises(ValueError, match="env has 2 entries, X has 60"):
        rich().fit(x, y, torch.arange(2))
    with pytest.raises(ValueError, match=r"0 and 1 .binary., got 2"):
        rich().fit(x, y + 1)
    with pytest.raises(ValueError, match="class ids 0 to 2, got 5"):
        rich(make_head=lambda: nn.Linear(6, 3)).fit(x, y * 5)
    with pytest.raises(TypeError, match=r"must return nn.Linear, got Sequential"):
        rich(make_head=lambda: nn.Sequential(nn.Linear(6, 1))).fit(x, y)
    with pytest.raises(ValueError, match="round 0 fits the training set perfectly"):
        rich(erm_steps=200).fit(torch.cat([2.0 * y[:, None] - 1] * 2, 1), y)
    with pytest.raises(ValueError, match=r"round 1 is no better than chance .* nothing new"):
        rich(dro_steps=60).fit(torch.cat([x[:, 1:]] * 2, 1), y)
    with pytest.raises(RuntimeError, match="call fit first"):
        rich().transform(x)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rounds": 1},
        {"erm_steps": 0},
        {"synth_steps": -1},
        {"lr": 0},
        {"lr": float("nan")},
        {"l2": -1.0},
        {"batch_size": 3},
    ],
)
def test_settings_out_of_range(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        rich(**wrong)


# Heads on frozen features


def frozen(classes=2, n=120):
    g = torch.Generator().manual_seed(1)
    phi = torch.randn(n, 4, generator=g, dtype=torch.float64)
    y = torch.randint(classes, (n,), generator=g)
    return phi, y, torch.randint(3, (n,), generator=g)


RUNS = (
    ("vrex", 50.0),
    ("erm", 0.0),
    ("irmv1", 0.5),
    ("fishr", 50.0),
    ("iga", 50.0),
    ("clove", 50.0),
    ("spectral_decoupling", 2.0),
)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_grid_of_heads_is_each_head_trained_alone_by_autograd(classes):
    phi, y, env = frozen(classes)
    g = torch.Generator().manual_seed(2)
    c = 1 if classes == 2 else classes
    start = Heads(
        torch.randn(7, c, 4, generator=g).double(), torch.randn(7, c, generator=g).double()
    )
    ends = [12, 12, 8, 12, 5, 12, 12]
    heads = train_heads(
        phi,
        y,
        env,
        *zip(*RUNS, strict=True),
        steps=ends,
        lr=0.05,
        l2=0.01,
        classes=classes,
        start=start,
    )
    logits = heads(phi)
    for i, (penalty, weight) in enumerate(RUNS):
        w, b = (t[i].clone().requires_grad_() for t in (start.weight, start.bias))
        optimizer = torch.optim.Adam([w, b], lr=0.05)
        for _ in range(ends[i]):
            z = phi @ w.mT + b
            z = z[:, 0] if classes == 2 else z
            loss = penalised_loss(penalty, weight, z, y, env, phi=phi, multiclass=classes > 2)
            if penalty not in ("fishr", "clove"):
                loss = loss + 0.01 * (w.square().sum() + b.square().sum()) / max(1.0, weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.testing.assert_close(heads.weight[i], w.detach(), rtol=1e-7, atol=1e-8)
        z = (phi @ w.mT + b).detach()
        torch.testing.assert_close(logits[i], z[:, 0] if classes == 2 else z, rtol=1e-7, atol=1e-7)


def test_watch_sees_every_step_and_zeros_are_the_start():
    phi, y, env = frozen()
    seen = []
    heads = train_heads(
        phi,
        y,
        env,
        ["erm"],
        [0],
        steps=3,
        watch=lambda step, h: seen.append((step, h.weight.clone())),
    )
    assert [step for step, _ in seen] == [0, 1, 2, 3]
    assert not seen[0][1].any()
    assert torch.equal(seen[3][1], heads.weight)
    assert torch.equal(train_heads(phi, y, env, ["erm"], [0], steps=0).weight, seen[0][1])


def test_half_features_are_trained_in_float32():
    phi, y, env = frozen()
    heads = train_heads(phi.half(), y, env, ["vrex"], [10.0], steps=5, lr=0.05)
    full = train_heads(phi, y, env, ["vrex"], [10.0], steps=5, lr=0.05)
    assert heads.weight.dtype == torch.float32
    torch.testing.assert_close(heads.weight.double(), full.weight, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"penalties": ["rex"]}, "penalty must be one of"),
        ({"weights": [-1.0]}, "weight must be at least 0"),
        ({"weights": [1.0, 2.0]}, "one entry for each run"),
        ({"penalties": [], "weights": []}, "one entry for each run"),
        ({"steps": -1}, "steps must be at least 0"),
        ({"steps": [1, 2]}, "one for each run"),
        ({"lr": 0}, "lr must be positive"),
        ({"l2": float("inf")}, "l2 at least 0"),
        ({"classes": 1}, "classes must be at least 2"),
        ({"env": torch.zeros(120, dtype=torch.long)}, "at least 2 environments"),
        ({"env": torch.arange(3)}, "one id for each of the 120"),
        ({"y": torch.full((120,), 2)}, "0 and 1 .binary., got 2"),
        ({"phi": torch.full((120, 4), float("nan"))}, "phi must be finite"),
        ({"start": Heads(torch.zeros(2, 1, 4), torch.zeros(2, 1))}, "start must hold 1 or 1 heads"),
    ],
)
def test_refusals_of_heads(change, words):
    phi, y, env = frozen()
    arguments = {"phi": phi, "y": y, "env": env, "penalties": ["vrex"], "weights": [1.0]} | change
    with pytest.raises(ValueError, match=words):
        train_heads(**arguments)
