"""What the browser tests need beside Python: Chromium, and axe-core from npm.

Parseable by Python 3.6, as ``bootstrap.py`` imports it before it knows what runs it.
"""

import base64
import hashlib
import os
import shutil
import tarfile
import tempfile

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
AXE = "axe-core@4.14.1"
# As npm's registry states it; what comes is compared with it.
AXE_SHA512 = (
    "FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ=="
)
AXE_FILES = ("LICENSE", "axe.min.js")  # the last one says that all are there
APT = ["apt-get", "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=20"]


def chromium():
    """Path of the browser, None where there is none."""
    for name in CHROMIUM:
        path = shutil.which(name)
        if path is not None:
            return path
    return None


def axe(root):
    """Path of the accessibility checker inside the checkout's venv; it need not be there."""
    return os.path.join(root, ".venv", "stiefel-browser", "axe.min.js")


def missing(root):
    """One sentence on what the browser tests lack, None if they can run."""
    if chromium() is None:
        return "The browser tests are left out: there is no Chromium on PATH."
    if not os.path.isfile(axe(root)):
        return "The browser tests are left out: axe-core is not in .venv (make browser gets it)."
    return None


def install(root, env, run, say):
    """Get what is missing, as far as this user may.

    Args:
        root: The checkout.
        env: Environment variables of the commands; npm's cache goes where pip's is.
        run: Runs a command in an environment, gives its exit status and its lines.
        say: Tells the user a line.

    Returns:
        None, or one sentence on what could not be had.
    """
    wanted = [] if chromium() else ["chromium"]
    if not os.path.isfile(axe(root)) and not shutil.which("npm"):
        wanted.append("npm")
    if wanted:
        names = " and ".join(wanted)
        if not may_install():
            return names + " must be installed by an administrator: apt-get install " + names
        say("Installing Debian's " + names + " for the browser tests (once).")
        env = dict(env, DEBIAN_FRONTEND="noninteractive")
        for command in (["update"], ["install", "-y", "--no-install-recommends", *wanted]):
            status, lines = run(APT + command, env)
            if status != 0:
                return "apt-get could not install " + names + ": " + last(lines)
    if os.path.isfile(axe(root)):
        return None
    say("Installing axe-core for the browser tests into .venv (once).")
    with tempfile.TemporaryDirectory(dir=env.get("TMPDIR")) as folder:
        cache = os.path.join(root, ".cache", "npm")
        command = ["npm", "pack", AXE, "--ignore-scripts", "--pack-destination", folder]
        status, lines = run(command, dict(env, npm_config_cache=cache))
        found = [name for name in os.listdir(folder) if name.endswith(".tgz")]
        if status != 0 or len(found) != 1:
            return "npm could not fetch " + AXE + ": " + last(lines)
        return unpack(os.path.join(folder, found[0]), os.path.dirname(axe(root)))


def may_install():
    """Whether apt-get is here and this process may use it."""
    return bool(shutil.which("apt-get")) and hasattr(os, "geteuid") and os.geteuid() == 0


def last(lines):
    """The last line that says anything."""
    told = [line.strip() for line in lines if line.strip()]
    return told[-1] if told else "it gave no reason"


def unpack(archive, folder):
    """Put the checker's file into ``folder`` if the archive is the one that is pinned.

    Returns:
        None, or one sentence on why not.
    """
    with open(archive, "rb") as file:
        found = base64.b64encode(hashlib.sha512(file.read()).digest()).decode()
    if found != AXE_SHA512:
        return AXE + " is not what is pinned: its SHA-512 is " + found
    os.makedirs(folder, exist_ok=True)
    with tarfile.open(archive) as content:
        for name in AXE_FILES:
            source = content.extractfile("package/" + name)
            if source is None:
                return AXE + " has no file " + name
            partial = os.path.join(folder, name + ".tmp")
            with open(partial, "wb") as file:
                file.write(source.read())
            os.replace(partial, os.path.join(folder, name))
    return None
