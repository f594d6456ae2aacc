"""The Python blocks of the README and of every page of the documentation run as they stand."""

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# A reader pastes the blocks of a page one after the other: so they run, as one script.
SCRIPTS = [
    pytest.param("\n".join(blocks), id=path.name)
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    if (blocks := BLOCK.findall(path.read_text(encoding="utf-8")))
]


@pytest.mark.parametrize("text", SCRIPTS)
def test_blocks_run(text, tmp_path, monkeypatch):
    script = tmp_path / "page.py"
    script.write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(script))
    assert any(not name.startswith("__") for name in names)


def test_links_between_documents_lead_somewhere():
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        prose = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", prose):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_tables_of_verdicts_are_those_of_the_results():
    sys.path.insert(0, str(ROOT / "tools"))
    import tables

    assert len(tables.results()) == 31
    for name, table in tables.tables().items():
        found = tables.PLACE.findall((ROOT / name).read_text(encoding="utf-8"))
        assert found == [table], f"{name}: run python tools/tables.py"
