"""`python -m worker.sandbox`: serve until interrupted; prints the variables to export."""

from __future__ import annotations

import argparse
import gc
import shlex
import signal

from worker.sandbox import Sandbox
from worker.sandbox.commercetools.copies import IDS
from worker.sandbox.klaviyo.account import BULK_REPEATS, Account


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m worker.sandbox", description=main.__doc__)
    parser.add_argument("--commercetools-port", type=int, default=8091, help="default: 8091; 0: any free one")
    parser.add_argument("--klaviyo-port", type=int, default=8092, help="default: 8092; 0: any free one")
    parser.add_argument("--copies", type=int, default=0, metavar="N", help=f"so many more resources: {IDS}")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds every answer takes (default: 0)")
    parser.add_argument(
        "--rate-limits",
        type=float,
        nargs="?",
        const=1.0,
        default=0.0,
        metavar="FACTOR",
        help="enforce Klaviyo's documented rate limits, or a multiple of them (default: none)",
    )
    parser.add_argument(
        "--bulk-repeats",
        choices=BULK_REPEATS,
        default="drop",
        help="what to do with a bulk call that repeats an event of an earlier call, which Klaviyo does not document: "
        "ignore the repeated event, refuse the call, accept and drop the call, or record a duplicate (default: drop)",
    )
    parser.add_argument("--job-seconds", type=float, default=0.0, help="how long bulk jobs take (default: 0)")
    return parser


def main() -> None:
    """Serve a commercetools and a Klaviyo on loopback, with a sample shop."""
    options = vars(_parser().parse_args())
    account = Account(options.pop("bulk_repeats"), options.pop("job_seconds"))
    # Blocked before any thread starts, so that sigwait is the one to get them.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    with Sandbox(account=account, **options) as sandbox:
        # What the shop holds stays, and what the account holds only grows: looking through it costs a third of all CPU.
        gc.freeze()
        gc.set_threshold(100_000, 50, 50)
        for name, value in sandbox.environment.items():
            print(f"export {name}={shlex.quote(value)}", flush=True)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})


if __name__ == "__main__":
    main()
