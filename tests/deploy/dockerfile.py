"""The instructions of the Dockerfile."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Instruction(NamedTuple):
    """An instruction: its name in capitals, and its value on one line."""

    name: str
    value: str


def stages() -> list[list[Instruction]]:
    """Return the instructions of each stage. A stage starts with FROM."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    found: list[list[Instruction]] = [[]]
    for line in filter(None, lines):
        instruction = Instruction(*line.split(maxsplit=1))
        if instruction.name == "FROM":
            found.append([])
        found[-1].append(instruction)
    return found[1:]
