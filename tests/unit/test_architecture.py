"""The rules of the architecture that import-linter (pyproject.toml) cannot check."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FACADES = {"adapters", "worker/cli", "worker/sandbox", "worker/enrich", "worker/send", "worker/transform"}


@pytest.mark.parametrize("path", sorted((ROOT / "worker/transform").rglob("*.py")), ids=lambda path: path.name)
def test_transform_does_not_read_the_clock(path: Path) -> None:
    """The result of a transformation depends only on its input."""
    assert ".now(" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "path",
    [path for folder in ("worker", "adapters") for path in sorted((ROOT / folder).rglob("__init__.py"))],
    ids=lambda path: str(path.parent.relative_to(ROOT)),
)
def test_packages_import_nothing(path: Path) -> None:
    """Importing a module must not load the others of its folder: the Lambda function never loads boto3."""
    if str(path.parent.relative_to(ROOT)) not in FACADES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
