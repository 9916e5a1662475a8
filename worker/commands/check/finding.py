"""What `klaviyo-worker check` found, in words: why something cannot work, and what to do."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

import orjson

from worker.json_access import printable

Status = Literal["ok", "failed", "skipped"]
_SHOWN: dict[Status, str] = {"ok": "OK", "failed": "FAIL", "skipped": "SKIP"}
# Errors say why, then what to do: `QUEUE_URL: x does not exist: create it, or correct the name`.
_VERBS = "add|ask|aws|check|correct|create|expected|gcloud|grant|klaviyo-worker|leave|pip|probe|set|use|wait|write"
_TODO = re.compile(rf": (?=(?:{_VERBS})\b)")


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found. `exit_code` counts where it failed, and so does `todo`: what to do."""

    check: str
    status: Status
    text: str
    todo: str = ""
    exit_code: int = 0
    details: dict[str, str] = field(default_factory=dict)

    def line(self) -> str:
        """Return it for people."""
        text = f"{self.text} → {self.todo}" if self.todo else self.text
        return f"{_SHOWN[self.status]:<8}{self.check:<15}{printable(text)}"

    def json(self) -> bytes:
        """Return it for scripts: `text` says it all, `why` and `todo` are its parts."""
        about: dict[str, str] = {"check": self.check, "status": self.status, "text": self.text}
        if self.todo:
            about |= {"text": f"{self.text}: {self.todo}", "why": self.text, "todo": self.todo}
        return orjson.dumps(about | self.details)


def failed(check: str, exit_code: int, *texts: str, otherwise: str, details: dict[str, str] | None = None) -> Finding:
    """Return a failure for the texts of errors; `otherwise` is what to do where they do not say."""
    parts = [_parted(text) for text in texts]
    todo = "; ".join(dict.fromkeys(todo for _, todo in parts if todo)) or otherwise
    return Finding(check, "failed", "; ".join(why for why, _ in parts), todo, exit_code, details or {})


def _parted(text: str) -> tuple[str, str]:
    """Return why, and what to do; "" when the text does not say."""
    found = _TODO.search(text)
    return (text[: found.start()], text[found.end() :]) if found else (text, "")
