"""The last ten minutes, from the counters that there are anyway: no message costs more for it."""

from __future__ import annotations

from collections import Counter, deque
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from worker.telemetry.metrics import Metrics

STEP = 5.0  # seconds between two samples
STEPS = 120  # that are kept
MINUTE = round(60 / STEP)  # in steps


class _Sample(NamedTuple):
    """Totals at a time."""

    at: float
    outcomes: Mapping[str, int]
    ages: tuple[int, float]
    oldest: float | None


class _Calls(NamedTuple):
    requests: Mapping[tuple[str, str], int]
    batches: tuple[int, float]


class History:
    """Samples, of which the oldest give way. All times are monotonic seconds."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._samples: deque[_Sample] = deque(maxlen=STEPS + 1)
        self._calls: deque[_Calls] = deque(maxlen=MINUTE + 1)

    def sample(self, now: float, oldest: float | None) -> None:
        """Take a sample; `oldest`: the age of the oldest message in flight, in seconds."""
        outcomes: Counter[str] = Counter()
        for (_, outcome), messages in self._metrics.outcomes().items():
            outcomes[outcome] += messages
        self._samples.append(_Sample(now, outcomes, self._metrics.ages(), oldest))
        self._calls.append(_Calls(self._metrics.requests(), self._metrics.batches()))

    def series(self, now: float) -> dict[str, list[Any]]:
        """Return what charts show, by step, the oldest first.

        `ago`: seconds since the step ended. Messages per second: `sent`, `ignored`, `failed`, that is given up or
        returned to be tried again. Seconds: `age`, the mean from publishing to effect, and `oldest`, the age of the
        oldest message in flight; None where there is nothing to tell.
        """
        steps = [_step(before, after) | {"ago": round(now - after.at, 1)} for before, after in pairwise(self._kept())]
        return {name: [step[name] for step in steps] for name in ("ago", "sent", "ignored", "failed", "age", "oldest")}

    def settled_lately(self) -> int:
        """Count the messages that were settled within about a minute, and until this moment."""
        last = self._kept()[-MINUTE - 1 :]
        return sum(self._metrics.outcomes().values()) - sum(last[0].outcomes.values()) if last else 0

    def requests_lately(self) -> dict[tuple[str, str], int]:
        """Count the requests within about a minute, by service and endpoint."""
        first, last = self._minute()
        return {key: total - first.requests.get(key, 0) for key, total in last.requests.items()}

    def batch_lately(self) -> float | None:
        """Return the mean size of a batch within about a minute; None when there was none."""
        first, last = self._minute()
        return _mean(first.batches, last.batches)

    def _kept(self) -> list[_Sample]:
        return list(self._samples)

    def _minute(self) -> tuple[_Calls, _Calls]:
        calls = list(self._calls) or [_Calls({}, (0, 0.0))]
        return calls[0], calls[-1]


def _step(before: _Sample, after: _Sample) -> dict[str, Any]:
    seconds = max(after.at - before.at, 0.001)
    done = {name: after.outcomes[name] - before.outcomes[name] for name in after.outcomes}
    rates = {"sent": done["sent"], "ignored": done["ignored"], "failed": done["retried"] + done["dead_lettered"]}
    oldest = None if after.oldest is None else round(after.oldest, 1)
    return {
        **{name: round(messages / seconds, 2) for name, messages in rates.items()},
        "age": _mean(before.ages, after.ages),
        "oldest": oldest,
    }


def _mean(before: tuple[int, float], after: tuple[int, float]) -> float | None:
    """Return the mean of what came between two totals of number and sum."""
    number = after[0] - before[0]
    return round((after[1] - before[1]) / number, 3) if number else None
