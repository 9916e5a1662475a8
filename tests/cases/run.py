"""The run of a case: its result is what Klaviyo has afterwards, and what happened to each message."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import closing, contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any
from unittest import mock

from click.testing import CliRunner

from adapters.embedded.queue import EmbeddedQueue
from tests.cases.case import PROJECT, SPEED
from tests.cases.view import View
from worker import versions
from worker.cli import main
from worker.http import backoff
from worker.sandbox import Sandbox, Shop
from worker.sandbox.klaviyo.account import Account
from worker.sandbox.klaviyo.catalog import PREFIX

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.cases.case import Case, Step
    from worker.model import Json

MAX_WAIT = 60.0 / SPEED  # seconds that `run --once` waits for messages that are held
_PAUSES = ((versions, "READ_LAG"), (versions, "READ_INTERVAL"), (backoff, "MIN_BACKOFF"))
_OUTCOME = ("message_type", "resource_type", "resource_id", "outcome", "reason")
_EVENT = ("metric", "unique_id", "time", "value", "value_currency", "backfill", "email", "external_id", "properties")


def run_case(case: Case, directory: Path) -> Json:
    """Run a case with a sandbox, and a queue in this directory, and return its result."""
    account = Account(**case.account)
    account.load(case.klaviyo)
    with Sandbox(shop=Shop(), account=account, project=PROJECT) as sandbox, _short_pauses():
        environment = sandbox.environment | case.settings | {"QUEUE_URL": f"embedded://{directory}/queue.db"}
        runs = [_run(step, sandbox, environment, directory / "queue.db") for step in case.steps()]
        requests = Counter(f"{each.method} {each.path}" for each in _requests(sandbox))
        return {"runs": runs, **_content(account), "calls": dict(sorted(requests.items()))}


def _requests(sandbox: Sandbox) -> Iterator[Any]:
    yield from sandbox.commercetools.requests
    yield from sandbox.klaviyo.requests


@contextmanager
def _short_pauses() -> Iterator[None]:
    """Let the worker wait shorter, and leave the signal handlers of this process alone."""
    patches = [mock.patch.object(module, name, getattr(module, name) / SPEED) for module, name in _PAUSES]
    patches.append(mock.patch.object(import_module("worker.cli.run"), "on_signals"))
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def _run(step: Step, sandbox: Sandbox, environment: dict[str, str | None], queue: Path) -> Json:
    sandbox.shop.replace(step.commercetools or {})
    sandbox.commercetools.handle = View(sandbox, step).handle
    servers = {"commercetools": sandbox.commercetools, "klaviyo": sandbox.klaviyo}
    for service, server in servers.items():
        server.faults.clear()
        server.faults.add(*step.faults.get(service, ()))
    with closing(EmbeddedQueue(queue)) as published:
        published.publish(step.bodies)
    done = CliRunner().invoke(main, ["run", "--once", "--max-wait", str(MAX_WAIT)], env=environment)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    processed = [line for line in lines if line["event"] == "message_processed"]
    messages = [{name: line[name] for name in _OUTCOME if line[name] is not None} for line in processed]
    errors = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    result: Json = {"exit_code": done.exit_code, "messages": sorted(messages, key=_order)}
    return result | ({"errors": errors} if errors else {})


def _content(account: Account) -> Json:
    """Return the content of the account, in an order that does not depend on the order of the writes."""
    profiles = [profile["attributes"] | {"subscriptions": _consents(profile)} for profile in account.profiles]
    events = [{name: event[name] for name in _EVENT if event.get(name) is not None} for event in account.events]
    content: Json = {
        "profiles": sorted(profiles, key=_order),
        "events": sorted(events, key=_order),
        "deletions": account.deletion_requests,
    }
    for name in ("items", "variants", "categories"):
        content[name] = [_entry(entry) for _, entry in sorted(getattr(account, name).items())]
    return content


def _consents(profile: Json) -> dict[str, str]:
    """Return the consent to each channel."""
    return {channel: held["marketing"]["consent"] for channel, held in profile["subscriptions"].items()}


def _entry(entry: Json) -> Json:
    """Return the attributes of a catalog entry, and the external ids of what it belongs to."""
    shown = dict(entry["attributes"])
    if "item" in entry:
        shown["item"] = entry["item"].removeprefix(PREFIX)
    if "categories" in entry:
        shown["categories"] = sorted(each.removeprefix(PREFIX) for each in entry["categories"])
    return shown


def _order(entry: Json) -> tuple[str, ...]:
    names = ("metric", "unique_id", "external_id", "email", "message_type", "resource_id", "reason")
    return tuple(str(entry.get(name) or "") for name in names)
