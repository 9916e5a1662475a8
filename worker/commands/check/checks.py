"""Tells whether configuration, queue, commercetools and Klaviyo let the worker work, and what to do where not."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from threading import Event
from typing import TYPE_CHECKING

from adapters import QueueError, QueueURLError, open_queue, scheme_of
from worker.commands.check import bulk_probe as probe
from worker.commands.check.check_result import Finding, failed
from worker.commands.subscriptions.client import SCOPE, NotPermitted, Subscriptions
from worker.commands.subscriptions.health import HEALTHY, explain_status
from worker.commands.subscriptions.plan import KEY
from worker.commands.subscriptions.spec import required_spec, spec_of
from worker.commercetools import queries
from worker.commercetools.client import Commercetools
from worker.errors import ExitCode, Misconfigured, Rejected, SettingsError, WorkerError
from worker.json_access import as_text, unique
from worker.klaviyo.client import Klaviyo
from worker.transform import HANDLERS

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from worker.mapping import MappingConfig
    from worker.settings import Settings

_NOBODY = "00000000-0000-4000-8000-000000000000"
_EVENTS, _CATALOG = frozenset({"order", "payment"}), frozenset({"category", "product", "inventory-entry"})
_CUSTOMER = frozenset({"customer"})
_READS = (  # what is asked, the scope that takes, and for the handlers of which resource types; see worker/enrich.py
    (queries.ORDERS, "view_orders", _EVENTS),
    (queries.PAYMENTS, "view_payments", frozenset({"payment"})),
    (queries.CUSTOMERS, "view_customers", _EVENTS | _CUSTOMER),
    (queries.CATEGORIES, "view_products", _EVENTS | _CATALOG),
    (queries.PRODUCTS, "view_products", _EVENTS | {"product", "inventory-entry"}),
    (queries.INVENTORY, "view_products", frozenset({"product", "inventory-entry"})),
)
_WRITES = (  # the scope, what takes it, and for the handlers of which resource types
    ("events:write", "/api/events", _EVENTS),
    ("profiles:write", "/api/profile-import", _CUSTOMER),
    ("catalogs:write", "/api/catalog-items", _CATALOG),
)
_IMPORT_JOBS = ("profiles:read", "lists:read", "lists:write")
_ELSEWHERE = "check the URL, the network and its proxy, or try again later"

Ask = tuple[str, "Callable[[], object]"]  # the scope it needs, and what needs it


def check(
    read: Callable[[], Settings], key: str, probe_wait: float | None, say: Callable[[str], None]
) -> Iterator[Finding]:
    """Yield what is found, service by service; of the configuration alone where that is wrong.

    `read` reads the settings, `key` is the subscription's. `probe_wait`: seconds each bulk call of the probe is
    given; None: no probe, and nothing is written anywhere. `say` is told what the probe waits for.
    """
    try:
        settings = read()
        mapping = settings.mapping()
        queue = _tried(
            "queue", ExitCode.QUEUE, partial(_queue, settings)
        )  # its URL is configuration, but only it can tell
    except (SettingsError, QueueURLError) as error:
        for problem in error.problems if isinstance(error, SettingsError) else [error]:
            yield failed("configuration", ExitCode.USAGE, problem, otherwise="correct it")
        return
    yield Finding("configuration", "ok", _configuration(settings, mapping))
    yield queue
    stopping = Event()
    resources = frozenset(resource for resource, kind in HANDLERS if kind not in mapping.disabled_types)
    reader = Commercetools(settings, stopping)
    yield _tried("commercetools", ExitCode.COMMERCETOOLS, partial(_commercetools, reader, resources))
    client = Klaviyo(settings, stopping)
    erasure, probing = mapping.customer.erasure and "customer" in resources, probe_wait is not None
    found = _tried("klaviyo", ExitCode.KLAVIYO, partial(_klaviyo, client, resources, erasure=erasure, probing=probing))
    yield found
    yield _tried(
        "subscriptions",
        ExitCode.COMMERCETOOLS,
        partial(_subscription, Subscriptions(reader), key, mapping.disabled_types),
    )
    if probe_wait is not None and not found.exit_code:
        yield _bulk_events(client, probe_wait, say)


def _tried(name: str, exit_code: int, ask: Callable[[], str | Finding]) -> Finding:
    try:
        found = ask()
    except QueueURLError:
        raise
    except (QueueError, WorkerError) as error:
        return failed(name, exit_code, error, otherwise=_ELSEWHERE)
    return found if isinstance(found, Finding) else Finding(name, "ok", found)


def _configuration(settings: Settings, mapping: MappingConfig) -> str:
    enabled = sum(kind not in mapping.disabled_types for _, kind in HANDLERS)
    file = f"mapping {settings.config}" if settings.config else "no mapping file"
    return f"{file}, {enabled} of {len(HANDLERS)} handlers enabled, queue {scheme_of(settings.queue_url)}://"


def _queue(settings: Settings) -> str | Finding:
    queue = open_queue(settings.queue_url, settings.queue_options)
    try:
        warnings = queue.check()
    finally:
        queue.close()
    missing = [warning for warning in warnings if warning.is_missing_policy]
    if missing:
        return failed("queue", ExitCode.QUEUE, *missing, otherwise=_ELSEWHERE)
    return "; ".join(["may be consumed", *map(str, warnings)])


def _commercetools(reader: queries.Reader, resources: Collection[str]) -> str:
    reads = [(query, scope) for query, scope, readers in _READS if not readers.isdisjoint(resources)]
    _ask_all([(scope, partial(_read, reader, query)) for query, scope in reads])
    text = f"{', '.join(query.path for query, _ in reads) or 'nothing'} may be read"
    try:
        if not _EVENTS.isdisjoint(resources):
            _read(reader, queries.DISCOUNT_CODES)
    except Misconfigured:
        return f"{text}; without the scope view_discount_codes, orders are sent without the names of their codes"
    return text


def _read(reader: queries.Reader, query: queries.Query) -> None:
    """Ask as the worker does, for what does not exist."""
    (found,) = reader.find(query, [_NOBODY]).values()
    if isinstance(found, WorkerError):
        raise found


def _klaviyo(client: Klaviyo, resources: Collection[str], *, erasure: bool, probing: bool) -> str:
    reads = {} if _CATALOG.isdisjoint(resources) else {"catalogs:read": "/api/catalog-items"}
    reads |= probe.SCOPES if probing else {}
    writes = {scope: path for scope, path, writers in _WRITES if not writers.isdisjoint(resources)}
    if erasure:
        reads["profiles:read"] = "/api/profiles"
        writes["data-privacy:write"] = "/api/data-privacy-deletion-jobs"
    asks: list[Ask] = [(scope, partial(_look, client, path)) for scope, path in reads.items()]
    _ask_all([*asks, *((scope, partial(_write_nothing, client, path)) for scope, path in writes.items())])
    text = f"may read ({', '.join(reads) or 'nothing'}) and write ({', '.join(writes) or 'nothing'})"
    try:
        if "customer" in resources:
            _look(client, "/api/profile-bulk-import-jobs")
    except Misconfigured:
        return f"{text}; without {', '.join(_IMPORT_JOBS)}, customers go one by one, however many wait"
    return text


def _look(client: Klaviyo, path: str) -> None:
    client.call("GET", f"{path}?page%5Bsize%5D=1")


def _write_nothing(client: Klaviyo, path: str) -> None:
    """Send an empty document: 403 tells that the scope is missing, any other refusal that it is not."""
    with suppress(Rejected):
        client.call("POST", path, {})


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
    if not first.lacks_scope:  # there is no token, or the URL is another's
        raise first
    scopes = ", ".join(unique(scope for scope, _ in refused))
    raise type(first)(first.reason, todo=f"{first.todo}: {scopes}")


def _subscription(subscriptions: Subscriptions, key: str, disabled: Collection[str]) -> str | Finding:
    try:
        existing = {as_text(entry.get("key")): entry for entry in subscriptions.all()}
    except NotPermitted:
        text = f"cannot be told without the scope {SCOPE}, which the worker itself does not need"
        return Finding("subscriptions", "skipped", text, "give check an API client that has it")
    todo = "klaviyo-worker subscriptions apply" + (f" --key {key}" if key != KEY else "")
    if key not in existing:
        others = ", ".join(filter(None, existing))
        text = f"there is no subscription {key}" + (f", only {others}" if others else "")
        return Finding("subscriptions", "failed", text, todo, ExitCode.COMMERCETOOLS)
    status, missing = as_text(existing[key].get("status")), required_spec(disabled).minus(spec_of(existing[key]))
    if status != HEALTHY:
        why, todo = explain_status(status)
        return Finding("subscriptions", "failed", f"{key} is not healthy: {why}", todo, ExitCode.COMMERCETOOLS)
    if missing:
        told = [f"{resource} {', '.join(types)}" for resource, types in missing.messages.items()]
        told += [f"changes of {resource}" for resource in missing.changes]
        text = f"{key} does not ask for {', '.join(told)}"
        return Finding("subscriptions", "failed", text, todo, ExitCode.COMMERCETOOLS)
    return f"{key} is healthy, and asks for all that the handlers need"


def _bulk_events(client: Klaviyo, wait: float, say: Callable[[str], None]) -> Finding:
    again = "stay with KLAVIYO_WORKER_BULK_EVENTS=auto, and probe again"
    try:
        verdict = probe.BulkProbe(client, wait, say).run()
    except Misconfigured as error:
        return Finding("bulk events", "failed", error.reason, f"{error.todo}: events:write", ExitCode.KLAVIYO)
    except WorkerError as error:
        return Finding("bulk events", "failed", f"{error.reason}: nothing is known", again, ExitCode.KLAVIYO)
    details = {"repeat": str(verdict.repeat), "recommended": str(verdict.recommended)}
    if verdict.repeat == "undecided":
        return Finding("bulk events", "failed", str(verdict), again, ExitCode.UNEXPECTED, details)
    return Finding("bulk events", "ok", str(verdict), details=details)
