"""The lab of the papers on merging: its questions, parts, trainings and what stays frozen."""

import pytest
import torch

from stiefel.papers import attribute_digits as lab_module
from stiefel.papers.attribute_digits import (
    MATRICES,
    TASKS,
    accuracies,
    accuracy,
    batches,
    features,
    full_finetune,
    make_lab,
)


@pytest.fixture(scope="module")
def lab():
    return make_lab(0, width=32, train=600, validation=100, epochs=15)


def test_the_questions_are_what_they_are_called():
    asked = {
        "odd": lambda d: d % 2,
        "at least 5": lambda d: d >= 5,
        "prime": lambda d: d in (2, 3, 5, 7),
        "modulo 3": lambda d: d % 3,
        "has a loop": lambda d: d in (0, 6, 8, 9),
    }
    assert set(asked) == set(TASKS)
    for task, answer in asked.items():
        assert list(TASKS[task]) == [int(answer(d)) for d in range(10)]


def test_parts_share_no_image(lab):
    assert [len(part.y) for part in (lab.train, lab.validation, lab.test)] == [600, 100, 597]
    rows = [{tuple(x.tolist()) for x in part.x} for part in (lab.train, lab.validation, lab.test)]
    assert not rows[0] & rows[2]
    assert not rows[1] & rows[2]
    wider = make_lab(0, width=8, train=1200, epochs=0)
    assert torch.equal(wider.test.x, lab.test.x)
    with pytest.raises(ValueError, match="train \\+ validation"):
        make_lab(0, train=1200, validation=1)


def test_the_base_knows_the_digits_and_guesses_the_questions(lab):
    tasks, digits = accuracies(lab.base, lab)
    assert digits > 75
    assert 30 < tasks < 70


def test_features_have_one_length(lab):
    found = features(lab.base, lab.test.x)
    torch.testing.assert_close(found.norm(dim=1), torch.full((597,), 10.0), atol=1e-4, rtol=0)


def test_an_expert_learns_its_question_with_frozen_biases_and_head(lab):
    head = lab.heads["odd"].clone()
    expert = full_finetune(lab, "odd", lr=1e-3)
    assert accuracy(expert, lab, "odd") > 85
    assert torch.equal(lab.heads["odd"], head)
    for name in expert:
        moved = not torch.equal(expert[name], lab.base[name])
        assert moved == (name in MATRICES)
    again = full_finetune(lab, "odd", lr=1e-3)
    assert all(torch.equal(expert[name], again[name]) for name in expert)


def test_a_penalty_and_a_clip_act(lab):
    def stay(trunk):
        return 1e3 * sum((trunk[n] - lab.base[n]).square().sum() for n in MATRICES)

    def moved(**options):
        expert = full_finetune(lab, "prime", steps=30, **options)
        return float((expert[MATRICES[1]] - lab.base[MATRICES[1]]).norm())

    free = moved()
    assert moved(penalty=stay) < free
    assert moved(clip=1e-9) < free / 2  # below AdamW's ε nothing is left of a gradient


def test_every_row_comes_once_before_any_comes_again():
    draw = torch.Generator().manual_seed(0)
    seen = list(batches(10, 4, 6, draw))
    assert [len(rows) for rows in seen] == [4, 4, 2, 4, 4, 2]
    for half in (seen[:3], seen[3:]):
        assert sorted(torch.cat(half).tolist()) == list(range(10))


def test_seeds_and_streams_differ():
    draws = {
        int(torch.randint(2**31, (), generator=lab_module.generator(seed, *stream)))
        for seed in range(3)
        for stream in ((), (0,), (1,), (0, 1), (1, 0))
    }
    assert len(draws) == 15
