"""Keep what Python programs write inside the checkout: caches, settings, temporary files.

Parseable by Python 3.6, as ``bootstrap.py`` imports it before it knows what runs it.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile

# multiprocessing and torch put sockets below TMPDIR, up to 45 bytes further down, and a socket's
# path holds 107 bytes on Linux and 103 on macOS.
LONGEST_TMPDIR = 58


def variables(root):
    """The environment variables, as a dict, that send every cache into ``root/.cache``.

    Only caches move. Settings that the user has for pip, git and others are still found.
    """
    cache = os.path.join(root, ".cache")
    return {
        "HYPOTHESIS_STORAGE_DIRECTORY": os.path.join(cache, "hypothesis"),
        "MPLCONFIGDIR": os.path.join(cache, "matplotlib"),
        "PIP_CACHE_DIR": os.path.join(cache, "pip"),
        "RUFF_CACHE_DIR": os.path.join(cache, "ruff"),
        "SCIKIT_LEARN_DATA": os.path.join(cache, "scikit-learn"),
        "TORCHINDUCTOR_CACHE_DIR": os.path.join(cache, "torchinductor"),
        "TRITON_CACHE_DIR": os.path.join(cache, "triton"),
        "XDG_CACHE_HOME": cache,
    }


@contextlib.contextmanager
def environment(root):
    """``os.environ`` with :func:`variables` and a TMPDIR, as a dict.

    TMPDIR is ``root/.cache/tmp`` unless that is too long for sockets: then it is a folder in the
    system's own place for temporary files, removed at the end.
    """
    env = dict(os.environ)
    env.update(variables(root))
    inside = os.path.join(root, ".cache", "tmp")
    os.makedirs(env["MPLCONFIGDIR"], exist_ok=True)  # matplotlib warns when it is not there
    if len(os.fsencode(inside)) <= LONGEST_TMPDIR:
        os.makedirs(inside, exist_ok=True)
        env["TMPDIR"] = inside
        yield env
        return
    outside = tempfile.mkdtemp(prefix="stiefel-")
    try:
        env["TMPDIR"] = outside
        yield env
    finally:
        shutil.rmtree(outside, ignore_errors=True)


def call(command, root):
    """Run ``command`` in ``root``, contained; its exit status, 128 + n when signal n ended it.

    Signals are the command's business: Ctrl-C reaches it as it reaches this process, SIGTERM and
    SIGHUP are handed on.
    """
    with environment(root) as env:
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            # A function, not SIG_IGN: that would be inherited and leave the command deaf to Ctrl-C.
            signal.signal(signal.SIGINT, lambda *_: None)
        process = subprocess.Popen(command, cwd=root, env=env)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda received, _frame: process.send_signal(received))
        status = process.wait()
    return status if status >= 0 else 128 - status
