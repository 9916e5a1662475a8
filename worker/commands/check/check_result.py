"""The result of a check, as text and as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import orjson

from worker.json_access import printable

Status = Literal["ok", "failed", "skipped"]
_LABELS: dict[Status, str] = {"ok": "OK", "failed": "FAIL", "skipped": "SKIP"}


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of one check. `todo` says what to do about a failure; `exit_code` is 0 unless the check failed."""

    check: str
    status: Status
    text: str
    todo: str = ""
    exit_code: int = 0
    details: dict[str, str] = field(default_factory=dict)

    def line(self) -> str:
        """Return the result as a line for people."""
        text = f"{self.text} → {self.todo}" if self.todo else self.text
        return f"{_LABELS[self.status]:<8}{self.check:<15}{printable(text)}"

    def json(self) -> bytes:
        """Return the result as a line of JSON for scripts. `text` joins `why` and `todo`."""
        document: dict[str, str] = {"check": self.check, "status": self.status, "text": self.text}
        if self.todo:
            document |= {"text": f"{self.text}: {self.todo}", "why": self.text, "todo": self.todo}
        return orjson.dumps(document | self.details)


class Problem(Protocol):
    """An error or a warning with structured advice."""

    @property
    def reason(self) -> str:
        """Return what is wrong."""

    @property
    def todo(self) -> str:
        """Return what to do about it; "" if there is no advice."""


def make_failure(check: str, exit_code: int, *problems: Problem, default_todo: str) -> CheckResult:
    """Return a failed check. `default_todo` is the advice if no problem has its own."""
    todo = "; ".join(dict.fromkeys(problem.todo for problem in problems if problem.todo)) or default_todo
    return CheckResult(check, "failed", "; ".join(problem.reason for problem in problems), todo, exit_code)
