"""`python -m worker.sandbox`: print the variables to export, and serve until interrupted."""

from __future__ import annotations

import argparse
import gc
import shlex
import signal

from worker.sandbox import Sandbox
from worker.sandbox.commercetools.copies import IDS
from worker.sandbox.klaviyo.account import BULK_REPEATS, PHONE_MATCHES, Account


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m worker.sandbox", description=main.__doc__)
    parser.add_argument("--commercetools-port", type=int, default=8091, help="default: 8091; 0: any free port")
    parser.add_argument("--klaviyo-port", type=int, default=8092, help="default: 8092; 0: any free port")
    parser.add_argument("--copies", type=int, default=0, metavar="N", help=f"number of additional resources: {IDS}")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each response (default: 0)")
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
        "ignore the repeated event, reject the call, accept and drop the call, or record a duplicate (default: drop)",
    )
    parser.add_argument(
        "--phone-match",
        choices=PHONE_MATCHES,
        default="select",
        help="what to do with a write that matches a profile by its phone number alone, which Klaviyo does not "
        "document: update this profile, or answer 409 (default: select)",
    )
    parser.add_argument("--job-seconds", type=float, default=0.0, help="how long bulk jobs take (default: 0)")
    return parser


def main() -> None:
    """Serve emulators of commercetools and Klaviyo on loopback, with a sample shop."""
    options = vars(_parser().parse_args())
    account = Account(options.pop("bulk_repeats"), options.pop("job_seconds"), phone_match=options.pop("phone_match"))
    # Block the signals before any thread starts, so that only sigwait receives them.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    with Sandbox(account=account, **options) as sandbox:
        # The shop and the account keep all their objects. Scanning them for garbage would cost a third of the CPU.
        gc.freeze()
        gc.set_threshold(100_000, 50, 50)
        for name, value in sandbox.environment.items():
            print(f"export {name}={shlex.quote(value)}", flush=True)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})


if __name__ == "__main__":
    main()
