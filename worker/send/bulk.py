"""What sending needs of Klaviyo's client, and of each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from worker.json_access import as_dict, as_dicts, as_text
from worker.model import Json, Operation, Sent

Body = Json | bytes | Callable[[], bytes] | None
OneByOne = Callable[[Sequence[Operation]], Iterable[Sent]]


class Client(Protocol):
    """Klaviyo's HTTP API."""

    def call(self, method: str, path: str, body: Body = None, *, repeat: bool = True) -> Json:
        """Call an endpoint, once or repeatedly, and return the decoded answer. Raises WorkerError.

        `body`: bytes are JSON already; a function is asked for them when the call's turn has come within
        Klaviyo's limits, and again if the call is throttled. `repeat` False: not sent again when its fate is unknown.
        """

    def made(self) -> int:
        """Return how many requests the calling thread has made."""


def pages(client: Client, path: str) -> Iterator[Json]:
    """Yield the resources of a list, page by page. Raises WorkerError."""
    while path:
        page = client.call("GET", path)
        yield from as_dicts(page.get("data"))
        following = as_text(as_dict(page.get("links")).get("next"))
        path = following[following.find("/api/") :] if "/api/" in following else ""


def completed(operations: Sequence[Operation], verdicts: Sequence[Sent | None], one_by_one: OneByOne) -> list[Sent]:
    """Carry out one by one what a bulk call left without a verdict (None), and return all results."""
    alone = [operation for operation, verdict in zip(operations, verdicts, strict=True) if verdict is None]
    rest = iter(one_by_one(alone))
    return [next(rest) if verdict is None else verdict for verdict in verdicts]
