"""The commands in the documents."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def commands(name: str, mark: str = "") -> list[str]:
    """Return the commands of a document, one line each; with `mark`, only those of blocks after that comment."""
    lead = rf"<!-- {re.escape(mark)} -->\n" if mark else ""
    found = re.findall(rf"{lead}```console\n(.*?)```", page(name), re.DOTALL)
    lines = "\n".join(found).replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


def flags(command: str) -> dict[str, str]:
    """Return the flags of a command and their values: `--name=value`, `--name`, or `--name value ...`."""
    found: dict[str, str] = {}
    last = ""
    for word in shlex.split(command):
        if word.startswith("--"):
            last, _, found[last] = word.partition("=")
            found[last] = word.partition("=")[2]
        elif last:
            found[last] = f"{found[last]} {word}".strip()
    return found
