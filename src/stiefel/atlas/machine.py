"""What a result was measured on: versions, machine, commit, memory."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

import stiefel


def available_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Versions of Python, torch, numpy and stiefel."""
    return {
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "numpy": metadata.version("numpy"),
        "stiefel": stiefel.__version__,
    }


def machine() -> dict[str, str | int]:
    """CPU model, cores this process may use, operating system. No host name."""
    return {
        "cpu": _cpu_model(),
        "cores": available_cores(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}".strip(),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@cache
def commit() -> str | None:
    """HEAD of the git checkout this package lies in, ``-dirty`` if the package was edited since.

    None for an installed package, even inside somebody's checkout: only a repository that tracks
    the package says anything about its code.
    """
    folder = Path(stiefel.__file__).parent
    git = shutil.which("git")
    if git is None:
        return None

    def ask(*arguments: str) -> str | None:
        done = subprocess.run(  # noqa: S603 (a found program, fixed arguments)
            [git, "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
        return done.stdout.strip() if done.returncode == 0 else None

    if ask("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    head = ask("rev-parse", "HEAD")
    if head is None:  # no commit yet
        return None
    return f"{head}-dirty" if ask("status", "--porcelain", "--", ".") else head


def peak_rss_mb() -> float | None:
    """Largest resident memory of this process so far, in MiB; None where nobody counts it."""
    status = Path("/proc/self/status")
    if status.exists():
        # ru_maxrss survives exec on Linux: a child of a large parent starts with the parent's
        # peak. VmHWM counts this program only.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024
