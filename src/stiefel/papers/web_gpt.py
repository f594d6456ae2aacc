"""The same race at the papers' scale: GPT-2 small on public web text, through torchrun.

Needs CUDA and a folder, named by ``STIEFEL_DATA``, with ``train.bin`` and ``val.bin``: token
numbers of the GPT-2 vocabulary as little-endian uint16 without a header, documents separated by
the end-of-text token, made from OpenWebText or FineWeb-Edu.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from stiefel.papers.byte_gpt import GPT, GPTSize, Report, fit, next_token_loss
from stiefel.papers.paper import UnavailableError
from stiefel.storage import write_json

VARIABLE = "STIEFEL_DATA"
FILES = ("train.bin", "val.bin")
# GPT-2's 50,257 tokens, rounded up to a multiple of 128 for the matrix units.
VOCABULARY = 50_304
# Lines of the trainer that carry progress; everything else it prints is for people.
MARK = "stiefel-progress "


def settings() -> dict[str, Any]:
    """What all runs have in common: 10,000 steps of 480 × 1024 tokens, warm-up and cosine.

    Raises:
        UnavailableError: no CUDA device, or the token files are missing; names all that is.
    """
    missing = []
    if not torch.cuda.is_available():
        missing.append("a CUDA device (torch.cuda.is_available() is False)")
    folder = os.environ.get(VARIABLE)
    if not folder:
        missing.append(
            f"tokenised web text: set {VARIABLE} to a folder with {' and '.join(FILES)} "
            "(GPT-2 tokens, uint16, no header; OpenWebText or FineWeb-Edu)"
        )
    else:
        missing += [f"{path}" for path in (Path(folder) / f for f in FILES) if not path.is_file()]
    if missing:
        raise UnavailableError(f"the paper scale needs {'; and '.join(missing)}")
    return {
        "width": 768,
        "blocks": 12,
        "heads": 12,
        "context": 1024,
        "vocabulary": VOCABULARY,
        "batch": 480,
        "micro": 16,
        "steps": 10_000,
        "warmup": 1_000,
        "every": 250,
        "windows": 512,
        "schedule": "cosine",
        "clip": 1.0,
        "folder": folder,
        "bytes": [(Path(str(folder)) / f).stat().st_size for f in FILES],
    }


def launch(
    config: Mapping[str, Any], report: Report, *, processes: int | None = None
) -> dict[str, Any]:
    """One run in processes of its own: ``processes``, or one a GPU. Runs wait for one another.

    Raises:
        RuntimeError: a process failed; carries the end of its output.
    """
    turn = FileLock(Path(tempfile.gettempdir(), "stiefel-web-gpt.lock"))
    with turn, tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "config.json"), Path(folder, "result.json")
        write_json(source, dict(config))
        processes = processes or max(1, torch.cuda.device_count())
        module = ["-m", "stiefel.papers.web_gpt", str(source), str(target)]
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        tail: list[str] = []
        with subprocess.Popen(  # noqa: S603 - our own interpreter and module
            [sys.executable, *torchrun, *module],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as trainer:
            for line in trainer.stdout or ():
                if line.startswith(MARK):
                    report(*json.loads(line.removeprefix(MARK)))
                else:
                    tail = [*tail[-100:], line]
        if trainer.returncode or not target.exists():
            raise RuntimeError(f"training ended with {trainer.returncode}:\n{''.join(tail)}")
        return json.loads(target.read_text())


def train_rank(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """This process's part of a run; every rank takes its share of each batch.

    The process group must exist. On CUDA the products run in bfloat16, weights stay float32.

    Raises:
        ValueError: ranks × ``micro`` does not divide ``batch``.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    micro = config["micro"]
    if config["batch"] % (world * micro):
        raise ValueError(f"batch {config['batch']} is not a multiple of {world} ranks × {micro}")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else "cpu"
    size = GPTSize(*(config[k] for k in ("width", "blocks", "heads", "context", "vocabulary")))
    model = GPT(size, config["seed"]).to(device)
    parallel = DistributedDataParallel(model)
    length = size.context + 1
    tokens = {f: np.memmap(Path(config["folder"], f), dtype="<u2", mode="r") for f in FILES}
    generator = np.random.default_rng(1_000_000 + config["seed"])
    accumulate = config["batch"] // (world * micro)

    def rows(file: str, starts: np.ndarray) -> Tensor:
        picked = np.stack([tokens[file][s : s + length] for s in starts]).astype(np.int64)
        return torch.from_numpy(picked).to(device)

    def loss_of(network: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=cuda):
            return next_token_loss(network, batch)

    def backward(step: int) -> None:
        # Every rank draws the whole batch and keeps its own rows: one generator, no messages.
        starts = generator.integers(0, len(tokens["train.bin"]) - length, config["batch"])
        mine = starts[rank::world].reshape(accumulate, micro)
        for i, part in enumerate(mine):
            last = i == accumulate - 1
            with nullcontext() if last else parallel.no_sync():
                (loss_of(parallel, rows("train.bin", part)) / accumulate).backward()

    spread = np.linspace(0, len(tokens["val.bin"]) - length, 2 * config["windows"]).astype(int)
    held_out = {"report": spread[0::2], "select": spread[1::2]}

    def evaluate(which: str) -> float:
        starts = held_out[which]
        total = torch.zeros((), device=device)
        with torch.inference_mode():
            for part in np.array_split(starts[rank::world], -(-len(starts) // (world * micro))):
                if len(part):
                    total += loss_of(model, rows("val.bin", part)) * len(part)
        dist.all_reduce(total)
        return float(total) / len(starts)

    return fit(model, config, backward, evaluate, report)


def main(source: str, target: str) -> None:
    """Entry point of each process that torchrun starts."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        first = dist.get_rank() == 0

        def report(fraction: float, message: str) -> None:
            if first:
                print(MARK + json.dumps([fraction, message]), flush=True)

        result = train_rank(json.loads(Path(source).read_text()), report)
        if first:
            write_json(Path(target), result)
        dist.barrier()  # no rank leaves while another still talks to it
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    # gloo's threads may outlive the interpreter's own clearing up, which then aborts the process
    # after all is done: the work is written, so leave without it.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
