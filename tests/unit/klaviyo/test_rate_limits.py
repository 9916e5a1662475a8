"""The rate limiter: documented limits, RateLimit-* headers, 429 responses, shared accounts and shutdown."""

from __future__ import annotations

import heapq
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from itertools import count, islice
from random import Random
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.errors import Transient
from worker.klaviyo.rate_limits import BACKGROUND_PART, FIRST_POLL, MAX_WAIT, RateLimiter
from worker.sandbox.klaviyo.rate_limits import FixedWindowLimiter, Throttled

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

S, M, L, XL = (
    "POST /api/data-privacy-deletion-jobs",
    "POST /api/event-bulk-create-jobs",
    "PATCH /api/catalog-items/{id}",
    "POST /api/events",
)
TIERS = {S: (3, 60), M: (10, 150), L: (75, 700), XL: (350, 3500)}
MOMENT = 0.005  # seconds: a request can poll slightly late, and the rate rises a little while it waits


class VirtualTime(Event):
    """An event that is never set, with a virtual clock: it advances as soon as all threads wait."""

    def __init__(self) -> None:
        super().__init__()
        self._time = 1020.0  # the start of a minute
        self._awake = 1  # the thread that creates it
        self._asleep: list[tuple[float, int, Lock]] = []
        self._order = count()
        self._lock = Lock()

    def now(self) -> float:
        return self._time

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep. Only the thread that is due next continues."""
        assert timeout is not None
        alarm = Lock()
        alarm.acquire()
        with self._lock:
            heapq.heappush(self._asleep, (self._time + timeout, next(self._order), alarm))
            self._wake_next()
        alarm.acquire()
        return False

    def run(self, *functions: Callable[[], None]) -> None:
        """Run functions concurrently, in one thread each."""

        def run(function: Callable[[], None]) -> None:
            self.wait(0)
            function()
            with self._lock:
                self._wake_next()

        self._awake = len(functions)
        threads = [Thread(target=run, args=(function,)) for function in functions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._awake = 1

    def _wake_next(self) -> None:
        self._awake -= 1
        if not self._awake and self._asleep:
            self._time, _, alarm = heapq.heappop(self._asleep)
            self._awake = 1
            alarm.release()


@pytest.fixture
def time() -> VirtualTime:
    return VirtualTime()


@pytest.fixture
def fresh(time: VirtualTime) -> RateLimiter:
    """Return the rate limiter of a worker that has just started."""
    return RateLimiter(1.0, time, time.now)


@pytest.fixture
def limiter(fresh: RateLimiter, time: VirtualTime) -> RateLimiter:
    """Return the rate limiter of an idle worker that is alone on its account."""
    return be_alone(fresh, time, S, M, L)


def be_alone(limiter: RateLimiter, time: VirtualTime, *endpoints: str) -> RateLimiter:
    """Report no requests of other processes, then let a minute pass."""
    for endpoint in endpoints:
        for _ in range(1000):
            limiter.update(endpoint, 200, {}, None)
    time.wait(60)
    return limiter


def waits(limiter: RateLimiter, time: VirtualTime, endpoint: str, calls: int) -> list[float]:
    """Return how long each of several consecutive requests waits."""
    taken = []
    for _ in range(calls):
        before = time.now()
        limiter.acquire(endpoint)
        taken.append(time.now() - before)
    return taken


def steady_rate(limiter: RateLimiter, time: VirtualTime, endpoint: str) -> float:
    """Return the requests per second once the bucket is empty."""
    while not waits(limiter, time, endpoint, 1)[0]:
        pass
    return 4 / sum(waits(limiter, time, endpoint, 4))


def window(limit: object = None, remaining: object = None, reset: object = None) -> dict[str, str]:
    """Return the headers of a response."""
    values = {"Limit": limit, "Remaining": remaining, "Reset": reset}
    return {f"RateLimit-{name}": str(value) for name, value in values.items() if value is not None}


@pytest.mark.parametrize(
    ("endpoint", "at_once", "per_minute"),
    [
        (S, 2, 60),
        (M, 7, 150),
        ("POST /api/profile-bulk-import-jobs", 7, 150),
        ("GET /api/profile-bulk-import-jobs/{job_id}", 7, 150),
        (L, 63, 700),
        ("POST /api/profile-import", 63, 700),
        ("GET /api/profiles", 63, 700),
        ("POST /api/catalog-category-bulk-create-jobs", 63, 700),
        ("GET /api/catalog-item-bulk-create-jobs/{job_id}", 63, 700),
        ("GET /api/catalog-variant-bulk-update-jobs", 63, 700),
        ("GET /api/something-new", 63, 700),
        (XL, 291, 3500),
        ("GET /api/catalog-items/{id}/variants", 291, 3500),
        ("GET /api/catalog-item-bulk-delete-jobs/{job_id}", 291, 3500),
        ("GET /api/catalog-category-bulk-create-jobs/{job_id}", 291, 3500),
    ],
)
def test_single_process_uses_the_documented_limits(
    fresh: RateLimiter, time: VirtualTime, endpoint: str, at_once: int, per_minute: int
) -> None:
    """No second exceeds the burst. After a few immediate requests, the others follow at the steady rate."""
    limiter = be_alone(fresh, time, endpoint)
    assert waits(limiter, time, endpoint, at_once) == pytest.approx([0] * at_once, abs=MOMENT)
    assert steady_rate(limiter, time, endpoint) == pytest.approx(per_minute / 60, rel=0.01)


@pytest.mark.parametrize(
    ("endpoint", "at_once", "per_second"), [(S, 1, 1 / 3), (M, 2, 2.5 / 3), (L, 20, 11.7 / 3), (XL, 96, 58 / 3)]
)
def test_process_starts_with_a_quarter_of_the_limits(
    fresh: RateLimiter, time: VirtualTime, endpoint: str, at_once: int, per_second: float
) -> None:
    """Other processes can start with it. After a first response, the requests of one message are sent immediately."""
    assert waits(fresh, time, endpoint, 1) == [0]
    fresh.update(endpoint, 200, window(remaining=9_999, reset=60), None)
    assert waits(fresh, time, endpoint, at_once - 1) == [0] * (at_once - 1)
    assert steady_rate(fresh, time, endpoint) == pytest.approx(per_second, rel=0.02)


@pytest.mark.parametrize("endpoint", [S, M, L, XL])
def test_burst_waits_for_the_first_response(endpoint: str, fresh: RateLimiter, time: VirtualTime) -> None:
    """The limits of an account can be lower than documented. A lost response delays requests, but stops none."""
    assert waits(fresh, time, endpoint, 3)[:2] == [0, pytest.approx(60 / (TIERS[endpoint][1] * 0.33), rel=0.05)]


def test_first_response_lets_the_waiting_requests_continue(fresh: RateLimiter, time: VirtualTime) -> None:
    """They do not wait until the time at which the next request would have been sent without a response."""
    start, sent_at = time.now(), []

    def request() -> None:
        fresh.acquire(L)
        sent_at.append(time.now() - start)
        time.wait(0.05)  # the latency of the response
        fresh.update(L, 202, window(700, 699, 40.0), None)

    time.run(*[request] * 8)
    assert sent_at[0] == 0
    assert max(sent_at) <= 0.05 + FIRST_POLL + MOMENT


def test_single_process_reaches_the_full_rate(fresh: RateLimiter, time: VirtualTime) -> None:
    """If no other process reduces the remaining requests, it uses the full rate within a minute."""
    remaining, end = 150, time.now() + 20
    while time.now() < end:
        fresh.acquire(M)
        remaining -= 1
        fresh.update(M, 202, window(150, remaining, 1080 - time.now()), None)
    assert remaining <= 150 - 0.8 * 50
    assert steady_rate(fresh, time, M) == pytest.approx(2.5, rel=0.02)


@pytest.mark.parametrize(("calls", "share"), [(1, 1), (2, 1 / 2), (4, 1 / 4), (8, 1 / 8), (40, 1 / 16)])
def test_process_uses_its_share_of_the_account(fresh: RateLimiter, time: VirtualTime, calls: int, share: float) -> None:
    """If it sent one of `calls` requests, it uses slightly more than that share, and at least that of a sixteenth."""
    for number in range(300):
        fresh.update(L, 200, window(remaining=99_999 - calls * number, reset=60), None)
    assert steady_rate(fresh, time, L) == pytest.approx(share**0.8 * 700 / 60, rel=0.02)


def test_process_takes_over_the_share_of_stopped_processes(fresh: RateLimiter, time: VirtualTime) -> None:
    """After a dozen own requests it uses the full rate. Responses of different windows are not compared."""
    for number in range(100):
        fresh.update(M, 202, window(remaining=9_999 - 4 * number, reset=60), None)
    time.wait(60)
    for number in range(13):
        fresh.update(M, 202, window(remaining=8_888 - number, reset=60), None)
    assert 0.75 * 2.5 < steady_rate(fresh, time, M) < 0.95 * 2.5


@given(
    endpoint=st.sampled_from([S, M, L, XL]),
    fresh=st.booleans(),
    share=st.floats(0.1, 1),
    gaps=st.lists(st.sampled_from([0, 0, 0, 0, 0.01, 0.3, 1, 5]), max_size=200),
    answers=st.lists(
        st.tuples(st.sampled_from([200, 200, 429, 503]), st.integers(0, 4000), st.integers(0, 60)), max_size=200
    ),
)
def test_no_window_exceeds_its_limit(
    endpoint: str, fresh: bool, share: float, gaps: Sequence[float], answers: Sequence[tuple[int, int, int]]
) -> None:
    """For any load, a second has at most the burst, and a minute has at most the steady limit plus a burst."""
    time = VirtualTime()
    limiter = RateLimiter(share, time, time.now)
    if not fresh:
        be_alone(limiter, time, endpoint)
    calls = []
    for index, gap in enumerate(gaps):
        time.wait(gap)
        try:
            limiter.acquire(endpoint)
        except Transient:
            continue
        calls.append(time.now())
        if index < len(answers):
            status, remaining, reset = answers[index]
            limiter.update(endpoint, status, window(remaining=remaining, reset=reset), reset)
    burst, steady = (share * limit for limit in TIERS[endpoint])
    for first in calls:
        assert sum(first <= call < first + 1 for call in calls) <= max(burst, 1)
        assert sum(first <= call < first + 60 for call in calls) <= steady + max(burst - steady / 60, 1)


def test_configured_share_applies_to_both_limits(time: VirtualTime) -> None:
    """With a share of one half, both the burst and the steady rate are halved."""
    limiter = be_alone(RateLimiter(0.5, time, time.now), time, L)
    assert waits(limiter, time, L, 32)[30:] == [0, pytest.approx(60 / 350 / 3, abs=MOMENT)]
    assert steady_rate(limiter, time, L) == pytest.approx(350 / 60, rel=0.01)


def test_small_share_still_allows_requests(time: VirtualTime) -> None:
    """A share of less than one request per second delays requests, but does not stop them."""
    limiter = be_alone(RateLimiter(0.1, time, time.now), time, S)
    assert waits(limiter, time, S, 3) == [0, pytest.approx(10, abs=MOMENT), pytest.approx(10, abs=MOMENT)]


def test_each_endpoint_has_its_own_limit(limiter: RateLimiter, time: VirtualTime) -> None:
    """Neither used tokens nor a 429 of one endpoint delay the requests to another one."""
    be_alone(limiter, time, "POST /api/catalog-items")
    limiter.update(L, 429, {}, 30)
    assert waits(limiter, time, "POST /api/catalog-items", 63) == [0] * 63
    assert waits(limiter, time, L, 1)[0] > 30


@pytest.mark.parametrize(("limit", "per_second"), [(750, 12.5), (350, 350 / 60), (10**9, 52.5)])
def test_rate_follows_the_reported_steady_limit(
    limiter: RateLimiter, time: VirtualTime, limit: int, per_second: float
) -> None:
    """The rate follows RateLimit-Limit, up to the rate at which no second exceeds the burst."""
    limiter.update(L, 200, window(limit=limit), None)
    assert steady_rate(limiter, time, L) == pytest.approx(per_second, rel=0.02)


@pytest.mark.parametrize(("burst", "steady", "at_once"), [(750, 7000, 633), (30, 240, 26), (10, 9000, 3), (2, 30, 1)])
def test_both_reported_limits_are_used(
    limiter: RateLimiter, time: VirtualTime, burst: int, steady: int, at_once: int
) -> None:
    """Klaviyo can list the limits of both windows. The steady rate stays below the burst."""
    headers = window(f"{burst}, {burst};w=1, {steady};w=60", f"{burst - 1}, {steady - 1}; w=60", "1, 1;w=1, 60;w=60")
    limiter.update(L, 200, headers, None)
    time.wait(61)
    assert waits(limiter, time, L, at_once) == [0] * at_once
    assert steady_rate(limiter, time, L) == pytest.approx(min(steady / 60, 0.7 * burst), rel=0.02)
    assert limiter.statuses()[L].burst == burst


def test_rate_follows_the_remaining_requests_of_the_window(limiter: RateLimiter, time: VirtualTime) -> None:
    """Ten requests remain for twenty seconds: half a request per second is sent until the window ends."""
    waits(limiter, time, L, 63)
    limiter.update(L, 202, window(700, 10, 20), None)
    start = time.now()
    assert steady_rate(limiter, time, L) == pytest.approx(0.5, rel=0.01)
    while time.now() < start + 20:
        limiter.acquire(L)
    assert steady_rate(limiter, time, L) == pytest.approx(700 / 60, rel=0.01)


def test_saved_tokens_are_not_spent_in_a_nearly_used_window(limiter: RateLimiter, time: VirtualTime) -> None:
    """Other processes can have used the window while this one was idle."""
    limiter.update(L, 202, window(700, 14, 60), None)
    assert waits(limiter, time, L, 2)[1] > 1


def test_wait_beyond_the_end_of_the_window_uses_the_new_rate(limiter: RateLimiter, time: VirtualTime) -> None:
    """With one request left for 40 s, the next two requests wait about 40 s, not 80 s: a new window starts."""
    start = time.now()
    limiter.update(L, 200, window(700, 1, 40), None)
    limiter.acquire(L)
    moments: list[float] = []

    def call() -> None:
        limiter.acquire(L)
        moments.append(time.now() - start)

    time.run(call, call)
    assert moments == [pytest.approx(40, abs=0.1), pytest.approx(40 + 60 / 700, abs=0.1)]


def test_no_request_is_sent_in_an_exhausted_window(limiter: RateLimiter, time: VirtualTime) -> None:
    """If no requests remain, none is sent before the reset. Then they follow at the steady rate."""
    limiter.update(L, 200, window(700, 0, 17), None)
    assert waits(limiter, time, L, 1)[0] == pytest.approx(17 + 60 / 700, abs=MOMENT)
    assert steady_rate(limiter, time, L) == pytest.approx(700 / 60, rel=0.01)


@pytest.mark.parametrize("retry_after", [7.0, 1.0, 0.0, None])
def test_429_pauses_and_halves_the_rate(limiter: RateLimiter, time: VirtualTime, retry_after: float | None) -> None:
    """The pause is Retry-After, or one second without it. The rate is half at first and recovers."""
    limiter.update(L, 429, {}, retry_after)
    first, second = waits(limiter, time, L, 2)
    assert first == pytest.approx((retry_after or 1) + 2 * 60 / 700, abs=MOMENT)
    assert second == pytest.approx(2 * 60 / 700, abs=MOMENT)
    later = time.now() + 60
    while time.now() < later:
        limiter.acquire(L)
    assert steady_rate(limiter, time, L) == pytest.approx(700 / 60, rel=0.01)


def test_429_halves_the_burst(limiter: RateLimiter, time: VirtualTime) -> None:
    """After a pause and a short idle time, fewer requests are sent immediately than before."""
    limiter.update(L, 429, {}, 1)
    time.wait(1 + 6)
    assert 31 <= waits(limiter, time, L, 63).count(0) < 45


def test_several_429_in_one_pause_halve_the_rate_once(limiter: RateLimiter, time: VirtualTime) -> None:
    """Concurrent requests are throttled together. The longest pause applies."""
    for retry_after in (2, 5, 3):
        limiter.update(L, 429, {}, retry_after)
    assert waits(limiter, time, L, 1)[0] == pytest.approx(5 + 2 * 60 / 700, abs=MOMENT)


def test_repeated_429_leave_a_sixteenth_of_the_rate(limiter: RateLimiter, time: VirtualTime) -> None:
    """The rate has a lower bound."""
    for _ in range(20):
        limiter.update(L, 429, {}, 1)
        time.wait(1)
    assert 0.9 < waits(limiter, time, L, 1)[0] <= 16 * 60 / 700


@pytest.mark.parametrize(
    "headers",
    [
        {},
        window("many", "few", "soon"),
        window("", "", ""),
        window("nan", "nan", "nan"),
        window("inf", "inf", "inf"),
        window(-1, -5, -3),
        window(0),
        window(remaining=0),
        window(reset=30),
        window(remaining=0, reset=1_800_000_000),
        window(remaining=1, reset=1_800_000_000),
        window(remaining=-5, reset=30),
        window(remaining=0, reset=-1),
        window(remaining="0", reset="nan"),
        window(remaining=1, reset=-1),
        window(limit="75;w=1"),
        window(limit="75, 75;w=2, 700;w=61"),
        window(limit="75;w=, ;w=60, x;w=1, 10;w=-60, 0;w=1, 0;w=60"),
        window("75, 75;w=1", "1, 1;w=1", "1, 1;w=1"),
        window("1e999", "1e-999", "1e999"),
    ],
    ids=str,
)
def test_invalid_headers_are_ignored(limiter: RateLimiter, time: VirtualTime, headers: Mapping[str, str]) -> None:
    """Headers of a proxy and wrong Klaviyo headers neither block the endpoint nor disable the limit."""
    limiter.update(L, 200, headers, None)
    assert waits(limiter, time, L, 63) == [0] * 63
    assert steady_rate(limiter, time, L) == pytest.approx(700 / 60, rel=0.01)


def test_request_with_too_long_a_wait_fails_immediately(limiter: RateLimiter, time: VirtualTime) -> None:
    """The request fails immediately with retry_after. Its token goes to other requests."""
    limiter.update(L, 429, {}, 300)
    before = time.now()
    for _ in range(5):
        with pytest.raises(Transient) as throttled:
            limiter.acquire(L)
        assert str(throttled.value) == f"Klaviyo's rate limit for {L} is used up"
        assert throttled.value.retry_after == pytest.approx(300, abs=1)
    assert time.now() == before
    time.wait(300)
    assert waits(limiter, time, L, 1)[0] == pytest.approx(2 * 60 / 700, abs=MOMENT)


def test_waiting_requests_are_served_in_order(limiter: RateLimiter, time: VirtualTime) -> None:
    """At most the number of requests that the limit allows in a minute can wait. The others fail immediately."""
    start = time.now()
    served: list[tuple[int, float]] = []
    rejected: list[float | None] = []

    def call(number: int) -> None:
        try:
            limiter.acquire(S)
            served.append((number, time.now()))
        except Transient as error:
            rejected.append(error.retry_after)

    time.run(*(lambda number=number: call(number) for number in range(100)))
    numbers, moments = zip(*served, strict=True)
    assert sorted(numbers) == list(numbers)
    assert moments == pytest.approx([start, *(start + seconds for seconds in range(len(served) - 1))])
    assert len(served) == 62
    assert all(after is not None and after > MAX_WAIT for after in rejected)


def test_pause_applies_to_waiting_requests(limiter: RateLimiter, time: VirtualTime) -> None:
    """A 429 of another thread delays the requests that already wait."""
    start = time.now()
    waits(limiter, time, M, 7)
    moments: list[float] = []

    def call() -> None:
        limiter.acquire(M)
        moments.append(time.now())

    def throttle() -> None:
        time.wait(0.1)
        limiter.update(M, 429, {}, 20)

    time.run(call, throttle)
    assert moments == [pytest.approx(start + 0.1 + 20 + 2 * 0.4, abs=0.02)]


def test_wait_is_bounded_when_pauses_follow_each_other(limiter: RateLimiter, time: VirtualTime) -> None:
    """Consecutive pauses must not hold a message indefinitely."""
    start = time.now()
    limiter.update(L, 429, {}, 50)
    moments: list[float] = []

    def call() -> None:
        with pytest.raises(Transient):
            limiter.acquire(L)
        moments.append(time.now())

    def throttle() -> None:
        time.wait(20)
        limiter.update(L, 429, {}, 50)

    time.run(call, throttle)
    assert moments == [pytest.approx(start + 20, abs=1)]


def test_shutdown_ends_every_wait() -> None:
    """Waiting threads fail when the worker stops. No request that had to wait is sent."""
    stopping = Event()
    limiter = RateLimiter(1.0, stopping, lambda: 0.0)
    with ThreadPoolExecutor(40) as threads:
        calls = [threads.submit(limiter.acquire, M) for _ in range(40)]
        (served,) = islice(as_completed(calls, timeout=60), 1)
        stopping.set()
    assert served.exception() is None
    assert sum(isinstance(call.exception(), Transient) for call in calls) == 39


def test_request_that_need_not_wait_is_sent_during_shutdown() -> None:
    """The last requests of a stopping worker are sent while tokens are available."""
    stopping = Event()
    stopping.set()
    limiter = RateLimiter(1.0, stopping, lambda: 0.0)
    limiter.acquire(M)
    with pytest.raises(Transient):
        limiter.acquire(M)


def run_workers(endpoint: str, limit: dict[int, int], number: int, share: float = 1.0) -> list[list[int]]:
    """Run workers with constant demand on one account for two minutes. Return the statuses of each worker.

    They start within a second, in the middle of a minute. A request takes 50 to 200 ms.
    """
    time, random = VirtualTime(), Random(7)
    account = FixedWindowLimiter(time.now)
    time.wait(20)
    end = time.now() + 120
    statuses: list[list[int]] = [[] for _ in range(number)]

    def work(worker: int, limiter: RateLimiter) -> None:
        time.wait(worker / number)
        while time.now() < end - 1:
            limiter.acquire(endpoint)
            time.wait(random.uniform(0.02, 0.1))
            status, headers, retry_after = 202, {}, None
            try:
                remaining, reset = account.acquire(endpoint, limit)
                headers = window(f"{limit[1]}, {limit[1]};w=1, {limit[60]};w=60", remaining, reset)
            except Throttled as throttled:
                status, retry_after = 429, throttled.seconds
            time.wait(random.uniform(0.03, 0.1))
            limiter.update(endpoint, status, headers, retry_after)
            statuses[worker].append(status)

    workers = [RateLimiter(share, time, time.now) for _ in range(number)]
    time.run(*(partial(work, *worker) for worker in enumerate(workers) for _ in range(4)))
    return statuses


@pytest.mark.parametrize(("endpoint", "limit"), [(S, {1: 3, 60: 60}), (M, {1: 10, 60: 150}), (L, {1: 75, 60: 750})])
@pytest.mark.parametrize("number", [2, 4])
def test_processes_share_an_account(endpoint: str, limit: dict[int, int], number: int) -> None:
    """With constant demand, the whole limit is used, few requests are throttled, and each process gets its share."""
    workers = run_workers(endpoint, limit, number)
    sent = [statuses.count(202) for statuses in workers]
    assert sum(sent) >= 0.97 * 2 * limit[60]
    assert sum(statuses.count(429) for statuses in workers) <= 0.02 * sum(sent)
    assert min(sent) >= 0.85 * sum(sent) / number


def test_single_process_uses_the_whole_limit() -> None:
    """The low initial rate costs little, and no request is throttled."""
    (statuses,) = run_workers(M, {1: 10, 60: 150}, 1)
    assert statuses.count(202) == len(statuses) >= 0.97 * 2 * 150


def test_configured_shares_are_fully_used() -> None:
    """The estimated share does not reduce a configured share further."""
    workers = run_workers(M, {1: 10, 60: 150}, 4, share=0.25)
    assert sum(statuses.count(202) for statuses in workers) >= 0.97 * 2 * 150


@pytest.mark.parametrize(
    ("endpoint", "limit", "minimum"),
    [(M, {1: 10, 60: 1500}, 0.95 * 7 * 120), (M, {1: 30, 60: 900}, 0.95 * 1800), (XL, {1: 5, 60: 60}, 0.95 * 120)],
    ids=["raised beyond the burst", "raised", "lowered"],
)
def test_limits_of_an_account_are_used_without_a_429(endpoint: str, limit: dict[int, int], minimum: float) -> None:
    """They can be raised or lowered. The rate is at most seven tenths of the burst."""
    (statuses,) = run_workers(endpoint, limit, 1)
    assert statuses.count(202) == len(statuses) >= minimum


def test_status_by_endpoint(limiter: RateLimiter, time: VirtualTime) -> None:
    """Reading it takes no token. The reported remaining requests expire with their window."""
    assert limiter.statuses().keys() == {S, M, L}
    assert list(limiter.statuses()[M]) == [10, 150, pytest.approx(150), 0.0, None, 0]
    for _ in range(3):
        limiter.acquire(M)
    limiter.update(M, 200, {"RateLimit-Limit": "120", "RateLimit-Remaining": "100", "RateLimit-Reset": "20"}, None)
    for _ in range(2):
        status = limiter.statuses()[M]
        assert [status.steady, status.remaining, status.waiting] == [pytest.approx(120), 100, 0]
    assert status.burst_used > 0
    time.wait(21)
    assert limiter.statuses()[M].remaining is None
    limiter.update(M, 429, {}, 5)
    status = limiter.statuses()[M]
    assert [status.burst_used, status.pace] == [1.0, pytest.approx(60)]


def test_background_requests_leave_most_of_the_rate_to_others(limiter: RateLimiter, time: VirtualTime) -> None:
    """Carts change with every click, but their events must not use up what orders need."""
    be_alone(limiter, time, XL)
    limiter.acquire(XL, background=True)
    be_alone(limiter, time, XL)
    waited = []

    def carts() -> None:
        for _ in range(400):
            limiter.acquire(XL, background=True)
            limiter.acquire(XL)

    def orders() -> None:
        for _ in range(100):
            before = time.now()
            limiter.acquire(XL)
            waited.append(time.now() - before)
            time.wait(0.1)

    started_at = time.now()
    time.run(carts, orders)
    burst = BACKGROUND_PART * (350 - 3500 / 60)
    assert time.now() - started_at >= (400 - burst) / (BACKGROUND_PART * 3500 / 60) - 1
    assert max(waited) < 0.1


def test_background_requests_follow_the_limits_of_the_account(limiter: RateLimiter, time: VirtualTime) -> None:
    """They use a part of the limits that Klaviyo reports, also after a 429."""
    limiter.acquire(XL, background=True)
    for _ in range(1000):
        limiter.update(XL, 200, {"RateLimit-Limit": "60, 60;w=1, 600;w=60"}, None)
    time.wait(60)
    is_empty = False
    while not is_empty:
        before = time.now()
        limiter.acquire(XL, background=True)
        is_empty = time.now() > before
    started_at = time.now()
    for _ in range(8):
        limiter.acquire(XL, background=True)
    assert 8 / (time.now() - started_at) == pytest.approx(BACKGROUND_PART * 10, rel=0.05)
