"""Links between the pages of this project lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.deploy.pages import ROOT, page

PAGES = [*sorted(path.relative_to(ROOT) for path in ROOT.glob("*.md")), Path("infrastructure/README.md")]
PAGES += sorted(path.relative_to(ROOT) for path in (ROOT / "docs").rglob("*.md"))


def _prose(file: Path) -> str:
    return re.sub(r"^```.*?^```", "", page(str(file)), flags=re.DOTALL | re.MULTILINE)


def _anchors(file: Path) -> set[str]:
    """Return the anchors that GitHub gives to headings, and those that are written out."""
    prose = _prose(file)
    titles = re.findall(r"^#+ (.*)$", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", prose), re.MULTILINE)
    made = {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}
    return made | set(re.findall(r'<a id="([^"]+)">', prose))


@pytest.mark.parametrize("file", PAGES, ids=str)
def test_links_lead_somewhere(file: Path) -> None:
    """To a file or a directory, and to a heading of it; what is elsewhere is not asked for."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", _prose(file)):
        target, _, anchor = link.partition("#")
        found = ROOT / file.parent / target if target else ROOT / file
        if ":" in target:
            continue
        if not found.exists() or (anchor and anchor not in _anchors(found)):
            broken.append(link)
    assert broken == []
