"""Parsed Terraform files."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import hcl2

INFRASTRUCTURE = Path(__file__).parents[2] / "infrastructure"


def blocks(kind: str) -> list[dict[str, Any]]:
    """Return the blocks of a kind (resource, variable, …) in all files: {label: {label: {argument: value}}}."""
    return [block for document in _documents() for block in document.get(kind, [])]


@cache
def _documents() -> list[dict[str, Any]]:
    files = sorted(INFRASTRUCTURE.glob("*.tf"))
    return [_plain(hcl2.loads(file.read_text(encoding="utf-8"))) for file in files]


def resources(kind: str) -> dict[str, dict[str, Any]]:
    """Return the resources of a type, by name."""
    return {name: body for block in blocks("resource") for name, body in block.get(kind, {}).items()}


def _plain(value: Any) -> Any:
    """Remove the quotes and keys that the parser adds."""
    if isinstance(value, dict):
        return {_plain(key): _plain(entry) for key, entry in value.items() if not key.startswith("__")}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return value[1:-1] if isinstance(value, str) and value.startswith('"') else value
