"""Write ``constraints.txt``: the newest of everything that ``stiefel[dev,bench]`` needs.

torch keeps the version that the file has; change that line by hand. Nothing is installed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = """\
# The set of packages that the tests have seen, in full. `make constraints` refreshes it.
#
# torch is pinned first and for more than repeatability. With an open range pip takes the newest
# release of its index, whose Linux build drags in gigabytes of CUDA libraries, even where a CPU
# build of this release lies ready (PIP_FIND_LINKS). `==` also accepts such a build, as in
# 2.13.0+cpu, and pip prefers it. Where there is none, the index's own build is installed.
"""


def pinned_torch(text: str) -> str:
    """The torch line of a constraints file.

    Raises:
        ValueError: there is none.
    """
    found = re.search(r"^torch==\S+$", text, re.MULTILINE)
    if found is None:
        raise ValueError("constraints.txt has no line `torch==VERSION`; add it by hand first")
    return found.group()


def resolve(torch: str) -> dict[str, str]:
    """What pip would install today, as version by name.

    Raises:
        subprocess.CalledProcessError: pip found no solution, or no network.
    """
    with tempfile.TemporaryDirectory() as folder:
        pin, report = Path(folder, "pin.txt"), Path(folder, "report.json")
        pin.write_text(torch + "\n")
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
        command += ["--no-build-isolation", "-qq", "--report", str(report), "-c", str(pin)]
        subprocess.run([*command, ".[dev,bench]"], cwd=ROOT, check=True)
        installs = json.loads(report.read_text())["install"]
    versions = {i["metadata"]["name"]: i["metadata"]["version"] for i in installs}
    del versions["stiefel"]
    return versions


def render(versions: dict[str, str], torch: str) -> str:
    """The file: torch, then the rest by name. Local builds (``+cpu``) count as their release."""
    rest = [
        f"{name}=={version.partition('+')[0]}"
        for name, version in sorted(versions.items(), key=lambda item: item[0].lower())
        if name.lower() != "torch"
    ]
    return "\n".join([HEADER + torch, *rest]) + "\n"


def main() -> None:
    """Replace the file, in one go."""
    path = ROOT / "constraints.txt"
    torch = pinned_torch(path.read_text())
    new = path.with_suffix(".tmp")
    new.write_text(render(resolve(torch), torch))
    os.replace(new, path)
    print(f"Wrote {path.name}. Now: make test")


if __name__ == "__main__":
    main()
