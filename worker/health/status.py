"""What the status page shows. Read-only, from memory, and nothing of it personal."""

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

from worker.health.condition import condition
from worker.health.history import STEP, History
from worker.telemetry.metrics import OUTCOMES, SERVICES

if TYPE_CHECKING:
    from worker.settings import Settings
    from worker.telemetry.message_log import Telemetry
    from worker.telemetry.state import WorkerState


class Status:
    """Tells how a worker is, and how it was in the last ten minutes, which a thread of its own samples."""

    def __init__(self, settings: Settings, state: WorkerState, telemetry: Telemetry) -> None:
        self._settings = settings
        self._state = state
        self._telemetry = telemetry
        self._history = History(telemetry.metrics)
        self._worker = {
            "version": version("klaviyo-worker"),
            "host": socket.gethostname(),
            "process": os.getpid(),
            "queue": redacted(settings.queue_url),
            "started": _now(),
        }
        self._ended = Event()

    def start(self) -> None:
        """Begin to sample."""
        Thread(target=self._run, name="status", daemon=True).start()

    def stop(self) -> None:
        """Sample no more."""
        self._ended.set()

    def sample(self, now: float) -> None:
        """Note how it is at `now`, in monotonic seconds."""
        self._history.sample(now, self._state.oldest_age())

    def render(self) -> bytes:
        """Return the document as JSON; by json, as orjson refuses texts with half a character."""
        return json.dumps(self.document()).encode()

    def document(self) -> dict[str, Any]:
        """Return all that the page shows."""
        state, requests = self._state, self._history.requests_lately()
        backlog, dead_letters = self._counted()
        return {
            "now": _now(),
            "worker": self._worker,
            "state": condition(state, settled_lately=self._history.settled_lately() > 0),
            "messages": {
                "in_flight": state.in_flight(),
                "max_in_flight": self._settings.max_in_flight,
                "waiting": state.held(),
                "oldest_age": state.oldest_age(),
                "backlog": backlog,
                "dead_letters": dead_letters,
            },
            "history": {"step": STEP, **self._history.series(time.monotonic())},
            "services": self._services(requests),
            "lanes": state.batch_sizes(),
            "batch": self._history.batch_lately(),
            "outcomes": self._outcomes(),
            "limits": self._limits(requests),
            "failures": self._telemetry.failures.newest(),
        }

    def _counted(self) -> tuple[int | None, int | None]:
        try:
            return self._state.backlog(), self._state.dead_letters()
        except Exception:  # noqa: BLE001 - a queue that cannot tell must not take the page with it; /metrics says why
            return None, None

    def _services(self, requests: dict[tuple[str, str], int]) -> list[dict[str, Any]]:
        made: Counter[str] = Counter()
        for (service, _), number in requests.items():
            made[service] += number
        outages = self._state.outage_reasons()
        return [{"service": name, "outage": outages[name], "requests": made[name]} for name in SERVICES]

    def _outcomes(self) -> list[dict[str, Any]]:
        """Count messages since the start by type, those with most of them first."""
        types: defaultdict[str, dict[str, int]] = defaultdict(dict)
        for (kind, outcome), messages in self._telemetry.metrics.outcomes().items():
            types[kind][outcome] = messages
        seen = [(sum(by.values()), kind, by) for kind, by in types.items() if any(by.values())]
        return [
            {"type": kind, **{o: by[o] for o in OUTCOMES}} for _, kind, by in sorted(seen, key=lambda s: (-s[0], s[1]))
        ]

    def _limits(self, requests: dict[tuple[str, str], int]) -> list[dict[str, Any]]:
        """Return how much of the limits was used that were needed within a minute, the most used first."""
        share = self._settings.rate_limit_share
        lines = [
            {
                "endpoint": endpoint,
                "used": requests.get(("klaviyo", endpoint), 0),
                "steady": round(standing.steady * share),
                "burst": round(standing.burst * share),
                "burst_used": round(standing.burst_used, 2),
                "pace": round(standing.pace),
                "remaining": None if standing.remaining is None else round(standing.remaining),
                "waiting": standing.waiting,
            }
            for endpoint, standing in self._state.rate_limit_status().items()
        ]
        needed = [line for line in lines if line["used"] or line["waiting"]]
        return sorted(needed, key=lambda line: (-line["used"] / max(line["steady"], 1), line["endpoint"]))

    def _run(self) -> None:
        self.sample(time.monotonic())
        while not self._ended.wait(STEP):
            self.sample(time.monotonic())


def redacted(queue_url: str) -> str:
    """Return a QUEUE_URL without its query, and without who asks and by which password."""
    scheme, _, rest = queue_url.partition("://")
    place = rest.partition("?")[0].partition("#")[0]
    return f"{scheme}://{place.rpartition('@')[2]}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
