"""The errors of the worker. The class of an error determines what happens to the message.

WorkerError                          nack         a defect: retrying in this process would not help
├── Transient                        hold         failed temporarily, can succeed later
│   ├── Throttled                    wait         answered with 429, or the rate limit is used up
│   ├── StaleRead                                 commercetools shows an older version than one that exists
│   ├── NotShownYet                  wait         commercetools does not show a new resource yet
│   ├── ReadingOutdated              wait         read too long ago for an effect that cannot be undone
│   ├── StateChanged                 wait         changed in commercetools each time that it was written
│   ├── JobUnfinished                wait         a bulk job has started and can still write
│   ├── ResponseTooLarge                          the response is larger than the worker reads
│   ├── CircuitOpen                               not sent, because the endpoint keeps failing
│   ├── NotForwarded                              a proxy in front of the service refused the request
│   ├── EndpointRefused              wait         one endpoint refuses the worker; the service accepts it
│   └── RequestBlocked                            this request is refused; the endpoint answers others
├── Rejected                         dead-letter  can never succeed
└── Misconfigured                    park         credentials, scopes or project are refused
    ├── ProxyMisconfigured                        exit code 2
    ├── CommercetoolsMisconfigured                exit code 4
    └── KlaviyoMisconfigured                      exit code 5
Ignored                              ack          nothing to do: a result, not an error
└── Excluded                                      of a project, store or country that the worker does not serve
SettingsError                        -            exit code 2

The error texts are written for operators and appear in logs and dead letters. They contain no personal data and no
secrets.
"""

from __future__ import annotations

import re
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Literal, Self

if TYPE_CHECKING:
    from collections.abc import Sequence


_NUMBERS = re.compile(r"(?<=/)\d+(?=/|$)|\d{1,3}(?:,\d{3})+")  # an index in a JSON pointer, a size


def kind_of(reason: str) -> str:
    """Return a reason without the numbers that differ from message to message.

    One kind of failure is then one row of a table, and a thousand invalid messages do not hide other failures.
    """
    return _NUMBERS.sub("N", reason)


class Disposition(Enum):
    """The fate of a delivery: ACK, NACK and DEAD_LETTER settle it, the others hold it in memory."""

    ACK = "ack"
    NACK = "nack"
    DEAD_LETTER = "dead_letter"
    HOLD = "hold"  # an outage: retry, but nack the message after KLAVIYO_WORKER_OUTAGE_HOLD seconds
    WAIT = "wait"  # the wait ends by itself or needs an operator, as for a rate limit: retry without a time limit
    PARK = "park"  # credentials or permissions are refused: retry without a time limit, and stop pulling


HELD = frozenset({Disposition.HOLD, Disposition.WAIT, Disposition.PARK})


class ExitCode(IntEnum):
    """The exit codes of all commands. Each kind of failure that needs a different reaction has its own code."""

    OK = 0, "success"
    UNEXPECTED = 1, "unexpected error, or a part of the work failed"
    USAGE = 2, "invalid usage or configuration"
    QUEUE = 3, "the queue cannot be used"
    COMMERCETOOLS = 4, "commercetools refuses the credentials"
    KLAVIYO = 5, "Klaviyo refuses the key"
    UNFINISHED = 6, "ended before everything was done; nothing that is left is lost"
    INTERRUPTED = 7, "interrupted; run the same command to continue"

    meaning: str

    def __new__(cls, code: int, meaning: str) -> Self:
        """Create a member from its number and its meaning, which --help prints."""
        member = int.__new__(cls, code)
        member._value_ = code
        member.meaning = meaning
        return member


class WorkerError(Exception):
    """A message could not be processed. `disposition` determines what happens to it.

    `reason` says what is wrong. `todo` says what to do about it; it is "" if there is no advice. The error text
    consists of the reason and the advice.
    """

    disposition = Disposition.NACK

    def __init__(self, reason: str, *, todo: str = "") -> None:
        super().__init__(f"{reason}: {todo}" if todo else reason)
        self.reason = reason
        self.todo = todo


class Transient(WorkerError):
    """A failure that can disappear by itself: an outage, throttling, a timeout.

    `retry_after` is the number of seconds to wait before a retry; None if unknown.
    """

    disposition = Disposition.HOLD

    def __init__(self, reason: str, retry_after: float | None = None, *, todo: str = "") -> None:
        super().__init__(reason, todo=todo)
        self.retry_after = retry_after


class Throttled(Transient):
    """The service is up, but it answered with 429, or its rate limit is used up."""

    disposition = Disposition.WAIT


class StaleRead(Transient):
    """commercetools shows an older version of a resource than one that is known to exist."""


class NotShownYet(Transient):
    """commercetools does not show a resource that should exist. The wait has its own limit: see versions.READ_LAG."""

    disposition = Disposition.WAIT


class ReadingOutdated(Transient):
    """A state was read too long ago for an effect that cannot be undone. It must be read again."""

    disposition = Disposition.WAIT


class StateChanged(Transient):
    """The state was written, but changed in commercetools each time before the write had ended."""

    disposition = Disposition.WAIT


class JobUnfinished(Transient):
    """A bulk job of Klaviyo has started, or has possibly started, and can still write.

    For `retry_after` seconds no worker must process the message: the job would overwrite what it writes.
    """

    disposition = Disposition.WAIT


class ResponseTooLarge(Transient):
    """The response is larger than the worker reads. The service is up; a request for less can succeed."""


class CircuitOpen(Transient):
    """The circuit breaker sent no request, because the endpoint keeps failing."""


class NotForwarded(Transient):
    """Something in front of the service answered with a 4xx page of its own. The request had no effect."""


class EndpointRefused(Transient):
    """One endpoint refuses the worker, while the service accepts its credentials. Usually a scope is missing.

    Only the messages that need the endpoint wait.
    """

    disposition = Disposition.WAIT


class RequestBlocked(Transient):
    """The service or a firewall in front of it refuses this request, while the same endpoint answers others.

    If it happens several times in a row, the message is at fault: see Message.times_blocked.
    """


class Rejected(WorkerError):
    """The message can never succeed: it is unreadable, or Klaviyo or commercetools rejects its data.

    `status` is the HTTP status of the response; None if there was no request. `duplicate_id` is the id of the profile
    that Klaviyo names in a 409. `pointer` is Klaviyo's JSON pointer to the invalid part of the request, or "".
    """

    disposition = Disposition.DEAD_LETTER

    def __init__(self, reason: str, status: int | None = None, duplicate_id: str = "", pointer: str = "") -> None:
        super().__init__(reason)
        self.status = status
        self.duplicate_id = duplicate_id
        self.pointer = pointer


class Misconfigured(WorkerError):
    """A whole service refuses the worker's credentials, scopes or project: the configuration is at fault.

    `retry_after` is the number of seconds until the next retry; None if unknown. `lacks_scope` is True if a missing
    scope is a possible cause.
    """

    disposition = Disposition.PARK
    exit_code: ExitCode = ExitCode.UNEXPECTED

    def __init__(
        self, reason: str, retry_after: float | None = None, *, todo: str = "", lacks_scope: bool = False
    ) -> None:
        super().__init__(reason, todo=todo)
        self.retry_after = retry_after
        self.lacks_scope = lacks_scope


class ProxyMisconfigured(Misconfigured):
    """The proxy refuses its credentials, or requires some."""

    exit_code = ExitCode.USAGE


class CommercetoolsMisconfigured(Misconfigured):
    """commercetools refuses the credentials, the scope or the project."""

    exit_code = ExitCode.COMMERCETOOLS


class KlaviyoMisconfigured(Misconfigured):
    """Klaviyo refuses the key or its scopes."""

    exit_code = ExitCode.KLAVIYO


class Ignored(Exception):
    """There is nothing to do for the message. The error text is the reason."""


class Excluded(Ignored):
    """The message is about a project, a store or a country that this worker does not serve.

    `by` names the setting that excludes it: `project`, `stores` or `countries`.
    """

    def __init__(self, reason: str, by: Literal["project", "stores", "countries"]) -> None:
        super().__init__(reason)
        self.by = by


class SettingsError(Exception):
    """Settings are missing or malformed. The error text has a line for each of `problems`."""

    def __init__(self, reason: str, *, todo: str = "", problems: Sequence[SettingsError] = ()) -> None:
        super().__init__(f"{reason}: {todo}" if todo else reason)
        self.reason = reason
        self.todo = todo
        self.problems = tuple(problems) or (self,)

    @classmethod
    def joined(cls, problems: Sequence[SettingsError]) -> SettingsError:
        """Return one error that lists the problems of several settings."""
        return cls("\n".join(map(str, problems)), problems=problems)
