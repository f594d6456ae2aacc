"""A new paper: what is written runs as it stands, in a package of its own and in a checkout."""

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from stiefel import papers
from stiefel.atlas.new_paper import module_name, new_paper
from stiefel.cli import app
from stiefel.papers import Paper, all_papers


def run(*arguments, folder, path=""):
    env = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, env=env, capture_output=True, text=True
    )


def install(package, into):
    """What pip leaves behind, without pip: the module and the metadata with the entry point."""
    module = next(package.glob("*.py"))
    (into / module.name).write_text(module.read_text())
    info = into / f"stiefel_{package.name.replace('-', '_')}-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package.name}\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(
        f"[stiefel.papers]\n{package.name} = {module.stem}:paper\n"
    )


def test_a_package_of_its_own_is_found_reproduced_and_tested(tmp_path):
    made = new_paper("heavy-ball", tmp_path, title="The heavy ball", arxiv="1234.56789")
    assert not made.in_checkout
    assert [p.relative_to(tmp_path).as_posix() for p in made.files] == [
        "heavy-ball/pyproject.toml", "heavy-ball/heavy_ball.py",
        "heavy-ball/tests/test_heavy_ball.py", "heavy-ball/README.md",
    ]  # fmt: skip
    site = tmp_path / "site"
    site.mkdir()
    install(tmp_path / "heavy-ball", site)
    done = run("-m", "stiefel", "reproduce", "heavy-ball", "--scale", "laptop", "--seeds", "0,1,2",
               "--out", tmp_path / "results", "--json", folder=tmp_path, path=site)  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["slug"], result["verdict"]) == ("heavy-ball", "reproduced")
    assert len({m["metrics"]["ratio"] for m in result["measurements"]}) == 3
    shown = run("-m", "stiefel", "show", "heavy-ball", folder=tmp_path, path=site)
    assert "The heavy ball" in shown.stdout
    tests = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests",
                folder=tmp_path / "heavy-ball", path=site)  # fmt: skip
    assert tests.returncode == 0, tests.stdout


def test_its_pyproject_says_what_the_entry_point_needs(tmp_path):
    import tomllib

    new_paper("heavy-ball", tmp_path)
    project = tomllib.loads((tmp_path / "heavy-ball/pyproject.toml").read_text())
    assert project["project"]["entry-points"][papers.ENTRY_POINTS] == {
        "heavy-ball": "heavy_ball:paper"
    }
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"] == [
        "heavy_ball.py"
    ]


def test_in_a_checkout_it_becomes_a_module_a_test_and_a_page(tmp_path):
    listing = tmp_path / "src/stiefel/papers/__init__.py"
    listing.parent.mkdir(parents=True)
    listing.write_text('MODULES = (\n    "rmnp",\n    "root",\n)\nREST = ("x",)\n')
    made = new_paper("heavy-ball", tmp_path)
    assert made.in_checkout
    assert listing.read_text() == (
        'MODULES = (\n    "rmnp",\n    "root",\n    "heavy_ball",\n)\nREST = ("x",)\n'
    )
    module, test, page = made.files
    assert module == listing.parent / "heavy_ball.py"
    assert "from stiefel.papers.heavy_ball import paper" in test.read_text()
    assert "stiefel reproduce heavy-ball" in page.read_text()


def test_what_is_written_is_formatted_and_clean(tmp_path):
    made = new_paper("heavy-ball", tmp_path)
    for path in made.files[1:3]:
        for command in (["check", "--select", "E,F,W,B,UP"], ["format", "--check"]):
            done = run("-m", "ruff", *command, "--isolated", "--line-length", "100", path,
                       folder=tmp_path)  # fmt: skip
            assert done.returncode == 0, done.stdout


def test_nothing_is_overwritten(tmp_path):
    new_paper("heavy-ball", tmp_path)
    readme = tmp_path / "heavy-ball/README.md"
    (tmp_path / "heavy-ball/pyproject.toml").unlink()
    readme.write_text("mine")
    with pytest.raises(FileExistsError, match=r"heavy_ball\.py is there already"):
        new_paper("heavy-ball", tmp_path)
    assert readme.read_text() == "mine"
    assert not (tmp_path / "heavy-ball/pyproject.toml").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"slug": "Heavy Ball"}, "slug must be lower-case words joined by hyphens, got 'Heavy"),
        ({"slug": "../escape"}, "slug must be"),
        ({"slug": "rmnp"}, "there is a paper 'rmnp' already"),
        ({"slug": "a", "title": 'x" + y'}, "title must be printable, without quotes"),
        ({"slug": "a", "arxiv": "1\n2"}, "arxiv must be printable"),
        ({"slug": "a", "topic": "b\\c"}, "topic must be printable"),
    ],
)
def test_bad_names_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        new_paper(**arguments, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_module_names():
    assert [module_name(s) for s in ("heavy-ball", "3d-lines", "lambda")] == [
        "heavy_ball", "paper_3d_lines", "paper_lambda",
    ]  # fmt: skip


def test_the_command(tmp_path):
    def call(*arguments):
        return CliRunner().invoke(app, ["new-paper", *arguments, "--folder", str(tmp_path)])

    done = call("heavy-ball", "--json")
    assert json.loads(done.stdout)["slug"] == "heavy-ball"
    again = call("heavy-ball")
    assert (again.exit_code, "is there already" in again.stderr) == (2, True)
    assert call("Heavy").exit_code == 2
    assert "stiefel reproduce other --scale smoke" in call("other").stdout


class Point:
    """An entry point of another package."""

    def __init__(self, name, result):
        self.name, self.value, self.result = name, f"{name}:paper", result

    def load(self):
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def test_papers_of_others_come_last_and_broken_ones_do_no_harm(monkeypatch, caplog):
    import dataclasses

    ours = all_papers()
    good = dataclasses.replace(ours[0], slug="of-others")
    points = [
        Point("broken", ImportError("no such module")), Point("good", good),
        Point("number", 3), Point("taken", ours[0]), Point("twice", good),
    ]  # fmt: skip
    monkeypatch.setattr(papers, "entry_points", lambda group: points if group == "stiefel.papers"
                        else importlib.metadata.entry_points(group=group))  # fmt: skip
    found = all_papers.__wrapped__()
    assert found == (*ours, good)
    assert isinstance(found[-1], Paper)
    text = caplog.text
    for said in (
        "broken (broken:paper) does not load: no such module",
        "number:paper) is a int",
        "taken:paper): the slug rmnp is taken",
        "twice:paper): the slug of-others",
    ):
        assert said in text
