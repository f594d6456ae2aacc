import pytest
import torch

from stiefel.linalg.coefficients import table
from stiefel.papers import byte_gpt, probes
from stiefel.papers.byte_gpt import GPT, GPTSize, build_optimizer

SIZE = GPTSize(width=32, blocks=2, heads=2, context=8, vocabulary=64)


def steps_of(method, count=4):
    """A model after a few steps, its optimizer, and its matrices before the last one."""
    model = GPT(SIZE, seed=0)
    optimizer = build_optimizer(model, method, lr=0.01)
    generator = torch.Generator().manual_seed(0)
    before = {}
    for _ in range(count):
        optimizer.zero_grad()
        rows = torch.randint(SIZE.vocabulary, (4, 9), generator=generator)
        byte_gpt.next_token_loss(model, rows).backward()
        before = {name: p.detach().clone() for name, p in model.matrices().items()}
        optimizer.step()
    return model, optimizer, before


def test_variation_and_condition_of_known_matrices():
    rows = torch.tensor([[[3.0, 4.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]])
    torch.testing.assert_close(probes.variation(rows), torch.tensor([2 / 3, 0.0]))
    sigma = torch.tensor([4.0, 2.0, 0.5, 0.001])  # the last is below 0.01 of the first
    torch.testing.assert_close(probes.condition(torch.diag(sigma)[None]), torch.tensor([8.0]))


@pytest.mark.parametrize(
    ("shape", "kind"), [((4, 4), "square"), ((8, 4), "tall"), ((4, 8), "wide")]
)
def test_kinds(shape, kind):
    assert probes.kind(torch.empty(shape)) == kind


def test_for_muon_nothing_changes_between_newton_schulz_and_the_weights():
    """The probe's reconstruction of the plain update is what Muon really applies."""
    numbers = probes.row_norms(*steps_of("muon"))
    assert set(numbers) == {"square", "tall", "wide"}
    for values in numbers.values():
        # The optimizer's products are in bfloat16 where that is native, the probe's in float32.
        assert values["variation_after"] == pytest.approx(
            values["variation_before"], rel=0.05, abs=0.008
        )
    tall = numbers["tall"]
    assert tall["condition_after"] == pytest.approx(tall["condition_before"], rel=0.05)


def test_normuon_evens_out_the_rows_of_tall_matrices():
    tall = probes.row_norms(*steps_of("normuon"))["tall"]
    assert tall["variation_after"] < 0.6 * tall["variation_before"]


def test_dominance_is_measured_on_the_momentum():
    model, optimizer, before = steps_of("rmnp")
    weights = model.matrices()
    for name, weight in weights.items():
        if name.endswith("up.weight"):  # rows orthogonal in groups: r of the rest is known
            optimizer.state[weight]["momentum_buffer"] = torch.ones_like(weight)
    numbers = probes.dominance(model, optimizer, before)
    assert numbers["tall"]["average"] == pytest.approx(1.0)  # all rows parallel
    assert numbers["tall"]["columns"] == 32
    assert numbers["wide"]["columns"] == 128
    for name in ("square", "wide"):
        assert 0 < numbers[name]["least"] <= numbers[name]["average"]
        assert 0 < numbers[name]["cosine"] <= 1


def test_a_probe_needs_the_gradients():
    model, optimizer, before = steps_of("normuon")
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="gradients"):
        probes.row_norms(model, optimizer, before)


def test_probes_look_early_and_late():
    assert probes.PROBES["rmnp"].steps(200) == {10, 50, 100, 150, 200}
    assert probes.PROBES["normuon"].steps(200) == {50, 75, 100, 125, 150, 175, 200}
    assert 0 not in probes.PROBES["rmnp"].steps(4) | probes.PROBES["normuon"].steps(4)


def nesterov(model, optimizer, name):
    weight = model.matrices()[name]
    momentum = optimizer.state[weight]["momentum_buffer"].double()
    return 0.05 * weight.grad.double() + 0.95 * momentum


def test_orthogonality_is_on_the_clipped_momentum_matrix_by_matrix():
    model, optimizer, before = steps_of("root")
    numbers = probes.orthogonality(model, optimizer, before)
    classic, fitted, ratios, shares = [], [], [], []
    for block in "01":
        u = nesterov(model, optimizer, f"{block}.up.weight")
        limit = u.abs().flatten().quantile(0.9)
        kept = u.clamp(-limit, limit)
        shares.append((u - kept).abs().sum() / u.abs().sum())
        for matrix in (u, kept):
            sigma = torch.linalg.svdvals(matrix / matrix.norm())
            by = {"classic": [(3.4445, -4.7750, 2.0315)] * 5, "fitted": table("fitted").triples}
            errors = {}
            for name, triples in by.items():
                x = sigma
                for a, b, c in triples:
                    x = a * x + b * x**3 + c * x**5
                errors[name] = (x - 1).square().mean().item()
            ratios.append(errors["fitted"] / errors["classic"])
        classic.append(errors["classic"])
        fitted.append(errors["fitted"])
    tall = numbers["tall"]
    assert tall["classic"] == pytest.approx(sum(classic) / 2, rel=1e-3)
    assert tall["fitted"] == pytest.approx(sum(fitted) / 2, rel=1e-3)
    assert tall["ratio"] == pytest.approx(max(ratios), rel=1e-3)
    assert tall["removed"] == pytest.approx(float(sum(shares)) / 2, rel=1e-3)
    assert set(numbers) == {"square", "tall", "wide"}


def test_the_cosh_of_auon_scales_by_its_root_mean_square():
    model, optimizer, before = steps_of("auon")
    weights = {name: p.detach().clone() for name, p in model.matrices().items()}
    numbers = probes.cosh_effect(model, optimizer, before)
    for block in "01":
        u = nesterov(model, optimizer, f"{block}.down.weight")
        r = (u / u.norm()).cosh().square().mean().sqrt().item()
        assert numbers["wide"]["difference"] == pytest.approx(1 - 1 / r, rel=0.02)
    # A square matrix has a quarter of the entries: four times the effect.
    ratio = numbers["square"]["difference"] / numbers["wide"]["difference"]
    assert ratio == pytest.approx(4, rel=0.03)
    for name, parameter in model.matrices().items():  # only looked at
        assert torch.equal(parameter, weights[name])


def test_probes_of_root_and_auon_look_as_often_as_their_claims_say():
    assert probes.PROBES["root"].steps(200) == {10, 100, 200}
    assert probes.PROBES["auon"].steps(200) == set(range(1, 201))
