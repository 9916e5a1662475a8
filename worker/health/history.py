"""The history of the last ten minutes. It is sampled from the metrics, so it adds no work per message."""

from __future__ import annotations

from collections import Counter, deque
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from worker.telemetry.metrics import Metrics

STEP = 5.0  # seconds between two samples
STEPS = 120  # the number of steps in the history
MINUTE = round(60 / STEP)  # the number of steps in a minute


class _Sample(NamedTuple):
    """The totals of messages at a point in time."""

    at: float  # monotonic seconds
    outcomes: Mapping[str, int]
    ages: tuple[int, float]
    oldest: float | None


class _RequestTotals(NamedTuple):
    """The totals of requests and batches at a point in time."""

    requests: Mapping[tuple[str, str], int]
    batches: tuple[int, float]


class History:
    """The samples of the last ten minutes. All times are monotonic seconds."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._samples: deque[_Sample] = deque(maxlen=STEPS + 1)
        self._request_totals: deque[_RequestTotals] = deque(maxlen=MINUTE + 1)

    def sample(self, now: float, oldest: float | None) -> None:
        """Take a sample. `oldest` is the age of the oldest message in flight, in seconds."""
        outcomes: Counter[str] = Counter()
        for (_, outcome), messages in self._metrics.outcomes().items():
            outcomes[outcome] += messages
        self._samples.append(_Sample(now, outcomes, self._metrics.ages(), oldest))
        self._request_totals.append(_RequestTotals(self._metrics.requests(), self._metrics.batches()))

    def series(self, now: float) -> dict[str, list[Any]]:
        """Return the values of the charts by step, oldest first.

        `ago` is the number of seconds since the step ended. `sent`, `ignored` and `failed` are messages per second;
        `failed` counts messages that were dead-lettered or nacked after a failure. `age` is the mean number of seconds
        from publishing a message to its effect. `oldest` is the age of the oldest message in flight in seconds. `age`
        and `oldest` are None if unknown.
        """
        samples = list(self._samples)
        steps = [_step(before, after) | {"ago": round(now - after.at, 1)} for before, after in pairwise(samples)]
        return {name: [step[name] for step in steps] for name in ("ago", "sent", "ignored", "failed", "age", "oldest")}

    def recently_settled(self) -> int:
        """Return the number of messages settled in the last minute, including those since the last sample."""
        samples = list(self._samples)[-MINUTE - 1 :]
        if not samples:
            return 0
        return sum(self._metrics.outcomes().values()) - sum(samples[0].outcomes.values())

    def recent_requests(self) -> dict[tuple[str, str], int]:
        """Return the number of requests in the last minute, by service and endpoint."""
        first, last = self._last_minute()
        return {key: total - first.requests.get(key, 0) for key, total in last.requests.items()}

    def recent_batch_size(self) -> float | None:
        """Return the mean size of the batches in the last minute; None if there was no batch."""
        first, last = self._last_minute()
        return _mean(first.batches, last.batches)

    def _last_minute(self) -> tuple[_RequestTotals, _RequestTotals]:
        """Return the totals a minute ago and now."""
        totals = list(self._request_totals) or [_RequestTotals({}, (0, 0.0))]
        return totals[0], totals[-1]


def _step(before: _Sample, after: _Sample) -> dict[str, Any]:
    seconds = max(after.at - before.at, 0.001)
    settled = {name: after.outcomes[name] - before.outcomes[name] for name in after.outcomes}
    return {
        "sent": round(settled["sent"] / seconds, 2),
        "ignored": round(settled["ignored"] / seconds, 2),
        "failed": round((settled["retried"] + settled["dead_lettered"]) / seconds, 2),
        "age": _mean(before.ages, after.ages),
        "oldest": None if after.oldest is None else round(after.oldest, 1),
    }


def _mean(before: tuple[int, float], after: tuple[int, float]) -> float | None:
    """Return the mean of the values that were added between two totals (number, sum); None if none was added."""
    number = after[0] - before[0]
    return round((after[1] - before[1]) / number, 3) if number else None
