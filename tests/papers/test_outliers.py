import pytest
import torch
from torch import nn

from stiefel.papers import byte_gpt, outliers, race
from stiefel.papers.paper import Scale
from stiefel.papers.root import OUTLIERS


def quiet(fraction, message):
    pass


def test_every_entry_is_struck_or_untouched_at_the_stated_rate(generator):
    before = torch.randn(400, 500, generator=generator)
    after = before.clone()
    outliers.plant([after], 0.001, 100.0, seed=7)
    struck = after != before
    torch.testing.assert_close(after[struck], 100 * before[struck], rtol=0, atol=0)
    # 200 expected, standard deviation 14.
    assert 130 < int(struck.sum()) < 270


def test_masks_differ_between_tensors_and_seeds_and_repeat():
    def struck(seed):
        tensors = [torch.ones(60, 50), torch.ones(60, 50)]
        outliers.plant(tensors, 0.01, 3.0, seed)
        return [t == 3 for t in tensors]

    (a, b), (again, _), (other, _) = struck(1), struck(1), struck(2)
    assert torch.equal(a, again)
    assert not torch.equal(a, b)
    assert not torch.equal(a, other)


@pytest.mark.parametrize(("probability", "value"), [(0.0, 1.0), (1.0, 5.0)])
def test_never_and_always(probability, value):
    gradient = torch.ones(3, 4)
    outliers.plant([gradient], probability, 5.0, seed=0)
    assert (gradient == value).all()


@pytest.mark.parametrize("probability", [-0.1, 1.5])
def test_probability_out_of_range(probability):
    with pytest.raises(ValueError, match=r"probability must lie in \[0, 1\], got"):
        outliers.plant([torch.ones(2)], probability, 5.0, seed=0)


def test_pooled_quantile_is_of_all_entries_together():
    pool = [torch.tensor([[-4.0, 1.0]]), torch.tensor([[0.5], [2.0], [3.0]])]
    assert outliers.pooled_quantile(pool, 0.5) == 2.0
    assert outliers.pooled_quantile(pool, 0.875) == 3.5


def parameters(*values):
    made = [nn.Parameter(torch.zeros(len(v), 1)) for v in values]
    for parameter, v in zip(made, values, strict=True):
        parameter.grad = torch.tensor(v)[:, None]
    return made


def test_value_clip_keeps_the_limit_of_the_first_step():
    first, second = parameters([1.0, -8.0], [2.0, 4.0, -3.0])
    change = outliers.tampering({"seed": 0, "clip_value": 0.75}, [first, second])
    change(0)
    assert first.grad.flatten().tolist() == [1.0, -4.0]
    first.grad, second.grad = torch.full((2, 1), -100.0), torch.full((3, 1), 1.0)
    change(1)
    assert first.grad.flatten().tolist() == [-4.0, -4.0]
    assert second.grad.flatten().tolist() == [1.0, 1.0, 1.0]


def test_outliers_come_before_the_clip_and_are_new_each_step():
    config = {"seed": 3, "outliers": {"probability": 0.5, "factor": 10.0}}
    masks = []
    for step in (0, 1):
        (p,) = parameters([1.0] * 64)
        outliers.tampering(config, [p])(step)
        masks.append(p.grad.flatten() == 10)
    assert not torch.equal(*masks)
    (p,) = parameters([1.0] * 64)
    outliers.tampering({**config, "clip_value": 1.0}, [p])(0)
    assert torch.equal(p.grad.flatten() == 10, masks[0])  # the largest one is the limit


def test_without_the_keys_gradients_stay():
    (p,) = parameters([1.0, 1e9])
    outliers.tampering({"seed": 0}, [p])(0)
    assert p.grad.flatten().tolist() == [1.0, 1e9]


def test_only_block_matrices_are_struck(monkeypatch):
    seen = []

    def watch(gradients, probability, factor, seed):
        seen.append((len(gradients), probability, factor))

    monkeypatch.setattr(outliers, "plant", watch)
    config = race.plan(Scale.SMOKE).config("muon", 1e-2, seed=0)
    byte_gpt.train({**config, "outliers": OUTLIERS}, quiet)
    assert seen == [(6, 0.001, 100.0)] * 20


def test_outliers_change_a_run_reproducibly():
    config = race.plan(Scale.SMOKE).config("muon", 1e-2, seed=1)
    noisy = {**config, "outliers": OUTLIERS}
    clean, first, second = (byte_gpt.train(c, quiet)["losses"] for c in (config, noisy, noisy))
    assert first == second != clean
