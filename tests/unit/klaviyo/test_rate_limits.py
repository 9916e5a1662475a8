"""Pacing: what Klaviyo documents is kept, what it says is heeded, and a shutdown never waits for it."""

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
from worker.klaviyo.rate_limits import MAX_WAIT, RateLimiter
from worker.sandbox.klaviyo.rate_limits import Limiter, Throttled

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

S, M, L, XL = (
    "POST /api/data-privacy-deletion-jobs",
    "POST /api/event-bulk-create-jobs",
    "PATCH /api/catalog-items/{id}",
    "POST /api/events",
)
TIERS = {S: (3, 60), M: (10, 150), L: (75, 700), XL: (350, 3500)}
MOMENT = 0.005  # seconds: a waiter may look a moment late, and the pace rises a little while it waits


class VirtualTime(Event):
    """An event never set, on which to wait takes no time: the clock moves on once all threads wait."""

    def __init__(self) -> None:
        super().__init__()
        self._time, self._awake = 1020.0, 1  # a minute begins; who makes it is awake
        self._asleep: list[tuple[float, int, Lock]] = []
        self._order = count()
        self._lock = Lock()

    def now(self) -> float:
        return self._time

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep; of all threads only the one due next goes on."""
        assert timeout is not None
        alarm = Lock()
        alarm.acquire()
        with self._lock:
            heapq.heappush(self._asleep, (self._time + timeout, next(self._order), alarm))
            self._wake_next()
        alarm.acquire()
        return False

    def run(self, *works: Callable[[], None]) -> None:
        """Run functions side by side, one thread each."""

        def run(work: Callable[[], None]) -> None:
            self.wait(0)
            work()
            with self._lock:
                self._wake_next()

        self._awake = len(works)
        threads = [Thread(target=run, args=(work,)) for work in works]
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
    """Return the limits of a worker that has just started."""
    return RateLimiter(1.0, time, time.now)


@pytest.fixture
def limits(fresh: RateLimiter, time: VirtualTime) -> RateLimiter:
    """Return the limits of a rested worker that has found nobody else on the account."""
    return alone(fresh, time, S, M, L)


def alone(limits: RateLimiter, time: VirtualTime, *endpoints: str) -> RateLimiter:
    """Let answers tell of no other callers, and let a minute pass."""
    for endpoint in endpoints:
        for _ in range(1000):
            limits.update(endpoint, 200, {}, None)
    time.wait(60)
    return limits


def waits(limits: RateLimiter, time: VirtualTime, endpoint: str, calls: int) -> list[float]:
    """Return how long each of some calls in a row waits."""
    taken = []
    for _ in range(calls):
        before = time.now()
        limits.acquire(endpoint)
        taken.append(time.now() - before)
    return taken


def pace(limits: RateLimiter, time: VirtualTime, endpoint: str) -> float:
    """Return the calls per second once nothing is saved up."""
    while not waits(limits, time, endpoint, 1)[0]:
        pass
    return 4 / sum(waits(limits, time, endpoint, 4))


def window(limit: object = None, remaining: object = None, reset: object = None) -> dict[str, str]:
    """Return the headers of an answer."""
    told = {"Limit": limit, "Remaining": remaining, "Reset": reset}
    return {f"RateLimit-{name}": str(value) for name, value in told.items() if value is not None}


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
def test_who_is_alone_may_use_what_is_documented(
    fresh: RateLimiter, time: VirtualTime, endpoint: str, at_once: int, per_minute: int
) -> None:
    """A few calls go at once, so that one second never sees more than the burst; the others at the steady pace."""
    limits = alone(fresh, time, endpoint)
    assert waits(limits, time, endpoint, at_once) == pytest.approx([0] * at_once, abs=MOMENT)
    assert pace(limits, time, endpoint) == pytest.approx(per_minute / 60, rel=0.01)


@pytest.mark.parametrize(
    ("endpoint", "at_once", "per_second"), [(S, 1, 1 / 3), (M, 2, 2.5 / 3), (L, 20, 11.7 / 3), (XL, 96, 58 / 3)]
)
def test_a_worker_starts_as_one_of_four(
    fresh: RateLimiter, time: VirtualTime, endpoint: str, at_once: int, per_second: float
) -> None:
    """Others may start with it: it sends little at once, but a message's few calls do not wait."""
    assert waits(fresh, time, endpoint, at_once) == [0] * at_once
    assert pace(fresh, time, endpoint) == pytest.approx(per_second, rel=0.02)


def test_a_worker_finds_out_that_it_is_alone(fresh: RateLimiter, time: VirtualTime) -> None:
    """What remains falls by its own calls only: a minute later it goes at the whole pace, whatever was at first."""
    remaining, end = 150, time.now() + 20
    while time.now() < end:
        fresh.acquire(M)
        remaining -= 1
        fresh.update(M, 202, window(150, remaining, 1080 - time.now()), None)
    assert remaining <= 150 - 0.8 * 50
    assert pace(fresh, time, M) == pytest.approx(2.5, rel=0.02)


@pytest.mark.parametrize(("calls", "part"), [(1, 1), (2, 1 / 2), (4, 1 / 4), (8, 1 / 8), (40, 1 / 16)])
def test_a_worker_leaves_others_their_part(fresh: RateLimiter, time: VirtualTime, calls: int, part: float) -> None:
    """Of `calls` calls one is its own: it takes a little more than that part; a sixteenth is the least."""
    for number in range(300):
        fresh.update(L, 200, window(remaining=99_999 - calls * number, reset=60), None)
    assert pace(fresh, time, L) == pytest.approx(part**0.8 * 700 / 60, rel=0.02)


def test_a_worker_takes_over_from_those_that_leave(fresh: RateLimiter, time: VirtualTime) -> None:
    """A dozen calls of its own show that it is alone now; what remains of another window tells nothing of them."""
    for number in range(100):
        fresh.update(M, 202, window(remaining=9_999 - 4 * number, reset=60), None)
    time.wait(60)
    for number in range(13):
        fresh.update(M, 202, window(remaining=8_888 - number, reset=60), None)
    assert 0.75 * 2.5 < pace(fresh, time, M) < 0.95 * 2.5


@given(
    endpoint=st.sampled_from([S, M, L, XL]),
    fresh=st.booleans(),
    share=st.floats(0.1, 1),
    gaps=st.lists(st.sampled_from([0, 0, 0, 0, 0.01, 0.3, 1, 5]), max_size=200),
    answers=st.lists(
        st.tuples(st.sampled_from([200, 200, 429, 503]), st.integers(0, 4000), st.integers(0, 60)), max_size=200
    ),
)
def test_no_window_is_ever_overdrawn(
    endpoint: str, fresh: bool, share: float, gaps: Sequence[float], answers: Sequence[tuple[int, int, int]]
) -> None:
    """Whatever is called when, and whatever the answers: no second has more than the burst, no minute much more."""
    time = VirtualTime()
    limits = RateLimiter(share, time, time.now)
    if not fresh:
        alone(limits, time, endpoint)
    calls = []
    for index, gap in enumerate(gaps):
        time.wait(gap)
        try:
            limits.acquire(endpoint)
        except Transient:
            continue
        calls.append(time.now())
        if index < len(answers):
            status, remaining, reset = answers[index]
            limits.update(endpoint, status, window(remaining=remaining, reset=reset), reset)
    burst, steady = (share * limit for limit in TIERS[endpoint])
    for first in calls:
        assert sum(first <= call < first + 1 for call in calls) <= max(burst, 1)
        assert sum(first <= call < first + 60 for call in calls) <= steady + max(burst - steady / 60, 1)


def test_a_share_is_a_share_of_both_limits(time: VirtualTime) -> None:
    """Half of the account: half of the burst, half of the pace."""
    limits = alone(RateLimiter(0.5, time, time.now), time, L)
    assert waits(limits, time, L, 32)[30:] == [0, pytest.approx(60 / 350 / 3, abs=MOMENT)]
    assert pace(limits, time, L) == pytest.approx(350 / 60, rel=0.01)


def test_a_small_share_is_slow_but_not_nothing(time: VirtualTime) -> None:
    """A share of less than a call per second is still a call now and then."""
    limits = alone(RateLimiter(0.1, time, time.now), time, S)
    assert waits(limits, time, S, 3) == [0, pytest.approx(10, abs=MOMENT), pytest.approx(10, abs=MOMENT)]


def test_endpoints_do_not_share_their_limits(limits: RateLimiter, time: VirtualTime) -> None:
    """What one endpoint used up, or was refused, slows no other."""
    alone(limits, time, "POST /api/catalog-items")
    limits.update(L, 429, {}, 30)
    assert waits(limits, time, "POST /api/catalog-items", 63) == [0] * 63
    assert waits(limits, time, L, 1)[0] > 30


@pytest.mark.parametrize(("limit", "per_second"), [(750, 12.5), (350, 350 / 60), (10**9, 52.5)])
def test_an_account_may_have_another_steady_limit(
    limits: RateLimiter, time: VirtualTime, limit: int, per_second: float
) -> None:
    """The pace follows RateLimit-Limit, though never so far that a second could see more than the burst."""
    limits.update(L, 200, window(limit=limit), None)
    assert pace(limits, time, L) == pytest.approx(per_second, rel=0.02)


def test_the_pace_follows_what_is_left_of_the_window(limits: RateLimiter, time: VirtualTime) -> None:
    """Ten calls in twenty seconds: half a call per second, with little at once, until the window ends."""
    waits(limits, time, L, 63)
    limits.update(L, 202, window(700, 10, 20), None)
    start = time.now()
    assert pace(limits, time, L) == pytest.approx(0.5, rel=0.01)
    while time.now() < start + 20:
        limits.acquire(L)
    assert pace(limits, time, L) == pytest.approx(700 / 60, rel=0.01)


def test_what_was_saved_up_is_not_spent_on_a_window_nearly_used_up(limits: RateLimiter, time: VirtualTime) -> None:
    """Other processes may have used the window while this one was idle."""
    limits.update(L, 202, window(700, 14, 60), None)
    assert waits(limits, time, L, 2)[1] > 1


def test_a_wait_may_reach_beyond_the_end_of_the_window(limits: RateLimiter, time: VirtualTime) -> None:
    """One call left for 40 s means that the next two wait about that long, not twice: a new window begins."""
    start = time.now()
    limits.update(L, 200, window(700, 1, 40), None)
    limits.acquire(L)
    moments: list[float] = []

    def call() -> None:
        limits.acquire(L)
        moments.append(time.now() - start)

    time.run(call, call)
    assert moments == [pytest.approx(40, abs=0.1), pytest.approx(40 + 60 / 700, abs=0.1)]


def test_an_empty_window_is_waited_out(limits: RateLimiter, time: VirtualTime) -> None:
    """Nothing remains: nothing is called before the reset, and then at the even pace."""
    limits.update(L, 200, window(700, 0, 17), None)
    assert waits(limits, time, L, 1)[0] == pytest.approx(17 + 60 / 700, abs=MOMENT)
    assert pace(limits, time, L) == pytest.approx(700 / 60, rel=0.01)


@pytest.mark.parametrize("asked", [7.0, 1.0, 0.0, None])
def test_a_429_is_waited_out(limits: RateLimiter, time: VirtualTime, asked: float | None) -> None:
    """Retry-After is obeyed, and a second it is when there is none; after that the pace is half, then whole again."""
    limits.update(L, 429, {}, asked)
    first, second = waits(limits, time, L, 2)
    assert first == pytest.approx((asked or 1) + 2 * 60 / 700, abs=MOMENT)
    assert second == pytest.approx(2 * 60 / 700, abs=MOMENT)
    later = time.now() + 60
    while time.now() < later:
        limits.acquire(L)
    assert pace(limits, time, L) == pytest.approx(700 / 60, rel=0.01)


def test_a_429_takes_half_of_what_goes_at_once(limits: RateLimiter, time: VirtualTime) -> None:
    """After a pause and a short rest less is sent at once than before."""
    limits.update(L, 429, {}, 1)
    time.wait(1 + 6)
    assert 31 <= waits(limits, time, L, 63).count(0) < 45


def test_many_refusals_in_one_pause_count_once(limits: RateLimiter, time: VirtualTime) -> None:
    """Calls in flight together are refused together; the longest pause counts."""
    for asked in (2, 5, 3):
        limits.update(L, 429, {}, asked)
    assert waits(limits, time, L, 1)[0] == pytest.approx(5 + 2 * 60 / 700, abs=MOMENT)


def test_the_pace_never_falls_to_nothing(limits: RateLimiter, time: VirtualTime) -> None:
    """However often it is refused, a sixteenth remains."""
    for _ in range(20):
        limits.update(L, 429, {}, 1)
        time.wait(1)
    assert 0.9 < waits(limits, time, L, 1)[0] <= 16 * 60 / 700


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
        window(limit="75, 75;w=1, 700;w=60"),
        window("1e999", "1e-999", "1e999"),
    ],
    ids=str,
)
def test_nonsense_changes_nothing(limits: RateLimiter, time: VirtualTime, headers: Mapping[str, str]) -> None:
    """A proxy's headers, or a slip of Klaviyo's, neither stop the endpoint nor end the pacing."""
    limits.update(L, 200, headers, None)
    assert waits(limits, time, L, 63) == [0] * 63
    assert pace(limits, time, L) == pytest.approx(700 / 60, rel=0.01)


def test_a_wait_too_long_is_the_queues(limits: RateLimiter, time: VirtualTime) -> None:
    """It is refused at once, with the time to come again; who was refused is in nobody's way."""
    limits.update(L, 429, {}, 300)
    before = time.now()
    for _ in range(5):
        with pytest.raises(Transient, match=r"PATCH /api/catalog-items/\{id\}") as refused:
            limits.acquire(L)
        assert refused.value.retry_after == pytest.approx(300, abs=1)
    assert time.now() == before
    time.wait(300)
    assert waits(limits, time, L, 1)[0] == pytest.approx(2 * 60 / 700, abs=MOMENT)


def test_who_waits_is_served_in_turn(limits: RateLimiter, time: VirtualTime) -> None:
    """Of a crowd each waits for its own time, as many as a minute has room for; the others need not try."""
    start = time.now()
    served: list[tuple[int, float]] = []
    refused: list[float | None] = []

    def call(number: int) -> None:
        try:
            limits.acquire(S)
            served.append((number, time.now()))
        except Transient as error:
            refused.append(error.retry_after)

    time.run(*(lambda number=number: call(number) for number in range(100)))
    numbers, moments = zip(*served, strict=True)
    assert sorted(numbers) == list(numbers)
    assert moments == pytest.approx([start, *(start + seconds for seconds in range(len(served) - 1))])
    assert len(served) == 62
    assert all(after is not None and after > MAX_WAIT for after in refused)


def test_a_pause_concerns_those_who_wait_already(limits: RateLimiter, time: VirtualTime) -> None:
    """A 429 that another thread gets is noticed before the call, not after."""
    start = time.now()
    waits(limits, time, M, 7)
    moments: list[float] = []

    def call() -> None:
        limits.acquire(M)
        moments.append(time.now())

    def refuse() -> None:
        time.wait(0.1)
        limits.update(M, 429, {}, 20)

    time.run(call, refuse)
    assert moments == [pytest.approx(start + 0.1 + 20 + 2 * 0.4, abs=0.02)]


def test_a_wait_ends_after_a_minute_whatever_happens_meanwhile(limits: RateLimiter, time: VirtualTime) -> None:
    """Pauses that follow each other must not hold a message without end."""
    start = time.now()
    limits.update(L, 429, {}, 50)
    moments: list[float] = []

    def call() -> None:
        with pytest.raises(Transient):
            limits.acquire(L)
        moments.append(time.now())

    def refuse() -> None:
        time.wait(20)
        limits.update(L, 429, {}, 50)

    time.run(call, refuse)
    assert moments == [pytest.approx(start + 20, abs=1)]


def test_stopping_ends_every_wait_at_once() -> None:
    """Threads that wait give up when the worker stops; none goes that had to wait."""
    stopping = Event()
    limits = RateLimiter(1.0, stopping, lambda: 0.0)
    with ThreadPoolExecutor(40) as threads:
        calls = [threads.submit(limits.acquire, M) for _ in range(40)]
        served = list(islice(as_completed(calls, timeout=60), 2))
        stopping.set()
    assert [call.exception() for call in served] == [None] * 2
    assert sum(isinstance(call.exception(), Transient) for call in calls) == 38


def test_what_need_not_wait_is_not_stopped() -> None:
    """The last calls of a worker that stops go on while they may."""
    stopping = Event()
    stopping.set()
    limits = RateLimiter(1.0, stopping, lambda: 0.0)
    for _ in range(2):
        limits.acquire(M)
    with pytest.raises(Transient):
        limits.acquire(M)


def run_workers(endpoint: str, limit: dict[int, int], number: int, share: float = 1.0) -> list[list[int]]:
    """Run workers with constant demand for two minutes on one account; return the statuses that each got.

    They start within a second, in the middle of a minute; a call takes 50 to 200 ms.
    """
    time, random = VirtualTime(), Random(7)
    account = Limiter(time.now)
    time.wait(20)
    end = time.now() + 120
    statuses: list[list[int]] = [[] for _ in range(number)]

    def work(worker: int, limits: RateLimiter) -> None:
        time.wait(worker / number)
        while time.now() < end - 1:
            limits.acquire(endpoint)
            time.wait(random.uniform(0.02, 0.1))
            status, headers, retry_after = 202, {}, None
            try:
                remaining, reset = account.take(endpoint, limit)
                headers = window(limit[60], remaining, reset)
            except Throttled as throttled:
                status, retry_after = 429, throttled.seconds
            time.wait(random.uniform(0.03, 0.1))
            limits.update(endpoint, status, headers, retry_after)
            statuses[worker].append(status)

    workers = [RateLimiter(share, time, time.now) for _ in range(number)]
    time.run(*(partial(work, *worker) for worker in enumerate(workers) for _ in range(4)))
    return statuses


@pytest.mark.parametrize(("endpoint", "limit"), [(S, {1: 3, 60: 60}), (M, {1: 10, 60: 150}), (L, {1: 75, 60: 750})])
@pytest.mark.parametrize("number", [2, 4])
def test_workers_share_an_account_without_knowing_of_each_other(
    endpoint: str, limit: dict[int, int], number: int
) -> None:
    """All always have work: the whole limit is used, hardly a call is refused, and each gets its part."""
    workers = run_workers(endpoint, limit, number)
    sent = [statuses.count(202) for statuses in workers]
    assert sum(sent) >= 0.97 * 2 * limit[60]
    assert sum(statuses.count(429) for statuses in workers) <= 0.02 * sum(sent)
    assert min(sent) >= 0.85 * sum(sent) / number


def test_a_worker_that_is_alone_uses_the_limit_up() -> None:
    """Its careful start costs little, and no call of its own is refused."""
    (statuses,) = run_workers(M, {1: 10, 60: 150}, 1)
    assert statuses.count(202) == len(statuses) >= 0.97 * 2 * 150


def test_fixed_shares_are_used_up_too() -> None:
    """A share that is set is not made smaller by the one that is learnt."""
    workers = run_workers(M, {1: 10, 60: 150}, 4, share=0.25)
    assert sum(statuses.count(202) for statuses in workers) >= 0.97 * 2 * 150


def test_a_raised_limit_is_used_as_far_as_the_burst_allows() -> None:
    """Klaviyo tells the steady limit only: at most seven tenths of the documented burst, and nothing is refused."""
    (statuses,) = run_workers(M, {1: 10, 60: 1500}, 1)
    assert statuses.count(202) == len(statuses) >= 0.95 * 7 * 120


def test_how_the_limits_stand_can_be_looked_at(limits: RateLimiter, time: VirtualTime) -> None:
    """By endpoint, without taking anything; what answers told of the account goes with its window."""
    assert limits.statuses().keys() == {S, M, L}
    assert list(limits.statuses()[M]) == [10, 150, pytest.approx(150), 0.0, None, 0]
    for _ in range(3):
        limits.acquire(M)
    limits.update(M, 200, {"RateLimit-Limit": "120", "RateLimit-Remaining": "100", "RateLimit-Reset": "20"}, None)
    for _ in range(2):
        stands = limits.statuses()[M]
        assert [stands.steady, stands.remaining, stands.waiting] == [pytest.approx(120), 100, 0]
    assert stands.burst_used > 0
    time.wait(21)
    assert limits.statuses()[M].remaining is None
    limits.update(M, 429, {}, 5)
    stands = limits.statuses()[M]
    assert [stands.burst_used, stands.pace] == [1.0, pytest.approx(60)]
