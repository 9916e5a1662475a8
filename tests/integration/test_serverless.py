"""The Lambda function, called as Lambda calls it."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from adapters import QueueError
from adapters.sqs.lambda_event import LambdaQueue
from tests.acceptance.workload import Workload
from tests.conftest import Scripted
from worker import serverless
from worker.errors import SettingsError
from worker.sandbox import Fault, Sandbox
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
    """What Lambda tells of an invocation."""

    seconds: float = 30.0

    def get_remaining_time_in_millis(self) -> int:
        return round(self.seconds * 1000)


@pytest.fixture(autouse=True)
def environment(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in sandbox.environment.items():
        monkeypatch.setenv(name, value)
    configured = Scripted()
    monkeypatch.setattr(serverless, "configure_logging", configured)  # for good, which other tests would notice
    serverless._warm_state.cache_clear()
    yield
    serverless._warm_state().components.sender.close()
    assert ("INFO", "auto") in configured.calls
    serverless._warm_state.cache_clear()


def event_of(*bodies: bytes) -> dict[str, Any]:
    """Return an event as AWS documents it, with the fields that matter here."""
    return {
        "Records": [
            {**RECORD, "messageId": f"message-{number}", "body": body.decode()} for number, body in enumerate(bodies)
        ]
    }


def failed(answer: dict[str, Any]) -> list[str]:
    return [entry["itemIdentifier"] for entry in answer["batchItemFailures"]]


def test_a_batch_has_its_effects_and_only_what_failed_comes_again(sandbox: Sandbox) -> None:
    """Poison is left to the redrive policy; its neighbours are done."""
    workload = Workload(sandbox, 100)
    answer = sqs_handler(event_of(*workload.bodies, b'{"torn', b""), Context())
    assert failed(answer) == ["message-100", "message-101"]
    assert json.loads(json.dumps(answer)) == answer
    workload.assert_exactly_once()


def test_an_event_that_comes_twice_adds_nothing(sandbox: Sandbox) -> None:
    """Lambda promises at least once; connections and tokens stay from one invocation to the next."""
    workload = Workload(sandbox, 40)
    for _ in range(2):
        assert sqs_handler(event_of(*workload.bodies), Context()) == {"batchItemFailures": []}
        timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
        assert all(timer.finished.is_set() for timer in timers)  # or it would end the next invocation
    workload.assert_exactly_once()
    tokens = [request for request in sandbox.commercetools.requests if "oauth" in str(request)]
    assert len(tokens) == 1


def test_what_an_outage_holds_up_is_given_back_in_time(sandbox: Sandbox) -> None:
    """Before Lambda ends the function, which would bring everything again; the next invocation does it."""
    workload = Workload(sandbox, 20)
    sandbox.klaviyo.faults.add(Fault(status=503, times=None))
    began = time.monotonic()
    answer = sqs_handler(event_of(*workload.bodies), Context(7.0))
    assert time.monotonic() - began < 7.0
    assert len(failed(answer)) > 15
    sandbox.klaviyo.faults.clear()
    assert failed(sqs_handler(event_of(*workload.bodies), Context())) == []
    workload.assert_exactly_once()


def test_a_call_that_hangs_is_not_waited_for(sandbox: Sandbox) -> None:
    """Lambda would end the function, and bring what is done again too."""
    workload = Workload(sandbox, 5)
    sandbox.klaviyo.faults.add(Fault(action="hang", seconds=20, times=None))
    context = Context(6.0)
    began = time.monotonic()
    assert failed(sqs_handler(event_of(*workload.bodies), context))
    assert time.monotonic() - began < context.seconds
    sandbox.klaviyo.faults.clear()


def test_work_is_waited_for_and_not_asked_about(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """The function has a share of a CPU, which the work needs; nothing more will come."""
    asked = Scripted()
    receive = LambdaQueue.receive
    monkeypatch.setattr(LambdaQueue, "receive", lambda self, *how: (asked(), receive(self, *how))[1])
    sandbox.klaviyo.latency = 0.5
    workload = Workload(sandbox, 5)
    assert failed(sqs_handler(event_of(*workload.bodies), Context())) == []
    assert len(asked.calls) < 1000


def test_a_refused_key_loses_nothing(sandbox: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    """Everything comes again, and the log says why."""
    workload = Workload(sandbox, 20)
    sandbox.klaviyo.faults.add(Fault(status=401, times=None))
    answer = sqs_handler(event_of(*workload.bodies), Context())
    assert len(failed(answer)) > 15
    (record,) = [record for record in caplog.records if record.message == "batch_incomplete"]
    assert "KLAVIYO_AUTH_KEY" in vars(record)["reason"]
    sandbox.klaviyo.faults.clear()
    assert failed(sqs_handler(event_of(*workload.bodies), Context())) == []


@pytest.mark.parametrize(
    "event", [{}, {"Records": [{"Sns": {}}]}, {"Records": None}, {"Records": [{**RECORD, "body": None}]}]
)
def test_another_event_is_an_error_that_says_what_was_expected(event: dict[str, Any]) -> None:
    """By hand, from a test console, from another source."""
    with pytest.raises(QueueError, match="expected the event of an SQS event source"):
        sqs_handler(event, Context())


def test_a_timeout_that_leaves_no_time_to_work_is_named() -> None:
    """Lambda's default is 3 s; messages that are merely given back end in the dead letters, and no log says why."""
    with pytest.raises(SettingsError, match="Timeout: the function has 3 s, expected more than 5: set 60"):
        sqs_handler(event_of(b"{}"), Context(3.0))


def test_the_time_that_a_cold_start_takes_is_not_there_for_work(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in work then is given back in time nevertheless."""
    context = Context(30.0)
    configure = vars(serverless)["configure_logging"]

    def slowly(level: str, style: str) -> None:
        context.seconds = 6.0
        configure(level, style)

    monkeypatch.setattr(serverless, "configure_logging", slowly)
    workload = Workload(sandbox, 20)
    sandbox.klaviyo.faults.add(Fault(status=503, times=None))
    began = time.monotonic()
    assert len(failed(sqs_handler(event_of(*workload.bodies), context))) > 15
    assert time.monotonic() - began < 6.0


def test_a_missing_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The invocation fails, so all messages come again."""
    with monkeypatch.context() as without:
        without.delenv("KLAVIYO_AUTH_KEY")
        with pytest.raises(SettingsError, match="KLAVIYO_AUTH_KEY is missing"):
            sqs_handler(event_of(b"{}"), Context())
