import math

import pytest
import torch

from stiefel.theory import (
    context_decision,
    delay_match,
    sequential_digits,
    two_alternative,
)

TASKS = (two_alternative, delay_match, context_decision)


@pytest.mark.parametrize("task", TASKS)
def test_common(task, generator):
    trials = task(400, generator)
    assert trials.inputs.shape[:2] == trials.targets.shape == (400, 8)
    assert (trials.targets[:, :7] == 0).all()
    assert set(trials.targets[:, 7].tolist()) == {1, 2}
    assert abs(float((trials.targets[:, 7] == 1).double().mean()) - 0.5) < 0.1
    assert (trials.inputs[:, :7, 0] == 1).all()  # fixation
    assert (trials.inputs[:, 7] == 0).all()
    again = task(400, torch.Generator().manual_seed(0))
    assert torch.equal(again.inputs, trials.inputs)
    assert task(2, dtype=torch.float64).inputs.dtype == torch.float64
    with pytest.raises(ValueError, match="batch"):
        task(0)
    with pytest.raises(ValueError, match="noise"):
        task(2, noise=-1.0)


def test_two_alternative_without_noise(generator):
    trials = two_alternative(500, generator, noise=0.0)
    gap = trials.inputs[:, 0, 1] - trials.inputs[:, 0, 2]
    seen = {round(float(g), 4) for g in gap.abs()}
    assert seen == {0.0, 0.064, 0.128, 0.256, 0.512}
    assert (trials.inputs[:, :7, 1:].sum(-1) - 1).abs().max() < 1e-6
    decided = gap != 0
    assert torch.equal(trials.targets[decided, 7], torch.where(gap > 0, 1, 2)[decided])
    assert 0.1 < float((~decided).double().mean()) < 0.3


def test_noise_has_the_size_asked_for(generator):
    trials = two_alternative(3000, generator, noise=0.3)
    spread = (trials.inputs[:, :7, 1:].diff(dim=1) / math.sqrt(2)).std()
    assert float(spread) == pytest.approx(0.3, rel=0.02)


def test_delay_match_without_noise(generator):
    inputs, targets = delay_match(200, generator, noise=0.0)
    assert (inputs[:, 1:6, 1:] == 0).all()  # the delay
    same = (inputs[:, 0, 1:] == inputs[:, 6, 1:]).all(-1)
    assert torch.equal(targets[:, 7], torch.where(same, 1, 2))
    assert (inputs[:, 0, 1:].sum(-1) == 1).all()  # (1, 0) or (0, 1)


def test_context_without_noise(generator):
    inputs, targets = context_decision(400, generator, noise=0.0)
    assert (inputs[:, 2:, 1:5] == 0).all()
    assert (inputs[:, :7, 5:].sum(-1) == 1).all()
    which = inputs[:, 0, 6].long()
    gaps = inputs[:, 0, [1, 3]] - inputs[:, 0, [2, 4]]
    assert {round(float(g), 3) for g in gaps.abs().flatten()} == {0.05, 0.15, 0.5}
    asked = gaps.gather(1, which[:, None])[:, 0]
    assert torch.equal(targets[:, 7], torch.where(asked > 0, 1, 2))


def test_digits_are_read_row_by_row():
    images = torch.arange(2 * 3 * 2, dtype=torch.float64).reshape(2, 3, 2)
    trials = sequential_digits(images, torch.tensor([4, 7]), largest=2.0)
    torch.testing.assert_close(trials.inputs[1, 2], torch.tensor([5.0, 5.5]).double())
    assert trials.targets.tolist() == [[-100, -100, 4], [-100, -100, 7]]


def test_loss_and_accuracy():
    trials = sequential_digits(torch.zeros(2, 3, 2), torch.tensor([1, 0]))
    outputs = torch.zeros(2, 3, 2)
    assert float(trials.loss(outputs)) == pytest.approx(math.log(2))
    outputs[:, -1, 1] = 50.0
    outputs[:, 0] = 1e3  # steps that do not count
    assert float(trials.loss(outputs)) == pytest.approx(25.0)
    assert trials.accuracy(outputs) == 0.5
    waiting = two_alternative(4)
    assert float(waiting.loss(torch.zeros(4, 8, 3))) == pytest.approx(math.log(3))


def test_bad_images():
    labels = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="as many labels"):
        sequential_digits(torch.zeros(3, 2, 2), labels)
    with pytest.raises(ValueError, match="rows"):
        sequential_digits(torch.zeros(2, 0, 2), labels)
    with pytest.raises(ValueError, match="finite"):
        sequential_digits(torch.full((2, 2, 2), math.nan), labels)
    with pytest.raises(ValueError, match="at least 0"):
        sequential_digits(torch.zeros(2, 2, 2), -labels)
    with pytest.raises(ValueError, match="largest"):
        sequential_digits(torch.zeros(2, 2, 2), labels, largest=0.0)
