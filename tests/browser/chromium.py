"""Just enough of Chromium's DevTools protocol, over a pipe: no driver, no port, no package."""

import contextlib
import fcntl
import json
import os
import select
import subprocess
import sys
import time

# Chromium reads commands from file descriptor 3 and writes to 4.
START = (
    "import os, sys; r, w = map(int, sys.argv[1:3]); os.dup2(r, 3); os.dup2(w, 4); "
    "os.closerange(5, 64); os.execv(sys.argv[3], sys.argv[3:])"
)
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--no-first-run", "--disable-extensions", "--disable-sync", "--disable-component-update"),
    *("--disable-background-networking", "--disable-default-apps", "--hide-scrollbars"),
    *("--remote-debugging-pipe", "--mute-audio", "--disable-features=Translate,MediaRouter"),
)
KEYS = {
    "/": {"code": "Slash", "text": "/", "windowsVirtualKeyCode": 191},
    "Enter": {"code": "Enter", "text": "\r", "windowsVirtualKeyCode": 13},
    "Tab": {"code": "Tab", "windowsVirtualKeyCode": 9},
    "Escape": {"code": "Escape", "windowsVirtualKeyCode": 27},
    **{
        f"Arrow{side}": {"code": f"Arrow{side}", "windowsVirtualKeyCode": 37 + i}
        for i, side in enumerate(("Left", "Up", "Right", "Down"))
    },
}
PATIENCE = 30


class Chromium:
    """A browser of its own profile, ended with the block."""

    def __init__(self, path, profile):
        self._path, self._profile = path, profile
        self._next, self._rest, self._answers, self._tabs = 0, b"", {}, {}

    def __enter__(self):
        # Above 10, so that neither stands where the other has to go.
        ours, theirs = [], []
        for end in (0, 1):
            pipe = os.pipe()
            high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 64) for fd in pipe]
            for fd in pipe:
                os.close(fd)
            theirs.append(high[end])
            ours.append(high[1 - end])
        for fd in theirs:
            os.set_inheritable(fd, True)
        command = [sys.executable, "-S", "-c", START, *map(str, theirs), self._path]
        self._process = subprocess.Popen(
            [*command, *FLAGS, f"--user-data-dir={self._profile}", "about:blank"],
            pass_fds=theirs,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": str(self._profile)},
        )
        for fd in theirs:
            os.close(fd)
        self._write, self._read = ours
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError, TimeoutError):
            self.call("Browser.close")
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def call(self, method, session=None, **parameters):
        """Send a command and wait for its result."""
        self._next += 1
        number = self._next
        message = {"id": number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        self.read_until(lambda: number in self._answers, method)
        answer = self._answers.pop(number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def read_until(self, condition, what):
        """Take in messages until ``condition()`` holds."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if not select.select([self._read], [], [], max(deadline - time.monotonic(), 0))[0]:
                raise TimeoutError(f"{what} took more than {PATIENCE} s")
            chunk = os.read(self._read, 1 << 20)
            if not chunk:
                raise OSError(f"Chromium ended during {what}")
            *messages, self._rest = (self._rest + chunk).split(b"\0")
            for message in map(json.loads, messages):
                if "id" in message:
                    self._answers[message["id"]] = message
                elif message.get("sessionId") in self._tabs:
                    self._tabs[message["sessionId"]].event(message["method"], message["params"])

    @contextlib.contextmanager
    def tab(self):
        """A fresh tab in a context of its own: no storage is left from another."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)
        target = target["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call(
            "Browser.grantPermissions",
            permissions=["clipboardReadWrite", "clipboardSanitizedWrite"],
            browserContextId=context,
        )
        tab = self._tabs[session] = Tab(self, session)
        tab.start()
        try:
            yield tab
        finally:
            del self._tabs[session]
            self.call("Target.disposeBrowserContext", browserContextId=context)


class Tab:
    """One page, driven as a person drives it."""

    def __init__(self, browser, session):
        self._browser, self._session = browser, session
        self.errors, self.visited = [], set()
        self._asked = {}
        self._loads = 0

    def call(self, method, **parameters):
        return self._browser.call(method, self._session, **parameters)

    def start(self):
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)
        self.look()

    def event(self, method, content):
        if method == "Page.loadEventFired":
            self._loads += 1
        elif method == "Network.requestWillBeSent":
            self._asked[content["requestId"]] = content["request"]["url"]
        elif method == "Network.loadingFailed" and content.get("blockedReason") == "csp":
            self._asked.pop(content["requestId"], None)  # told of, but never sent
        elif method == "Runtime.exceptionThrown":
            details = content["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and content["type"] in ("error", "warning"):
            self.errors.append(str([a.get("value") for a in content["args"]]))
        elif method == "Log.entryAdded" and content["entry"]["level"] in ("error", "warning"):
            self.errors.append(content["entry"]["text"])

    @property
    def requests(self):
        """Addresses that were asked for."""
        return list(self._asked.values())

    def look(self, width=1280, height=900, *, scheme="light", media="", scripts=True):
        """What the reader has: size of the window, theme of the system, paper or screen."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)

    def go(self, path, fragment=""):
        """Open a file; a page that is there already is loaded again."""
        url = path.absolute().as_uri()
        self.visited.add(url)
        self.call("Page.navigate", url="about:blank")
        loads = self._loads
        self.call("Page.navigate", url=url + fragment)
        self._browser.read_until(lambda: self._loads > loads, url)
        self.wait(f"location.href.startsWith({json.dumps(url)}) && document.readyState", "complete")

    def js(self, expression):
        """The value of an expression in the page; promises are waited for."""
        answer = self.call(
            "Runtime.evaluate",
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression[:200]}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, expression, value):
        """Until ``expression`` is ``value``."""
        deadline = time.monotonic() + 10
        while True:
            try:
                found = self.js(expression)
            except RuntimeError as error:  # asked of a page that was just being left
                if "navigated" not in str(error) and "context" not in str(error):
                    raise
                found = error
            if found == value:
                return
            if time.monotonic() > deadline:
                raise AssertionError(f"{expression} is {found!r}, not {value!r}")
            time.sleep(0.02)

    def press(self, *keys):
        for key in keys:
            parts = {"key": key, **KEYS[key]}
            kind = "keyDown" if "text" in parts else "rawKeyDown"
            self.call("Input.dispatchKeyEvent", type=kind, **parts)
            parts.pop("text", None)
            self.call("Input.dispatchKeyEvent", type="keyUp", **parts)

    def type(self, text):
        for letter in text:
            self.call("Input.insertText", text=letter)

    def click(self, selector):
        """The left mouse button in the middle of the first such element."""
        x, y = self.js(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); "
            "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect(); "
            "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        at = {"x": x, "y": y, "button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type="mousePressed", **at)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", **at)

    def choose(self, selector, value):
        """An option of a ``<select>``, as its list does it."""
        self.js(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); "
            f"e.value = {json.dumps(value)}; "
            "e.dispatchEvent(new Event('input', {bubbles: true})); })()"
        )
