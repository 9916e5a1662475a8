"""A headless Chromium, driven by the DevTools protocol over a pipe."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

TIMEOUT = 30.0  # seconds
_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe")
_QUIET = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")


class Browser:
    """A browser with one page. Records the requests, errors and console messages of the page since it was opened."""

    def __init__(self, profile: Path) -> None:
        # The protocol uses the descriptors 3 and 4, which are not free in this process.
        pipes = [profile / "commands", profile / "events"]
        for pipe in pipes:
            os.mkfifo(pipe)
        shell = 'exec chromium "$@" 3<"$0/commands" 4>"$0/events" 2>/dev/null'
        flags = (*_FLAGS, *_QUIET, f"--user-data-dir={profile}/profile")
        self._process = subprocess.Popen(["sh", "-c", shell, profile, *flags])
        self._commands = os.open(pipes[0], os.O_WRONLY)
        self._events = os.open(pipes[1], os.O_RDONLY)
        self._buffer = b""
        self._last_id = 0
        self._session = ""
        self.requests: list[str] = []
        self.errors: list[str] = []
        self._attach()

    def close(self) -> None:
        self._session = ""
        self.call("Browser.close")
        self._process.wait(TIMEOUT)
        os.close(self._commands)
        os.close(self._events)

    def open(self, url: str, *, width: int = 1000, dark: bool = False) -> None:
        """Load a page, as a phone if `width` is below 500."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500
        )
        self.requests.clear()
        self.errors.clear()
        self.call("Page.navigate", url=url)

    def evaluate(self, script: str) -> Any:
        """Return the value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, script: str) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + TIMEOUT
        while not self.evaluate(script):
            assert time.monotonic() < deadline, f"timed out waiting for {script}"
            time.sleep(0.05)

    def screenshot(self, path: Path) -> None:
        """Write a PNG of the whole page."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol, and record the events before its response."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (response := self._next()).get("id") != self._last_id:
            self._record(response.get("method", ""), response.get("params", {}))
        assert "error" not in response, response["error"]
        return dict(response["result"])

    def _attach(self) -> None:
        target = self.call("Target.createTarget", url="about:blank")[
            "targetId"
        ]  # the browser's first page can appear later
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            more = os.read(self._events, 1_000_000)
            assert more, "the browser has ended"
            self._buffer += more
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))

    def _record(self, method: str, event: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(event["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(str(event["exceptionDetails"].get("exception", event)))
        elif method == "Log.entryAdded":
            self.errors.append(event["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.errors.append(str(event["args"]))
