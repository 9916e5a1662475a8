"""The Lambda function, called in the same way as by Lambda."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import boto3
import pytest
from botocore.exceptions import ClientError

from adapters import QueueError
from adapters.sqs.lambda_event import LambdaQueue
from tests.acceptance.workload import Workload
from tests.conftest import Scripted
from worker import serverless
from worker.errors import SettingsError
from worker.sandbox import Fault, Sandbox
from worker.sandbox.envelopes import bare
from worker.sandbox.notifications import message
from worker.serverless import sqs_handler

if TYPE_CHECKING:
    from collections.abc import Iterator

RECORD = {
    "messageId": "message",
    "receiptHandle": "AQEB",
    "body": "{}",
    "attributes": {"ApproximateReceiveCount": "1", "SentTimestamp": "1764201600000"},
    "messageAttributes": {"colour": {"stringValue": "blue", "dataType": "String"}},
    "eventSource": "aws:sqs",
    "eventSourceARN": "arn:aws:sqs:eu-central-1:123456789012:orders",
    "awsRegion": "eu-central-1",
}


@dataclass
class Context:
    """A fake of Lambda's context object."""

    seconds: float = 30.0

    def get_remaining_time_in_millis(self) -> int:
        return round(self.seconds * 1000)


@pytest.fixture(autouse=True)
def environment(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in sandbox.environment.items():
        monkeypatch.setenv(name, value)
    configured = Scripted()
    monkeypatch.setattr(
        serverless, "configure_logging", configured
    )  # otherwise its effect would remain for other tests
    serverless._warm_state.cache_clear()
    yield
    serverless._warm_state().components.close()
    assert ("INFO", "auto") in configured.calls
    serverless._warm_state.cache_clear()


def event_of(*bodies: bytes) -> dict[str, Any]:
    """Return an event in the format that AWS documents, with the fields that the worker reads."""
    return {
        "Records": [
            {**RECORD, "messageId": f"message-{number}", "body": body.decode()} for number, body in enumerate(bodies)
        ]
    }


def failed(response: dict[str, Any]) -> list[str]:
    return [entry["itemIdentifier"] for entry in response["batchItemFailures"]]


def test_only_failed_messages_of_a_batch_are_returned(sandbox: Sandbox) -> None:
    """Unreadable messages are left to the redrive policy. The others are processed."""
    workload = Workload(sandbox, 100)
    response = sqs_handler(event_of(*workload.bodies, b'{"torn', b""), Context())
    assert failed(response) == ["message-100", "message-101"]
    assert json.loads(json.dumps(response)) == response
    workload.assert_exactly_once()


def test_messages_of_another_project_are_ignored(sandbox: Sandbox) -> None:
    """They are acknowledged: another attempt would not help."""
    order = {"id": "o", "customerEmail": "ada@mail.example"}
    foreign = message("OrderCreated", "order", "o", order=order) | {"projectKey": "another-shop"}
    assert sqs_handler(event_of(bare(foreign)), Context()) == {"batchItemFailures": []}
    assert sandbox.account.events == []


def test_duplicate_event_has_no_further_effect(sandbox: Sandbox) -> None:
    """Lambda delivers at least once. Connections and tokens are kept between invocations."""
    workload = Workload(sandbox, 40)
    for _ in range(2):
        assert sqs_handler(event_of(*workload.bodies), Context()) == {"batchItemFailures": []}
        timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
        assert all(timer.finished.is_set() for timer in timers)  # a running timer would end the next invocation
    workload.assert_exactly_once()
    tokens = [request for request in sandbox.commercetools.requests if "oauth" in str(request)]
    assert len(tokens) == 1


def test_held_messages_are_returned_before_the_timeout_of_the_function(sandbox: Sandbox) -> None:
    """If Lambda ended the function, SQS would redeliver the whole batch. The next invocation processes the rest."""
    workload = Workload(sandbox, 20)
    sandbox.klaviyo.faults.add(Fault(status=503, times=None))
    started_at = time.monotonic()
    response = sqs_handler(event_of(*workload.bodies), Context(7.0))
    assert time.monotonic() - started_at < 7.0
    assert len(failed(response)) > 15
    sandbox.klaviyo.faults.clear()
    assert failed(sqs_handler(event_of(*workload.bodies), Context())) == []
    workload.assert_exactly_once()


def test_hanging_call_does_not_exceed_the_timeout_of_the_function(sandbox: Sandbox) -> None:
    """If Lambda ended the function, SQS would redeliver processed messages too."""
    workload = Workload(sandbox, 5)
    sandbox.klaviyo.faults.add(Fault(action="hang", seconds=20, times=None))
    context = Context(6.0)
    started_at = time.monotonic()
    assert failed(sqs_handler(event_of(*workload.bodies), context))
    assert time.monotonic() - started_at < context.seconds
    sandbox.klaviyo.faults.clear()


def test_runner_does_not_spin_while_messages_are_in_progress(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """The messages in progress need the CPU share of the function."""
    received = Scripted()
    receive = LambdaQueue.receive
    monkeypatch.setattr(LambdaQueue, "receive", lambda self, *how: (received(), receive(self, *how))[1])
    sandbox.klaviyo.latency = 0.5
    workload = Workload(sandbox, 5)
    assert failed(sqs_handler(event_of(*workload.bodies), Context())) == []
    assert len(received.calls) < 1000


def test_refused_key_returns_all_messages(sandbox: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    """The log has the reason."""
    workload = Workload(sandbox, 20)
    sandbox.klaviyo.faults.add(Fault(status=401, times=None))
    response = sqs_handler(event_of(*workload.bodies), Context())
    assert len(failed(response)) > 15
    (record,) = [record for record in caplog.records if record.message == "batch_incomplete"]
    assert "KLAVIYO_AUTH_KEY" in vars(record)["reason"]
    sandbox.klaviyo.faults.clear()
    assert failed(sqs_handler(event_of(*workload.bodies), Context())) == []


@pytest.mark.parametrize(
    "event", [{}, {"Records": [{"Sns": {}}]}, {"Records": None}, {"Records": [{**RECORD, "body": None}]}]
)
def test_event_of_another_source_is_an_error(event: dict[str, Any]) -> None:
    """The Lambda console can send such a test event. The error text says what was expected."""
    with pytest.raises(QueueError, match="expected the event of an SQS event source"):
        sqs_handler(event, Context())


def test_too_short_timeout_of_the_function_is_an_error() -> None:
    """With Lambda's default of 3 s, all messages would be returned until SQS dead-letters them without a reason."""
    with pytest.raises(SettingsError, match="Timeout: the function has 3 s, expected more than 5: set 60"):
        sqs_handler(event_of(b"{}"), Context(3.0))


def test_time_of_a_cold_start_reduces_the_time_for_messages(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages in progress are still returned before the timeout of the function."""
    context = Context(30.0)
    configure = vars(serverless)["configure_logging"]

    def slowly(level: str, style: str) -> None:
        context.seconds = 6.0
        configure(level, style)

    monkeypatch.setattr(serverless, "configure_logging", slowly)
    workload = Workload(sandbox, 20)
    sandbox.klaviyo.faults.add(Fault(status=503, times=None))
    started_at = time.monotonic()
    assert len(failed(sqs_handler(event_of(*workload.bodies), context))) > 15
    assert time.monotonic() - started_at < 6.0


def test_missing_setting_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The invocation fails, so SQS redelivers the whole batch."""
    with monkeypatch.context() as without:
        without.delenv("KLAVIYO_AUTH_KEY")
        with pytest.raises(SettingsError, match="KLAVIYO_AUTH_KEY is missing"):
            sqs_handler(event_of(b"{}"), Context())


class FakeSecretsManager:
    """A fake of AWS Secrets Manager that has the secrets of the sandbox."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.secrets: dict[str, Any] = {
            "shop/ct": {"SecretString": sandbox.environment["CT_API_CLIENT"] + "\n"},
            "shop/klaviyo": {"SecretString": "pk_old"},
            "shop/binary": {"SecretBinary": b"x"},
        }

    def client(self, service: str) -> FakeSecretsManager:
        assert service == "secretsmanager"
        return self

    def get_secret_value(self, **parameters: str) -> Any:
        (name,) = parameters.values()
        if name not in self.secrets:
            raise ClientError({"Error": {"Code": "AccessDeniedException"}}, "GetSecretValue")
        return self.secrets[name]


@pytest.fixture
def secrets_manager(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> FakeSecretsManager:
    fake = FakeSecretsManager(sandbox)
    monkeypatch.setattr(boto3, "client", fake.client)
    return fake


def test_secrets_come_from_secrets_manager(
    sandbox: Sandbox, secrets_manager: FakeSecretsManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refused secret is read again by the next invocation, so that a replaced key needs no deployment."""
    workload = Workload(sandbox, 10)
    key = sandbox.environment["KLAVIYO_AUTH_KEY"]
    for name, secret in (("CT_API_CLIENT", "shop/ct"), ("KLAVIYO_AUTH_KEY", "shop/klaviyo")):
        monkeypatch.delenv(name)
        monkeypatch.setenv(f"{name}_SECRET", secret)
    assert failed(sqs_handler(event_of(*workload.bodies), Context()))
    secrets_manager.secrets["shop/klaviyo"]["SecretString"] = key
    assert failed(sqs_handler(event_of(*workload.bodies), Context())) == []
    workload.assert_exactly_once()


@pytest.mark.parametrize(
    ("secret", "reason"),
    [
        ("shop/other", r"cannot read the secret \(AccessDeniedException\): allow"),
        ("shop/binary", "the secret is binary"),
    ],
)
@pytest.mark.usefixtures("secrets_manager")
def test_unreadable_secret_is_named(secret: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what the role needs."""
    with monkeypatch.context() as context:
        context.setenv("KLAVIYO_AUTH_KEY_SECRET", secret)
        with pytest.raises(SettingsError, match=f"^KLAVIYO_AUTH_KEY_SECRET: {reason}"):
            sqs_handler(event_of(b"{}"), Context())
