"""Fault scenarios lose and duplicate nothing, and dead-letter only bad messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.faults import scenarios
from tests.faults.harness import Scenario, run
from tests.rigs import rig_type

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SIZE = 60  # good messages
# Every scenario runs on the embedded queue. On Pub/Sub: those with redeliveries, long holds or dead letters, and one
# outage. On the others: three that depend on the adapter. `make faults` runs every scenario on every queue.
PUBSUB_SCENARIOS = (
    "no faults",
    "Klaviyo: 429 storm",
    "Klaviyo: 400 for some records",
    "Klaviyo: 400 for one record in an outage",
    "commercetools: not readable right after creation",
    "both: connections refused",
    "worker: kill -9, three times",
    "worker: kill -9 in an outage",
    "worker: SIGTERM, twice",
    "worker: SIGTERM in an outage",
    "worker: two workers",
    "worker: one of two killed",
)
OTHER_QUEUE_SCENARIOS = (
    "Klaviyo: 400 for one record in an outage",
    "worker: kill -9 in an outage",
    "worker: SIGTERM in an outage",
)
CASES = [
    (scenario, name)
    for scenario in scenarios.SCENARIOS
    for name in scenario.queues
    if name == scenario.queues[0] or scenario.name in (PUBSUB_SCENARIOS if name == "pubsub" else OTHER_QUEUE_SCENARIOS)
]


@pytest.mark.parametrize(("scenario", "name"), CASES, ids=[f"{scenario.name}-{name}" for scenario, name in CASES])
def test_good_messages_have_one_effect_and_bad_messages_are_dead_lettered(
    scenario: Scenario, name: str, tmp_path: Path, servers: Callable[[str], Any]
) -> None:
    """An outage shorter than the hold costs no delivery attempt."""
    queue = rig_type(name)(servers(name), tmp_path, kills=scenario.kills)
    result = run(scenario, name, queue, tmp_path, SIZE)
    assert result.is_correct, str(result)
    if name in scenario.no_extra_attempts:
        assert result.extra_attempts == 0, str(result)


def test_scenarios_for_other_queues_exist() -> None:
    """A renamed scenario is not silently skipped."""
    assert {*PUBSUB_SCENARIOS, *OTHER_QUEUE_SCENARIOS} <= {scenario.name for scenario in scenarios.SCENARIOS}
