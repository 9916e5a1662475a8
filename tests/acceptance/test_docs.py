"""The commands in the documentation, executed."""

from __future__ import annotations

import json
import os
import re
import subprocess
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import ZipFile

from adapters import QueueOptions, SupportsPublish, open_queue
from adapters.servicebus.queue import check_connection_string, parse_url
from tests.support import sqs_fakes as sqs
from tests.support.installed import COMMAND
from tests.support.pubsub_emulator import Emulator
from tests.support.requirements import require_command

if TYPE_CHECKING:
    import pytest

DOCS = Path(__file__).parents[2] / "docs"
PATH = {"PATH": f"{COMMAND.parent}{os.pathsep}{os.environ['PATH']}"}  # with klaviyo-worker
_MARKED = re.compile(r"<!-- run by tests/acceptance/test_docs.py -->\n```console\n(.*?)```", re.DOTALL)


def test_gcloud_commands_work(tmp_path: Path) -> None:
    """They run on the emulator, with the variables of the page."""
    emulator = Emulator()
    environment = os.environ | {
        "CLOUDSDK_API_ENDPOINT_OVERRIDES_PUBSUB": f"http://{emulator.host}/",
        "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true",
        "CLOUDSDK_CORE_PROJECT": "demo",
        "CLOUDSDK_CONFIG": str(tmp_path),
        "URL": "https://worker.example.com",
        "PUSHER": "klaviyo-worker-pusher@demo.iam.gserviceaccount.com",
        "PUBSUB_EMULATOR_HOST": emulator.host,
    }
    create, list_dead_letters = _marked("pubsub.md")
    (push,) = _marked("serverless.md")
    attributes = "reason=because,stage=parse,message_id=1,attempt=1"
    publish = f"gcloud pubsub topics publish klaviyo-worker-dead --message=poison --attribute={attributes}"
    try:
        for command in [*_commands(create), *_commands(push), publish]:
            _run(command, environment)
        assert "unreadable  [parse] because\n" in _run(_commands(list_dead_letters)[0], environment)
    finally:
        emulator.kill()


def test_shell_completion_works() -> None:
    """The line for bash in the documentation enables completion of options."""
    line = re.search(r"\| bash.*?\| `(.*?)` \|", (DOCS / "commands.md").read_text(encoding="utf-8"))
    assert line
    words = "COMP_WORDS=(klaviyo-worker transform --ex) COMP_CWORD=2"
    completion = f"{words}; _klaviyo_worker_completion klaviyo-worker; echo $COMPREPLY"
    assert _run(f"{line[1]}\n{completion}", dict(os.environ)) == "--explain\n"


def test_the_readme_shows_lines_of_the_demo() -> None:
    """Its sample of the demo's output is real; `...` replaces the lines between."""
    (sample,) = re.findall(r"```text\n(.*?)```", (DOCS.parent / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    shown = _run("klaviyo-worker demo", dict(os.environ)).splitlines()
    assert set(sample.splitlines()) - {"..."} <= set(shown)


def test_aws_commands_work(moto: sqs.Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The queue that they create causes no warnings, not even in direct mode.

    The function is created last, because moto calls it as soon as it exists. Its package is a fake.
    """
    require_command("aws")
    for name, value in sqs.environment(moto.port).items():
        monkeypatch.setenv(name, value)
    create, permit, list_dead_letters, function = ("\n".join(_commands(block)) for block in _marked("sqs.md"))
    send = (
        "aws sqs send-message --queue-url $DEAD --message-body poison --message-attributes "
        "'reason={DataType=String,StringValue=because},stage={DataType=String,StringValue=parse},"
        "message_id={DataType=String,StringValue=1},attempt={DataType=String,StringValue=1}'"
    )
    alias = 'aws() { command aws --endpoint-url $AWS_ENDPOINT_URL_SQS "$@"; }'  # version 1 ignores the variable
    shown = _run(
        f"set -e\n{alias}\n{create}\n{permit}\n{send}\n{list_dead_letters}\necho $QUEUE $QUEUE_ARN $DEAD_ARN",
        dict(os.environ),
    )
    dead, names = shown.splitlines()[-2:]
    assert dead.endswith("unreadable  [parse] because")
    url, arn, dead_arn = names.split()
    with closing(open_queue("sqs://klaviyo-worker", QueueOptions(direct_dead_letter=True))) as queue:
        assert queue.check() == []
        assert isinstance(queue, SupportsPublish)
        assert queue.publish([b"{}"]) == 1
    checkout = tmp_path / "checkout"
    (checkout / "build").mkdir(parents=True)
    (tmp_path / "environment.json").write_text('{"Variables": {}}', encoding="utf-8")
    for name in ("ct-api-client.json", "klaviyo-auth-key.txt"):
        (tmp_path / name).write_text("secret", encoding="utf-8")
    with ZipFile(checkout / "build" / "lambda.zip", "w") as package:
        package.writestr("worker.py", "")
    environment = os.environ | {"QUEUE": url, "QUEUE_ARN": arn, "DEAD_ARN": dead_arn, "BUCKET": "artifacts"}
    made = _run(f"set -e\n{alias}\naws s3 mb s3://$BUCKET\n{function}", environment, checkout)
    assert '"ReportBatchItemFailures"' in made


def test_service_bus_names_are_consistent() -> None:
    """Commercetools sends to the queue that the worker receives from."""
    page = (DOCS / "servicebus.md").read_text(encoding="utf-8")
    subscription, run = re.findall(r"<!-- checked by [^>]*>\n```\w+\n(.*?)```", page, re.DOTALL)
    destination = json.loads(subscription)["destination"]
    url = run.partition("QUEUE_URL=")[2].splitlines()[0]
    entity = parse_url(url)
    check_connection_string(destination["connectionString"], entity)
    assert f"--namespace-name {entity.host.partition('.')[0]} --name {entity.name} " in page
    emulator = re.findall(r"export (?:QUEUE_URL|SERVICEBUS_CONNECTION_STRING)='?([^'\n]+)", page.partition("## 6.")[2])
    check_connection_string(emulator[1], parse_url(emulator[0]))


def _marked(page: str) -> list[str]:
    return _MARKED.findall((DOCS / page).read_text(encoding="utf-8"))


def _commands(block: str) -> list[str]:
    return [line.removeprefix("$ ") for line in block.splitlines()]


def _run(command: str, environment: dict[str, str], directory: Path | None = None) -> str:
    done = subprocess.run(
        ["bash", "-c", command], env=environment | PATH, cwd=directory, capture_output=True, timeout=240, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stderr.decode()}"
    return done.stdout.decode()
