"""The check of the project's words: it finds each in prose and in names, and lets code and other words pass."""

from __future__ import annotations

import pytest

from tests.prose import findings


def found(text: str, path: str = "worker/x.py") -> list[str]:
    """Return what the check finds."""
    return [finding.found for finding in findings(path, text)]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("# mend it", "mend"),
        ('"""Return the letters."""', "letters"),
        ("reason = 'the message was buried'", "buried"),
        ("# the worker gave up", "gave up"),
        ("# a stand-in for Klaviyo", "stand-in"),
        ("# nobody reads it", "nobody"),
        ("# What is gone stays gone.", "What ..."),
        ("told = 1", "told"),
        ("class DeadLetterPeek: ...", "DeadLetterPeek"),
    ],
)
def test_word_is_found_in_python(text: str, word: str) -> None:
    """Comments, docstrings, other strings and names."""
    assert found(text) == [word]


def test_word_is_found_in_markdown_with_its_line() -> None:
    """The line and the word to write instead."""
    (finding,) = findings("README.md", "# Title\n\nThe worker gives up.\n")
    assert str(finding) == ("README.md:3: 'gives up': write calls exhaust their retries; messages are dead-lettered")


@pytest.mark.parametrize(
    "text",
    [
        "# dead letters go to the dead-letter queue",
        "dead_letters = read_dead_letters()",
        "# What is a lane? A thread.",
        "# recommended, commended",
        "amend = 1",
    ],
)
def test_other_words_pass(text: str) -> None:
    """The project's own terms, and words that only contain one of those."""
    assert found(text) == []
