"""Run the linters at once, then the tests; say at the end what failed.

    python tools/check.py [--lint] [ARGUMENT...]

``--lint`` leaves the tests out. The other arguments go to pytest.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

PYTHON = sys.executable

# Modules, never the scripts beside python: those start with a path that may hold a space.
LINTERS = {
    "ruff check": ["-m", "ruff", "check"],
    "ruff format": ["-m", "ruff", "format", "--check"],
    "import contracts": [
        "-c",
        "from importlinter.cli import lint_imports_command; lint_imports_command()",
        "--no-logo",
        "--cache-dir",
        ".cache/import-linter",
    ],
    "types": ["-m", "pyrefly", "check"],
}


class Outcome(NamedTuple):
    """How one step ended."""

    name: str
    status: int
    seconds: float
    output: str = ""


def lint(name: str) -> Outcome:
    """Run one linter and keep what it says."""
    start = time.perf_counter()
    done = subprocess.run(
        [PYTHON, *LINTERS[name]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return Outcome(name, done.returncode, time.perf_counter() - start, done.stdout)


def test(arguments: list[str]) -> Outcome:
    """Run pytest, one process a core; its output goes straight through."""
    start = time.perf_counter()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    command = [PYTHON, "-m", "pytest", "-n", str(cores or 1), "--dist", "worksteal"]
    command += ["-o", "cache_dir=.cache/pytest", *arguments]
    status = subprocess.run(command).returncode
    return Outcome("pytest", status, time.perf_counter() - start)


def main(arguments: list[str]) -> int:
    """Every step, whatever the others say; 1 if any failed."""
    only_lint = "--lint" in arguments
    with ThreadPoolExecutor() as pool:
        outcomes = list(pool.map(lint, LINTERS))
    for outcome in outcomes:
        if outcome.status != 0:
            print(f"--- {outcome.name} ---\n{outcome.output.rstrip()}\n", flush=True)
    if not only_lint:
        outcomes.append(test([a for a in arguments if a != "--lint"]))
    print()
    for outcome in outcomes:
        verdict = "ok" if outcome.status == 0 else f"FAILED (exit status {outcome.status})"
        print(f"{outcome.name:17} {outcome.seconds:6.1f} s  {verdict}")
    return int(any(outcome.status != 0 for outcome in outcomes))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
