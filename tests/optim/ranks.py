"""Starts processes that work together over gloo, for tests.

The processes are forked from one server that has imported torch once. They end without the
interpreter's clearing up, in which gloo's threads abort a process now and then.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

HOME = str(Path(__file__).parent)


def _context():
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["ranks_preload"])
    return context


def _main(job, rank, world, folder, args):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=60),
        )
        result = ("done", job(rank, world, *args))
        dist.barrier()
    except BaseException as error:
        result = ("raised", f"{type(error).__name__}: {error}", traceback.format_exc())
    partial = Path(folder, f"{rank}.partial")
    partial.write_bytes(pickle.dumps(result))
    partial.rename(Path(folder, f"{rank}.result"))
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def outcomes(world, job, folder, *args, seconds=240):
    """What ``job(rank, world, *args)`` returned, ("done", value), or raised, on every rank.

    ``job`` is a function of a module in this folder. Ranks that are not there at the end, or hang,
    are ("lost", None).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    context = _context()
    processes = [
        context.Process(target=_main, args=(job, rank, world, str(folder), args))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    found = []
    for rank in range(world):
        path = folder / f"{rank}.result"
        found.append(pickle.loads(path.read_bytes()) if path.exists() else ("lost", None))  # noqa: S301
    return found


def results(world, job, folder, *args, seconds=240):
    """As :func:`outcomes`, of ranks that must all come through."""
    found = outcomes(world, job, folder, *args, seconds=seconds)
    for rank, outcome in enumerate(found):
        assert outcome[0] == "done", f"rank {rank}: {outcome[-1] or 'lost'}"
    return [value for _, value in found]
