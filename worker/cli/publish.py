"""`klaviyo-worker publish`: publish messages to the queue."""

from __future__ import annotations

from typing import Any, BinaryIO

import click

from adapters import QueueError, SupportsPublish
from worker.cli.options import Command, open_configured_queue, settings_options
from worker.cli.termination import handle_errors
from worker.setting_sources import load
from worker.settings import QueueSettings


@click.command(cls=Command)
@click.argument("file", type=click.File("rb"))
@settings_options(QueueSettings)
def publish(*, file: BinaryIO, **option_values: Any) -> None:
    """Publish every line of FILE to the queue as a message.

    FILE can be - for stdin. Lines are published unchanged. Prints the number of messages.
    """
    with handle_errors(), open_configured_queue(load(QueueSettings, option_values)) as queue:
        if not isinstance(queue, SupportsPublish):
            raise QueueError("QUEUE_URL: this queue does not support publishing")
        click.echo(queue.publish(line.removesuffix(b"\n") for line in file))
