"""An account of a notification's way, for a person: what it is, who handles it, what is fetched, sent, left out.

It names fields and ids, never values of a person's: it may go into a ticket.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from textwrap import TextWrapper
from typing import TYPE_CHECKING

from worker.errors import Disposition, Ignored, Rejected
from worker.json_access import as_dict, as_dicts, printable, unique
from worker.model import OperationKind
from worker.parse import layers
from worker.send import request_for
from worker.transform import HANDLERS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from worker.commands.transform.trace import Trace
    from worker.commercetools import queries
    from worker.mapping import MappingConfig
    from worker.model import Json, Notification, Operation

_INDENT, _WIDTH = 15, 110
_MANY = 8  # names or ids of a kind that are told
_BECOMES = {
    Disposition.DEAD_LETTER: "a dead letter",
    Disposition.NACK: "back to the queue, to come again",
    Disposition.HOLD: "kept and tried again",
    Disposition.PARK: "kept until the worker may work",
}

Row = tuple[str, str]


def explain_trace(number: int, trace: Trace, mapping: MappingConfig) -> str:
    """Return the account of one notification, the `number`th, in lines of which none starts with a brace."""
    about = trace.notification
    title = f"{about.type} of {about.resource_type} {about.resource_id}" if about else "not about a resource"
    rows = [*_read(trace), *_handler(trace), *_fetched(trace), *_sent(trace), *_left_out(trace, mapping), _end(trace)]
    return "\n".join([f"{number}. {printable(title)}", *(_wrapped(label, text) for label, text in rows)])


def _wrapped(label: str, text: str) -> str:
    wrapper = TextWrapper(
        width=_WIDTH,
        initial_indent=f"   {label}".ljust(_INDENT),
        subsequent_indent=" " * _INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return wrapper.fill(printable(text)) or wrapper.initial_indent  # a text of spaces is nothing to it


def _listed(names: list[str]) -> str:
    more = len(names) - _MANY
    return ", ".join(names[:_MANY]) + (f" and {more} more" if more > 0 else "")


def _read(trace: Trace) -> Iterator[Row]:
    envelopes: list[str] = []
    document: Json = {}
    with suppress(Rejected):
        for envelope, document in layers(trace.body):  # noqa: B007 - the last one counts
            envelopes.append(envelope)
    yield "envelopes", f"{' > '.join(filter(None, envelopes)) or 'none'}; {len(trace.body):,} bytes"
    if trace.notification is None:
        yield "fields", _listed(list(document)) or "none that can be read"
        return
    yield "format", "CloudEvents" if "CloudEvents" in envelopes else "commercetools' own (Platform)"
    yield "time", trace.notification.time or "none"
    if "payloadNotIncluded" in trace.notification.payload:
        yield "payload", "not included, as it did not fit: it is fetched"


def _handler(trace: Trace) -> Iterator[Row]:
    about = trace.notification
    if about is None:
        return
    handler = HANDLERS.get((about.resource_type, about.type))
    if handler:
        function = handler.function
        yield "handler", f"{function.__name__} in {function.__module__.replace('.', '/')}.py: {handler.effect}"
        yield "", inspect.getdoc(function) or ""
        return
    handled = [each.type for each in HANDLERS.values() if each.resource_type == about.resource_type]
    resources = unique(each.resource_type for each in HANDLERS.values())
    yield "handler", f"none; {about.resource_type} has one for {', '.join(handled) or 'nothing'}"
    if not handled:
        yield "", f"resources with handlers: {', '.join(resources)}"


def _fetched(trace: Trace) -> Iterator[Row]:
    about = trace.notification
    if about and isinstance(about.payload.get("order"), dict) and trace.stage != "parse":
        yield "fetched", "nothing for the order itself: the message brings it"
    for query, found in trace.lookups:
        yield "fetched", _lookup(query, found, about)


def _lookup(query: queries.Query, found: queries.QueryResult, about: Notification | None) -> str:
    there = [value for value in sorted(found) if found[value]]
    missing = [value for value in sorted(found) if not found[value]]
    brought = [id(entry) for entry in about.payload.values()] if about else []
    resources = (resource for value in there for resource in as_dicts(found[value]))
    source = " (in the message)" if any(id(resource) in brought for resource in resources) else ""
    told = (
        f"found {_listed(there)}{source}" if there else "",
        f"none for {_listed(missing)}" if missing else "",
    )
    predicate = query.predicate.replace("{0}", "…").replace("{}", "…")
    return f"{query.path} where {predicate}: {'; '.join(filter(None, told))}"


def _sent(trace: Trace) -> Iterator[Row]:
    for number, operation in enumerate(trace.operations, 1):
        request = request_for(operation)
        yield f"operation {number}", f"{operation.kind.value}: {request.method} {request.path}"
        for line in _content(operation):
            yield "", line


def _content(operation: Operation) -> Iterator[str]:
    attributes = as_dict(as_dict(operation.resource).get("attributes"))
    if operation.kind is OperationKind.CREATE_EVENT:
        yield _event(attributes)
        yield f"profile: {', '.join(attributes['profile']['data']['attributes'])}"
    else:
        yield f"key: {operation.key}"
        if names := [name for name in attributes if name != "properties"]:
            yield f"attributes: {', '.join(names)}"
    if properties := as_dict(attributes.get("properties")):
        yield f"properties: {', '.join(properties)}"
    if operation.kind is OperationKind.DELETE_STALE_VARIANTS:
        yield f"kept: {_listed(sorted(operation.keep_skus)) or 'none'}"
    if operation.truncated:
        yield f"cut to Klaviyo's limits: {_listed(unique(operation.truncated))}"
    if operation.fallback:
        instead = [f"{each.kind.value} {each.key}" for each in operation.fallback()]
        yield f"where Klaviyo does not have it: {_listed(instead)}"


def _event(attributes: Json) -> str:
    metric = attributes["metric"]["data"]["attributes"]["name"]
    value = f"; value: {attributes['value']} {attributes.get('value_currency', '')}" if "value" in attributes else ""
    return f"metric: {metric}; unique_id: {attributes['unique_id']}; time: {attributes.get('time')}{value}"


def _left_out(trace: Trace, mapping: MappingConfig) -> Iterator[Row]:
    if trace.enriched is None:
        return
    about = trace.enriched.notification
    handler = HANDLERS[about.resource_type, about.type]
    for line in handler.omissions(trace.enriched, mapping) if handler.omissions else ():
        yield "left out", line


def _end(trace: Trace) -> Row:
    if trace.ending is None:
        return "ends", "acknowledged, once all of it is in Klaviyo; a dead letter, if Klaviyo refuses any"
    if isinstance(trace.ending, Ignored):
        return "ends", f"acknowledged with nothing to do, in stage {trace.stage}: {trace.ending}"
    return "ends", f"{_BECOMES[trace.ending.disposition]}, in stage {trace.stage}: {trace.ending}"
