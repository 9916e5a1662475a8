"""`klaviyo-worker demo`: the whole journey on loopback, shown as a person would want to see it.

Sample notifications of every type go into an embedded queue; the real worker takes them to the sandbox's
Klaviyo; then they all go in once more, to show that nothing is doubled.
"""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import click

from adapters.embedded import EmbeddedQueue
from worker.commands.dlq.dead_letters import iter_dead_letters
from worker.sandbox import Sandbox
from worker.sandbox.notifications import sample_notifications
from worker.service import Worker
from worker.settings import Settings, load
from worker.telemetry.log import configure_logging
from worker.telemetry.message_log import Telemetry, outcome_name
from worker.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from worker.model import Message
    from worker.sandbox.klaviyo.account import Account
    from worker.sandbox.notifications import Sample

_TITLE = 62  # columns
_COLOURS = {"sent": "green", "ignored": "bright_black", "dead_lettered": "red", "retried": "yellow"}


class _Recorder(Telemetry):
    """Remembers how each message ended; the last ending counts."""

    def __init__(self) -> None:
        super().__init__(Metrics("embedded"))
        self.endings: dict[str, tuple[str, str, Counter[str]]] = {}
        self._recording = Lock()

    def settled(self, jobs: Iterable[Message]) -> None:
        """Remember the endings, and log as usual."""
        jobs = list(jobs)
        with self._recording:
            for job in jobs:
                kinds = Counter(operation.kind.value for operation in job.operations)
                reason = job.outcome.reason if job.outcome else ""
                self.endings[job.delivery.id] = (outcome_name(job), reason, kinds)
        super().settled(jobs)


def run_demo(keep: Path | None) -> int:
    """Run the demo and return the exit code: 0 only if everything ended as expected."""
    with tempfile.TemporaryDirectory(prefix="klaviyo-worker-") as temporary, Sandbox() as sandbox:
        directory = keep or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "queue.db").unlink(missing_ok=True)
        with (directory / "worker.log").open("w", encoding="utf-8") as stream:
            configure_logging("INFO", "json", stream)
            samples = sample_notifications(sandbox.shop)
            first = _work(sandbox, directory / "queue.db", samples)
            before = _effects(sandbox.account)
            _show(samples, first, sandbox.account)
            again = _work(sandbox, directory / "queue.db", samples)
            after = _effects(sandbox.account)
            logging.getLogger("klaviyo_worker").handlers.clear()
        _show_dead_letters(directory / "queue.db")
        problems = [*_unexpected(samples, first), *_unexpected(samples, again), *_doubled(before, after)]
    click.echo()
    click.echo(f"Every message went in a second time. Klaviyo held {_counts(before)} before, {_counts(after)} after.")
    for problem in problems:
        click.secho(f"not as expected: {problem}", fg="red", err=True)
    ending = "Not all was as expected." if problems else f"All {len(samples)} messages ended as expected."
    click.secho(ending, fg="red" if problems else "green", bold=True)
    if keep:
        click.echo(
            f"Queue and log are in {keep}: try `klaviyo-worker dlq list --queue-url embedded://{keep}/queue.db`."
        )
    return 1 if problems else 0


def _work(sandbox: Sandbox, path: Path, samples: Sequence[Sample]) -> list[tuple[str, str, Counter[str]]]:
    """Publish all samples, run the worker until the queue is empty, return how each ended."""
    queue = EmbeddedQueue(path)
    queue.publish(sample.body for sample in samples)
    queue.close()
    environment = sandbox.environment | {"QUEUE_URL": f"embedded://{path}"}
    flags = {name: environment.get(str(info.validation_alias)) for name, info in Settings.model_fields.items()}
    recorder = _Recorder()
    Worker(load(Settings, flags), telemetry=recorder).run(once=True, max_wait=60)
    return [recorder.endings[name] for name in sorted(recorder.endings, key=int)]


def _show(samples: Sequence[Sample], endings: Sequence[tuple[str, str, Counter[str]]], account: Account) -> None:
    click.secho(f"{'MESSAGE':<{_TITLE}}{'OUTCOME':<15}KLAVIYO", bold=True)
    for sample, (outcome, reason, kinds) in zip(samples, endings, strict=True):
        done = ", ".join(kind if number == 1 else f"{kind} x{number}" for kind, number in kinds.items())
        coloured = click.style(f"{outcome:<15}", fg=_COLOURS.get(outcome))
        click.echo(f"{sample.title:<{_TITLE}}{coloured}{done or reason}")
    _heading("Profiles in Klaviyo", len(account.profiles))
    for profile in account.profiles:
        click.echo("  " + _profile(profile))
    _heading("Events in Klaviyo", len(account.events))
    metrics = Counter(event["metric"] for event in account.events)
    for metric, number in metrics.items():
        click.echo(f"  {metric} ({number})")
        for event in [event for event in account.events if event["metric"] == metric][:4]:
            click.echo("    " + _event(event))
        if number > 4:  # noqa: PLR2004 - a screenful
            click.echo("    …")
    _heading("Catalog in Klaviyo", len(account.items) + len(account.variants) + len(account.categories))
    for kind, entries in (("category", account.categories), ("item", account.items), ("variant", account.variants)):
        for external_id, entry in entries.items():
            click.echo(f"  {kind:<9} {_entry(entry.get('attributes', entry), external_id)}")


def _heading(text: str, number: int) -> None:
    click.echo()
    click.secho(f"{text} ({number})", bold=True)


def _profile(profile: dict[str, Any]) -> str:
    attributes = profile.get("attributes", profile)
    name = " ".join(filter(None, (attributes.get("first_name"), attributes.get("last_name"))))
    place = (attributes.get("location") or {}).get("city")
    details = (attributes.get("email"), name, attributes.get("phone_number"), place)
    return _printable(" · ".join(str(detail) for detail in details if detail))


def _event(event: dict[str, Any]) -> str:
    properties = event["properties"]
    money = f"{event.get('value') or 0:,.2f} {event.get('value_currency') or ''}".strip()
    names = properties.get("ItemNames") or [properties.get("ProductName")]
    what = ", ".join(str(name) for name in names[:3] if name) + (" …" if len(names) > 3 else "")  # noqa: PLR2004
    who = event.get("email") or event.get("external_id") or ""
    return f"{(event.get('time') or '')[:19]}  {who:<34}{money:>14}  {_printable(what)}"


def _entry(attributes: dict[str, Any], external_id: str) -> str:
    title = attributes.get("name") or attributes.get("title")
    price = f" · {attributes['price']:,.2f}" if "price" in attributes else ""
    stock = f" · {attributes['inventory_quantity']} in stock" if "inventory_quantity" in attributes else ""
    return f"{title}{price}{stock}  [{external_id}]"


def _printable(text: str) -> str:
    """Replace what could steer a terminal: names are anybody's input."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _show_dead_letters(path: Path) -> None:
    queue = EmbeddedQueue(path)
    reasons = Counter(letter.failure.reason for letter in iter_dead_letters(queue))
    queue.close()
    _heading("Dead letters, both rounds", reasons.total())
    for reason, number in reasons.items():
        click.echo(f"  {number} x {reason}")


def _effects(account: Account) -> Counter[str]:
    """Count what is in Klaviyo."""
    return Counter(
        profiles=len(account.profiles),
        events=len(account.events),
        items=len(account.items),
        variants=len(account.variants),
        categories=len(account.categories),
    )


def _counts(effects: Counter[str]) -> str:
    return ", ".join(f"{number} {name}" for name, number in effects.items())


def _unexpected(samples: Sequence[Sample], endings: Sequence[tuple[str, str, Counter[str]]]) -> Iterable[str]:
    for sample, (outcome, reason, _) in zip(samples, endings, strict=True):
        if outcome != sample.outcome:
            yield f"{sample.title}: expected {sample.outcome}, was {outcome} {reason}"


def _doubled(before: Counter[str], after: Counter[str]) -> Iterable[str]:
    if before != after:
        yield f"the second round changed Klaviyo from {_counts(before)} to {_counts(after)}"
