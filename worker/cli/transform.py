"""`klaviyo-worker transform`: the Klaviyo requests for a notification, without network access."""

from __future__ import annotations

import sys
from typing import Any, BinaryIO

import click
import orjson

from worker.cli.options import Command, settings_options
from worker.cli.termination import handle_errors
from worker.errors import ExitCode, Ignored, SettingsError, WorkerError
from worker.json_access import loads
from worker.setting_sources import load
from worker.settings import MappingSettings

_EXAMPLES = """
\b
klaviyo-worker transform --commercetools shop.json message.json
klaviyo-worker transform --explain message.json
klaviyo-worker transform --explain message.json | grep -v '^{'  # without the JSON lines
"""


@click.command(cls=Command, epilog=_EXAMPLES)
@click.argument("file", type=click.File("rb"))
@click.option("--explain", is_flag=True, help="Explain how each notification leads to its requests.")
@click.option(
    "--commercetools",
    type=click.File("rb"),
    metavar="FILE",
    help="Read resources from this file instead of commercetools: JSON "
    '{"orders": […], "customers": […], "product-projections": […], …}.',
)
@settings_options(MappingSettings)
def transform(*, file: BinaryIO, explain: bool, commercetools: BinaryIO | None, **option_values: Any) -> None:
    """Print the Klaviyo requests for notifications, offline.

    FILE (- for stdin) contains one notification, or one per line, as JSON in any envelope. Prints one JSON line per
    operation on stdout. Reports ignored and failed notifications on stderr. If any notification failed, the exit code
    is 1.

    --explain prints an explanation on stdout before the JSON lines of each notification: envelopes, handler, lookups,
    operations, omissions with their reasons, and the outcome. The explanation names fields and ids but contains no
    personal data. The JSON lines contain personal data.
    """
    from worker.commands.transform.explain import explain_trace  # noqa: PLC0415
    from worker.commands.transform.trace import split_documents, trace_notification  # noqa: PLC0415
    from worker.runtime.dry_run import operation_line  # noqa: PLC0415

    failed = False
    with handle_errors():
        mapping = load(MappingSettings, option_values).mapping()
        snapshot = _load_snapshot(commercetools)
        if explain and not commercetools:
            click.echo("without --commercetools, only the resources in a message are known", err=True)
        for number, body in enumerate(split_documents(file.read()), 1):
            trace = trace_notification(body, snapshot, mapping)
            if explain:
                if number > 1:
                    click.echo()
                click.echo(explain_trace(number, trace, mapping))
            elif trace.stopped_by is not None:
                click.echo(_describe_stop(trace.stopped_by, hint=not commercetools), err=True)
            for operation in trace.operations:
                click.echo(operation_line(operation))
            failed = failed or isinstance(trace.stopped_by, WorkerError)
    if failed:
        sys.exit(ExitCode.UNEXPECTED)


def _describe_stop(reason: Exception, *, hint: bool) -> str:
    if not isinstance(reason, Ignored):
        return f"error: {reason}"
    return f"ignored: {reason}" + (" (without --commercetools, only the payload is known)" if hint else "")


def _load_snapshot(file: BinaryIO | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        document = loads(file.read())
    except orjson.JSONDecodeError as error:
        raise SettingsError(f"--commercetools is malformed: not JSON: {error.msg} at {error.pos}") from None
    if not isinstance(document, dict) or not all(isinstance(entry, list) for entry in document.values()):
        raise SettingsError("--commercetools is malformed", todo='expected JSON like {"orders": […], "customers": […]}')
    return document
