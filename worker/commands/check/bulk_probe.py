"""A probe of how a Klaviyo account treats a bulk call that repeats an event of an earlier call.

Klaviyo documents only repeats inside one call: docs/decisions/0011-bulk-events.md.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote
from uuid import uuid4

from worker.errors import Rejected
from worker.json_access import as_dict, as_dicts, as_text
from worker.send import events as bulk
from worker.transform.order_events import event_operation

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.klaviyo.client import KlaviyoClient
    from worker.model import Json

PROFILE, METRIC = "klaviyo-worker-probe", "klaviyo-worker probe"
SCOPES = {"profiles:read": "/api/profiles", "events:read": "/api/events"}  # in addition to events:write
_POLL_INTERVAL = 1 / 60  # share of the timeout
_LAST_WAIT = 1 / 12  # share of the timeout; a duplicate of A can become readable later than B and C

Repeat = Literal["ignore", "refuse", "drop", "duplicate", "undecided"]
_AUTO = "keep KLAVIYO_WORKER_BULK_EVENTS=auto"
_MEANING: dict[Repeat, str] = {
    "ignore": "Klaviyo ignores a repeated event, so KLAVIYO_WORKER_BULK_EVENTS=always is safe",
    "refuse": f"Klaviyo rejects a call with a repeated event, so {_AUTO}",
    "drop": f"Klaviyo drops a call with a repeated event, or is slow, so {_AUTO}",
    "duplicate": f"Klaviyo records a repeated event again, so {_AUTO}",
    "undecided": f"no result, so {_AUTO}, or probe again with a longer --probe-wait",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """The treatment of repeated events, and the observation behind it."""

    repeat: Repeat
    observation: str

    @property
    def recommended(self) -> bulk.BulkMode:
        """Return the value for KLAVIYO_WORKER_BULK_EVENTS."""
        return "always" if self.repeat == "ignore" else "auto"

    def __str__(self) -> str:
        return f"{self.observation}: {_MEANING[self.repeat]}"


class BulkProbe:
    """Three bulk calls for a test profile, whose events are then read back.

    The first call contains A. The second contains A and B, and follows immediately. The third contains A and C, and
    follows when A is readable. Klaviyo processes a bulk call some time after accepting it, so it could treat an early
    repeat differently from a late one. `timeout`: the maximum seconds of each of the two waits until events are
    readable. `report_progress` receives each step.
    """

    def __init__(self, client: KlaviyoClient, timeout: float, report_progress: Callable[[str], None]) -> None:
        self._client = client
        self._timeout = timeout
        self._report_progress = report_progress
        self._run = uuid4().hex
        self._time = datetime.now(UTC).isoformat(timespec="seconds")
        self._profile_id = ""

    def run(self) -> Verdict:
        """Run the probe. Raises WorkerError if Klaviyo rejects a call, refuses access, or is unreachable."""
        self._send("A")
        if rejected := self._repeat_with("B"):
            return rejected
        if self._wait_for("A") is None:
            observation = f"Klaviyo accepted a call with A, but A was not readable within {self._timeout:g} s"
            return Verdict("undecided", observation)
        if rejected := self._repeat_with("C"):
            return rejected
        elapsed = self._wait_for("B", "C")
        if elapsed is not None:
            self._report_progress("bulk events: B and C are readable; waiting for a possible second A")
            time.sleep(max(elapsed, self._timeout * _LAST_WAIT))
        recorded = self._count_recorded()
        counts = [recorded[name] for name in "ABC"]
        recorded_counts = "A {}x, B {}x, C {}x".format(*counts)
        observation = f"Klaviyo accepted calls with A, A and B, A and C, and recorded {recorded_counts}"
        return Verdict(_interpret(*counts), observation)

    def _repeat_with(self, name: str) -> Verdict | None:
        """Send A again, with another event. Return the verdict if Klaviyo rejects the call."""
        try:
            self._send("A", name)
        except Rejected as error:
            return Verdict("refuse", f"Klaviyo rejected a call that repeats A ({error})")
        return None

    def _send(self, *names: str) -> None:
        """Send events in one bulk call, as the worker does."""
        about = "Written by klaviyo-worker check --probe-bulk. It can be deleted."
        profile: Json = {"external_id": PROFILE, "first_name": "klaviyo-worker", "last_name": "probe"}
        events = [
            event_operation(
                metric=METRIC,
                unique_id=f"{self._run}-{name}",
                time=self._time,
                value=None,
                profile=profile | {"properties": {"About": about}},
                properties={"About": about, "Run": self._run, "Event": name},
            )
            for name in names
        ]
        self._client.call("POST", bulk.PATH, bulk.bulk_body(events), idempotent=False)

    def _wait_for(self, *names: str) -> float | None:
        """Return the seconds until the events were readable, or None if the timeout expired."""
        self._report_progress(f"bulk events: waiting up to {self._timeout:g} s until {' and '.join(names)} can be read")
        started = time.monotonic()
        while not self._count_recorded().keys() >= set(names):
            if time.monotonic() - started >= self._timeout:
                return None
            time.sleep(self._timeout * _POLL_INTERVAL)
        return time.monotonic() - started

    def _count_recorded(self) -> Counter[str]:
        """Count this run's events by name. The newest are on the first page."""
        self._profile_id = self._profile_id or self._find_profile()
        if not self._profile_id:
            return Counter()
        condition = quote(f'equals(profile_id,"{self._profile_id}")')
        path = f"/api/events?filter={condition}&sort=-datetime&fields%5Bevent%5D=event_properties"
        events = as_dicts(self._client.call("GET", path).get("data"))
        properties = (as_dict(as_dict(each.get("attributes")).get("event_properties")) for each in events)
        return Counter(as_text(each.get("Event")) for each in properties if each.get("Run") == self._run)

    def _find_profile(self) -> str:
        condition = quote(f'equals(external_id,"{PROFILE}")')
        response = self._client.call("GET", f"/api/profiles?filter={condition}&fields%5Bprofile%5D=external_id")
        return next((as_text(profile.get("id")) for profile in as_dicts(response.get("data"))), "")


def _interpret(a: int, b: int, c: int) -> Repeat:
    """Return the treatment of repeats from the numbers of recorded events A, B and C."""
    if max(a, b, c) > 1:
        return "duplicate"
    if a == 0:  # A was readable before, so reads are unreliable
        return "undecided"
    return "ignore" if b and c else "drop"
