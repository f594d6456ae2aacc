import pytest
import torch
from torch import nn

from stiefel.optim import split_parameters
from stiefel.papers.normalized_momentum import NormalizedMomentum


def test_three_steps_by_hand():
    weight = nn.Parameter(torch.ones(3, 2, dtype=torch.float64))
    optimizer = NormalizedMomentum([weight], lr=0.1, momentum=0.9, weight_decay=0.5)
    expected, m = weight.detach().clone(), torch.zeros(3, 2, dtype=torch.float64)
    for t in range(3):
        g = torch.cos(torch.arange(6.0, dtype=torch.float64) + t).reshape(3, 2)
        weight.grad = g.clone()
        optimizer.step()
        m = 0.9 * m + 0.1 * g
        u = 0.1 * g + 0.9 * m
        expected = 0.95 * expected - 0.1 * 1.5**0.5 * u / u.square().sum().sqrt()
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-13, atol=0)


def test_zero_gradient_leaves_the_matrix():
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.zeros(2, 2)
    NormalizedMomentum([weight], lr=0.1).step()
    assert (weight == 1).all()


def test_the_rest_is_adamw_s():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    optimizer = NormalizedMomentum(
        split_parameters(model), lr=0.1, adamw_lr=0.02, adamw_betas=(0.8, 0.9)
    )
    rules = {g["rule"]: g for g in optimizer.param_groups}
    assert (rules["elementwise"]["lr"], rules["elementwise"]["betas"]) == (0.02, (0.8, 0.9))
    before = model[0].weight.detach().clone()
    model(torch.tensor([1])).sum().backward()
    optimizer.step()
    torch.testing.assert_close((before - model[0].weight).detach()[1].abs(), torch.full((4,), 0.02))


@pytest.mark.parametrize("momentum", [-0.1, 1.0])
def test_momentum_out_of_range(momentum):
    with pytest.raises(ValueError, match="momentum"):
        NormalizedMomentum([nn.Parameter(torch.ones(2, 2))], lr=0.1, momentum=momentum)
