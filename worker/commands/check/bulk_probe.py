"""Finds out what a Klaviyo account makes of a bulk call that repeats an event of an earlier one.

Klaviyo documents that for repeats inside one call only: docs/decisions/0011-bulk-events.md.
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
SCOPES = {"profiles:read": "/api/profiles", "events:read": "/api/events"}  # besides events:write
_PAUSE = 1 / 60  # of the patience, between two looks
_AFTERMATH = 1 / 12  # of the patience; a second copy may show later than the event beside it

Repeat = Literal["ignored", "refused", "dropped", "doubled", "undecided"]
_AUTO = "stay with KLAVIYO_WORKER_BULK_EVENTS=auto"
_MEANING: dict[Repeat, str] = {
    "ignored": "repeats are ignored, KLAVIYO_WORKER_BULK_EVENTS=always is safe",
    "refused": f"repeats are refused, {_AUTO}",
    "dropped": f"a repeat costs its whole call, or Klaviyo is slow: {_AUTO}",
    "doubled": f"a repeat is recorded once more, {_AUTO}",
    "undecided": f"nothing is known, {_AUTO} or probe again with a longer --probe-wait",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of the repeats, and what was seen."""

    repeat: Repeat
    seen: str

    @property
    def recommended(self) -> bulk.BulkMode:
        """Return the value for KLAVIYO_WORKER_BULK_EVENTS."""
        return "always" if self.repeat == "ignored" else "auto"

    def __str__(self) -> str:
        return f"{self.seen}: {_MEANING[self.repeat]}"


class BulkProbe:
    """Makes three bulk calls for a test profile and reads back what was recorded.

    They hold A; at once A again and B; and when A shows, A again and C. Klaviyo handles bulk calls some time after
    it has accepted them, so a repeat that comes at once might be treated in another way than a late one.
    `patience`: seconds the events are given to show, twice. `say` is told what is being waited for.
    """

    def __init__(self, client: KlaviyoClient, patience: float, say: Callable[[str], None]) -> None:
        self._client = client
        self._patience = patience
        self._say = say
        self._run = uuid4().hex
        self._time = datetime.now(UTC).isoformat(timespec="seconds")
        self._profile_id = ""

    def run(self) -> Verdict:
        """Probe. Raises WorkerError: Klaviyo refuses the form, the key or a scope, or does not answer."""
        self._send("A")
        if refused := self._repeat_beside("B"):
            return refused
        if self._wait_for("A") is None:
            return Verdict("undecided", f"a call with A was accepted, but A does not show in {self._patience:g} s")
        if refused := self._repeat_beside("C"):
            return refused
        took = self._wait_for("B", "C")
        if took is not None:
            self._say("bulk events: B and C show; looking once more for a second A")
            time.sleep(max(took, self._patience * _AFTERMATH))
        recorded = self._recorded()
        counts = [recorded[name] for name in "ABC"]
        seen = "calls with A, A and B, A and C were accepted, and A shows {}x, B {}x, C {}x".format(*counts)
        return Verdict(_meaning(*counts), seen)

    def _repeat_beside(self, name: str) -> Verdict | None:
        """Send A again, with another event; return the verdict when that is not accepted."""
        try:
            self._send("A", name)
        except Rejected as error:
            return Verdict("refused", f"a call that repeats A was not accepted ({error})")
        return None

    def _send(self, *names: str) -> None:
        """Record events in one bulk call, as the worker does."""
        about = "Written by klaviyo-worker check --probe-bulk. May be deleted."
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
        """Return the seconds until the events showed, or None when they did not in time."""
        self._say(f"bulk events: waiting until {' and '.join(names)} can be read back, {self._patience:g} s at most")
        began = time.monotonic()
        while not self._recorded().keys() >= set(names):
            if time.monotonic() - began >= self._patience:
                return None
            time.sleep(self._patience * _PAUSE)
        return time.monotonic() - began

    def _recorded(self) -> Counter[str]:
        """Count this run's events by name. The newest come first, so one page has them all."""
        self._profile_id = self._profile_id or self._find_profile()
        if not self._profile_id:
            return Counter()
        found = quote(f'equals(profile_id,"{self._profile_id}")')
        path = f"/api/events?filter={found}&sort=-datetime&fields%5Bevent%5D=event_properties"
        events = as_dicts(self._client.call("GET", path).get("data"))
        properties = (as_dict(as_dict(each.get("attributes")).get("event_properties")) for each in events)
        return Counter(as_text(each.get("Event")) for each in properties if each.get("Run") == self._run)

    def _find_profile(self) -> str:
        found = quote(f'equals(external_id,"{PROFILE}")')
        answer = self._client.call("GET", f"/api/profiles?filter={found}&fields%5Bprofile%5D=external_id")
        return next((as_text(profile.get("id")) for profile in as_dicts(answer.get("data"))), "")


def _meaning(a: int, b: int, c: int) -> Repeat:
    """Return what it means that A, B and C show so many times."""
    if max(a, b, c) > 1:
        return "doubled"
    if a == 0:  # it did show before: reads are not to be trusted
        return "undecided"
    return "ignored" if b and c else "dropped"
