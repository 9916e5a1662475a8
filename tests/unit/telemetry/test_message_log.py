"""The canonical log line, the log formats and the recorded failures."""

from __future__ import annotations

import io
import json
import logging
import time
from collections import Counter
from datetime import UTC, datetime

import pytest

from tests.conftest import FakeDelivery
from worker.budget import MAX_PATHS, MORE
from worker.errors import Disposition, Ignored, JobUnfinished, NotShownYet, Rejected, StateChanged, Transient
from worker.model import Ended, Ending, Message, Notification, Operation, OperationKind, Outcome
from worker.telemetry.log import BURST, MAX_VALUE, configure_logging, log
from worker.telemetry.message_log import Telemetry
from worker.telemetry.metrics import Metrics

FIELDS = {
    *("message_id", "message_type", "resource_type", "resource_id", "outcome", "reason", "stage", "attempt"),
    *("duration_s", "age_s", "operations", "requests", "erased"),
}


def message(outcome: Outcome | None, operations: int = 0) -> Message:
    delivery = FakeDelivery(b"{}", id="7", attempt=2, published_at=datetime.now(UTC))
    notification = Notification("OrderCreated", "order", "o-1", None, {})
    sent = (Operation(OperationKind.CREATE_EVENT, "k", truncated=("Items",)),) * operations
    return Message(delivery, 0.0, notification, operations=sent, outcome=outcome)


SENT = Ended(message(Outcome(Disposition.ACK, "send"), 1), Ending.SENT)
IGNORED = Ended(message(Outcome(Disposition.ACK, "parse", Ignored("no handler"))), Ending.IGNORED)
RETRIED = Ended(message(Outcome(Disposition.NACK, "enrich", Transient("500"))), Ending.RETRIED)
DEAD_LETTERED = Ended(message(Outcome(Disposition.DEAD_LETTER, "send", Rejected("400")), 1), Ending.DEAD_LETTERED)
RETURNED = Ended(message(None), Ending.RETURNED)


@pytest.mark.parametrize(
    ("ended", "operations", "name", "level"),
    [
        (SENT, 1, "sent", "INFO"),
        (IGNORED, 0, "ignored", "INFO"),
        (RETRIED, 0, "retried", "WARNING"),
        (DEAD_LETTERED, 1, "dead_lettered", "ERROR"),
        (RETURNED, 0, "returned", "INFO"),
        (Ended(SENT.message, Ending.RETURNED), 1, "returned", "INFO"),  # a lane was still processing it
    ],
)
def test_every_message_has_one_canonical_line(ended: Ended, operations: int, name: str, level: str) -> None:
    """Scripts rely on the fields. The level shows whether an operator must act."""
    stream = io.StringIO()
    configure_logging("INFO", "auto", stream)
    telemetry = Telemetry(Metrics("embedded"))
    telemetry.on_endings([ended])
    (line,) = map(json.loads, stream.getvalue().splitlines())
    assert line.keys() >= FIELDS
    assert (line["event"], line["outcome"], line["level"], line["operations"]) == (
        "message_processed",
        name,
        level,
        operations,
    )
    assert line["truncated"] == (["Items"] if operations else None)
    assert telemetry.endings == {ended.ending: 1}


def test_names_of_truncated_properties_are_bounded() -> None:
    """A message with a thousand operations has a short line, too. `…` says that it does not name all paths."""
    stream = io.StringIO()
    configure_logging("INFO", "json", stream)
    done = message(Outcome(Disposition.ACK, "send"))
    names = [f"p{number:03}" for number in range(1_000)]
    done.operations = [Operation(OperationKind.CREATE_EVENT, name, truncated=[name, MORE]) for name in names]
    Telemetry(Metrics("embedded")).on_endings([Ended(done, Ending.SENT)])
    assert json.loads(stream.getvalue())["truncated"] == [*names[:MAX_PATHS], MORE]


def test_only_failures_are_recorded() -> None:
    """They include held messages, which have no log line yet, but not ignored messages."""
    telemetry = Telemetry(Metrics("embedded"))
    held = message(Outcome(Disposition.HOLD, "enrich", Transient("500")))
    telemetry.record_processed([held, IGNORED.message, DEAD_LETTERED.message])
    telemetry.on_endings([IGNORED, DEAD_LETTERED, SENT, RETURNED])
    telemetry.on_endings([RETRIED])
    failures = [(f["outcome"], f["stage"], f["reason"], f["times"]) for f in telemetry.failures.newest()]
    assert failures == [
        ("retried", "enrich", "500", 1),
        ("dead_lettered", "send", "400", 1),
        ("held", "enrich", "500", 1),
    ]


def test_wait_is_shown_but_is_no_failure() -> None:
    """A new resource that commercetools does not show yet must not raise an alert."""
    metrics = Metrics("embedded")
    telemetry = Telemetry(metrics)
    waits = [NotShownYet("a", 1.0), JobUnfinished("b", 600.0), StateChanged("c")]
    telemetry.record_processed([message(Outcome(wait.disposition, "send", wait)) for wait in waits])
    assert sorted(failure["reason"] for failure in telemetry.failures.newest()) == ["a", "b", "c"]
    assert "message_failures_total{" not in metrics.render()[0].decode()


def test_text_format_shows_time_event_and_fields() -> None:
    """Fields without a value are left out."""
    stream = io.StringIO()
    configure_logging("INFO", "text", stream)
    Telemetry(Metrics("embedded")).on_endings([SENT])
    line = stream.getvalue()
    assert " message_processed message_id=7 message_type=OrderCreated " in line
    assert "outcome=sent" in line
    assert "reason" not in line


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("plain", "plain"),
        ("with blank", '"with blank"'),
        ("1 outcome=sent", '"1 outcome=sent"'),
        ("a=b", '"a=b"'),
        ('"', '"\\""'),
        ("", '""'),
        ("x\n12:00:00 parked\x1b[2J\x9b", '"x\\n12:00:00 parked\\u001b[2J\\u009b"'),
        ("\u202e", '"\\u202e"'),
        ("x" * 3_000, "x" * (MAX_VALUE - 1) + "…"),
        (7, "7"),
    ],
)
def test_value_cannot_forge_a_line_or_control_a_terminal(value: object, shown: str) -> None:
    """Ids, types and reasons come from messages and services."""
    stream = io.StringIO()
    configure_logging("INFO", "text", stream)
    log.info("stopped", extra={"reason": value})
    assert stream.getvalue()[9:] == f"stopped reason={shown}\n"


def test_values_are_bounded_in_json() -> None:
    """JSON escapes everything else."""
    stream = io.StringIO()
    configure_logging("INFO", "json", stream)
    log.info("stopped", extra={"reason": "x" * 1_000_000, "number": 7})
    line = json.loads(stream.getvalue())
    assert (line["reason"], line["number"]) == ("x" * (MAX_VALUE - 1) + "…", 7)


def test_lines_of_an_event_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that is refused all the time cannot fill the disk. Lines of messages and of other events are written."""
    now = 1_000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stream = io.StringIO()
    configure_logging("INFO", "json", stream)
    for _ in range(500):
        log.warning("push_refused", extra={"reason": "no token"})
        log.info("message_processed")
    log.info("stopped")
    now += 2.0
    for _ in range(5):
        log.warning("push_refused", extra={"reason": "no token"})
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    events = Counter(line["event"] for line in lines)
    assert events == {"push_refused": BURST + 2, "message_processed": 500, "stopped": 1}
    assert [line["omitted"] for line in lines if "omitted" in line] == [500 - BURST]


def test_lines_below_the_level_are_left_out() -> None:
    """With LOG_LEVEL=ERROR, messages that were sent or retried are not logged."""
    stream = io.StringIO()
    configure_logging("ERROR", "json", stream)
    Telemetry(Metrics("embedded")).on_endings([SENT, RETRIED])
    assert stream.getvalue() == ""


def test_loggers_of_libraries_are_not_configured() -> None:
    """Debug lines of libraries contain tokens and bodies."""
    configure_logging("DEBUG", "json", io.StringIO())
    assert not log.propagate
    assert logging.getLogger("requests_oauthlib").getEffectiveLevel() > logging.DEBUG
    assert logging.getLogger("urllib3").getEffectiveLevel() > logging.DEBUG


def test_warning_of_a_library_is_logged_without_its_text() -> None:
    """The text can contain personal data. The line has the usual format."""
    stream = io.StringIO()
    configure_logging("INFO", "json", stream)
    library = logging.getLogger("some.library")
    library.propagate = False  # pytest captures the root logger
    library.error("cannot greet %s", "grete@mail.example", exc_info=ValueError("grete@mail.example"))
    library.info("below the level of a warning")
    (line,) = map(json.loads, stream.getvalue().splitlines())
    assert line.pop("where").startswith("test_message_log.py:")
    assert line.pop("time")
    assert line == {"event": "library_warning", "level": "ERROR", "library": "some.library", "error": "ValueError"}


@pytest.mark.parametrize("found", [0, 1])
@pytest.mark.parametrize("ending", [Ending.SENT, Ending.RETRIED])
def test_an_erasure_has_the_number_of_profiles_in_its_line(found: int, ending: Ending) -> None:
    """An erasure that found no profile must be visible. It counts when it is complete."""
    stream = io.StringIO()
    configure_logging("INFO", "auto", stream)
    telemetry = Telemetry(Metrics("embedded"))
    done = message(Outcome(Disposition.ACK, "send"))
    done.operations, done.erased = [Operation(OperationKind.DELETE_PROFILE, "c")], found
    telemetry.on_endings([Ended(done, ending)])
    assert json.loads(stream.getvalue())["erased"] == found
    scraped = telemetry.metrics.render()[0].decode()
    assert (f'erasures_total{{profiles="{found}"}} 1.0' in scraped) == (ending is Ending.SENT)


@pytest.mark.parametrize("ending", [Ending.SENT, Ending.RETRIED])
def test_gaps_of_the_catalog_are_counted(ending: Ending) -> None:
    """Variants without a price or a sku do not show anywhere else."""
    telemetry = Telemetry(Metrics("embedded"))
    done = message(Outcome(Disposition.ACK, "send"))
    done.operations = [Operation(OperationKind.UPSERT_ITEM, "p", gaps=["price", "price", "sku"])]
    telemetry.on_endings([Ended(done, ending)])
    scraped = telemetry.metrics.render()[0].decode()
    assert ('catalog_gaps_total{gap="price"} 2.0' in scraped) == (ending is Ending.SENT)
    assert ('catalog_gaps_total{gap="sku"} 1.0' in scraped) == (ending is Ending.SENT)
