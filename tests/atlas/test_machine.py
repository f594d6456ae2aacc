"""What a result was measured on."""

import os
import subprocess
import sys

import pytest

import stiefel
from stiefel.atlas import machine


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with a package in it, and a way to speak to git there."""
    package = tmp_path / "src" / "stiefel"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(stiefel, "__file__", str(package / "__init__.py"))

    def git(*arguments):
        identity = ("-c", "user.name=T", "-c", "user.email=t@example.org")
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments],
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.strip()

    git("init", "-q")
    return tmp_path, package, git


def test_commit_is_head_and_says_when_the_package_was_edited(checkout):
    root, package, git = checkout
    ask = machine.commit.__wrapped__
    assert ask() is None  # nothing tracked yet
    git("add", ".")
    assert ask() is None  # no commit yet
    git("commit", "-q", "-m", "one")
    head = git("rev-parse", "HEAD")
    assert ask() == head
    (root / "results.json").write_text("{}")  # not the package
    assert ask() == head
    (package / "new.py").write_text("")
    assert ask() == f"{head}-dirty"
    (package / "new.py").unlink()
    (package / "__init__.py").write_text("x = 1")
    assert ask() == f"{head}-dirty"


def test_commit_of_an_installed_package_is_unknown(checkout, monkeypatch):
    root, _, git = checkout
    (root / ".gitignore").write_text("src\n")
    git("add", ".")
    git("commit", "-q", "-m", "somebody else's project")
    assert machine.commit.__wrapped__() is None
    monkeypatch.setenv("PATH", str(root / "nowhere"))
    assert machine.commit.__wrapped__() is None


def test_machine_names_processor_cores_and_system():
    told = machine.machine()
    assert told["cpu"]
    assert 1 <= told["cores"] <= os.cpu_count()
    assert sys.platform in told["system"].lower()
    assert os.uname().nodename not in str(told).split()


def test_peak_memory_is_this_process_and_only_grows():
    # A child of this process (torch and all) must not start with our peak.
    script = "from stiefel.atlas.machine import peak_rss_mb as p; a = p(); x = b'1' * 80_000_000"
    script += "; print(a, p())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    before, after = map(float, done.stdout.split())
    assert 5 < before < 120
    assert 70 < after - before < 120
    assert machine.peak_rss_mb() > before
