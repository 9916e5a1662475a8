"""Whatever the sequence of faults, kills and SIGTERMs."""

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


@pytest.mark.timeout(30 * EXAMPLES)
@settings(max_examples=EXAMPLES, deadline=None, derandomize="FAULT_EXAMPLES" not in os.environ, phases=[Phase.generate])
@given(seed=st.integers(0, 2**32 - 1))
def test_every_good_message_has_its_effect_once_and_nothing_else_is_buried(seed: int) -> None:
    """A seed tells all of a mixture: `python -m tests.faults --seeds 1 --first-seed SEED mixture` repeats it."""
    scenario = mixture(seed)
    note(scenario.name)
    with tempfile.TemporaryDirectory() as directory:
        result = run(scenario, "embedded", Embedded(None, Path(directory), kills=scenario.kills), Path(directory), SIZE)
    assert result.is_right, str(result)
