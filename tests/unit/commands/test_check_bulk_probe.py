"""What the probe concludes from what it sees, for accounts no sandbox imitates."""

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
    """An account that shows what `shows` makes of the calls so far, and refuses all but the first `accepts`."""

    def __init__(self, shows: Callable[[Calls], dict[str, int]], accepts: int = 3) -> None:
        self._shows = shows
        self._accepts = accepts
        self.calls: Calls = []
        self._run = ""

    def call(self, method: str, path: str, body: Body = None, *, idempotent: bool = True) -> Json:
        """Take a bulk call, or answer a query."""
        if method == "POST":
            assert isinstance(body, bytes)
            assert not idempotent
            self._take(orjson.loads(body))
            return {}
        if path.startswith("/api/profiles"):
            return {"data": [{"id": "1"}]}
        names = Counter(self._shows(self.calls)).elements()
        events = [{"Run": self._run, "Event": name} for name in names] + [{"Run": "another", "Event": "A"}]
        return {"data": [{"attributes": {"event_properties": each}} for each in events]}

    def requests_sent(self) -> int:
        return 0

    def _take(self, document: dict[str, Any]) -> None:
        if len(self.calls) == self._accepts:
            raise Rejected("Klaviyo answered 400 to POST /api/event-bulk-create-jobs", 400)
        (entry,) = document["data"]["attributes"]["events-bulk-create"]["data"]
        events = [each["attributes"] for each in entry["attributes"]["events"]["data"]]
        self._run = events[0]["properties"]["Run"]
        assert len({each["unique_id"] for each in events}) == len(events)
        self.calls.append([each["properties"]["Event"] for each in events])


def probed(shows: Callable[[Calls], dict[str, int]]) -> str:
    return BulkProbe(FakeKlaviyo(shows), 0.05, lambda _: None).run().repeat


def everything_once(calls: Calls) -> dict[str, int]:
    return {name: 1 for names in calls for name in names}


def test_only_once_each_is_safe() -> None:
    """A, B and C."""
    assert probed(everything_once) == "ignore"


@pytest.mark.parametrize(
    ("in_the_end", "repeat"),
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
def test_anything_else_is_not(in_the_end: dict[str, int], repeat: str) -> None:
    """A repeat that comes at once (with B) or later (with C) may be the one that does harm."""
    assert probed(lambda calls: in_the_end if len(calls) == 3 else {"A": 1}) == repeat


@pytest.mark.parametrize(
    ("late", "repeat"), [({"A": 2}, "duplicate"), ({"B": 1}, "ignore"), ({"C": 1}, "ignore"), ({"C": 2}, "duplicate")]
)
def test_anything_may_show_late(late: dict[str, int], repeat: str) -> None:
    """It is waited for; and when all have shown, it is looked once more."""
    began: list[float] = []
    delay = 0.05 if 2 in late.values() else 0.3  # it is looked once more after 0.1 s

    def shows(calls: Calls) -> dict[str, int]:
        if len(calls) < 3:
            return {"A": 1}
        began.append(time.monotonic())
        if began[-1] - began[0] > delay:
            return {"A": 1, "B": 1, "C": 1} | late
        return {name: 1 for name in "ABC" if late.get(name) != 1}

    assert BulkProbe(FakeKlaviyo(shows), 1.2, lambda _: None).run().repeat == repeat


def test_the_last_call_waits_until_the_first_shows() -> None:
    """Else it would be one more repeat that comes at once. Events of other probes do not count."""
    klaviyo = FakeKlaviyo(lambda _: {})
    assert BulkProbe(klaviyo, 0.05, lambda _: None).run().repeat == "undecided"
    assert klaviyo.calls == [["A"], ["A", "B"]]


@pytest.mark.parametrize("accepts", [1, 2])
def test_a_refused_repeat_is_told_at_once_or_later(accepts: int) -> None:
    """The first call has been accepted in the same form, so the repeat is what was refused."""
    klaviyo = FakeKlaviyo(everything_once, accepts)
    assert BulkProbe(klaviyo, 0.05, lambda _: None).run().repeat == "refuse"
    assert len(klaviyo.calls) == accepts


def test_a_refused_query_is_no_refused_repeat() -> None:
    """It says nothing about bulk calls."""

    def refuse(_: Calls) -> dict[str, int]:
        raise Rejected("Klaviyo answered 400 to GET /api/events", 400)

    with pytest.raises(Rejected):
        probed(refuse)
