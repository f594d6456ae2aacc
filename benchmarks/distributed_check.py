"""Measures what :mod:`distributed_model` predicts, on 2 and 4 gloo processes of this machine.

Speeds come from small tasks of their own, between the steps that are timed: matrices of one shape
updated by one process, as many as a rank's share has, passes over memory, copies of a few numbers,
all-to-alls of two sizes.

There are two clocks. Wall time is that of the slowest rank; where the machine has other work, short
tasks fit between two turns of the scheduler and steps do not, so the two cannot be compared there.
CPU time, of all threads of a rank, is what the step would take with nothing else there: as ranks
share the cores, the mean over ranks times ranks per core, or the busiest rank's if that is more.
Waiting for a message while nobody computes is in the first clock alone.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import statistics
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed_machine import ADVANCE, CHECK, METHODS, Machine
from distributed_model import cost
from distributed_shapes import Model, Parameter
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

WORLDS = (2, 4)
WIDTH = 384
LAYERS = 6
ALL = "all ranks at once"
CLOCKS = ("wall", "cpu")
# glibc gives large buffers back to the system or keeps them, by what was freed before: a method's
# step takes 18 or 31 ms then, from one process to the next. Kept, as a GPU's allocator does.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000"}
# Other work on the machine only ever adds to wall time.
ESTIMATE = {"wall": min, "cpu": statistics.median, "busiest": statistics.median}
LOCAL = ("AuON", "RMNP")  # methods that never gather
REPEATED = {"memory": 2, "copies": 500, "word": 10, "large": 1}
_BUFFER, _BUFFERS = 1 << 20, 8
_LARGE = 1 << 21  # numbers of a large message, to every other rank


def checked_model() -> Model:
    """Six layers of width 384, and vectors: 10.6 million numbers in matrices."""
    shapes = [(WIDTH, WIDTH)] * 4 + [(4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)]
    found = []
    for layer in range(LAYERS):
        found += [Parameter(f"{layer}.{i}", shape, True) for i, shape in enumerate(shapes)]
        found.append(Parameter(f"{layer}.gain", (WIDTH,), False))
    return Model("check", tuple(found))


def random_parameters(shapes: Iterable[Sequence[int]]) -> list[nn.Parameter]:
    """Parameters with gradients, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in shapes:
        parameter = nn.Parameter(torch.randn(*shape, generator=generator))
        parameter.grad = torch.randn(*shape, generator=generator)
        made.append(parameter)
    return made


def measured_speed(
    model: Model, method: str, dtype: torch.dtype, rounds: int, device: torch.device
) -> float:
    """10¹² of the plan's FLOPs a second in one process; on a CPU shapes are cut to 1,024."""
    largest = 1024 if device.type == "cpu" else 1 << 20
    shapes = sorted(
        {tuple(min(n, largest) for n in p.shape[-2:]) for p in model.parameters if p.matrix}
    )
    if not shapes:
        raise ValueError(f"{model.name} has no matrices to measure {method} on")
    if not METHODS[method].matrices:
        return 1.0  # it has no products
    params = random_parameters(shapes)
    for p in params:
        assert p.grad is not None
        gradient = p.grad.to(device, dtype)
        p.grad = None
        p.data, p.grad = p.data.to(device, dtype), gradient
    optimizer = METHODS[method].optimizer(params)
    optimizer.step()
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    times = []
    for _ in range(rounds):
        start = clock()
        optimizer.step()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(clock() - start)
    flops = sum(optimizer._flops(optimizer.param_groups[0], *shape) for shape in shapes)
    return flops / statistics.median(times) / 1e12


# On every rank


class _Traffic:
    """Bytes of updates and sums that this rank hands to collectives for others."""

    def __init__(self) -> None:
        self.sent = 0

    def __enter__(self) -> _Traffic:
        self._kept = dist.all_to_all_single, dist.all_reduce

        def all_to_all(into: Tensor, out: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.sent += out.numel() * out.element_size()
            return self._kept[0](into, out, *args, **kwargs)

        def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.sent += tensor.numel() * tensor.element_size()
            return self._kept[1](tensor, *args, **kwargs)

        dist.all_to_all_single, dist.all_reduce = all_to_all, all_reduce
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_to_all_single, dist.all_reduce = self._kept


def _times(task: Callable[[], object], *, alone: bool = False) -> dict[str, float]:
    """Wall seconds of the slowest rank, all starting together, or of rank 0 alone; CPU seconds."""
    dist.barrier()
    start, busy = time.perf_counter(), time.process_time()
    if not alone or dist.get_rank() == 0:
        task()
    wall, cpu = time.perf_counter() - start, time.process_time() - busy
    most = torch.tensor([wall, cpu], dtype=torch.float64)
    total = torch.tensor([cpu], dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    dist.all_reduce(total)
    return {
        "wall": float(most[0]),
        "cpu": float(total) / (1 if alone else dist.get_world_size()),
        "busiest": float(most[1]),
    }


def _messages(world: int, count: int) -> Callable[[], object]:
    out, into = torch.zeros(world * count), torch.zeros(world * count)
    return lambda: dist.all_to_all_single(into, out)


def _new_buffers() -> None:
    """Eight buffers of 4 MB that are there together, as those of a step are."""
    held = [torch.empty(_BUFFER).zero_() for _ in range(_BUFFERS)]
    del held


def _repeated(task: Callable[[], object], count: int) -> Callable[[], object]:
    def run() -> None:
        for _ in range(count):
            task()

    return run


def _tasks(world: int, methods: Sequence[str], mesh: Any) -> dict[Any, Callable[[], object]]:
    """Name → a task that measures one speed; ``mesh`` has this rank alone."""
    a, b = torch.zeros(1 << 21), torch.ones(1 << 21)
    small, place = torch.zeros(64, 64), torch.zeros(64, 64)
    tasks: dict[Any, Callable[[], object]] = {
        "memory": _repeated(lambda: a.lerp_(b, 0.1), REPEATED["memory"]),
        "copies": _repeated(lambda: place[1:3, 4:8].copy_(small[2:4, 8:12]), REPEATED["copies"]),
        "fresh": _new_buffers,
        "word": _repeated(_messages(world, 1), REPEATED["word"]),
        "large": _repeated(_messages(world, _LARGE), REPEATED["large"]),
    }
    model = checked_model()
    tiny = Model(
        "tiny", tuple(Parameter(p.name, (2,) * len(p.shape), p.matrix) for p in model.parameters)
    )
    tasks["host"] = _sharded(tiny, mesh, "RMNP").step
    for name in methods:
        if not METHODS[name].matrices:
            continue
        if name in LOCAL:  # a path of its own, over all shards one after the other
            tasks[LOCAL, name] = _sharded(_share(world), mesh, name).step
            continue
        for shape, count in _counts(world).items():
            tasks[name, *shape] = METHODS[name].optimizer(random_parameters([shape] * count)).step
    return tasks


def _share(world: int) -> Model:
    """Matrices that have as many numbers as a rank's shards."""
    shapes = [shape for shape, count in _counts(world).items() for _ in range(count)]
    return Model("share", tuple(Parameter(str(i), s, True) for i, s in enumerate(shapes)))


def _counts(world: int) -> dict[tuple[int, ...], int]:
    """Shape → how many matrices of it are a rank's share, at least two: fewer fit the cache."""
    counts = Counter(p.shape for p in checked_model().parameters if p.matrix)
    return {shape: max(2, count // world) for shape, count in sorted(counts.items())}


def _sharded(model: Model, mesh: Any, name: str) -> Any:
    """The optimizer on this rank's shards of a model, with gradients."""
    from torch.distributed.tensor import Shard, distribute_tensor

    groups = model.groups(torch.float32, matrices=METHODS[name].matrices)
    for group in groups:
        whole = random_parameters([p.shape for _, p in group["params"]])
        made = []
        for (key, _), w in zip(group["params"], whole, strict=True):
            p = nn.Parameter(distribute_tensor(w.detach(), mesh, [Shard(0)]))
            assert w.grad is not None
            p.grad = distribute_tensor(w.grad, mesh, [Shard(0)])
            made.append((key, p))
        group["params"] = made
    return METHODS[name].optimizer(groups)


def _measure(world: int, methods: Sequence[str], rounds: int) -> dict[Any, Any]:
    """Seconds by clock, bytes sent by this rank, FLOPs of its products."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (world, 1), mesh_dim_names=("all", "self"))
    tasks = _tasks(world, methods, mesh["self"])
    steps = {name: _sharded(checked_model(), mesh["all"], name) for name in methods}
    found: dict[Any, Any] = {}
    for task in tasks.values():
        task()
    for name, optimizer in steps.items():
        optimizer.step()
        with _Traffic() as traffic, FlopCounterMode(display=False) as flops:
            optimizer.step()
        found["sent", name] = traffic.sent
        found["flops", name] = flops.get_total_flops()
    tasks |= {ALL: _busy} | {("step", name): o.step for name, o in steps.items()}
    times: dict[Any, list[dict[str, float]]] = defaultdict(list)
    for _ in range(rounds):
        times["alone"].append(_times(_busy, alone=True))
        for name, task in tasks.items():
            times[name].append(_times(task))
    for name, values in times.items():
        found["seconds", name] = {
            clock: ESTIMATE[clock](v[clock] for v in values) for clock in values[0]
        }
    return found


def _busy() -> None:
    """Work that fits the cache."""
    x = torch.ones(256, 256)
    for _ in range(20):
        x @ x


def _rank(rank: int, world: int, folder: str, methods: Sequence[str], rounds: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(minutes=5),
    )
    result = _measure(world, methods, rounds)
    partial = Path(folder, f"{rank}.partial")
    partial.write_bytes(pickle.dumps(result))
    partial.rename(Path(folder, f"{rank}.result"))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads abort the interpreter's clearing up now and then


# In the process that starts them


@contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    kept = dict(os.environ)
    os.environ.update(settings)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


def measure(world: int, methods: Sequence[str], rounds: int) -> list[dict[Any, Any]]:
    """What every rank of ``world`` processes has measured.

    Raises:
        RuntimeError: a process that ended without a result.
    """
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, _environment(KEEP_MEMORY):
        processes = [
            context.Process(target=_rank, args=(rank, world, folder, tuple(methods), rounds))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        found = []
        for rank in range(world):
            path = Path(folder, f"{rank}.result")
            if not path.exists():
                raise RuntimeError(f"rank {rank} of {world} ended without a result; see above")
            found.append(pickle.loads(path.read_bytes()))  # noqa: S301 - our own
        return found


def calibrated(world: int, measured: dict[Any, Any], clock: str) -> Machine:
    """The machine that the small tasks say this is, for ``world`` processes on its cores."""
    cores = os.cpu_count() or 1
    seconds = {key[1]: v[clock] for key, v in measured.items() if key[0] == "seconds"}
    for key, count in REPEATED.items():
        seconds[key] /= count
    if clock == "wall":
        slowdown = max(1.0, seconds[ALL] / seconds["alone"])
        alone, together = 1 / slowdown, 1.0
    else:
        slowdown = max(1.0, world / cores)
        alone, together = 1.0, slowdown
    buffers = 4 * _BUFFER * _BUFFERS  # bytes
    copied = ADVANCE * 4 * (1 << 21)  # bytes
    sent = 4 * (world - 1) * _LARGE  # bytes, each way
    moving = max(seconds["large"] - seconds["word"], 1e-9) * together
    host = seconds["host"] / len(checked_model().parameters)
    speed = copied / seconds["memory"]  # as it was measured, by all ranks
    updates = {}
    for (rows, cols), count in _counts(world).items():
        size = 4 * rows * cols
        besides = host + CHECK * size / speed  # what a step does for a matrix but update it
        for name in METHODS:
            if (LOCAL, name) in seconds:
                whole = 4 * _share(world).numel()
                value = seconds[LOCAL, name] * size / whole
            elif (name, rows, cols) in seconds:
                value = seconds[name, rows, cols] / count
            else:
                continue
            updates[name, rows, cols] = max(value - besides, 0.0) * alone
    return Machine(
        tflops=1.0,  # every shape's time is known
        gbs=speed / alone / 1e9,
        gbps=8e-9 * sent / moving,
        us=1e6 * seconds["word"] * together,  # with its messages
        message_us=0.0,
        launch_us=1e6 * seconds["copies"] * alone,
        host_us=1e6 * host * alone,
        fresh_gbs=buffers / max(seconds["fresh"] - buffers / speed, 1e-9) / 1e9 / alone,
        updates=updates,
        slowdown=slowdown,
        overlaps=world < cores,  # else messages take the cores that compute
    )


def check(methods: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """Predicted and measured steps of every method on 2 and 4 processes."""
    rows = []
    for world in WORLDS:
        ranks = measure(world, methods, rounds)
        machines = {clock: calibrated(world, ranks[0], clock) for clock in CLOCKS}
        for name in methods:
            row: dict[str, Any] = {"method": name, "ranks": world}
            for clock, machine in machines.items():
                expected, found = (
                    cost(checked_model(), name, world, machine),
                    ranks[0]["seconds", ("step", name)],
                )
                measured = found["wall"]
                if clock == "cpu":
                    measured = max(found["cpu"] * machine.slowdown, found["busiest"])
                row[clock] = {
                    "predicted": expected.seconds,
                    "measured": measured,
                    "ratio": expected.seconds / measured,
                    "communicating": expected.communicating,
                    "machine": {k: v for k, v in vars(machine).items() if k != "updates"},
                }
            row["sent_plan"], row["flops_plan"] = expected.sent, expected.flops
            row["sent_counted"] = max(r["sent", name] for r in ranks)
            row["flops_counted"] = max(r["flops", name] for r in ranks)
            rows.append(row)
    return rows
