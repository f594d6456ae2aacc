"""Orthogonalising the momentum of a language model in training, which no Gaussian resembles."""

import numpy as np
import pytest
import torch
from recorded import record

from stiefel.linalg import orthogonality_error, orthogonalize
from stiefel.linalg.coefficients import NAMES, scalar_image, table


@pytest.fixture(scope="module")
def momenta():
    return record(steps=(10, 40))


def errors(stack, name, dtype=torch.bfloat16):
    return orthogonality_error(orthogonalize(stack, table(name), dtype=dtype))[1]


def test_half_of_the_spectrum_is_small(momenta):
    for stack in momenta.values():
        sigma = torch.linalg.svdvals(stack.double())
        sigma /= sigma.norm(dim=-1, keepdim=True)
        assert float(sigma[:, 0].median()) > 0.3
        assert float(sigma[:, sigma.shape[1] // 2].median()) < 0.03


@pytest.mark.parametrize(("name", "bound"), [("fitted", 0.85), ("fast", 1.9)])
def test_error_targets(momenta, name, bound):
    for stack in momenta.values():  # median over the matrices of one shape and step
        assert errors(stack, name).median() <= bound * errors(stack, "classic").median()


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_safe_and_close_to_float64(momenta, name):
    rule = table(name)
    for stack in momenta.values():
        out = orthogonalize(stack, rule, dtype=torch.bfloat16)
        assert float(torch.linalg.svdvals(out).max()) < 1.22
        sigma = torch.linalg.svdvals(stack.double())
        sigma /= rule.safety * sigma.norm(dim=-1, keepdim=True)
        image = torch.from_numpy(np.square(scalar_image(sigma.numpy(), rule.triples) - 1)).mean(-1)
        torch.testing.assert_close(errors(stack, name).double(), image, rtol=0.15, atol=1e-3)
