"""Commands in the documents use variables that the reader has."""

from __future__ import annotations

import re

import pytest

from tests.deploy.pages import ROOT, commands, page

READMES = [ROOT / "README.md", ROOT / "infrastructure/README.md"]
SHOWN = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("docs/*.md"), *READMES])


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


def test_the_readme_leads_to_a_deployment_in_under_ten_commands() -> None:
    """Those that docs/kubernetes.md explains, but for the queue, which Terraform makes."""
    _, _, after = page("README.md").partition("\n## Deploy\n")
    section, _, _ = after.partition("\n## ")
    shown = [line.removeprefix("$ ") for line in section.splitlines() if line.startswith("$ ")]
    assert 0 < len(shown) < 10
    assert [command.split()[0] for command in shown] == ["terraform"] * 2 + ["gcloud", "docker"] + ["kubectl"] * 5
    explained = "\n".join(commands("docs/kubernetes.md"))
    assert [command for command in shown if command.startswith("kubectl") and command not in explained] == [
        command for command in shown if "../deployment" in command
    ]
