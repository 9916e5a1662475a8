"""The requests to an emulated service, and its responses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from collections.abc import Mapping

Json = dict[str, Any]  # a JSON object


@dataclass(frozen=True, slots=True)
class ApiRequest:
    """A request to a service. `query` contains decoded values."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes
    target: str  # as sent, not decoded

    def json(self) -> Any:
        """Return the decoded body. Raises ValueError."""
        return orjson.loads(self.body)


@dataclass(frozen=True, slots=True)
class ApiResponse:
    """A response: status, JSON document (None: an empty body) and headers."""

    status: int
    document: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
