"""What can go wrong, each under a name a person understands; and random mixtures of it."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from tests.faults.harness import Scenario
from worker.sandbox import Fault

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.faults.harness import Stage

HANG = 4.0  # seconds, beyond any read timeout here
_PAGE = b"<!DOCTYPE html><title>Just a moment...</title>"
_ONE = ("embedded",)
_HTML = {"Content-Type": "text/html"}
_ALWAYS = partial(Fault, times=None)
_API = "GET /sandbox-shop/"  # commercetools without its authorization

THROTTLED = _ALWAYS(status=429, headers={"Retry-After": "1"}, probability=0.5)
ERROR_500, ERROR_503, ERROR_524 = (_ALWAYS(status=status) for status in (500, 503, 524))
CUT_OFF = _ALWAYS(action="truncate", probability=0.4)
ANSWER_LOST = _ALWAYS(action="lose_response", probability=0.4)
RESET = _ALWAYS(action="reset", probability=0.4)
HANGS = _ALWAYS(action="hang", seconds=HANG)
SLOW = _ALWAYS(action="slow", seconds=0.3)
CHALLENGE = _ALWAYS(status=403, body=_PAGE, headers=_HTML)
NOT_JSON = _ALWAYS(status=200, body=_PAGE, headers=_HTML)
REFUSED_KEY = _ALWAYS(status=401)
REFUSED_TOKEN = _ALWAYS(status=401, match=_API)
_IMPATIENT = {"KLAVIYO_WORKER_READ_TIMEOUT": "0.5"}
_SLOWLY = {"KLAVIYO_WORKER_MAX_REQUESTS": "2"}
# Google's emulator sends more than a worker asks for. What a stopped worker had not read yet is leased for a minute.
_ROOMY = {"KLAVIYO_WORKER_MAX_IN_FLIGHT": "500"}
# Few enough lanes and so low a threshold that profiles and the catalog go in jobs, as they do from a long backlog.
_JOBS = {"KLAVIYO_WORKER_LANES": "1", "KLAVIYO_WORKER_BULK_THRESHOLD": "2"}
_JOB_SECONDS = 0.3
_SHARED = _SLOWLY | {"KLAVIYO_WORKER_MAX_IN_FLIGHT": "10", "KLAVIYO_WORKER_MAX_BATCH": "5"}


def outage(*services: str, faults: tuple[Fault, ...] = (), seconds: float = 2.0) -> Callable[[Stage], None]:
    """Return the script of services that fail in the middle of the work, and work again.

    Without faults they refuse connections.
    """

    def script(stage: Stage) -> None:
        stage.publish(0.4)
        stage.start()
        stage.under_way(services[0])
        for service in services:
            stage.fail(service, *faults)
        stage.publish()
        if faults:
            stage.until_met()
        stage.wait(seconds)
        for service in services:
            stage.mend(service)

    return script


def undisturbed(stage: Stage) -> None:
    """Let everything work."""
    stage.publish()
    stage.start()


def _two_outages(stage: Stage) -> None:
    stage.publish(0.3)
    stage.start()
    for share in (0.3, 0.4):
        stage.under_way(requests=1)
        stage.fail("klaviyo")
        stage.publish(share)
        stage.wait(1.0)
        stage.mend("klaviyo")


def _expiring_tokens(stage: Stage) -> None:
    stage.start()
    for _ in range(4):
        stage.publish(0.25)
        stage.wait(1.2)


def _revoked_tokens(stage: Stage) -> None:
    stage.start()
    for _ in range(4):
        stage.publish(0.25)
        stage.under_way("commercetools", 1)
        stage.sandbox.commercetools_api.revoke_tokens()


def _not_readable_yet(stage: Stage) -> None:
    for order in stage.load.fetched:
        del stage.sandbox.shop.orders[order]
    stage.publish()
    stage.start()
    stage.under_way("commercetools")
    stage.wait(1.5)
    stage.sandbox.shop.orders.update(stage.load.fetched)


def _killed(stage: Stage) -> None:
    stage.publish()
    stage.start()
    for _ in range(3):
        stage.under_way(requests=1)
        stage.wait(stage.random.uniform(0, 0.5))
        stage.kill()
        stage.start()


def _killed_in_an_outage(stage: Stage) -> None:
    stage.publish()
    stage.start()
    stage.under_way()
    stage.fail("klaviyo", ERROR_503)
    stage.wait(1.0)
    stage.kill()
    stage.start()
    stage.wait(1.5)
    stage.mend("klaviyo")


def _terminated(stage: Stage) -> None:
    stage.publish()
    stage.start()
    for _ in range(2):
        stage.under_way(requests=1)
        stage.wait(stage.random.uniform(0, 0.3))
        stage.terminate()
        stage.start()


def _terminated_in_an_outage(stage: Stage) -> None:
    stage.publish()
    stage.start()
    stage.under_way()
    stage.fail("klaviyo", ERROR_503)
    stage.wait(1.0)
    stage.terminate()
    stage.start()
    stage.wait(1.5)
    stage.mend("klaviyo")


def _two_workers(stage: Stage) -> None:
    stage.start()
    stage.start()
    stage.all_up()
    for _ in range(4):
        stage.publish(0.25)
        stage.under_way(requests=2)


def _one_of_two_killed(stage: Stage) -> None:
    stage.start()
    stage.start()
    stage.all_up()
    stage.publish(0.5)
    stage.under_way()
    stage.publish()
    stage.kill()


def _klaviyo(name: str, fault: Fault, seconds: float = 2.0) -> Scenario:
    return Scenario(f"Klaviyo: {name}", outage("klaviyo", faults=(fault,), seconds=seconds))


def _with_jobs(scenario: Scenario) -> Scenario:
    return replace(scenario, settings=_JOBS, job_seconds=_JOB_SECONDS)


def _commercetools(name: str, fault: Fault) -> Scenario:
    return Scenario(f"commercetools: {name}", outage("commercetools", faults=(fault,)))


SCENARIOS = (
    Scenario("nothing goes wrong", undisturbed),
    _klaviyo("429 storm", THROTTLED, 3.0),
    _klaviyo("500", ERROR_500),
    _klaviyo("503", ERROR_503),
    _klaviyo("524", ERROR_524),
    Scenario("Klaviyo: connections refused", outage("klaviyo")),
    Scenario("Klaviyo: connections refused, twice", _two_outages),
    _klaviyo("reset before the answer", RESET),
    _klaviyo("reset in the middle of the answer", CUT_OFF),
    _klaviyo("the effect is there, the answer is lost", ANSWER_LOST),
    replace(_klaviyo("hangs", HANGS), settings=_IMPATIENT),
    _klaviyo("slow", SLOW),
    _klaviyo("403 with a challenge page", CHALLENGE),
    _klaviyo("200 with a maintenance page", NOT_JSON),
    _klaviyo("401, then the key is restored", REFUSED_KEY),
    Scenario("Klaviyo: 400 for some records", undisturbed, refused=(3, 11, 17)),
    Scenario(
        "Klaviyo: 400 for one record in a bulk call, without a pointer",
        undisturbed,
        refused=(7,),
        settings={"KLAVIYO_WORKER_MAX_BATCH": "100", "KLAVIYO_WORKER_LANES": "1"},
    ),
    replace(_klaviyo("400 for one record in an outage", ERROR_503), refused=(7,)),
    Scenario("Klaviyo: documented rate limits", undisturbed, size=400, sandbox={"rate_limits": True, "latency": 0.0}),
    _with_jobs(_klaviyo("503 while bulk jobs are under way", ERROR_503)),
    _with_jobs(_klaviyo("bulk jobs whose answers are lost", ANSWER_LOST)),
    _commercetools("500", ERROR_500),
    _commercetools("429", THROTTLED),
    Scenario("commercetools: connections refused", outage("commercetools")),
    replace(_commercetools("hangs", HANGS), settings=_IMPATIENT),
    _commercetools("reset in the middle of the answer", CUT_OFF),
    _commercetools("401 for the token, then accepted", REFUSED_TOKEN),
    _commercetools("401 for the client, then restored", REFUSED_KEY),
    Scenario("commercetools: expiring tokens", _expiring_tokens, sandbox={"token_lifetime": 1}),
    Scenario("commercetools: revoked tokens", _revoked_tokens),
    Scenario("commercetools: not readable right after creation", _not_readable_yet, fresh=True),
    Scenario("both: connections refused", outage("klaviyo", "commercetools")),
    Scenario("both: 503", outage("commercetools", "klaviyo", faults=(ERROR_503,))),
    Scenario("worker: kill -9, three times", _killed, costless=(), kills=True, settings=_SLOWLY),
    Scenario("worker: kill -9 in an outage", _killed_in_an_outage, costless=(), kills=True),
    Scenario("worker: SIGTERM, twice", _terminated, costless=_ONE, settings=_SLOWLY | _ROOMY),
    Scenario("worker: SIGTERM in an outage", _terminated_in_an_outage, costless=(), settings=_ROOMY),
    _with_jobs(Scenario("worker: kill -9 while bulk jobs are under way", _killed, costless=(), kills=True)),
    Scenario("worker: two of them", _two_workers, settings=_SHARED),
    Scenario("worker: one of two killed", _one_of_two_killed, costless=(), kills=True, settings=_SHARED),
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
    "401": REFUSED_TOKEN,
    "refused": None,
}


def mixture(seed: int) -> Scenario:
    """Return a random sequence of faults, some side by side, with kills and SIGTERMs among them."""
    source = random.Random(seed)
    steps = [_random_step(source) for _ in range(source.randint(3, 6))]

    def script(stage: Stage) -> None:
        stage.publish(0.3)
        stage.start()
        for _, step in steps:
            stage.publish(0.2)
            step(stage)
        for service in ("klaviyo", "commercetools"):
            stage.mend(service)

    names = ", ".join(name for name, _ in steps)
    orders = source.sample(range(8), source.randint(0, 2))
    name = f"mixture {seed}: {names}"
    return Scenario(name, script, orders, costless=(), kills=True, queues=_ONE, settings=_IMPATIENT)


def _random_step(source: random.Random) -> tuple[str, Callable[[Stage], None]]:
    """Return a step and its name. What fails may go on failing into later steps, until it is mended."""
    kind = source.choice(["fault"] * 6 + ["mend", "kill", "SIGTERM"])
    service, seconds = source.choice(["klaviyo", "klaviyo", "commercetools"]), round(source.uniform(0.1, 1.2), 2)
    if kind == "kill":
        return kind, partial(_then, _restart_after_kill, seconds)
    if kind == "SIGTERM":
        return kind, partial(_then, _restart_after_sigterm, seconds)
    if kind == "mend":
        return f"{service} works", partial(_then, partial(_mend, service), seconds)
    name, fault = source.choice(list(_FAULTS.items()))
    faults = () if fault is None else (replace(fault, probability=round(source.uniform(0.2, 1), 2)),)
    return f"{service} {name}", partial(_then, partial(_fail, service, faults), seconds)


def _then(step: Callable[[Stage], None], seconds: float, stage: Stage) -> None:
    step(stage)
    stage.wait(seconds)


def _fail(service: str, faults: tuple[Fault, ...], stage: Stage) -> None:
    stage.fail(service, *faults)


def _mend(service: str, stage: Stage) -> None:
    stage.mend(service)


def _restart_after_kill(stage: Stage) -> None:
    stage.kill()
    stage.start()


def _restart_after_sigterm(stage: Stage) -> None:
    stage.terminate()
    stage.start()
