"""The decision whether events are sent in bulk: the setting, or the verdict in the account."""

from __future__ import annotations

import logging
from threading import Event
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.waiting import wait_for
from worker.errors import EndpointRefused, Transient
from worker.send import bulk_verdict
from worker.send.bulk_verdict import BulkVerdict, Verdict, read_status, read_verdict, store_verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from worker.klaviyo.client import Body
    from worker.model import Json
    from worker.send.bulk_verdict import BulkMode

    Start = Callable[..., BulkVerdict]

WAIT = 60.0
DATE = "2026-11-01T10:00:00+00:00"


class Klaviyo:
    """A fake account with a profile of the probe. Reading it raises `failure`."""

    def __init__(self, repeats: object = None) -> None:
        self.profiles: list[Json] = []
        self.failure: Exception | None = None
        self.may_answer = Event()
        self.may_answer.set()
        self.readings = 0
        if repeats is not None:
            self.set_verdict(repeats)

    def set_verdict(self, repeats: object) -> None:
        properties = {"klaviyo_worker_bulk_repeats": repeats, "klaviyo_worker_bulk_probed_at": DATE}
        self.profiles = [{"id": "1", "attributes": {"properties": properties}}]

    def call(self, method: str, path: str, body: Body = None, *, idempotent: bool = True) -> Json:
        assert self.may_answer.wait(WAIT)
        if method == "POST":
            assert isinstance(body, dict)
            self.profiles = [body["data"]]
            return {}
        assert path.startswith("/api/profiles?filter=equals%28external_id%2C%22klaviyo-worker-probe%22%29")
        self.readings += 1
        if self.failure:
            raise self.failure
        return {"data": self.profiles}

    def requests_sent(self) -> int:
        return 0


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_verdict, "REFRESH_INTERVAL", 0.02)
    monkeypatch.setattr(bulk_verdict, "RETRY_INTERVAL", 0.01)


@pytest.fixture
def started() -> Iterator[Start]:
    """Start verdicts, and close them after the test."""
    verdicts: list[BulkVerdict] = []

    def start(klaviyo: Klaviyo, mode: BulkMode = "auto") -> BulkVerdict:
        verdicts.append(BulkVerdict(klaviyo, mode))
        verdicts[-1].start()
        return verdicts[-1]

    yield start
    for verdict in verdicts:
        verdict.close()


@pytest.mark.parametrize(
    ("repeats", "in_bulk"),
    [
        ("ignored", True),
        ("refused", False),
        ("dropped", False),
        ("recorded twice", False),
        ("revoked by Ada", False),
        ("", False),
        (True, False),
        (None, False),
    ],
)
def test_only_an_account_that_ignores_repeats_gets_bulk_calls(repeats: Any, in_bulk: bool, started: Start) -> None:
    """Any other value, also one that an operator sets by hand, and an account without a verdict get none."""
    assert started(Klaviyo(repeats)).allows_bulk() is in_bulk


@pytest.mark.parametrize(("mode", "in_bulk"), [("always", True), ("never", False)])
def test_setting_overrules_the_verdict(mode: BulkMode, in_bulk: bool, started: Start) -> None:
    """The account is not read."""
    klaviyo = Klaviyo("dropped" if in_bulk else "ignored")
    verdict = started(klaviyo, mode)
    assert verdict.allows_bulk() is in_bulk
    assert verdict.status().reason == f"KLAVIYO_WORKER_BULK_EVENTS is {mode}"
    assert klaviyo.readings == 0


def test_stored_verdict_is_read() -> None:
    """The probe stores it, and the workers read it."""
    klaviyo = Klaviyo()
    store_verdict(klaviyo, Verdict("ignored", DATE))
    assert read_verdict(klaviyo) == Verdict("ignored", DATE)
    status = read_status(klaviyo, "auto")
    assert status == (True, f"the account's verdict of {DATE} on repeated events is: ignored")


def test_reason_says_how_to_ask() -> None:
    """An account without a verdict was never probed."""
    assert read_status(Klaviyo(), "auto").reason.endswith("run klaviyo-worker check --probe-bulk")


def test_changed_verdict_is_noticed(started: Start, caplog: pytest.LogCaptureFixture) -> None:
    """A verdict can be revoked or given while workers run. Each change is logged once."""
    caplog.set_level(logging.INFO, "klaviyo_worker")
    klaviyo = Klaviyo("ignored")
    verdict = started(klaviyo)
    assert verdict.allows_bulk()
    klaviyo.profiles = []
    wait_for(lambda: not verdict.allows_bulk())
    klaviyo.set_verdict("ignored")
    wait_for(verdict.allows_bulk)
    seen = klaviyo.readings
    wait_for(lambda: klaviyo.readings > seen + 1)
    assert [vars(record)["in_bulk"] for record in caplog.records] == [True, False, True]


@pytest.mark.parametrize("failure", [Transient("503"), EndpointRefused("403: profiles:read")])
def test_unreadable_verdict_is_none(failure: Exception, started: Start, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged once. Only an outage ends by itself."""
    klaviyo = Klaviyo("ignored")
    klaviyo.failure = failure
    verdict = started(klaviyo)
    assert not verdict.allows_bulk()
    if isinstance(failure, Transient) and not isinstance(failure, EndpointRefused):
        wait_for(lambda: klaviyo.readings > 2)
        klaviyo.failure = None
        wait_for(verdict.allows_bulk)
    else:
        wait_for(lambda: not verdict._thread.is_alive())
        assert klaviyo.readings == 1
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert str(failure) in vars(record)["reason"]


def test_outage_keeps_the_last_verdict(started: Start) -> None:
    """The account has not changed its behaviour."""
    klaviyo = Klaviyo("ignored")
    verdict = started(klaviyo)
    assert verdict.allows_bulk()
    klaviyo.failure = Transient("503")
    seen = klaviyo.readings
    wait_for(lambda: klaviyo.readings > seen + 2)
    assert verdict.allows_bulk()


def test_defect_of_a_reading_does_not_end_the_readings(started: Start, caplog: pytest.LogCaptureFixture) -> None:
    klaviyo = Klaviyo("ignored")
    klaviyo.failure = ZeroDivisionError()
    verdict = started(klaviyo)
    assert not verdict.allows_bulk()
    assert caplog.messages[0] == "defect"
    klaviyo.failure = None
    wait_for(verdict.allows_bulk)


def test_first_reading_is_waited_for(started: Start) -> None:
    """Otherwise the first batches of a backlog would be sent individually, which takes minutes."""
    klaviyo = Klaviyo("ignored")
    klaviyo.may_answer.clear()
    verdict = started(klaviyo)
    assert verdict.status() == (False, "the verdict of the account was not read yet")
    klaviyo.may_answer.set()
    assert verdict.allows_bulk()


def test_unanswered_reading_delays_events_only_briefly(started: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events are then sent individually."""
    monkeypatch.setattr(bulk_verdict, "FIRST_READING_WAIT", 0.01)
    klaviyo = Klaviyo("ignored")
    klaviyo.may_answer.clear()
    assert not started(klaviyo).allows_bulk()
    klaviyo.may_answer.set()


def test_verdict_is_read_only_when_it_is_needed() -> None:
    """A dry run and a backfill of customers read nothing. The first question starts the thread, once."""
    klaviyo = Klaviyo("ignored")
    klaviyo.failure = EndpointRefused("403")
    verdict = BulkVerdict(klaviyo, "auto")
    assert not verdict.status().in_bulk
    assert klaviyo.readings == 0
    assert [verdict.allows_bulk(), verdict.allows_bulk()] == [False, False]
    assert klaviyo.readings == 1


def test_closed_verdict_reads_no_more(started: Start) -> None:
    """The thread ends with its worker, backfill or replay."""
    verdict = started(Klaviyo("ignored"))
    assert verdict.allows_bulk()
    verdict.close()
    verdict._thread.join(WAIT)
    assert not verdict._thread.is_alive()
