"""`python -m tests.cases`: run cases, and print their results or the differences from what is expected."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from tests.cases.case import Case
from tests.cases.compare import differences
from tests.cases.run import run_case

HERE = Path(__file__).parent


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.cases", description=main.__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="the folders of the cases (default: all)")
    parser.add_argument("--from", dest="source", type=Path, default=HERE, metavar="DIR", help="where the folders are")
    parser.add_argument("--write", action="store_true", help="write the whole result to expected.json, for a review")
    parser.add_argument("--show", action="store_true", help="print the whole result, also if it is the expected one")
    return parser


def main() -> int:
    """Run cases and compare their results with expected.json. Without this file, print the whole result."""
    options = _parser().parse_args()
    folders = sorted(path for path in options.source.iterdir() if (path / "commercetools.json").exists())
    failed = 0
    for folder in [options.source / name for name in options.names] or folders:
        case = Case(folder)
        with TemporaryDirectory() as directory:
            result = run_case(case, Path(directory))
        text = json.dumps(result, indent=1, ensure_ascii=False)
        if options.write:
            (folder / "expected.json").write_text(text + "\n", encoding="utf-8")
        expected = case.expected
        if expected is None or options.show:
            click.echo(f"{folder.name}\n{text}")
        if expected is None:
            continue
        found = differences(expected, result)
        click.echo("\n  ".join([f"{folder.name}: {'not ' if found else ''}as expected", *found]))
        failed += bool(found)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
