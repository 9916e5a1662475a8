"""How a URL finds its queue, ours or another package's."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from adapters import ENTRY_POINTS, QueueError, QueueURLError, open_queue, scheme_of

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that offers queues: one that works, one whose client is not installed, one with a name of ours."""
    about = tmp_path / "others-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Name: others\nVersion: 1.0\n")
    entries = "kafka = others:KafkaQueue\nbroken = others_broken:open_url\nembedded = others:KafkaQueue\n"
    (about / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\n{entries}")
    (tmp_path / "others.py").write_text(
        "class KafkaQueue:\n    def __init__(self, url, options):\n        self.url = url\n"
    )
    (tmp_path / "others_broken.py").write_text("import client_of_the_broken_queue\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ("torn = torn_queue:Nothing", "module 'torn_queue' has no attribute 'Nothing'"),
        ("torn = torn_queue_of_old:open_url", "cannot import name 'nothing' from 'os'"),
        ("torn = torn_queue_of_tomorrow:open_url", "invalid syntax"),
        ("torn = no path", "'NoneType' object has no attribute 'group'"),
    ],
)
def test_what_is_broken_in_another_package_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str, why: str
) -> None:
    """One line, not a traceback: it is not a defect of ours."""
    about = tmp_path / "torn-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Name: torn\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\n{entry}\n")
    (tmp_path / "torn_queue.py").touch()
    (tmp_path / "torn_queue_of_old.py").write_text("from os import nothing\n")
    (tmp_path / "torn_queue_of_tomorrow.py").write_text("def\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(QueueError, match=f"QUEUE_URL: the adapter for torn:// cannot be imported: {why}"):
        open_queue("torn://x")


def test_broken_metadata_of_another_package_is_no_matter_to_our_queues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is asked for what is ours."""
    about = tmp_path / "torn-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Name: torn\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\nno equals sign\n")
    monkeypatch.syspath_prepend(tmp_path)
    open_queue(f"embedded://{tmp_path}/queue.db").close()


def test_a_url_that_is_none_is_malformed_and_not_repeated() -> None:
    """Exit code 2; it may hold a secret."""
    with pytest.raises(QueueURLError, match="QUEUE_URL is malformed: expected a URL") as error:
        open_queue("sqs://user:secret@[")
    assert "secret" not in str(error.value)


@pytest.mark.usefixtures("site")
def test_a_class_of_another_package_is_found_by_its_entry_point() -> None:
    """Called with the URL and the worker's wishes, like a function."""
    assert vars(open_queue("kafka://broker/topic")) == {"url": "kafka://broker/topic"}


def test_a_name_of_ours_stays_ours(site: Path) -> None:
    """A package that is merely installed changes nothing about queues that work."""
    assert type(open_queue(f"embedded://{site}/queue.db")).__module__ == "adapters.embedded"


@pytest.mark.usefixtures("site")
def test_errors_name_what_is_offered_and_what_is_missing() -> None:
    """What another package lacks is not to be had by an extra of ours."""
    with pytest.raises(QueueURLError, match=r"expected one of .*kafka://.*; found rabbit"):
        open_queue("rabbit://x")
    with pytest.raises(QueueError) as error:
        open_queue("broken://x")
    assert str(error.value) == "QUEUE_URL: broken:// needs client_of_the_broken_queue, which is not installed"


@pytest.mark.parametrize(
    ("scheme", "module"), [("push", "uvicorn"), ("sqs", "boto3"), ("servicebus", "azure.identity")]
)
def test_a_missing_extra_is_named(scheme: str, module: str) -> None:
    """With the command that installs it."""
    code = f"import sys, adapters; sys.modules['{module}'] = None; adapters.open_queue('{scheme}://x')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.rstrip().endswith(
        f"QueueError: QUEUE_URL: {scheme}:// needs {module}, which is not installed: "
        f"pip install 'klaviyo-worker[{scheme}]'"
    )


def test_the_https_url_of_a_queue_is_sqs() -> None:
    """AWS shows it so."""
    assert scheme_of("https://sqs.eu-central-1.amazonaws.com/123456789012/orders") == "sqs"
    assert scheme_of("pubsub://project/subscription") == "pubsub"
    assert scheme_of("queue.db") == ""
