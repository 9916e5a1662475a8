"""Alerts and dashboard use only metrics and labels that a running worker exposes."""

from __future__ import annotations

import json
import re
import shutil
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.acceptance.conftest import Worker
from tests.acceptance.test_run import http_get, stop
from tests.deploy.manifests import by_kind, rendered
from tests.deploy.promql import TARGET, Series, exposed, labels_of
from tests.support.ports import free_port
from tests.support.waiting import wait_for
from tests.support.worker_state import FakeWorkerState
from tests.unit.telemetry.test_metrics import busy
from worker.sandbox import Fault, Sandbox
from worker.sandbox.samples import sample_notifications

if TYPE_CHECKING:
    from collections.abc import Iterator

    Exposed = dict[str, Series]

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "k8s" / "monitoring"
OPERATORS = {*TARGET, "endpoint"}  # target labels of the Prometheus operator for a PodMonitor
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "dashboard.json").read_text(encoding="utf-8"))
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((FOLDER / "alerts.yaml").read_text(encoding="utf-8"))["spec"]["groups"]
    for rule in group["rules"]
]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}


def by_alert(rule: dict[str, Any]) -> str:
    return str(rule["alert"])


def with_variables(query: str) -> str:
    """Return a query with the variables that Grafana replaces."""
    for name, value in {"__rate_interval": "2m", "namespace": ".*", "pod": ".*"}.items():
        query = query.replace(f"${name}", value)
    assert "$" not in query
    return query


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exposed]:
    """Return the metrics of an installed worker after every message type, with one throttled message held."""
    with Sandbox() as sandbox:
        directory, port = tmp_path_factory.mktemp("worker"), free_port()
        worker = Worker(sandbox.environment | {"QUEUE_URL": f"embedded://{directory}/queue.db"}, directory)
        worker.publish(*(sample.body for sample in sample_notifications(sandbox.shop)))
        sandbox.klaviyo.faults.add(Fault(429, match="POST /api/profiles", headers={"Retry-After": "600"}))
        process = worker.start("run", "--http-port", str(port))
        try:
            wait_for(lambda: _only_held_messages_remain(http_get(port, "/metrics")[1]))
            yield exposed(http_get(port, "/metrics")[1])
            stop(process)
        finally:
            process.kill()


def _only_held_messages_remain(text: str) -> bool:
    gauges = dict(re.findall(r"^klaviyo_worker_messages_(in_flight|held) (.+)", text, re.MULTILINE))
    return 'error_type="Throttled"' in text and gauges["in_flight"] == gauges["held"] != "0.0"


@pytest.fixture
def series() -> Exposed:
    """Return the same metrics without a worker."""
    return exposed(busy(FakeWorkerState()).render()[0].decode())


def complaints(queries: list[tuple[str, set[str]]], series: Exposed) -> list[str]:
    """Return the errors of queries whose results must have the given labels."""
    found = []
    for query, labels in queries:
        try:
            missing = labels - labels_of(query, series)
            found += [f"no labels {sorted(missing)} in {query}"] if missing else []
        except ValueError as error:
            found.append(f"{error}, in {query}")
    return found


def test_alerts_use_existing_metrics_and_labels(scraped: Exposed) -> None:
    """Their texts only use labels of the result."""
    query_labels = [(rule["expr"], set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"])))) for rule in RULES]
    assert complaints(query_labels, scraped) == []


def test_panels_use_existing_metrics_and_labels(scraped: Exposed) -> None:
    """Their legends only use labels of the result."""
    targets = [target for panel in PANELS for target in panel["targets"]]
    query_labels = [
        (with_variables(target["expr"]), set(re.findall(r"{{(\w+)}}", target["legendFormat"]))) for target in targets
    ]
    assert complaints(query_labels, scraped) == []


@pytest.mark.parametrize("rule", RULES, ids=by_alert)
def test_alert_covers_all_workers_of_a_queue(rule: dict[str, Any], series: Exposed) -> None:
    """Ten workers without a key are one problem."""
    expression = rule["expr"].replace('error_type!="Throttled"', "")
    assert {"namespace", "job"} <= labels_of(expression, series) <= {"namespace", "job", "service", "endpoint"}


def test_dashboard_contains_every_metric(series: Exposed) -> None:
    """Each metric of the worker is in a panel."""
    queries = json.dumps(DASHBOARD)
    metrics = {re.sub("_(bucket|sum|count)$", "", name) for name in series if name.startswith("klaviyo_worker_")}
    assert [name for name in sorted(metrics) if name not in queries] == []


@pytest.mark.parametrize(
    ("expression", "complaint"),
    [
        ("klaviyo_worker_park", "no metric"),
        ("process_cpu_seconds", "no metric"),
        ("rate(klaviyo_worker_messages_processed[5m])", "no metric"),
        ("sum by (le) (rate(klaviyo_worker_message_age_seconds[5m]))", "no metric"),
        ('increase(klaviyo_worker_messages_processed_total{outcome="dead"}[5m])', 'no outcome="dead"'),
        ('increase(klaviyo_worker_messages_processed_total{outcome!="dead"}[5m])', 'no outcome="dead"'),
        ('increase(klaviyo_worker_messages_processed_total{outcome=~"sent|dead"}[5m])', 'no outcome="dead"'),
        ('klaviyo_worker_outage{name="klaviyo"}', "no name="),
        ("max by (services) (klaviyo_worker_outage)", "no label"),
        ("klaviyo_worker_parked and on (service) klaviyo_worker_outage", "no label"),
        ("klaviyo_worker_parked unless klaviyo_worker_outage", "can never match"),
        ("sum by (job) (klaviyo_worker_parked) or sum(klaviyo_worker_parked)", "can never match"),
        ("klaviyo_worker_messages_processed_total", "is a counter"),
        ("rate(klaviyo_worker_parked[5m])", "is not a counter"),
        ("histogram_quantile(0.5, sum by (job) (rate(klaviyo_worker_message_age_seconds_bucket[5m])))", "no label"),
        ("sum by (job (klaviyo_worker_parked)", "bad|parenthesis|expected|unexpected"),
    ],
)
def test_check_detects_wrong_expressions(expression: str, complaint: str, series: Exposed) -> None:
    """Without the check, a query that returns nothing would look like an idle time."""
    with pytest.raises(ValueError, match=complaint):
        labels_of(expression, series)


def test_metric_without_samples_exists() -> None:
    """A counter with labels has no sample before its first error."""
    series = exposed("# HELP message_failures_total Errors\n# TYPE message_failures_total counter\n")
    assert labels_of("sum by (job) (rate(message_failures_total[5m]))", series) == {"job"}


@pytest.mark.parametrize("rule", RULES, ids=by_alert)
def test_alert_has_severity_summary_and_runbook(rule: dict[str, Any]) -> None:
    """The runbook has a section for it."""
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert all(rule["annotations"][name] for name in ("summary", "description"))
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert f'<a id="{anchor}"></a>' in (ROOT / page).read_text(encoding="utf-8")


def test_target_labels_do_not_replace_metric_labels(series: Exposed) -> None:
    """Prometheus would rename a duplicate label to `exported_endpoint`."""
    (endpoint,) = yaml.safe_load((FOLDER / "podmonitor.yaml").read_text(encoding="utf-8"))["spec"][
        "podMetricsEndpoints"
    ]
    dropped = {rule["regex"] for rule in endpoint["relabelings"] if rule["action"] == "labeldrop"}
    assert OPERATORS - dropped == TARGET
    assert endpoint["port"] == "metrics"
    assert not TARGET & {label for one in series.values() for label in one.values}


def test_dashboard_works_with_any_data_source() -> None:
    """It contains no id of a Grafana instance."""
    text = json.dumps(DASHBOARD)
    assert set(re.findall(r'"uid": "([^"]+)"', text)) == {"klaviyo-worker", "${datasource}"}
    assert "id" not in DASHBOARD
    assert "__inputs" not in DASHBOARD
    assert VARIABLES["datasource"]["type"] == "datasource"


@pytest.mark.parametrize("name", ["namespace", "pod"])
def test_variables_list_existing_values(name: str, series: Exposed) -> None:
    """The default is all values, even if Prometheus has no such label, as outside Kubernetes."""
    query_labels = re.fullmatch(r"label_values\((.+), (\w+)\)", VARIABLES[name]["query"]["query"])
    assert query_labels is not None
    assert query_labels[2] == name
    assert name in labels_of(with_variables(query_labels[1]), series)
    assert VARIABLES[name]["allValue"] == ".*"
    assert VARIABLES[name]["definition"] == query_labels[0]


def test_panels_do_not_overlap() -> None:
    """Each has a unit and a unique id, and the grid is 24 wide."""
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        is_beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert is_beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert all(panel["fieldConfig"]["defaults"]["unit"] for panel in PANELS)


def test_overlay_can_use_the_component(tmp_path: Path) -> None:
    """It adds the monitor, the rules and the dashboard to the namespace of the overlay."""
    shutil.copytree(FOLDER, tmp_path / "monitoring")
    overlay = {"namespace": "klaviyo", "components": ["../monitoring"]}
    (tmp_path / "overlay").mkdir()
    (tmp_path / "overlay" / "kustomization.yaml").write_text(yaml.safe_dump(overlay), encoding="utf-8")
    made = by_kind(rendered(tmp_path / "overlay"))
    assert {kind: (it["metadata"]["namespace"], it["metadata"]["name"]) for kind, it in made.items()} == {
        "PodMonitor": ("klaviyo", "klaviyo-worker"),
        "PrometheusRule": ("klaviyo", "klaviyo-worker"),
        "ConfigMap": ("klaviyo", "klaviyo-worker-dashboard"),
    }
    assert made["ConfigMap"]["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(made["ConfigMap"]["data"]["klaviyo-worker.json"]) == DASHBOARD
