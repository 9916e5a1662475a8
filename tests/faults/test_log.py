"""The log during a run with all faults."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

from tests.faults import scenarios
from tests.faults.harness import Scenario, ScenarioDriver
from tests.rigs.embedded import Embedded
from worker.sandbox import Fault, Sandbox, sample_shop
from worker.sandbox.commercetools.api import CLIENT_SECRET
from worker.sandbox.klaviyo.api import KEY
from worker.sandbox.samples import sample_notifications

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

PERSONAL_DATA = "grete.hermannsdotter@mail.example of Invalidenstrasse, 030 901820"
_REJECTION = {"status": 400, "code": "invalid", "title": "Invalid input.", "detail": f"{PERSONAL_DATA} is not valid."}
_REJECTION_WITH_POINTER = {"errors": [_REJECTION | {"source": {"pointer": "/data/attributes/email"}}]}
_COMMERCETOOLS = {
    "statusCode": 400,
    "message": PERSONAL_DATA,
    "errors": [{"code": "InvalidInput", "message": PERSONAL_DATA}],
}
KLAVIYO = (
    scenarios.THROTTLED,
    scenarios.ERROR_503,
    scenarios.RESET,
    scenarios.CUT_OFF,
    scenarios.ANSWER_LOST,
    scenarios.HANGS,
    scenarios.CHALLENGE,
    scenarios.REJECTED_KEY,
    replace(scenarios.ERROR_500, body=PERSONAL_DATA.encode()),
    Fault(status=400, times=5, body=json.dumps(_REJECTION_WITH_POINTER).encode()),
    Fault(status=409, times=5, match="POST /api/profiles", body=json.dumps(_REJECTION_WITH_POINTER).encode()),
)
COMMERCETOOLS = (
    scenarios.ERROR_500,
    scenarios.CUT_OFF,
    scenarios.REJECTED_TOKEN,
    scenarios.REJECTED_KEY,
    Fault(status=400, times=5, body=json.dumps(_COMMERCETOOLS).encode()),
)
LOG_EVENTS = {401: "parked", 503: "outage"}  # by status of the fault
TRUNCATED_MESSAGE = f'{{"notificationType": "Message", "order": {{"customerEmail": "{PERSONAL_DATA}'.encode()


def test_log_contains_no_personal_data_and_no_secrets(tmp_path: Path) -> None:
    """This holds at every level, in JSON and in text."""
    scenario = Scenario(
        "everything at once", _everything, rejected_orders=(2,), settings={"KLAVIYO_WORKER_LOG_LEVEL": "DEBUG"}
    )
    with Sandbox(latency=0.01) as sandbox:
        driver = ScenarioDriver(scenario, Embedded(None, tmp_path), sandbox, tmp_path, 150)
        try:
            _everything(driver)
            driver.finish()
        finally:
            driver.clean_up()
        log = "\n".join(path.read_text() for path in driver.logs)
        text_of_logs = "\n".join([log, *_decoded(log)]).lower()
        private = {*_people(sandbox), KEY, CLIENT_SECRET, *sandbox.commercetools_api._tokens}
    assert {text for text in private if text.lower() in text_of_logs} == set()
    assert {"grete.hermannsdotter@mail.example", "customer-0@example.com", "invalidenstrasse"} <= {
        text.lower() for text in private
    }
    assert all(word in text_of_logs for word in ("dead_lettered", "outcome=sent", "outage", "parked"))


def _everything(driver: ScenarioDriver) -> None:
    """Run two workers through every fault, one after the other, with a sample of every message type."""
    driver.queue.publish([TRUNCATED_MESSAGE, *(sample.body for sample in sample_notifications(sample_shop()))])
    driver.start()
    driver.start(KLAVIYO_WORKER_LOG_FORMAT="text")
    driver.wait_until_started()
    for service, faults in (("klaviyo", KLAVIYO), ("commercetools", COMMERCETOOLS)):
        for fault in faults:
            driver.publish(0.06)
            driver.fail(service, fault)
            driver.wait_until_fault_met()
            driver.wait_for_log(LOG_EVENTS.get(fault.status, ""))
            driver.wait(0.2)
            driver.restore(service)
    driver.publish()


def _people(sandbox: Sandbox) -> Iterator[str]:
    """Yield all personal data in commercetools and Klaviyo."""
    yield from sandbox.shop.personal_data()
    for profile in sandbox.account.profiles:
        attributes = profile["attributes"]
        address = (attributes.get("location") or {}).get("address1")
        values = (attributes.get(name) for name in ("email", "phone_number", "first_name", "last_name", "organization"))
        yield from (text for text in (address, *values) if text and len(text) > 3)


def _decoded(log: str) -> Iterable[str]:
    """Return the values of all JSON lines, decoded."""
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    return [str(value) for line in lines for value in line.values()]
