"""Merges in processes that are killed: run by test_engine_interrupted.py in a process of its own.

Children are forked, so that torch is imported once. Prints one JSON object.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from engine_models import contents, plan

from stiefel.merge import engine_progress
from stiefel.merge.engine import merge

TRIALS = 10
engine_progress.SECONDS_BETWEEN = 0


def child(out, made, **settings):
    """A child that merges, and a pipe that gets a byte for every piece of work it has done.

    Its exit status is 0, 130 (interrupted) or 1.
    """
    ours, theirs = os.pipe()
    process = os.fork()
    if process:
        os.close(theirs)
        return process, ours
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        report = merge(made, out, progress=lambda _: os.write(theirs, b"."), **settings)
        (out.parent / "resumed").write_text(str(report.resumed))
        status = 0
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def wait(process, pipe):
    """How the child ended, and how many pieces of work it told of beyond those already read."""
    with open(pipe, "rb") as told:
        count = len(told.read())
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), count


def finish(out, made, **settings):
    """A merge that nobody disturbs: the tensors it found done, and its pieces of work."""
    (out.parent / "resumed").unlink(missing_ok=True)
    status, count = wait(*child(out, made, **settings))
    assert status == 0
    return int((out.parent / "resumed").read_text()), count


def trial(folder, old, made, wanted, pieces, delay, sign, threads):
    """Disturb a merge over an older output, ``delay`` seconds after so many ``pieces`` of work;
    then resume it."""
    out = folder / "out"
    finish(out, old)
    before = contents(out)
    settings = {"flush_bytes": 20_000, "threads": threads}
    process, pipe = child(out, made, **settings)
    for _ in range(pieces):
        os.read(pipe, 1)
    time.sleep(delay)
    os.kill(process, sign)
    status, _ = wait(process, pipe)
    left = contents(out)
    assert left in (before, wanted), sorted(left)
    partial = (folder / "out.partial").exists()
    resumed, _ = finish(out, made, resume=True, **settings)
    assert contents(out) == wanted
    assert sorted(path.name for path in folder.iterdir()) == ["out", "resumed"]
    return {
        "status": status,
        "partial": partial,
        "finished": left == wanted,
        "resumed": resumed,
    }


def main():
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    rng = random.Random(int(sys.argv[2]))
    folders = [root / "in" / name for name in "bxy"]
    each = [{"weight": 0.4, "density": 0.3}, {"weight": 0.8, "density": 0.5}]
    made = plan(folders, "ties", each=each, shard_bytes=300_000)
    old = plan(folders, "task_arithmetic", each=each)
    work = root / "work"
    work.mkdir()
    _, total = finish(work / "out", made, flush_bytes=20_000, threads=1)
    wanted = contents(work / "out")

    def moments(count):
        """Spread over the whole run and a little beyond, where names change."""
        for number in range(count):
            yield int((number + rng.random()) / count * (total + 1)), 0.02 * rng.random() ** 3

    results = {
        "kill": [
            trial(work, old, made, wanted, *moment, signal.SIGKILL, 1 + number % 3)
            for number, moment in enumerate(moments(TRIALS))
        ],
        "interrupt": [
            trial(work, old, made, wanted, *moment, signal.SIGINT, 2) for moment in moments(3)
        ],
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
