"""Pages of records in the order of their ids. A page whose request failed is requested again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from worker.commercetools.page_sizes import MAX_PAGE_SIZE
from worker.errors import Rejected, Transient, WorkerError
from worker.json_access import as_text

if TYPE_CHECKING:
    from worker.commands.backfill.records import RecordSelection
    from worker.commercetools.client import Commercetools
    from worker.model import Json

Page = list[tuple[str, "Json | Rejected"]]  # the id, and the resource or the reason why it cannot be sent


class RecordPages(Protocol):
    """A cursor over records."""

    def next_page(self) -> Page:
        """Return the next records; [] after the last. Raises WorkerError and keeps its position."""

    def count(self) -> int:
        """Return the number of remaining records. Raises WorkerError."""


def open_pages(commercetools: Commercetools, selection: RecordSelection, after: str) -> RecordPages:
    """Return the records whose ids come after `after`; "" for all."""
    return (_ById if selection.ids else _ByTime)(commercetools, selection, after)


class _ByTime:
    """All records of a selection. A record created during the run is included if its id comes later."""

    def __init__(self, commercetools: Commercetools, selection: RecordSelection, after: str) -> None:
        self._commercetools = commercetools
        self._query = selection.kind.query
        self._where = selection.where
        self._after = after

    def next_page(self) -> Page:
        resources = self._commercetools.page(self._query, self._where, self._after)
        page: Page = [(as_text(resource.get("id")), resource) for resource in resources]
        if not all(record_id for record_id, _ in page):  # the next request needs the last id
            raise Transient(f"commercetools returned {self._query.path} without ids")
        if page:
            self._after = page[-1][0]
        return page

    def count(self) -> int:
        return self._commercetools.count(self._query, self._where, self._after)


class _ById:
    """The records with the selected ids."""

    def __init__(self, commercetools: Commercetools, selection: RecordSelection, after: str) -> None:
        self._commercetools = commercetools
        self._query = selection.kind.query
        self._resource_type = selection.kind.resource_type
        self._ids = [record_id for record_id in selection.ids if record_id > after]

    def next_page(self) -> Page:
        ids = self._ids[:MAX_PAGE_SIZE]
        found = self._commercetools.find(self._query, ids)
        page = [(record_id, self._resource_or_rejection(found[record_id])) for record_id in ids]
        del self._ids[:MAX_PAGE_SIZE]
        return page

    def count(self) -> int:
        return len(self._ids)

    def _resource_or_rejection(self, found: list[Json] | WorkerError) -> Json | Rejected:
        if isinstance(found, Rejected):
            return found
        if isinstance(found, WorkerError):
            raise found
        return found[0] if found else Rejected(f"commercetools has no such {self._resource_type}")
