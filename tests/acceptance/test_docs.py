"""The commands in the documents, run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from tests.emulator import Emulator

PAGE = Path(__file__).parents[2] / "docs" / "pubsub.md"
_MARKED = re.compile(r"<!-- run by tests/acceptance/test_docs.py -->\n```console\n(.*?)```", re.DOTALL)


def test_gcloud_commands_work(tmp_path: Path) -> None:
    """On an emulator, with the variables that the page names."""
    emulator = Emulator()
    environment = os.environ | {
        "CLOUDSDK_API_ENDPOINT_OVERRIDES_PUBSUB": f"http://{emulator.host}/",
        "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true",
        "CLOUDSDK_CORE_PROJECT": "demo",
        "CLOUDSDK_CONFIG": str(tmp_path),
    }
    create, look = _MARKED.findall(PAGE.read_text(encoding="utf-8"))
    letter = "gcloud pubsub topics publish klaviyo-worker-dead --message=poison --attribute=reason=because,stage=parse"
    try:
        for command in [*_commands(create), letter]:
            _run(command, environment)
        assert re.search(r"because +parse +.*poison", _run(_commands(look)[0], environment))
    finally:
        emulator.kill()


def _commands(block: str) -> list[str]:
    return [line.removeprefix("$ ") for line in block.splitlines()]


def _run(command: str, environment: dict[str, str]) -> str:
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, f"{command}\n{done.stderr.decode()}"
    return done.stdout.decode()
