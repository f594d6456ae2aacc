import pytest
import torch
from card_checks import (
    check_claims_follow_the_measurements,
    check_figure,
    check_smoke,
    check_snippet,
)

from stiefel.papers import Scale, UnavailableError, embedding_digits, get

SLUG = "lambda-orthogonality"


@pytest.fixture(scope="module")
def measurement():
    return check_smoke(SLUG, race=False, seconds=10)


def test_the_strict_map_leaves_the_new_model_alone(measurement):
    assert measurement.metrics["geometry_change"] < 0.1


def test_the_dial_moves_the_distance(measurement):
    distances = measurement.series["distances"]
    assert distances[0] < 1e-4
    assert distances == sorted(distances)


def test_claims_follow_the_measurements(measurement):
    check_claims_follow_the_measurements(SLUG, measurement)


def test_figure(measurement):
    check_figure(SLUG, measurement)


def test_snippet_runs():
    assert check_snippet(SLUG)["adapter"].orthogonality_ > 0


def test_turning_is_a_quarter_turn():
    image = torch.arange(64.0)[None]
    once = embedding_digits.turned(image)
    assert once[0, 0] == image[0, 7]
    fourth = embedding_digits.turned(embedding_digits.turned(embedding_digits.turned(once)))
    assert torch.equal(fourth, image)


def test_the_old_model_has_seen_half_of_the_classes():
    train, test = embedding_digits.split(0)
    body = embedding_digits.embed(train, 16, 8, 2, 5, 0)
    assert body(test.x).shape == (597, 8)
    state = torch.random.get_rng_state()
    embedding_digits.embed(train, 16, 8, 1, 5, 0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_forward_only_is_a_least_squares_fit():
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(256, 6, generator=generator)
    truth = torch.randn(6, 4, generator=generator)
    forward = embedding_digits.forward_only(old, old @ truth, 300, 1e-2, 0)
    torch.testing.assert_close(forward(old), old @ truth, atol=0.05, rtol=0)


def test_paper_scale_is_refused():
    with pytest.raises(UnavailableError, match="ImageNet"):
        get(SLUG).experiment(Scale.PAPER, 0, None)
