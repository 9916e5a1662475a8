"""Checks of the configuration, the queue, commercetools, Klaviyo and the subscription."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import partial
from threading import Event
from typing import TYPE_CHECKING

from adapters import QueueError, QueueURLError, SupportsDestination, open_queue, scheme_of
from worker.commands.check import bulk_probe
from worker.commands.check.catalog import check_catalog
from worker.commands.check.check_result import CheckResult, make_failure
from worker.commands.subscriptions.client import SCOPE, NotPermitted, Subscriptions
from worker.commands.subscriptions.destination import display_name
from worker.commands.subscriptions.health import HEALTHY, explain_status
from worker.commands.subscriptions.plan import KEY
from worker.commands.subscriptions.spec import required_spec, spec_of
from worker.commercetools import queries
from worker.commercetools.client import Commercetools
from worker.errors import (
    CommercetoolsMisconfigured,
    EndpointRefused,
    ExitCode,
    KlaviyoMisconfigured,
    Misconfigured,
    Rejected,
    SettingsError,
    WorkerError,
)
from worker.http.clock import describe
from worker.json_access import as_dict, as_text, unique
from worker.klaviyo.client import Klaviyo
from worker.send.bulk_verdict import read_status
from worker.settings import unknown_variables
from worker.transform import HANDLERS, enabled_handlers

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from worker.mapping import MappingConfig
    from worker.send.bulk_verdict import BulkMode
    from worker.settings import Settings

_NONEXISTENT_ID = "00000000-0000-4000-8000-000000000000"
_EVENTS = frozenset({"order", "payment", "cart"})
_PRODUCT = frozenset({"product", "inventory-entry", "standalone-price"})
_CATALOG = _PRODUCT | {"category"}
_CUSTOMER = frozenset({"customer"})
_READS = (  # query, its scope, and the resource or message types whose handlers need it; see worker/enrich/plans.py
    (queries.ORDERS, "view_orders", _EVENTS),
    (queries.CARTS, "view_orders", frozenset({"cart"})),
    (queries.PAYMENTS, "view_payments", frozenset({"payment", "OrderPaymentAdded"})),
    (queries.CUSTOMERS, "view_customers", _EVENTS | _CUSTOMER),
    (queries.CATEGORIES, "view_products", _EVENTS | _CATALOG),
    (queries.PRODUCTS, "view_products", _EVENTS | _PRODUCT),
    (queries.INVENTORY, "view_products", _PRODUCT),
    (queries.STANDALONE_PRICES, "view_standalone_prices", frozenset({"standalone-price"})),
    (queries.WORKFLOW_STATES, "view_states", frozenset({"OrderStateTransition"})),
)
_WRITES = (  # scope, an endpoint that requires it, and the resource types whose handlers need it
    ("events:write", "/api/events", _EVENTS),
    ("profiles:write", "/api/profile-import", _CUSTOMER),
    ("catalogs:write", "/api/catalog-items", _CATALOG),
)
_SOURCE = "receives_from"  # the detail with the destination of the queue
_OPTIONAL = (  # scopes, an endpoint that requires them, who needs them, and what the worker does without them
    (
        "profiles:read",
        "/api/profiles",
        _EVENTS | _CUSTOMER,
        "phone numbers and names of guests are left out, nothing is cleared or merged, an event can move an address",
    ),
    (
        "profiles:read, lists:read, lists:write",
        "/api/profile-bulk-import-jobs",
        _CUSTOMER | {"order"},
        "profiles are always sent individually",
    ),
)
_DEFAULT_TODO = "check the URL, the network and its proxy, or try again later"

ScopeProbe = tuple[str, "Callable[[], object]"]  # a scope, and a request that requires it


def run_checks(
    read_settings: Callable[[], Settings],
    subscription_key: str,
    probe_timeout: float | None,
    report_progress: Callable[[str], None],
) -> Iterator[CheckResult]:
    """Yield the result of each check. If the configuration is invalid, yield only its errors.

    `probe_timeout`: seconds that the bulk probe waits for events; None for no probe, so that nothing is written.
    `report_progress` receives the steps of the bulk probe.
    """
    try:
        settings = read_settings()
        mapping = settings.mapping()
        # Opened first because only the adapter can validate QUEUE_URL, which is configuration.
        queue = _run_check("queue", ExitCode.QUEUE, partial(_check_queue, settings))
    except (SettingsError, QueueURLError) as error:
        for problem in error.problems if isinstance(error, SettingsError) else [error]:
            yield make_failure("configuration", ExitCode.USAGE, problem, default_todo="correct it")
        return
    yield CheckResult("configuration", "ok", _describe_configuration(settings, mapping))
    yield queue
    source = queue.details.get(_SOURCE, "")
    yield from _check_services(settings, mapping, subscription_key, source, probe_timeout, report_progress)


def _check_services(
    settings: Settings,
    mapping: MappingConfig,
    subscription_key: str,
    source: str,
    probe_timeout: float | None,
    report_progress: Callable[[str], None],
) -> Iterator[CheckResult]:
    stopping = Event()
    handlers = enabled_handlers(mapping)
    resources = frozenset(name for handler in handlers for name in (handler.resource_type, handler.type))
    reader = Commercetools(settings, stopping)
    commercetools = _run_check(
        "commercetools", ExitCode.COMMERCETOOLS, partial(_check_commercetools, reader, resources)
    )
    yield commercetools
    if "product" in resources and not commercetools.exit_code:
        yield from _check_catalog(reader, mapping)
    client = Klaviyo(settings, stopping)
    check_klaviyo = partial(_check_klaviyo, client, resources, mapping, probing=probe_timeout is not None)
    klaviyo = _run_check("klaviyo", ExitCode.KLAVIYO, check_klaviyo)
    yield klaviyo
    check_subscription = partial(_check_subscription, Subscriptions(reader), subscription_key, mapping, source)
    yield _run_check("subscriptions", ExitCode.COMMERCETOOLS, check_subscription)
    yield from _check_clock(reader, client)
    if klaviyo.exit_code:
        return
    if probe_timeout is not None:
        yield _probe_bulk_events(client, probe_timeout, report_progress)
    elif not _EVENTS.isdisjoint(resources):
        yield _run_check("bulk events", ExitCode.KLAVIYO, partial(_check_bulk_events, client, settings.bulk_events))


def _run_check(name: str, exit_code: int, check: Callable[[], str | CheckResult]) -> CheckResult:
    try:
        result = check()
    except QueueURLError:
        raise
    except (QueueError, WorkerError) as error:
        return make_failure(name, exit_code, error, default_todo=_DEFAULT_TODO)
    return result if isinstance(result, CheckResult) else CheckResult(name, "ok", result)


def _check_catalog(reader: Commercetools, mapping: MappingConfig) -> Iterator[CheckResult]:
    """Yield a failure if the catalog would be wrong."""
    try:
        yield from check_catalog(reader, mapping)
    except WorkerError as error:
        yield make_failure("catalog", ExitCode.COMMERCETOOLS, error, default_todo=_DEFAULT_TODO)


def _describe_configuration(settings: Settings, mapping: MappingConfig) -> str:
    file = f"mapping {settings.config}" if settings.config else "no mapping file"
    handlers = f"{len(enabled_handlers(mapping))} of {len(HANDLERS)} handlers enabled"
    text = f"{file}, {handlers}, queue {scheme_of(settings.queue_url)}://, {_describe_served(settings, mapping)}"
    return "; ".join([text, *unknown_variables(os.environ)])


def _describe_served(settings: Settings, mapping: MappingConfig) -> str:
    """Return whose messages the worker processes."""
    served = [f"project {settings.ct_project_id}"]
    served += [f"stores {', '.join(mapping.stores)}"] if mapping.stores else []
    served += [f"countries {', '.join(mapping.countries)}"] if mapping.countries else []
    return f"only messages of {', '.join(served)}"


def _check_queue(settings: Settings) -> CheckResult:
    queue = open_queue(settings.queue_url, settings.queue_options)
    try:
        warnings = queue.check()
        source = queue.destination() if isinstance(queue, SupportsDestination) else ""
    finally:
        queue.close()
    if any(warning.is_missing_policy for warning in warnings):
        return make_failure("queue", ExitCode.QUEUE, *warnings, default_todo=_DEFAULT_TODO)
    text = "; ".join(["can be consumed", *map(str, warnings)])
    return CheckResult("queue", "ok", text, details={_SOURCE: source} if source else {})


def _check_commercetools(reader: queries.Reader, resources: Collection[str]) -> str:
    reads = [(query, scope) for query, scope, readers in _READS if not readers.isdisjoint(resources)]
    _probe_scopes([(scope, partial(_read, reader, query)) for query, scope in reads], CommercetoolsMisconfigured)
    text = f"can read {', '.join(query.path for query, _ in reads) or 'nothing'}"
    try:
        if not _EVENTS.isdisjoint(resources):
            _read(reader, queries.DISCOUNT_CODES)
    except EndpointRefused:
        return f"{text}; without the scope view_discount_codes, events do not contain the names of discount codes"
    return text


def _read(reader: queries.Reader, query: queries.Query) -> None:
    """Make the same query as the worker, for an id that does not exist."""
    (result,) = reader.find(query, [_NONEXISTENT_ID]).values()
    if isinstance(result, WorkerError):
        raise result


def _check_klaviyo(client: Klaviyo, resources: Collection[str], mapping: MappingConfig, *, probing: bool) -> str:
    reads = {} if _CATALOG.isdisjoint(resources) else {"catalogs:read": "/api/catalog-items"}
    writes = {scope: path for scope, path, writers in _WRITES if not writers.isdisjoint(resources)}
    if probing:
        reads |= bulk_probe.READ_SCOPES
        writes |= {scope: path for scope, path, _ in _WRITES if scope in bulk_probe.SCOPES}
    if "order" in resources and mapping.order.buyer != "none":
        writes["profiles:write"] = "/api/profile-import"
    if "customer" in resources and mapping.customer.erasure:
        reads["profiles:read"] = "/api/profiles"
        writes["data-privacy:write"] = "/api/data-privacy-deletion-jobs"
    if "customer" in resources and (mapping.consent.email or mapping.consent.sms):
        reads["profiles:read"] = "/api/profiles"
        writes["lists:write, subscriptions:write"] = "/api/profile-subscription-bulk-create-jobs"
    probes: list[ScopeProbe] = [(scope, partial(_get, client, path)) for scope, path in reads.items()]
    probes += [(scope, partial(_post_nothing, client, path)) for scope, path in writes.items()]
    _probe_scopes(probes, KlaviyoMisconfigured)
    text = f"can read ({', '.join(reads) or 'nothing'}) and write ({', '.join(writes) or 'nothing'})"
    return "; ".join([text, *_without_optional(client, resources)])


def _without_optional(client: Klaviyo, resources: Collection[str]) -> Iterator[str]:
    """Yield what the worker does without the optional scopes that are missing."""
    for scopes, path, readers, effect in _OPTIONAL:
        try:
            if not readers.isdisjoint(resources):
                _get(client, path)
        except EndpointRefused:
            yield f"without {scopes}, {effect}"


def _get(client: Klaviyo, path: str) -> None:
    client.call("GET", f"{path}?page%5Bsize%5D=1")


def _post_nothing(client: Klaviyo, path: str) -> None:
    """Send an empty document, which Klaviyo never accepts. It responds with 403 only if the scope is missing."""
    with suppress(Rejected):
        client.call("POST", path, {})


def _probe_scopes(probes: Sequence[ScopeProbe], misconfigured: type[Misconfigured]) -> None:
    """Make all requests. Raises WorkerError, or one `misconfigured` that names every missing scope."""
    refused: list[tuple[str, EndpointRefused | Misconfigured]] = []
    for scope, probe in probes:
        try:
            probe()
        except (EndpointRefused, Misconfigured) as error:
            if isinstance(error, Misconfigured) and not error.lacks_scope:  # the key, the URL or the proxy is wrong
                raise
            refused.append((scope, error))
    if refused:
        first = refused[0][1]
        scopes = ", ".join(unique(scope for scope, _ in refused))
        raise misconfigured(first.reason, todo=f"{first.todo}: {scopes}")


def _check_subscription(
    subscriptions: Subscriptions, key: str, mapping: MappingConfig, source: str
) -> str | CheckResult:
    try:
        existing = {as_text(entry.get("key")): entry for entry in subscriptions.all()}
    except NotPermitted:
        text = f"not checked: the scope {SCOPE} is missing, which the worker itself does not need"
        return CheckResult("subscriptions", "skipped", text, "run check with an API client that has it")
    apply = "run klaviyo-worker subscriptions apply" + (f" --key {key}" if key != KEY else "")
    if key not in existing:
        others = ", ".join(filter(None, existing))
        text = f"there is no subscription {key}" + (f", only {others}" if others else "")
        return CheckResult("subscriptions", "failed", text, apply, ExitCode.COMMERCETOOLS)
    destination = display_name(as_dict(existing[key].get("destination"))).partition(",")[0]
    if _scheme(destination) == _scheme(source) and destination != source:
        text = f"{key} publishes to {destination}, but QUEUE_URL receives from {source}"
        todo = f"correct QUEUE_URL, or {apply} --destination {source}"
        return CheckResult("subscriptions", "failed", text, todo, ExitCode.COMMERCETOOLS)
    status = as_text(existing[key].get("status"))
    if status != HEALTHY:
        health, todo = explain_status(status)
        return CheckResult("subscriptions", "failed", f"{key} is not healthy: {health}", todo, ExitCode.COMMERCETOOLS)
    missing = required_spec(mapping).minus(spec_of(existing[key]))
    if missing:
        parts = [f"{resource} {', '.join(types)}" for resource, types in missing.messages.items()]
        parts += [f"changes of {resource}" for resource in missing.changes]
        text = f"{key} does not request {', '.join(parts)}"
        return CheckResult("subscriptions", "failed", text, apply, ExitCode.COMMERCETOOLS)
    return f"{key} is healthy and requests everything that the handlers need"


def _scheme(url: str) -> str:
    return url.partition("://")[0]


def _check_clock(reader: Commercetools, client: Klaviyo) -> Iterator[CheckResult]:
    """Yield a failure if the clock of this machine differs from the Date headers of the previous checks."""
    skew = describe(reader.clock_offset() or client.clock_offset())
    if skew:
        reason, _, todo = skew.partition(": ")
        yield CheckResult("clock", "failed", reason, todo, ExitCode.USAGE)


def _check_bulk_events(client: Klaviyo, mode: BulkMode) -> str | CheckResult:
    try:
        status = read_status(client, mode)
    except EndpointRefused as error:
        todo = "the worker reads the account's verdict on repeated events with the scope profiles:read"
        return CheckResult("bulk events", "skipped", f"events are sent individually: {error.reason}", todo)
    return f"events are sent {'in bulk' if status.in_bulk else 'individually'}: {status.reason}"


def _probe_bulk_events(client: Klaviyo, timeout: float, report_progress: Callable[[str], None]) -> CheckResult:
    todo = "probe again"
    try:
        result = bulk_probe.BulkProbe(client, timeout, report_progress).run()
    except EndpointRefused as error:
        scopes = ", ".join(bulk_probe.SCOPES)
        return CheckResult("bulk events", "failed", error.reason, f"{error.todo}: {scopes}", ExitCode.KLAVIYO)
    except WorkerError as error:
        return CheckResult("bulk events", "failed", f"{error.reason}: no result", todo, ExitCode.KLAVIYO)
    details = {"repeats": str(result.repeats), "repeats_in_one_call": str(result.repeats_in_one_call)}
    if result.repeats == "undecided":
        return CheckResult("bulk events", "failed", str(result), todo, ExitCode.UNEXPECTED, details)
    return CheckResult("bulk events", "ok", str(result), details=details)
