"""A probe of what a Klaviyo account does with a bulk call that repeats an event which it already has.

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
from worker.send import bulk_verdict
from worker.send import events as bulk
from worker.send.bulk_verdict import IGNORED, PROBE_PROFILE, Verdict
from worker.transform.order_events import event_operation

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.klaviyo.client import KlaviyoClient
    from worker.model import Json, Operation

METRIC = "klaviyo-worker probe"
READ_SCOPES = {"profiles:read": "/api/profiles", "events:read": "/api/events"}  # with an endpoint that needs it
SCOPES = (*READ_SCOPES, "events:write", "profiles:write")
_FIRST, _NEW = "AB", "CDEF"  # events that are repeated, and the new events beside their repeats
_TWICE, _BESIDE = "G", "H"  # an event that is twice in one call, and the new event beside it
_POLL_INTERVAL = 1 / 60  # share of the timeout
_LAST_WAIT = 1 / 12  # share of the timeout; a repeated event can become readable later than the new events

Treatment = Literal["ignored", "refused", "dropped", "recorded twice", "undecided"]
_AUTO = "with KLAVIYO_WORKER_BULK_EVENTS=auto the workers send events"
_MEANING: dict[Treatment, str] = {
    "ignored": f"Klaviyo ignores a repeated event, so {_AUTO} in bulk",
    "refused": f"Klaviyo rejects a call with a repeated event, so {_AUTO} individually",
    "dropped": f"Klaviyo drops a call with a repeated event, or is slow, so {_AUTO} individually",
    "recorded twice": f"Klaviyo records a repeated event again, so {_AUTO} individually",
    "undecided": "no result; the account keeps the verdict that it had. Probe again with a longer --probe-wait",
}


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """The account's treatment of repeated events, and the observation behind it.

    `repeats` is about events of earlier requests, and decides whether events are sent in bulk. `repeats_in_one_call` is
    for information, because the worker never repeats an event in one call; "undecided" if it was not asked.
    """

    repeats: Treatment
    repeats_in_one_call: Treatment
    observation: str

    def __str__(self) -> str:
        return f"{self.observation}: {_MEANING[self.repeats]}"


class BulkProbe:
    """Requests that repeat events of a test profile, whose events are then read back.

    A is first sent in a bulk call, and B individually. Bulk calls repeat each of them beside a new event: immediately,
    and after A and B are readable. Klaviyo processes a bulk call some time after accepting it, so it could treat an
    early repeat differently from a late one. A is also repeated individually. A last bulk call contains G twice.

    `timeout`: the maximum seconds of each of the two waits until events are readable. `report_progress` receives each
    step.
    """

    def __init__(self, client: KlaviyoClient, timeout: float, report_progress: Callable[[str], None]) -> None:
        self._client = client
        self._timeout = timeout
        self._report_progress = report_progress
        self._run = uuid4().hex
        self._started = datetime.now(UTC).isoformat(timespec="seconds")
        self._profile_id = ""

    def run(self) -> ProbeResult:
        """Run the probe and store the verdict in the account. If there is no result, keep the verdict that it has.

        Raises WorkerError if Klaviyo rejects the first requests, refuses access, or is unreachable.
        """
        result = self._ask()
        if result.repeats != "undecided":
            bulk_verdict.store_verdict(self._client, Verdict(result.repeats, self._started))
        return result

    def _ask(self) -> ProbeResult:
        self._send_individually("B")
        self._send_in_bulk("A")
        if refused := self._repeat("AC", "BD"):
            return refused
        in_one_call = self._repeat_in_one_call()
        if self._wait_for(_FIRST) is None:
            observation = f"Klaviyo accepted A and B, but they were not readable within {self._timeout:g} s"
            return ProbeResult("undecided", in_one_call or "undecided", observation)
        if refused := self._repeat("AE", "BF"):
            return refused
        self._send_individually("A")
        elapsed = self._wait_for(_NEW)
        if elapsed is not None:
            self._report_progress("bulk events: the new events are readable; waiting for possible copies of A and B")
            time.sleep(max(elapsed, self._timeout * _LAST_WAIT))
        recorded = self._count_recorded()
        counts = ", ".join(f"{name} {recorded[name]}x" for name in _FIRST + _NEW)
        return ProbeResult(
            _treatment(recorded, _FIRST, _NEW),
            in_one_call or _treatment(recorded, "", _TWICE + _BESIDE),
            f"Klaviyo accepted bulk calls that repeat A and B beside new events, and recorded {counts}",
        )

    def _repeat(self, *calls: str) -> ProbeResult | None:
        """Send bulk calls with repeats. Return the result if Klaviyo rejects one of them."""
        for names in calls:
            try:
                self._send_in_bulk(names)
            except Rejected as error:
                observation = f"Klaviyo rejected a bulk call that repeats {names[0]} ({error})"
                return ProbeResult("refused", "undecided", observation)
        return None

    def _repeat_in_one_call(self) -> Treatment | None:
        """Send a bulk call that contains an event twice. Return "refused" if Klaviyo rejects it."""
        try:
            self._send_in_bulk(_TWICE + _TWICE + _BESIDE)
        except Rejected:
            return "refused"
        return None

    def _send_in_bulk(self, names: str) -> None:
        """Send events in one bulk call, as the worker does."""
        self._client.call("POST", bulk.PATH, bulk.bulk_body(map(self._event, names)), idempotent=False)

    def _send_individually(self, name: str) -> None:
        self._client.call("POST", "/api/events", {"data": self._event(name).resource})

    def _event(self, name: str) -> Operation:
        about = "Written by klaviyo-worker check --probe-bulk. It can be deleted."
        profile: Json = {"external_id": PROBE_PROFILE, "first_name": "klaviyo-worker", "last_name": "probe"}
        return event_operation(
            metric=METRIC,
            unique_id=f"{self._run}-{name}",
            time=self._started,
            value=None,
            profile=profile | {"properties": {"About": about}},
            properties={"About": about, "Run": self._run, "Event": name},
        )

    def _wait_for(self, names: str) -> float | None:
        """Return the seconds until the events were readable, or None if the timeout expired."""
        listed = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
        self._report_progress(f"bulk events: waiting up to {self._timeout:g} s until {listed} can be read")
        started = time.monotonic()
        while not self._count_recorded().keys() >= set(names):
            if time.monotonic() - started >= self._timeout:
                return None
            time.sleep(self._timeout * _POLL_INTERVAL)
        return time.monotonic() - started

    def _count_recorded(self) -> Counter[str]:
        """Count this run's events by name. The newest are on the first page."""
        self._profile_id = self._profile_id or as_text(bulk_verdict.find_probe_profile(self._client).get("id"))
        if not self._profile_id:
            return Counter()
        condition = quote(f'equals(profile_id,"{self._profile_id}")')
        path = f"/api/events?filter={condition}&sort=-datetime&fields%5Bevent%5D=event_properties"
        events = as_dicts(self._client.call("GET", path).get("data"))
        properties = (as_dict(as_dict(each.get("attributes")).get("event_properties")) for each in events)
        return Counter(as_text(each.get("Event")) for each in properties if each.get("Run") == self._run)


def _treatment(recorded: Counter[str], repeated: str, new: str) -> Treatment:
    """Return the treatment of repeats from the numbers of recorded events."""
    if any(recorded[name] > 1 for name in repeated + new):
        return "recorded twice"
    if not all(recorded[name] for name in repeated):  # they were readable before, so reads are unreliable
        return "undecided"
    return IGNORED if all(recorded[name] for name in new) else "dropped"
