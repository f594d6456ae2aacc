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

KEPT = 5
"""So many earlier results of a seed are remembered."""


def result_path(out: Path, slug: str, scale: Scale, seed: int) -> Path:
    """Where a result is kept."""
    return out / slug / scale.value / f"{seed}.json"


def error_path(out: Path, slug: str, scale: Scale, seed: int) -> Path:
    """Where the traceback of a crash is kept until the next success."""
    return out / slug / scale.value / f"{seed}.error.txt"


def history_path(out: Path, slug: str, scale: Scale) -> Path:
    """Where it is kept what results gave before they were replaced."""
    return out / slug / scale.value / "history.json"


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
        """Write it below ``out``, atomically. What it replaces goes into the history."""
        _remember(out, self)
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


@dataclass(frozen=True)
class Earlier:
    """What a seed gave before its result was replaced, without curves."""

    seed: int
    metrics: Mapping[str, float]
    code: str
    commit: str | None
    started: str


def load_earlier(out: Path, slug: str, scale: Scale) -> list[Earlier]:
    """For each seed what it gave before its present result; of the newest such code only."""
    last = [entries[-1] for entries in load_history(out, slug, scale).values() if entries]
    if not last:
        return []
    newest = max(last, key=lambda e: e.started).code
    return sorted((e for e in last if e.code == newest), key=lambda e: e.seed)


def load_history(out: Path, slug: str, scale: Scale) -> dict[int, list[Earlier]]:
    """For each seed what it gave before its present result, the oldest first; :data:`KEPT` runs."""
    path = history_path(out, slug, scale)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {
            int(seed): [
                Earlier(
                    seed=int(seed),
                    metrics={str(k): float(v) for k, v in entry["metrics"].items()},
                    code=str(entry["code"]),
                    commit=None if entry["commit"] is None else str(entry["commit"]),
                    started=str(entry["started"]),
                )
                for entry in entries
            ]
            for seed, entries in content.items()
        }
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        log.warning("%s is not a history of results and is left out: %r", path, error)
        return {}


def _remember(out: Path, new: Record) -> None:
    """Put what ``new`` is about to replace into the history, the last :data:`KEPT` of a seed."""
    if not result_path(out, new.slug, new.scale, new.seed).exists():
        return
    old = load(out, new.slug, new.scale, new.seed)
    if old is None or (old.key, old.started) == (new.key, new.started):
        return
    history = load_history(out, new.slug, new.scale)
    earlier = Earlier(old.seed, old.measurement.metrics, old.code, old.commit, old.started)
    history[old.seed] = [*history.get(old.seed, []), earlier][-KEPT:]
    content = {
        str(seed): [{k: v for k, v in asdict(entry).items() if k != "seed"} for entry in entries]
        for seed, entries in sorted(history.items())
    }
    write_json(history_path(out, new.slug, new.scale), encode(content))


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
