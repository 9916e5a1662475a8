"""What stands before an endpoint: retries, outages, refused credentials."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import Scripted
from tests.unit.runtime.test_runner import settings_for
from worker.errors import CircuitOpen, KlaviyoMisconfigured, Misconfigured, Rejected, Throttled, Transient
from worker.http.backoff import MAX_BACKOFF, MIN_BACKOFF, backoff, max_backoff
from worker.http.circuit_breaker import FAILURE_THRESHOLD, CircuitBreakers

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.http.circuit_breaker import CircuitBreaker

DOWN = Transient("503 to POST /api/events")


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("worker.http.circuit_breaker.time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def gates(**values: Any) -> CircuitBreakers:
    return CircuitBreakers(
        "klaviyo", settings_for(**{"retry_timeout": 0, "park_retry_interval": 30} | values), threading.Event()
    )


def gate(**values: Any) -> CircuitBreaker:
    return gates(**values)["POST /api/events"]


def failing(error: Exception) -> Callable[[], None]:
    def call() -> None:
        raise error

    return call


def closed(error: Exception = DOWN, **values: Any) -> CircuitBreaker:
    closed = gate(**values)
    for _ in range(FAILURE_THRESHOLD):
        with pytest.raises(type(error) if isinstance(error, Misconfigured) else Transient):
            closed(failing(error))
    return closed


def held_back(closed: CircuitBreaker) -> float:
    """Return for how long a call is held back, which must not be made; 0: it is made."""
    call = Scripted(None)
    try:
        closed(call)
    except (CircuitOpen, Misconfigured) as error:
        assert call.calls == []
        assert error.retry_after
        return error.retry_after
    return 0.0


def test_a_glitch_stays_between_us_and_the_other_side() -> None:
    """A call that fails is made again, soon, and its answer is the answer."""
    call = Scripted(DOWN, DOWN, "fine")
    assert gate(retry_timeout=5)(call) == "fine"
    assert len(call.calls) == 3


def test_some_calls_in_a_row_that_fail_are_an_outage(clock: Clock) -> None:
    """Then no request is made until a pause is over; before that every call is."""
    gate_ = gate()
    for _ in range(FAILURE_THRESHOLD - 1):
        with pytest.raises(Transient) as error:
            gate_(failing(DOWN))
        assert not isinstance(error.value, CircuitOpen)
    assert gate_.outage_reason() == ""
    with pytest.raises(CircuitOpen) as last:
        gate_(failing(DOWN))
    assert str(last.value) == gate_.outage_reason() == str(DOWN)
    assert last.value.retry_after == pytest.approx(held_back(gate_))
    assert MIN_BACKOFF / 2 <= held_back(gate_) <= MIN_BACKOFF
    clock.now += MIN_BACKOFF
    assert held_back(gate_) == 0
    assert gate_.outage_reason() == ""


def test_calls_that_succeed_or_are_judged_in_between_are_no_outage() -> None:
    """One record that cannot be answered must not hold back its neighbours."""
    gate_ = gate()
    for answer in [None, Rejected("400", 400), Throttled("429", 61.0)] * FAILURE_THRESHOLD:
        with pytest.raises(Transient):
            gate_(failing(DOWN))
        if answer is None:
            gate_(Scripted(None))
        else:
            with pytest.raises(type(answer)):
                gate_(failing(answer))
    assert gate_.outage_reason() == ""


def test_pauses_grow_and_one_call_in_a_pause_finds_out(clock: Clock) -> None:
    """With jitter, so that many workers do not come at once; never longer than MAX_BACKOFF."""
    gate_ = closed()
    pauses = []
    for _ in range(10):
        pauses.append(held_back(gate_))
        clock.now += pauses[-1] + 0.001
        call = Scripted(DOWN, DOWN)
        with pytest.raises(CircuitOpen):
            gate_(call)
        assert len(call.calls) == 1
    assert pauses[0] < 1.01 * MIN_BACKOFF < pauses[2] < pauses[4]
    assert all(MAX_BACKOFF / 2 <= seconds <= MAX_BACKOFF for seconds in pauses[6:])
    assert len(set(pauses)) == len(pauses)


def test_retry_after_lengthens_the_pause(clock: Clock) -> None:
    """The other side knows best."""
    gate_ = closed(Transient("503", 120.0))
    assert held_back(gate_) == pytest.approx(120)
    clock.now += 120
    assert held_back(gate_) == 0


def test_while_one_call_finds_out_the_others_are_held_back() -> None:
    """A service that answers nothing must not be asked by everybody at once."""
    gate_ = closed(retry_timeout=0)
    gate_._open_at = 0.0
    begun, answer = threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        answer.wait(10)

    thread = threading.Thread(target=gate_, args=(slow,))
    thread.start()
    begun.wait(5)
    assert held_back(gate_) == pytest.approx(1.0, abs=0.5)
    answer.set()
    thread.join(5)
    assert held_back(gate_) == 0


def test_calls_begun_before_an_outage_do_not_lengthen_it(clock: Clock) -> None:
    """Sixteen at once that fail are one failure."""
    gate_ = gate()
    entered, fail = threading.Semaphore(0), threading.Event()

    def slow() -> None:
        entered.release()
        fail.wait(10)
        raise DOWN

    def call() -> None:
        with pytest.raises(Transient):
            gate_(slow)

    threads = [threading.Thread(target=call) for _ in range(16)]
    for thread in threads:
        thread.start()
    for _ in threads:
        entered.acquire(timeout=5)
    fail.set()
    for thread in threads:
        thread.join(5)
    assert held_back(gate_) <= MIN_BACKOFF


@pytest.mark.parametrize("error", [DOWN, KeyError("x")])
def test_calls_begun_before_an_outage_do_not_stand_for_the_one_that_finds_out(error: Exception, clock: Clock) -> None:
    """They may take as long as the read timeout; only one call at a time asks a service that is down."""
    gate_ = gate()
    begun, end = [threading.Event(), threading.Event()], [threading.Event(), threading.Event()]

    def slow(number: int, answer: Exception | None) -> None:
        begun[number].set()
        end[number].wait(10)
        if answer:
            raise answer

    def call(number: int, answer: Exception | None) -> None:
        with suppress(Transient, KeyError):
            gate_(slow, number, answer)

    threads = [threading.Thread(target=call, args=arguments) for arguments in ((0, error), (1, None))]
    threads[0].start()
    begun[0].wait(5)
    for _ in range(FAILURE_THRESHOLD):
        with pytest.raises(Transient):
            gate_(failing(DOWN))
    clock.now += MIN_BACKOFF
    threads[1].start()
    begun[1].wait(5)
    end[0].set()
    threads[0].join(5)
    clock.now += 10
    assert held_back(gate_) == 10
    end[1].set()
    threads[1].join(5)
    assert held_back(gate_) == 0


def test_a_defect_while_finding_out_does_not_close_the_gate_for_ever(clock: Clock) -> None:
    """The next call finds out."""
    gate_ = closed()
    clock.now += MIN_BACKOFF
    with pytest.raises(KeyError):
        gate_(failing(KeyError("x")))
    assert held_back(gate_) == 0


def test_refused_credentials_hold_back_all_calls_at_once(clock: Clock) -> None:
    """Not an outage: the worker parks, and one call in `park_retry_interval` finds out."""
    gate_ = gate(park_retry_interval=30)
    refused = KlaviyoMisconfigured("401: check KLAVIYO_AUTH_KEY")
    with pytest.raises(KlaviyoMisconfigured) as error:
        gate_(failing(refused))
    assert error.value.retry_after == 30
    assert gate_.outage_reason() == ""
    clock.now += 20
    assert held_back(gate_) == 10
    clock.now += 10
    with pytest.raises(KlaviyoMisconfigured):
        gate_(failing(refused))
    assert held_back(gate_) == 30
    clock.now += 30
    assert held_back(gate_) == 0


def test_endpoints_have_gates_of_their_own() -> None:
    """The catalog may be down while events go on."""
    both = gates()
    for _ in range(FAILURE_THRESHOLD):
        with pytest.raises(Transient):
            both["POST /api/events"](failing(DOWN))
    assert held_back(both["POST /api/events"])
    assert not held_back(both["POST /api/profile-import"])
    assert both.outage_reason() == str(DOWN)


def test_an_outage_nobody_asks_about_any_more_is_forgotten(clock: Clock) -> None:
    """No gauge stays red because the last message for an endpoint has gone back to the queue."""
    gate_ = closed()
    assert gate_.outage_reason()
    clock.now += MIN_BACKOFF + 2 * MAX_BACKOFF
    assert gate_.outage_reason() == ""


def test_throttling_is_waited_out_for_longer_than_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other side is up, and says when."""
    slept: list[float] = []
    monkeypatch.setattr("worker.http.circuit_breaker._backoff", lambda state: 0.0)
    gate_ = gate(retry_timeout=0.1)
    gate_._retrying.sleep = slept.append
    call = Scripted(Throttled("429", 20.0), Throttled("429", 20.0), "fine")
    assert gate_(call) == "fine"
    assert slept == [20.0, 20.0]
    with pytest.raises(Throttled):
        gate_(failing(Throttled("429", 61.0)))


def test_a_shutdown_ends_the_retries() -> None:
    """At once, whatever was asked for."""
    stopping = threading.Event()
    gate_ = CircuitBreakers("klaviyo", settings_for(retry_timeout=60), stopping)["x"]
    threading.Timer(0.1, stopping.set).start()
    began = time.monotonic()
    with pytest.raises(Throttled):
        gate_(failing(Throttled("429", 50.0)))
    assert time.monotonic() - began < 10


def test_an_outage_is_said_when_it_begins_and_when_it_is_over(caplog: pytest.LogCaptureFixture, clock: Clock) -> None:
    """One line each, and one a minute in between."""
    caplog.set_level("INFO", "klaviyo_worker")
    gate_ = closed()
    for _ in range(3):
        clock.now += MAX_BACKOFF
        with pytest.raises(CircuitOpen):
            gate_(failing(DOWN))
    clock.now += MAX_BACKOFF
    gate_(Scripted(None))
    gate_(Scripted(None))
    assert [record.message for record in caplog.records] == ["outage", "outage_over"]
    assert vars(caplog.records[0])["endpoint"] == "POST /api/events"
    assert vars(caplog.records[0])["service"] == "klaviyo"
    assert vars(caplog.records[0])["reason"] == str(DOWN)


def test_pauses_have_a_bound_whatever_the_number_of_tries() -> None:
    """No overflow after a weekend."""
    assert backoff(10**6, MAX_BACKOFF) <= MAX_BACKOFF


@pytest.mark.parametrize(("hold", "longest"), [(0, 1), (60, 1), (600, 10), (1800, 30), (86400, 30)])
def test_a_short_hold_has_short_pauses(hold: float, longest: float) -> None:
    """A last try that no gate lets through would end the hold in vain."""
    assert max_backoff(hold) == longest
