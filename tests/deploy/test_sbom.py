"""The software bill of materials of the image."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.deploy import sbom
from tests.deploy.dockerfile import ROOT
from tests.deploy.test_image import LOCKED

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    target: Path = tmp_path_factory.mktemp("sbom") / "sbom.json"
    sbom.write(target)
    found: dict[str, object] = json.loads(target.read_text(encoding="utf-8"))
    return found


def test_sbom_lists_every_locked_distribution_with_its_hashes(document: dict[str, object]) -> None:
    """Each has the version, the package URL that scanners look up, and the hashes of its files."""
    components = document["components"]
    assert isinstance(components, list)
    found = {
        (component["name"], component["version"], component["purl"], frozenset(_hashes(component)))
        for component in components
    }
    assert found == {
        (name, version, f"pkg:pypi/{name}@{version}", frozenset(hashes)) for name, version, hashes in LOCKED
    }


def _hashes(component: dict[str, object]) -> set[str]:
    references = component["externalReferences"]
    assert isinstance(references, list)
    return {entry["content"] for reference in references for entry in reference["hashes"]}


def test_sbom_describes_this_version_of_the_worker(document: dict[str, object]) -> None:
    found = document["metadata"]
    assert isinstance(found, dict)
    described = found["component"]
    assert (described["type"], described["name"]) == ("application", "klaviyo-worker")
    assert described["version"] == sbom.metadata()["version"]
    assert document["specVersion"] == sbom.SPECIFICATION


def test_sbom_is_reproducible_and_names_no_path(document: dict[str, object], tmp_path: Path) -> None:
    sbom.write(tmp_path / "again.json")
    text = (tmp_path / "again.json").read_text(encoding="utf-8")
    assert json.loads(text) == document
    assert str(ROOT) not in text
    assert str(tmp_path) not in text
