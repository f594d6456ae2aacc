import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from stiefel.init import (
    clove,
    environment_losses,
    fishr,
    fishr_linear,
    iga,
    iga_linear,
    irmv1,
    penalised_loss,
    spectral_decoupling,
    vrex,
)
from stiefel.init import moments as moments_module
from stiefel.init.environments import channels, groups, kernel_sums, members, split
from stiefel.init.head_training import penalty_slopes
from stiefel.init.moments import contrasts, spread
from stiefel.init.penalties import PENALTIES

Z = torch.tensor([1, -0.5, 2, 0, -1, 0.5, 1.5, -2], dtype=torch.float64)
Y = torch.tensor([1, 0, 1, 1, 1, 0, 1, 0])
ENV = torch.tensor([0] * 4 + [1] * 4)
PHI = torch.tensor(
    [[1, 2], [0, 1], [2, -1], [1, 1], [-1, 0], [1, 3], [0.5, 0.5], [2, 2]], dtype=torch.float64
)
WEIGHT, BIAS = torch.tensor([0.5, -0.25], dtype=torch.float64), 0.1
EXACT = {"rtol": 1e-14, "atol": 0.0}


def near(value, wanted):
    torch.testing.assert_close(value, torch.tensor(wanted, dtype=torch.float64), **EXACT)


def linear_head():
    head = nn.Linear(2, 1, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(WEIGHT[None])
        head.bias.fill_(BIAS)
    return head


def problem(classes, runs=(), n=40, environments=3, h=5, seed=0):
    """Random logits, features, labels and unequal environments."""
    g = torch.Generator().manual_seed(seed)
    shape = (*runs, n) if classes == 2 else (*runs, n, classes)
    z = torch.randn(shape, generator=g, dtype=torch.float64)
    phi = torch.randn(n, h, generator=g, dtype=torch.float64)
    y = torch.randint(classes, (n,), generator=g)
    env = torch.randint(environments, (n,), generator=g)
    env[:environments] = torch.arange(environments)
    return z, phi, y, env


def slow(name, z, phi, y, env, multiclass):
    """The penalties of one run as the definitions say, by autograd and loops."""

    def loss(logits, labels, reduction="mean"):
        if multiclass:
            return F.cross_entropy(logits, labels, reduction=reduction)
        return F.binary_cross_entropy_with_logits(logits, labels.to(z), reduction=reduction)

    values = []
    for e in env.unique():
        ze, ye, fe = z[env == e], y[env == e], phi[env == e]
        if name == "irmv1":
            s = torch.ones((), dtype=z.dtype, requires_grad=True)
            (slope,) = torch.autograd.grad(loss(s * ze, ye), s, create_graph=True)
            values.append(slope**2)
        elif name == "vrex":
            values.append(loss(ze, ye))
        elif name == "spectral_decoupling":
            values.append((ze**2).reshape(len(ye), -1).sum(1).mean())
        elif name == "clove":
            p = ze.softmax(-1) if multiclass else torch.stack([1 - ze.sigmoid(), ze.sigmoid()], -1)
            conf, label = p.max(-1)
            a = (label == ye).to(z) - conf
            kernel = torch.exp(-(conf[:, None] - conf[None]).abs() / 0.4)
            values.append((a[:, None] * a[None] * kernel).mean())
        else:  # gradients of each example by the weights and bias of the head, at this z
            w = torch.zeros(phi.shape[1], *z.shape[1:], dtype=z.dtype, requires_grad=True)
            b = torch.zeros(z.shape[1:], dtype=z.dtype, requires_grad=True)
            logits = ze + fe @ w + b
            rows = []
            for one in loss(logits, ye, reduction="none"):
                grads = torch.autograd.grad(one, (w, b), create_graph=True)
                rows.append(torch.cat([g.flatten() for g in grads]))
            moment = torch.stack(rows)
            values.append((moment**2 if name == "fishr" else moment).mean(0))
    values = torch.stack(values)
    if name == "irmv1":
        return values.mean()
    if name == "vrex":
        return values.var(unbiased=True)
    if name in ("spectral_decoupling", "clove"):
        return values.sum()
    return ((values - values.mean(0)) ** 2).sum()


def fast(name, z, phi, y, env, multiclass):
    if name == "spectral_decoupling":
        return spectral_decoupling(z, env, multiclass=multiclass)
    if name in ("iga", "fishr"):
        function = iga_linear if name == "iga" else fishr_linear
        return function(phi, z, y, env, multiclass=multiclass)
    return {"irmv1": irmv1, "vrex": vrex, "clove": clove}[name](z, y, env, multiclass=multiclass)


NAMES = [name for name in PENALTIES if name != "erm"]


def test_exact_values_of_logits():
    near(environment_losses(Z, Y, ENV), [0.4018534658253118, 0.6539199901810137])
    near(irmv1(Z, Y, ENV), 0.02392932917835951)
    near(vrex(Z, Y, ENV), 0.031768766350381825)
    near(spectral_decoupling(Z, ENV), 3.1875)
    near(clove(Z, Y, ENV), 0.015639174210701677 + 0.0717684654069143)


def test_exact_values_of_clove_in_each_environment():
    # With the other environment perfectly calibrated and sure, only one is left.
    sure, labels = torch.tensor([50.0, -50.0], dtype=torch.float64), torch.tensor([1, 0])
    for e, wanted in ((0, 0.015639174210701677), (1, 0.0717684654069143)):
        z, y = torch.cat([Z[e == ENV], sure]), torch.cat([Y[e == ENV], labels])
        near(clove(z, y, torch.tensor([0] * 4 + [1] * 2)), wanted)


def test_exact_values_of_a_linear_head():
    z = PHI @ WEIGHT + BIAS
    near(iga_linear(PHI, z, Y, ENV), 0.6934751397449266)
    near(fishr_linear(PHI, z, Y, ENV), 0.26882104782674543)
    head = linear_head()
    near(iga(head(PHI)[:, 0], Y, ENV, head.parameters()).detach(), 0.6934751397449266)
    near(fishr(head, PHI, Y, ENV).detach(), 0.26882104782674543)


def test_exact_second_moments_of_fishr():
    # Against an environment whose residuals vanish the spread of two is half of the square.
    wanted = (
        (0, [0.1415150595825447, 0.3324544683342524, 0.16322088908812638]),
        (1, [0.5722918104433785, 0.9106273778080627, 0.29659844837702326]),
    )
    for e, moments in wanted:
        phi = torch.cat([PHI[e == ENV], torch.zeros(1, 2, dtype=torch.float64)])
        z = torch.cat([PHI[e == ENV] @ WEIGHT + BIAS, torch.tensor([800.0], dtype=torch.float64)])
        y, env = torch.cat([Y[e == ENV], torch.tensor([1])]), torch.tensor([0] * 4 + [1])
        near(fishr_linear(phi, z, y, env), sum(m * m for m in moments) / 2)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_its_definition(name, classes):
    z, phi, y, env = problem(classes)
    z.requires_grad_()
    ours, twin = (f(name, z, phi, y, env, classes > 2) for f in (fast, slow))
    torch.testing.assert_close(ours, twin, rtol=1e-12, atol=1e-14)
    grads = [torch.autograd.grad(value, z)[0] for value in (ours, twin)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_written_out_gradient_is_autograds(name, classes):
    z, phi, y, env = problem(classes, runs=(2,))
    z.requires_grad_()
    (grad,) = torch.autograd.grad(fast(name, z, phi, y, env, classes > 2).sum(), z)
    grad = channels(grad, classes > 2)
    parts, rows = split(z.detach(), y, env, multiclass=classes > 2), members(env, len(y))
    features = F.pad(phi, (0, 1), value=1.0) ** (2 if name == "fishr" else 1)
    slopes = penalty_slopes(name, parts, [features[i] for i in rows])
    for i, slope in zip(rows, slopes, strict=True):
        torch.testing.assert_close(slope, grad[..., i], rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name, classes):
    z, phi, y, env = problem(classes, n=7, environments=2, h=2)
    inputs = (z.requires_grad_(), phi.requires_grad_())
    if name not in ("iga", "fishr"):
        inputs = (z, phi.detach())
    assert torch.autograd.gradcheck(
        lambda z, phi: fast(name, z, phi, y, env, classes > 2), inputs, atol=1e-7
    )


@pytest.mark.parametrize("runs", [(3, 2), (13, 2)])  # few and many rows of weights
@pytest.mark.parametrize("name", NAMES)
def test_runs_are_independent(name, runs):
    z, phi, y, env = problem(2, runs=runs)
    together = fast(name, z, phi, y, env, False)
    assert together.shape == runs
    alone = torch.stack(
        [torch.stack([fast(name, one, phi, y, env, False) for one in row]) for row in z]
    )
    torch.testing.assert_close(together, alone, rtol=1e-13, atol=1e-15)


def test_runs_may_have_features_and_labels_of_their_own():
    z, _, _, env = problem(2, runs=(3,))
    phi = torch.randn(3, 40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = (phi[..., 0] > 0).long()
    for function in (iga_linear, fishr_linear):
        together = function(phi, z, y, env)
        alone = [function(phi[i], z[i], y[i], env) for i in range(3)]
        torch.testing.assert_close(together, torch.stack(alone))


@pytest.mark.parametrize("own", [False, True])  # features of each run, or shared
@pytest.mark.parametrize("name", ["iga", "fishr"])
def test_features_in_blocks_give_the_same(monkeypatch, name, own):
    z, phi, y, env = problem(2, runs=(2,), environments=2)
    phi = torch.stack([phi, 2 * phi]) if own else phi
    inputs = (z.requires_grad_(), phi.requires_grad_())
    results = []
    for block in (10**6, 25):  # 40 × 5 features; the last block is smaller
        monkeypatch.setattr(moments_module, "_BLOCK_CPU", block)
        value = fast(name, z, phi, y, env, False)
        results.append((value, *torch.autograd.grad(value.sum(), inputs)))
    for whole, blocks in zip(*results, strict=True):
        torch.testing.assert_close(whole, blocks, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("counts", [[3, 4], [5, 1, 2], [1, 2, 3, 4, 5, 6]])
def test_contrasts_of_sums_are_the_spread_of_means(counts):
    g = torch.Generator().manual_seed(0)
    means = torch.randn(len(counts), 7, generator=g, dtype=torch.float64)
    sums = means * torch.tensor(counts, dtype=torch.float64)[:, None]
    table = torch.tensor(contrasts(counts), dtype=torch.float64)
    assert table.shape == (len(counts) - 1, len(counts))
    near(spread(means), float((table @ sums).square().sum()))


@pytest.mark.parametrize(
    "ids", [[0, 1], [-2, -1], [0, 1, 2], [3, 5], [0, 1, 2**62], [-(2**63), 2**63 - 1]]
)
def test_any_ids_are_sorted_into_environments(ids):
    env = torch.tensor(ids)[[1, 0, *range(len(ids)), 0]]
    wanted = env.unique(return_inverse=True)[1]
    place, counts = groups(env, len(env))
    assert torch.equal(place, wanted)
    assert counts == wanted.bincount().tolist()
    for i, rows in enumerate(members(env, len(env))):
        assert rows.tolist() == (wanted == i).nonzero()[:, 0].tolist()


def test_ids_may_be_of_any_integer_type():
    for dtype in (torch.bool, torch.uint8, torch.int8, torch.int32):
        assert torch.equal(fishr_linear(PHI, Z, Y, ENV), fishr_linear(PHI, Z, Y, ENV.to(dtype)))
        assert torch.equal(vrex(Z, Y, ENV), vrex(Z, Y.to(dtype), ENV))
    with pytest.raises(ValueError, match="env holds 0"):
        groups(torch.zeros(0, dtype=torch.int64), 0)
    with pytest.raises(ValueError, match="got -1"):
        vrex(Z, -Y, ENV)


def test_finite_logits_may_have_a_sum_that_overflows():
    z = torch.tensor([3e38, 3e38, -3e38, 3e38])
    y, env = torch.tensor([1, 1, 0, 1]), torch.tensor([0, 0, 1, 1])
    assert float(vrex(z, y, env)) == 0
    for bad in (math.inf, -math.inf, math.nan):
        with pytest.raises(ValueError, match="z must be finite, but 1 of its 4"):
            vrex(torch.where(env == torch.tensor([0, 2, 2, 2]), bad, z), y, env)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), order=st.randoms(use_true_random=False))
def test_order_of_examples_and_names_of_environments_do_not_matter(seed, order):
    z, phi, y, env = problem(2, seed=seed)
    moved = torch.tensor(order.sample(range(40), 40))
    renamed = torch.tensor([70, -3, 11])[env]
    for name in NAMES:
        before = fast(name, z, phi, y, env, False)
        after = fast(name, z[moved], phi[moved], y[moved], renamed[moved], False)
        torch.testing.assert_close(before, after, rtol=1e-11, atol=1e-15)
        assert before >= -1e-15


@pytest.mark.parametrize("name", ["vrex", "iga", "fishr"])
def test_vanishes_for_identical_environments(name):
    z, phi, y, _ = problem(2, n=20)
    twice = [torch.cat([t, t]) for t in (z, phi, y)]
    env = torch.arange(40) // 20
    assert fast(name, *twice, env, False) < 1e-30


def test_vrex_of_two_environments_is_half_the_squared_difference():
    first, second = environment_losses(Z, Y, ENV)
    near(vrex(Z, Y, ENV), float((first - second) ** 2 / 2))


def test_two_classes_by_softmax_are_the_sigmoid():
    z, phi, y, env = problem(2)
    pair = torch.stack([torch.zeros_like(z), z], -1)
    for name in ("irmv1", "vrex", "clove"):
        torch.testing.assert_close(
            fast(name, z, phi, y, env, False), fast(name, pair, phi, y, env, True)
        )


@pytest.mark.parametrize("scale", [1e-3, 0.0251, 0.4, 100.0])
def test_kernel_sums_in_sorted_order_are_those_of_the_matrix(scale):
    g = torch.Generator().manual_seed(0)
    conf = 0.5 + 0.5 * torch.rand(2, 30, generator=g, dtype=torch.float64)
    conf[:, ::3] = 0.75  # ties
    gap = torch.randn(2, 30, generator=g, dtype=torch.float64)
    distance = conf[:, :, None] - conf[:, None]
    kernel = torch.exp(-distance.abs() / scale) * gap[:, None]
    lower, ties, upper = kernel_sums(conf, gap, scale)
    for ours, chosen in ((lower, distance > 0), (ties, distance == 0), (upper, distance < 0)):
        torch.testing.assert_close(ours, (kernel * chosen).sum(-1), rtol=1e-9, atol=1e-9)


def test_clove_in_float32_and_with_many_examples():
    z, _, y, env = problem(2, n=3000)
    torch.testing.assert_close(
        clove(z.float(), y, env).double(), clove(z, y, env), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_other_precisions(name, dtype):
    z, phi, y, env = problem(2)
    z, phi = z.to(dtype), phi.to(dtype)
    low, high = (
        fast(name, z, phi, y, env, False),
        fast(name, z.double(), phi.double(), y, env, False),
    )
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), high, rtol=2e-4, atol=1e-6)


def test_losses_of_extreme_logits_stay_exact():
    z = torch.tensor([900.0, -900.0, 900.0, -900.0], dtype=torch.float64)
    y, env = torch.tensor([1, 0, 0, 1]), torch.tensor([0, 0, 1, 1])
    near(environment_losses(z, y, env), [0.0, 900.0])


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    return net.double()


def test_iga_and_fishr_of_a_network_against_single_gradients():
    net, (_, x, y, env) = network(), problem(3)
    parameters = list(net.parameters())
    rows = []
    for row, label in zip(x, y, strict=True):
        grads = torch.autograd.grad(F.cross_entropy(net(row[None]), label[None]), parameters)
        rows.append(torch.cat([g.flatten() for g in grads]))
    rows = torch.stack(rows)
    for power, ours in (
        (1, iga(net(x), y, env, parameters, multiclass=True)),
        (2, fishr(net, x, y, env, multiclass=True)),
    ):
        means = torch.stack([(rows[env == e] ** power).mean(0) for e in range(3)])
        wanted = ((means - means.mean(0)) ** 2).sum()
        torch.testing.assert_close(ours.detach(), wanted, rtol=1e-10, atol=0)


def test_iga_and_fishr_of_a_network_can_be_trained_on():
    net, (_, x, y, env) = network(), problem(3)
    weight = net[0].weight

    def value(name):
        if name == "iga":
            return iga(net(x), y, env, net.parameters(), multiclass=True)
        return fishr(net, x, y, env, multiclass=True)

    for name in ("iga", "fishr"):
        (grad,) = torch.autograd.grad(value(name), weight)
        step = 1e-6 * torch.ones_like(weight)
        with torch.no_grad():
            weight += step
        above = float(value(name).detach())
        with torch.no_grad():
            weight -= 2 * step
        below = float(value(name).detach())
        with torch.no_grad():
            weight += step
        assert (above - below) / 2 == pytest.approx(float((grad * step).sum()), rel=1e-5)


def test_iga_counts_unused_parameters_as_zero_and_fishr_leaves_out_frozen_ones():
    head, spare = linear_head(), nn.Parameter(torch.ones(3, dtype=torch.float64))
    near(iga(head(PHI)[:, 0], Y, ENV, [*head.parameters(), spare]).detach(), 0.6934751397449266)
    head.bias.requires_grad_(False)
    moments = 0.26882104782674543 - (0.29659844837702326 - 0.16322088908812638) ** 2 / 2
    assert float(fishr(head, PHI, Y, ENV).detach()) == pytest.approx(moments, rel=1e-13)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("weight", [0, 0.5, 7.0])
def test_penalised_loss_is_divided_by_weights_above_one(penalty, weight):
    z, phi, y, env = problem(2)
    total = environment_losses(z, y, env).sum()
    if penalty != "erm":
        total = (total + weight * fast(penalty, z, phi, y, env, False)) / max(1, weight)
    torch.testing.assert_close(penalised_loss(penalty, weight, z, y, env, phi=phi), total)


def test_penalised_loss_takes_iga_by_parameters():
    head = linear_head()
    z = head(PHI)[:, 0]
    by_autograd = penalised_loss("iga", 2.0, z, Y, ENV, parameters=head.parameters())
    torch.testing.assert_close(by_autograd, penalised_loss("iga", 2.0, z, Y, ENV, phi=PHI))


@pytest.mark.parametrize("function", [environment_losses, irmv1, vrex, clove])
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"env": torch.zeros(8, dtype=torch.long)}, ValueError, "at least 2 environments"),
        ({"env": torch.tensor([0, 1])}, ValueError, "one id for each of the 8"),
        ({"env": ENV.double()}, TypeError, "integer"),
        ({"y": Y + 1}, ValueError, "0 and 1 .binary., got 2"),
        ({"y": Y * 0.5}, ValueError, "got 0.5"),
        ({"y": torch.full((8,), math.nan)}, ValueError, "got nan"),
        ({"y": Y[:3]}, ValueError, "one label for each of the 8"),
        ({"z": Z.clone().fill_(math.nan)}, ValueError, "z must be finite"),
        ({"z": Z, "multiclass": True}, ValueError, "c ≥ 2"),
    ],
)
def test_refuses(function, change, error, words):
    arguments = {"z": Z, "y": Y, "env": ENV} | change
    with pytest.raises(error, match=words):
        function(arguments.pop("z"), arguments.pop("y"), arguments.pop("env"), **arguments)


def test_refuses_what_single_penalties_cannot_take():
    z = PHI @ WEIGHT
    for function in (iga_linear, fishr_linear):
        with pytest.raises(ValueError, match="one row for each of the 8"):
            function(PHI[:3], z, Y, ENV)
        with pytest.raises(ValueError, match="phi must be finite"):
            function(PHI * math.inf, z, Y, ENV)
    with pytest.raises(ValueError, match="one id for each"):
        spectral_decoupling(Z, ENV[:3])
    for scale in (0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="scale must be positive"):
            clove(Z, Y, ENV, scale)
    with pytest.raises(ValueError, match="one run"):
        iga(Z.expand(2, 8).clone().requires_grad_(), Y, ENV, [Z])
    with pytest.raises(ValueError, match="parameters is empty"):
        iga(Z, Y, ENV, [])
    with pytest.raises(ValueError, match="penalty must be one of"):
        penalised_loss("rex", 1.0, Z, Y, ENV)
    for weight in (-1.0, math.nan):
        with pytest.raises(ValueError, match="weight must be at least 0"):
            penalised_loss("vrex", weight, Z, Y, ENV)
    with pytest.raises(ValueError, match="'fishr' needs phi"):
        penalised_loss("fishr", 1.0, Z, Y, ENV)


def test_spectral_decoupling_without_environments_is_one_mean():
    near(spectral_decoupling(Z), float(Z.square().mean()))
    assert len(members(ENV, 8)) == 2
