"""Whatever goes wrong: nothing lost, nothing doubled, nothing buried that is good."""

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
# Every scenario on the embedded queue; on Pub/Sub those in which deliveries come again, wait long or are buried, and
# one outage; a few on the others, as the rest is no business of an adapter. `make faults` runs all of them on all.
ON_PUBSUB = (
    "nothing goes wrong",
    "Klaviyo: 429 storm",
    "Klaviyo: 400 for some records",
    "Klaviyo: 400 for one record in an outage",
    "commercetools: not readable right after creation",
    "both: connections refused",
    "worker: kill -9, three times",
    "worker: kill -9 in an outage",
    "worker: SIGTERM, twice",
    "worker: SIGTERM in an outage",
    "worker: two of them",
    "worker: one of two killed",
)
ELSEWHERE = (
    "Klaviyo: 400 for one record in an outage",
    "worker: kill -9 in an outage",
    "worker: SIGTERM in an outage",
)
CASES = [
    (scenario, name)
    for scenario in scenarios.SCENARIOS
    for name in scenario.queues
    if name == scenario.queues[0] or scenario.name in (ON_PUBSUB if name == "pubsub" else ELSEWHERE)
]


@pytest.mark.parametrize(("scenario", "name"), CASES, ids=[f"{scenario.name}-{name}" for scenario, name in CASES])
def test_every_good_message_has_its_effect_once_and_every_bad_one_is_a_dead_letter(
    scenario: Scenario, name: str, tmp_path: Path, servers: Callable[[str], Any]
) -> None:
    """And an outage shorter than the hold costs no delivery attempt."""
    queue = rig_type(name)(servers(name), tmp_path, kills=scenario.kills)
    result = run(scenario, name, queue, tmp_path, SIZE)
    assert result.is_right, str(result)
    if name in scenario.costless:
        assert result.extra_attempts == 0, str(result)


def test_scenarios_chosen_for_other_queues_exist() -> None:
    """A scenario that is given another name does not drop out."""
    assert {*ON_PUBSUB, *ELSEWHERE} <= {scenario.name for scenario in scenarios.SCENARIOS}
