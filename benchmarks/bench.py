"""`make bench`: what a message costs, measured on the sandbox in a process of its own.

Every row publishes messages to a new embedded queue and times the installed command draining it. CPU is user and
system time of the worker's whole process, start included; calls are counted by the sandbox. Wall-clock figures
depend on the machine; calls and CPU per message are the ones to compare.
"""

from __future__ import annotations

import argparse
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
import urllib3

from adapters.embedded import EmbeddedQueue
from worker.sandbox.notifications import bare, change, message
from worker.sandbox.shop import sample_shop, uid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

COMMAND = str(Path(sys.executable).with_name("klaviyo-worker"))
HTTP = urllib3.PoolManager()


def order(number: int) -> bytes:
    """Return an OrderCreated of 3 lines with its payload."""
    template = sample_shop().orders[uid("order:three")]
    lines = [line | {"id": f"{number}-{index}"} for index, line in enumerate(template["lineItems"])]
    return bare(
        message("OrderCreated", "order", f"o{number}", order=template | {"id": f"o{number}", "lineItems": lines})
    )


def order_state(number: int) -> bytes:
    """Return an OrderStateChanged, whose order is fetched; the sample orders in turn."""
    names = ("three", "guest", "yen", "wrapped", "discounted", "imported")
    return bare(message("OrderStateChanged", "order", uid(f"order:{names[number % 6]}"), orderState="Complete"))


def customer(number: int) -> bytes:
    """Return a customer ResourceUpdated; the sample customers in turn."""
    names = ("grete", "katherine", "radia", "nameless", "hostile")
    return bare(change("ResourceUpdated", "customer", uid(f"customer:{names[number % 5]}")))


def product(number: int) -> bytes:
    """Return a ProductPublished; the sample products in turn."""
    names = ("slim-jeans", "linen-shirt", "wool-socks", "gift-card", "cap")
    return bare(message("ProductPublished", "product", uid(f"product:{names[number % 5]}")))


KINDS: dict[str, Callable[[int], bytes]] = {
    "orders of 3 lines, payload included": order,
    "order states, 6 orders fetched": order_state,
    "customer updates, 5 customers": customer,
    "product publishes, 5 products": product,
}


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement."""

    kind: str
    latency: float
    messages: int
    seconds: float
    cpu: float
    klaviyo_calls: int
    commercetools_calls: int

    def text(self) -> str:
        """Return the row of the table."""
        return (
            f"{self.kind:<38}{self.latency * 1000:>7.0f} ms{self.messages / self.seconds:>10.0f}"
            f"{self.cpu / self.messages * 1000:>11.2f}{self.klaviyo_calls / self.messages:>10.3f}"
            f"{self.commercetools_calls / self.messages:>10.3f}"
        )


@contextmanager
def sandbox(latency: float) -> Iterator[dict[str, str]]:
    """Run the sandbox elsewhere and yield the variables that point at it."""
    command = [sys.executable, "-m", "worker.sandbox", "--commercetools-port", "0", "--klaviyo-port", "0"]
    with subprocess.Popen([*command, "--latency", str(latency)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(7)]
        words = (shlex.split(line)[1] for line in lines)
        try:
            yield {name: value for name, _, value in (word.partition("=") for word in words)}
        finally:
            process.terminate()


def measure(kind: str, latency: float, messages: int) -> Row:
    """Drain one queue and return what it took."""
    with sandbox(latency) as environment, tempfile.TemporaryDirectory() as directory:
        url = f"{directory}/queue.db"
        EmbeddedQueue(Path(url)).publish(map(KINDS[kind], range(messages)))
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(
            [COMMAND, "run", "--once", "--log-level", "ERROR"],
            env={"PATH": os.environ["PATH"], **environment, "QUEUE_URL": f"embedded://{url}"},
            check=True,
        )
        seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        calls = [len(_requests(environment[name])) for name in ("KLAVIYO_API_URL", "CT_API_URL")]
    return Row(kind, latency, messages, seconds, cpu, *calls)


def _requests(url: str) -> list[object]:
    answer = HTTP.request("GET", f"{url}/_sandbox/requests")
    found: list[object] = orjson.loads(answer.data)
    return found


def main() -> None:
    """Measure every kind at every latency and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=1000)
    parser.add_argument("--latency", type=float, nargs="*", default=[0.0, 0.05], help="seconds")
    arguments = parser.parse_args()
    print(f"{'':<38}{'LATENCY':>10}{'MSG/S':>10}{'CPU MS/MSG':>11}{'KLAVIYO':>10}{'CT CALLS':>10}")
    for latency in arguments.latency:
        for kind in KINDS:
            print(measure(kind, latency, arguments.messages).text(), flush=True)


if __name__ == "__main__":
    main()
