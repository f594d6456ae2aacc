"""The lab of the papers on merging: questions stay apart, heads stay frozen, parts are apart."""

import pytest
import torch

from stiefel.papers.attribute_digits import TASKS, expert, finetune, prepare, split, targets


@pytest.fixture(scope="module")
def lab():
    return prepare(0, width=32, train=600, validation=100, epochs=12)


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)


def trained(lab, tasks, **options):
    weights = {name: value.requires_grad_() for name, value in lab.stacked(tasks).items()}
    parameters = list(weights.values())
    return finetune(lab, parameters, lambda: weights, adam(parameters), tasks=tasks, **options)


def test_targets_say_what_the_questions_ask():
    digits = torch.arange(10)
    asked = {
        "even": lambda d: d % 2 == 0,
        "five or more": lambda d: d >= 5,
        "prime": lambda d: d in (2, 3, 5, 7),
        "remainder by 3": lambda d: d % 3,
        "has a loop": lambda d: d in (0, 6, 8, 9),
    }
    for task, answer in asked.items():
        assert targets(task, digits).tolist() == [int(answer(d)) for d in range(10)]


def test_parts_share_no_image_and_hold_all_of_them():
    parts = split(3, 1000, 200)
    assert [len(part.y) for part in parts] == [1000, 200, 597]
    assert all(part.x.min() == 0 and part.x.max() == 1 for part in parts)
    other = split(4, 1000, 200)
    assert not torch.equal(parts[0].y, other[0].y)


def test_the_base_knows_the_digits_and_guesses_the_questions(lab):
    assert lab.accuracy(lab.base) > 75
    assert 30 < lab.mean_accuracy(lab.base) < 70


@pytest.mark.parametrize("clip", [None, 0.05])
def test_experts_trained_at_once_equal_experts_trained_apart(lab, clip, monkeypatch):
    """With the same images for all: the stack must not mix the questions, clipped or not."""
    import stiefel.papers.attribute_digits as module

    def same_images(count, tasks, generator):
        while True:
            for index in torch.randperm(count, generator=generator).split(64)[:-1]:
                yield index.expand(tasks, -1)

    monkeypatch.setattr(module, "_batches", same_images)
    tasks = tuple(TASKS)
    together = trained(lab, tasks, steps=20, clip=clip)
    for row, task in enumerate(tasks):
        alone = trained(lab, (task,), steps=20, clip=clip)
        for name, value in expert(together, row).items():
            torch.testing.assert_close(value, alone[name][0], atol=1e-5, rtol=1e-4)
            assert not torch.allclose(value, lab.base[name])


def test_clipping_bounds_each_question_by_itself():
    from stiefel.papers.attribute_digits import _clip_each

    parameters = [torch.zeros(2, 3, 3), torch.zeros(2, 4)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    parameters[0].grad[1] *= 0.01
    parameters[1].grad[1] *= 0.01
    _clip_each(parameters, 1.0)
    norms = torch.cat([p.grad.flatten(1) for p in parameters], 1).norm(dim=1)
    torch.testing.assert_close(norms, torch.tensor([1.0, 0.01 * 13**0.5]), atol=1e-5, rtol=0)


def test_experts_learn_their_question(lab):
    tasks = tuple(TASKS)
    stack = trained(lab, tasks, steps=100)
    for row, task in enumerate(tasks):
        assert lab.accuracy(expert(stack, row), task) > 80


def test_a_penalty_reaches_the_matrices(lab):
    tasks = ("even", "prime")

    def stay(weights):
        return 1e3 * sum((weights[n] - lab.base[n]).square().sum() for n in weights)

    free, held = trained(lab, tasks, steps=20), trained(lab, tasks, steps=20, penalty=stay)
    move = [(w["second"] - lab.base["second"]).norm() for w in (free, held)]
    assert move[1] < move[0]


def test_one_seed_gives_one_lab():
    first, second = (prepare(5, width=8, train=200, epochs=1) for _ in range(2))
    assert torch.equal(first.base["first"], second.base["first"])
    assert all(torch.equal(first.heads[t], second.heads[t]) for t in TASKS)
