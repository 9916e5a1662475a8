"""Malformed data from commercetools: mutations of every golden case."""

from __future__ import annotations

import copy
import os
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.golden.test_golden import CASES, HERE
from worker.commands.transform.explain import explain_trace
from worker.commands.transform.trace import trace_notification
from worker.errors import Ignored, Rejected, Transient
from worker.mapping import MappingConfig
from worker.send import request_for

ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    2**63 - 1,
    1e308,
    "",
    "x" * 300,
    "\u0000\u202e",
    [],
    {},
    [None],
    [[]],
    {"": None},
    {"id": 5},
]


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        found += _paths(entry, (*path, key))
    return found


def _replaced(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    changed = copy.deepcopy(document)
    holder = changed
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    return changed


def _case(name: str) -> dict[str, Any]:
    snapshot = HERE / name / "commercetools.json"
    return {
        "notification": orjson.loads((HERE / name / "notification.json").read_bytes()),
        "commercetools": orjson.loads(snapshot.read_bytes()) if snapshot.exists() else {},
    }


DOCUMENTS = {name: _case(name) for name in CASES}
MAPPING = MappingConfig.model_validate(
    {
        "order": {
            "properties": {"include": ["*"]},
            "raw_line_item": True,
            "fulfilled_by_delivery": True,
            "fulfilled_workflow_states": ["handed-over"],
            "cancelled_workflow_states": ["voided"],
            "tracking_urls": {"DHL": "https://dhl.example/{{trackingId}}"},
        },
        "customer": {"erasure": True},
        "metrics": {
            "confirmed_shipment": "Confirmed Shipment",
            "returned_order": "Returned Order",
            "started_checkout": "Started Checkout",
            "added_to_cart": "Added to Cart",
        },
    }
)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", "15")), suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_malformed_value_anywhere_has_a_clear_outcome(name: str, data: st.DataObject) -> None:
    """A mutated notification gives requests or a reason, never an unexpected exception."""
    document = DOCUMENTS[name]
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(_paths(document)))
        document = _replaced(document, path, data.draw(st.sampled_from(ODD)))
    resources = document["commercetools"] if isinstance(document["commercetools"], dict) else {}
    snapshot = {path: entries for path, entries in resources.items() if isinstance(entries, list)}
    trace = trace_notification(orjson.dumps(document["notification"]), snapshot, MAPPING)
    explanation = explain_trace(1, trace, MAPPING)
    if trace.stopped_by is None:
        assert all(request_for(operation).path.startswith("/api/") for operation in trace.operations)
    else:
        assert isinstance(trace.stopped_by, Ignored | Rejected | Transient)
        assert str(trace.stopped_by)
    assert all(line.isprintable() for line in explanation.splitlines())
