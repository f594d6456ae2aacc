"""Every method, however its parameters are spread over ranks, does what it does on one."""

import distributed_jobs as jobs
import pytest
from law_table import ROWS
from ranks import results

STEPS = 20
TOLERANCE = 1e-6  # of a parameter's largest entry


@pytest.mark.parametrize(
    ("world", "layouts", "rows"),
    [(2, 3, slice(None)), (4, 7, slice(0, None, 2)), (4, 7, slice(1, None, 2))],
    ids=["2", "4-even", "4-odd"],
)
def test_every_method_in_every_layout_equals_one_process(world, layouts, rows, tmp_path):
    for found in results(world, jobs.every_method_in_every_layout, tmp_path, STEPS, rows):
        assert len(found) == len(ROWS[rows]) * layouts
        assert not {key: value for key, value in found.items() if not value <= TOLERANCE}
