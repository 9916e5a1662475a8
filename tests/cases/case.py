"""The inputs of a case, read from its folder."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from worker.sandbox import Fault

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from worker.model import Json

PROJECT = "acme-shop"
SPEED = 10.0  # how many seconds of the worker and of a case pass in a second
_NOW = re.compile(r'"@now(-\d+)?"')
_SETTINGS: dict[str, str | None] = {
    "PREFERRED_LOCALE": "en",
    "PREFERRED_CURRENCY": "EUR",
    "KLAVIYO_WORKER_LOG_FORMAT": "json",
    "KLAVIYO_WORKER_RETRY_TIMEOUT": "0.5",
    "KLAVIYO_WORKER_LANES": "1",
}


@dataclass(frozen=True, slots=True)
class Step:
    """The changes at the start of a run. None: as before.

    `later`: what commercetools shows from the second reading of these collections on. `hidden`: resources that it does
    not show for a while, and for how many seconds. `faults`: by service; they end with the run.
    """

    commercetools: Json | None
    later: Json | None
    hidden: dict[str, float]
    faults: dict[str, list[Fault]]
    bodies: list[bytes]


@dataclass(frozen=True, slots=True)
class Case:
    """A folder with inputs. tests/README.md describes the files."""

    folder: Path

    @property
    def klaviyo(self) -> Json:
        """Return what the account has before the first run."""
        return self._read("klaviyo.json") or {}

    @property
    def account(self) -> Json:
        """Return how the account behaves."""
        return self._read("account.json") or {}

    @property
    def settings(self) -> dict[str, str | None]:
        """Return the environment variables."""
        mapping = self.folder / "mapping.toml"
        config = {"KLAVIYO_WORKER_CONFIG": str(mapping)} if mapping.exists() else {}
        return _SETTINGS | config | (self._read("env.json") or {})

    @property
    def expected(self) -> Json | None:
        """Return the reviewed result, or None if there is none yet."""
        expected: Json | None = self._read("expected.json")
        return expected

    def steps(self) -> Iterator[Step]:
        """Yield one step per run."""
        number, suffix = 1, ""
        while any(self.folder.glob(f"*{suffix}.*json")) if suffix else number == 1:
            faults = self._read(f"faults{suffix}.json") or {}
            hide = faults.pop("hide", None) or {}
            yield Step(
                self._read(f"commercetools{suffix}.json"),
                self._read(f"commercetools{suffix}_later.json"),
                dict.fromkeys(hide.get("ids", ()), hide.get("for_s", 0.0) / SPEED),
                {service: [_fault(each) for each in given] for service, given in faults.items() if given},
                self._bodies(suffix),
            )
            number += 1
            suffix = f"_{number}"

    def _bodies(self, suffix: str) -> list[bytes]:
        lines = self._text(f"notifications{suffix}.ndjson").splitlines()
        single = self._text(f"notification{suffix}.json")
        return [line.encode() for line in [*lines, single] if line.strip()]

    def _read(self, name: str) -> Any:
        text = self._text(name)
        return json.loads(text) if text else None

    def _text(self, name: str) -> str:
        path = self.folder / name
        return _NOW.sub(_moment, path.read_text(encoding="utf-8")) if path.exists() else ""


def _moment(match: re.Match[str]) -> str:
    moment = datetime.now(UTC) + timedelta(seconds=int(match[1] or 0))
    return f'"{moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")}"'


def _fault(given: Json) -> Fault:
    """Return a fault of the sandbox. The answer is the JSON of `body` or the page of `html`."""
    page, document = given.get("html"), given.get("body")
    body = page.encode() if page else json.dumps(document).encode() if document is not None else None
    headers = {"Content-Type": "text/html"} if page else {}
    return Fault(
        given["status"],
        given.get("count"),
        given.get("match", ""),
        given.get("match_body", "").encode(),
        headers=headers | given.get("headers", {}),
        body=body,
    )
