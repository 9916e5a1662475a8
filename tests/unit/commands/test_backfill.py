"""The parts of a backfill that need no network."""

from __future__ import annotations

import io
import os
import time
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from importlib import import_module
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.base import Failure
from worker.commands.backfill import queue as queue_module
from worker.commands.backfill.backfill import count_remaining
from worker.commands.backfill.checkpoint import BackfillProgress, Checkpoint, FailureLog, checkpoint_key, read_ids
from worker.commands.backfill.pages import open_pages
from worker.commands.backfill.queue import RecordQueue
from worker.commands.backfill.recorder import BackfillRecorder
from worker.commands.backfill.records import (
    RECORD_KINDS,
    BackfillRecord,
    RecordDelivery,
    RecordSelection,
    mark_as_backfill,
    notifications_for,
)
from worker.commands.progress_bar import Rate, StatusLine, format_bar, format_duration, show_progress
from worker.commercetools.client import Commercetools
from worker.errors import Disposition, Ignored, Rejected, SettingsError, Transient
from worker.model import Ended, Ending, Message, Operation, OperationKind, Outcome
from worker.parse import parse
from worker.send.events import bulk_body
from worker.transform.order_events import event_operation

if TYPE_CHECKING:
    from pathlib import Path

    from worker.commercetools.queries import QueryResult

OUTCOMES = ("sent", "ignored", "failed")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(st.characters(codec="utf-8"), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "typeId", "payments"]), inner),
    max_leaves=8,
)
FIELDS = st.sampled_from(["id", "createdAt", "lastModifiedAt", "orderState", "shipmentState", "paymentInfo"])


@given(st.lists(st.lists(st.sampled_from(OUTCOMES), min_size=1, max_size=4), max_size=12), st.data())
def test_record_counts_once_all_earlier_records_are_complete(records: list[list[str]], data: st.DataObject) -> None:
    """Messages complete in any order; `last_id` is the last record without a gap before it."""
    progress = BackfillProgress()
    records_in_order = [BackfillRecord(f"{number:02}", len(messages)) for number, messages in enumerate(records)]
    for record in records_in_order:
        progress.start(record)
    outcomes = [(index, outcome) for index, messages in enumerate(records) for outcome in messages]
    seen: dict[int, list[str]] = {index: [] for index in range(len(records))}
    for index, outcome in data.draw(st.permutations(outcomes)):
        progress.complete_message(
            records_in_order[index], is_sent=outcome == "sent", failure="bad" if outcome == "failed" else ""
        )
        seen[index].append(outcome)
        whole = next((i for i in range(len(records)) if len(seen[i]) < len(records[i])), len(records))
        ended = [seen[i] for i in range(whole)]
        assert progress.last_id == (records_in_order[whole - 1].id if whole else "")
        assert progress.done == whole
        assert progress.failed.total() == sum("failed" in outcomes for outcomes in ended)
        assert progress.ignored == sum(set(outcomes) == {"ignored"} for outcomes in ended)


@pytest.mark.parametrize("name", RECORD_KINDS)
@settings(max_examples=30)
@given(st.dictionaries(FIELDS, JSON))
def test_malformed_resources_still_become_notifications(name: str, resource: dict[str, Any]) -> None:
    """Each record has at least one, so that a malformed resource fails alone instead of being skipped."""
    resource = orjson.loads(orjson.dumps(resource))
    messages = notifications_for(RecordSelection(name), resource)
    assert messages
    for message in messages:
        with suppress(Rejected, Ignored):
            assert parse(message).payload["notificationType"] == "Message"


PARCEL = {"id": "parcel-1", "createdAt": "2025-01-04T00:00:00.000Z"}


def test_order_becomes_its_history() -> None:
    """The order was placed when it was created. States and refunds have the time of its last change."""
    order = {
        "id": "o",
        "createdAt": "2025-01-01T00:00:00.000Z",
        "lastModifiedAt": "2025-02-01T00:00:00.000Z",
        "orderState": "Complete",
        "shipmentState": "Shipped",
        "shippingInfo": {"deliveries": [{"createdAt": "2025-01-03T00:00:00.000Z", "parcels": [PARCEL]}]},
        "state": {"typeId": "state", "id": "s"},
        "returnInfo": [{"returnDate": "2025-01-09T00:00:00.000Z"}, {"returnTrackingId": "r"}],
        "paymentInfo": {"payments": [{"typeId": "payment", "id": "p"}]},
    }
    messages = [parse(body) for body in notifications_for(RecordSelection("orders"), order)]
    assert [(m.type, m.resource_id, m.time) for m in messages] == [
        ("OrderCreated", "o", "2025-01-01T00:00:00.000Z"),
        ("DeliveryAdded", "o", "2025-01-03T00:00:00.000Z"),
        ("ParcelAddedToDelivery", "o", "2025-01-04T00:00:00.000Z"),
        ("OrderStateChanged", "o", "2025-02-01T00:00:00.000Z"),
        ("OrderShipmentStateChanged", "o", "2025-02-01T00:00:00.000Z"),
        ("OrderStateTransition", "o", "2025-02-01T00:00:00.000Z"),
        ("ReturnInfoAdded", "o", "2025-01-09T00:00:00.000Z"),
        ("ReturnInfoAdded", "o", "2025-02-01T00:00:00.000Z"),
        ("PaymentTransactionAdded", "p", "2025-02-01T00:00:00.000Z"),
    ]
    payload = {key: value for message in messages for key, value in message.payload.items()}
    assert (payload["orderState"], payload["shipmentState"]) == ("Complete", "Shipped")
    assert (payload["parcel"], payload["state"]["id"]) == (PARCEL, "s")
    assert payload["returnInfo"] == {"returnTrackingId": "r"}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("customers", "CustomerCreated"), ("products", "ProductPublished"), ("categories", "CategoryCreated")],
)
def test_other_records_become_one_notification_without_content(name: str, kind: str) -> None:
    """The stages read the record again; an updated category would include all its descendants."""
    (body,) = notifications_for(RecordSelection(name), {"id": "x", "email": "ada@example.com"})
    message = parse(body)
    assert (message.type, message.resource_id, message.time) == (kind, "x", None)
    assert b"example.com" not in body


def placed(unique_id: str) -> Operation:
    profile = {"email": "ada@example.com"}
    return event_operation(
        metric="M", unique_id=unique_id, time="2025-01-01", value=None, profile=profile, properties={}
    )


def test_only_events_of_a_backfill_are_marked() -> None:
    """The attribute is on the event and, in a bulk call, also on its entry. No other body changes."""
    operation, live = mark_as_backfill(placed("1")), placed("1")
    assert operation.resource is not None
    assert live.resource is not None
    assert operation.resource["attributes"] == live.resource["attributes"] | {"backfill": True}
    assert operation.key == live.key
    profile = Operation(OperationKind.UPSERT_PROFILE, "c", {"type": "profile", "attributes": {}})
    assert mark_as_backfill(profile) is profile
    (entry,) = orjson.loads(bulk_body([operation, mark_as_backfill(placed("2"))]))["data"]["attributes"][
        "events-bulk-create"
    ]["data"]
    assert entry["attributes"]["backfill"] is True
    assert [each["attributes"]["backfill"] for each in entry["attributes"]["events"]["data"]] == [True, True]
    assert b"backfill" not in bulk_body([live])


def test_times_become_a_predicate_on_the_time_field() -> None:
    """Orders are compared by creation, all other records by last change: since <= time < until."""
    since, until = datetime(2025, 1, 1, tzinfo=UTC), datetime(2025, 2, 1, 12, 30, 0, 250_000, tzinfo=UTC)
    assert RecordSelection("orders").where == ""
    assert RecordSelection("orders", since, until).where == (
        'createdAt >= "2025-01-01T00:00:00.000Z" and createdAt < "2025-02-01T12:30:00.250Z"'
    )
    for name in ("customers", "products", "categories"):
        assert RecordSelection(name, since).where == 'lastModifiedAt >= "2025-01-01T00:00:00.000Z"'


# Files


KEY = checkpoint_key(RecordSelection("orders"), "shop")


def test_checkpoint_is_loaded_as_saved(tmp_path: Path) -> None:
    """A temporary file left by a crash is replaced."""
    checkpoint = Checkpoint(tmp_path / "c.json", KEY)
    assert checkpoint.load() == BackfillProgress()
    (tmp_path / f"c.json.{os.getpid()}.tmp").write_text("{")
    saved = BackfillProgress("o-7", 3, 2, Counter({"bad": 2}))
    checkpoint.save(saved)
    assert checkpoint.load() == saved
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]
    counts = {"last_id": "o-7", "sent": 3, "ignored": 2, "failed": {"bad": 2}}
    assert orjson.loads(checkpoint.path.read_bytes()) == KEY | counts


def test_failed_save_keeps_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk or a crash never leaves a partial file."""
    checkpoint = Checkpoint(tmp_path / "c.json", KEY)
    checkpoint.save(BackfillProgress("o-7", 3))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(BackfillProgress("o-8", 4))
    assert checkpoint.load() == BackfillProgress("o-7", 3)


def test_two_processes_can_save_the_same_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process replaces the whole file, even while the other saves."""
    checkpoint, sync, other = Checkpoint(tmp_path / "c.json", KEY), os.fsync, os.getpid() + 1

    def save_in_other_process(_: int) -> None:
        monkeypatch.setattr(os, "fsync", sync)
        monkeypatch.setattr(os, "getpid", lambda: other)
        checkpoint.save(BackfillProgress("o-7", 3))
        assert checkpoint.load() == BackfillProgress("o-7", 3)

    monkeypatch.setattr(os, "fsync", save_in_other_process)
    checkpoint.save(BackfillProgress("o-8", 4))
    assert checkpoint.load() == BackfillProgress("o-8", 4)


GOOD = KEY | {"last_id": "o-7", "sent": 3, "ignored": 2, "failed": {"bad": 2}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        orjson.dumps(KEY),
        *(
            orjson.dumps(GOOD | {name: bad})
            for name in ("last_id", "sent", "ignored", "failed")
            for bad in (None, -1, [1], 1.5)
        ),
        orjson.dumps(GOOD | {"failed": {"bad": "2"}}),
        orjson.dumps(GOOD)[:-9],
    ],
)
def test_damaged_checkpoint_is_rejected(content: bytes, tmp_path: Path) -> None:
    """The backfill does not start over by itself; the error says what to do."""
    (tmp_path / "c.json").write_bytes(content)
    with pytest.raises(
        SettingsError,
        match=r"^--checkpoint: .*c\.json is damaged or not a checkpoint: use another file, or delete it to start over$",
    ):
        Checkpoint(tmp_path / "c.json", KEY).load()


@pytest.mark.parametrize(
    ("selection", "project", "name"),
    [
        (RecordSelection("customers"), "shop", "backfill"),
        (RecordSelection("orders"), "other", "project"),
        (RecordSelection("orders", since=datetime(2025, 1, 1, tzinfo=UTC)), "shop", "since"),
        (RecordSelection("orders", until=datetime(2025, 1, 1, tzinfo=UTC)), "shop", "until"),
        (RecordSelection("orders", ids=("o-1",)), "shop", "ids"),
    ],
)
def test_checkpoint_of_another_backfill_is_rejected(
    selection: RecordSelection, project: str, name: str, tmp_path: Path
) -> None:
    """Its last id has no meaning for another selection."""
    Checkpoint(tmp_path / "c.json", KEY).save(BackfillProgress("o-7"))
    with pytest.raises(SettingsError, match=f"with another {name}: repeat the options"):
        Checkpoint(tmp_path / "c.json", checkpoint_key(selection, project)).load()


def test_failures_file_is_valid_input_for_ids(tmp_path: Path) -> None:
    """A line that a crash truncated is ended before the next line is added."""
    path = tmp_path / "failures.jsonl"
    path.write_bytes(b'{"resource_ty')
    FailureLog(path).add({"resource_type": "order", "resource_id": "o-1"})
    assert path.read_bytes() == b'{"resource_ty\n{"resource_type":"order","resource_id":"o-1"}\n'
    with pytest.raises(SettingsError, match=r"--ids: .*, line 1: expected an id or a line"):
        read_ids(path, "order")
    path.write_text('o-3\n\n{"resource_type": "order", "resource_id": "o-1"}\n')
    assert read_ids(path, "order") == ["o-3", "o-1"]
    with pytest.raises(SettingsError, match=r"line 3: expected a failure of the kind customer"):
        read_ids(path, "customer")
    with pytest.raises(SettingsError, match="--ids: cannot read"):
        read_ids(tmp_path / "nowhere", "order")


# The queue


class FakeCommercetools(Commercetools):
    """A client with pages of two resources. Each entry of `errors` is raised by one call."""

    def __init__(self, *resources: dict[str, Any]) -> None:
        self.resources = list(resources)
        self.errors: list[Exception] = []

    def page(self, query: Any, where: str = "", after: str = "") -> list[dict[str, Any]]:
        self._raise_next()
        return [resource for resource in self.resources if str(resource.get("id", "")) > after][:2]

    def find(self, query: Any, values: Any) -> QueryResult:
        self._raise_next()
        found = {value: [r for r in self.resources if r["id"] == value] for value in values}
        return {value: Rejected("refused") if value == "refused" else each for value, each in found.items()}

    def count(self, query: Any, where: str = "", after: str = "") -> int:
        self._raise_next()
        return len(self.resources)

    def _raise_next(self) -> None:
        if self.errors:
            raise self.errors.pop()


class Harness:
    """A RecordQueue that reads from FakeCommercetools."""

    def __init__(
        self, commercetools: FakeCommercetools, name: str = "customers", limit: int | None = None, **more: Any
    ) -> None:
        selection = RecordSelection(name, **more)
        self.progress = BackfillProgress()
        self.recorder = BackfillRecorder(self.progress, selection.kind.resource_type, None, None)
        self.down = ""
        self.queue = RecordQueue(
            open_pages(commercetools, selection, ""), selection, self.recorder, limit, lambda: self.down
        )

    def receive(self, number: int = 10) -> list[RecordDelivery]:
        return list(self.queue.receive(number, 0.0))

    def receive_all(self) -> list[str]:
        found: list[str] = []
        while self.queue.backlog():
            found += [delivery.id for delivery in self.receive()]
        return found


def customers(*ids: str) -> list[dict[str, Any]]:
    return [{"id": name} for name in ids]


def test_pages_continue_after_the_last_id() -> None:
    """Each record is read once; a record created during the run is included if its id comes later."""
    commercetools = FakeCommercetools(*customers("b", "d", "f"))
    harness = Harness(commercetools)
    assert [delivery.id for delivery in harness.receive()] == ["b", "d"]
    commercetools.resources = customers("a", "b", "d", "e", "f")
    assert harness.receive_all() == ["e", "f"]


def test_failed_page_is_requested_again() -> None:
    """A long outage neither skips records nor ends the backfill."""
    commercetools = FakeCommercetools(*customers("a", "b", "c"))
    harness = Harness(commercetools)
    harness.receive()
    commercetools.errors = [Transient("down")] * 3
    assert [harness.receive() for _ in range(3)] == [[], [], []]
    assert harness.receive_all() == ["c"]


def test_page_without_ids_is_a_transient_error() -> None:
    """The next page cannot be requested without the last id."""
    commercetools = FakeCommercetools()
    commercetools.page = lambda *_: [{"id": "a"}, {"id": 7}]  # type: ignore[method-assign]
    with pytest.raises(Transient, match="without ids"):
        open_pages(commercetools, RecordSelection("customers"), "").next_page()


def test_limit_ends_the_backfill_within_a_page() -> None:
    """The rest of the page is not sent."""
    assert Harness(FakeCommercetools(*customers("a", "b", "c", "d")), limit=3).receive_all() == ["a", "b", "c"]


def test_missing_and_rejected_ids_fail(caplog: pytest.LogCaptureFixture) -> None:
    """The others are sent. A notification for a missing product would delete it."""
    harness = Harness(FakeCommercetools(*customers("a", "c")), ids=("a", "b", "c", "refused"))
    assert harness.receive_all() == ["a", "c"]
    assert harness.recorder.completed == 2
    reasons = {record.__dict__["resource_id"]: record.__dict__["reason"] for record in caplog.records}
    assert reasons == {"b": "commercetools has no such customer", "refused": "refused"}


def test_selected_ids_continue_after_the_last_id() -> None:
    """After a transient error, the whole page is requested again."""
    commercetools = FakeCommercetools(*customers("a", "b", "c"))
    named = open_pages(commercetools, RecordSelection("customers", ids=("a", "b", "c")), "b")
    assert named.count() == 1
    find, down = commercetools.find, {"c": Transient("down")}
    commercetools.find = lambda *_: down  # type: ignore[method-assign, assignment]
    with pytest.raises(Transient):
        named.next_page()
    commercetools.find = find  # type: ignore[method-assign]
    assert named.next_page() == [("c", {"id": "c"})]
    assert named.next_page() == []


def test_retried_message_is_not_complete() -> None:
    """The record is counted after its last outcome."""
    harness = Harness(FakeCommercetools(*customers("a")))
    (delivery,) = harness.receive()
    retried, done = Message(delivery, 0.0), Message(delivery, 0.0)
    retried.outcome = Outcome(Disposition.NACK, "send", Transient("down"))
    done.outcome = Outcome(Disposition.ACK, "transform", Ignored("no effect"))
    harness.recorder.on_endings([Ended(retried, Ending.RETRIED)])
    assert (harness.recorder.completed, harness.progress.done) == (0, 0)
    harness.recorder.on_endings([Ended(done, Ending.IGNORED)])
    assert (harness.recorder.completed, harness.progress.ignored) == (1, 1)


def test_recently_changed_order_is_delayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker sends it first, which can start flows; customers have no events and no delay."""
    monkeypatch.setattr(queue_module, "ORDER_DELAY", 0.5)
    now = datetime.now(UTC)
    recent = {"id": "a", "lastModifiedAt": (now + timedelta(hours=1)).isoformat()}  # clocks differ
    old = {"id": "b", "lastModifiedAt": (now - timedelta(seconds=1)).isoformat()}
    harness = Harness(FakeCommercetools(recent, old), "orders")
    assert [delivery.id for delivery in harness.receive()] == ["b"]
    assert harness.receive_all() == ["a"]
    assert [delivery.id for delivery in Harness(FakeCommercetools(recent)).receive()] == ["a"]


def test_no_page_is_read_while_too_many_messages_are_delayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded even if all orders have just changed."""
    monkeypatch.setattr(queue_module, "ORDER_DELAY", 0.5)
    monkeypatch.setattr(queue_module, "MAX_DELAYED", 2)
    recent = {"lastModifiedAt": (datetime.now(UTC) + timedelta(hours=1)).isoformat()}
    harness = Harness(FakeCommercetools(*({"id": name} | recent for name in "abcdef")), "orders")
    for _ in range(5):
        assert harness.receive() == []
    assert harness.queue.backlog() == 3  # two orders, and one for the unread records
    assert harness.receive_all() == ["a", "b", "c", "d", "e", "f"]


@pytest.mark.parametrize("error", ["CircuitOpen", "Transient", "WorkerError"])
def test_message_that_always_fails_is_a_failure(error: str) -> None:
    """Otherwise the backfill would never end, and its checkpoint would stay before this record."""
    harness = Harness(FakeCommercetools(*customers("a", "b")))
    failing, _ = harness.receive()
    for number in range(queue_module.MAX_TRIES):
        assert (number, harness.progress.failed) == (number, {})
        harness.queue.nack([failing], 0.0, Failure("500", "send", error))
        assert harness.receive() == ([failing] if number + 1 < queue_module.MAX_TRIES else [])
    assert harness.progress.failed == {"500": 1}
    assert harness.progress.last_id == "a"


def test_message_does_not_fail_because_a_service_is_down() -> None:
    """The backfill waits for the end of the outage, however long it lasts."""
    harness = Harness(FakeCommercetools(*customers("a")))
    harness.down = "503"
    for _ in range(2 * queue_module.MAX_TRIES):
        (delivery,) = harness.receive()
        harness.queue.nack([delivery], 0.0, Failure("503", "send", "CircuitOpen"))
    assert harness.receive_all() == ["a"]


def test_returned_message_is_no_failure() -> None:
    """The worker gave it back without processing it, because it stops or because too many messages wait."""
    harness = Harness(FakeCommercetools(*customers("a")))
    for _ in range(2 * queue_module.MAX_TRIES):
        (delivery,) = harness.receive()
        harness.queue.nack([delivery])
    assert harness.receive_all() == ["a"]


def test_nack_delay_is_kept() -> None:
    """The pipeline sets the delay."""
    harness = Harness(FakeCommercetools(*customers("a")))
    (delivery,) = harness.receive()
    harness.queue.nack([delivery], 0.3, Failure("down", "send", "Outage"))
    assert harness.receive() == []
    assert harness.queue.backlog() == 1
    assert harness.receive_all() == ["a"]


# Progress and summary


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def rate_of(done: int, total: int | None, seconds: float = 10.0) -> Rate:
    """Return the rate of a run that started `seconds` ago."""
    counts = iter([0])
    rate = Rate(lambda: next(counts, done), total)
    rate._started_at -= seconds
    return rate


def test_bar_shows_rate_and_time_left() -> None:
    """Unknown values are left out."""
    expected = "orders [######                  ] 25%  500 of 2,000  50/s  30 s left"
    assert format_bar("orders", rate_of(500, 2_000)) == expected
    assert format_bar("orders", rate_of(500, None)) == "orders 500  50/s"
    assert format_bar("orders", rate_of(0, 2_000)).endswith("0 of 2,000  0.0/s")
    assert [format_duration(each) for each in (42.3, 200, 7_500)] == ["42 s", "3 min 20 s", "2 h 5 min"]


def test_earlier_runs_count_as_done_but_not_for_the_rate() -> None:
    """A limit applies to this run."""
    recorder = BackfillRecorder(BackfillProgress("x", 50), "order", None, None)
    rate = Rate(lambda: recorder.completed, 150)
    assert (rate.total, rate.done, rate.per_second, rate.seconds_left) == (200, 50, 0.0, None)
    commercetools = FakeCommercetools(*customers("a", "b", "c"))
    counted = [
        count_remaining(open_pages(commercetools, RecordSelection("customers"), ""), limit) for limit in (None, 2, 7)
    ]
    assert counted == [3, 2, 3]
    commercetools.errors = [Transient("down")]
    assert count_remaining(open_pages(commercetools, RecordSelection("customers"), ""), None) is None


def test_time_without_offset_is_utc(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time zone of the machine has no effect."""
    moment = import_module("worker.cli.backfill")._parse_time
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        noon = datetime(2026, 1, 31, 12, tzinfo=UTC)
        assert moment("--since", "2026-01-31T12:00") == moment("--since", "2026-01-31T13:00+01:00") == noon
        assert moment("--since", "2026-01-31") == datetime(2026, 1, 31, tzinfo=UTC)
    finally:
        monkeypatch.delenv("TZ")
        time.tzset()


def test_log_lines_appear_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar is erased and drawn again below; it is never longer than a line."""
    monkeypatch.setenv("COLUMNS", "4")
    terminal = FakeTerminal()
    status_line = StatusLine(terminal)
    with show_progress("orders", rate_of(0, 1), status_line):
        drawn = terminal.getvalue()
        status_line.draw("bar that is longer")
        status_line.write("line\n")
    assert terminal.getvalue() == f"{drawn}\r\033[Kbar\r\033[Kline\nbar\r\033[K"


def test_summary_counts_records_per_reason() -> None:
    """The most frequent reason comes first."""
    progress = BackfillProgress("x", 5, 1, Counter({"rare": 1, "frequent": 3}))
    assert import_module("worker.cli.backfill")._summarize("orders", progress, rate_of(10, 10)) == [
        "orders: 10 done: 5 sent, 1 ignored, 4 failed; this run took 10 s, 1 per second",
        "failed: 3 x frequent",
        "failed: 1 x rare",
    ]


def test_summary_cannot_steer_a_terminal() -> None:
    """A reason can contain Klaviyo's title and pointer."""
    progress = BackfillProgress("x", failed=Counter({"bad\x1b]0;x\x07\nFORGED line": 1}))
    lines = import_module("worker.cli.backfill")._summarize("orders", progress, rate_of(10, 10))
    assert lines[1] == "failed: 1 x bad\\u001b]0;x\\u0007\\nFORGED line"


def test_files_of_a_backfill_are_private_and_follow_no_link(tmp_path: Path) -> None:
    """They contain ids of people. Another user of the machine can have made a link with the name of the file."""
    umask = os.umask(0o022)
    try:
        checkpoint, failures = tmp_path / "c.json", tmp_path / "f.jsonl"
        leftover = tmp_path / f"c.json.{os.getpid()}.tmp"
        leftover.symlink_to(tmp_path / "victim")
        Checkpoint(checkpoint, {}).save(BackfillProgress())
        FailureLog(failures).add({"resource_id": "c-1"})
    finally:
        os.umask(umask)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "c.json": 0o600,
        "f.jsonl": 0o600,
    }
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match=r"[Ss]ymbolic"):
        FailureLog(tmp_path / "link")
    assert not (tmp_path / "victim").exists()
