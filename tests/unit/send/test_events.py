"""The bulk sender for events: the selected events, the size of bulk calls, the isolation of rejected events."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.sender import Sender
from worker.errors import KlaviyoMisconfigured, Rejected, Transient
from worker.send import events as bulk
from worker.send import jobs
from worker.send.bulk import MAX_REJECTIONS
from worker.send.events import MAX_BYTES, MAX_EVENTS, BulkEvents
from worker.transform.order_events import event_operation

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from worker.klaviyo.client import Body
    from worker.model import Json, Operation

BULK, SINGLE, PROFILE = "/api/event-bulk-create-jobs", "/api/events", "/api/profile-import"
BASE = "/data/attributes/events-bulk-create/data"


def event(unique_id: str, *, who: str = "a@example.com", size: int = 0) -> Operation:
    return event_operation(
        metric="Placed Order",
        unique_id=unique_id,
        time="2026-11-01T10:00:00Z",
        value=None,
        profile={"email": who},
        properties={"filler": ["x" * 50_000] * (size // 50_000) + ["x" * (size % 50_000)]} if size else {},
    )


def events(number: int, *, profiles: int = 7) -> list[Operation]:
    return [event(str(n), who=f"{n % profiles}@example.com") for n in range(number)]


class Klaviyo:
    """A fake that rejects bulk calls with a bad event. `pointing` selects the pointer of the rejection."""

    def __init__(self, bad: Sequence[str] = (), pointing: str = "none", wrong: int = 0) -> None:
        self.bad = frozenset(bad)
        self.pointing = pointing
        self.wrong = wrong
        self.calls: list[str] = []  # paths
        self.bodies: list[bytes] = []  # of bulk calls
        self.recorded: list[str] = []
        self.failure: Exception | None = None  # raised after the effect of every bulk call

    def requests_sent(self) -> int:
        return len(self.calls)

    def call(self, method: str, path: str, body: Body = None, *, idempotent: bool = True) -> Json:
        assert method == "POST"
        self.calls.append(path)
        if path == PROFILE:
            return {}
        if isinstance(body, dict):
            assert (path, idempotent) == (SINGLE, True)
            self._record([body["data"]["attributes"]["unique_id"]], "")
        else:
            assert (path, idempotent) == (BULK, True)
            content = body() if callable(body) else body or b""
            self.bodies.append(content)
            places = list(_places(content))
            self._record([each for *_, each in places], self._pointer(places))
            if self.failure:
                raise self.failure
        return {}

    def _record(self, ids: list[str], pointer: str) -> None:
        if self.bad & set(ids):
            raise Rejected("bad", 400, pointer=pointer)
        self.recorded += ids

    def _pointer(self, places: list[tuple[int, int, str]]) -> str:
        entry, number, _ = next((place for place in places if place[2] in self.bad), (0, 0, ""))
        return {
            "none": "",
            "whole": BASE,
            "other": "/data/attributes/profiles/data/0",
            "event": f"{BASE}/{entry}/attributes/events/data/{number}/attributes/value",
            "entry": f"{BASE}/{entry}/attributes/profile/data/attributes/email",
            "bare": f"{BASE}/{entry}",
            "wrong": f"{BASE}/{self.wrong}/attributes/events/data/{self.wrong % 3}/attributes/value",
            "far": f"{BASE}/999999/attributes/events/data/0",
            "far event": f"{BASE}/{entry}/attributes/events/data/999999",
        }[self.pointing]


def _places(body: bytes) -> Iterator[tuple[int, int, str]]:
    """Yield index of entry, index of event and unique_id; check the layout."""
    data = orjson.loads(body)["data"]
    assert data["type"] == "event-bulk-create-job"
    for number, entry in enumerate(data["attributes"]["events-bulk-create"]["data"]):
        assert entry["type"] == "event-bulk-create"
        assert entry["attributes"]["profile"]["data"]["type"] == "profile"
        for index, each in enumerate(entry["attributes"]["events"]["data"]):
            assert each["type"] == "event"
            assert "profile" not in each["attributes"]
            yield number, index, each["attributes"]["unique_id"]


def sender(klaviyo: Klaviyo, *, bulk_events: bool = True, threshold: int = 0) -> Sender:
    return Sender(klaviyo, 4, bulk_events=bulk_events, bulk_threshold=threshold)


POINTING = ["none", "whole", "other", "event", "entry", "bare", "wrong", "far", "far event"]


@given(st.data(), st.integers(2, 60), st.sampled_from(POINTING))
def test_only_rejected_events_fail(data: st.DataObject, number: int, pointing: str) -> None:
    """For any pointers, bad events are rejected, good events are recorded once, and bulk calls are limited."""
    bad = data.draw(st.sets(st.integers(0, number - 1)))
    klaviyo = Klaviyo([str(each) for each in bad], pointing, wrong=data.draw(st.integers(0, 9)))
    results = sender(klaviyo).send(events(number))
    assert [isinstance(result, Rejected) for result in results] == [each in bad for each in range(number)]
    assert sorted(map(int, klaviyo.recorded)) == [each for each in range(number) if each not in bad]
    calls = Counter(klaviyo.calls)
    assert calls[BULK] <= 2 * MAX_REJECTIONS + 1
    assert calls[SINGLE] <= number
    if pointing == "event" and len(bad) < MAX_REJECTIONS:
        assert calls[BULK] <= 1 + len(bad)
        assert calls[SINGLE] <= 1 + len(bad)


@pytest.mark.parametrize(("pointing", "bulk_calls"), [("event", 2), ("none", 20)])
def test_one_rejected_event_in_a_full_bulk_call_is_found_quickly(pointing: str, bulk_calls: int) -> None:
    """With a pointer it is found immediately. Bisection needs at most two bulk calls per halving."""
    klaviyo = Klaviyo(["612"], pointing)
    results = sender(klaviyo).send(events(MAX_EVENTS))
    assert [number for number, result in enumerate(results) if result] == [612]
    assert Counter(klaviyo.calls)[BULK] <= bulk_calls
    assert Counter(klaviyo.calls)[SINGLE] <= 2


@pytest.mark.parametrize("pointing", ["event", "none"])
def test_bulk_calls_stop_after_the_maximum_number_of_rejections(pointing: str) -> None:
    """The other events are then sent individually, because the rate limit of the bulk endpoint is far lower."""
    klaviyo = Klaviyo([str(number) for number in range(200)], pointing)
    results = sender(klaviyo).send(events(200))
    assert all(isinstance(result, Rejected) for result in results)
    assert Counter(klaviyo.calls) == {BULK: MAX_REJECTIONS, SINGLE: 200}


def test_rejected_profile_isolates_its_own_events_only() -> None:
    """These events are sent individually, which can drop an invalid identifier."""
    klaviyo = Klaviyo(["3"], "entry")
    batch = [event(str(number), who=f"{number // 3}@example.com") for number in range(30)]
    results = sender(klaviyo).send(batch)
    assert [number for number, result in enumerate(results) if result] == [3]
    assert Counter(klaviyo.calls) == {BULK: 2, SINGLE: 3}


def test_events_of_a_profile_share_an_entry() -> None:
    """An entry of the call has the profile once, with its events below it."""
    klaviyo = Klaviyo()
    batch = events(12, profiles=3)
    assert sender(klaviyo).send(batch) == [None] * 12
    (body,) = klaviyo.bodies
    entries = orjson.loads(body)["data"]["attributes"]["events-bulk-create"]["data"]
    assert len(entries) == 3
    sent: list[Any] = []
    for entry in entries:
        for each in entry["attributes"]["events"]["data"]:
            attributes = each["attributes"] | {"profile": entry["attributes"]["profile"]}
            sent.append(each | {"attributes": attributes})
    by_id = {each["attributes"]["unique_id"]: each for each in sent}
    assert [by_id[str(number)] for number in range(12)] == [operation.resource for operation in batch]


@pytest.mark.parametrize(("number", "calls"), [(1_000, [1_000]), (1_001, [1_000, 1]), (2_500, [1_000, 1_000, 500])])
def test_call_has_at_most_a_thousand_events(number: int, calls: list[int]) -> None:
    """The next event starts another call."""
    klaviyo = Klaviyo()
    assert sender(klaviyo).send(events(number)) == [None] * number
    assert [len(list(_places(body))) for body in klaviyo.bodies] == calls
    assert len(klaviyo.calls) == len(calls)
    assert len(set(klaviyo.recorded)) == len(klaviyo.recorded) == number


def test_call_has_at_most_five_megabytes() -> None:
    """The limit applies to the sent bytes. The next event starts another call."""
    probe = Klaviyo()
    sender(probe).send([event(str(number), size=1_000_000) for number in range(4)])
    left = MAX_BYTES - len(probe.bodies[0])
    assert 0 < left < 1_000_000
    for spare, calls in ((1_000, 1), (-1_000, 2)):
        klaviyo = Klaviyo()
        sizes = [1_000_000] * 4 + [left - spare]
        batch = [event(str(number), size=size) for number, size in enumerate(sizes)]
        assert sender(klaviyo).send(batch) == [None] * 5
        assert len(klaviyo.calls) == calls
        assert max(map(len, klaviyo.bodies)) <= MAX_BYTES


@given(st.lists(st.tuples(st.integers(0, 900), st.integers(0, 3)), min_size=1, max_size=30))
def test_events_of_any_size_keep_to_the_limits(shapes: list[tuple[int, int]]) -> None:
    """An event that is too large for a bulk call is sent individually."""
    klaviyo = Klaviyo()
    batch = [event(str(n), who=f"{who}@example.com", size=size) for n, (size, who) in enumerate(shapes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bulk, "MAX_BYTES", 1_000)
        patch.setattr(bulk, "MAX_EVENTS", 5)
        assert sender(klaviyo).send(batch) == [None] * len(batch)
    assert all(len(body) <= 1_000 and len(list(_places(body))) <= 5 for body in klaviyo.bodies)
    assert sorted(klaviyo.recorded) == sorted(str(n) for n in range(len(batch)))


def test_call_rejected_as_too_large_is_halved() -> None:
    """Klaviyo can count bytes differently. A 413 names no record."""

    class Small(Klaviyo):
        def call(self, method: str, path: str, body: Body = None, *, idempotent: bool = True) -> Json:
            if callable(body) and len(body()) > 5_000:
                raise Rejected("too large", 413)
            return super().call(method, path, body, idempotent=idempotent)

    klaviyo = Small()
    assert sender(klaviyo).send(events(100)) == [None] * 100
    assert sorted(map(int, klaviyo.recorded)) == list(range(100))
    assert SINGLE not in klaviyo.calls


@pytest.mark.parametrize("failure", [Transient("no answer"), Transient("503"), KlaviyoMisconfigured("401")])
def test_call_without_a_response_is_repeated_in_bulk(failure: Exception) -> None:
    """Klaviyo may have recorded its events. They get the error, and Klaviyo ignores those that it has."""
    klaviyo = Klaviyo()
    klaviyo.failure = failure
    bulk_sender = sender(klaviyo)
    batch = events(20)
    assert bulk_sender.send(batch) == [failure] * 20
    assert klaviyo.calls == [BULK]
    klaviyo.failure = None
    assert bulk_sender.send(batch) == [None] * 20
    assert Counter(klaviyo.calls) == {BULK: 2}


def test_failed_call_does_not_affect_an_earlier_call() -> None:
    """The events of the first call succeed, and those of the second get the error."""

    class Failing(Klaviyo):
        def call(self, method: str, path: str, body: Body = None, *, idempotent: bool = True) -> Json:
            if len(self.bodies) == 1:
                raise Transient("no answer")
            return super().call(method, path, body, idempotent=idempotent)

    klaviyo = Failing()
    results = sender(klaviyo).send(events(2_000))
    assert [result is None for result in results] == [True] * 1_000 + [False] * 1_000


def test_failed_call_does_not_affect_a_later_call() -> None:
    """The events of the first call get the error, and the others are sent in the next call."""

    class Failing(Klaviyo):
        def call(self, method: str, path: str, body: Body = None, *, idempotent: bool = True) -> Json:
            answer = super().call(method, path, body, idempotent=idempotent)
            if len(self.bodies) == 1:
                raise Transient("no answer")
            return answer

    klaviyo = Failing()
    results = sender(klaviyo).send(events(1_500))
    assert [result is None for result in results] == [False] * 1_000 + [True] * 500
    assert Counter(klaviyo.calls) == {BULK: 2}


def test_few_events_are_sent_individually() -> None:
    """Events are sent in bulk only if there are more than the threshold."""
    few, many = Klaviyo(), Klaviyo()
    sender(few, threshold=10).send(events(10))
    sender(many, threshold=10).send(events(11))
    assert few.calls == [SINGLE] * 10
    assert many.calls == [BULK]


def test_events_are_sent_individually_if_bulk_calls_are_not_allowed() -> None:
    """Klaviyo ignores a repeated event for certain only if it is sent individually."""
    klaviyo = Klaviyo()
    assert sender(klaviyo, bulk_events=False).send(events(20)) == [None] * 20
    assert klaviyo.calls == [SINGLE] * 20
    assert sorted(map(int, klaviyo.recorded)) == list(range(20))


def test_permission_is_asked_only_for_many_events() -> None:
    """The first answer can take seconds, for which a few events need not wait."""
    asked: list[bool] = []

    def ask() -> bool:
        asked.append(True)
        return True

    bulk_events = BulkEvents(Klaviyo(), lambda _: (), ask, 10)
    assert bulk_events.select(events(10)) == []
    assert asked == []
    assert len(bulk_events.select(events(11))) == 11
    assert asked == [True]


def test_bulk_call_has_a_unique_id_once() -> None:
    """Klaviyo can know two profiles as one, and would then reject the call. The other event is sent individually."""
    klaviyo = Klaviyo()
    twice = [event("twice", who="a@example.com"), event("twice", who="b@example.com")]
    assert sender(klaviyo).send([*events(5), *twice, event("0", who="0@example.com")]) == [None] * 8
    assert Counter(klaviyo.calls) == {BULK: 1, SINGLE: 1}
    ids = [each for *_, each in _places(klaviyo.bodies[0])]
    assert len(ids) == len(set(ids)) == 6


def test_event_without_unique_id_is_not_sent_in_bulk() -> None:
    """Klaviyo would treat two events of the same second as duplicates and reject the bulk call."""
    klaviyo = Klaviyo()
    nameless = [event("", who=f"{n}@example.com") for n in range(3)]
    assert not BulkEvents(klaviyo, lambda _: (), lambda: True, 0).select(nameless)


def test_repr_of_a_waiting_event_has_no_personal_data() -> None:
    """A repr can appear in a log or a traceback."""
    record = bulk._bulk_event(event("1", who="ada@example.com"), bulk._SendProgress(0, 0))
    entry = jobs.JobEntry("c1", b'{"email":"ada@example.com"}')
    assert "ada" not in repr([record, entry])
