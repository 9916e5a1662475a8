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
from worker.commands.backfill import queue as source_module
from worker.commands.backfill.backfill import to_end
from worker.commands.backfill.checkpoint import Checkpoint, Failures, describe, read_ids
from worker.commands.backfill.listing import listing
from worker.commands.backfill.progress import Progress, Record, RecordDelivery
from worker.commands.backfill.queue import Source
from worker.commands.backfill.recorder import Recorder
from worker.commands.backfill.records import COLLECTIONS, Selection, as_history, bodies
from worker.commands.progress_bar import Pace, Screen, bar, duration, shown
from worker.errors import Disposition, Ignored, Rejected, SettingsError, Transient
from worker.model import Message, Operation, OperationKind, Outcome
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
def test_only_what_ended_without_a_gap_counts(records: list[list[str]], data: st.DataObject) -> None:
    """In whatever order messages end: the last id is that of the last record before which all have ended."""
    progress = Progress()
    begun = [Record(f"{number:02}", len(messages)) for number, messages in enumerate(records)]
    for record in begun:
        progress.begin(record)
    endings = [(index, outcome) for index, messages in enumerate(records) for outcome in messages]
    seen: dict[int, list[str]] = {index: [] for index in range(len(records))}
    for index, outcome in data.draw(st.permutations(endings)):
        progress.end(begun[index], is_sent=outcome == "sent", failure="bad" if outcome == "failed" else "")
        seen[index].append(outcome)
        whole = next((i for i in range(len(records)) if len(seen[i]) < len(records[i])), len(records))
        ended = [seen[i] for i in range(whole)]
        assert progress.last_id == (begun[whole - 1].id if whole else "")
        assert progress.done == whole
        assert progress.failed.total() == sum("failed" in outcomes for outcomes in ended)
        assert progress.nothing_to_do == sum(set(outcomes) == {"ignored"} for outcomes in ended)


@pytest.mark.parametrize("name", COLLECTIONS)
@settings(max_examples=30)
@given(st.dictionaries(FIELDS, JSON))
def test_hostile_resources_make_messages_that_can_be_judged(name: str, resource: dict[str, Any]) -> None:
    """At least one each, so that no record passes unseen; what is odd about it fails that record alone."""
    resource = orjson.loads(orjson.dumps(resource))
    messages = bodies(Selection(name), resource)
    assert messages
    for message in messages:
        with suppress(Rejected, Ignored):
            assert parse(message).payload["notificationType"] == "Message"


def test_an_order_is_its_history() -> None:
    """Placed at its creation; its states and refunds, whose time is not known, no later than its last change."""
    order = {
        "id": "o",
        "createdAt": "2025-01-01T00:00:00.000Z",
        "lastModifiedAt": "2025-02-01T00:00:00.000Z",
        "orderState": "Complete",
        "shipmentState": "Shipped",
        "paymentInfo": {"payments": [{"typeId": "payment", "id": "p"}]},
    }
    messages = [parse(body) for body in bodies(Selection("orders"), order)]
    assert [(m.type, m.resource_id, m.time) for m in messages] == [
        ("OrderCreated", "o", "2025-01-01T00:00:00.000Z"),
        ("OrderStateChanged", "o", "2025-02-01T00:00:00.000Z"),
        ("OrderShipmentStateChanged", "o", "2025-02-01T00:00:00.000Z"),
        ("PaymentTransactionAdded", "p", "2025-02-01T00:00:00.000Z"),
    ]
    assert messages[1].payload["orderState"] == "Complete"
    assert messages[2].payload["shipmentState"] == "Shipped"


@pytest.mark.parametrize(
    ("name", "kind"),
    [("customers", "CustomerCreated"), ("products", "ProductPublished"), ("categories", "CategoryCreated")],
)
def test_a_mirror_is_one_message_that_says_nothing(name: str, kind: str) -> None:
    """What commercetools holds when it is sent counts; an updated category would bring all its descendants along."""
    (body,) = bodies(Selection(name), {"id": "x", "email": "ada@example.com"})
    message = parse(body)
    assert (message.type, message.resource_id, message.time) == (kind, "x", None)
    assert b"example.com" not in body


def placed(unique_id: str) -> Operation:
    profile = {"email": "ada@example.com"}
    return event_operation(
        metric="M", unique_id=unique_id, time="2025-01-01", value=None, profile=profile, properties={}
    )


def test_only_events_of_a_backfill_are_marked_as_history() -> None:
    """One by one on the event, in bulk on the event and on its entry; no other body changes."""
    operation, live = as_history(placed("1")), placed("1")
    assert operation.resource is not None
    assert live.resource is not None
    assert operation.resource["attributes"] == live.resource["attributes"] | {"backfill": True}
    assert operation.key == live.key
    profile = Operation(OperationKind.UPSERT_PROFILE, "c", {"type": "profile", "attributes": {}})
    assert as_history(profile) is profile
    (entry,) = orjson.loads(bulk_body([operation, as_history(placed("2"))]))["data"]["attributes"][
        "events-bulk-create"
    ]["data"]
    assert entry["attributes"]["backfill"] is True
    assert [each["attributes"]["backfill"] for each in entry["attributes"]["events"]["data"]] == [True, True]
    assert b"backfill" not in bulk_body([live])


def test_a_time_becomes_a_predicate_on_the_right_field() -> None:
    """Orders by their creation, all others by their last change; from the first moment on, before the second."""
    since, until = datetime(2025, 1, 1, tzinfo=UTC), datetime(2025, 2, 1, 12, 30, 0, 250_000, tzinfo=UTC)
    assert Selection("orders").where == ""
    assert Selection("orders", since, until).where == (
        'createdAt >= "2025-01-01T00:00:00.000Z" and createdAt < "2025-02-01T12:30:00.250Z"'
    )
    for name in ("customers", "products", "categories"):
        assert Selection(name, since).where == 'lastModifiedAt >= "2025-01-01T00:00:00.000Z"'


# Files


ABOUT = describe(Selection("orders"), "shop")


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    """Also over one whose writing was cut short, which left its temporary file."""
    checkpoint = Checkpoint(tmp_path / "c.json", ABOUT)
    assert checkpoint.load() == Progress()
    (tmp_path / f"c.json.{os.getpid()}.tmp").write_text("{")
    saved = Progress("o-7", 3, 2, Counter({"bad": 2}))
    checkpoint.save(saved)
    assert checkpoint.load() == saved
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, a crash: there is always a whole file."""
    checkpoint = Checkpoint(tmp_path / "c.json", ABOUT)
    checkpoint.save(Progress("o-7", 3))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(Progress("o-8", 4))
    assert checkpoint.load() == Progress("o-7", 3)


def test_two_runs_with_one_checkpoint_do_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each replaces it as a whole, also while the other writes: either's progress is true."""
    checkpoint, sync, other = Checkpoint(tmp_path / "c.json", ABOUT), os.fsync, os.getpid() + 1

    def meanwhile(_: int) -> None:
        monkeypatch.setattr(os, "fsync", sync)
        monkeypatch.setattr(os, "getpid", lambda: other)
        checkpoint.save(Progress("o-7", 3))
        assert checkpoint.load() == Progress("o-7", 3)

    monkeypatch.setattr(os, "fsync", meanwhile)
    checkpoint.save(Progress("o-8", 4))
    assert checkpoint.load() == Progress("o-8", 4)


GOOD = ABOUT | {"last_id": "o-7", "sent": 3, "nothing_to_do": 2, "failed": {"bad": 2}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        orjson.dumps(ABOUT),
        *(orjson.dumps(GOOD | {name: bad}) for name in ("last_id", "sent", "failed") for bad in (None, -1, [1], 1.5)),
        orjson.dumps(GOOD | {"failed": {"bad": "2"}}),
        orjson.dumps(GOOD)[:-9],
    ],
)
def test_a_damaged_checkpoint_is_refused(content: bytes, tmp_path: Path) -> None:
    """It is never taken for a beginning, nor for the end of another; the error says what to do."""
    (tmp_path / "c.json").write_bytes(content)
    with pytest.raises(SettingsError, match=r"--resume: .*c\.json is damaged or no checkpoint: .* delete it"):
        Checkpoint(tmp_path / "c.json", ABOUT).load()


@pytest.mark.parametrize(
    ("selection", "project", "name"),
    [
        (Selection("customers"), "shop", "backfill"),
        (Selection("orders"), "other", "project"),
        (Selection("orders", since=datetime(2025, 1, 1, tzinfo=UTC)), "shop", "since"),
        (Selection("orders", until=datetime(2025, 1, 1, tzinfo=UTC)), "shop", "until"),
        (Selection("orders", ids=("o-1",)), "shop", "ids"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(
    selection: Selection, project: str, name: str, tmp_path: Path
) -> None:
    """Its last id means nothing there."""
    Checkpoint(tmp_path / "c.json", ABOUT).save(Progress("o-7"))
    with pytest.raises(SettingsError, match=f"with other {name}: repeat the options"):
        Checkpoint(tmp_path / "c.json", describe(selection, project)).load()


def test_failures_are_added_and_can_be_named_again(tmp_path: Path) -> None:
    """Behind a line that a crash cut short, too."""
    path = tmp_path / "failures.jsonl"
    path.write_bytes(b'{"resource_ty')
    Failures(path).add({"resource_type": "order", "resource_id": "o-1"})
    assert path.read_bytes() == b'{"resource_ty\n{"resource_type":"order","resource_id":"o-1"}\n'
    with pytest.raises(SettingsError, match=r"--ids: .*, line 1: expected an id"):
        read_ids(path, "order")
    path.write_text('o-3\n\n{"resource_type": "order", "resource_id": "o-1"}\n')
    assert read_ids(path, "order") == ["o-3", "o-1"]
    with pytest.raises(SettingsError, match=r"line 3: expected a failure of this kind, customer"):
        read_ids(path, "customer")
    with pytest.raises(SettingsError, match="--ids: cannot read"):
        read_ids(tmp_path / "nowhere", "order")


# The source


class FakeShop:
    """Pages of two, which fail when told to."""

    def __init__(self, *resources: dict[str, Any]) -> None:
        self.resources = list(resources)
        self.errors: list[Exception] = []

    def page(self, query: Any, where: str, after: str) -> list[dict[str, Any]]:
        self.fail()
        return [resource for resource in self.resources if str(resource.get("id", "")) > after][:2]

    def find(self, query: Any, values: Any) -> QueryResult:
        self.fail()
        found = {value: [r for r in self.resources if r["id"] == value] for value in values}
        return {value: Rejected("refused") if value == "refused" else each for value, each in found.items()}

    def count(self, query: Any, where: str, after: str) -> int:
        self.fail()
        return len(self.resources)

    def fail(self) -> None:
        if self.errors:
            raise self.errors.pop()


class Harness:
    """A source over a fake shop."""

    def __init__(self, shop: FakeShop, name: str = "customers", limit: int | None = None, **more: Any) -> None:
        selection = Selection(name, **more)
        self.progress = Progress()
        self.recorder = Recorder(self.progress, selection.collection.resource_type, None, None)
        self.source = Source(listing(shop, selection, ""), selection, self.recorder, limit)

    def receive(self, number: int = 10) -> list[RecordDelivery]:
        return list(self.source.receive(number, 0.0))

    def all(self) -> list[str]:
        found: list[str] = []
        while self.source.backlog():
            found += [message.id for message in self.receive()]
        return found


def customers(*ids: str) -> list[dict[str, Any]]:
    return [{"id": name} for name in ids]


def test_pages_go_on_after_the_last_id() -> None:
    """Each record once, also those that come while pages are read, if their id is still ahead."""
    shop = FakeShop(*customers("b", "d", "f"))
    harness = Harness(shop)
    assert [message.id for message in harness.receive()] == ["b", "d"]
    shop.resources = customers("a", "b", "d", "e", "f")
    assert harness.all() == ["e", "f"]


def test_a_page_that_cannot_be_read_is_read_again() -> None:
    """However often: an outage neither skips records nor ends the backfill."""
    shop = FakeShop(*customers("a", "b", "c"))
    harness = Harness(shop)
    harness.receive()
    shop.errors = [Transient("down")] * 3
    assert [harness.receive() for _ in range(3)] == [[], [], []]
    assert harness.all() == ["c"]


def test_records_without_ids_are_not_passed_over() -> None:
    """Nobody could tell the page after them."""
    shop = FakeShop()
    shop.page = lambda *_: [{"id": "a"}, {"id": 7}]  # type: ignore[method-assign]
    with pytest.raises(Transient, match="without ids"):
        listing(shop, Selection("customers"), "").next_page()


def test_a_limit_ends_it() -> None:
    """In the middle of a page, too."""
    assert Harness(FakeShop(*customers("a", "b", "c", "d")), limit=3).all() == ["a", "b", "c"]


def test_named_records_that_are_not_there_have_failed(caplog: pytest.LogCaptureFixture) -> None:
    """What is refused as well; the others go on. A message of a product that is not there would delete it."""
    harness = Harness(FakeShop(*customers("a", "c")), ids=("a", "b", "c", "refused"))
    assert harness.all() == ["a", "c"]
    assert harness.recorder.ended == 2
    reasons = {record.__dict__["resource_id"]: record.__dict__["reason"] for record in caplog.records}
    assert reasons == {"b": "commercetools has no such customer", "refused": "refused"}


def test_named_records_go_on_after_the_last_id() -> None:
    """One that cannot be read now is no failure: all are asked for again."""
    shop = FakeShop(*customers("a", "b", "c"))
    named = listing(shop, Selection("customers", ids=("a", "b", "c")), "b")
    assert named.count() == 1
    find, down = shop.find, {"c": Transient("down")}
    shop.find = lambda *_: down  # type: ignore[method-assign, assignment]
    with pytest.raises(Transient):
        named.next_page()
    shop.find = find  # type: ignore[method-assign]
    assert named.next_page() == [("c", {"id": "c"})]
    assert named.next_page() == []


def test_a_message_that_comes_again_has_not_ended() -> None:
    """Its record counts once it has."""
    harness = Harness(FakeShop(*customers("a")))
    (message,) = harness.receive()
    again, done = Message(message, 0.0), Message(message, 0.0)
    again.outcome = Outcome(Disposition.NACK, "send", Transient("down"))
    done.outcome = Outcome(Disposition.ACK, "transform", Ignored("nothing to do"))
    harness.recorder.settled([again])
    assert (harness.recorder.ended, harness.progress.done) == (0, 0)
    harness.recorder.settled([done])
    assert (harness.recorder.ended, harness.progress.nothing_to_do) == (1, 1)


def test_an_order_that_has_just_changed_is_left_to_the_worker_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the worker sends first may begin flows; customers make no events and need not wait."""
    monkeypatch.setattr(source_module, "SETTLED_AFTER", 0.5)
    now = datetime.now(UTC)
    young = {"id": "a", "lastModifiedAt": (now + timedelta(hours=1)).isoformat()}  # clocks differ
    old = {"id": "b", "lastModifiedAt": (now - timedelta(seconds=1)).isoformat()}
    harness = Harness(FakeShop(young, old), "orders")
    assert [message.id for message in harness.receive()] == ["b"]
    assert harness.all() == ["a"]
    assert [message.id for message in Harness(FakeShop(young)).receive()] == ["a"]


def test_no_more_is_read_while_much_waits_for_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded, also when all orders have just changed; what waits comes, and then the others."""
    monkeypatch.setattr(source_module, "SETTLED_AFTER", 0.5)
    monkeypatch.setattr(source_module, "MAX_LATER", 2)
    young = {"lastModifiedAt": (datetime.now(UTC) + timedelta(hours=1)).isoformat()}
    harness = Harness(FakeShop(*({"id": name} | young for name in "abcdef")), "orders")
    for _ in range(5):
        assert harness.receive() == []
    assert harness.source.backlog() == 3  # two orders, and what was not read
    assert harness.all() == ["a", "b", "c", "d", "e", "f"]


def test_what_comes_back_comes_again_but_a_defect_not_for_ever() -> None:
    """Outages are no record's fault; what meets a defect of ours each time has failed."""
    harness = Harness(FakeShop(*customers("a")))
    for _ in range(20):
        (message,) = harness.receive()
        harness.source.nack([message], 0.0, Failure("down", "send", "CircuitOpen"))
    for _ in range(source_module.MAX_DEFECTS):
        (message,) = harness.receive()
        harness.source.nack([message], 0.0, Failure("KeyError", "send", "WorkerError"))
    assert harness.all() == []
    assert harness.progress.failed == {"KeyError": 1}


def test_a_later_message_waits_for_its_time() -> None:
    """A hint of the pipeline, which a source keeps."""
    harness = Harness(FakeShop(*customers("a")))
    (message,) = harness.receive()
    harness.source.nack([message], 0.3, Failure("down", "send", "CircuitOpen"))
    assert harness.receive() == []
    assert harness.source.backlog() == 1
    assert harness.all() == ["a"]


# What is shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def pace_of(ended: int, total: int | None, seconds: float = 10.0) -> Pace:
    recorder = Recorder(Progress(), "order", None, None)
    pace = Pace(recorder, total)
    recorder.ended = ended
    pace._began -= seconds
    return pace


def test_the_bar_tells_rate_and_time_left() -> None:
    """As far as they are known."""
    assert bar("orders", pace_of(500, 2_000)) == "orders [######                  ] 25%  500 of 2,000  50/s  30 s left"
    assert bar("orders", pace_of(500, None)) == "orders 500  50/s"
    assert bar("orders", pace_of(0, 2_000)).endswith("0 of 2,000  0.0/s")
    assert [duration(each) for each in (42.3, 200, 7_500)] == ["42 s", "3 min 20 s", "2 h 5 min"]


def test_what_earlier_runs_did_is_done() -> None:
    """It counts for the bar, and not for the rate; a limit is of this run."""
    recorder = Recorder(Progress("x", 50), "order", None, None)
    pace = Pace(recorder, 150)
    assert (pace.total, pace.ended, pace.rate, pace.seconds_left) == (200, 50, 0.0, None)
    shop = FakeShop(*customers("a", "b", "c"))
    counted = [to_end(listing(shop, Selection("customers"), ""), limit) for limit in (None, 2, 7)]
    assert counted == [3, 2, 3]
    shop.errors = [Transient("down")]
    assert to_end(listing(shop, Selection("customers"), ""), None) is None


def test_a_time_without_a_zone_is_utc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the machine is."""
    moment = import_module("worker.cli.backfill")._moment
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        noon = datetime(2026, 1, 31, 12, tzinfo=UTC)
        assert moment("--since", "2026-01-31T12:00") == moment("--since", "2026-01-31T13:00+01:00") == noon
        assert moment("--since", "2026-01-31") == datetime(2026, 1, 31, tzinfo=UTC)
    finally:
        monkeypatch.delenv("TZ")
        time.tzset()


def test_log_lines_stand_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar is taken away, and drawn again below; it is never longer than a line."""
    monkeypatch.setenv("COLUMNS", "4")
    terminal = Terminal()
    screen = Screen(terminal)
    with shown("orders", pace_of(0, 1), screen):
        drawn = terminal.getvalue()
        screen.draw("bar that is longer")
        screen.write("line\n")
    assert terminal.getvalue() == f"{drawn}\r\033[Kbar\r\033[Kline\nbar\r\033[K"


def test_the_summary_names_each_reason_once() -> None:
    """With the number of records it befell, the most frequent first."""
    progress = Progress("x", 5, 1, Counter({"rare": 1, "frequent": 3}))
    assert import_module("worker.cli.backfill")._summary("orders", progress, pace_of(10, 10)) == [
        "orders: 10 done: 5 sent, 1 with nothing to do, 4 failed; this run took 10 s, 1 a second",
        "failed: 3 x frequent",
        "failed: 1 x rare",
    ]
