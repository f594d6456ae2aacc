"""A result's key changes with the code that could change the result, and with nothing else."""

import functools
import sys

import pytest

from stiefel.papers import closure as module
from stiefel.papers.closure import closure, code_digest

FILES = {
    "__init__.py": "",
    "optim/__init__.py": (
        "from lab.optim.muon import Muon as Muon\n"
        "from .norm import NorMuon\n"
        "from lab.optim import lazy as lazy\n"
        "LIMIT = 3\n"
        "def helper():\n    return 1\n"
    ),
    "optim/muon.py": "from ..linalg import polar\nclass Muon:\n    pass\n",
    "optim/norm.py": "import lab.base\nclass NorMuon(lab.base.Base):\n    pass\n",
    "optim/lazy.py": "X = 1\n",
    "optim/unused.py": "Y = 1\n",
    "linalg.py": "def polar(x):\n    return x\n",
    "base.py": "class Base:\n    pass\n",
    "guess/__init__.py": "def __getattr__(name):\n    return 1\n",
    "guess/one.py": "Z = 1\n",
    "papers/__init__.py": "",
    "drawing.py": "COLOUR = 1\ndef line(x):\n    return x\n",
    "papers/one.py": (
        "from typing import TYPE_CHECKING\n"
        "from lab.drawing import COLOUR, line\n"
        "import json\n"
        "from lab.optim import Muon\n"
        "if TYPE_CHECKING:\n    from lab.optim import NorMuon\n"
        "from stiefel.papers.paper import Claim, Paper\n"
        "def both(x):\n    return x\n"
        "def experiment(scale, seed, progress):\n"
        "    from lab.late import value\n"
        "    return both(value)\n"
        "def figure(measurements):\n"
        "    from lab.optim import unused\n"
        "    return _draw(unused)\n"
        "def _draw(x):\n    return _draw(line(both(COLOUR)))\n"
        "paper = Paper(slug='one', title='T', authors='A', published='2025-01', arxiv='1', "
        "code=None, topic='t', summary='s', claim=Claim('c', 'm', at_most=1.0), "
        "experiment=experiment, figure=figure, snippet='x')\n"
    ),
    "late.py": "value = 1\n",
}


@pytest.fixture
def lab(tmp_path, monkeypatch):
    root = tmp_path / "lab"
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [n for n in sys.modules if n.partition(".")[0] == "lab"]:
        monkeypatch.delitem(sys.modules, name)
    yield root
    for name in [n for n in sys.modules if n.partition(".")[0] == "lab"]:
        del sys.modules[name]


def names(start):
    return set(closure(start))


def test_only_what_is_used_counts(lab):
    assert names("lab.papers.one") == {"lab.papers.one", "lab.optim.muon", "lab.linalg", "lab.late"}


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("from lab.optim import NorMuon", {"lab.optim.norm", "lab.base"}),
        ("from lab.optim import lazy", {"lab.optim.lazy"}),
        ("from lab.optim import unused", {"lab.optim.unused"}),
        ("from lab import late, base", {"lab.late", "lab.base"}),
        ("import lab.optim.lazy as z", {"lab.optim.lazy"}),
        ("from lab.late import *", {"lab.late"}),
        ("from . import late", {"lab.late"}),
        ("from .optim.muon import Muon", {"lab.optim.muon", "lab.linalg"}),
        ("import numpy, torch", set()),
        ("def f():\n    from lab.late import value", {"lab.late"}),
    ],
)
def test_every_way_to_import(lab, line, wanted):
    (lab / "start.py").write_text(line + "\n")
    assert names("lab.start") == {"lab.start"} | wanted


def test_what_a_package_defines_itself_counts_as_the_package(lab):
    (lab / "start.py").write_text("from lab.optim import LIMIT\n")
    assert names("lab.start") >= {"lab.optim", "lab.optim.muon", "lab.optim.norm"}
    (lab / "start.py").write_text("from lab.optim import helper\n")
    assert "lab.optim" in names("lab.start")


def test_what_cannot_be_read_off_counts_whole(lab):
    (lab / "start.py").write_text("from lab.guess import anything\n")
    assert names("lab.start") == {"lab.start", "lab.guess", "lab.guess.one"}


def test_circular_imports_end(lab):
    (lab / "a.py").write_text("from lab.b import y\nx = 1\n")
    (lab / "b.py").write_text("from lab.a import x\ny = 1\n")
    assert names("lab.a") == {"lab.a", "lab.b"}
    (lab / "loop").mkdir()
    (lab / "loop" / "__init__.py").write_text("from lab.loop import ghost as ghost\n")
    (lab / "start.py").write_text("from lab.loop import ghost\n")
    assert names("lab.start") == {"lab.start", "lab.loop"}


def test_stiefel_counts_for_papers_from_elsewhere(lab):
    (lab / "start.py").write_text("import stiefel.storage\nfrom stiefel import __version__\n")
    assert names("lab.start") == {"lab.start", "stiefel"}


def change(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def digest():
    from lab.papers.one import experiment

    return code_digest(experiment)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("papers/one.py", "both(value)", "both(value + 1)"),
        ("papers/one.py", "def both(x):\n    return x", "def both(x):\n    return x + 1"),
        ("late.py", "value = 1", "value = 2"),
        ("linalg.py", "return x", "return -x"),
        ("optim/muon.py", "pass", "rate = 1"),
        ("optim/__init__.py", "lab.optim.muon import", "lab.optim.lazy import"),
    ],
)
def test_relevant_code_changes_the_digest(lab, file, old, new):
    before = digest()
    assert before == digest()
    change(lab / file, old, new)
    assert digest() != before


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("optim/norm.py", "pass", "rate = 1"),
        ("optim/unused.py", "Y = 1", "Y = 2"),
        ("optim/__init__.py", "LIMIT = 3", "LIMIT = 4"),
        ("linalg.py", "    return x", '    """Docs."""\n    # why\n    return (x)'),
        ("papers/one.py", "title='T'", "title='Another title'"),
        ("papers/one.py", "at_most=1.0", "at_most=2.0"),
        ("papers/one.py", "_draw(unused)", "_draw(unused.Y)"),
        ("papers/one.py", "return _draw(line", "return 1 + _draw(line"),
        ("drawing.py", "COLOUR = 1", "COLOUR = 2"),
        ("papers/one.py", "import NorMuon", "import Muon"),
    ],
)
def test_other_code_words_and_figures_do_not(lab, file, old, new):
    before = digest()
    change(lab / file, old, new)
    assert digest() == before


def test_arguments_of_partial_count(lab):
    from lab.papers.one import experiment

    one, two = (functools.partial(experiment, rate=rate) for rate in (1, 2))
    assert len({code_digest(one), code_digest(two), code_digest(experiment)}) == 3
    assert code_digest(one) == code_digest(functools.partial(experiment, rate=1))


def test_a_function_without_source_is_refused():
    function = type("F", (), {"__module__": "no_such_module"})()
    with pytest.raises(ValueError, match="'no_such_module' has no source file"):
        code_digest(function)
    with pytest.raises(ValueError, match="'builtins' has no source file"):
        code_digest(len)


def test_reading_does_not_import(lab):
    closure("lab.papers.one")
    assert not [name for name in sys.modules if name.partition(".")[0] == "lab"]


def test_runtime_names_what_can_change_numbers():
    import torch

    assert module.runtime() == {
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "torch": torch.__version__,
    }
