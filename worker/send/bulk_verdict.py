"""Whether events are sent in bulk: the setting decides, or the verdict in the Klaviyo account.

`klaviyo-worker check --probe-bulk` asks the account what it does with repeated events, and stores the verdict as
properties of the probe's profile. All workers, backfills and replays of the account read it there
(docs/decisions/0011-bulk-events.md).
"""

from __future__ import annotations

import logging
import time
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Final, Literal, NamedTuple
from urllib.parse import quote

from worker.errors import EndpointRefused, WorkerError
from worker.json_access import as_dict, as_dicts, as_text
from worker.telemetry.defects import describe_defect, report_defect
from worker.telemetry.log import log
from worker.telemetry.state import BulkEventsStatus

if TYPE_CHECKING:
    from worker.klaviyo.client import KlaviyoClient
    from worker.model import Json

PROBE_PROFILE = "klaviyo-worker-probe"  # external_id of the profile
REPEATS, PROBED_AT = "klaviyo_worker_bulk_repeats", "klaviyo_worker_bulk_probed_at"  # its properties
IGNORED: Final = "ignored"  # the only verdict that permits bulk calls
HOW_TO_ASK = "to ask the account, run klaviyo-worker check --probe-bulk"
REFRESH_INTERVAL = 600.0  # seconds between two readings
RETRY_INTERVAL = 60.0  # seconds until the next reading after a failure
FIRST_READING_WAIT = 5.0  # seconds; the maximum time after the start for which events wait for the first reading

BulkMode = Literal["auto", "always", "never"]


class Verdict(NamedTuple):
    """The account's treatment of an event that it already has, if a bulk call repeats it."""

    repeats: str  # "ignored", "refused", "dropped" or "recorded twice"
    probed_at: str  # RFC 3339; "" if unknown


def read_verdict(client: KlaviyoClient) -> Verdict | None:
    """Return the verdict in the account; None if it has none. Raises WorkerError."""
    properties = as_dict(as_dict(find_probe_profile(client).get("attributes")).get("properties"))
    repeats = as_text(properties.get(REPEATS))[:100]
    return Verdict(repeats, as_text(properties.get(PROBED_AT))[:100]) if repeats else None


def store_verdict(client: KlaviyoClient, verdict: Verdict) -> None:
    """Store the verdict in the account. Raises WorkerError."""
    properties = {REPEATS: verdict.repeats, PROBED_AT: verdict.probed_at}
    attributes = {"external_id": PROBE_PROFILE, "properties": properties}
    client.call("POST", "/api/profile-import", {"data": {"type": "profile", "attributes": attributes}})


def find_probe_profile(client: KlaviyoClient) -> Json:
    """Return the profile of the probe with its properties; {} if the account has none. Raises WorkerError."""
    condition = quote(f'equals(external_id,"{PROBE_PROFILE}")')
    response = client.call("GET", f"/api/profiles?filter={condition}&fields%5Bprofile%5D=properties")
    return next(iter(as_dicts(response.get("data"))), {})


def read_status(client: KlaviyoClient, mode: BulkMode) -> BulkEventsStatus:
    """Return whether events are sent in bulk, and why. Raises WorkerError."""
    if mode != "auto":
        return BulkEventsStatus(mode == "always", f"KLAVIYO_WORKER_BULK_EVENTS is {mode}")
    verdict = read_verdict(client)
    if verdict is None:
        return BulkEventsStatus(in_bulk=False, reason=f"the account has no verdict on repeated events: {HOW_TO_ASK}")
    reason = f"the account's verdict of {verdict.probed_at or 'unknown date'} on repeated events is: {verdict.repeats}"
    return BulkEventsStatus(verdict.repeats == IGNORED, reason)


class BulkVerdict:
    """The current decision whether events are sent in bulk. Thread-safe.

    With the mode `auto`, a thread reads the verdict every REFRESH_INTERVAL, from `start` or the first question on. If a
    reading fails, the last verdict remains in force. After EndpointRefused the thread ends: the key lacks a scope, and
    a worker that gets another key is restarted.
    """

    def __init__(self, client: KlaviyoClient, mode: BulkMode) -> None:
        self._client = client
        self._mode: BulkMode = mode
        self._thread = Thread(target=self._keep_reading, name="bulk-verdict", daemon=True)
        self._started_at: float | None = None  # monotonic seconds
        self._lock = Lock()
        self._has_answer = Event()
        self._closed = Event()
        not_read = BulkEventsStatus(in_bulk=False, reason="the verdict of the account was not read yet")
        self._status = not_read if mode == "auto" else read_status(client, mode)

    def start(self) -> None:
        """Start the thread if the mode is `auto` and the thread was not started."""
        with self._lock:
            if self._mode == "auto" and self._started_at is None:
                self._started_at = time.monotonic()
                self._thread.start()

    def close(self) -> None:
        """End the thread. Do not wait for a reading that is under way."""
        self._closed.set()

    def status(self) -> BulkEventsStatus:
        """Return whether events are sent in bulk now, and why."""
        return self._status

    def allows_bulk(self) -> bool:
        """Return whether events are sent in bulk. Soon after the start, wait for the first reading."""
        self.start()
        if self._started_at is not None:
            self._has_answer.wait(max(self._started_at + FIRST_READING_WAIT - time.monotonic(), 0.0))
        return self._status.in_bulk

    def _keep_reading(self) -> None:
        try:
            while not self._closed.wait(self._read()):
                pass
        except EndpointRefused as error:
            self._on_failure(error)
        finally:
            self._has_answer.set()

    def _read(self) -> float:
        """Read the verdict. Return the seconds until the next reading. Raises EndpointRefused."""
        try:
            self._decide(read_status(self._client, self._mode))
        except EndpointRefused:
            raise
        except WorkerError as error:
            self._on_failure(error)
            return RETRY_INTERVAL
        except Exception as defect:  # noqa: BLE001 - if this thread ended, the verdict would never change
            self._on_failure(report_defect("send", describe_defect(defect)))
            return RETRY_INTERVAL
        return REFRESH_INTERVAL

    def _on_failure(self, error: WorkerError) -> None:
        if not self._has_answer.is_set():
            reason = f"the account's verdict on repeated events could not be read: {error}"
            self._decide(BulkEventsStatus(in_bulk=False, reason=reason), logging.WARNING)

    def _decide(self, status: BulkEventsStatus, level: int = logging.INFO) -> None:
        if status != self._status:
            self._status = status
            log.log(level, "bulk_events", extra=status._asdict())
        self._has_answer.set()
