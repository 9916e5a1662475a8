"""Random sequences of faults, kills and SIGTERMs."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import Phase, given, note, settings
from hypothesis import strategies as st

from tests.faults.harness import run
from tests.faults.scenarios import mixture
from tests.rigs.embedded import Embedded

SIZE = 25  # good messages
EXAMPLES = int(os.environ.get("FAULT_EXAMPLES", "4"))


@pytest.mark.timeout(100 * EXAMPLES)
@settings(max_examples=EXAMPLES, deadline=None, derandomize="FAULT_EXAMPLES" not in os.environ, phases=[Phase.generate])
@given(seed=st.integers(0, 2**32 - 1))
def test_good_messages_have_one_effect_and_bad_messages_are_dead_lettered(seed: int) -> None:
    """`python -m tests.faults --seeds 1 --first-seed SEED mixture` repeats a mixture."""
    scenario = mixture(seed)
    note(scenario.name)
    with tempfile.TemporaryDirectory() as directory:
        result = run(scenario, "embedded", Embedded(None, Path(directory), kills=scenario.kills), Path(directory), SIZE)
    assert result.is_correct, str(result)
