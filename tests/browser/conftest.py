"""A headless Chromium with the page of the reference results in it."""

import dataclasses
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from chromium import Chromium  # noqa: E402

import browser  # noqa: E402

WHY_NOT = browser.missing(str(ROOT))
collect_ignore_glob = ["test_*.py"] if WHY_NOT else []


def pytest_report_header():
    return WHY_NOT


def draw(measurements):
    """The figures have tests of their own, and take most of the time."""
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots()
    axes.plot([m.seed for m in measurements], label="seed")
    axes.legend()
    return figure


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The folder of the page: every paper, the results of this checkout, simple figures."""
    from stiefel.atlas import build_page
    from stiefel.papers import all_papers

    papers = [dataclasses.replace(paper, figure=draw) for paper in all_papers()]
    return build_page(ROOT / "results", tmp_path_factory.mktemp("site"), papers=papers).parent


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    with Chromium(browser.chromium(), tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture
def tab(chromium):
    """A tab that must end without an error in its console, having asked for nothing but pages."""
    with chromium.tab() as opened:
        yield opened
        assert opened.errors == []
        allowed = ("file://", "data:")
        assert [url for url in opened.requests if not url.startswith(allowed)] == []
        files = {url.partition("#")[0] for url in opened.requests if url.startswith("file://")}
        assert files <= opened.visited


@pytest.fixture(scope="session")
def axe():
    return Path(browser.axe(str(ROOT))).read_text(encoding="utf-8")
