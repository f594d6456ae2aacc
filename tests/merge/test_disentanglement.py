import math

import pytest
import torch
from torch import nn

from stiefel.merge import (
    TaskVector,
    absolute_accuracy,
    disentanglement_error,
    evaluate_addition,
    evaluate_negation,
    normalised_accuracy,
    select_alpha,
)


def noise(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def linear(state, x):
    return x @ state["w"].T


def two_vectors(seed=0, shape=(4, 6)):
    zero = {"w": noise(*shape, seed=seed)}
    vectors = [TaskVector(zero, {"w": zero["w"] + noise(*shape, seed=seed + i)}) for i in (1, 2)]
    return zero, vectors


def test_the_definition_term_by_term():
    zero, taus = two_vectors()
    data = [noise(50, 6, seed=10), noise(30, 6, seed=11)]
    alphas = (-1.0, 0.0, 0.5, 1)
    found = disentanglement_error(linear, zero, *taus, [data[:1], data[1:]], alphas)
    assert found.shape == (4, 4)
    assert found.dtype == torch.float64
    w, (d1, d2) = zero["w"], (t["w"] for t in taus)
    for i, a1 in enumerate(alphas):
        for j, a2 in enumerate(alphas):
            both = w + a1 * d1 + a2 * d2
            expected = 0.0
            for x, own in zip(data, (w + a1 * d1, w + a2 * d2), strict=True):
                expected += float(((x @ own.T).argmax(1) != (x @ both.T).argmax(1)).double().mean())
            assert float(found[i, j]) == pytest.approx(expected)
    assert found[1, 1] == 0
    assert (found > 0).any()


def test_batches_of_any_size_tuples_and_one_pass():
    zero, taus = two_vectors()
    x, y = noise(50, 6, seed=10), noise(30, 6, seed=11)
    whole = disentanglement_error(linear, zero, *taus, [[x], [y]], [0.5, 1])
    batches = ((part, None) for part in x.split(7))  # a generator: gone through once
    parts = disentanglement_error(linear, zero, *taus, [batches, y.split(30)], [0.5, 1])
    torch.testing.assert_close(parts, whole)


def test_tasks_that_use_other_inputs_are_disentangled():
    """τ_t J(x) = 0 for the other task's x: no error at any strength."""
    zero = {"w": noise(4, 6)}
    deltas = [torch.zeros(4, 6, dtype=torch.float64) for _ in range(2)]
    deltas[0][:, :3], deltas[1][:, 3:] = noise(4, 3, seed=1), noise(4, 3, seed=2)
    taus = [TaskVector.from_deltas({"w": d}) for d in deltas]
    data = [noise(40, 6, seed=3), noise(40, 6, seed=4)]
    data[0][:, 3:], data[1][:, :3] = 0, 0
    found = disentanglement_error(linear, zero, *taus, [[data[0]], [data[1]]], [-3, -1, 2])
    assert not found.any()


def test_heads_of_their_own_and_another_distance():
    zero, taus = two_vectors(shape=(5, 6))
    heads = [noise(3, 5, seed=20), noise(2, 5, seed=21)]
    fs = [lambda s, x, h=h: (x @ s["w"].T) @ h.T for h in heads]
    x = noise(20, 6, seed=9)
    found = disentanglement_error(
        fs, zero, *taus, [[x], [x]], [1.0], dist=lambda a, b: (a - b).square().mean(-1)
    )
    d = [t["w"] for t in taus]
    # Linear: the difference is what the other vector adds.
    expected = (x @ d[1].T @ heads[0].T).square().mean() + (x @ d[0].T @ heads[1].T).square().mean()
    torch.testing.assert_close(found[0, 0], expected)


def test_a_module_is_run_in_evaluation_mode_and_left_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.9), nn.Tanh(), nn.Linear(5, 3))
    model[0].eval()
    base = {n: p.detach().clone() for n, p in model.state_dict().items()}
    taus = [
        TaskVector(base, {n: p + noise(*p.shape, seed=i).float() for n, p in base.items()})
        for i in (1, 2)
    ]
    x = noise(40, 6).float()
    found = disentanglement_error(model, model, *taus, [[x], [x]], [0.5, 1.0])

    def by_hand(state, x):
        hidden = torch.tanh(x @ state["0.weight"].T + state["0.bias"])
        return hidden @ state["3.weight"].T + state["3.bias"]

    torch.testing.assert_close(
        found, disentanglement_error(by_hand, base, *taus, [[x], [x]], [0.5, 1.0])
    )
    assert [m.training for m in model] == [False, True, True, True]
    for name, p in model.state_dict().items():
        assert torch.equal(p, base[name])


def test_what_an_error_map_refuses():
    zero, taus = two_vectors()
    x = noise(5, 6)

    def error(f=linear, loaders=((x,), (x,)), alphas=(1.0,)):
        return lambda: disentanglement_error(f, zero, *taus, loaders, alphas)

    for call, text in (
        (error(loaders=((x,),)), "loaders must be two, one per task, got 1"),
        (error(f=(linear,)), "f must be two"),
        (error(alphas=()), "alphas must be finite numbers"),
        (error(alphas=(1.0, math.inf)), "alphas must be finite numbers"),
        (error(loaders=((x,), ())), r"loaders\[1\] has no data"),
        (error(f=lambda s, x: linear(s, x) * math.nan), "f returned NaN"),
    ):
        with pytest.raises(ValueError, match=text):
            call()


def test_accuracies():
    assert absolute_accuracy([0.5, 1.0]) == 0.75
    assert normalised_accuracy([0.4, 0.9], [0.8, 0.9]) == pytest.approx(0.75)
    assert normalised_accuracy([90], [80]) == 1.125  # weak experts
    for call, text in (
        (lambda: absolute_accuracy([]), "accuracies must be finite numbers, at least one"),
        (lambda: absolute_accuracy([math.nan]), "accuracies must be finite"),
        (lambda: normalised_accuracy([1, 1], [1]), "of the same tasks, got 2 and 1"),
        (lambda: normalised_accuracy([1], [0]), "single must be positive"),
    ):
        with pytest.raises(ValueError, match=text):
            call()


def test_choice_of_a_strength():
    found = select_alpha(lambda a: -((a - 0.3) ** 2))
    assert found.alpha == pytest.approx(0.3)
    assert len(found.scores) == 21
    assert found.score == max(found.scores)
    assert select_alpha(lambda a: 1.0, [0.5, 0.1]).alpha == 0.5  # the first of equals
    least = select_alpha(lambda a: 1 - a, control=lambda a: 1 - a, at_least=0.6, maximize=False)
    assert least.alpha == pytest.approx(0.4)
    assert sum(math.isnan(s) for s in least.scores) == 12
    for call, text in (
        (lambda: select_alpha(float, []), "at least one strength"),
        (lambda: select_alpha(float, control=float), "go together"),
        (lambda: select_alpha(float, at_least=0.0), "go together"),
        (lambda: select_alpha(float, control=float, at_least=2), "no alpha keeps the control at 2"),
        (lambda: select_alpha(lambda a: math.nan), "the score at alpha = 0.0 is NaN"),
    ):
        with pytest.raises(ValueError, match=text):
            call()


class Bench:
    """One number per task: the nearer the state is to the task's, the better."""

    zero = {"w": torch.zeros(2, dtype=torch.float64)}  # noqa: RUF012
    goals = {  # noqa: RUF012
        "x": torch.tensor([1.0, -0.2], dtype=torch.float64),
        "y": torch.tensor([-0.3, 1.0], dtype=torch.float64),
    }

    def __init__(self):
        self.asked = []
        self.taus = {t: TaskVector(self.zero, {"w": g}) for t, g in self.goals.items()}

    def accuracy(self, state, task, part):
        self.asked.append((task, part))
        goal = self.goals[task] * (1.0 if part == "validation" else 0.8)  # other α are best there
        return float(1 / (1 + (state["w"] - goal).norm()))

    def control(self, state, part):
        return float(1 / (1 + 0.2 * state["w"].norm()))


def test_addition_chooses_on_validation_and_reports_the_test():
    bench = Bench()
    found = evaluate_addition(bench.accuracy, bench.zero, bench.taus)
    goal = sum(bench.goals.values())

    def merged(alpha, task, part):
        return bench.accuracy({"w": alpha * goal}, task, part)

    best = {}
    for part in ("validation", "test"):
        scores = [sum(merged(i / 20, t, part) for t in "xy") for i in range(21)]
        best[part] = max(range(21), key=scores.__getitem__) / 20
    assert found.alpha == best["validation"] != best["test"]
    assert found.accuracies == {t: merged(found.alpha, t, "test") for t in "xy"}
    own = {t: 1 / (1 + 0.2 * float(goal.norm())) for t, goal in bench.goals.items()}
    assert found.single == pytest.approx(own)
    assert found.absolute == pytest.approx(sum(found.accuracies.values()) / 2)
    ratios = [found.accuracies[t] / own[t] for t in "xy"]
    assert found.normalised == pytest.approx(sum(ratios) / 2)


def test_negation_keeps_the_control():
    bench = Bench()
    found = evaluate_negation(bench.accuracy, bench.control, bench.zero, bench.taus)
    for task, tau in bench.taus.items():
        one = found[task]
        allowed = [i / 20 for i in range(21) if 1 / (1 + 0.2 * i / 20 * tau.norm()) >= 0.95]
        assert one.alpha == max(allowed)  # further is always worse for the target
        assert 0 < one.alpha < 1
        state = {"w": -one.alpha * bench.goals[task]}
        assert one.target == pytest.approx(bench.accuracy(state, task, "test"))
        assert one.control == pytest.approx(bench.control(state, "test"))
        assert one.target_before == pytest.approx(bench.accuracy(bench.zero, task, "test"))
        assert one.control_before == 1
    looser = evaluate_negation(bench.accuracy, bench.control, bench.zero, bench.taus, keep=0.8)
    assert looser["x"].target < found["x"].target


def test_evaluations_without_tasks():
    bench = Bench()
    with pytest.raises(ValueError, match="taus must hold at least one"):
        evaluate_addition(bench.accuracy, bench.zero, {})
    with pytest.raises(ValueError, match="taus must hold at least one"):
        evaluate_negation(bench.accuracy, bench.control, bench.zero, {})
    with pytest.raises(ValueError, match="keep must be between 0 and 1, got 2"):
        evaluate_negation(bench.accuracy, bench.control, bench.zero, bench.taus, keep=2)
