"""A service is down if it does not answer neutral requests during an outage of one of its endpoints."""

from __future__ import annotations

import threading

import pytest

from tests.support.waiting import wait_for
from worker.errors import KlaviyoMisconfigured
from worker.runtime.downtime import INTERVAL, Downtime


class Service:
    """A fake service. It answers after `release` is set."""

    def __init__(self) -> None:
        self.outage = ""
        self.is_up = True
        self.error: Exception | None = None
        self.questions = 0
        self.release = threading.Event()
        self.release.set()

    def outage_reason(self) -> str:
        return self.outage

    def answers(self) -> bool:
        self.questions += 1
        assert self.release.wait(60)
        if self.error:
            raise self.error
        return self.is_up


def test_service_without_an_outage_is_not_asked() -> None:
    """No request is sent while all endpoints work."""
    service = Service()
    assert Downtime(service).reason() == ""
    assert service.questions == 0


def test_service_is_down_until_its_outage_ends() -> None:
    """The end of the outage is known first hand, so it needs no question."""
    service = Service()
    service.outage, service.is_up = "503", False
    downtime = Downtime(service)
    wait_for(lambda: downtime.reason() == "503")
    service.outage = ""
    assert downtime.reason() == ""


@pytest.mark.parametrize("error", [None, KlaviyoMisconfigured("401")])
def test_outage_of_an_endpoint_is_no_downtime(error: Exception | None) -> None:
    """The service answers the other endpoints, or it refuses the worker."""
    service = Service()
    service.outage, service.error = "503", error
    downtime = Downtime(service)
    wait_for(lambda: downtime.reason() == "" and service.questions)
    wait_for(lambda: not downtime._is_asking)
    assert downtime.reason() == ""


def test_service_is_asked_by_one_thread_and_at_intervals() -> None:
    """The receive loop never waits for the answer."""
    now = [0.0]
    service = Service()
    service.outage = "503"
    service.release.clear()
    downtime = Downtime(service, lambda: now[0])
    for _ in range(5):
        assert downtime.reason() == ""
    wait_for(lambda: service.questions == 1)
    service.is_up = False
    service.release.set()
    wait_for(lambda: downtime.reason() == "503")
    now[0] = INTERVAL - 0.1
    assert (downtime.reason(), service.questions) == ("503", 1)
    service.is_up = True
    now[0] = INTERVAL
    wait_for(lambda: downtime.reason() == "")
    assert service.questions == 2
