"""`make test-wheel`: runs the acceptance tests against the wheel that the Dockerfile's steps build and install.

The wheel has a virtual environment of its own, with the distributions of the image. The tests and the servers that
replace the real services run from the repository.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.deploy.dockerfile import ROOT
from tests.deploy.image import HOME, build

BENCHMARKS = "tests/acceptance/test_bench.py"  # part of the repository, not of the wheel


def main(arguments: list[str]) -> int:
    """Build, test, and return pytest's exit code. `arguments` are further arguments of pytest."""
    with tempfile.TemporaryDirectory(prefix="klaviyo-worker-") as temporary:
        scratch = Path(temporary)
        build(scratch)
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment["TESTED_WORKER"] = str(scratch / HOME / "bin/klaviyo-worker")
        command = [sys.executable, "-m", "pytest", "tests/acceptance", f"--ignore={BENCHMARKS}", *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
