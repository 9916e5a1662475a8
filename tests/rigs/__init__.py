"""The queues that tests run on, each with what stands in for its service. One line and one file for a new one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.rigs.base import Guarantees, Letter, Rig
from tests.rigs.embedded import Embedded
from tests.rigs.pubsub import PubSub

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["RIGS", "Guarantees", "Letter", "Rig"]

RIGS: Mapping[str, type[Rig]] = {
    "embedded": Embedded,
    "pubsub": PubSub,
}
