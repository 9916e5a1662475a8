"""Keep the words of docs/glossary.md: `python -m tests.prose [PATH...]` lists every other word for the same thing.

Reads Markdown, comments, docstrings and other strings of Python, names in Python, and the comments of other files.
A word that must stay (another project's name, say) is listed in EXCEPTIONS.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

# What not to write (a regular expression, whole words) and what to write instead.
WORDS = {
    r"mend(s|ed|ing)?": "fix",
    r"(?<!dead )(?<!dead-)(?<!dead_)letters?": "dead letter",
    r"bur(y|ies|ied|ying|ial)": "dead-letter, move to the dead-letter queue",
    r"(give|gives|gave|given|giving)[ _]up": "calls exhaust their retries; messages are dead-lettered",
    r"stand-?ins?|stand(s|ing)? in for": "fake (tests), emulator (sandbox)",
    r"insist(s|ed|ing)?": "retry",
    r"begun|began": "started",
    r"for good": "permanently",
    r"for ?ever": "indefinitely",
    r"in the end": "eventually",
    r"once more": "again",
    r"meanwhile": "in the meantime, concurrently",
    r"nobody|somebody|anybody": "no worker, another process, a client: whoever it is",
    r"dawdl(e|es|ed|er|ers|ing)": "slow client",
    r"patience": "timeout",
    r"trouble[sd]?": "error, failure, fault",
    r"out of reach": "unreachable",
    r"likewise": "also",
    r"for want of": "because ... is missing",
    r"shall": "must, should",
    r"the other side": "Klaviyo, commercetools, the queue: whichever it is",
    r"(is|are) (of )?no (use|more)|no use": "is invalid, no longer",
    r"(tell|tells|told|telling)": "report, return, know, detect, distinguish",
    r"seldom": "rarely",
    r"(ever|evermore) (more|less|longer)": "increasingly",
    r"(is|are|was|were) to be": "must be",
    r"so many|as many as there are": "the number",
    r"whoever|whosoever": "the client, the worker, the process",
    r"ever so often|now and then|once in a while|in a while": "periodically, occasionally",
    r"lest|thereof|therein|whereof|hence|thus": "so that, of it, in it, so",
    r"befall(s|en)?|befell": "affect",
    r"peeks?|peeked|peeking": "read, preview",
    r"tall(y|ies|ied)": "count, statistics",
}
NAMES = re.compile(  # words of identifiers, between underscores
    r"(?<![a-z])(mend|mends|mended|bury|buried|burial|insist|begun|told|tell|tells|letters?|dawdle|patience|trouble|peek|tally"
    r"|nobody|somebody|meanwhile)(?![a-z])"
)
SENTENCE = re.compile(r"(?:^|(?<=[.:;] ))(What|Who) (?![^.?]*\?)")  # a free relative clause as the subject
_WORDS = re.compile("|".join(rf"\b(?:{word})\b" for word in WORDS), re.IGNORECASE)

EXCEPTIONS: dict[str, frozenset[str]] = {  # path, or "" for all: what may stand there
    "": frozenset({"peek_messages", "MSG_PEEK"}),  # names of Azure's SDK and of sockets
    "tests/support/servicebus_broker/requests.py": frozenset({"peek"}),  # an operation of Service Bus
    "tests/prose.py": frozenset({"*"}),
    "tests/unit/test_prose.py": frozenset({"*"}),
    "worker/health/page.css": frozenset({"letter"}),  # ::first-letter and letter-spacing
}
SUFFIXES = {".md", ".py", ".yaml", ".yml", ".tf", ".html", ".js", ".css", ".cfg", ".toml", ".service", ".json"}
SKIPPED = ("tests/golden/", "docs/performance.json", "LICENSE", "requirements.lock")


class Finding(NamedTuple):
    """A word in a file, and what to write instead."""

    path: str
    line: int
    found: str
    instead: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.found!r}: write {self.instead}"


def findings(path: str, text: str) -> Iterator[Finding]:
    """Yield what of a file's prose and names does not follow the glossary."""
    allowed = EXCEPTIONS.get(path, frozenset()) | EXCEPTIONS.get("", frozenset())
    if "*" in allowed:
        return
    pieces = _python(text) if path.endswith(".py") else enumerate(text.splitlines(), 1)
    for number, piece in pieces:
        for match in _WORDS.finditer(piece):
            if match[0].lower() not in allowed:
                yield Finding(path, number, match[0], _instead(match[0], match.string, match.start()))
    if path.endswith((".py", ".md")):
        yield from _sentences(path, text, allowed)
    if path.endswith(".py"):
        yield from _names(path, text, allowed)


def _instead(found: str, text: str, start: int) -> str:
    pattern = next(word for word in WORDS if re.compile(rf"\b(?:{word})\b", re.IGNORECASE).match(text, start))
    return WORDS[pattern] if pattern else found


def _tokens(text: str) -> Iterator[tokenize.TokenInfo]:
    return tokenize.generate_tokens(io.StringIO(text).readline)


def _python(text: str) -> Iterator[tuple[int, str]]:
    """Yield line number and text of comments and strings."""
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)}
    for token in _tokens(text):
        if token.type in kinds:
            for offset, line in enumerate(token.string.splitlines()):
                yield token.start[0] + offset, line


def _sentences(path: str, text: str, allowed: frozenset[str]) -> Iterator[Finding]:
    pieces = _python(text) if path.endswith(".py") else enumerate(text.splitlines(), 1)
    for number, piece in pieces:
        match = SENTENCE.search(piece.strip().lstrip("#\"'rf ").replace("**", ""))
        if match and match[1].lower() not in allowed and not piece.lstrip().startswith(("|", "#" * 2)):
            yield Finding(path, number, f"{match[1]} ...", "a noun as the subject: name the thing")


def _names(path: str, text: str, allowed: frozenset[str]) -> Iterator[Finding]:
    for token in _tokens(text):
        if token.type == tokenize.NAME:
            parts = re.sub(r"([a-z])([A-Z])", r"\1_\2", token.string).lower().replace("dead_letter", "")
            match = NAMES.search(parts)
            if match and match[0] not in allowed and token.string not in allowed:
                yield Finding(path, token.start[0], token.string, "the name of the glossary")


def main(arguments: list[str]) -> int:
    """Print what does not follow, of the paths given or of the whole repository; return how many."""
    listed = subprocess.run(["git", "ls-files", *arguments], check=True, capture_output=True, text=True).stdout
    number = 0
    for name in listed.splitlines():
        path = Path(name)
        if path.suffix not in SUFFIXES and path.name not in {"Makefile", "Dockerfile"}:
            continue
        if name.startswith(SKIPPED) or not path.is_file():
            continue
        for finding in findings(name, path.read_text(encoding="utf-8")):
            print(finding)  # noqa: T201
            number += 1
    return number


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:]) else 0)
