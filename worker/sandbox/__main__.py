"""`python -m worker.sandbox`: serve until interrupted; prints the variables to export."""

from __future__ import annotations

import argparse
import shlex
import signal

from worker.sandbox import Sandbox


def main() -> None:
    """Serve a commercetools and a Klaviyo on loopback, with a sample shop."""
    parser = argparse.ArgumentParser(prog="python -m worker.sandbox", description=main.__doc__)
    parser.add_argument("--commercetools-port", type=int, default=8091, help="default: 8091; 0: any free one")
    parser.add_argument("--klaviyo-port", type=int, default=8092, help="default: 8092; 0: any free one")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds every answer takes (default: 0)")
    parser.add_argument("--rate-limits", action="store_true", help="enforce Klaviyo's documented rate limits")
    arguments = parser.parse_args()
    # Blocked before any thread starts, so that sigwait is the one to get them.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    with Sandbox(**vars(arguments)) as sandbox:
        for name, value in sandbox.environment.items():
            print(f"export {name}={shlex.quote(value)}", flush=True)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})


if __name__ == "__main__":
    main()
