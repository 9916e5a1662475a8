"""`klaviyo-worker publish`: messages into the queue."""

from __future__ import annotations

from typing import Any, BinaryIO

import click

from adapters import QueueError, SupportsPublish
from worker.cli.options import Command, open_configured_queue, settings_options
from worker.cli.termination import handle_errors
from worker.settings import QueueSettings, load


@click.command(cls=Command)
@click.argument("file", type=click.File("rb"))
@settings_options(QueueSettings)
def publish(*, file: BinaryIO, **flags: Any) -> None:
    """Put every line of FILE into the queue as a message.

    FILE may be - for stdin. Lines are taken as they are. Prints how many there were.
    """
    with handle_errors(), open_configured_queue(load(QueueSettings, flags)) as queue:
        if not isinstance(queue, SupportsPublish):
            raise QueueError("QUEUE_URL: this queue cannot be published to from here")
        click.echo(queue.publish(line.removesuffix(b"\n") for line in file))
