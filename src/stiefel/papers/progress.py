"""How an experiment speaks with whoever runs it: progress out, shared results in."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from stiefel.papers.storage import write_json


class Progress:
    """Handed to every experiment.

    Call it with the fraction done and, if there is one, a word on the metric so far::

        progress(0.5, "loss 2.31")

    and ask it for work that other seeds and papers may need too::

        runs = progress.shared("byte-gpt", configs, train)
    """

    def __init__(
        self,
        report: Callable[[float, str], None] | None = None,
        store: Path | None = None,
        fingerprint: str = "",
    ) -> None:
        """Report to ``report``; keep shared results under ``store`` (in memory only if None).

        ``fingerprint`` stands for the code and versions behind the results: another fingerprint
        never finds them.
        """
        self._report = report
        self._store = store
        self._fingerprint = fingerprint
        self._memory: dict[str, Any] = {}

    def __call__(self, fraction: float, message: str = "") -> None:
        """Say that ``fraction`` (0 to 1) is done."""
        if self._report is not None:
            self._report(min(max(float(fraction), 0.0), 1.0), message)

    def shared(
        self,
        kind: str,
        configs: Sequence[Mapping[str, Any]],
        compute: Callable[[Mapping[str, Any], Callable[[float, str], None]], dict[str, Any]],
        *,
        span: tuple[float, float] = (0.0, 1.0),
    ) -> list[dict[str, Any]]:
        """Results of ``compute(config, report)`` for every config, each computed once.

        Processes that ask for overlapping configs at one time split them among themselves: each
        takes the next that nobody holds, and waits only for what others are computing. A process
        that dies frees what it held.

        Args:
            kind: Names the computation; part of the key.
            configs: JSON-able settings, the whole input of ``compute``.
            compute: Returns a JSON-able dict.
            span: The part of this experiment's progress that these computations make up.
        """
        keys = [self._key(kind, c) for c in configs]
        done: dict[str, dict[str, Any]] = {}
        start, width = span[0], span[1] - span[0]

        while True:
            waiting = False
            for key, config in zip(keys, configs, strict=True):
                if key in done:
                    continue

                def report(fraction: float, message: str) -> None:
                    self(start + width * (len(done) + fraction) / len(set(keys)), message)

                result = self._once(key, config, compute, report)
                if result is None:
                    waiting = True
                else:
                    done[key] = result
                    report(0.0, "")
            if not waiting:
                return [done[key] for key in keys]
            time.sleep(0.1)

    def _once(self, key: str, config: Any, compute: Any, report: Any) -> dict[str, Any] | None:
        """The stored or computed result; None while another process computes it."""
        if self._store is None:
            if key not in self._memory:
                self._memory[key] = compute(config, report)
            return self._memory[key]
        path = self._store / f"{key}.json"
        if path.exists():
            return json.loads(path.read_text())["result"]
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(path.with_suffix(".lock"), timeout=0):
                if path.exists():  # finished by another between the look and the lock
                    return json.loads(path.read_text())["result"]
                result = compute(config, report)
                write_json(path, {"config": dict(config), "result": result})
                return result
        except Timeout:
            return None

    def _key(self, kind: str, config: Mapping[str, Any]) -> str:
        text = json.dumps([kind, self._fingerprint, dict(config)], sort_keys=True)
        return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:20]}"
