"""State of distributed optimizers: at rest, in state_dict, in checkpoints of other world sizes."""

import warnings

import distributed_jobs as jobs
from ranks import results

STEPS = 3


def test_checkpoints_go_on_with_other_numbers_of_processes(tmp_path):
    """Two, then four in another layout, then one: as one process that was never interrupted."""
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    job = jobs.train_and_save
    results(2, job, tmp_path / "two", "rows", None, first, 0, STEPS)
    results(4, job, tmp_path / "four", "fsdp x tp columns", first, second, STEPS, STEPS)
    models = jobs.built(jobs.KEPT, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of a checkpoint read without a process group
        jobs.load(models, second)
    jobs.go_on(models, None, 2 * STEPS, STEPS)
    far = {}
    for row in jobs.KEPT:
        _, expected = jobs.single(row, 3 * STEPS)
        pairs = zip(models[row.name][0].p, expected, strict=True)
        far[row.name] = max(jobs.distance(p.detach(), e) for p, e in pairs)
    assert not {name: value for name, value in far.items() if not value <= 1e-6}


def test_state_dict_has_what_one_process_has(tmp_path):
    """The same keys, shapes and dtypes, in DTensors but for counts of steps."""
    found = results(2, jobs.state_shapes, tmp_path)
    for row in jobs.KEPT:
        expected = jobs.single(row, 2)[0].state_dict()["state"]
        for own in found:
            assert own[row.name].keys() == expected.keys()
            for number, state in expected.items():
                shown = {k: (tuple(v.shape), v.dtype, v.ndim > 0) for k, v in state.items()}
                assert own[row.name][number] == shown, (row.name, number)
