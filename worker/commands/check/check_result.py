"""What `klaviyo-worker check` found, in words: why something cannot work, and what to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import orjson

from worker.json_access import printable

Status = Literal["ok", "failed", "skipped"]
_SHOWN: dict[Status, str] = {"ok": "OK", "failed": "FAIL", "skipped": "SKIP"}


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


class Problem(Protocol):
    """An error or a warning with structured advice."""

    @property
    def reason(self) -> str:
        """Return what is wrong."""

    @property
    def todo(self) -> str:
        """Return what to do about it; "" if there is no advice."""


def failed(check: str, exit_code: int, *problems: Problem, otherwise: str) -> Finding:
    """Return a failed check. `otherwise` is what to do if no problem has advice of its own."""
    todo = "; ".join(dict.fromkeys(problem.todo for problem in problems if problem.todo)) or otherwise
    return Finding(check, "failed", "; ".join(problem.reason for problem in problems), todo, exit_code)
