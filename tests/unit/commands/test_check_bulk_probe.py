"""The conclusions of the bulk probe, also for accounts that the sandbox does not emulate."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from worker.commands.check.bulk_probe import BulkProbe
from worker.errors import Rejected

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.klaviyo.client import Body
    from worker.model import Json

Calls = list[list[str]]


class FakeKlaviyo:
    """A fake account. `shows` returns the recorded events after the calls so far.

    It rejects all calls after the first `accepts`.
    """

    def __init__(self, shows: Callable[[Calls], dict[str, int]], accepts: int = 3) -> None:
        self._shows = shows
        self._accepts = accepts
        self.calls: Calls = []
        self._run = ""

    def call(self, method: str, path: str, body: Body = None, *, idempotent: bool = True) -> Json:
        """Accept a bulk call, or respond to a query."""
        if method == "POST":
            assert isinstance(body, bytes)
            assert not idempotent
            self._accept(orjson.loads(body))
            return {}
        if path.startswith("/api/profiles"):
            return {"data": [{"id": "1"}]}
        names = Counter(self._shows(self.calls)).elements()
        events = [{"Run": self._run, "Event": name} for name in names] + [{"Run": "another", "Event": "A"}]
        return {"data": [{"attributes": {"event_properties": each}} for each in events]}

    def requests_sent(self) -> int:
        return 0

    def _accept(self, document: dict[str, Any]) -> None:
        if len(self.calls) == self._accepts:
            raise Rejected("Klaviyo answered 400 to POST /api/event-bulk-create-jobs", 400)
        (entry,) = document["data"]["attributes"]["events-bulk-create"]["data"]
        events = [each["attributes"] for each in entry["attributes"]["events"]["data"]]
        self._run = events[0]["properties"]["Run"]
        assert len({each["unique_id"] for each in events}) == len(events)
        self.calls.append([each["properties"]["Event"] for each in events])


def probe(shows: Callable[[Calls], dict[str, int]]) -> str:
    return BulkProbe(FakeKlaviyo(shows), 0.05, lambda _: None).run().repeat


def every_event_once(calls: Calls) -> dict[str, int]:
    return {name: 1 for names in calls for name in names}


def test_one_event_each_is_safe() -> None:
    """If A, B and C are recorded once, `always` is safe."""
    assert probe(every_event_once) == "ignore"


@pytest.mark.parametrize(
    ("final", "repeat"),
    [
        ({"A": 2, "B": 1, "C": 1}, "duplicate"),
        ({"A": 3}, "duplicate"),
        ({"A": 1, "B": 2, "C": 1}, "duplicate"),
        ({"A": 1}, "drop"),
        ({"A": 1, "B": 1}, "drop"),
        ({"A": 1, "C": 1}, "drop"),
        ({"B": 1, "C": 1}, "undecided"),
        ({}, "undecided"),
    ],
)
def test_other_counts_are_not_safe(final: dict[str, int], repeat: str) -> None:
    """Either the immediate repeat (with B) or the later repeat (with C) can do harm."""
    assert probe(lambda calls: final if len(calls) == 3 else {"A": 1}) == repeat


@pytest.mark.parametrize(
    ("late", "repeat"), [({"A": 2}, "duplicate"), ({"B": 1}, "ignore"), ({"C": 1}, "ignore"), ({"C": 2}, "duplicate")]
)
def test_events_can_become_readable_late(late: dict[str, int], repeat: str) -> None:
    """The probe waits for B and C, and then reads again for a second copy."""
    read_at: list[float] = []
    delay = 0.05 if 2 in late.values() else 0.3  # the last read is after 0.1 s

    def shows(calls: Calls) -> dict[str, int]:
        if len(calls) < 3:
            return {"A": 1}
        read_at.append(time.monotonic())
        if read_at[-1] - read_at[0] > delay:
            return {"A": 1, "B": 1, "C": 1} | late
        return {name: 1 for name in "ABC" if late.get(name) != 1}

    assert BulkProbe(FakeKlaviyo(shows), 1.2, lambda _: None).run().repeat == repeat


def test_last_call_waits_until_the_first_is_readable() -> None:
    """Otherwise it would be another immediate repeat. Events of other probes do not count."""
    klaviyo = FakeKlaviyo(lambda _: {})
    assert BulkProbe(klaviyo, 0.05, lambda _: None).run().repeat == "undecided"
    assert klaviyo.calls == [["A"], ["A", "B"]]


@pytest.mark.parametrize("accepts", [1, 2])
def test_rejected_repeat_is_detected_in_either_call(accepts: int) -> None:
    """The first call had the same form and was accepted, so the repeat was rejected."""
    klaviyo = FakeKlaviyo(every_event_once, accepts)
    assert BulkProbe(klaviyo, 0.05, lambda _: None).run().repeat == "refuse"
    assert len(klaviyo.calls) == accepts


def test_rejected_query_is_not_a_rejected_repeat() -> None:
    """The rejection of a query says nothing about bulk calls."""

    def refuse(_: Calls) -> dict[str, int]:
        raise Rejected("Klaviyo answered 400 to GET /api/events", 400)

    with pytest.raises(Rejected):
        probe(refuse)
