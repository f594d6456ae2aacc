"""OrthoMerge at the authors' scale: checkpoints on disk, merged tensor by tensor.

In ``STIEFEL_DATA/orthomerge``: ``base``, ``expert-1``, ``expert-2`` … (folders of safetensors, e.g.
Llama-3.2-3B and the five experts of MergeBench). Merged models are written to ``merged/NAME``; the
scores that an evaluation harness gives them come back in ``scores.json``.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from stiefel.checkpoint import Checkpoint, CheckpointWriter
from stiefel.merge import OrthoSettings, orthomerge_tensor, task_arithmetic, ties
from stiefel.papers.paper import Measurement, UnavailableError
from stiefel.papers.progress import Progress
from stiefel.papers.sequence_digits import VARIABLE

# Merge → settings of OrthoMerge; None for the additive method of that name.
MERGES: Mapping[str, OrthoSettings | None] = {
    "ta": None,
    "ties": None,
    "om-G-ta": OrthoSettings("G", "ta"),
    "om-C-ta": OrthoSettings("C", "ta"),
    "om-G-ties": OrthoSettings("G", "ties"),
    "om-C-ties": OrthoSettings("C", "ties"),
}


def folders() -> tuple[Path, list[Path]]:
    """The base and the experts.

    Raises:
        UnavailableError: not there; says what is expected where.
    """
    root = os.environ.get(VARIABLE)
    wanted = "orthomerge/base, orthomerge/expert-1, orthomerge/expert-2, …: folders of safetensors"
    if not root:
        raise UnavailableError(f"the paper scale needs {VARIABLE}, a folder with {wanted}")
    home = Path(root) / "orthomerge"
    experts = sorted(home.glob("expert-*"))
    if not (home / "base").is_dir() or len(experts) < 2:
        raise UnavailableError(f"{VARIABLE}={root} must hold {wanted}; two experts at least")
    return home / "base", experts


def merge_all(seed: int, progress: Progress, unmeasured: Mapping[str, float]) -> Measurement:
    """Write every merge that is not there yet; its seconds, memory, and the harness's scores.

    ``unmeasured``: metrics of the claims that need the laptop's experiments, as NaN.

    Raises:
        UnavailableError: checkpoints are missing, or the merged ones have no scores yet.
    """
    base, experts = folders()
    seconds: dict[str, float] = {}
    for done, (name, settings) in enumerate(MERGES.items()):
        target = base.parent / "merged" / name
        if not target.is_dir():
            started = time.perf_counter()
            merge_into(target, base, experts, settings, name)
            seconds[f"seconds_{name}"] = time.perf_counter() - started
        progress((done + 1) / len(MERGES), f"{name} merged")
    scores = base.parent / "scores.json"
    if not scores.is_file():
        raise UnavailableError(
            f"the merged models are in {target.parent}. Evaluate them with your harness and write "
            f"their mean scores in per cent to {scores}: an object with {', '.join(MERGES)}"
        )
    found = {name: float(value) for name, value in json.loads(scores.read_text()).items()}
    missing = sorted(set(MERGES) - set(found))
    if missing:
        raise UnavailableError(f"{scores} has no score of {', '.join(missing)}")
    metrics = dict(unmeasured)
    metrics |= {f"score_{name}": found[name] for name in MERGES} | seconds
    metrics["free_gain_over_ties"] = found["om-G-ties"] - found["ties"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    metrics["peak_rss_mb"] = peak / (1e6 if sys.platform == "darwin" else 1e3)
    config = {"base": str(base), "experts": [str(e) for e in experts]}
    return Measurement(seed, metrics, {}, config)


def merge_into(
    target: Path, base: Path, experts: list[Path], settings: OrthoSettings | None, name: str
) -> None:
    """One merge, a tensor of all models in memory at a time."""
    with Checkpoint(base) as origin:
        models = [Checkpoint(path) for path in experts]
        specs = [(key, info.dtype, info.shape) for key, info in origin.tensors.items()]
        with CheckpointWriter(target, specs, resume=True, identity=name) as writer:
            for key in origin.tensors:
                if key in writer.done:
                    continue
                first, others = origin.read(key), [m.read(key) for m in models]
                if settings is not None:
                    merged = orthomerge_tensor(first, others, settings, name=key)[0]
                elif name == "ta":
                    merged = task_arithmetic(first, others, scale=1 / len(others))
                else:
                    merged = ties(first, others, density=0.2)
                writer.write(key, merged)  # pyrefly: ignore
        for model in models:
            model.close()
