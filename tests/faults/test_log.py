"""What the worker says while everything goes wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

from tests.faults import scenarios
from tests.faults.harness import Scenario, Stage
from tests.rigs.embedded import Embedded
from worker.sandbox import Fault, Sandbox, sample_shop
from worker.sandbox.commercetools.api import CLIENT_SECRET
from worker.sandbox.klaviyo.api import KEY
from worker.sandbox.notifications import sample_notifications

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

QUOTED = "grete.hermannsdotter@mail.example of Invalidenstrasse, 030 901820"
_REFUSAL = {"status": 400, "code": "invalid", "title": "Invalid input.", "detail": f"{QUOTED} is not valid."}
_POINTED = {"errors": [_REFUSAL | {"source": {"pointer": "/data/attributes/email"}}]}
_COMMERCETOOLS = {"statusCode": 400, "message": QUOTED, "errors": [{"code": "InvalidInput", "message": QUOTED}]}
KLAVIYO = (
    scenarios.THROTTLED,
    scenarios.ERROR_503,
    scenarios.RESET,
    scenarios.CUT_OFF,
    scenarios.ANSWER_LOST,
    scenarios.HANGS,
    scenarios.CHALLENGE,
    scenarios.REFUSED_KEY,
    replace(scenarios.ERROR_500, body=QUOTED.encode()),
    Fault(status=400, times=5, body=json.dumps(_POINTED).encode()),
    Fault(status=409, times=5, match="POST /api/profile-import", body=json.dumps(_POINTED).encode()),
)
COMMERCETOOLS = (
    scenarios.ERROR_500,
    scenarios.CUT_OFF,
    scenarios.REFUSED_TOKEN,
    scenarios.REFUSED_KEY,
    Fault(status=400, times=5, body=json.dumps(_COMMERCETOOLS).encode()),
)
SAID = {401: "parked", 503: "outage"}  # by status, before the fault is mended
TORN = f'{{"notificationType": "Message", "order": {{"customerEmail": "{QUOTED}'.encode()


def test_the_log_of_a_full_fault_run_names_nobody(tmp_path: Path) -> None:
    """No email, phone number, name, street, key, secret or token at any level: neither as JSON nor as text."""
    scenario = Scenario("everything at once", _everything, refused=(2,), settings={"KLAVIYO_WORKER_LOG_LEVEL": "DEBUG"})
    with Sandbox(latency=0.01) as sandbox:
        stage = Stage(scenario, Embedded(None, tmp_path), sandbox, tmp_path, 150)
        try:
            _everything(stage)
            stage.finish()
        finally:
            stage.abandon()
        log = "\n".join(path.read_text() for path in stage.logs)
        said = "\n".join([log, *_decoded(log)]).lower()
        private = {*_people(sandbox), KEY, CLIENT_SECRET, *sandbox.commercetools_api._tokens}
    assert {text for text in private if text.lower() in said} == set()
    assert {"grete.hermannsdotter@mail.example", "customer-0@example.com", "invalidenstrasse"} <= {
        text.lower() for text in private
    }
    assert all(word in said for word in ("dead_lettered", "outcome=sent", "outage", "parked"))


def _everything(stage: Stage) -> None:
    """Let two workers meet every fault, one after the other, with samples of every message among the others."""
    stage.queue.publish([TORN, *(sample.body for sample in sample_notifications(sample_shop()))])
    stage.start()
    stage.start(KLAVIYO_WORKER_LOG_FORMAT="text")
    stage.all_up()
    for service, faults in (("klaviyo", KLAVIYO), ("commercetools", COMMERCETOOLS)):
        for fault in faults:
            stage.publish(0.06)
            stage.fail(service, fault)
            stage.until_met()
            stage.until_said(SAID.get(fault.status, ""))
            stage.wait(0.2)
            stage.mend(service)
    stage.publish()


def _people(sandbox: Sandbox) -> Iterator[str]:
    """Yield what belongs to a person, as commercetools has it and as Klaviyo got it."""
    yield from sandbox.shop.personal_data()
    for profile in sandbox.account.profiles:
        attributes = profile["attributes"]
        of_place = (attributes.get("location") or {}).get("address1")
        named = (attributes.get(name) for name in ("email", "phone_number", "first_name", "last_name", "organization"))
        yield from (text for text in (of_place, *named) if text and len(text) > 3)


def _decoded(log: str) -> Iterable[str]:
    """Return the fields of all JSON lines without JSON's escapes."""
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    return [str(value) for line in lines for value in line.values()]
