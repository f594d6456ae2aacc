"""The live page: on loopback only, closed to other sites and other folders, true to the results."""

import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import fake_papers as fakes
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_page import Page
from test_result import record
from typer.testing import CliRunner

from stiefel.atlas import build_page, watch
from stiefel.atlas.watch import LISTENERS, serve, snapshot, version
from stiefel.cli import app

HIDDEN = "nobody is to read this"


def measure(folder, values, *, paper=fakes.quick, **changes):
    for seed, value in enumerate(values):
        record(seed, {"ratio": value}, paper=paper, **changes).save(folder)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A page, documentation beside it, and things around it that are nobody's business."""
    root = tmp_path_factory.mktemp("live")
    measure(root / "results", [0.5, 0.6, 0.7])
    build_page(root / "results", root / "page", papers=[fakes.quick])
    (root / "secret.html").write_text(HIDDEN)
    (root / "page/.hidden.html").write_text(HIDDEN)
    (root / "page/.git").mkdir()
    (root / "page/.git/config").write_text(HIDDEN)
    (root / "page/link.html").symlink_to(root / "secret.html")
    (root / "page/folder").symlink_to(root)
    (root / "docs/_static").mkdir(parents=True)
    (root / "docs/index.html").write_text("<body>the docs</body>")
    (root / "docs/_static/style.css").write_text("p {}")
    return root


@pytest.fixture(scope="module")
def site(built):
    with serve(built / "page") as running:
        yield running


def ask(site, path, *, method="GET", hosts=None):
    """Status, headers and body; the path goes over the wire as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", site.server_port, timeout=10)
    try:
        connection.putrequest(method, path, skip_host=True)
        for one in [f"127.0.0.1:{site.server_port}"] if hosts is None else hosts:
            connection.putheader("Host", one)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def test_it_listens_on_loopback_only(site):
    assert site.server_address[0] == "127.0.0.1"
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", site.address)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html"),
        ("/index.html?q=muon#card", "text/html"),
        ("/papers/quick.html", "text/html"),
        ("/papers/%71uick.html", "text/html"),
        ("/index.json", "application/json"),
        ("/cards/quick.md", "text/markdown"),
        ("/-/live.js", "text/javascript"),
        ("/docs/", "text/html"),
        ("/docs/_static/style.css", "text/css"),
    ],
)
def test_files_are_served_with_their_kind(site, path, kind):
    status, headers, body = ask(site, path)
    assert status == 200
    assert headers["Content-Type"] == f"{kind}; charset=utf-8"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert headers["Content-Security-Policy"] == "frame-ancestors 'none'"
    assert "Access-Control-Allow-Origin" not in headers
    assert int(headers["Content-Length"]) == len(body) > 0
    status, headers, nothing = ask(site, path, method="HEAD")
    assert (status, int(headers["Content-Length"]), nothing) == (200, len(body), b"")


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.html",
        "/papers/../../secret.html",
        "/%2e%2e/secret.html",
        "/..%2fsecret.html",
        "/%2e%2e%2fsecret.html",
        "/papers/..%5c..%5csecret.html",
        "/%252e%252e/secret.html",
        "/docs/../secret.html",
        "/docs/%2e%2e/secret.html",
        "/docs/..",
        "//secret.html",
        "/./index.html",
        "/.hidden.html",
        "/.git/config",
        "/link.html",
        "/folder/secret.html",
        "/index.html%00.png",
        "/" + "a" * 5000,
        "/papers",
        "/papers/",
        "/docs",
        "/nothing.html",
        "/-/events/",
        "/C:/secret.html",
        "file:///etc/hostname",
        "http://example.org/../secret.html",
        "http://[/",
    ],
)
def test_there_is_no_way_out_of_the_page(site, path):
    status, _, body = ask(site, path)
    assert status in (400, 404)
    assert HIDDEN.encode() not in body


@given(
    st.lists(
        st.sampled_from(
            ["..", ".", "", "%2e%2e", "%2f", "/", "\\", "%5c", "page", "papers", "docs", ":",
             "secret.html", "folder", "link.html", "index.html", "%00", "~", "root"]
        ),
        max_size=6,
    )
)  # fmt: skip
def test_no_path_leads_out(site, parts):
    for join in ("/", ""):
        found = site.find("/" + join.join(parts))
        if found is not None:
            assert any(found.is_relative_to(root) for root in site.roots.values())
            assert HIDDEN not in found.read_text()


@pytest.mark.parametrize(
    "hosts",
    [
        ["evil.example.org"],
        ["evil.example.org:{port}"],
        ["127.0.0.1"],
        ["127.0.0.1:1"],
        ["127.0.0.1:{port}"] * 2,
        [],
    ],
)
def test_another_host_name_is_refused(site, hosts):
    """A page elsewhere that lets its name point at loopback (DNS rebinding) reads nothing."""
    names = [name.format(port=site.server_port) for name in hosts]
    for path in ("/", "/-/events?page=/", "/-/live.js"):
        status, _, body = ask(site, path, hosts=names)
        assert status == 403
        assert body == b"This server answers to its address only.\n"


def test_localhost_is_a_name_of_it(site):
    assert ask(site, "/", hosts=[f"localhost:{site.server_port}"])[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT"])
def test_other_methods_are_refused(site, method):
    assert ask(site, "/", method=method)[0] == 501


def test_policy_allows_the_script_that_reloads_and_files_stay_as_built(site, built):
    before = (built / "page/papers/quick.html").read_bytes()
    served = Page(ask(site, "/papers/quick.html")[2].decode())
    on_disk = Page(before.decode())

    def rules(page):
        (policy,) = [
            a["content"]
            for tag, a in page.tags
            if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
        ]
        return dict(rule.strip().split(" ", 1) for rule in policy.split(";"))

    want = rules(on_disk)
    want["script-src"] = "'self' " + want["script-src"]
    want["connect-src"] = "'self'"
    assert rules(served) == want
    scripts = [a for tag, a in served.tags if tag == "script" and "src" in a]
    assert scripts == [
        {
            "src": "/-/live.js",
            "data-page": "/papers/quick.html",
            "data-version": version(before),
        }
    ]
    assert served.words == on_disk.words
    assert (built / "page/papers/quick.html").read_bytes() == before
    assert b"/-/" not in before
    assert ask(site, "/docs/")[2] == b"<body>the docs</body>"


def test_script_is_javascript(tmp_path, site):
    body = ask(site, "/-/live.js")[2]
    assert b"EventSource" in body
    node = shutil.which("node")
    if node:
        (tmp_path / "live.js").write_bytes(body)
        subprocess.run([node, "--check", str(tmp_path / "live.js")], check=True)


class Events:
    """A browser's EventSource on one page."""

    def __init__(self, site, page):
        self.connection = http.client.HTTPConnection("127.0.0.1", site.server_port, timeout=10)
        self.connection.request("GET", f"/-/events?page={page}")
        self.answer = self.connection.getresponse()

    def next(self):
        """What the next event says."""
        while True:
            line = self.answer.readline().decode()
            if not line or line.startswith("data: "):
                return line.removeprefix("data: ").strip()

    def close(self):
        self.answer.close()
        self.connection.close()


def test_events_tell_what_a_page_is_now(built):
    with serve(built / "page") as site:
        index, article = Events(site, "/"), Events(site, "/papers/quick.html")
        assert index.answer.headers["Content-Type"] == "text/event-stream"
        old = version((built / "page/index.html").read_bytes())
        kept = version((built / "page/papers/quick.html").read_bytes())
        assert index.next() == old
        assert article.next() == kept
        text = (built / "page/index.html").read_text()
        (built / "page/index.html").write_text(text + "\n")
        site.changed()
        assert index.next() == version((text + "\n").encode()) != old
        assert article.next() == kept  # the browser stays where it is
        (built / "page/index.html").write_text(text)
    assert index.next() == ""  # the server has let go
    index.close()
    article.close()


def test_a_version_is_that_of_the_page_it_came_with(site):
    body = ask(site, "/")[2].decode()
    events = Events(site, "/")
    assert f'data-version="{events.next()}"' in body
    events.close()


def test_too_many_open_pages_are_refused_and_leaving_makes_room(built):
    with serve(built / "page") as site:
        pages = [Events(site, "/") for _ in range(LISTENERS)]
        assert all(page.next() for page in pages)
        assert ask(site, "/-/events?page=/")[0] == 503
        assert ask(site, "/")[0] == 200
        pages[0].close()
        end = time.monotonic() + 10
        while site._listeners == LISTENERS:
            site.changed()  # writing to a closed connection is how the server learns of it
            assert time.monotonic() < end
            time.sleep(0.02)
        again = Events(site, "/")
        assert again.answer.status == 200
        for page in [*pages[1:], again]:
            page.close()


def test_a_client_that_sends_nothing_blocks_nobody(site):
    with socket.create_connection(("127.0.0.1", site.server_port)):
        assert ask(site, "/")[0] == 200


# The loop


@contextmanager
def watching(root, **options):
    """``watch`` in a thread; gives the address, and a list that grows with each build."""
    stop, ready, told, problems = threading.Event(), threading.Event(), [], []

    def started(address):
        told.append(address)
        ready.set()

    def run():
        watch.watch(
            root / "results", root / "page", papers=[fakes.quick], interval=0.02, stop=stop,
            on_start=started, on_build=lambda: told.append("built"), on_problem=problems.append,
            **options,
        )  # fmt: skip

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert ready.wait(60)
        yield told, problems
    finally:
        stop.set()
        thread.join(20)
    assert not thread.is_alive()


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


class _Address:
    def __init__(self, address):
        self.server_port = int(address.rstrip("/").rpartition(":")[2])


def test_results_that_change_change_the_page_and_its_visitors_are_told(tmp_path):
    with watching(tmp_path) as (told, _):
        site = _Address(told[0])
        assert b"not run yet" in ask(site, "/papers/quick.html")[2]
        events = Events(site, "/papers/quick.html")
        before = events.next()
        measure(tmp_path / "results", [0.5, 0.6, 0.7])
        after = before
        while after == before or b"0.3516 to 0.8484" not in ask(site, "/papers/quick.html")[2]:
            after = events.next()  # as the seeds come in, one build or several
        assert after != before
        assert "built" in told
        events.close()
        wait_for(lambda: watch.snapshot(tmp_path / "results"))
        count = len(told)
        time.sleep(0.2)  # nothing changes: nothing is built
        assert len(told) <= count + 1
        count = len(told)
        time.sleep(0.2)
        assert len(told) == count
    with pytest.raises(ConnectionRefusedError):
        ask(site, "/")


def test_a_build_that_fails_leaves_the_page_before_and_is_told(tmp_path, monkeypatch):
    with watching(tmp_path) as (told, problems):
        site = _Address(told[0])
        good = watch.build_page

        def broken(*arguments, **options):
            raise OSError("disk full")

        monkeypatch.setattr(watch, "build_page", broken)
        measure(tmp_path / "results", [0.5])
        wait_for(lambda: problems)
        assert str(problems[0]) == "disk full"
        assert ask(site, "/")[0] == 200
        assert told[1:] == []
        monkeypatch.setattr(watch, "build_page", good)
        measure(tmp_path / "results", [0.5, 0.6])
        wait_for(lambda: len(told) > 1)


def test_snapshot_sees_results_errors_and_histories_only(tmp_path):
    assert snapshot(tmp_path / "none") == {}
    folder = tmp_path / "quick/laptop"
    folder.mkdir(parents=True)
    for name in ("0.json", "1.error.txt", "history.json", ".0.json.x.tmp", "x.lock"):
        (folder / name).write_text("1")
    (tmp_path / "top.json").write_text("1")
    seen = snapshot(tmp_path)
    assert sorted(Path(p).name for p in seen) == ["0.json", "1.error.txt", "history.json"]
    os.utime(folder / "0.json", ns=(1, 1))
    assert snapshot(tmp_path) != seen
    (folder / "0.json").unlink()
    assert len(snapshot(tmp_path)) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [({"interval": 0.0}, "interval"), ({"port": -1}, "port"), ({"port": 65536}, "port")],
)
def test_bad_arguments_are_named(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        watch.watch(tmp_path, tmp_path / "page", **options)


# The command


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_it_is_interrupted(tmp_path, number):
    """With no paper but a fake one, in a process of its own."""
    code = (
        "import sys; import stiefel.atlas.page as page; import fake_papers as fakes\n"
        "page.all_papers = lambda: (fakes.quick,)\n"
        "from stiefel.cli import main; main(sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-uc", code, "atlas", "--watch", "--results", "r", "--out", "page"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(fakes.__file__).parent)},
    )  # fmt: skip
    try:
        first = process.stdout.readline()
        site = _Address(re.fullmatch(r"Page: (http://127\.0\.0\.1:\d+/) \(.*\)\n", first)[1])
        events = Events(site, "/")
        assert events.next()
        measure(tmp_path / "r", [0.5, 0.6, 0.7])
        assert process.stdout.readline() == "Results changed: page rebuilt.\n"
        process.send_signal(number)
        said, errors = process.communicate(timeout=30)
        events.close()
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, errors) == (0, "")
    assert said.splitlines()[-1] == "Stopped."


def call(*arguments):
    result = CliRunner().invoke(app, ["atlas", *map(str, arguments)])
    return result.exit_code, " ".join(re.sub("[│╭╰─╮╯]", " ", result.output).split())


def test_a_taken_port_is_one_sentence(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, said = call("--watch", "--port", port, "--out", tmp_path / "page")
    assert status == 2
    assert f"on port {port}: " in said
    assert not (tmp_path / "page").exists()  # found before the work


def test_a_port_without_watch_is_refused(tmp_path):
    status, said = call("--port", 8000, "--out", tmp_path / "page")
    assert status == 2
    assert "only with --watch" in said
    assert call("--watch", "--port", 70000)[0] == 2
