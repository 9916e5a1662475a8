"""When each alert fires, and when it does not, according to promtool."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.deploy.test_monitoring import RULES

if TYPE_CHECKING:
    from pathlib import Path

    Firing = dict[str, list[str]]  # by minute: alerts without their prefix, and with a label value

pytestmark = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")

PREFIX = "KlaviyoWorker"
LONG = 260  # values, one per 30 s: more than two hours
HEALTHY = {
    "build_info": f"1x{LONG}",
    "parked": f"0x{LONG}",
    'outage{service="klaviyo"}': f"0x{LONG}",
    'outage{service="commercetools"}': f"0x{LONG}",
    "last_success_timestamp_seconds": f"0+30x{LONG}",  # always now
    "messages_in_flight": f"0x{LONG}",
    "oldest_message_age_seconds": f"0x{LONG}",
    "queue_backlog_messages": f"0x{LONG}",
    "dead_letter_messages": f"3x{LONG}",
    "batch_size_messages_sum": f"0+10x{LONG}",
    'messages_processed_total{outcome="sent"}': f"0+10x{LONG}",
    'messages_processed_total{outcome="retried"}': f"0x{LONG}",
    'messages_processed_total{outcome="dead_lettered"}': f"0x{LONG}",
    'message_failures_total{error_type="Rejected"}': f"0x{LONG}",
    'message_failures_total{error_type="Throttled"}': f"0x{LONG}",
    'klaviyo_requests_total{endpoint="POST /api/events",status="429"}': f"0x{LONG}",
    'commercetools_requests_total{endpoint="/orders",status="429"}': f"0x{LONG}",
}
NO_COUNTS = {"queue_backlog_messages": "", "dead_letter_messages": ""}  # as on Pub/Sub
IDLE = {"last_success_timestamp_seconds": f"60x{LONG}", "batch_size_messages_sum": f"0x{LONG}"}
IN_OUTAGE = {'outage{service="klaviyo"}': f"1x{LONG}", 'message_failures_total{error_type="Rejected"}': f"0+10x{LONG}"}
BRIEF_OUTAGE = {
    'outage{service="klaviyo"}': f"1x24 0x{LONG}",
    'message_failures_total{error_type="Rejected"}': f"0+10x24 240x{LONG}",
}
DEAD_LETTERED, RETRIED = (
    f'messages_processed_total{{outcome="{outcome}"}}' for outcome in ("dead_lettered", "retried")
)
KLAVIYO, COMMERCETOOLS = list(HEALTHY)[-2:]
REJECTED, THROTTLED = (f'message_failures_total{{error_type="{error}"}}' for error in ("Rejected", "Throttled"))

CASES: dict[str, tuple[list[dict[str, str]], Firing]] = {
    "healthy": ([{}, {}], {"1": [], "30": [], "120": []}),
    "a queue without counts": ([NO_COUNTS, NO_COUNTS], {"1": [], "30": [], "120": []}),
    "idle": ([IDLE, IDLE | NO_COUNTS], {"30": [], "120": []}),
    "parked, one of two": ([{}, {"parked": f"1x{LONG}"}], {"1": [], "3": ["Parked"]}),
    "parked for a moment": ([{"parked": f"0x9 1x2 0x{LONG}"}], {"5": [], "6": [], "10": []}),
    "all workers gone": (
        [{name: values.split("x")[0] + "x60 stale" for name, values in HEALTHY.items()}] * 2,
        {"30": [], "39": [], "42": ["Gone"], "1400": ["Gone"], "1500": []},
    ),
    "one worker gone": ([{}, dict.fromkeys(HEALTHY, "0x60 stale")], {"42": []}),
    "a backlog without any success": (
        [{"last_success_timestamp_seconds": f"0x{LONG}", "queue_backlog_messages": f"5x{LONG}"}] * 2,
        {"9": [], "16": ["NoProgress"]},
    ),
    "held messages without any success, on a queue without counts": (
        [NO_COUNTS | {"last_success_timestamp_seconds": f"0x{LONG}", "messages_in_flight": f"5x{LONG}"}],
        {"9": [], "16": ["NoProgress"]},
    ),
    "a backlog, and no success any more": (
        [{"last_success_timestamp_seconds": f"0+30x20 600x{LONG}", "queue_backlog_messages": f"5x{LONG}"}],
        {"24": [], "26": ["NoProgress"]},
    ),
    "a message after an idle time": (
        [IDLE | {"queue_backlog_messages": f"0x200 1x2 0x{LONG}"}],
        {"99": [], "101": [], "105": []},
    ),
    "a backlog, and another worker succeeds": (
        [{}, IDLE | {"queue_backlog_messages": f"5x{LONG}", "messages_in_flight": f"5x{LONG}"}],
        {"30": []},
    ),
    "a backlog while parked": (
        [IDLE | {"queue_backlog_messages": f"5x{LONG}", "parked": f"1x{LONG}"}],
        {"30": ["Parked"]},
    ),
    "a backlog in an outage": (
        [IDLE | IN_OUTAGE | {"queue_backlog_messages": f"5x{LONG}"}],
        {"30": ["Outage klaviyo"]},
    ),
    "a message that fails repeatedly": (
        [IDLE | {"queue_backlog_messages": f"1x{LONG}", RETRIED: f"0x19 1x19 2x19 3x{LONG}"}],
        {"30": ["Retried"]},
    ),
    "held increasingly long": ([{"oldest_message_age_seconds": f"0+30x{LONG}"}, {}], {"9": [], "12": ["OldMessages"]}),
    "held increasingly long, with a gap between two holds": (
        [{"oldest_message_age_seconds": f"0+30x40 0x4 1300+30x{LONG}"}],
        {"20": ["OldMessages"], "21": ["OldMessages"], "22": ["OldMessages"], "25": ["OldMessages"]},
    ),
    "an old message was redelivered and settled": (
        [{"oldest_message_age_seconds": f"0x20 900 0x{LONG}"}],
        {str(minute): [] for minute in range(9, 18)},
    ),
    "an outage, seen by one of two": ([{}, IN_OUTAGE], {"14": [], "16": ["Outage klaviyo"]}),
    "an outage of minutes": ([BRIEF_OUTAGE], {"10": [], "14": [], "20": [], "30": []}),
    "a dead letter": ([{DEAD_LETTERED: f"0x10 1x{LONG}"}, {}], {"5": [], "6": ["DeadLetters"], "25": []}),
    "a dead letter of the queue itself": (
        [{"dead_letter_messages": f"3x10 4x{LONG}"}] * 2,
        {"5": [], "6": ["DeadLetters"], "25": []},
    ),
    "dead letters removed": ([{"dead_letter_messages": f"3x10 0x{LONG}"}], {"6": [], "15": []}),
    "an attempt used up": ([{RETRIED: f"0x10 1x{LONG}"} | NO_COUNTS], {"5": [], "6": ["Retried"], "25": []}),
    "one of ten attempts fails": (
        [{REJECTED: f"0+1x{LONG}"}, {}],
        {"4": [], "20": ["ErrorRatio"], "120": ["ErrorRatio"]},
    ),
    "one of two hundred fails": (
        [{REJECTED: f"0+1x{LONG}", "batch_size_messages_sum": f"0+200x{LONG}"}],
        {"20": [], "120": []},
    ),
    "one of a few fails": (
        [{REJECTED: f"0+1x{LONG}", "batch_size_messages_sum": f"0+4x{LONG}"}],
        {"20": [], "120": []},
    ),
    "throttled attempts": ([{THROTTLED: f"0+10x{LONG}"}], {"20": [], "120": []}),
    "429 repeatedly, from two workers": (
        [{KLAVIYO: f"0+2x{LONG}"}] * 2,
        {"5": [], "30": ["RateLimited POST /api/events"]},
    ),
    "429 from commercetools": ([{COMMERCETOOLS: f"0+4x{LONG}"}], {"30": ["RateLimited /orders"]}),
    "429 occasionally": ([{KLAVIYO: f"0+2x{LONG}"}], {"30": []}),
}


def series_of(pod: int, differences: dict[str, str]) -> list[dict[str, str]]:
    """Return the series of a healthy worker, with the given differences."""
    target = f'namespace="klaviyo",job="klaviyo/klaviyo-worker",pod="worker-{pod}",instance="10.0.0.{pod}:9090"'
    return [
        {"series": f"klaviyo_worker_{name.rstrip('}') + (',' if '}' in name else '{')}{target}}}", "values": values}
        for name, values in (HEALTHY | differences).items()
        if values
    ]


def expected(rule: dict[str, Any], firing: list[str]) -> list[dict[str, Any]]:
    """Return the alerts that promtool must find for a rule."""
    more = {"Outage": "service", "RateLimited": "endpoint"}
    found = []
    for name, _, value in (alert.partition(" ") for alert in firing):
        if PREFIX + name == rule["alert"]:
            labels = rule["labels"] | {"namespace": "klaviyo", "job": "klaviyo/klaviyo-worker"}
            found.append({"exp_labels": labels | ({more[name]: value} if value else {})})
    return found


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()


def test_promtool_accepts_the_rules(tmp_path: Path) -> None:
    """The check includes the templates in the texts."""
    rules = tmp_path / "rules.yml"
    rules.write_text(yaml.safe_dump({"groups": [{"name": "klaviyo-worker", "rules": RULES}]}), encoding="utf-8")
    promtool("check", "rules", rules)


@pytest.mark.parametrize("case", CASES)
def test_alerts_fire_as_expected(case: str, tmp_path: Path) -> None:
    """Only the expected alerts fire, once per queue and without the name of a worker."""
    workers, firing = CASES[case]
    silent = [{name: part for name, part in rule.items() if name != "annotations"} for rule in RULES]
    rules = {"groups": [{"name": "klaviyo-worker", "rules": silent}]}
    test = {
        "interval": "30s",
        "input_series": [one for pod, differences in enumerate(workers) for one in series_of(pod, differences)],
        "alert_rule_test": [
            {"eval_time": f"{minute}m", "alertname": rule["alert"], "exp_alerts": expected(rule, alerts)}
            for minute, alerts in firing.items()
            for rule in RULES
        ],
    }
    tests = {"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": [test]}
    for name, content in (("rules.yml", rules), ("tests.yml", tests)):
        (tmp_path / name).write_text(yaml.safe_dump(content), encoding="utf-8")
    promtool("test", "rules", tmp_path / "tests.yml")


def test_every_alert_has_a_case() -> None:
    """In one case it fires at one time and not at another."""
    changing = {
        alert.split()[0]
        for _, firing in CASES.values()
        for alerts in firing.values()
        for alert in alerts
        if any(alert not in others for others in firing.values())
    }
    assert {PREFIX + name for name in changing} == {rule["alert"] for rule in RULES}
