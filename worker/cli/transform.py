"""`klaviyo-worker transform`: what a notification becomes, without any network."""

from __future__ import annotations

import sys
from typing import Any, BinaryIO

import click
import orjson

from worker.cli.options import Command, settings_options
from worker.cli.termination import handle_errors
from worker.errors import ExitCode, Ignored, SettingsError, WorkerError
from worker.settings import MappingSettings, load

_EXAMPLES = """
\b
klaviyo-worker transform --commercetools shop.json message.json
klaviyo-worker transform --explain message.json
klaviyo-worker transform --explain message.json | grep -v '^{'  # without the JSON lines
"""


@click.command(cls=Command, epilog=_EXAMPLES)
@click.argument("file", type=click.File("rb"))
@click.option("--explain", is_flag=True, help="Tell how each came to its requests, or to none.")
@click.option(
    "--commercetools",
    type=click.File("rb"),
    metavar="FILE",
    help='What commercetools holds: JSON {"orders": […], "customers": […], "product-projections": […], …}.',
)
@settings_options(MappingSettings)
def transform(*, file: BinaryIO, explain: bool, commercetools: BinaryIO | None, **flags: Any) -> None:
    """Print the Klaviyo requests for notifications, offline.

    FILE (- for stdin) holds one JSON document or one per line, in any envelope. Prints a JSON line per operation.
    What is ignored is said on stderr, and so is what cannot be handled, which is exit code 1.

    --explain tells on stdout, before the lines of each notification, how they came about: its envelopes, its handler,
    what was looked up, what is sent, what is left out and why, and what becomes of the message. It names fields and
    ids, and holds no personal data; the JSON lines do.
    """
    from worker.commands.transform.explain import explain_trace  # noqa: PLC0415
    from worker.commands.transform.trace import documents, trace_notification  # noqa: PLC0415
    from worker.runtime.dry_run import operation_line  # noqa: PLC0415

    failed = False
    with handle_errors():
        mapping = load(MappingSettings, flags).mapping()
        snapshot = _snapshot(commercetools)
        if explain and not commercetools:
            click.echo("without --commercetools, only the payload of a message is known of commercetools", err=True)
        for number, body in enumerate(documents(file.read()), 1):
            trace = trace_notification(body, snapshot, mapping)
            if explain:
                click.echo("\n" * (number > 1), nl=False)
                click.echo(explain_trace(number, trace, mapping))
            elif trace.ending is not None:
                click.echo(_ending(trace.ending, hint=not commercetools), err=True)
            for operation in trace.operations:
                click.echo(operation_line(operation))
            failed = failed or isinstance(trace.ending, WorkerError)
    if failed:
        sys.exit(ExitCode.UNEXPECTED)


def _ending(ending: Exception, *, hint: bool) -> str:
    if not isinstance(ending, Ignored):
        return f"error: {ending}"
    return f"ignored: {ending}" + (" (without --commercetools, only the payload is known)" if hint else "")


def _snapshot(file: BinaryIO | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        document = orjson.loads(file.read())
    except orjson.JSONDecodeError as error:
        raise SettingsError(f"--commercetools: not JSON: {error.msg} at {error.pos}") from None
    if not isinstance(document, dict) or not all(isinstance(entry, list) for entry in document.values()):
        raise SettingsError('--commercetools: expected JSON like {"orders": […], "customers": […]}')
    return document
