import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("orthoreg_ranks.py")


def test_four_ranks_find_what_one_process_finds(tmp_path):
    """Loss and gradients for every way to cut a matrix, under FSDP2 and under DDP."""
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    for rank in range(4):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(found) == 6 * 4 + 4 + 1 + 1
        assert {case: error for case, error in found.items() if not error < 2e-5} == {}
