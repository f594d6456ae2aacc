"""The page on loopback, always up to date: rebuilt when results change, reloaded by the browser.

The files of the page stay as :func:`stiefel.atlas.build_page` writes them. What makes a page reload
(a script and the permission to run it) is added on the way to the browser.
"""

from __future__ import annotations

import hashlib
import logging
import mimetypes
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import cast
from urllib.parse import parse_qs, unquote, urlsplit

from stiefel.atlas.page import build_page
from stiefel.papers.paper import Paper

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
SCRIPT, EVENTS = "/-/live.js", "/-/events"
LISTENERS = 64
"""So many open pages are told of changes at a time."""
_KEEP_ALIVE = 10.0
_POLICY = re.compile(rb'(<meta http-equiv="Content-Security-Policy" content=")([^"]*)(")')


def watch(
    results: str | Path = "results",
    out: str | Path = "build/atlas",
    *,
    port: int = 0,
    papers: Sequence[Paper] | None = None,
    interval: float = 1.0,
    stop: threading.Event | None = None,
    on_start: Callable[[str], None] = lambda address: None,
    on_build: Callable[[], None] = lambda: None,
    on_problem: Callable[[Exception], None] = lambda error: None,
) -> None:
    """Build the page, serve it on loopback, and build it again whenever results change.

    Ends when ``stop`` is set or at a KeyboardInterrupt, which passes through; the server is closed
    either way.

    Args:
        results: Folder that :func:`stiefel.atlas.reproduce` writes, maybe at this moment.
        out: Folder for the page.
        port: Where to serve, 0 for any free one.
        papers: What to show; None for all of Stiefel's papers.
        interval: Seconds between two looks at the results.
        stop: Ends it from another thread.
        on_start: Called with the address once it is served.
        on_build: Called after each further build.
        on_problem: Called with what a further build failed with; the page before stays.

    Raises:
        MissingPackageError: a package that the page needs is not installed.
        OSError: the port is taken or the page cannot be written.
        ValueError: ``interval`` is not above 0, or ``port`` not from 0 to 65535.
    """
    if not interval > 0:
        raise ValueError(f"interval must be above 0 seconds, got {interval}")
    if not 0 <= port <= 65535:
        raise ValueError(f"port must be from 0 to 65535, got {port}")
    results, out, stop = Path(results), Path(out), stop or threading.Event()
    with serve(out, port) as site:
        seen = snapshot(results)
        build_page(results, out, papers=papers)
        on_start(site.address)
        while not stop.wait(interval):
            now = snapshot(results)
            if now == seen:
                continue
            seen = now
            try:
                build_page(results, out, papers=papers)
            except (OSError, ValueError) as error:  # the next change brings another try
                on_problem(error)
                continue
            site.changed()
            on_build()


def snapshot(results: Path) -> dict[str, tuple[int, int]]:
    """Time of writing (ns) and size (bytes) of every file that a page is made from."""
    found = {}
    for path in results.glob("*/*/*"):
        if path.name.startswith(".") or path.suffix not in (".json", ".txt"):
            continue
        try:
            stat = path.stat()
        except FileNotFoundError:  # replaced between the two looks
            continue
        found[str(path)] = (stat.st_mtime_ns, stat.st_size)
    return found


class Site(ThreadingHTTPServer):
    """A server of the folder ``out`` on loopback, and of the documentation beside it."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, out: Path, port: int = 0) -> None:
        super().__init__((LOOPBACK, port), _Handler)
        self.roots = {"": out.resolve(), "docs": (out.absolute().parent / "docs").resolve()}
        self.closing = False
        self._news = threading.Condition()
        self._builds = 0
        self._listeners = 0
        self.script = (resources.files("stiefel.atlas") / "templates/live.js").read_bytes()

    @property
    def address(self) -> str:
        """Where it is served."""
        return f"http://{LOOPBACK}:{self.server_port}/"

    @property
    def hosts(self) -> tuple[str, ...]:
        """What a request may call this server: a page elsewhere that points a name at loopback
        (DNS rebinding) calls it by that name.
        """
        return (f"{LOOPBACK}:{self.server_port}", f"localhost:{self.server_port}")

    def changed(self) -> None:
        """Tell every open page to look whether it is still the newest."""
        with self._news:
            self._builds += 1
            self._news.notify_all()

    def close(self) -> None:
        """Let every open page go; called from another thread than that of ``serve_forever``."""
        with self._news:
            self.closing = True
            self._news.notify_all()
        self.shutdown()
        self.server_close()

    def wait(self, builds: int, seconds: float) -> int:
        """The number of builds, once it is not ``builds`` or this time has passed."""
        with self._news:
            self._news.wait_for(lambda: self.closing or self._builds != builds, timeout=seconds)
            return self._builds

    @contextmanager
    def listener(self) -> Iterator[bool]:
        """Whether there is room for one more open page."""
        with self._news:
            room = self._listeners < LISTENERS
            self._listeners += room
        try:
            yield room
        finally:
            with self._news:
                self._listeners -= room

    def find(self, path: str) -> Path | None:
        """The file that an address (without query) stands for; None if there is none to be had.

        Only files below the served folders, by name and after following links; no hidden ones.
        """
        words = unquote(path).removeprefix("/")
        if words == "" or words.endswith("/"):
            words += "index.html"
        parts = words.split("/")
        # "" and "." and ".." and hidden names; a backslash or colon is a way out on Windows.
        if any(p == "" or p.startswith(".") or set(p) & set("\\:\0") for p in parts):
            return None
        root = self.roots[""]
        if parts[0] == "docs" and len(parts) > 1:
            root, parts = self.roots["docs"], parts[1:]
        try:
            file = root.joinpath(*parts).resolve()
            return file if file.is_relative_to(root) and file.is_file() else None
        except (OSError, ValueError):  # a name too long, say
            return None

    def page(self, path: str) -> bytes | None:
        """The file of an address as it is on disk; None if it is not there."""
        file = self.find(path)
        try:
            return None if file is None else file.read_bytes()
        except OSError:
            return None


@contextmanager
def serve(out: Path, port: int = 0) -> Iterator[Site]:
    """Serve ``out`` on loopback from a thread of its own, until the block ends.

    Raises:
        OSError: the port is taken.
    """
    site = Site(out, port)
    thread = threading.Thread(target=site.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        site.close()
        thread.join()


def live(content: bytes, path: str) -> bytes:
    """A page of ours with the script that reloads it; any other file as it is."""
    match = _POLICY.search(content)
    if match is None:
        return content
    rules = match[2].replace(b"script-src ", b"script-src 'self' ", 1)
    policy = match[1] + b"connect-src 'self'; " + rules + match[3]
    page = path.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    script = (
        f'<script src="{SCRIPT}" data-page="{page}" data-version="{version(content)}"></script>\n'
    )
    content = content[: match.start()] + policy + content[match.end() :]
    head, end, tail = content.rpartition(b"</body>")
    return head + script.encode() + end + tail


def version(content: bytes | None) -> str:
    """A name for what a page says at this moment."""
    return hashlib.sha256(content or b"").hexdigest()[:16]


class _Handler(BaseHTTPRequestHandler):
    timeout = 30.0
    server_version, sys_version = "stiefel", ""

    @property
    def site(self) -> Site:
        """The server that this answers for."""
        return cast(Site, self.server)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, format: str, *args: object) -> None:
        log.debug(format, *args)

    def _answer(self, *, body: bool) -> None:
        try:
            if self.headers.get_all("Host", []) not in [[host] for host in self.site.hosts]:
                self._send(HTTPStatus.FORBIDDEN, b"This server answers to its address only.\n")
                return
            try:
                address = urlsplit(self.path)
            except ValueError:
                self._send(HTTPStatus.BAD_REQUEST, b"Not an address.\n")
                return
            if address.path == EVENTS and body:
                self._events(parse_qs(address.query).get("page", ["/"])[0])
            elif address.path == SCRIPT:
                self._send(HTTPStatus.OK, self.site.script, "text/javascript", body)
            else:
                self._file(address.path, body)
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            self.close_connection = True  # the browser has left

    def _file(self, path: str, body: bool) -> None:
        content = self.site.page(path)
        if content is None:
            self._send(HTTPStatus.NOT_FOUND, b"Not here.\n", body=body)
            return
        kind = mimetypes.guess_type(self.site.find(path) or "")[0] or "application/octet-stream"
        if kind == "text/html":
            content = live(content, path)
        self._send(HTTPStatus.OK, content, kind, body)

    def _send(
        self, status: HTTPStatus, content: bytes, kind: str = "text/plain", body: bool = True
    ) -> None:
        self.send_response(status)
        text = kind.startswith("text/") or kind in ("application/json", "application/xml")
        self.send_header("Content-Type", f"{kind}; charset=utf-8" if text else kind)
        self.send_header("Content-Length", str(len(content)))
        self._common_headers()
        if body:
            self.wfile.write(content)

    def _common_headers(self) -> None:
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Content-Security-Policy", "frame-ancestors 'none'")
        self.end_headers()

    def _events(self, path: str) -> None:
        """Server-sent events: what the page is now, again after every build, until one leaves."""
        with self.site.listener() as room:
            if not room:
                self._send(HTTPStatus.SERVICE_UNAVAILABLE, b"Too many open pages.\n")
                return
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "text/event-stream")
            self._common_headers()
            builds = -1
            while True:
                now = self.site.wait(builds, _KEEP_ALIVE)
                if self.site.closing:
                    return
                told = f"data: {version(self.site.page(path))}\n\n" if now != builds else ":\n\n"
                builds = now
                self.wfile.write(told.encode())
                self.wfile.flush()
