"""Links and paths in the documents."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.deploy.pages import ROOT, page

PAGES = [Path("infrastructure/README.md"), Path("tests/README.md")]
PAGES += sorted(path.relative_to(ROOT) for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FOLDERS = "adapters|benchmarks|docs|infrastructure|k8s|systemd|tests|worker"


def _prose(file: Path) -> str:
    return re.sub(r"^```.*?^```", "", page(str(file)), flags=re.DOTALL | re.MULTILINE)


def _anchors(file: Path) -> set[str]:
    """Return the anchors of a page: those that GitHub creates for headings, and explicit ones."""
    prose = _prose(file)
    titles = re.findall(r"^#+ (.*)$", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", prose), re.MULTILINE)
    created = {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}
    return created | set(re.findall(r'<a id="([^"]+)">', prose))


@pytest.mark.parametrize("file", PAGES, ids=str)
def test_links_have_a_target(file: Path) -> None:
    """A link inside the project leads to a file or a directory, and its anchor to a heading."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", _prose(file)):
        target, _, anchor = link.partition("#")
        found = ROOT / file.parent / target if target else ROOT / file
        if ":" in target:
            continue
        if not found.exists() or (anchor and anchor not in _anchors(found)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("file", PAGES, ids=str)
def test_named_files_exist(file: Path) -> None:
    """A path in backquotes that starts with a folder of the project exists."""
    paths = re.findall(rf"`((?:{FOLDERS})/[\w./-]+)`", _prose(file))
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_decisions_have_distinct_numbers() -> None:
    """The title of a decision starts with the number in its file name."""
    files = sorted((ROOT / "docs" / "decisions").glob("0*.md"))
    numbers = [int(file.name[:4]) for file in files]
    assert numbers == list(range(1, len(files) + 1))
    for number, file in zip(numbers, files, strict=True):
        assert file.read_text().startswith(f"# {number}. "), file


def test_tests_that_the_security_page_names_exist() -> None:
    """The table says which test shows that an attack is stopped."""
    named = set(re.findall(r"`(tests/[^`]+)`", (ROOT / "SECURITY.md").read_text(encoding="utf-8")))
    assert len(named) > 10
    assert {name for name in named if not list(ROOT.glob(name))} == set()
