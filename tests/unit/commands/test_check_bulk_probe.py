"""The conclusions of the bulk probe, also for accounts that the sandbox does not emulate."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from worker.commands.check.bulk_probe import BulkProbe, ProbeResult
from worker.errors import Rejected

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.klaviyo.client import Body
    from worker.model import Json

    Shows = Callable[[list[str]], dict[str, int]]  # the recorded events after these calls

ALL_CALLS = ["B", "A", "AC", "BD", "GGH", "AE", "BF", "A"]  # B and the last A are sent individually
ONCE = dict.fromkeys("ABCDEFGH", 1)


class FakeKlaviyo:
    """A fake account. `shows` returns the recorded events after the calls so far. It rejects the calls in `rejects`."""

    def __init__(self, shows: Shows = lambda _: ONCE, *rejects: str) -> None:
        self._shows = shows
        self._rejects = rejects
        self.calls: list[str] = []  # the names of the events in each request
        self.stored: list[Json] = []
        self._run = ""

    def call(self, method: str, path: str, body: Body = None, *, idempotent: bool = True) -> Json:
        """Accept a request with events or a verdict, or respond to a query."""
        if path == "/api/profile-import":
            assert isinstance(body, dict)
            self.stored.append(body["data"]["attributes"])
        elif method == "POST":
            self._accept(_events(body, idempotent=idempotent))
        elif path.startswith("/api/profiles"):
            return {"data": [{"id": "1"}]}
        else:
            return self._recorded()
        return {}

    def requests_sent(self) -> int:
        return 0

    def _recorded(self) -> Json:
        names = Counter(self._shows(self.calls)).elements()
        events = [{"Run": self._run, "Event": name} for name in names] + [{"Run": "another", "Event": "A"}]
        return {"data": [{"attributes": {"event_properties": each}} for each in events]}

    def _accept(self, events: list[dict[str, Any]]) -> None:
        names = "".join(each["properties"]["Event"] for each in events)
        if names in self._rejects:
            raise Rejected("Klaviyo answered 400 to POST /api/event-bulk-create-jobs", 400)
        self._run = events[0]["properties"]["Run"]
        self.calls.append(names)


def _events(body: Body, *, idempotent: bool) -> list[dict[str, Any]]:
    """Return the attributes of the events in a request."""
    if isinstance(body, dict):
        assert idempotent
        return [body["data"]["attributes"]]
    assert isinstance(body, bytes)
    assert not idempotent
    (entry,) = orjson.loads(body)["data"]["attributes"]["events-bulk-create"]["data"]
    return [each["attributes"] for each in entry["attributes"]["events"]["data"]]


def probe(klaviyo: FakeKlaviyo, timeout: float = 0.05) -> ProbeResult:
    return BulkProbe(klaviyo, timeout, lambda _: None).run()


def finally_shows(recorded: dict[str, int]) -> FakeKlaviyo:
    """Return an account that shows A and B once until all requests were sent, and then `recorded`."""
    return FakeKlaviyo(lambda calls: recorded if len(calls) == len(ALL_CALLS) else {"A": 1, "B": 1})


def test_account_that_records_every_event_once_ignores_repeats() -> None:
    """The probe repeats an event of a bulk call and one of an individual request: immediately and later."""
    klaviyo = FakeKlaviyo()
    assert probe(klaviyo).repeats == "ignored"
    assert klaviyo.calls == ALL_CALLS


@pytest.mark.parametrize(
    ("changed", "repeats"),
    [
        ({"A": 2}, "recorded twice"),
        ({"B": 3}, "recorded twice"),
        ({"C": 2}, "recorded twice"),
        ({"A": 2, "C": 0}, "recorded twice"),
        ({"C": 0}, "dropped"),
        ({"D": 0}, "dropped"),
        ({"E": 0}, "dropped"),
        ({"F": 0}, "dropped"),
        ({"A": 0}, "undecided"),
        ({"B": 0, "D": 0}, "undecided"),
    ],
)
def test_other_counts_are_not_safe(changed: dict[str, int], repeats: str) -> None:
    """Immediate repeats (beside C, D) and later repeats (E, F) can do harm, of A as well as of B."""
    assert probe(finally_shows(ONCE | changed)).repeats == repeats


@pytest.mark.parametrize(
    ("changed", "in_one_call"),
    [({}, "ignored"), ({"G": 2}, "recorded twice"), ({"G": 0, "H": 0}, "dropped"), ({"H": 0}, "dropped")],
)
def test_repeats_in_one_call_do_not_decide(changed: dict[str, int], in_one_call: str) -> None:
    """The worker never repeats an event in one call."""
    result = probe(finally_shows(ONCE | changed))
    assert (result.repeats, result.repeats_in_one_call) == ("ignored", in_one_call)


def test_rejected_repeat_in_one_call_does_not_decide() -> None:
    """Klaviyo documents this behaviour."""
    result = probe(FakeKlaviyo(lambda _: ONCE, "GGH"))
    assert (result.repeats, result.repeats_in_one_call) == ("ignored", "refused")


@pytest.mark.parametrize(
    ("late", "repeats"),
    [({"A": 2}, "recorded twice"), ({"C": 1}, "ignored"), ({"F": 1}, "ignored"), ({"F": 2}, "recorded twice")],
)
def test_events_can_become_readable_late(late: dict[str, int], repeats: str) -> None:
    """The probe waits for the new events, and then reads again for a second copy."""
    read_at: list[float] = []
    delay = 0.05 if 2 in late.values() else 0.3  # the last read is after 0.1 s

    def shows(calls: list[str]) -> dict[str, int]:
        if len(calls) < len(ALL_CALLS):
            return {"A": 1, "B": 1}
        read_at.append(time.monotonic())
        if read_at[-1] - read_at[0] > delay:
            return ONCE | late
        return {name: 1 for name in ONCE if late.get(name) != 1}

    assert probe(FakeKlaviyo(shows), 1.2).repeats == repeats


def test_later_repeats_wait_until_the_first_events_are_readable() -> None:
    """Otherwise they would be other immediate repeats. Events of other probes do not count."""
    klaviyo = FakeKlaviyo(lambda _: {"A": 1})
    assert probe(klaviyo).repeats == "undecided"
    assert klaviyo.calls == ALL_CALLS[:5]


@pytest.mark.parametrize("rejected", ["AC", "BD", "AE", "BF"])
def test_rejected_repeat_is_detected_in_every_call(rejected: str) -> None:
    """The first call had the same form and was accepted, so the repeat was rejected."""
    klaviyo = FakeKlaviyo(lambda _: ONCE, rejected)
    assert probe(klaviyo).repeats == "refused"
    assert klaviyo.calls == ALL_CALLS[: ALL_CALLS.index(rejected)]


def test_rejected_query_is_not_a_rejected_repeat() -> None:
    """The rejection of a query says nothing about bulk calls."""

    def refuse(_: list[str]) -> dict[str, int]:
        raise Rejected("Klaviyo answered 400 to GET /api/events", 400)

    with pytest.raises(Rejected):
        probe(FakeKlaviyo(refuse))


def test_verdict_is_stored_with_its_date() -> None:
    """The workers read it. Without a result, the account keeps the verdict that it had."""
    klaviyo, undecided = FakeKlaviyo(), FakeKlaviyo(lambda _: {})
    probe(klaviyo)
    probe(undecided)
    ((attributes,), nothing) = (klaviyo.stored, undecided.stored)
    assert attributes["external_id"] == "klaviyo-worker-probe"
    assert attributes["properties"].pop("klaviyo_worker_bulk_probed_at").endswith("+00:00")
    assert attributes["properties"] == {"klaviyo_worker_bulk_repeats": "ignored"}
    assert nothing == []
