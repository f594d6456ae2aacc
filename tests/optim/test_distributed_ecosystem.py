"""FSDP2, tensor parallelism and DDP on real modules, with clipping, schedules, scaling, closures.

Gradients differ from one process's in their rounding here, so parameters do too.
"""

import distributed_ecosystem as jobs
from ranks import results

TOLERANCE = 1e-4


def test_fully_shard(tmp_path):
    for found in results(2, jobs.sharded, tmp_path):
        assert len(found) == 9
        assert not {k: v for k, v in found.items() if not max(v) <= TOLERANCE}


def test_replicas_each_for_itself_and_with_the_work_spread(tmp_path):
    found = results(2, jobs.replicated, tmp_path)
    for own in found:
        for far, gap, _, same in own.values():
            assert max(far, gap) <= TOLERANCE
            assert same
    whole = [own[False][2] for own in found]
    parts = [own[True][2] for own in found]
    assert whole == [36, 36]
    assert sorted(parts) == [12, 24]  # three blocks have two owners


def test_fsdp_with_tensor_parallelism(tmp_path):
    for far, kinds in results(4, jobs.two_dimensional, tmp_path):
        assert far <= TOLERANCE
        assert any("StridedShard" in kind for kind in kinds)
        assert "(Shard(dim=0), Shard(dim=1))" in kinds


def test_partial_gradients(tmp_path):
    for found in results(2, jobs.partial_gradients, tmp_path):
        assert max(found) < 1e-6


def test_low_precision_goes_over_the_wire(tmp_path):
    """Rounded once more than in one process: by half a unit in the last place."""
    for found in results(2, jobs.low_precision, tmp_path):
        assert found.keys() == {"torch.bfloat16", "torch.float16", "torch.float64"}
        assert found["torch.bfloat16"] <= 2**-7
        assert found["torch.float16"] <= 2**-10
        assert found["torch.float64"] <= 1e-6  # products in float32 here


def test_shared_rotations(tmp_path):
    for far, keys in results(2, jobs.shared_rotations, tmp_path):
        assert far < 1e-6
        kept = ["momentum_buffer", "rotation", "step"]
        other = ["momentum_buffer", "step"]
        assert [keys[n] for n in range(5)] == [kept, other, kept, other, kept]
