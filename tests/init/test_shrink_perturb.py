import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from stiefel.init import shrink_perturb_, warm_start
from stiefel.init import shrink_perturb_noise as noise_module
from stiefel.init.shrink_perturb_noise import PIECE_CPU, Law, initial_laws, pieces
from stiefel.optim import Muon, split_parameters


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class One(nn.Module):
    """One parameter with a reset of one's choice."""

    def __init__(self, value, reset):
        super().__init__()
        self.w = nn.Parameter(value)
        self._reset = reset

    def reset_parameters(self):
        self._reset(self.w)


class Bare(nn.Module):
    def __init__(self, value=None):
        super().__init__()
        self.w = nn.Parameter(torch.ones(2, 2) if value is None else value)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def net():
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))


def state(module):
    return {name: t.clone() for name, t in module.state_dict().items()}


def test_exact_value():
    module, fresh = (
        Bare(torch.tensor([[1.0, -2], [3, 0.5]])),
        Bare(torch.tensor([[0.2, 0.4], [-0.6, 0.8]])),
    )
    assert shrink_perturb_(module, 0.4, 0.1, fresh=fresh) is module
    expected = torch.tensor([[0.42, -0.76], [1.14, 0.28]])
    torch.testing.assert_close(module.w.detach(), expected, atol=1e-7, rtol=0)


def test_bias_free_relu_is_homogeneous(generator):
    layers = [nn.Linear(20, 30, bias=False), nn.Linear(30, 30, bias=False)]
    layers.append(nn.Linear(30, 10, bias=False))
    f = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]).double()
    x = torch.randn(100, 20, generator=generator, dtype=torch.float64)
    before = f(x).detach()
    shrink_perturb_(f, 0.6, 0)
    after = f(x).detach()
    assert (after - 0.216 * before).abs().max() < 1e-15
    assert torch.equal(after.argmax(1), before.argmax(1))


@pytest.mark.parametrize(
    ("shrink", "sigma", "std"), [(0.4, 0.1, 0.1091089451), (0.6, 0.01, 0.0125)]
)
def test_stationary_spread(shrink, sigma, std):
    assert sigma / math.sqrt(1 - shrink**2) == pytest.approx(std, abs=5e-11)
    module, generator = Bare(torch.ones(200_000, dtype=torch.float64)), seeded()
    for _ in range(30):
        shrink_perturb_(module, shrink, sigma, noise="gaussian", generator=generator)
    assert module.w.std().item() == pytest.approx(std, rel=0.01)
    assert abs(module.w.mean().item()) < 5 * std / math.sqrt(200_000)


def test_expected_norm():
    d, sigma = 100_000, 0.3
    module = Bare(torch.randn(d, generator=seeded(1), dtype=torch.float64))
    expected = 0.7**2 * module.w.square().sum().item() + d * sigma**2
    shrink_perturb_(module, 0.7, sigma, noise="gaussian", generator=seeded(2))
    assert module.w.square().sum().item() == pytest.approx(expected, rel=0.02)


@settings(max_examples=25, deadline=None)
@given(
    shrink=st.sampled_from([0, 1]) | st.floats(0, 1),
    perturb=st.sampled_from([0, 1]) | st.floats(0, 3),
    seed=st.integers(0, 2**31),
)
def test_agrees_with_the_obvious_loop(shrink, perturb, seed):
    torch.manual_seed(seed)
    module, fresh = net().double(), net().double()
    big = nn.Linear(300, 301).double()  # more than one piece
    module.append(big)
    fresh.append(nn.Linear(300, 301).double())
    expected = {
        n: shrink * p.detach() + perturb * dict(fresh.named_parameters())[n].detach()
        for n, p in module.named_parameters()
    }
    shrink_perturb_(module, shrink, perturb, fresh=fresh)
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], atol=1e-14, rtol=1e-14)


@pytest.mark.parametrize("options", [{}, {"noise": "gaussian"}, {"fresh": net}])
def test_one_and_zero_change_nothing_bit_for_bit(options):
    module = net()
    module(torch.randn(9, 5))
    module[0].weight.data[0, 0] = torch.nan
    before = state(module)
    shrink_perturb_(module, 1, 0, **options)
    for name, t in module.state_dict().items():
        assert torch.equal(t.nan_to_num(7), before[name].nan_to_num(7))


@pytest.mark.parametrize("options", [{}, {"noise": "gaussian"}, {"fresh": net}])
@pytest.mark.parametrize("perturb", [0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shrink_zero_leaves_nothing_of_a_diverged_network(options, perturb, dtype):
    module = net().to(dtype)
    for p in module.parameters():
        p.data.fill_(torch.nan)
    shrink_perturb_(module, 0, perturb, **options)
    assert all(p.isfinite().all() for p in module.parameters())
    assert any(p.any() for p in module.parameters()) == (perturb > 0)


def test_noise_is_on_the_scale_of_each_initialiser():
    module = nn.Sequential(nn.Linear(400, 300), nn.LayerNorm(300), nn.Embedding(50, 60))
    shrink_perturb_(module, 0, 0.1, generator=seeded())
    bound = 0.1 / math.sqrt(400)
    for p in module[0].parameters():
        assert bound * 0.97 < p.abs().max() <= bound * 1.000001
    assert module[0].weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert torch.equal(module[1].weight, torch.full((300,), 0.1))
    assert not module[1].bias.any()
    assert module[2].weight.std().item() == pytest.approx(0.1, rel=0.05)


RESETS = {
    "uniform": (lambda w: nn.init.uniform_(w, -2, 3), Law("uniform", -2.0, 3.0)),
    "default uniform": (lambda w: w.data.uniform_(), Law("uniform", 0.0, 1.0)),
    "keywords": (lambda w: w.data.normal_(mean=1, std=2), Law("normal", 1.0, 2.0)),
    "constant": (lambda w: nn.init.constant_(w, 0.5), Law("constant", 0.5)),
    "last one counts": (lambda w: nn.init.zeros_(nn.init.normal_(w)), Law("constant", 0.0)),
    "truncated": (lambda w: nn.init.trunc_normal_(w, std=0.02), None),
    "orthogonal": (nn.init.orthogonal_, None),
    "scaled afterwards": (lambda w: nn.init.normal_(w).data.mul_(0.1), None),
    "one row": (lambda w: nn.init.normal_(w).data[0].zero_(), None),
    "looks at values": (lambda w: w.data.fill_(float(w.data.normal_().sum() > 0) + 1), None),
}


@pytest.mark.parametrize("name", RESETS)
def test_the_law_of_a_reset_is_read_off_without_running_it(name):
    reset, law = RESETS[name]
    module = One(torch.zeros(6, 4), reset)
    found = initial_laws(module, {id(module.w): "w"})[id(module.w)]
    assert found == (module if law is None else law)
    assert not module.w.any()


@pytest.mark.parametrize("name", [n for n in RESETS if RESETS[n][1] is None])
def test_other_resets_are_run_for_real_with_the_generator(name):
    module = One(torch.full((6, 4), 7.0), RESETS[name][0])
    twin = copy.deepcopy(module)
    before = torch.random.get_rng_state()
    shrink_perturb_(module, 0, 1, generator=seeded(3))
    assert torch.equal(torch.random.get_rng_state(), before)
    shrink_perturb_(twin, 0, 1, generator=seeded(3))
    assert torch.equal(module.w, twin.w)
    if name == "orthogonal":
        torch.testing.assert_close(module.w.mT @ module.w, torch.eye(4), atol=1e-5, rtol=0)
    if name == "one row":
        assert not module.w[0].any()
        assert module.w[1:].all()


def test_padding_row_of_an_embedding_only_shrinks():
    module = nn.Embedding(10, 4, padding_idx=2)
    module.weight.data.fill_(1.0)
    shrink_perturb_(module, 0.5, 0.1, generator=seeded())
    assert torch.equal(module.weight[2], torch.full((4,), 0.5))
    assert (module.weight[:2] != 0.5).all()


def recorded(monkeypatch, module):
    """Laws of a module by name, and the layers whose resets were run for them."""
    asked = []
    record = noise_module._recorded

    def counting(layer, reset):
        asked.append(layer)
        return record(layer, reset)

    monkeypatch.setattr(noise_module, "_recorded", counting)
    names = {id(p): name for name, p in module.named_parameters()}
    found = initial_laws(module, names)
    monkeypatch.undo()
    return {names[key]: law for key, law in found.items()}, asked


def test_equal_layers_are_asked_once(monkeypatch):
    layers = [nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)]
    laws, asked = recorded(monkeypatch, nn.Sequential(*layers))
    assert len(asked) == 2
    assert laws["0.weight"] == laws["2.weight"] == laws["4.weight"]
    assert laws["0.weight"].second == pytest.approx(0.5)
    assert laws["1.bias"] == laws["3.bias"] == Law("constant", 0.0)


def test_layers_that_differ_in_any_setting_are_asked_each(monkeypatch):
    odd = nn.Linear(4, 4)
    odd.reset_parameters = lambda: nn.init.zeros_(odd.weight)
    layers = [nn.Embedding(4, 4), nn.Embedding(4, 4, padding_idx=1)]
    layers += [nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4).double()]
    layers += [nn.Linear(9, 4), nn.Linear(4, 4).bfloat16()]
    laws, asked = recorded(monkeypatch, nn.Sequential(*layers))
    assert len(asked) == len(layers)
    assert isinstance(laws["0.weight"], Law)
    assert laws["1.weight"] is layers[1]
    assert laws["5.weight"].second == pytest.approx(1 / 3)
    # One that was given a reset of its own is asked too: it writes elsewhere.
    with pytest.raises(TypeError, match="leaves weight as it is"):
        recorded(monkeypatch, nn.Sequential(nn.Linear(4, 4), odd))


def test_somebody_else_s_layers_are_asked_each_time(monkeypatch):
    values = iter((1.0, 2.0))
    layers = [One(torch.zeros(3), lambda w: w.data.fill_(next(values))) for _ in range(2)]
    laws, asked = recorded(monkeypatch, nn.Sequential(*layers))
    assert len(asked) == 2
    assert {law.first for law in laws.values()} == {1.0, 2.0}


@pytest.mark.parametrize("shrink", [0.9, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_small_tensors_together_are_bit_for_bit_the_loop(monkeypatch, shrink, dtype):
    monkeypatch.setattr(noise_module, "LIST_CPU", 100)  # several lists
    module, fresh = (
        nn.ParameterList([torch.randn(n, dtype=dtype) for n in (3, 90, 0, 70, 1)]) for _ in range(2)
    )
    before = [p.detach().clone() for p in module]
    shrink_perturb_(module, shrink, 0.3, fresh=fresh)
    for p, old, new in zip(module, before, fresh, strict=True):
        wanted = new * 0.3 if shrink == 0 else old.mul(shrink).add_(new.detach(), alpha=0.3)
        assert torch.equal(p.detach(), wanted.detach())


def test_torch_s_own_layers_all_reset_themselves():
    layers = [nn.TransformerEncoderLayer(8, 2), nn.LSTM(3, 4), nn.Conv2d(3, 4, 3), nn.PReLU()]
    layers += [nn.Bilinear(2, 3, 4), nn.GroupNorm(2, 4), nn.MultiheadAttention(8, 2)]
    module = nn.Sequential(*layers)
    shrink_perturb_(module, 0.5, 0.1)
    # A parent has the last word: attention zeroes the bias of its output.
    shrink_perturb_(module, 0, 1)
    assert not module[-1].out_proj.bias.any()
    assert module[-1].out_proj.weight.any()


def test_same_seed_same_network_whatever_the_device_of_the_generator():
    nets = [copy.deepcopy(module) for module in [net()] * 3]
    for module, seed in zip(nets, (1, 1, 2), strict=True):
        shrink_perturb_(module, generator=seeded(seed))
    assert torch.equal(nets[0][0].weight, nets[1][0].weight)
    assert not torch.equal(nets[0][0].weight, nets[2][0].weight)


def test_pieces_draw_the_numbers_of_one_draw():
    n = 2 * PIECE_CPU + 40
    module = Bare(torch.zeros(n))
    shrink_perturb_(module, 1, 1.0, noise="gaussian", generator=seeded(4))
    assert torch.equal(module.w.detach(), torch.randn(n, generator=seeded(4)))


def test_layouts_and_views_are_covered():
    for t in (torch.empty(70, 3, 40, 40).to(memory_format=torch.channels_last), torch.empty(())):
        module = Bare(t.fill_(1.0))
        strides = module.w.stride()
        shrink_perturb_(module, 0, 1.0, noise="gaussian")
        assert (module.w != 1).all()
        assert module.w.stride() == strides
        assert sum(p.numel() for p in pieces(module.w.detach())) == t.numel()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types_round_once(dtype):
    module, fresh = nn.Linear(40, 30).to(dtype), nn.Linear(40, 30).to(dtype)
    parts = 0.3 * module.weight.detach().double(), 0.7 * fresh.weight.detach().double()
    exact, size = sum(parts), sum(part.abs() for part in parts)
    shrink_perturb_(module, 0.3, 0.7, fresh=fresh)
    assert module.weight.dtype == dtype
    error = (module.weight.double() - exact).abs()
    eps = torch.finfo(dtype).eps
    if dtype.itemsize == 2:  # half an ulp of the result: mixed in float32, rounded once
        assert (error <= 0.51 * eps * exact.abs() + 1e-6).all()
    assert (error <= 2 * eps * size).all()


def test_complex_parameters():
    module = Bare(torch.ones(3, dtype=torch.complex64))
    fresh = Bare(torch.full((3,), 2j))
    shrink_perturb_(module, 0.5, 0.5, fresh=fresh)
    assert torch.equal(module.w.detach(), torch.full((3,), 0.5 + 1j))
    shrink_perturb_(module, 0, 1, noise="gaussian")
    assert module.w.imag.any()


@pytest.mark.parametrize("options", [{}, {"noise": "gaussian"}, {"fresh": None}])
def test_tied_weights_once(options):
    def tied():
        module = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
        module[1].weight = module[0].weight
        return module

    module = tied()
    if "fresh" in options:
        options = {"fresh": tied}
    weight = module[0].weight
    before = weight.detach().clone()
    shrink_perturb_(module, 0.5, 0 if not options else 1e-9, **options)
    assert module[1].weight is module[0].weight is weight
    torch.testing.assert_close(weight.detach(), 0.5 * before, atol=1e-7, rtol=0)


def test_normalisation_follows_the_rule_of_the_code():
    module = net()
    module(torch.randn(64, 5) + 3)
    norm = module[1]
    norm.weight.data.fill_(2.0)
    norm.bias.data.fill_(1.0)
    shrink_perturb_(module, 0.4, 0.1)
    torch.testing.assert_close(norm.weight.detach(), torch.full((7,), 0.4 * 2 + 0.1))
    torch.testing.assert_close(norm.bias.detach(), torch.full((7,), 0.4))
    assert not norm.running_mean.any()
    assert torch.equal(norm.running_var, torch.ones(7))
    assert norm.num_batches_tracked == 0


@pytest.mark.parametrize("fresh", [None, net])
def test_buffers_kept_or_interpolated(fresh):
    module = net()
    module(torch.randn(64, 5) + 3)
    before = state(module)
    shrink_perturb_(module, 0.4, 0.1, buffers="keep", fresh=fresh)
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(module.state_dict()[name], before[name])
    shrink_perturb_(module, 0.4, 0.1, buffers="lerp", fresh=fresh)
    after = module.state_dict()
    torch.testing.assert_close(after["1.running_var"], 0.4 * before["1.running_var"] + 0.6)
    torch.testing.assert_close(after["1.running_mean"], 0.4 * before["1.running_mean"])
    assert after["1.num_batches_tracked"] == 0


def test_other_buffers_stay_without_a_fresh_network():
    module = nn.Linear(3, 3)
    module.register_buffer("mask", torch.tensor([1, 0, 1]))
    shrink_perturb_(module)
    assert module.mask.tolist() == [1, 0, 1]
    other = nn.Linear(3, 3)
    other.register_buffer("mask", torch.tensor([5, 5, 5]))
    shrink_perturb_(module, fresh=other)
    assert module.mask.tolist() == [5, 5, 5]


def test_frozen_parameters_only_on_request():
    module = net()
    module[0].requires_grad_(False)
    before = state(module)
    shrink_perturb_(module, 0.5, 0)
    assert torch.equal(module[0].weight, before["0.weight"])
    assert torch.equal(module[3].weight, 0.5 * before["3.weight"])
    shrink_perturb_(module, 0.5, 0, include="0.*")
    assert torch.equal(module[0].weight, 0.5 * before["0.weight"])
    assert torch.equal(module[3].weight, 0.5 * before["3.weight"])


@pytest.mark.parametrize(
    "options",
    [
        {"include": ["3.weight", "3.bias"]},
        {"exclude": ["0.*", "1.*"]},
        {"include": lambda name, p: name.startswith("3")},
        {"exclude": lambda name, p: p.shape[0] == 7},
    ],
)
def test_include_and_exclude(options):
    module = net()
    before = state(module)
    shrink_perturb_(module, 0.5, 0, **options)
    for name, p in module.named_parameters():
        factor = 0.5 if name.startswith("3") else 1
        assert torch.equal(p, factor * before[name])


def test_a_tied_parameter_is_found_by_any_of_its_names():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    module[1].weight = module[0].weight
    before = module[0].weight.detach().clone()
    shrink_perturb_(module, 0.5, 0, exclude="1.weight")
    assert torch.equal(module[0].weight, before)
    shrink_perturb_(module, 0.5, 0.1, include="1.weight", generator=seeded())
    assert not torch.equal(module[0].weight, before)


def train_a_step(module, optimizer):
    F.cross_entropy(module(torch.randn(8, 5)), torch.randint(3, (8,))).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(
    "make",
    [
        lambda m: torch.optim.Adam(m.parameters(), lr=0.01),
        lambda m: torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9),
        lambda m: Muon(split_parameters(m), lr=0.01),
    ],
)
def test_optimizer_starts_anew_on_the_same_parameters(make):
    torch.manual_seed(0)
    module = net()
    optimizer = make(module)
    identities = [id(p) for p in module.parameters()]
    for _ in range(3):
        train_a_step(module, optimizer)
    shrink_perturb_(module, 0.4, 0.1, generator=seeded(), optimizer=optimizer)
    assert identities == [id(p) for p in module.parameters()]
    assert not optimizer.state
    twin = copy.deepcopy(module)
    fresh = make(twin)
    torch.manual_seed(1)
    train_a_step(module, optimizer)
    torch.manual_seed(1)
    train_a_step(twin, fresh)
    for a, b in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_optimizer_keeps_what_was_left_out_and_drops_stale_gradients():
    module = net()
    optimizer = torch.optim.Adam(module.parameters())
    train_a_step(module, optimizer)
    module(torch.randn(8, 5)).sum().backward()
    shrink_perturb_(module, exclude="3.*", optimizer=optimizer)
    assert set(optimizer.state) == {module[3].weight, module[3].bias}
    assert module[0].weight.grad is None
    assert module[3].weight.grad is not None


@pytest.mark.parametrize("bad", [-0.1, 1.0001, math.nan, math.inf])
def test_shrink_out_of_range(bad):
    with pytest.raises(ValueError, match=r"shrink must be in \[0, 1\], got"):
        shrink_perturb_(net(), bad)


@pytest.mark.parametrize("bad", [-1e-9, math.nan, math.inf])
def test_perturb_out_of_range(bad):
    with pytest.raises(ValueError, match="perturb must be finite and ≥ 0, got"):
        shrink_perturb_(net(), 0.4, bad)


class Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

    def reset_parameters(self):
        nn.init.zeros_(self.a)


def refusals():
    integer = nn.Module()
    integer.w = nn.Parameter(torch.ones(2, dtype=torch.int32), requires_grad=False)
    frozen = nn.Linear(2, 2).requires_grad_(False)
    shared = net()
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters())
    nothing = nn.Sequential(nn.Linear(3, 3), One(torch.ones(3), lambda w: w.data[0].zero_()))
    yield "noise word", net(), {"noise": "x"}, ValueError, "noise must be one of init, gaussian"
    yield "buffers", net(), {"buffers": "x"}, ValueError, "buffers must be one of reset"
    yield "empty", nn.ReLU(), {}, ValueError, "ReLU has no parameters"
    yield "frozen", frozen, {}, ValueError, "nothing to shrink"
    yield "integer", integer, {}, TypeError, "w is torch.int32"
    yield "no reset", nn.Sequential(Bare()), {}, TypeError, r"0 \(Bare\) owns w but has no reset"
    yield "half reset", Half(), {}, TypeError, "leaves b as it is"
    yield "unset", nothing, {}, ValueError, "One leaves entries of 1.w unset"
    yield "pattern", net(), {"include": ["0.*", "9.*"]}, ValueError, "include has '9"
    yield "lazy", nn.LazyLinear(3), {}, ValueError, "not initialised yet"
    yield "shape", net(), {"fresh": nn.Linear(5, 7)}, ValueError, "fresh has no 0.weight"
    other = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 4))
    yield "other", net(), {"fresh": other}, ValueError, r"3.weight is \(3, 7\) but \(4, 7\)"
    longer = net().append(nn.Linear(3, 1))
    yield "more", net(), {"fresh": longer}, ValueError, "fresh has 4.weight"
    yield "itself", shared, {"fresh": shared}, ValueError, "shares 0.weight with module"
    yield "no module", net(), {"fresh": lambda: 3}, TypeError, "got int"
    yield "both", net(), {"fresh": net, "noise": "gaussian"}, ValueError, "needs none"
    yield "stranger", net(), {"optimizer": optimizer}, ValueError, "holds none of the parameters"


@pytest.mark.parametrize("case", [pytest.param(c[1:], id=c[0]) for c in refusals()])
def test_refusals_leave_the_module_alone(case):
    module, options, error, message = case
    lazy = isinstance(module, nn.LazyLinear)
    before = {} if lazy else state(module)
    with pytest.raises(error, match=message):
        shrink_perturb_(module, **options)
    for name, t in before.items():
        assert torch.equal(module.state_dict()[name], t)


def test_no_copy_of_the_model_is_made(monkeypatch):
    # Every buffer that is made while mixing is counted; none may exceed a piece.
    module = nn.Sequential(nn.Linear(700, 700), nn.Linear(700, 700))
    largest = []
    empty = torch.empty

    def counting(*size, **options):
        made = empty(*size, **options)
        if not made.is_meta:
            largest.append(made.numel())
        return made

    monkeypatch.setattr(torch, "empty", counting)
    shrink_perturb_(module)
    assert max(largest) <= PIECE_CPU


def test_integer_parameters_can_be_left_out():
    module = nn.Linear(3, 3)
    module.register_parameter("n", nn.Parameter(torch.ones(1, dtype=torch.int64), False))
    before = module.weight.detach().clone()
    shrink_perturb_(module, 0.5, 0, exclude="n")
    assert torch.equal(module.weight, 0.5 * before)


def test_defaults_are_those_of_the_code():
    assert (warm_start.SHRINK, warm_start.PERTURB) == (0.4, 0.1)
