"""Commands in the documents use variables that the reader has."""

from __future__ import annotations

import re

import pytest

from tests.deploy.pages import ROOT, commands, page

SHOWN = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("docs/*.md"), ROOT / "infrastructure/README.md"])


@pytest.mark.parametrize("name", SHOWN)
def test_variables_are_set_before_they_are_used(name: str) -> None:
    """By a command above, or by the reader: then the text names them, as `NAME` or `$NAME`."""
    prose = re.sub(r"^```.*?^```", "", page(name), flags=re.DOTALL | re.MULTILINE)
    known = set(re.findall(r"`\$?([A-Z_]+)`", prose))
    missing = set()
    for command in commands(name):
        missing |= set(re.findall(r"\$\{?([A-Z_]+)", command)) - known
        known |= set(re.findall(r"(?:^|\s|export )([A-Z_]+)=", command))
    assert missing == set()
