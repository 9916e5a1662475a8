"""`klaviyo-worker transform`: what a notification becomes, without any network."""

from __future__ import annotations

import sys
from typing import Any, BinaryIO

import click
import orjson

from worker.cli.base import UNEXPECTED, exit_codes, settings_options
from worker.errors import Ignored, SettingsError, WorkerError
from worker.settings import MappingSettings, load


@click.command()
@click.argument("file", type=click.File("rb"))
@click.option(
    "--enriched",
    type=click.File("rb"),
    help='What commercetools holds: JSON {"orders": […], "customers": […], "product-projections": […], …}.',
)
@settings_options(MappingSettings)
def transform(*, file: BinaryIO, enriched: BinaryIO | None, **flags: Any) -> None:
    """Print the Klaviyo requests for the notifications in FILE (- for stdin), without any network.

    FILE holds one JSON document or one per line, in any envelope. Output: a JSON line per operation.
    """
    from worker.offline import documents, transform_offline  # noqa: PLC0415

    failed = False
    with exit_codes():
        mapping = load(MappingSettings, flags).mapping()
        snapshot = _snapshot(enriched)
        for body in documents(file.read()):
            try:
                for line in transform_offline(body, snapshot, mapping):
                    click.echo(line)
            except Ignored as reason:
                hint = "" if enriched else " (without --enriched, only the payload is known)"
                click.echo(f"ignored: {reason}{hint}", err=True)
            except WorkerError as error:
                failed = True
                click.echo(f"error: {error}", err=True)
    if failed:
        sys.exit(UNEXPECTED)


def _snapshot(file: BinaryIO | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        document = orjson.loads(file.read())
    except orjson.JSONDecodeError as error:
        raise SettingsError(f"--enriched: not JSON: {error.msg} at {error.pos}") from None
    if not isinstance(document, dict) or not all(isinstance(entry, list) for entry in document.values()):
        raise SettingsError('--enriched: expected JSON like {"orders": […], "customers": […]}')
    return document
