"""How a URL selects its adapter: a built-in one, or one of another package."""

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
    """A package with three adapters: a good one, one whose client is missing, and one with a built-in scheme."""
    metadata = tmp_path / "others-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: others\nVersion: 1.0\n")
    entries = "kafka = others:KafkaQueue\nbroken = others_broken:open_url\nembedded = others:KafkaQueue\n"
    (metadata / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\n{entries}")
    (tmp_path / "others.py").write_text(
        "class KafkaQueue:\n    def __init__(self, url, options):\n        self.url = url\n"
    )
    (tmp_path / "others_broken.py").write_text("import client_of_the_broken_queue\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("torn = torn_queue:Nothing", "module 'torn_queue' has no attribute 'Nothing'"),
        ("torn = torn_queue_of_old:open_url", "cannot import name 'nothing' from 'os'"),
        ("torn = torn_queue_of_tomorrow:open_url", "invalid syntax"),
        ("torn = no path", "'NoneType' object has no attribute 'group'"),
    ],
)
def test_broken_package_is_reported_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str, reason: str
) -> None:
    """No traceback is printed, because the worker is not at fault."""
    metadata = tmp_path / "torn-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: torn\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\n{entry}\n")
    (tmp_path / "torn_queue.py").touch()
    (tmp_path / "torn_queue_of_old.py").write_text("from os import nothing\n")
    (tmp_path / "torn_queue_of_tomorrow.py").write_text("def\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(QueueError, match=f"QUEUE_URL: the adapter for torn:// cannot be imported: {reason}"):
        open_queue("torn://x")


def test_broken_metadata_of_another_package_does_not_affect_built_in_queues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built-in adapters are found without entry points."""
    metadata = tmp_path / "torn-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: torn\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\nno equals sign\n")
    monkeypatch.syspath_prepend(tmp_path)
    open_queue(f"embedded://{tmp_path}/queue.db").close()


def test_malformed_url_is_rejected_and_not_quoted() -> None:
    """The exit code is 2. The URL can contain a secret."""
    with pytest.raises(QueueURLError, match="QUEUE_URL is malformed: expected a URL") as error:
        open_queue("sqs://user:secret@[")
    assert "secret" not in str(error.value)


@pytest.mark.usefixtures("site")
def test_class_of_another_package_is_found_by_its_entry_point() -> None:
    """The class is called with the URL and the options, as a function would be."""
    assert vars(open_queue("kafka://broker/topic")) == {"url": "kafka://broker/topic"}


def test_built_in_scheme_cannot_be_replaced(site: Path) -> None:
    """Installing a package does not affect queues that work."""
    assert type(open_queue(f"embedded://{site}/queue.db")).__module__ == "adapters.embedded.queue"


@pytest.mark.usefixtures("site")
def test_errors_name_known_schemes_and_missing_modules() -> None:
    """The worker's extras do not install the client of another package's adapter."""
    with pytest.raises(QueueURLError, match=r"expected one of .*kafka://.*; found rabbit"):
        open_queue("rabbit://x")
    with pytest.raises(QueueError) as error:
        open_queue("broken://x")
    assert str(error.value) == "QUEUE_URL: broken:// needs client_of_the_broken_queue, which is not installed"


@pytest.mark.parametrize(
    ("scheme", "module"), [("push", "uvicorn"), ("sqs", "boto3"), ("servicebus", "azure.identity")]
)
def test_missing_extra_is_named(scheme: str, module: str) -> None:
    """The error has the command that installs it."""
    code = f"import sys, adapters; sys.modules['{module}'] = None; adapters.open_queue('{scheme}://x')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.rstrip().endswith(
        f"QueueError: QUEUE_URL: {scheme}:// needs {module}, which is not installed: "
        f"pip install 'klaviyo-worker[{scheme}]'"
    )


def test_https_url_selects_sqs() -> None:
    """AWS shows it in this form."""
    assert scheme_of("https://sqs.eu-central-1.amazonaws.com/123456789012/orders") == "sqs"
    assert scheme_of("pubsub://project/subscription") == "pubsub"
    assert scheme_of("queue.db") == ""
