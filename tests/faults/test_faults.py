"""Whatever goes wrong: nothing lost, nothing doubled, nothing buried that is good."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.faults import queues, scenarios
from tests.faults.harness import Scenario, run

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 60  # good messages
CASES = [(scenario, name) for scenario in scenarios.SCENARIOS for name in scenario.queues]


@pytest.mark.parametrize(("scenario", "name"), CASES, ids=[f"{scenario.name}-{name}" for scenario, name in CASES])
def test_every_good_message_has_its_effect_once_and_every_bad_one_is_a_dead_letter(
    scenario: Scenario, name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """And an outage shorter than the hold costs no delivery attempt."""
    result = run(scenario, name, _queue(name, scenario, tmp_path, request), tmp_path, SIZE)
    assert result.is_right, str(result)
    if name in scenario.costless:
        assert result.extra_attempts == 0, str(result)


def _queue(name: str, scenario: Scenario, directory: Path, request: pytest.FixtureRequest) -> queues.Queue:
    if name == "pubsub":
        return queues.PubSub(request.getfixturevalue("emulator"), kills=scenario.kills)
    return queues.Embedded(directory, kills=scenario.kills)
