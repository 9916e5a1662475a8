"""When each alarm fires, and when it does not: on Prometheus's own engine, promtool."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.deploy.test_monitoring import RULES

if TYPE_CHECKING:
    from pathlib import Path

    Firing = dict[str, list[str]]  # at a minute: alerts, without their prefix, with what else is in their labels

pytestmark = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")

PREFIX = "KlaviyoWorker"
LONG = 260  # values, one every 30 s: two hours and some
WELL = {
    "build_info": f"1x{LONG}",
    "parked": f"0x{LONG}",
    'outage{service="klaviyo"}': f"0x{LONG}",
    'outage{service="commercetools"}': f"0x{LONG}",
    "last_success_timestamp_seconds": f"0+30x{LONG}",  # always just now
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
UNTOLD = {"queue_backlog_messages": "", "dead_letter_messages": ""}  # as on Pub/Sub
IDLE = {"last_success_timestamp_seconds": f"60x{LONG}", "batch_size_messages_sum": f"0x{LONG}"}
OUT = {'outage{service="klaviyo"}': f"1x{LONG}", 'message_failures_total{error_type="Rejected"}': f"0+10x{LONG}"}
BRIEFLY_OUT = {
    'outage{service="klaviyo"}': f"1x24 0x{LONG}",
    'message_failures_total{error_type="Rejected"}': f"0+10x24 240x{LONG}",
}
DEAD, AGAIN = (f'messages_processed_total{{outcome="{outcome}"}}' for outcome in ("dead_lettered", "retried"))
KLAVIYO, COMMERCETOOLS = list(WELL)[-2:]
REFUSED, THROTTLED = (f'message_failures_total{{error_type="{error}"}}' for error in ("Rejected", "Throttled"))

CASES: dict[str, tuple[list[dict[str, str]], Firing]] = {
    "all is well": ([{}, {}], {"1": [], "30": [], "120": []}),
    "a queue that does not tell": ([UNTOLD, UNTOLD], {"1": [], "30": [], "120": []}),
    "a quiet night": ([IDLE, IDLE | UNTOLD], {"30": [], "120": []}),
    "parked, one of two": ([{}, {"parked": f"1x{LONG}"}], {"1": [], "3": ["Parked"]}),
    "parked for a moment": ([{"parked": f"0x9 1x2 0x{LONG}"}], {"5": [], "6": [], "10": []}),
    "all gone": (
        [{name: values.split("x")[0] + "x60 stale" for name, values in WELL.items()}] * 2,
        {"30": [], "39": [], "42": ["Gone"], "1400": ["Gone"], "1500": []},
    ),
    "one gone": ([{}, dict.fromkeys(WELL, "0x60 stale")], {"42": []}),
    "a backlog, and never a success": (
        [{"last_success_timestamp_seconds": f"0x{LONG}", "queue_backlog_messages": f"5x{LONG}"}] * 2,
        {"9": [], "16": ["NothingDone"]},
    ),
    "held, and never a success, on a queue that does not tell": (
        [UNTOLD | {"last_success_timestamp_seconds": f"0x{LONG}", "messages_in_flight": f"5x{LONG}"}],
        {"9": [], "16": ["NothingDone"]},
    ),
    "a backlog, and no more success": (
        [{"last_success_timestamp_seconds": f"0+30x20 600x{LONG}", "queue_backlog_messages": f"5x{LONG}"}],
        {"24": [], "26": ["NothingDone"]},
    ),
    "a message after a quiet night": (
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
    "a backlog in an outage": ([IDLE | OUT | {"queue_backlog_messages": f"5x{LONG}"}], {"30": ["Outage klaviyo"]}),
    "a message that fails and waits in the queue": (
        [IDLE | {"queue_backlog_messages": f"1x{LONG}", AGAIN: f"0x19 1x19 2x19 3x{LONG}"}],
        {"30": ["Retried"]},
    ),
    "held ever longer": ([{"oldest_message_age_seconds": f"0+30x{LONG}"}, {}], {"9": [], "12": ["OldMessages"]}),
    "held ever longer, with a gap between two holds": (
        [{"oldest_message_age_seconds": f"0+30x40 0x4 1300+30x{LONG}"}],
        {"20": ["OldMessages"], "21": ["OldMessages"], "22": ["OldMessages"], "25": ["OldMessages"]},
    ),
    "an old message came again and went": (
        [{"oldest_message_age_seconds": f"0x20 900 0x{LONG}"}],
        {str(minute): [] for minute in range(9, 18)},
    ),
    "an outage, seen by one of two": ([{}, OUT], {"14": [], "16": ["Outage klaviyo"]}),
    "an outage of minutes": ([BRIEFLY_OUT], {"10": [], "14": [], "20": [], "30": []}),
    "a dead letter": ([{DEAD: f"0x10 1x{LONG}"}, {}], {"5": [], "6": ["DeadLetters"], "25": []}),
    "a dead letter of the queue's own": (
        [{"dead_letter_messages": f"3x10 4x{LONG}"}] * 2,
        {"5": [], "6": ["DeadLetters"], "25": []},
    ),
    "dead letters cleared away": ([{"dead_letter_messages": f"3x10 0x{LONG}"}], {"6": [], "15": []}),
    "an attempt spent": ([{AGAIN: f"0x10 1x{LONG}"} | UNTOLD], {"5": [], "6": ["Retried"], "25": []}),
    "one of ten tries fails": ([{REFUSED: f"0+1x{LONG}"}, {}], {"4": [], "20": ["ErrorRatio"], "120": ["ErrorRatio"]}),
    "one of two hundred fails": (
        [{REFUSED: f"0+1x{LONG}", "batch_size_messages_sum": f"0+200x{LONG}"}],
        {"20": [], "120": []},
    ),
    "one of a few fails": (
        [{REFUSED: f"0+1x{LONG}", "batch_size_messages_sum": f"0+4x{LONG}"}],
        {"20": [], "120": []},
    ),
    "tries that meet a limit": ([{THROTTLED: f"0+10x{LONG}"}], {"20": [], "120": []}),
    "429 again and again, from two workers": (
        [{KLAVIYO: f"0+2x{LONG}"}] * 2,
        {"5": [], "30": ["RateLimited POST /api/events"]},
    ),
    "429 from commercetools": ([{COMMERCETOOLS: f"0+4x{LONG}"}], {"30": ["RateLimited /orders"]}),
    "429 now and then": ([{KLAVIYO: f"0+2x{LONG}"}], {"30": []}),
}


def series_of(pod: int, differences: dict[str, str]) -> list[dict[str, str]]:
    """Return what a worker is seen to expose: all is well, but for the differences."""
    target = f'namespace="klaviyo",job="klaviyo/klaviyo-worker",pod="worker-{pod}",instance="10.0.0.{pod}:9090"'
    return [
        {"series": f"klaviyo_worker_{name.rstrip('}') + (',' if '}' in name else '{')}{target}}}", "values": values}
        for name, values in (WELL | differences).items()
        if values
    ]


def expected(rule: dict[str, Any], firing: list[str]) -> list[dict[str, Any]]:
    """Return an alert as promtool expects it, for each that fires of this rule."""
    more = {"Outage": "service", "RateLimited": "endpoint"}
    found = []
    for name, _, value in (alert.partition(" ") for alert in firing):
        if PREFIX + name == rule["alert"]:
            labels = rule["labels"] | {"namespace": "klaviyo", "job": "klaviyo/klaviyo-worker"}
            found.append({"exp_labels": labels | ({more[name]: value} if value else {})})
    return found


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()


def test_prometheus_takes_the_rules(tmp_path: Path) -> None:
    """With their texts, which are templates."""
    rules = tmp_path / "rules.yml"
    rules.write_text(yaml.safe_dump({"groups": [{"name": "klaviyo-worker", "rules": RULES}]}), encoding="utf-8")
    promtool("check", "rules", rules)


@pytest.mark.parametrize("case", CASES)
def test_alarms_fire_when_they_should(case: str, tmp_path: Path) -> None:
    """These, and no others; once for all workers of a queue, and without a worker's name."""
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


def test_every_alarm_has_a_case() -> None:
    """In which it fires at one time, and not at another."""
    changing = {
        alert.split()[0]
        for _, firing in CASES.values()
        for alerts in firing.values()
        for alert in alerts
        if any(alert not in others for others in firing.values())
    }
    assert {PREFIX + name for name in changing} == {rule["alert"] for rule in RULES}
