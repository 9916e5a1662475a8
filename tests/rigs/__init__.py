"""The queues that tests run on, each with what stands in for its service. One line and one file for a new one."""

from __future__ import annotations

from tests.rigs.base import Guarantees, Letter, Rig
from tests.rigs.directory import Directory
from tests.rigs.embedded import Embedded
from tests.rigs.pubsub import PubSub

__all__ = ["EXAMPLES", "RIGS", "Guarantees", "Letter", "Rig"]

RIGS: dict[str, type[Rig]] = {
    "embedded": Embedded,
    "pubsub": PubSub,
}
EXAMPLES: dict[str, type[Rig]] = {"directory": Directory}  # of docs/examples: they keep the contract too
