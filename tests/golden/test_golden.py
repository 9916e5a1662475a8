"""Golden cases: a folder per case, from a notification to the requests to Klaviyo.

The input is `notification.json`, `commercetools.json` (the data in commercetools; optional) and `mapping.toml`
(optional). The expected output is `klaviyo.json`. UPDATE_GOLDEN=1 rewrites klaviyo.json: review the diff.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import orjson
import pytest

from worker.commands.transform.trace import trace_notification
from worker.mapping import load_mapping
from worker.runtime.dry_run import operation_line
from worker.transform import HANDLERS

HERE = Path(__file__).parent
CASES = sorted(path.parent.name for path in HERE.glob("*/notification.json"))


def outcome(folder: Path) -> dict[str, Any]:
    snapshot = folder / "commercetools.json"
    mapping = folder / "mapping.toml"
    trace = trace_notification(
        (folder / "notification.json").read_bytes(),
        orjson.loads(snapshot.read_bytes()) if snapshot.exists() else {},
        load_mapping(mapping if mapping.exists() else None),
    )
    if trace.stopped_by is not None:
        return {type(trace.stopped_by).__name__.lower(): str(trace.stopped_by)}
    return {"operations": [json.loads(operation_line(operation)) for operation in trace.operations]}


@pytest.mark.parametrize("case", CASES)
def test_golden(case: str) -> None:
    """The operations equal the reviewed ones in klaviyo.json."""
    folder = HERE / case
    actual = outcome(folder)
    if os.environ.get("UPDATE_GOLDEN"):
        text = json.dumps(actual, indent=2, ensure_ascii=False) + "\n"
        (folder / "klaviyo.json").write_text(text, encoding="utf-8")
    assert actual == json.loads((folder / "klaviyo.json").read_text(encoding="utf-8"))


def test_every_handler_has_a_golden_folder() -> None:
    """Every handler has an example of its effect."""
    notifications = [json.loads((HERE / case / "notification.json").read_text()) for case in CASES]
    shown = {
        (n["resource"]["typeId"], n.get("type", n["notificationType"]))
        for n in notifications
        if "resource" in n and "payloadNotIncluded" not in n
    }
    assert {handler.function for handler in HANDLERS.values()} == {
        HANDLERS[key].function for key in shown & set(HANDLERS)
    }


def test_events_have_a_deterministic_unique_id() -> None:
    """A unique_id depends only on the message, so that a redelivery has no second effect."""
    for case in CASES:
        for operation in outcome(HERE / case).get("operations", []):
            if operation["operation"] == "create_event":
                assert operation["body"]["data"]["attributes"]["unique_id"], case
