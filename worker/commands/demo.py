"""The work of `klaviyo-worker demo`: the complete worker against the sandbox, with readable output.

The demo publishes sample notifications of every type to an embedded queue and runs the worker until the queue is
empty. It then repeats this with the same notifications: nothing in the sandbox's Klaviyo can change.
"""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from adapters.embedded.queue import EmbeddedQueue
from worker.commands.dlq.dead_letters import iter_dead_letters
from worker.json_access import printable
from worker.sandbox import Sandbox, carts
from worker.sandbox.samples import sample_notifications
from worker.service import Worker
from worker.setting_sources import load
from worker.settings import Settings
from worker.telemetry.log import configure_logging
from worker.telemetry.message_log import Telemetry
from worker.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from worker.model import Ended
    from worker.sandbox.klaviyo.account import Account
    from worker.sandbox.samples import Sample

_TITLE_WIDTH = 62
_COLOURS = {"sent": "green", "ignored": "bright_black", "dead_lettered": "red", "retried": "yellow"}


class MessageOutcome(NamedTuple):
    """The outcome of a message, the reason, and the number of operations by kind."""

    outcome: str
    reason: str
    operations: Counter[str]


class OutcomeLog(Telemetry):
    """Telemetry that also keeps the last outcome of each message."""

    def __init__(self) -> None:
        super().__init__(Metrics("embedded"))
        self.outcomes_by_id: dict[str, MessageOutcome] = {}
        self._outcomes_lock = Lock()

    def on_endings(self, ended: Sequence[Ended]) -> None:
        """Keep the outcomes, and log as usual."""
        with self._outcomes_lock:
            for message, ending in ended:
                operations = Counter(operation.kind.value for operation in message.operations)
                reason = message.outcome.reason if message.outcome else ""
                self.outcomes_by_id[message.delivery.id] = MessageOutcome(ending.value, reason, operations)
        super().on_endings(ended)


def run_demo(keep: Path | None) -> int:
    """Run the demo. Return 0 if every outcome was as expected, otherwise 1."""
    with tempfile.TemporaryDirectory(prefix="klaviyo-worker-") as temporary, Sandbox() as sandbox:
        directory = keep or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "queue.db").unlink(missing_ok=True)
        with (directory / "worker.log").open("w", encoding="utf-8") as stream:
            configure_logging("INFO", "json", stream)
            samples = [*sample_notifications(sandbox.shop), *carts.add_carts(sandbox.shop)]
            _write_mapping(directory / "mapping.toml")
            first = _process(sandbox, directory / "queue.db", samples)
            before = _count_entries(sandbox.account)
            _print_results(samples, first, sandbox.account)
            second = _process(sandbox, directory / "queue.db", samples)
            after = _count_entries(sandbox.account)
            logging.getLogger("klaviyo_worker").handlers.clear()
        _print_dead_letters(directory / "queue.db")
        problems = [
            *_find_unexpected(samples, first),
            *_find_unexpected(samples, second),
            *_find_changes(before, after),
        ]
    click.echo()
    click.echo(
        f"Every message was published again. Before, Klaviyo held {_format(before)}; afterwards {_format(after)}."
    )
    _print_summary(problems, len(samples))
    if keep:
        click.echo(
            f"Queue and log are in {keep}: try `klaviyo-worker dlq list --queue-url embedded://{keep}/queue.db`."
        )
    return 1 if problems else 0


def _process(sandbox: Sandbox, path: Path, samples: Sequence[Sample]) -> list[MessageOutcome]:
    """Publish all samples, run the worker until the queue is empty, and return the outcome of each sample."""
    queue = EmbeddedQueue(path)
    queue.publish(sample.body for sample in samples)
    queue.close()
    environment = sandbox.environment | {
        "QUEUE_URL": f"embedded://{path}",
        "KLAVIYO_WORKER_CONFIG": str(path.with_name("mapping.toml")),
    }
    values = {name: environment.get(str(info.validation_alias)) for name, info in Settings.model_fields.items()}
    outcome_log = OutcomeLog()
    Worker(load(Settings, values), telemetry=outcome_log).run(once=True, max_wait=60)
    return [outcome_log.outcomes_by_id[name] for name in sorted(outcome_log.outcomes_by_id, key=int)]


def _write_mapping(path: Path) -> None:
    """Name the metrics of carts, which are off by default."""
    lines = (f'{name} = "{metric}"\n' for name, metric in carts.METRICS.items())
    path.write_text("[metrics]\n" + "".join(lines), encoding="utf-8")


def _print_summary(problems: Sequence[str], number: int) -> None:
    for problem in problems:
        click.secho(f"unexpected: {problem}", fg="red", err=True)
    summary = "Some results were unexpected." if problems else f"All {number} messages ended as expected."
    click.secho(summary, fg="red" if problems else "green", bold=True)


def _print_results(samples: Sequence[Sample], outcomes: Sequence[MessageOutcome], account: Account) -> None:
    click.secho(f"{'MESSAGE':<{_TITLE_WIDTH}}{'OUTCOME':<15}KLAVIYO", bold=True)
    for sample, (outcome, reason, counts) in zip(samples, outcomes, strict=True):
        operations = ", ".join(kind if number == 1 else f"{kind} x{number}" for kind, number in counts.items())
        coloured = click.style(f"{outcome:<15}", fg=_COLOURS.get(outcome))
        click.echo(f"{sample.title:<{_TITLE_WIDTH}}{coloured}{operations or reason}")
    _print_heading("Profiles in Klaviyo", len(account.profiles))
    for profile in account.profiles:
        click.echo("  " + _format_profile(profile))
    _print_events(account)
    _print_heading("Catalog in Klaviyo", len(account.items) + len(account.variants) + len(account.categories))
    for kind, entries in (("category", account.categories), ("item", account.items), ("variant", account.variants)):
        for external_id, entry in entries.items():
            click.echo(f"  {kind:<9} {_format_entry(entry.get('attributes', entry), external_id)}")


def _print_events(account: Account) -> None:
    _print_heading("Events in Klaviyo", len(account.events))
    metrics = Counter(event["metric"] for event in account.events)
    for metric, number in metrics.items():
        click.echo(f"  {metric} ({number})")
        for event in [event for event in account.events if event["metric"] == metric][:4]:
            click.echo("    " + _format_event(event))
        if number > 4:  # noqa: PLR2004 - a screenful
            click.echo("    …")


def _print_heading(text: str, number: int) -> None:
    click.echo()
    click.secho(f"{text} ({number})", bold=True)


def _format_profile(profile: dict[str, Any]) -> str:
    attributes = profile.get("attributes", profile)
    name = " ".join(filter(None, (attributes.get("first_name"), attributes.get("last_name"))))
    place = (attributes.get("location") or {}).get("city")
    details = (attributes.get("email"), name, attributes.get("phone_number"), place)
    return printable(" · ".join(str(detail) for detail in details if detail))


def _format_event(event: dict[str, Any]) -> str:
    properties = event["properties"]
    money = f"{event.get('value') or 0:,.2f} {event.get('value_currency') or ''}".strip()
    names = properties.get("ItemNames") or [properties.get("ProductName")]
    items = ", ".join(str(name) for name in names[:3] if name) + (" …" if len(names) > 3 else "")  # noqa: PLR2004
    identifier = event.get("email") or event.get("external_id") or ""
    return f"{(event.get('time') or '')[:19]}  {identifier:<34}{money:>14}  {printable(items)}"


def _format_entry(attributes: dict[str, Any], external_id: str) -> str:
    title = attributes.get("name") or attributes.get("title")
    price = "" if attributes.get("price") is None else f" · {attributes['price']:,.2f}"
    stock = f" · {attributes['inventory_quantity']} in stock" if "inventory_quantity" in attributes else ""
    return f"{title}{price}{stock}  [{external_id}]"


def _print_dead_letters(path: Path) -> None:
    queue = EmbeddedQueue(path)
    reasons = Counter(dead_letter.failure.reason for dead_letter in iter_dead_letters(queue))
    queue.close()
    _print_heading("Dead letters of both runs", reasons.total())
    for reason, number in reasons.items():
        click.echo(f"  {number} x {reason}")


def _count_entries(account: Account) -> Counter[str]:
    """Count the entries in the account."""
    return Counter(
        profiles=len(account.profiles),
        events=len(account.events),
        items=len(account.items),
        variants=len(account.variants),
        categories=len(account.categories),
    )


def _format(counts: Counter[str]) -> str:
    return ", ".join(f"{number} {name}" for name, number in counts.items())


def _find_unexpected(samples: Sequence[Sample], outcomes: Sequence[MessageOutcome]) -> Iterable[str]:
    for sample, (outcome, reason, _) in zip(samples, outcomes, strict=True):
        if outcome != sample.outcome:
            yield f"{sample.title}: expected {sample.outcome}, found {outcome} {reason}"


def _find_changes(before: Counter[str], after: Counter[str]) -> Iterable[str]:
    if before != after:
        yield f"the second run changed Klaviyo from {_format(before)} to {_format(after)}"
