"""The two commands and the scripts behind them: what stands between a clone and a result."""

import ast
import base64
import hashlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tool(monkeypatch):
    """Imports a script of ``tools/`` by name, and forgets it afterwards."""
    monkeypatch.syspath_prepend(ROOT / "tools")

    def load(name):
        monkeypatch.delitem(sys.modules, name, raising=False)
        module = importlib.import_module(name)
        monkeypatch.delitem(sys.modules, name)
        return module

    return load


@pytest.fixture
def checkout(tmp_path):
    """What a set-up needs of the project, in a path with spaces."""
    root = tmp_path / "a b" / "check out"
    shutil.copytree(ROOT / "tools", root / "tools")
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "requirements-weights.txt"):
        shutil.copy(ROOT / name, root)
    return root


def program(path, text):
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def make(root, *arguments, path, **env):
    """``make`` with only these folders on PATH and none of this machine's pip settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "MAKE", "PYTHON"))}
    return subprocess.run(
        [shutil.which("make"), "--no-print-directory", "-C", str(root), *arguments],
        env=kept | {"PATH": str(path)} | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


# A Python that believes it is another: `sitecustomize` runs before anything else.
OLD = "import sys; sys.version_info = (3, 9, 2, 'final', 0)"
WITHOUT_ENSUREPIP = "import sys; sys.modules['ensurepip'] = None"


class TestMissingPieces:
    """One sentence each, a non-zero status, and no traceback."""

    def python(self, folder, disguise):
        (folder / "disguise").mkdir(parents=True)
        (folder / "disguise" / "sitecustomize.py").write_text(disguise)
        program(
            folder / "bin" / "python3",
            f"PYTHONPATH='{folder}/disguise' exec '{sys.executable}' \"$@\"",
        )
        return folder / "bin"

    @pytest.mark.parametrize("target", ["run", "test"])
    def test_no_python(self, checkout, tmp_path, target):
        done = make(checkout, target, path=tmp_path / "empty")
        assert done.returncode != 0
        assert "Stiefel needs Python 3.11 or newer, and there is none on PATH" in done.stderr

    def test_a_shim_that_does_not_start_is_no_python(self, checkout, tmp_path):
        program(tmp_path / "bin" / "python3", "echo 'command not found' >&2; exit 127")
        done = make(checkout, "install", path=tmp_path / "bin")
        assert done.returncode != 0
        assert "there is none on PATH" in done.stderr

    def test_the_named_python_does_not_start(self, checkout, tmp_path):
        done = make(checkout, "test", "PYTHON=/no such/python3", path=tmp_path / "empty")
        assert done.returncode != 0
        assert "/no such/python3 does not start one" in done.stderr

    @pytest.mark.parametrize(
        ("disguise", "reason"),
        [(OLD, "it is Python 3.9"), (WITHOUT_ENSUREPIP, "its ensurepip module is missing")],
    )
    def test_python_will_not_do(self, checkout, tmp_path, disguise, reason):
        done = make(checkout, "test", path=self.python(tmp_path / "p y", disguise))
        assert done.returncode != 0
        assert reason in done.stderr
        assert "make PYTHON=" in done.stderr
        assert "Traceback" not in done.stderr
        assert not (checkout / ".venv").exists()

    def test_a_newer_python_beside_an_old_one_is_used(self, checkout, tmp_path):
        folder = self.python(tmp_path, OLD)
        # It answers the question whether it will do, then shows what it was started with.
        program(
            folder / "python3.12",
            'case "$1" in -c) exit 0;; *) echo "started $0 with $*";; esac',
        )
        done = make(checkout, "test", "ARGS=-k polar", path=folder)
        assert done.returncode == 0, done.stderr
        script = checkout / "tools" / "bootstrap.py"
        arguments = f"{script} --weights --browser tools/check.py -k polar"
        assert done.stdout == f"started {folder}/python3.12 with {arguments}\n"

    def test_nothing_to_install_from(self, checkout, tmp_path):
        program(tmp_path / "bin" / "python3", f"exec '{sys.executable}' \"$@\"")
        quiet = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"}
        done = make(checkout, "install", path=tmp_path / "bin", HOME=str(tmp_path / "h"), **quiet)
        assert done.returncode != 0
        assert "pip could not install the packages; its last lines say why:" in done.stderr
        assert "hatchling" in done.stderr
        assert not (checkout / ".venv" / "stiefel-stamp").exists()
        assert not (tmp_path / "h").exists(), "something was written to the home folder"

    def test_a_file_of_the_checkout_is_missing(self, checkout, tmp_path):
        program(tmp_path / "bin" / "python3", f"exec '{sys.executable}' \"$@\"")
        (checkout / "constraints.txt").unlink()
        done = make(checkout, "install", path=tmp_path / "bin")
        assert done.returncode != 0
        assert "constraints.txt is missing from" in done.stderr


class TestBootstrap:
    @pytest.mark.parametrize("name", ["bootstrap.py", "browser.py", "contained.py"])
    def test_old_pythons_can_read_it(self, name):
        ast.parse((ROOT / "tools" / name).read_text(), feature_version=(3, 6))

    @pytest.mark.parametrize(
        ("version", "importable", "part"),
        [
            ((3, 10, 9), {"venv", "ensurepip"}, "Python 3.10"),
            ((3, 6, 0), set(), "Python 3.6"),
            ((3, 11, 0), {"venv"}, "ensurepip"),
            ((3, 12, 0), {"ensurepip"}, "venv"),
        ],
    )
    def test_complaint(self, tool, version, importable, part):
        assert part in tool("bootstrap").complaint(version, importable)

    @pytest.mark.parametrize("version", [(3, 11, 0), (3, 13, 1), (4, 0, 0)])
    def test_no_complaint(self, tool, version):
        assert tool("bootstrap").complaint(version, {"venv", "ensurepip"}) is None

    def test_state_of_the_venv(self, tool, checkout):
        bootstrap, root = tool("bootstrap"), str(checkout)
        where = {name: Path(path) for name, path in bootstrap.paths(root).items()}
        assert bootstrap.needed_work(root) == "create"

        where["python"].parent.mkdir(parents=True)
        where["python"].symlink_to(sys.executable)
        settings = where["venv"] / "pyvenv.cfg"
        version = "{}.{}.{}".format(*sys.version_info)
        settings.write_text(f"home = /somewhere\nversion = {version}\n")
        assert bootstrap.needed_work(root) == "update"  # made by hand, not stamped

        where["stamp"].write_text(bootstrap.wanted_stamp(root))
        assert bootstrap.needed_work(root) == "nothing"

        with (checkout / "constraints.txt").open("a") as file:
            file.write("# changed\n")
        assert bootstrap.needed_work(root) == "update"
        where["stamp"].write_text(bootstrap.wanted_stamp(root))
        assert bootstrap.needed_work(root) == "nothing"

        where["unfinished"].touch()  # killed in the middle
        assert bootstrap.needed_work(root) == "create"
        where["unfinished"].unlink()

        settings.write_text("version = 3.10.1\n")
        assert bootstrap.needed_work(root) == "create"
        settings.write_text(f"version = {version}\n")

        where["python"].unlink()
        where["python"].symlink_to("/no/such/python")  # the Python below was removed
        assert bootstrap.needed_work(root) == "create"

    def test_a_moved_checkout_is_installed_again(self, tool, checkout):
        bootstrap = tool("bootstrap")
        moved = checkout.with_name("moved")
        before = bootstrap.wanted_stamp(str(checkout))
        checkout.rename(moved)
        assert bootstrap.wanted_stamp(str(moved)) != before

    @pytest.mark.parametrize("touched", [False, True])
    def test_failed_pip_starts_over_only_if_it_touched_something(
        self, tool, checkout, monkeypatch, touched
    ):
        bootstrap, root = tool("bootstrap"), str(checkout)
        (checkout / ".venv").mkdir()
        lines = ["Collecting torch", "Installing collected packages: torch"][: 1 + touched]
        monkeypatch.setattr(bootstrap, "step", lambda *_: (1, [*lines, "No space left on device"]))
        with pytest.raises(bootstrap.SetupError, match="No space left on device"):
            bootstrap.install(root, "update", {}, 0)
        assert Path(bootstrap.paths(root)["unfinished"]).exists() == touched
        assert not Path(bootstrap.paths(root)["stamp"]).exists()

    def test_the_stamp_comes_last(self, tool, checkout, monkeypatch):
        bootstrap, root = tool("bootstrap"), str(checkout)
        where = {name: Path(path) for name, path in bootstrap.paths(root).items()}
        where["venv"].mkdir()
        where["stamp"].write_text("old\n")
        commands = []

        def step(command, *_):
            assert where["unfinished"].exists()
            assert not where["stamp"].exists()
            commands.append(command)
            return 0, []

        monkeypatch.setattr(bootstrap, "step", step)
        bootstrap.install(root, "update", {}, 0)
        assert where["stamp"].read_text() == bootstrap.wanted_stamp(root)
        assert not where["unfinished"].exists()
        assert all(c[c.index("-c") + 1] == "constraints.txt" for c in commands)

    def test_weights_are_pinned_by_hash_and_stamped_when_they_are_there(
        self, tool, checkout, monkeypatch, capsys
    ):
        bootstrap, root = tool("bootstrap"), str(checkout)
        stamp = Path(bootstrap.paths(root)["weights"])
        stamp.parent.mkdir()
        monkeypatch.setattr(bootstrap, "needed_work", lambda _: "nothing")
        answers, commands = [(1, ["connection broken by 'NewConnectionError'"]), (0, [])], []
        monkeypatch.setattr(
            bootstrap, "step", lambda command, *_: (commands.append(command), answers.pop(0))[1]
        )
        bootstrap.prepare(root)
        assert not commands  # `make lint` and the like do without
        bootstrap.prepare(root, weights=True)
        assert not stamp.exists()
        said = capsys.readouterr().err
        assert "cards that need them will say so" in said
        assert "check the network or proxy" in said
        bootstrap.prepare(root, weights=True)
        assert stamp.read_text() == bootstrap.weights_stamp(root)
        bootstrap.prepare(root, weights=True)
        assert len(commands) == 2
        for option in ("--require-hashes", "--no-deps", "--only-binary"):
            assert option in commands[0]

    def test_network_failures_are_told_from_others(self, tool):
        explain = tool("bootstrap").explanation
        down = "WARNING: Retrying after connection broken by 'NewConnectionError'"
        assert "check the network or proxy" in explain([down, "ERROR: no match"])
        assert "network" not in explain(["ERROR: ResolutionImpossible"])
        assert explain([str(i) for i in range(30)]).splitlines()[-1] == "  29"

    def test_two_at_once_take_turns(self, tool, checkout):
        bootstrap = tool("bootstrap")
        code = "import bootstrap, sys\nwith bootstrap.locked(sys.argv[1]): print('in')"
        with bootstrap.locked(str(checkout)):
            other = subprocess.Popen(
                [sys.executable, "-c", code, str(checkout)],
                env=os.environ | {"PYTHONPATH": str(ROOT / "tools")},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            assert "waiting" in other.stderr.readline()
            assert other.poll() is None
        out, _ = other.communicate(timeout=30)
        assert out == "in\n"

    def test_the_lock_outlives_a_killed_parent(self, tool, checkout):
        """A killed set-up leaves pip running: the next must not touch .venv until that ends."""
        import fcntl

        bootstrap = tool("bootstrap")
        with bootstrap.locked(str(checkout)) as lock:
            child = subprocess.Popen(
                [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,)
            )
        with (checkout / ".cache" / "install.lock").open("w") as file:
            with pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            child.communicate(b"\n")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class TestBrowser:
    """Chromium and axe-core: got where that is allowed, told of in one sentence where not."""

    def archive(self, tmp_path, *names):
        path = tmp_path / "axe.tgz"
        with tarfile.open(path, "w:gz") as file:
            for name in names:
                (tmp_path / name).write_text(name)
                file.add(tmp_path / name, f"package/{name}")
        digest = hashlib.sha512(path.read_bytes()).digest()
        return path, base64.b64encode(digest).decode()

    def test_only_what_is_pinned_is_unpacked(self, tool, tmp_path, monkeypatch):
        browser = tool("browser")
        path, digest = self.archive(tmp_path, "axe.min.js", "LICENSE", "other.js")
        assert "is not what is pinned" in browser.unpack(str(path), str(tmp_path / "to"))
        assert not (tmp_path / "to").exists()
        monkeypatch.setattr(browser, "AXE_SHA512", digest)
        assert browser.unpack(str(path), str(tmp_path / "to")) is None
        assert sorted(p.name for p in (tmp_path / "to").iterdir()) == ["LICENSE", "axe.min.js"]

    def install(self, browser, root, *, have, root_user, answers, monkeypatch):
        commands = []
        monkeypatch.setattr(browser.shutil, "which", lambda name: name if name in have else None)
        monkeypatch.setattr(browser.os, "geteuid", lambda: 0 if root_user else 1000)

        def run(command, env):
            commands.append(command)
            return answers.get(command[0], 0), ["no route", ""]

        return browser.install(str(root), {}, run, lambda _: None), commands

    def test_a_user_is_told_what_to_ask_for(self, tool, tmp_path, monkeypatch):
        browser = tool("browser")
        told, commands = self.install(
            browser,
            tmp_path,
            have={"npm", "apt-get"},
            root_user=False,
            answers={},
            monkeypatch=monkeypatch,
        )
        assert told.endswith("apt-get install chromium")
        assert not commands
        assert "there is no Chromium" in browser.missing(str(tmp_path))

    def test_root_installs_and_failures_are_one_sentence(self, tool, tmp_path, monkeypatch):
        browser = tool("browser")
        told, commands = self.install(
            browser,
            tmp_path,
            have={"apt-get"},
            root_user=True,
            answers={"apt-get": 100},
            monkeypatch=monkeypatch,
        )
        assert told == "apt-get could not install chromium and npm: no route"
        assert len(commands) == 1
        told, commands = self.install(
            browser,
            tmp_path,
            have={"chromium", "npm"},
            root_user=True,
            answers={"npm": 1},
            monkeypatch=monkeypatch,
        )
        assert told == f"npm could not fetch {browser.AXE}: no route"
        assert "--ignore-scripts" in commands[0]
        assert "axe-core is not in .venv" in browser.missing(str(tmp_path))

    def test_nothing_to_do(self, tool, tmp_path, monkeypatch):
        browser = tool("browser")
        where = Path(browser.axe(str(tmp_path)))
        where.parent.mkdir(parents=True)
        where.touch()
        told, commands = self.install(
            browser,
            tmp_path,
            have={"chromium"},
            root_user=True,
            answers={},
            monkeypatch=monkeypatch,
        )
        assert told is None
        assert not commands
        assert browser.missing(str(tmp_path)) is None

    def test_what_cannot_be_had_ends_nothing(self, tool, checkout, monkeypatch, capsys):
        bootstrap, root = tool("bootstrap"), str(checkout)
        monkeypatch.setattr(bootstrap, "needed_work", lambda _: "nothing")
        monkeypatch.setattr(bootstrap.browser, "missing", lambda _: "it is missing")
        monkeypatch.setattr(bootstrap.browser, "install", lambda *_: "no network")
        bootstrap.prepare(root, with_browser=True)
        assert capsys.readouterr().err == "The browser tests are left out: no network\n"


class TestContained:
    def test_every_cache_is_inside(self, tool, tmp_path):
        for name, path in tool("contained").variables(str(tmp_path)).items():
            assert Path(path).is_relative_to(tmp_path / ".cache"), name

    def test_short_paths_hold_the_temporary_files(self, tool):
        contained = tool("contained")
        with contained.environment(str(ROOT)) as env:
            inside = os.path.join(ROOT, ".cache", "tmp")
            fits = len(inside) <= contained.LONGEST_TMPDIR
            assert (env["TMPDIR"] == inside) == fits

    def test_sockets_work_in_a_deep_path(self, tool, tmp_path):
        """multiprocessing puts a socket into TMPDIR, and a socket's path holds 107 bytes."""
        deep = tmp_path / ("long name " * 12).strip()
        deep.mkdir()
        code = "\n".join(
            [
                "import tempfile, multiprocessing as m",
                "if __name__ == '__main__':",
                "    print(tempfile.gettempdir(), m.Manager().list([1, 2]))",
            ]
        )
        (deep / "sockets.py").write_text(code)
        contained = tool("contained")
        with contained.environment(str(deep)) as env:
            assert len(env["TMPDIR"]) <= contained.LONGEST_TMPDIR
            command = [sys.executable, "sockets.py"]
            out = subprocess.check_output(command, cwd=deep, env=env, text=True)
        assert out == f"{env['TMPDIR']} [1, 2]\n"
        assert not Path(env["TMPDIR"]).exists(), "left outside the checkout"

    @pytest.mark.parametrize(
        ("code", "status"),
        [("", 0), ("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)],
    )
    def test_exit_status(self, tmp_path, code, status):
        script = "import contained, sys; sys.exit(contained.call(sys.argv[2:], sys.argv[1]))"
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path), sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": str(ROOT / "tools")},
        )
        assert done.returncode == status

    @pytest.mark.parametrize(
        ("number", "whole_group"), [(signal.SIGINT, True), (signal.SIGTERM, False)]
    )
    def test_signals_end_the_command_and_clean_up(self, tmp_path, number, whole_group):
        """A terminal sends Ctrl-C to the whole group, ``kill`` sends SIGTERM to the first only."""
        root = tmp_path / ("long name " * 12).strip()
        root.mkdir()
        script = "import contained, sys; sys.exit(contained.call(sys.argv[2:], sys.argv[1]))"
        code = "import tempfile, time; print(tempfile.gettempdir(), flush=True); time.sleep(60)"
        outer = subprocess.Popen(
            [sys.executable, "-c", script, str(root), sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": str(ROOT / "tools")},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        temporary = Path(outer.stdout.readline().strip())
        assert temporary.exists()
        (os.killpg if whole_group else os.kill)(outer.pid, number)
        outer.communicate(timeout=30)  # ends only when the inner one has let go of stdout
        assert outer.returncode == 128 + number
        assert not temporary.exists()


class TestCheck:
    GOOD = ("-c", "print('unseen')")
    BAD = ("-c", "print('why it failed'); raise SystemExit(3)")

    def test_every_failure_is_shown(self, tool, monkeypatch, capfd):
        check = tool("check")
        monkeypatch.setattr(check, "LINTERS", {"a": self.BAD, "b": self.GOOD, "c": self.BAD})
        assert check.main(["--lint"]) == 1
        out = capfd.readouterr().out
        assert out.count("why it failed") == 2
        assert out.count("FAILED (exit status 3)") == 2
        assert "unseen" not in out

    @pytest.mark.parametrize(("status", "expected"), [(0, 0), (1, 1), (5, 1)])
    def test_the_tests_count(self, tool, monkeypatch, capfd, status, expected):
        check = tool("check")
        monkeypatch.setattr(check, "LINTERS", {"a": self.GOOD})
        monkeypatch.setattr(check, "test", lambda _: check.Outcome("pytest", status, 1.0))
        assert check.main([]) == expected
        assert "pytest" in capfd.readouterr().out

    def test_arguments_reach_pytest_on_all_cores(self, tool, monkeypatch):
        check = tool("check")
        ran = []

        def run(command):
            ran.append(command)
            return subprocess.CompletedProcess(command, 4)

        monkeypatch.setattr(check.subprocess, "run", run)
        assert check.test(["-k", "polar"]).status == 4
        assert ran[0][-2:] == ["-k", "polar"]
        assert int(ran[0][ran[0].index("-n") + 1]) >= 1


class TestRefresh:
    def test_render_drops_local_builds_and_sorts(self, tool):
        versions = {"zlib": "1", "torch": "2.13.0+cpu", "B": "2.0+cpu", "a": "3"}
        text = tool("constraints").render(versions, "torch==2.13.0")
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        assert lines == ["torch==2.13.0", "a==3", "B==2.0", "zlib==1"]

    def test_refresh_refuses_a_file_without_torch(self, tool):
        constraints = tool("constraints")
        assert constraints.pinned_torch("# x\ntorch==2.13.0\na==1\n") == "torch==2.13.0"
        with pytest.raises(ValueError, match="no line `torch==VERSION`"):
            constraints.pinned_torch("torchvision==1\n")
