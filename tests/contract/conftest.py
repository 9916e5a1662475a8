"""The contract's queues on AWS SQS are moto's: closer to what AWS documents, and few messages are quick there too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(scope="session")
def servers(servers: Callable[[str], Any], request: pytest.FixtureRequest) -> Callable[[str], Any]:
    return lambda name: request.getfixturevalue("moto") if name == "sqs" else servers(name)
