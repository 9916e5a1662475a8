"""`klaviyo-worker publish`: messages into the queue."""

from __future__ import annotations

from typing import Any, BinaryIO

import click

from adapters import Publisher, QueueError
from worker.cli.base import exit_codes, opened, settings_options
from worker.settings import QueueSettings, load


@click.command()
@click.argument("file", type=click.File("rb"))
@settings_options(QueueSettings)
def publish(*, file: BinaryIO, **flags: Any) -> None:
    """Put every line of FILE (- for stdin) into the queue as one message, and print how many."""
    with exit_codes(), opened(load(QueueSettings, flags)) as queue:
        if not isinstance(queue, Publisher):
            raise QueueError("QUEUE_URL: this queue cannot be published to from here")
        click.echo(queue.publish(line.removesuffix(b"\n") for line in file))
