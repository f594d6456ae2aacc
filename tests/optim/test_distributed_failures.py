"""A rank that fails brings all ranks down with its message; ranks that differ are told how."""

import time

import distributed_failures as jobs
import pytest
from ranks import outcomes, results

WORLD = 3
OTHERS = [rank for rank in range(WORLD) if rank != jobs.BAD]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    every = results(WORLD, jobs.every_failure, tmp_path_factory.mktemp("failures"))
    assert every[0] == every[1] == every[2]
    return every[0]


def test_a_bad_gradient_raises_everywhere_and_changes_nothing(found):
    for rank, (outcome, same, state, again) in enumerate(found["nan raises"]):
        kind, text = outcome
        message = "NaN or Inf in the gradient of parameter 'w1'; nothing was updated"
        if rank == jobs.BAD:
            assert kind == "FloatingPointError"
            assert text.startswith(message)
        else:
            assert kind == "RuntimeError"
            assert text.startswith(
                f"rank 1 failed in NorMuon.step() with FloatingPointError: {message}"
            )
        assert same
        assert not state
        assert again == "fine"


@pytest.mark.parametrize("scenario", ["nan skips", "nan skips without messages"])
def test_a_bad_gradient_is_skipped_everywhere(found, scenario):
    for warned, as_twin in found[scenario]:
        assert warned == ["NaN or Inf in the gradient of parameter 'w1': skipped"]
        assert as_twin


def test_other_shapes_and_numbers_are_named(found):
    for kind, text in found["other shape"]:
        assert kind == "ValueError"
        assert "Rank 0 has parameter 'w1': shape (6, 4)" in text
        assert "rank 1 has parameter 'w1': shape (4, 6)" in text
    for kind, text in found["other number"]:
        assert kind == "ValueError"
        assert text == "rank 0 has 3 parameters in the optimizer, rank 1 has 2"


def test_a_gradient_that_one_rank_lacks_is_named(found):
    for kind, text in found["missing gradient"]:
        assert kind == "RuntimeError"
        assert text.startswith("rank 0 has a gradient for parameter 'w2'")
        assert text.endswith("rank 1 has none")


@pytest.mark.parametrize(
    ("scenario", "cls", "kind", "message"),
    [
        ("work fails", "Breaking", "ArithmeticError", "the matrix product is on fire"),
        ("preparation fails", "Unprepared", "MemoryError", "no room for second moments"),
    ],
)
def test_work_that_fails_halfway_raises_everywhere(found, scenario, cls, kind, message):
    for rank, (outcome, again) in enumerate(found[scenario]):
        if rank == jobs.BAD:
            assert outcome == (kind, message)
        else:
            assert outcome == (
                "RuntimeError",
                f"rank 1 failed in {cls}.step() with {kind}: {message}",
            )
        assert again == "fine"


def test_methods_without_messages_tell_at_the_next_step(found):
    for rank, (first, second) in enumerate(found["silent"]):
        if rank == jobs.BAD:
            assert first[0] == "FloatingPointError"
            continue
        assert first == "fine"
        assert second[0] == "RuntimeError"
        assert second[1].startswith("rank 1 failed in RMNP.step() with FloatingPointError: NaN or")


def test_methods_that_sum_tell_at_once(found):
    kinds = [kind for kind, _ in found["sums"]]
    assert kinds == ["FloatingPointError" if r == jobs.BAD else "RuntimeError" for r in range(3)]


def test_a_rank_that_vanishes_leaves_no_hang(tmp_path):
    start = time.monotonic()
    found = outcomes(WORLD, jobs.vanish, tmp_path)
    assert [kind for kind, *_ in found] == ["raised", "lost", "raised"]
    assert time.monotonic() - start < 60
