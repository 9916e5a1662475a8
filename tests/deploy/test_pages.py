"""Commands in the documents use variables that the reader has."""

from __future__ import annotations

import re

import pytest

from tests.deploy.pages import ROOT, commands, page

GUIDE = "docs/kubernetes.md"
READMES = [ROOT / "README.md", ROOT / "infrastructure/README.md"]
SHOWN = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("docs/*.md"), *READMES])


@pytest.mark.parametrize("name", SHOWN)
def test_variables_are_set_before_they_are_used(name: str) -> None:
    """Either a command above sets a variable, or the text names it as `NAME` or `$NAME`."""
    prose = re.sub(r"^```.*?^```", "", page(name), flags=re.DOTALL | re.MULTILINE)
    known = set(re.findall(r"`\$?([A-Z_]+)`", prose))
    missing = set()
    for command in commands(name):
        missing |= set(re.findall(r"\$\{?([A-Z_]+)", command)) - known
        known |= set(re.findall(r"(?:^|\s|export )([A-Z_]+)=", command))
    assert missing == set()


def test_a_deployment_on_gke_takes_fewer_than_ten_commands() -> None:
    """They are the commands of the step-by-step guide, except that Terraform creates the queue."""
    shown = commands(GUIDE, "compared by tests/deploy/test_pages.py")
    assert 0 < len(shown) < 10
    assert [command.split()[0] for command in shown] == ["terraform"] * 2 + ["gcloud", "docker"] + ["kubectl"] * 5
    guide = page(GUIDE).replace(_block(shown), "")
    assert [command for command in shown if command.startswith("kubectl") and command not in guide] == [
        command for command in shown if "../deployment" in command
    ]


def _block(shown: list[str]) -> str:
    block = "".join(f"$ {command}\n" for command in shown)
    assert block in page(GUIDE)
    return block
