"""How an experiment speaks with whoever runs it: progress out, shared results in."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from stiefel.papers.closure import code_digest, runtime
from stiefel.storage import write_json

Report = Callable[[float, str], None]
Compute = Callable[[Mapping[str, Any], Report], dict[str, Any]]


class Progress:
    """Handed to every experiment.

    Call it with the fraction done and, if there is one, a word on the metric so far::

        progress(0.5, "loss 2.31")

    and ask it for work that other seeds and papers may need too::

        runs = progress.shared("byte-gpt", configs, train)
    """

    def __init__(
        self,
        report: Report | None = None,
        store: Path | None = None,
        fingerprint: str = "",
    ) -> None:
        """Report to ``report``; keep shared results under ``store`` (in memory only if None).

        Results are found again only by the same code and versions (:func:`code_digest` of what
        computes them, :func:`runtime`); ``fingerprint`` adds anything else they may depend on.
        """
        self._report = report
        self._store = store
        self._fingerprint = fingerprint
        self._memory: dict[str, str] = {}

    def __call__(self, fraction: float, message: str = "") -> None:
        """Say that ``fraction`` (0 to 1) is done."""
        if self._report is not None:
            self._report(min(max(float(fraction), 0.0), 1.0), message)

    def shared(
        self,
        kind: str,
        configs: Sequence[Mapping[str, Any]],
        compute: Compute,
        *,
        span: tuple[float, float] = (0.0, 1.0),
    ) -> list[dict[str, Any]]:
        """Results of ``compute(config, report)`` for every config, each computed once.

        Processes that ask for overlapping configs at one time split them among themselves: each
        takes the next that nobody holds, and waits only for what others are computing. A process
        that dies frees what it held. Papers share what they compute with the same function, so
        that function belongs in a module of its own.

        Args:
            kind: Names the computation; part of the key.
            configs: JSON-able settings, the whole input of ``compute``.
            compute: Returns a JSON-able dict (NaN and infinities allowed). Everyone gets it as
                JSON gives it back: tuples are lists, keys are strings.
            span: The part of this experiment's progress that these computations make up.

        Raises:
            TypeError: a config or a result is not JSON-able.
        """
        code = [code_digest(compute), getattr(compute, "__qualname__", ""), runtime()]
        keys = [self._key([kind, code, self._fingerprint, dict(c)]) for c in configs]
        total = len(set(keys))
        done: dict[str, dict[str, Any]] = {}
        start, width = span[0], span[1] - span[0]

        def report(fraction: float, message: str) -> None:
            self(start + width * (len(done) + fraction) / total, message)

        while True:
            for key, config in zip(keys, configs, strict=True):
                if key in done:
                    continue
                text = self._once(key, config, compute, report)
                if text is not None:
                    done[key] = json.loads(text)
                    report(0.0, "")
            if len(done) == total:
                return [done[key] for key in keys]
            report(0.0, "waiting for a shared run")
            time.sleep(0.1)

    def _once(self, key: str, config: Any, compute: Compute, report: Report) -> str | None:
        """The stored or computed result as JSON; None while another process computes it."""
        if self._store is None:
            if key not in self._memory:
                self._memory[key] = json.dumps(compute(config, report))
            return self._memory[key]
        path = self._store / f"{key}.json"
        stored = _stored(path)
        if stored is not None:
            return stored
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(path.with_suffix(".lock"), timeout=0):
                stored = _stored(path)  # finished by another between the look and the lock
                if stored is None:
                    result = compute(config, report)
                    # Diverged trainings have NaN losses; only this class reads the file.
                    write_json(path, {"config": dict(config), "result": result}, allow_nan=True)
                    stored = json.dumps(result)
                return stored
        except Timeout:
            return None

    @staticmethod
    def _key(identity: list[Any]) -> str:
        text = json.dumps(identity, sort_keys=True)
        return f"{identity[0]}-{hashlib.sha256(text.encode()).hexdigest()[:20]}"


def _stored(path: Path) -> str | None:
    """What is kept at ``path``, as JSON; None if nothing is, or nothing readable."""
    try:
        return json.dumps(json.loads(path.read_text(encoding="utf-8"))["result"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):  # not ours, or damaged: computed again
        return None
