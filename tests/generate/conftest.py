import copy

import pytest
import torch
from generate_models import small_network
from sklearn.datasets import load_digits

from stiefel.generate import DCTEncoder, ImageDatabase, RetrievalDiffusion


@pytest.fixture(scope="session")
def digits():
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 8 - 1).float().reshape(-1, 8, 8), torch.tensor(y)


@pytest.fixture(scope="session")
def small_set(digits):
    """120 digits as a database of their own."""
    images = digits[0][:120]
    return ImageDatabase(images, DCTEncoder(12).fit(images))


@pytest.fixture(scope="session")
def model(small_set):
    """A little trained: enough for every function, too little for pictures."""
    return RetrievalDiffusion(small_network()).fit(
        small_set.images, small_set, steps=60, batch_size=32, seed=1
    )


@pytest.fixture
def exact_model(model):
    """The same in float64."""
    other = copy.copy(model)
    other._network = copy.deepcopy(model.network).double()
    return other
