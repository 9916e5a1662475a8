"""The data of the status page. It is read from memory and contains no personal data."""

from __future__ import annotations

import json
import os
import socket
import time
from collections import Counter, defaultdict
from datetime import UTC, datetime
from importlib.metadata import version
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from worker.health.history import STEP, History
from worker.health.state import condition_of
from worker.model import Effect
from worker.telemetry.metrics import OUTCOMES, SERVICES

if TYPE_CHECKING:
    from worker.settings import Settings
    from worker.telemetry.message_log import Telemetry
    from worker.telemetry.state import WorkerState


class Status:
    """The state of a worker now and in the last ten minutes. A separate thread takes the samples."""

    def __init__(self, settings: Settings, state: WorkerState, telemetry: Telemetry) -> None:
        self._settings = settings
        self._state = state
        self._telemetry = telemetry
        self._history = History(telemetry.metrics)
        self._worker = {
            "version": version("klaviyo-worker"),
            "host": socket.gethostname(),
            "process": os.getpid(),
            "queue": redact(settings.queue_url),
            "project": settings.ct_project_id,
            "started": _now(),
        }
        self._stopped = Event()

    def start(self) -> None:
        """Start sampling."""
        Thread(target=self._run, name="status", daemon=True).start()

    def stop(self) -> None:
        """Stop sampling."""
        self._stopped.set()

    def sample(self, now: float) -> None:
        """Take a sample. `now` is in monotonic seconds."""
        self._history.sample(now, self._state.oldest_age())

    def render(self) -> bytes:
        """Return the document as JSON. orjson cannot be used, because it rejects strings with lone surrogates."""
        return json.dumps(self.document()).encode()

    def document(self) -> dict[str, Any]:
        """Return the data of the page."""
        state = self._state
        requests = self._history.recent_requests()
        backlog, dead_letters = self._counts()
        return {
            "now": _now(),
            "worker": self._worker,
            "state": condition_of(state, settled_recently=self._history.recently_settled() > 0)._asdict(),
            "messages": {
                "in_flight": state.in_flight(),
                "max_in_flight": len(Effect) * self._settings.max_in_flight,
                "held": state.held(),
                "oldest_age": state.oldest_age(),
                "backlog": backlog,
                "dead_letters": dead_letters,
            },
            "history": {"step": STEP, **self._history.series(time.monotonic())},
            "services": self._services(requests),
            "lanes": state.batch_sizes(),
            "batch": self._history.recent_batch_size(),
            "outcomes": self._outcomes(),
            "excluded": self._telemetry.metrics.excluded(),
            "limits": self._limits(requests),
            "bulk_events": state.bulk_events()._asdict(),
            "failures": self._telemetry.failures.newest(),
        }

    def _counts(self) -> tuple[int | None, int | None]:
        try:
            return self._state.backlog(), self._state.dead_letters()
        except Exception:  # noqa: BLE001 - the page must work without the queue; /metrics logs the error
            return None, None

    def _services(self, requests: dict[tuple[str, str], int]) -> list[dict[str, Any]]:
        totals: Counter[str] = Counter()
        for (service, _), number in requests.items():
            totals[service] += number
        outages = self._state.outage_reasons()
        return [{"service": name, "outage": outages[name], "requests": totals[name]} for name in SERVICES]

    def _outcomes(self) -> list[dict[str, Any]]:
        """Return the number of messages since the start by type and outcome. The most frequent types come first."""
        types: defaultdict[str, dict[str, int]] = defaultdict(dict)
        for (kind, outcome), messages in self._telemetry.metrics.outcomes().items():
            types[kind][outcome] = messages
        rows = [
            {"type": kind, **{outcome: counts[outcome] for outcome in OUTCOMES}}
            for kind, counts in types.items()
            if any(counts.values())
        ]
        return sorted(rows, key=lambda row: (-sum(row[outcome] for outcome in OUTCOMES), row["type"]))

    def _limits(self, requests: dict[tuple[str, str], int]) -> list[dict[str, Any]]:
        """Return the rate limits that were used in the last minute. The most used ones come first."""
        share = self._settings.rate_limit_share
        lines = [
            {
                "endpoint": endpoint,
                "used": requests.get(("klaviyo", endpoint), 0),
                "steady": round(status.steady * share),
                "burst": round(status.burst * share),
                "burst_used": round(status.burst_used, 2),
                "pace": round(status.pace),
                "remaining": None if status.remaining is None else round(status.remaining),
                "waiting": status.waiting,
            }
            for endpoint, status in self._state.rate_limit_status().items()
        ]
        used = [line for line in lines if line["used"] or line["waiting"]]
        return sorted(used, key=lambda line: (-line["used"] / max(line["steady"], 1), line["endpoint"]))

    def _run(self) -> None:
        self.sample(time.monotonic())
        while not self._stopped.wait(STEP):
            self.sample(time.monotonic())


def redact(queue_url: str) -> str:
    """Return a QUEUE_URL without user, password, query and fragment."""
    scheme, _, rest = queue_url.partition("://")
    place = rest.partition("?")[0].partition("#")[0]
    return f"{scheme}://{place.rpartition('@')[2]}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
