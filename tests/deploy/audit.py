"""`make audit`: look up the packages of the locks in OSV, the database of known vulnerabilities (https://osv.dev)."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import click
import requests

ROOT = Path(__file__).parents[2]
API = "https://api.osv.dev"
_LOCKED = re.compile(r"^([A-Za-z0-9._-]+)==([^ ;\\]+)", re.MULTILINE)

Package = tuple[str, str]  # name, version


def locked_packages() -> list[Package]:
    """Return the packages of all locks."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("requirements*.lock"))]
    return sorted({(name.lower(), version) for text in texts for name, version in _LOCKED.findall(text)})


def vulnerabilities(packages: list[Package], api: str = API) -> dict[Package, list[str]]:
    """Return the ids of the vulnerabilities of each package that has some. Raises requests.RequestException."""
    found: dict[Package, list[str]] = {}
    queries: list[tuple[Package, str]] = [(package, "") for package in packages]
    while queries:
        document = _query(queries, api)
        following = []
        for (package, _), result in zip(queries, document["results"], strict=True):
            if ids := [vulnerability["id"] for vulnerability in result.get("vulns", [])]:
                found.setdefault(package, []).extend(ids)
            if token := result.get("next_page_token"):
                following.append((package, token))
        queries = following
    return found


def _query(queries: list[tuple[Package, str]], api: str) -> Any:
    entries = [
        {"package": {"name": name, "ecosystem": "PyPI"}, "version": version} | ({"page_token": token} if token else {})
        for (name, version), token in queries
    ]
    response = requests.post(f"{api}/v1/querybatch", json={"queries": entries}, timeout=60)
    response.raise_for_status()
    return response.json()


def main(api: str = API) -> int:
    """Print the known vulnerabilities. Return 1 if there are some, and 2 if the database cannot be reached."""
    packages = locked_packages()
    try:
        found = vulnerabilities(packages, api)
    except requests.RequestException as error:
        click.echo(f"{api} cannot be reached ({type(error).__name__}): run make audit where it can be")
        return 2
    for (name, version), ids in found.items():
        click.echo(f"{name} {version}: {', '.join(f'https://osv.dev/{each}' for each in ids)}")
    click.echo(f"{len(packages)} packages, {len(found)} with known vulnerabilities")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
