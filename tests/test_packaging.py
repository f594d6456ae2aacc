"""The Makefile, the pinned set and the wheel."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


class TestMakefile:
    def test_help_names_every_target(self):
        phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
        out = subprocess.check_output(["make", "-C", str(ROOT), "help"], text=True)
        shown = re.findall(r"^  ([a-z]+) +\S", out, re.MULTILINE)
        assert sorted(shown) == sorted(phony.group(1).split())

    def test_papers_are_handed_to_reproduce(self):
        command = ["make", "-n", "-C", str(ROOT), "run", "PAPERS=rmnp s4d"]
        out = subprocess.check_output(command, text=True)
        expected = "-m stiefel reproduce rmnp s4d --scale laptop --out build/results"
        assert f"{expected} --page build/atlas" in out

    def test_ci_runs_make_test_from_anywhere(self, tmp_path):
        fake = tmp_path / "make"
        fake.write_text('#!/bin/sh\necho "$PWD: $*"\n')
        fake.chmod(0o755)
        out = subprocess.check_output(
            ["/bin/sh", str(ROOT / ".ci" / "run")],
            cwd=tmp_path,
            env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
            text=True,
        )
        assert out == f"{ROOT}: test\n"


def pins():
    """constraints.txt as version by canonical name; every line has to be an exact pin."""
    found = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][0-9A-Za-z.]*)", line).groups()
            assert canonicalize_name(name) not in found, f"{name} is pinned twice"
            found[canonicalize_name(name)] = version
    return found


def requirements(extras):
    """Those of the project with these extras, which may name further extras of it."""
    texts = list(PROJECT["dependencies"])
    for extra in extras:
        for text in PROJECT["optional-dependencies"][extra]:
            requirement = Requirement(text)
            if requirement.name == PROJECT["name"]:
                texts += requirements(requirement.extras)
            else:
                texts.append(text)
    return texts


def closure(texts):
    """Canonical names of all installed distributions that these requirements lead to."""
    seen = set()
    queue = [Requirement(text) for text in texts]
    while queue:
        requirement = queue.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        for text in metadata.requires(requirement.name) or []:
            below = Requirement(text)
            if any(
                below.marker is None or below.marker.evaluate({"extra": extra})
                for extra in {"", *requirement.extras}
            ):
                queue.append(below)
    return {name for name, _ in seen}


def test_the_citation_has_the_version():
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited.group(1) == metadata.version("stiefel")


class TestConstraints:
    def test_torch_comes_first(self):
        assert next(iter(pins().items())) == ("torch", "2.13.0")

    @pytest.mark.parametrize("extras", [(), ("atlas",), ("dev",)])
    def test_all_that_is_needed_is_pinned(self, extras):
        needed = closure(requirements(extras))
        assert "torch" in needed
        assert needed - pins().keys() == set(), "run: make constraints"

    def test_pins_satisfy_the_project(self):
        pinned = pins()
        for text in requirements(PROJECT["optional-dependencies"]):
            requirement = Requirement(text)
            version = pinned[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"{text} is pinned to {version}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from the source archive by this environment's backend, without a network."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation"]
    subprocess.run([*command, "--outdir", str(folder), str(ROOT)], check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder that holds the installed wheel and nothing else."""
    target = tmp_path_factory.mktemp("in stalled")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target"]
    subprocess.run([*command, str(target), str(wheel)], check=True, capture_output=True)
    return target


class TestWheel:
    def test_holds_the_package_and_nothing_else(self, wheel):
        with zipfile.ZipFile(wheel) as archive:
            names = {n for n in archive.namelist() if ".dist-info/" not in n}
        source = ROOT / "src"
        expected = {
            path.relative_to(source).as_posix()
            for path in (source / "stiefel").rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert names == expected
        assert "stiefel/py.typed" in names
        assert any(n.startswith("stiefel/atlas/templates/") for n in names)
        assert not any(part.startswith("test") for n in names for part in n.split("/"))

    def test_metadata(self, wheel):
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
            about = archive.read(name).decode()
            scripts = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
            assert name.replace("METADATA", "licenses/LICENSE") in archive.namelist()
        assert "\nRequires-Python: >=3.11\n" in about
        assert "stiefel = stiefel.cli:main" in scripts

    def run(self, installed, tmp_path, *arguments):
        return subprocess.check_output(
            [sys.executable, "-P", *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(installed), "HOME": str(tmp_path)},
            text=True,
        )

    def test_imports_from_there(self, installed, tmp_path):
        code = "import stiefel.linalg, stiefel.optim, stiefel.papers as p; print(p.__file__)"
        where = Path(self.run(installed, tmp_path, "-c", code).strip())
        assert where.is_relative_to(installed)

    def test_runs_from_there(self, installed, tmp_path):
        (info,) = installed.glob("stiefel-*.dist-info")
        version = info.name.removeprefix("stiefel-").removesuffix(".dist-info")
        for start in (["-m", "stiefel"], [str(installed / "bin" / "stiefel")]):
            assert version in self.run(installed, tmp_path, *start, "--version")
            assert "reproduce" in self.run(installed, tmp_path, *start, "--help")
