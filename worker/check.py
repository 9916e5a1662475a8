"""Tells whether queue, commercetools and Klaviyo let the worker work, and what to do where they do not."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from threading import Event
from typing import TYPE_CHECKING, Any

import orjson

from adapters import QueueError, QueueURLError, open_queue
from worker import commercetools as ct
from worker import probe
from worker.commercetools import Commercetools
from worker.errors import Misconfigured, Transient, WorkerError
from worker.klaviyo import Klaviyo
from worker.loose import unique

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from worker.settings import Settings

UNEXPECTED, QUEUE, COMMERCETOOLS, KLAVIYO = 1, 3, 4, 5  # exit codes
_NOBODY = "00000000-0000-4000-8000-000000000000"
_READS = (
    (ct.ORDERS, "view_orders"),
    (ct.PAYMENTS, "view_payments"),
    (ct.CUSTOMERS, "view_customers"),
    (ct.CATEGORIES, "view_products"),
    (ct.PRODUCTS, "view_products"),
    (ct.INVENTORY, "view_products"),
)
_WRITES = ("events:write", "profiles:write", "catalogs:write")
_IMPORT_JOBS = ("profiles:read", "lists:read", "lists:write")

Ask = tuple[str, "Callable[[], object]"]  # the scope it needs, and what needs it


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found; `exit_code` 0: all is well."""

    check: str
    text: str
    exit_code: int = 0
    details: dict[str, str] = field(default_factory=dict)

    def line(self) -> str:
        """Return it for people."""
        return f"{self._status:<8}{self.check:<15}{self.text}"

    def json(self) -> bytes:
        """Return it for scripts."""
        return orjson.dumps({"check": self.check, "status": self._status, "text": self.text, **self.details})

    @property
    def _status(self) -> str:
        return "failed" if self.exit_code else "ok"


def check(settings: Settings, probe_wait: float | None, say: Callable[[str], None]) -> Iterator[Finding]:
    """Yield what is found, service by service.

    `probe_wait`: seconds each bulk call of the probe is given; None: no probe, and nothing is written anywhere.
    `say` is told what the probe waits for. Raises SettingsError and QueueURLError.
    """
    stopping = Event()
    erasure = settings.mapping().customer.erasure
    yield _tried("queue", QUEUE, partial(_queue, settings))
    reader = Commercetools(settings, stopping)
    yield _tried("commercetools", COMMERCETOOLS, partial(_commercetools, reader))
    client = Klaviyo(settings, stopping)
    found = _tried("klaviyo", KLAVIYO, partial(_klaviyo, client, erasure=erasure, probing=probe_wait is not None))
    yield found
    if probe_wait is not None and not found.exit_code:
        yield _bulk_events(client, probe_wait, say)


def _tried(name: str, exit_code: int, ask: Callable[[], str]) -> Finding:
    try:
        return Finding(name, ask())
    except QueueURLError:
        raise
    except Transient as error:
        return Finding(name, f"{error}: check the URL, the network and its proxy, or try again later", exit_code)
    except (QueueError, WorkerError) as error:
        return Finding(name, str(error), exit_code)


def _queue(settings: Settings) -> str:
    queue = open_queue(settings.queue_url, settings.queue_options)
    try:
        return "; ".join(["may be consumed", *queue.check()])
    finally:
        queue.close()


def _commercetools(reader: ct.Reader) -> str:
    _ask_all([(scope, partial(_read, reader, query)) for query, scope in _READS])
    text = f"{', '.join(query.path for query, _ in _READS)} may be read"
    try:
        _read(reader, ct.DISCOUNT_CODES)
    except Misconfigured:
        return f"{text}; without the scope view_discount_codes, orders are sent without the names of their codes"
    return text


def _read(reader: ct.Reader, query: ct.Query) -> None:
    """Ask as the worker does, for what does not exist."""
    (found,) = reader.find(query, [_NOBODY]).values()
    if isinstance(found, WorkerError):
        raise found


def _klaviyo(client: Klaviyo, *, erasure: bool, probing: bool) -> str:
    reads = {"catalogs:read": "/api/catalog-items"} | (probe.SCOPES if probing else {})
    if erasure:
        reads["profiles:read"] = "/api/profiles"
    _ask_all([(scope, partial(client.call, "GET", f"{path}?page%5Bsize%5D=1")) for scope, path in reads.items()])
    writes = [*_WRITES, *(["data-privacy:write"] if erasure else [])]
    text = f"the key has {', '.join(reads)}; it also needs {', '.join(writes)}, which only show when they are used"
    try:
        client.call("GET", "/api/profile-bulk-import-jobs?page%5Bsize%5D=1")
    except Misconfigured:
        return f"{text}; without {', '.join(_IMPORT_JOBS)}, customers go one by one, however many wait"
    return text


def _ask_all(asks: Sequence[Ask]) -> None:
    """Ask everything, so that all scopes that are missing can be named. Raises the first refusal, or WorkerError."""
    refused: list[tuple[str, Misconfigured]] = []
    for scope, ask in asks:
        try:
            ask()
        except Misconfigured as error:
            refused.append((scope, error))
    if not refused:
        return
    first = refused[0][1]
    if len({str(error) for _, error in refused}) < len(refused):  # no token: the same words for whatever is asked
        raise first
    raise type(first)(f"{first}: {', '.join(unique(scope for scope, _ in refused))}")


def _bulk_events(client: Klaviyo, wait: float, say: Callable[[str], None]) -> Finding:
    try:
        verdict = probe.BulkProbe(client, wait, say).run()
    except Misconfigured as error:
        return Finding("bulk events", f"{error}: events:write", KLAVIYO)
    except WorkerError as error:
        return Finding("bulk events", f"{error}: nothing is known", KLAVIYO)
    exit_code = UNEXPECTED if verdict.repeat == "undecided" else 0
    details: dict[str, Any] = {"repeat": verdict.repeat, "recommended": verdict.recommended}
    return Finding("bulk events", str(verdict), exit_code, details)
