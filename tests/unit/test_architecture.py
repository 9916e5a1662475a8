"""Imports go the way the data goes: what a stranger reads first must stay true."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLIENTS = {"worker.commercetools.client", "worker.klaviyo.client", "worker.http.transport"}


def imports(path: Path) -> set[str]:
    """Return the modules a file names, type-checking imports left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in guarded:
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", files("adapters"), ids=lambda path: path.name)
def test_adapters_know_nobody(path: Path) -> None:
    """A queue can be written without reading the worker."""
    assert not any(name.startswith("worker") for name in imports(path))


@pytest.mark.parametrize("path", files("worker/transform"), ids=lambda path: path.name)
def test_transform_is_pure(path: Path) -> None:
    """No client, no network, no clock."""
    assert not imports(path) & (CLIENTS | {"time", "urllib3", "requests", "socket", "random"})
    assert ".now(" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", files("worker/sandbox"), ids=lambda path: path.name)
def test_the_sandbox_stands_alone(path: Path) -> None:
    """A stand-in that shares code with the worker would share its mistakes."""
    ours = {name for name in imports(path) if name.startswith(("worker", "adapters"))}
    assert all(name.startswith("worker.sandbox") for name in ours)


def test_the_worker_does_not_load_the_sandbox() -> None:
    """Nor the other way round."""
    code = "import sys, worker.service; sys.exit('worker.sandbox' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
