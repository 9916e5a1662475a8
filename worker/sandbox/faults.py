"""Failures that an emulated service injects into its responses."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from worker.sandbox.http import ApiRequest

ACTIONS = frozenset({"respond", "reset", "hang", "slow", "lose_response", "truncate"})


@dataclass(frozen=True, slots=True)
class Fault:
    """A failure that the server injects into matching requests.

    `times`: how many requests fail, or None for all until the faults are cleared. `match`: a regular expression that
    must be found in "METHOD /path". `contains`: bytes that the body must contain. Actions:

    - `respond`: send `status` instead of handling the request
    - `reset`: reset the connection without a response
    - `hang`: close the connection after `seconds`
    - `slow`: handle the request after `seconds`
    - `lose_response`: handle the request, then reset the connection after `seconds`
    - `truncate`: handle the request, then reset the connection halfway through the response
    """

    status: int = 503
    times: int | None = 1
    match: str = ""
    contains: bytes = b""
    action: str = "respond"
    seconds: float = 0.0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    probability: float = 1.0

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ValueError(f"unknown action {self.action!r}")


class Faults:
    """The active faults, oldest first."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self._lock = Lock()
        self._active: list[list[Any]] = []  # [fault, times left]
        self.triggered = 0  # requests that a fault was injected into

    def add(self, *faults: Fault) -> None:
        """Activate faults."""
        with self._lock:
            self._active += [[fault, fault.times] for fault in faults]

    def clear(self) -> None:
        """Deactivate all faults."""
        with self._lock:
            self._active.clear()

    def trigger(self, request: ApiRequest) -> Fault | None:
        """Return the fault to inject into this request, if any, and count it."""
        if not self._active:
            return None
        name = f"{request.method} {request.path}"
        with self._lock:
            for entry in self._active:
                fault, left = entry
                is_match = re.search(fault.match, name) and fault.contains in request.body
                if is_match and self._random.random() < fault.probability:
                    self.triggered += 1
                    if left is not None:
                        entry[1] = left - 1
                        self._active = [entry for entry in self._active if entry[1] != 0]
                    return fault  # type: ignore[no-any-return]
        return None


def parse_fault(fields: dict[str, Any]) -> Fault:
    """Return the fault that a test in another process describes. Raises TypeError, ValueError or AttributeError."""
    texts = {name: fields[name].encode() for name in ("contains", "body") if fields.get(name) is not None}
    return Fault(**(fields | texts))
