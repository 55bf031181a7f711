"""A real headless Chromium for tests, driven over its DevTools protocol; tests are skipped where there is none."""

import base64
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import pytest
from websockets.sync.client import connect

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars"),
    "--disable-features=IsolateSandboxedIframes",  # a frame in a process of its own is not in its page's tree
    *("--remote-debugging-port=0", "--remote-allow-origins=*", "--force-color-profile=srgb"),
)
START_TIMEOUT_S, WAIT_TIMEOUT_S = 120.0, 120.0
PAUSE_S, SETTLE_S = 0.05, 0.2

PROGRAM = next((found for found in map(shutil.which, PROGRAMS) if found), None)
needs_browser = pytest.mark.skipif(
    PROGRAM is None,
    reason="no Chromium here (Debian: apt-get install chromium fonts-dejavu); the pages are not looked at",
)


class Browser:
    """One tab of one browser process with a profile of its own."""

    def __init__(self, *, width: int = 1440, height: int = 900, flags: tuple[str, ...] = ()) -> None:
        self.size = (width, height)
        self._flags = flags
        self._number = 0
        self._session: str | None = None
        self._open = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as opening:  # what was opened is closed again when the rest fails
            self._start(opening)
            self._open = opening.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def _start(self, opening: ExitStack) -> None:
        assert PROGRAM is not None
        folder = tempfile.TemporaryDirectory(prefix="trailmark-browser-", ignore_cleanup_errors=True)
        profile = Path(opening.enter_context(folder))
        width, height = self.size
        command = [PROGRAM, *FLAGS, *self._flags, f"--user-data-dir={profile}", f"--window-size={width},{height}"]
        process = subprocess.Popen([*command, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        opening.callback(process.wait, timeout=30)
        opening.callback(process.terminate)
        port_file = profile / "DevToolsActivePort"
        _wait(lambda: port_file.is_file() and "\n" in port_file.read_text(), START_TIMEOUT_S, "the browser to start")
        port, path = port_file.read_text().split("\n")[:2]
        address = f"ws://127.0.0.1:{port}{path}"
        self._socket = opening.enter_context(connect(address, max_size=None, open_timeout=START_TIMEOUT_S, proxy=None))
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def open(self, url: str) -> None:
        """Go to `url` and wait until it is loaded."""
        self.call("Page.navigate", url=url)
        self.wait(f"document.readyState === 'complete' && location.href !== 'about:blank' && {json.dumps(url)} !== ''")

    def evaluate(self, script: str) -> Any:
        """Return the value of a JavaScript expression in the page (a promise's, when it is one)."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise AssertionError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, script: str, *, timeout_s: float = WAIT_TIMEOUT_S) -> None:
        """Wait until the expression is true; a page that is just changing counts as not yet."""

        def holds() -> bool:
            answer = self.call("Runtime.evaluate", expression=f"Boolean({script})", returnByValue=True)
            return bool(answer.get("result", {}).get("value"))

        _wait(holds, timeout_s, script)

    def click(self, script: str) -> None:
        """Click, with the mouse, the middle of the element that the expression yields, once it is there and still."""
        self.wait(script)
        middle = (
            f"(() => {{ const element = {script}; element.scrollIntoView({{block: 'nearest'}});"
            " const box = element.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        box, before = self.evaluate(middle), None
        while box != before:  # it may still be sliding in
            time.sleep(SETTLE_S)
            box, before = self.evaluate(middle), box
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def in_frame(self, script: str, needle: str) -> Any:
        """Return the value of an expression in whichever frame has the element `needle`, or None."""
        tree = self.call("Page.getFrameTree")["frameTree"]
        queue = [tree]
        while queue:
            frame = queue.pop()
            queue.extend(frame.get("childFrames", []))
            world = self.call("Page.createIsolatedWorld", frameId=frame["frame"]["id"])["executionContextId"]
            found = self.call(
                "Runtime.evaluate",
                expression=f"document.querySelector({json.dumps(needle)}) ? ({script}) : null",
                returnByValue=True,
                contextId=world,
            )
            value = found.get("result", {}).get("value")
            if value is not None:
                return value
        return None

    def screenshot(self, path: Path) -> None:
        """Write what the tab shows as a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the tab's DevTools protocol."""
        return self._send(method, session=self._session, **params)

    def _send(self, method: str, *, session: str | None = None, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {
            "id": self._number,
            "method": method,
            "params": params,
            **({"sessionId": session} if session else {}),
        }
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv(timeout=WAIT_TIMEOUT_S))
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise AssertionError(f"{method}: {answer['error']}")
                return dict(answer["result"])


def _wait(holds: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s:.0f} s for {what}")
        time.sleep(PAUSE_S)
