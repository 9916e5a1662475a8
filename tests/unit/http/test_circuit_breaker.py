"""Circuit breakers and backoff: retries, outages, refused credentials."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import Scripted
from tests.unit.runtime.test_runner import settings_for
from worker.errors import (
    CircuitOpen,
    EndpointRefused,
    KlaviyoMisconfigured,
    Misconfigured,
    Rejected,
    RequestBlocked,
    Throttled,
    Transient,
)
from worker.http.backoff import MAX_BACKOFF, MIN_BACKOFF, backoff, max_backoff
from worker.http.circuit_breaker import FAILURE_THRESHOLD, CircuitBreakers

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.http.circuit_breaker import CircuitBreaker

DOWN = Transient("503 to POST /api/events")


class Clock:
    """A clock that only moves when a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("worker.http.circuit_breaker.time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def breakers_with(**values: Any) -> CircuitBreakers:
    return CircuitBreakers(
        "klaviyo", settings_for(**{"retry_timeout": 0, "park_retry_interval": 30} | values), threading.Event()
    )


def breaker_with(**values: Any) -> CircuitBreaker:
    return breakers_with(**values)["POST /api/events"]


def failing(error: Exception) -> Callable[[], None]:
    def call() -> None:
        raise error

    return call


def opened(error: Exception = DOWN, **values: Any) -> CircuitBreaker:
    breaker = breaker_with(**values)
    for _ in range(FAILURE_THRESHOLD):
        with pytest.raises(type(error) if isinstance(error, Misconfigured) else Transient):
            breaker(failing(error))
    return breaker


def retry_delay_of(breaker: CircuitBreaker) -> float:
    """Return the retry delay of a call that fails without a request, or 0 if it sends a request."""
    call = Scripted(None)
    try:
        breaker(call)
    except (CircuitOpen, Misconfigured) as error:
        assert call.calls == []
        assert error.retry_after
        return error.retry_after
    return 0.0


def test_transient_error_is_retried() -> None:
    """The caller gets the result of the retry."""
    call = Scripted(DOWN, DOWN, "fine")
    assert breaker_with(retry_timeout=5)(call) == "fine"
    assert len(call.calls) == 3


def test_consecutive_failures_open_the_circuit(clock: Clock) -> None:
    """After the threshold, no call sends a request until the backoff is over."""
    breaker = breaker_with()
    for _ in range(FAILURE_THRESHOLD - 1):
        with pytest.raises(Transient) as error:
            breaker(failing(DOWN))
        assert not isinstance(error.value, CircuitOpen)
    assert breaker.cause() is None
    with pytest.raises(CircuitOpen) as last:
        breaker(failing(DOWN))
    assert str(last.value) == str(breaker.cause()) == str(DOWN)
    assert last.value.retry_after == pytest.approx(retry_delay_of(breaker))
    assert MIN_BACKOFF / 2 <= retry_delay_of(breaker) <= MIN_BACKOFF
    clock.now += MIN_BACKOFF
    assert retry_delay_of(breaker) == 0
    assert breaker.cause() is None


def test_success_or_rejection_resets_the_count_of_failures() -> None:
    """One record for which the service always fails must not block the other records."""
    breaker = breaker_with()
    for answer in [None, Rejected("400", 400), Throttled("429", 61.0)] * FAILURE_THRESHOLD:
        with pytest.raises(Transient):
            breaker(failing(DOWN))
        if answer is None:
            breaker(Scripted(None))
        else:
            with pytest.raises(type(answer)):
                breaker(failing(answer))
    assert breaker.cause() is None


def test_backoff_grows_and_ends_with_a_single_probe(clock: Clock) -> None:
    """Jitter spreads the probes of many workers. No backoff is longer than MAX_BACKOFF."""
    breaker = opened()
    delays = []
    for _ in range(10):
        delays.append(retry_delay_of(breaker))
        clock.now += delays[-1] + 0.001
        call = Scripted(DOWN, DOWN)
        with pytest.raises(CircuitOpen):
            breaker(call)
        assert len(call.calls) == 1
    assert delays[0] < 1.01 * MIN_BACKOFF < delays[2] < delays[4]
    assert all(MAX_BACKOFF / 2 <= seconds <= MAX_BACKOFF for seconds in delays[6:])
    assert len(set(delays)) == len(delays)


def test_retry_after_extends_the_backoff(clock: Clock) -> None:
    """The circuit stays open for at least the seconds that the service asked for."""
    breaker = opened(Transient("503", 120.0))
    assert retry_delay_of(breaker) == pytest.approx(120)
    clock.now += 120
    assert retry_delay_of(breaker) == 0


def test_calls_fail_while_a_probe_is_running() -> None:
    """During an outage, only one call at a time sends a request."""
    breaker = opened(retry_timeout=0)
    breaker._open_until = 0.0
    started, answer = threading.Event(), threading.Event()

    def slow() -> None:
        started.set()
        answer.wait(60)

    thread = threading.Thread(target=breaker, args=(slow,))
    thread.start()
    started.wait(60)
    assert retry_delay_of(breaker) == pytest.approx(1.0, abs=0.5)
    answer.set()
    thread.join(60)
    assert retry_delay_of(breaker) == 0


def test_calls_started_before_an_outage_do_not_extend_it(clock: Clock) -> None:
    """Sixteen concurrent calls that fail open the circuit once."""
    breaker = breaker_with()
    entered, fail = threading.Semaphore(0), threading.Event()

    def slow() -> None:
        entered.release()
        fail.wait(60)
        raise DOWN

    def call() -> None:
        with pytest.raises(Transient):
            breaker(slow)

    threads = [threading.Thread(target=call) for _ in range(16)]
    for thread in threads:
        thread.start()
    for _ in threads:
        entered.acquire(timeout=60)
    fail.set()
    for thread in threads:
        thread.join(60)
    assert retry_delay_of(breaker) <= MIN_BACKOFF


@pytest.mark.parametrize("error", [DOWN, KeyError("x")])
def test_call_started_before_an_outage_does_not_end_the_probe(error: Exception, clock: Clock) -> None:
    """It can last as long as the read timeout. When it fails, the running probe continues."""
    breaker = breaker_with()
    started, end = [threading.Event(), threading.Event()], [threading.Event(), threading.Event()]

    def slow(number: int, answer: Exception | None) -> None:
        started[number].set()
        end[number].wait(60)
        if answer:
            raise answer

    def call(number: int, answer: Exception | None) -> None:
        with suppress(Transient, KeyError):
            breaker(slow, number, answer)

    threads = [threading.Thread(target=call, args=arguments) for arguments in ((0, error), (1, None))]
    threads[0].start()
    started[0].wait(60)
    for _ in range(FAILURE_THRESHOLD):
        with pytest.raises(Transient):
            breaker(failing(DOWN))
    clock.now += MIN_BACKOFF
    threads[1].start()
    started[1].wait(60)
    end[0].set()
    threads[0].join(60)
    clock.now += 10
    assert retry_delay_of(breaker) == 10
    end[1].set()
    threads[1].join(60)
    assert retry_delay_of(breaker) == 0


def test_unexpected_error_of_a_probe_lets_the_next_call_probe(clock: Clock) -> None:
    """The circuit must not stay half-open."""
    breaker = opened()
    clock.now += MIN_BACKOFF
    with pytest.raises(KeyError):
        breaker(failing(KeyError("x")))
    assert retry_delay_of(breaker) == 0


def test_refused_credentials_open_the_circuit_immediately(clock: Clock) -> None:
    """This is not an outage. The worker parks, and one call per `park_retry_interval` is the probe."""
    breakers = breakers_with(park_retry_interval=30)
    breaker = breakers["POST /api/events"]
    refused = KlaviyoMisconfigured("403", todo="check KLAVIYO_AUTH_KEY and its scopes")
    for call in (failing(refused), Scripted(None)):
        with pytest.raises(KlaviyoMisconfigured) as error:
            breaker(call)
        assert error.value is not refused
        assert (str(error.value), error.value.todo) == (str(refused), refused.todo)
        assert error.value.retry_after == 30
    assert breakers.outage_reason() == ""
    assert breakers.refused_endpoints() == {}
    assert breakers.refusal_reason() == str(refused)
    clock.now += 20
    assert retry_delay_of(breaker) == 10
    clock.now += 10
    with pytest.raises(KlaviyoMisconfigured):
        breaker(failing(refused))
    assert retry_delay_of(breaker) == 30
    clock.now += 30
    assert retry_delay_of(breaker) == 0
    assert breakers.refusal_reason() == ""


def test_refused_endpoint_opens_only_its_circuit(caplog: pytest.LogCaptureFixture, clock: Clock) -> None:
    """A missing scope is not retried, is no outage, and is logged when it starts and when it ends."""
    caplog.set_level("INFO", "klaviyo_worker")
    breakers = breakers_with(park_retry_interval=30, retry_timeout=5)
    breaker = breakers["POST /api/data-privacy-deletion-jobs"]
    refused = Scripted(EndpointRefused("403", todo="grant data-privacy:write"))
    for call in (refused, Scripted(None)):
        with pytest.raises(EndpointRefused, match=r"^403: grant data-privacy:write$") as error:
            breaker(call)
        assert error.value.retry_after == 30
    assert len(refused.calls) == 1
    assert breakers["POST /api/events"](Scripted("fine")) == "fine"
    assert (breakers.outage_reason(), breakers.refusal_reason()) == ("", "")
    assert breakers.refused_endpoints() == {"POST /api/data-privacy-deletion-jobs": "403: grant data-privacy:write"}
    clock.now += 30
    breaker(Scripted(None))
    assert breakers.refused_endpoints() == {}
    assert [record.getMessage() for record in caplog.records] == ["endpoint_refused", "endpoint_accepted"]


def test_blocked_request_is_retried_but_opens_no_circuit() -> None:
    """The endpoint answers others, so only this request is at fault."""
    breakers = breakers_with(retry_timeout=5)
    breaker = breakers["POST /api/events"]
    blocked = RequestBlocked("403 with a page")
    assert breaker(Scripted(blocked, blocked, "fine")) == "fine"
    for _ in range(2 * FAILURE_THRESHOLD):
        with pytest.raises(RequestBlocked):
            breaker.call_once(failing(blocked))
    assert breakers.outage_reason() == ""


def test_each_endpoint_has_its_own_circuit() -> None:
    """The catalog can be down while events are sent."""
    breakers = breakers_with()
    for _ in range(FAILURE_THRESHOLD):
        with pytest.raises(Transient):
            breakers["POST /api/events"](failing(DOWN))
    assert retry_delay_of(breakers["POST /api/events"])
    assert not retry_delay_of(breakers["POST /api/profile-import"])
    assert breakers.outage_reason() == str(DOWN)


def test_outage_without_further_calls_expires(clock: Clock) -> None:
    """The gauge must not report an outage after the last message for the endpoint was nacked."""
    breaker = opened()
    assert breaker.cause()
    clock.now += MIN_BACKOFF + 2 * MAX_BACKOFF
    assert breaker.cause() is None


def test_throttled_call_is_retried_for_longer_than_a_failed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The service is up and states when to retry."""
    slept: list[float] = []
    monkeypatch.setattr("worker.http.circuit_breaker._retry_delay", lambda state: 0.0)
    breaker = breaker_with(retry_timeout=0.1)
    breaker._retrying.sleep = slept.append
    call = Scripted(Throttled("429", 20.0), Throttled("429", 20.0), "fine")
    assert breaker(call) == "fine"
    assert slept == [20.0, 20.0]
    with pytest.raises(Throttled):
        breaker(failing(Throttled("429", 61.0)))


def test_throttled_calls_open_no_circuit() -> None:
    """A service that answers with 429 is up. They also end a series of failures."""
    breaker = breaker_with()
    for error in [DOWN] * (FAILURE_THRESHOLD - 1) + [Throttled("429", 61.0)] * FAILURE_THRESHOLD + [DOWN]:
        with pytest.raises(type(error)):
            breaker(failing(error))
    assert breaker.cause() is None


def test_shutdown_ends_the_retries() -> None:
    """A retry delay does not delay the shutdown."""
    stopping = threading.Event()
    breaker = CircuitBreakers("klaviyo", settings_for(retry_timeout=60), stopping)["x"]
    threading.Timer(0.1, stopping.set).start()
    start = time.monotonic()
    with pytest.raises(Throttled):
        breaker(failing(Throttled("429", 50.0)))
    assert time.monotonic() - start < 10


def test_start_and_end_of_an_outage_are_logged(caplog: pytest.LogCaptureFixture, clock: Clock) -> None:
    """During the outage, it is logged once a minute."""
    caplog.set_level("INFO", "klaviyo_worker")
    breaker = opened()
    for _ in range(3):
        clock.now += MAX_BACKOFF
        with pytest.raises(CircuitOpen):
            breaker(failing(DOWN))
    clock.now += MAX_BACKOFF
    breaker(Scripted(None))
    breaker(Scripted(None))
    assert [record.message for record in caplog.records] == ["outage", "outage_over"]
    assert vars(caplog.records[0])["endpoint"] == "POST /api/events"
    assert vars(caplog.records[0])["service"] == "klaviyo"
    assert vars(caplog.records[0])["reason"] == str(DOWN)


def test_backoff_is_bounded_for_any_number_of_retries() -> None:
    """The exponent must not overflow in an outage of days."""
    assert backoff(10**6, MAX_BACKOFF) <= MAX_BACKOFF


@pytest.mark.parametrize(("hold", "longest"), [(0, 1), (60, 1), (600, 10), (1800, 30), (86400, 30)])
def test_short_hold_has_a_short_backoff(hold: float, longest: float) -> None:
    """A circuit that is still open at the last retry would end the hold without a request."""
    assert max_backoff(hold) == longest
