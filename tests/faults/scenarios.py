"""Fault scenarios, and random mixtures of faults."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import orjson

from tests.faults.harness import Scenario
from worker.sandbox import Fault

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.faults.harness import ScenarioDriver

HANG_SECONDS = 4.0  # seconds; longer than any read timeout in this module
_HTML_PAGE = b"<!DOCTYPE html><title>Just a moment...</title>"
_EMBEDDED = ("embedded",)
_HTML_HEADERS = {"Content-Type": "text/html"}
_permanent_fault = partial(Fault, times=None)
_CT_API = "GET /sandbox-shop/"  # commercetools' API without its token endpoint

THROTTLED = _permanent_fault(status=429, headers={"Retry-After": "1"}, probability=0.5)
ERROR_500, ERROR_503, ERROR_524 = (_permanent_fault(status=status) for status in (500, 503, 524))
CUT_OFF = _permanent_fault(action="truncate", probability=0.4)
ANSWER_LOST = _permanent_fault(action="lose_response", probability=0.4)
RESET = _permanent_fault(action="reset", probability=0.4)
HANGS = _permanent_fault(action="hang", seconds=HANG_SECONDS)
SLOW = _permanent_fault(action="slow", seconds=0.3)
CHALLENGE = _permanent_fault(status=403, body=_HTML_PAGE, headers=_HTML_HEADERS)
PAGES = tuple(
    _permanent_fault(status=status, body=body, headers=headers)
    for status in (200, 400, 403, 404, 413)
    for body, headers in ((_HTML_PAGE, _HTML_HEADERS), (b'{"message":"Forbidden"}', {}))
)
ODD_SUCCESSES = tuple(
    _permanent_fault(status=200, body=body)
    for body in (b"", b'{"status":"ok"}', b'{"data":null}', b'{"results":null}', b"[]")
)
REJECTED_KEY = _permanent_fault(status=401)
REJECTED_TOKEN = _permanent_fault(status=401, match=_CT_API)
_LETHAL = _permanent_fault(action="hang", seconds=HANG_SECONDS, contains=b'"order-7"')
_SHORT_TIMEOUT = {"KLAVIYO_WORKER_READ_TIMEOUT": "0.5"}
_FEW_REQUESTS = {"KLAVIYO_WORKER_MAX_REQUESTS": "2"}
# Google's emulator ignores flow control. Messages that a stopped worker has not read stay leased for a minute.
_LARGE_IN_FLIGHT = {"KLAVIYO_WORKER_MAX_IN_FLIGHT": "500"}
# One lane and a low threshold, so that profiles and the catalog are sent in bulk jobs, as from a long backlog.
_BULK_JOBS = {"KLAVIYO_WORKER_LANES": "1", "KLAVIYO_WORKER_BULK_THRESHOLD": "2"}
_JOB_SECONDS = 0.3
_SHARED_QUEUE = _FEW_REQUESTS | {"KLAVIYO_WORKER_MAX_IN_FLIGHT": "10", "KLAVIYO_WORKER_MAX_BATCH": "5"}


def outage(*services: str, faults: tuple[Fault, ...] = (), seconds: float = 2.0) -> Callable[[ScenarioDriver], None]:
    """Return a script in which services fail during processing and then work again.

    Without faults, they refuse connections.
    """

    def script(driver: ScenarioDriver) -> None:
        driver.publish(0.4)
        driver.start()
        driver.wait_for_requests(services[0])
        for service in services:
            driver.fail(service, *faults)
        driver.publish()
        if faults:
            driver.wait_until_fault_met()
        driver.wait(seconds)
        for service in services:
            driver.restore(service)

    return script


def no_faults(driver: ScenarioDriver) -> None:
    """Run without any fault."""
    driver.publish()
    driver.start()


def _responses_of_others(service: str, faults: Sequence[Fault], driver: ScenarioDriver) -> None:
    """Let something else answer in place of a service, with one response after the other."""
    driver.publish(0.3)
    driver.start()
    driver.wait_for_requests(service)
    for fault in faults:
        driver.fail(service, fault)
        driver.publish(0.6 / len(faults))
        driver.wait_until_fault_met()
        driver.wait(0.2)
        driver.restore(service)


def _two_outages(driver: ScenarioDriver) -> None:
    driver.publish(0.3)
    driver.start()
    for share in (0.3, 0.4):
        driver.wait_for_requests(requests=1)
        driver.fail("klaviyo")
        driver.publish(share)
        driver.wait(1.0)
        driver.restore("klaviyo")


def _expiring_tokens(driver: ScenarioDriver) -> None:
    driver.start()
    for _ in range(4):
        driver.publish(0.25)
        driver.wait(1.2)


def _revoked_tokens(driver: ScenarioDriver) -> None:
    driver.start()
    for _ in range(4):
        driver.publish(0.25)
        driver.wait_for_requests("commercetools", 1)
        driver.sandbox.commercetools_api.revoke_tokens()


def _not_readable_yet(driver: ScenarioDriver) -> None:
    for order in driver.workload.fetched:
        del driver.sandbox.shop.orders[order]
    driver.publish()
    driver.start()
    driver.wait_for_requests("commercetools", 1)
    driver.wait(0.5)
    driver.sandbox.shop.orders.update(driver.workload.fetched)


def _killed(driver: ScenarioDriver) -> None:
    driver.publish()
    driver.start()
    for _ in range(3):
        driver.wait_for_requests(requests=1)
        driver.wait(driver.random.uniform(0, 0.5))
        driver.kill()
        driver.start()


def _killed_in_an_outage(driver: ScenarioDriver) -> None:
    driver.publish()
    driver.start()
    driver.wait_for_requests()
    driver.fail("klaviyo", ERROR_503)
    driver.wait(1.0)
    driver.kill()
    driver.start()
    driver.wait(1.5)
    driver.restore("klaviyo")


def _terminated(driver: ScenarioDriver) -> None:
    driver.publish()
    driver.start()
    for _ in range(2):
        driver.wait_for_requests(requests=1)
        driver.wait(driver.random.uniform(0, 0.3))
        driver.terminate()
        driver.start()


def _terminated_in_an_outage(driver: ScenarioDriver) -> None:
    driver.publish()
    driver.start()
    driver.wait_for_requests()
    driver.fail("klaviyo", ERROR_503)
    driver.wait(1.0)
    driver.terminate()
    driver.start()
    driver.wait(1.5)
    driver.restore("klaviyo")


def _two_workers(driver: ScenarioDriver) -> None:
    driver.start()
    driver.start()
    driver.wait_until_started()
    for _ in range(4):
        driver.publish(0.25)
        driver.wait_for_requests(requests=2)


def _one_of_two_killed(driver: ScenarioDriver) -> None:
    driver.start()
    driver.start()
    driver.wait_until_started()
    driver.publish(0.5)
    driver.wait_for_requests()
    driver.publish()
    driver.kill()


def _ending_its_workers(driver: ScenarioDriver) -> None:
    driver.publish()
    for _ in range(3):
        driver.fail("klaviyo", _LETHAL)
        driver.start()
        driver.wait_until_fault_met()
        driver.kill()
        driver.restore("klaviyo")
    driver.start()


def _bomb(name: str, lines: list[dict[str, str]], kind: str = "OrderCreated") -> bytes:
    order = {"id": name, "customerEmail": "eve@example.com", "lineItems": lines}
    resource = {"typeId": "order", "id": name}
    return orjson.dumps({"notificationType": "Message", "type": kind, "resource": resource, "order": order})


def _klaviyo(name: str, fault: Fault, seconds: float = 2.0) -> Scenario:
    return Scenario(f"Klaviyo: {name}", outage("klaviyo", faults=(fault,), seconds=seconds))


def _with_jobs(scenario: Scenario) -> Scenario:
    return replace(scenario, settings=_BULK_JOBS, job_seconds=_JOB_SECONDS)


def _commercetools(name: str, fault: Fault) -> Scenario:
    return Scenario(f"commercetools: {name}", outage("commercetools", faults=(fault,)))


# Without the budget of a message, each of the orders with lines takes more memory than the limit.
_BOMBS = (
    *(_bomb(f"bomb-{number}", [{"id": f"{number}-{line:x}"} for line in range(70_000)]) for number in range(3)),
    *(_bomb(f"empty-{number}", [{}] * 300_000) for number in range(2)),
    _bomb("long", [], kind="T" * 900_000),
)

SCENARIOS = (
    Scenario("no faults", no_faults),
    _klaviyo("429 storm", THROTTLED, 3.0),
    _klaviyo("500", ERROR_500),
    _klaviyo("503", ERROR_503),
    _klaviyo("524", ERROR_524),
    Scenario("Klaviyo: connections refused", outage("klaviyo")),
    Scenario("Klaviyo: connections refused, twice", _two_outages),
    _klaviyo("reset before the answer", RESET),
    _klaviyo("reset in the middle of the answer", CUT_OFF),
    _klaviyo("the effect is there, the answer is lost", ANSWER_LOST),
    replace(_klaviyo("hangs", HANGS), settings=_SHORT_TIMEOUT),
    _klaviyo("slow", SLOW),
    _klaviyo("403 with a challenge page", CHALLENGE),
    Scenario("Klaviyo: pages", partial(_responses_of_others, "klaviyo", PAGES)),
    Scenario("Klaviyo: odd successes", partial(_responses_of_others, "klaviyo", ODD_SUCCESSES)),
    _klaviyo("401, then the key is restored", REJECTED_KEY),
    Scenario("Klaviyo: a firewall blocks some records", no_faults, rejected_orders=(3, 11), blocks=True),
    Scenario("Klaviyo: 400 for some records", no_faults, rejected_orders=(3, 11, 17)),
    Scenario(
        "Klaviyo: 400 for one record in a bulk call, without a pointer",
        no_faults,
        rejected_orders=(7,),
        settings={"KLAVIYO_WORKER_MAX_BATCH": "100", "KLAVIYO_WORKER_LANES": "1"},
    ),
    replace(_klaviyo("400 for one record in an outage", ERROR_503), rejected_orders=(7,)),
    Scenario("Klaviyo: documented rate limits", no_faults, size=400, sandbox={"rate_limits": True, "latency": 0.0}),
    _with_jobs(_klaviyo("503 while bulk jobs are under way", ERROR_503)),
    _with_jobs(_klaviyo("bulk jobs whose answers are lost", ANSWER_LOST)),
    _commercetools("500", ERROR_500),
    _commercetools("429", THROTTLED),
    Scenario("commercetools: connections refused", outage("commercetools")),
    replace(_commercetools("hangs", HANGS), settings=_SHORT_TIMEOUT),
    _commercetools("reset in the middle of the answer", CUT_OFF),
    Scenario("commercetools: pages", partial(_responses_of_others, "commercetools", PAGES)),
    Scenario("commercetools: odd successes", partial(_responses_of_others, "commercetools", ODD_SUCCESSES)),
    _commercetools("401 for the token, then accepted", REJECTED_TOKEN),
    _commercetools("401 for the client, then restored", REJECTED_KEY),
    Scenario("commercetools: expiring tokens", _expiring_tokens, sandbox={"token_lifetime": 1}),
    Scenario("commercetools: revoked tokens", _revoked_tokens),
    Scenario("commercetools: not readable right after creation", _not_readable_yet),
    Scenario("both: connections refused", outage("klaviyo", "commercetools")),
    Scenario("both: 503", outage("commercetools", "klaviyo", faults=(ERROR_503,))),
    Scenario("worker: kill -9, three times", _killed, no_extra_attempts=(), kills=True, settings=_FEW_REQUESTS),
    Scenario("worker: kill -9 in an outage", _killed_in_an_outage, no_extra_attempts=(), kills=True),
    Scenario(
        "worker: SIGTERM, twice",
        _terminated,
        no_extra_attempts=_EMBEDDED,
        settings=_FEW_REQUESTS | _LARGE_IN_FLIGHT,
    ),
    Scenario("worker: SIGTERM in an outage", _terminated_in_an_outage, no_extra_attempts=(), settings=_LARGE_IN_FLIGHT),
    Scenario("worker: a message ends three workers", _ending_its_workers, no_extra_attempts=(), kills=True),
    replace(
        # A message that is returned during a job counts as delivered.
        _with_jobs(Scenario("worker: SIGTERM while bulk jobs are under way", _terminated, no_extra_attempts=())),
        settings=_BULK_JOBS | {"KLAVIYO_WORKER_SHUTDOWN_GRACE_PERIOD": "1"},
        job_seconds=2.0,
        size=40,
    ),
    _with_jobs(Scenario("worker: kill -9 while bulk jobs are under way", _killed, no_extra_attempts=(), kills=True)),
    Scenario("worker: two workers", _two_workers, settings=_SHARED_QUEUE),
    Scenario(
        "worker: bombs under a memory limit of 512 MB",
        no_faults,
        bombs=_BOMBS,
        memory_limit=512e6,
        queues=("embedded", "pubsub"),  # the others accept less than 1 MB in a batch
    ),
    Scenario("worker: one of two killed", _one_of_two_killed, no_extra_attempts=(), kills=True, settings=_SHARED_QUEUE),
)

_FAULTS = {
    "429": THROTTLED,
    "500": ERROR_500,
    "503": ERROR_503,
    "reset": RESET,
    "cut off": CUT_OFF,
    "answer lost": ANSWER_LOST,
    "hang": HANGS,
    "slow": SLOW,
    "challenge": CHALLENGE,
    "401": REJECTED_TOKEN,
    "refused": None,
}


def mixture(seed: int) -> Scenario:
    """Return a random sequence of faults, kills and SIGTERMs. Faults can overlap."""
    source = random.Random(seed)
    steps = [_random_step(source) for _ in range(source.randint(3, 6))]

    def script(driver: ScenarioDriver) -> None:
        driver.publish(0.3)
        driver.start()
        for _, step in steps:
            driver.publish(0.2)
            step(driver)
        for service in ("klaviyo", "commercetools"):
            driver.restore(service)

    names = ", ".join(name for name, _ in steps)
    orders = source.sample(range(8), source.randint(0, 2))
    name = f"mixture {seed}: {names}"
    return Scenario(name, script, orders, no_extra_attempts=(), kills=True, queues=_EMBEDDED, settings=_SHORT_TIMEOUT)


def _random_step(source: random.Random) -> tuple[str, Callable[[ScenarioDriver], None]]:
    """Return a step and its name. A service fails until a later step restores it."""
    kind = source.choice(["fault"] * 6 + ["restore", "kill", "SIGTERM"])
    service, seconds = source.choice(["klaviyo", "klaviyo", "commercetools"]), round(source.uniform(0.1, 1.2), 2)
    if kind == "kill":
        return kind, partial(_then, _restart_after_kill, seconds)
    if kind == "SIGTERM":
        return kind, partial(_then, _restart_after_sigterm, seconds)
    if kind == "restore":
        return f"{service} works", partial(_then, partial(_restore, service), seconds)
    name, fault = source.choice(list(_FAULTS.items()))
    faults = () if fault is None else (replace(fault, probability=round(source.uniform(0.2, 1), 2)),)
    return f"{service} {name}", partial(_then, partial(_fail, service, faults), seconds)


def _then(step: Callable[[ScenarioDriver], None], seconds: float, driver: ScenarioDriver) -> None:
    step(driver)
    driver.wait(seconds)


def _fail(service: str, faults: tuple[Fault, ...], driver: ScenarioDriver) -> None:
    driver.fail(service, *faults)


def _restore(service: str, driver: ScenarioDriver) -> None:
    driver.restore(service)


def _restart_after_kill(driver: ScenarioDriver) -> None:
    driver.kill()
    driver.start()


def _restart_after_sigterm(driver: ScenarioDriver) -> None:
    driver.terminate()
    driver.start()
