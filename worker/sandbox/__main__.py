"""`python -m worker.sandbox`: serve until interrupted; prints the variables to export."""

from __future__ import annotations

import shlex
import signal

import click

from worker.sandbox import Sandbox


@click.command()
@click.option("--commercetools-port", type=int, default=8091, show_default=True)
@click.option("--klaviyo-port", type=int, default=8092, show_default=True)
@click.option("--latency", type=float, default=0.0, show_default=True, help="Seconds every answer takes.")
@click.option("--rate-limits", is_flag=True, help="Enforce Klaviyo's documented rate limits.")
def serve(*, commercetools_port: int, klaviyo_port: int, latency: float, rate_limits: bool) -> None:
    """Serve a commercetools and a Klaviyo on loopback, with a sample shop."""
    with Sandbox(
        commercetools_port=commercetools_port, klaviyo_port=klaviyo_port, latency=latency, rate_limits=rate_limits
    ) as sandbox:
        for name, value in sandbox.environment.items():
            click.echo(f"export {name}={shlex.quote(value)}")
        signal.sigwait({signal.SIGINT, signal.SIGTERM})


signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
serve()
