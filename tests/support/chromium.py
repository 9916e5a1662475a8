"""A real Chromium without a window, driven by its DevTools protocol over a pipe."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

PATIENCE = 30.0  # seconds
_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe")
_QUIET = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")


class Browser:
    """One page, and what it asked for and complained of since it was opened."""

    def __init__(self, profile: Path) -> None:
        # The protocol wants the descriptors 3 and 4, which may be anything else here.
        pipes = [profile / "commands", profile / "events"]
        for pipe in pipes:
            os.mkfifo(pipe)
        shell = 'exec chromium "$@" 3<"$0/commands" 4>"$0/events" 2>/dev/null'
        flags = (*_FLAGS, *_QUIET, f"--user-data-dir={profile}/profile")
        self._process = subprocess.Popen(["sh", "-c", shell, profile, *flags])
        self._commands, self._events = os.open(pipes[0], os.O_WRONLY), os.open(pipes[1], os.O_RDONLY)
        self._buffer = b""
        self._last = 0
        self._session = ""
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._attach()

    def close(self) -> None:
        self._session = ""
        self.call("Browser.close")
        self._process.wait(PATIENCE)
        os.close(self._commands)
        os.close(self._events)

    def open(self, url: str, *, width: int = 1000, dark: bool = False) -> None:
        """Load a page, on a phone when `width` is small."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500
        )
        self.requests.clear()
        self.complaints.clear()
        self.call("Page.navigate", url=url)

    def evaluate(self, script: str) -> Any:
        """Return the value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, script: str) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + PATIENCE
        while not self.evaluate(script):
            assert time.monotonic() < deadline, f"waited in vain for {script}"
            time.sleep(0.05)

    def screenshot(self, path: Path) -> None:
        """Write the whole page as a PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call the protocol, and note what happened meanwhile."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._last:
            self._note(answer.get("method", ""), answer.get("params", {}))
        assert "error" not in answer, answer["error"]
        return dict(answer["result"])

    def _attach(self) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]  # the first page may come later
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            more = os.read(self._events, 1_000_000)
            assert more, "the browser went away"
            self._buffer += more
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))

    def _note(self, method: str, happened: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(happened["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(happened["exceptionDetails"].get("exception", happened)))
        elif method == "Log.entryAdded":
            self.complaints.append(happened["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(str(happened["args"]))
