"""The queues that tests and benchmarks run on, each with its emulator.

To add one, add a line here and a file beside it.
"""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from tests.rigs.base import Rig

RIGS = {  # imported on demand: their clients are large
    "embedded": "tests.rigs.embedded:Embedded",
    "pubsub": "tests.rigs.pubsub:PubSub",
    "servicebus": "tests.rigs.servicebus:ServiceBus",
    "sqs": "tests.rigs.sqs:SQS",
}
MORE = {
    "directory": "tests.rigs.directory:Directory"
}  # the example of docs/adapters.md; it passes the contract tests too


def rig_type(name: str) -> type[Rig]:
    """Return the class of a rig by its name."""
    return cast("type[Rig]", resolve_name((RIGS | MORE)[name]))
