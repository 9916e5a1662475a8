"""The records of a backfill, page by page in the order of their ids. A page that could not be read is read again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from worker.commercetools.client import PAGE_SIZE
from worker.errors import Rejected, Transient, WorkerError
from worker.json_access import as_text

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from worker.commands.backfill.records import Selection
    from worker.commercetools import queries
    from worker.model import Json

Page = list[tuple[str, "Json | Rejected"]]  # the id, and its resource or why there is none


class Shop(Protocol):
    """What a backfill reads: commercetools."""

    def find(self, query: queries.Query, values: Collection[str]) -> queries.QueryResult:
        """Find the resources for all values at once. Never raises for a single value."""

    def page(self, query: queries.Query, where: str, after: str) -> list[Json]:
        """Return the next resources by id, PAGE_SIZE at most. Raises WorkerError."""

    def count(self, query: queries.Query, where: str, after: str) -> int:
        """Count the resources that pages would give. Raises WorkerError."""


class Listing(Protocol):
    """Where records come from."""

    def next_page(self) -> Page:
        """Return the records after those returned so far; [] when there are no more. Raises WorkerError."""

    def count(self) -> int:
        """Count the records still to be returned. Raises WorkerError."""


def listing(shop: Shop, selection: Selection, after: str) -> Listing:
    """Return the records that come after an id; "": all."""
    return _Named(shop, selection, after) if selection.ids else _Paged(shop, selection, after)


class _Paged:
    """All of a selection; those that come while it is read too, if their ids are still ahead."""

    def __init__(self, shop: Shop, selection: Selection, after: str) -> None:
        self._shop = shop
        self._query = selection.collection.query
        self._where = selection.where
        self._after = after

    def next_page(self) -> Page:
        page = [(as_text(resource.get("id")), resource) for resource in self._read()]
        if not all(record_id for record_id, _ in page):  # the next page could not be told from this one
            raise Transient(f"commercetools answered for {self._query.path} without ids")
        if page:
            self._after = page[-1][0]
        return list(page)

    def count(self) -> int:
        return self._shop.count(self._query, self._where, self._after)

    def _read(self) -> Sequence[Json]:
        return self._shop.page(self._query, self._where, self._after)


class _Named:
    """Those named by their ids."""

    def __init__(self, shop: Shop, selection: Selection, after: str) -> None:
        self._shop = shop
        self._query = selection.collection.query
        self._resource_type = selection.collection.resource_type
        self._ids = [record_id for record_id in selection.ids if record_id > after]

    def next_page(self) -> Page:
        ids = self._ids[:PAGE_SIZE]
        found = self._shop.find(self._query, ids)
        page = [(record_id, self._judged(found[record_id])) for record_id in ids]
        del self._ids[:PAGE_SIZE]
        return page

    def count(self) -> int:
        return len(self._ids)

    def _judged(self, found: list[Json] | WorkerError) -> Json | Rejected:
        if isinstance(found, WorkerError):
            if isinstance(found, Rejected):
                return found
            raise found
        return found[0] if found else Rejected(f"commercetools has no such {self._resource_type}")
