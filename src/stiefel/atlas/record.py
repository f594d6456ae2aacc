"""One result on disk: what one seed of one paper gave, and all that made it."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stiefel.papers.closure import code_digest, runtime
from stiefel.papers.paper import Measurement, Paper, Scale
from stiefel.storage import write_json

log = logging.getLogger(__name__)


def result_path(out: Path, slug: str, scale: Scale, seed: int) -> Path:
    """Where a result is kept."""
    return out / slug / scale.value / f"{seed}.json"


def error_path(out: Path, slug: str, scale: Scale, seed: int) -> Path:
    """Where the traceback of a crash is kept until the next success."""
    return out / slug / scale.value / f"{seed}.error.txt"


def code_key(paper: Paper) -> str:
    """Hash of the code behind a paper's experiment and of the versions it runs on."""
    return _hash({"code": code_digest(paper.experiment), **runtime()})


def result_key(code: str, scale: Scale, seed: int) -> str:
    """Key of one result: the same code (see :func:`code_key`), scale and seed give the same key."""
    return _hash({"code": code, "scale": scale.value, "seed": seed})


def _hash(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Record:
    """The content of ``results/<slug>/<scale>/<seed>.json``.

    ``seconds`` is wall time of the experiment, ``peak_rss_mb`` in MiB (None where the system does
    not tell), ``started`` ISO 8601 in UTC. NaN and infinities are written as the strings ``"nan"``,
    ``"inf"`` and ``"-inf"``, since JSON has no word for them.
    """

    slug: str
    scale: Scale
    seed: int
    key: str
    code: str
    measurement: Measurement
    seconds: float
    peak_rss_mb: float | None
    versions: Mapping[str, str]
    machine: Mapping[str, Any]
    commit: str | None
    started: str

    def save(self, out: Path) -> None:
        """Write it below ``out``, atomically."""
        content = {f: getattr(self, f) for f in self.__dataclass_fields__ if f != "measurement"}
        content["scale"] = self.scale.value
        content |= encode(asdict(self.measurement))
        write_json(result_path(out, self.slug, self.scale, self.seed), content)

    def answers(self, paper: Paper) -> bool:
        """Whether it has the metric of every claim of ``paper``."""
        return all(claim.metric in self.measurement.metrics for claim in paper.claims)


def load(out: Path, slug: str, scale: Scale, seed: int) -> Record | None:
    """The record below ``out``; None, with a warning, if what is there is not one."""
    path = result_path(out, slug, scale, seed)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        record = _from_json(content)
        if (record.slug, record.scale, record.seed) != (slug, scale, seed):
            raise ValueError(f"it is of {record.slug}, {record.scale}, seed {record.seed}")
        return record
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        log.warning("%s is not a result of this program and is left out: %r", path, error)
        return None


def load_all(out: Path, slug: str, scale: Scale) -> list[Record]:
    """Every readable record of a paper at a scale that was made by the newest code, by seed.

    Results of different code do not belong into one mean: when some seeds were run again after a
    change, the others are left out until they are too.
    """
    folder = result_path(out, slug, scale, 0).parent
    seeds = sorted(int(p.stem) for p in folder.glob("*.json") if p.stem.isdecimal())
    records = [r for seed in seeds if (r := load(out, slug, scale, seed)) is not None]
    if not records:
        return []
    newest = max(records, key=lambda r: r.started).code
    return [r for r in records if r.code == newest]


def failed_seeds(out: Path, slug: str, scale: Scale) -> dict[int, str]:
    """Seeds whose last run crashed, each with the last line of its traceback."""
    folder = result_path(out, slug, scale, 0).parent
    failed = {}
    for path in folder.glob("*.error.txt"):
        seed = path.name.removesuffix(".error.txt")
        if seed.isdecimal():
            failed[int(seed)] = last_line(path.read_text(encoding="utf-8", errors="replace"))
    return dict(sorted(failed.items()))


def last_line(text: str) -> str:
    """The last line of a traceback: what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def _from_json(content: dict[str, Any]) -> Record:
    measurement = Measurement(
        seed=int(content["seed"]),
        metrics={str(k): float(v) for k, v in content["metrics"].items()},
        series={str(k): _decode(v) for k, v in content["series"].items()},
        config=dict(content["config"]),
    )
    peak = content["peak_rss_mb"]
    commit = content["commit"]
    return Record(
        slug=str(content["slug"]),
        scale=Scale(content["scale"]),
        seed=measurement.seed,
        key=str(content["key"]),
        code=str(content["code"]),
        measurement=measurement,
        seconds=float(content["seconds"]),
        peak_rss_mb=None if peak is None else float(peak),
        versions=dict(content["versions"]),
        machine=dict(content["machine"]),
        commit=None if commit is None else str(commit),
        started=str(content["started"]),
    )


def plain(value: Any) -> Any:
    """``value`` with arrays, tensors and tuples as lists and numpy scalars as Python's."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if hasattr(value, "tolist"):  # numpy and torch alike; a scalar gives a number
        return value.tolist()
    if isinstance(value, (list, tuple, range)):
        return [plain(v) for v in value]
    return value


def encode(value: Any) -> Any:
    """``value`` with NaN and infinities as the strings that ``float`` reads."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {k: encode(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(v) for v in value]
    return value


def _decode(series: Any) -> Any:
    return [_decode(v) for v in series] if isinstance(series, list) else float(series)
