"""The explanation of a trace: envelopes, handler, lookups, operations, omissions and outcome.

It names fields and ids but contains no personal data, so it can be attached to a ticket.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from textwrap import TextWrapper
from typing import TYPE_CHECKING

from worker.errors import Disposition, Ignored, Rejected
from worker.json_access import as_dict, as_dicts, parse_time, printable, unique
from worker.model import OperationKind
from worker.parse import layers
from worker.send import request_for
from worker.transform import HANDLERS
from worker.transform.profiles import without_clears

if TYPE_CHECKING:
    from collections.abc import Iterator

    from worker.commands.transform.trace import Trace
    from worker.commercetools import queries
    from worker.mapping import MappingConfig
    from worker.model import Json, Notification, Operation

_INDENT, _WIDTH = 15, 110
_MAX_LISTED = 8  # names or ids in a list
_FIELDS = frozenset(  # of envelopes and notifications
    {"notificationType", "projectKey", "id", "version", "sequenceNumber", "resource", "resourceVersion", "type"}
    | {"resourceUserProvidedIdentifiers", "createdAt", "lastModifiedAt", "modifiedAt", "oldVersion"}
    | {"payloadNotIncluded", "order", "customer", "product", "category", "transaction"}
    | {"specversion", "data", "source", "Type", "Message", "MessageId", "TopicArn", "detail", "detail-type"}
    | {"ReceiptHandle", "Body", "Attributes", "message", "subscription"}
)
_OUTCOMES = {
    Disposition.DEAD_LETTER: "dead-lettered",
    Disposition.NACK: "given back to the queue",
    Disposition.HOLD: "held and retried",
    Disposition.PARK: "parked",
}

Row = tuple[str, str]  # label, text


def explain_trace(number: int, trace: Trace, mapping: MappingConfig) -> str:
    """Return the explanation of the `number`th notification. No line starts with a brace."""
    notification = trace.notification
    title = "not about a resource"
    if notification:
        title = f"{notification.type} of {notification.resource_type} {notification.resource_id}"
    rows = [
        *_describe_envelopes(trace),
        *_describe_handler(trace),
        *_describe_lookups(trace),
        *_describe_operations(trace),
        *_describe_omissions(trace, mapping),
        ("outcome", _describe_outcome(trace)),
    ]
    return "\n".join([f"{number}. {printable(title)}", *(_wrap(label, text) for label, text in rows)])


def _wrap(label: str, text: str) -> str:
    wrapper = TextWrapper(
        width=_WIDTH,
        initial_indent=f"   {label}".ljust(_INDENT),
        subsequent_indent=" " * _INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return wrapper.fill(printable(text)) or wrapper.initial_indent  # fill() returns "" for a text of spaces


def _join(names: list[str]) -> str:
    more = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def _describe_envelopes(trace: Trace) -> Iterator[Row]:
    envelopes: list[str] = []
    document: Json = {}
    with suppress(Rejected):
        for envelope, document in layers(trace.body):  # noqa: B007 - the innermost document is used below
            envelopes.append(envelope)
    yield "envelopes", f"{' > '.join(filter(None, envelopes)) or 'none'}; {len(trace.body):,} bytes"
    if trace.notification is None:
        yield "fields", _describe_fields(document)
        return
    yield "format", "CloudEvents" if "CloudEvents" in envelopes else "commercetools' own (Platform)"
    time = trace.notification.time
    yield "time", "none" if time is None else time if parse_time(time) else "no time"
    if "payloadNotIncluded" in trace.notification.payload:
        yield "payload", "not included because it was too large; it is fetched"


def _describe_fields(document: Json) -> str:
    """Return the names that envelopes and notifications have. Any other name can be personal data."""
    known = [name for name in document if name in _FIELDS]
    others = len(document) - len(known)
    return _join([*known, *([f"{others} others"] if others else [])]) or "none readable"


def _describe_handler(trace: Trace) -> Iterator[Row]:
    notification = trace.notification
    if notification is None:
        return
    handler = HANDLERS.get((notification.resource_type, notification.type))
    if handler:
        function = handler.function
        yield "handler", f"{function.__name__} in {function.__module__.replace('.', '/')}.py: {handler.summary}"
        yield "", inspect.getdoc(function) or ""
        return
    types = [each.type for each in HANDLERS.values() if each.resource_type == notification.resource_type]
    if types:
        yield "handler", f"none; {notification.resource_type} has handlers for {', '.join(types)}"
        return
    yield "handler", f"none; {notification.resource_type} has no handlers"
    yield "", f"resource types with handlers: {', '.join(unique(each.resource_type for each in HANDLERS.values()))}"


def _describe_lookups(trace: Trace) -> Iterator[Row]:
    notification = trace.notification
    if notification and isinstance(notification.payload.get("order"), dict) and trace.stage != "parse":
        yield "fetched", "nothing for the order itself: it is in the message"
    for query, found in trace.lookups:
        yield "fetched", _describe_lookup(query, found, notification)


def _describe_lookup(query: queries.Query, found: queries.QueryResult, notification: Notification | None) -> str:
    """Return for example `customers where id in (…): found cust-ada; none for cust-bob`."""
    present = [value for value in sorted(found) if found[value]]
    missing = [value for value in sorted(found) if not found[value]]
    parts = []
    if present:
        resources = (resource for value in present for resource in as_dicts(found[value]))
        from_message = any(_is_from_message(resource, notification) for resource in resources)
        parts.append(f"found {_join(present)}" + (" (in the message)" if from_message else ""))
    if missing:
        parts.append(f"none for {_join(missing)}")
    predicate = query.predicate.replace("{0}", "…").replace("{}", "…")
    return f"{query.path} where {predicate}: {'; '.join(parts)}"


def _is_from_message(resource: Json, notification: Notification | None) -> bool:
    """Return True if the resource is an object of the payload. The in-memory reader makes no copies."""
    return notification is not None and any(resource is entry for entry in notification.payload.values())


def _describe_operations(trace: Trace) -> Iterator[Row]:
    for number, operation in enumerate(trace.operations, 1):
        request = request_for(operation)
        yield f"operation {number}", f"{operation.kind.value}: {request.method} {request.path}"
        for line in _describe_content(operation):
            yield "", line


def _describe_content(operation: Operation) -> Iterator[str]:
    attributes = as_dict(as_dict(operation.resource).get("attributes"))
    cleared: list[str] = []
    if operation.kind is OperationKind.UPSERT_PROFILE:
        cleared = _cleared(attributes)
        attributes = without_clears({"attributes": attributes})["attributes"]
    if operation.kind is OperationKind.CREATE_EVENT:
        yield _describe_event(attributes)
        yield f"profile: {', '.join(attributes['profile']['data']['attributes'])}"
    else:
        is_personal = operation.kind is OperationKind.UPSERT_GUEST
        yield "key: the email address" if is_personal else f"key: {operation.key}"
        if names := [name for name in attributes if name != "properties"]:
            yield f"attributes: {', '.join(names)}"
    if properties := as_dict(attributes.get("properties")):
        yield f"properties: {', '.join(properties)}"
    for consent in operation.consents:
        does = "subscribed to" if consent.value is True else "unsubscribed from"
        yield f"{does} {consent.channel} if {consent.property} in Klaviyo says otherwise"
    if cleared:
        yield f"cleared if Klaviyo has a value: {', '.join(cleared)}"
    if operation.kind is OperationKind.DELETE_STALE_VARIANTS:
        yield f"kept: {_join(sorted(operation.keep_skus)) or 'none'}"
    if operation.truncated:
        yield f"truncated to Klaviyo's limits: {_join(unique(operation.truncated))}"


def _cleared(attributes: Json) -> list[str]:
    """Return the names of the attributes, parts of the location and properties of a profile that are None."""
    parts = attributes | as_dict(attributes.get("location")) | as_dict(attributes.get("properties"))
    return [name for name, value in parts.items() if value is None]


def _describe_event(attributes: Json) -> str:
    metric = attributes["metric"]["data"]["attributes"]["name"]
    value = f"; value: {attributes['value']} {attributes.get('value_currency', '')}" if "value" in attributes else ""
    return f"metric: {metric}; unique_id: {attributes['unique_id']}; time: {attributes.get('time')}{value}"


def _describe_omissions(trace: Trace, mapping: MappingConfig) -> Iterator[Row]:
    if trace.enriched is None:
        return
    notification = trace.enriched.notification
    handler = HANDLERS[notification.resource_type, notification.type]
    for line in handler.omissions(trace.enriched, mapping) if handler.omissions else ():
        yield "left out", line


def _describe_outcome(trace: Trace) -> str:
    if trace.stopped_by is None:
        return "acknowledged when Klaviyo has accepted all operations; dead-lettered if Klaviyo rejects one"
    if isinstance(trace.stopped_by, Ignored):
        return f"ignored and acknowledged, in stage {trace.stage}: {trace.stopped_by}"
    return f"{_OUTCOMES[trace.stopped_by.disposition]}, in stage {trace.stage}: {trace.stopped_by}"
