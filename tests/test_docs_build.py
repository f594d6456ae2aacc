"""The documentation builds without a warning and names every public name."""

import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_sphinx_has_nothing_to_complain_about(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q",
         "-d", str(tmp_path / "trees"), str(ROOT / "docs"), str(tmp_path / "html")],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "html" / "index.html").exists()
    reference = (tmp_path / "html" / "api" / "optim.html").read_text(encoding="utf-8")
    assert 'id="stiefel.optim.NorMuon"' in reference


def test_every_page_stands_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8").splitlines()
    pages = {p.stem for p in (ROOT / "docs").glob("*.md")} - {"index"}
    assert pages - set(index) == set()


def test_the_reference_has_every_home_and_every_promised_name():
    def loaded(path):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    conf = loaded(ROOT / "docs" / "conf.py")
    promised = loaded(ROOT / "tests" / "test_imports.py")
    assert promised.PROMISED.keys() <= set(conf.HOMES)
    for home, names in promised.PROMISED.items():
        classes_and_functions = set(names.split()) - promised.SUB_HOMES
        shown = set(conf.public_names(home))
        # Aliases of types have no page of their own.
        assert classes_and_functions - shown <= {"Verdict", "Scale"} & shown, home
