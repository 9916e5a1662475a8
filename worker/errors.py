"""Every error the worker raises, and what becomes of the message it befalls.

WorkerError          nack       could not be done, and repeating it here would not help: a defect
├── Transient        hold       could not be done now
│   ├── Throttled               the other side asks for fewer requests
│   ├── StaleWrite                done, but so late that it has to be compared with what is true now
│   └── CircuitOpen                  the other side has not answered for a while
├── Rejected         dead letter  can never succeed
└── Misconfigured    park       nobody's message is at fault: credentials, scopes, project
    ├── CommercetoolsMisconfigured   exit code 4
    └── KlaviyoMisconfigured         exit code 5
Ignored              ack        nothing to do: a result, not an error
SettingsError        exit code 2

Texts are for operators and go to logs and dead letters: no personal data, no secrets.
"""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class Disposition(Enum):
    """What becomes of a delivery: three endings, and two reasons to keep it and try again."""

    ACK = "ack"
    NACK = "nack"
    DEAD_LETTER = "dead_letter"
    HOLD = "hold"  # something is out for the moment; goes back to the queue when that lasts too long
    PARK = "park"  # the worker is not allowed to work; kept until it is


HELD = frozenset({Disposition.HOLD, Disposition.PARK})


class ExitCode(IntEnum):
    """The exit codes of every command: one for each kind of failure that an operator acts on."""

    OK = 0
    UNEXPECTED = 1
    USAGE = 2
    QUEUE = 3
    COMMERCETOOLS = 4
    KLAVIYO = 5
    SHUTDOWN_TIMED_OUT = 6
    INTERRUPTED = 7


class WorkerError(Exception):
    """A message could not be handled; `disposition` says what becomes of it.

    `reason` says what is wrong, `todo` what to do about it ("" if there is no advice). The text joins both.
    """

    disposition = Disposition.NACK

    def __init__(self, reason: str, *, todo: str = "") -> None:
        super().__init__(f"{reason}: {todo}" if todo else reason)
        self.reason = reason
        self.todo = todo


class Transient(WorkerError):
    """Could not be done now: outage, throttling, timeout. `retry_after`: seconds until it is worth another try."""

    disposition = Disposition.HOLD

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class Throttled(Transient):
    """The other side asks for fewer requests (429). It is up."""


class StaleWrite(Transient):
    """Was done, but so long after commercetools was read that somebody may have written a newer state before."""


class CircuitOpen(Transient):
    """The other side has failed for a while. Calls are held back until one that is let through succeeds."""


class Rejected(WorkerError):
    """Can never succeed: unreadable, or refused for what this record holds.

    `status` is the HTTP status of a refusal; `duplicate_id` the profile Klaviyo names in a 409; `pointer` the
    JSON pointer to what is wrong with the request, "" when Klaviyo names nothing.
    """

    disposition = Disposition.DEAD_LETTER

    def __init__(self, reason: str, status: int | None = None, duplicate_id: str = "", pointer: str = "") -> None:
        super().__init__(reason)
        self.status = status
        self.duplicate_id = duplicate_id
        self.pointer = pointer


class Misconfigured(WorkerError):
    """The worker itself is not allowed or not able: no message is at fault.

    `retry_after`: seconds until it is asked again whether that has changed. `lacks_scope`: a missing scope can
    be the cause.
    """

    disposition = Disposition.PARK
    exit_code: ExitCode = ExitCode.UNEXPECTED

    def __init__(
        self, reason: str, retry_after: float | None = None, *, todo: str = "", lacks_scope: bool = False
    ) -> None:
        super().__init__(reason, todo=todo)
        self.retry_after = retry_after
        self.lacks_scope = lacks_scope


class CommercetoolsMisconfigured(Misconfigured):
    """commercetools refuses the credentials, the scope or the project."""

    exit_code = ExitCode.COMMERCETOOLS


class KlaviyoMisconfigured(Misconfigured):
    """Klaviyo refuses the key or its scopes."""

    exit_code = ExitCode.KLAVIYO


class Ignored(Exception):
    """There is nothing to do for this message; the text says why."""


class SettingsError(Exception):
    """Settings are missing or malformed. The text has a line for each of `problems`."""

    def __init__(self, reason: str, *, todo: str = "", problems: Sequence[SettingsError] = ()) -> None:
        super().__init__(f"{reason}: {todo}" if todo else reason)
        self.reason = reason
        self.todo = todo
        self.problems = tuple(problems) or (self,)

    @classmethod
    def joined(cls, problems: Sequence[SettingsError]) -> SettingsError:
        """Return one error for several settings."""
        return cls("\n".join(map(str, problems)), problems=problems)
