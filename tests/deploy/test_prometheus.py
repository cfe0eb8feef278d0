"""A real Prometheus scrapes real servers: alerts that fire, labels, the dashboard's queries, the names.

One server serves the alpha that the release declares and has no status port. The other serves 0.7 where 0.9 is
declared, is watched from its start on, and hangs in the end. A third one fails to start.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import ALPHA
from tests.deploy.chart import Object, Values, pick, render
from tests.deploy.monitoring import (
    BY_PROMETHEUS,
    NOT_ON_CPU,
    VARIABLES,
    Query,
    dashboard,
    example,
    metric_names,
    queries,
)
from tests.deploy.prometheus import Prometheus, discovered, scrape_jobs
from tests.server import Server, free_port

pytestmark = [pytest.mark.engine, pytest.mark.slow]
SERVED = {"right": ALPHA, "wrong": "0.7"}
DECLARED = {"right": ALPHA, "wrong": "0.9"}
FAILS = {"broken": "0.3"}
ENGINE_TIMEOUT = 15
ALWAYS = {"namespace": "models", "release": "demo"}


def values() -> Values:
    """A release of them, with everything on that asks for metrics."""
    keda = {"autoscaling": {"keda": {"enabled": True}}}
    variants = {name: {"alpha": alpha} | keda for name, alpha in {**DECLARED, **FAILS}.items()}
    monitoring = {"podMonitor": {"enabled": True, "interval": "1s"}, "rules": {"enabled": True}}
    return example() | {"variants": variants, "monitoring": monitoring}


@pytest.fixture(scope="module")
def status_ports() -> dict[str, int]:
    """Of the two that have one."""
    return {name: free_port() for name in ("wrong", "broken")}


@pytest.fixture(scope="module")
def wrong(
    tiny_pair: tuple[Path, Path], status_ports: dict[str, int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The server with the wrong alpha, which begins to start."""
    base, aligned = tiny_pair
    flags = ["--base", str(base), "--aligned", str(aligned), "--alpha", SERVED["wrong"]]
    flags += ["--status-port", str(status_ports["wrong"]), "--engine-timeout", str(ENGINE_TIMEOUT)]
    flags += ["--enforce-eager", "--max-model-len", "128"]
    running = Server(flags, tmp_path_factory.mktemp("wrong") / "log")
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def broken(
    tiny_pair: tuple[Path, Path], status_ports: dict[str, int], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], Server]:
    """Starts a server whose base is not there."""
    folder = tmp_path_factory.mktemp("broken")
    flags = ["--base", str(folder / "nowhere"), "--aligned", str(tiny_pair[1]), "--alpha", FAILS["broken"]]
    flags += ["--status-port", str(status_ports["broken"])]
    return lambda: Server(flags, folder / "log")


@pytest.fixture(scope="module")
def prometheus(
    server: Server,
    wrong: Server,
    broken: Callable[[], Server],
    status_ports: dict[str, int],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Prometheus]:
    """It scrapes all as the release's PodMonitor says, and has the release's rules. Two have answered a request."""
    objects, folder = render(values()), tmp_path_factory.mktemp("prometheus")
    (folder / "rules.yaml").write_text(yaml.safe_dump(pick(objects, "PrometheusRule")["spec"]))
    ports = {
        "http": {"right": server.port, "wrong": wrong.port},
        "status": status_ports,
    }
    targets = [
        discovered(pod(objects, name), "models", f"127.0.0.1:{number}", port)
        for port, numbers in ports.items()
        for name, number in numbers.items()
    ]
    config = {
        "global": {"evaluation_interval": "1s"},
        "rule_files": [str(folder / "rules.yaml")],
        "scrape_configs": [job | {"static_configs": targets} for job in scrape_jobs(pick(objects, "PodMonitor"))],
    }
    with Prometheus(config, folder) as running:
        assert broken().process.wait(60) == 2
        wrong.wait_ready()
        running.wait_for(lambda: len(running.query("up == 1")) == 3)
        for one in (server, wrong):
            model = one.get("/v1/models").json()["data"][0]["id"]
            assert one.post("/v1/completions", {"model": model, "prompt": "Hello", "max_tokens": 8}).status_code == 200
        running.wait_for(lambda: len(running.query("increase(vllm:generation_tokens_total[1m]) > 0")) == 2)
        yield running


def pod(objects: list[Object], variant: str) -> Object:
    """The pod template of a variant."""
    template: Object = pick(objects, "Deployment", variant)["spec"]["template"]
    return template


def test_alerts_of_the_wrong_alpha_and_of_the_failed_start_fire_alone(prometheus: Prometheus) -> None:
    prometheus.wait_for(lambda: len(firing(prometheus)) == 2)
    # Others have had the same time, and three more evaluations of every rule.
    now = time.time()
    prometheus.wait_for(lambda: min(evaluations(prometheus)) > now + 2)
    wrong, failed = sorted(firing(prometheus), key=lambda alert: alert["labels"]["alertname"])
    assert wrong["labels"]["alertname"] == "ExpoAlphaMismatch"
    assert wrong["labels"].items() >= (ALWAYS | {"variant": "wrong", "alpha": "0.9", "severity": "critical"}).items()
    assert "serves alpha 0.7, but the release declares 0.9" in wrong["annotations"]["description"]
    assert failed["labels"]["alertname"] == "ExpoPodFailed"
    assert failed["labels"].items() >= (ALWAYS | {"variant": "broken", "reason": "source"}).items()
    assert "nowhere" in failed["annotations"]["description"]
    assert "/" not in failed["labels"]["message"]


def test_a_start_is_seen_from_its_beginning(prometheus: Prometheus) -> None:
    """Each phase of it, in order, though the server's own port answers at the end only."""
    begun = {}
    for phase in ("start", "load", "warm_up", "serving"):
        (one,) = prometheus.query(f'min_over_time(timestamp(expo_state_phase{{phase="{phase}"}} == 1)[30m:1s])')
        begun[phase] = float(one["value"][1])
    assert sorted(begun, key=lambda phase: begun[phase]) == list(begun)
    (first,) = prometheus.query('min_over_time(timestamp(expo_alpha{variant="wrong"})[30m:1s])')
    assert begun["start"] < float(first["value"][1])


def test_every_series_says_where_it_comes_from(prometheus: Prometheus) -> None:
    series = [one for one in prometheus.get("series", **{"match[]": '{job=~".+"}'}) if one["__name__"] != "ALERTS"]
    assert len(series) > 200
    for one in series:
        alpha = {**DECLARED, **FAILS}[one["variant"]]
        assert one.items() >= (ALWAYS | {"alpha": alpha, "pod": "a-pod"}).items()
    assert {one["variant"] for one in series if one["__name__"] == "expo_alpha"} == set(DECLARED)


@pytest.mark.parametrize("query", queries(), ids=lambda query: f"{query.panel}-{query.legend}")
def test_dashboard_shows_both(query: Query, prometheus: Prometheus) -> None:
    result = prometheus.query(query.filled())
    if metric_names(query.expression) & NOT_ON_CPU or "offset 1d" in query.expression:
        # Nothing is a day old here; promtool's unit tests go back that far.
        assert not result
        return
    with_status_port = any(name.startswith("expo_state") for name in metric_names(query.expression))
    shown = {"broken"} if "expo_state_failed" in query.expression else {"wrong"} if with_status_port else set(DECLARED)
    assert {one["metric"]["variant"] for one in result} == shown
    for label in re.findall(r"{{(\w+)}}", query.legend):
        assert all(one["metric"][label] for one in result)


def test_dashboards_table_tells_served_from_declared(prometheus: Prometheus) -> None:
    (query,) = [query for query in queries() if "expo_deployment_info" in query.expression]
    rows = [one["metric"] for one in prometheus.query(query.filled())]
    found = {(row["variant"], row["alpha"], row["served"]) for row in rows}
    assert found == {(name, DECLARED[name], SERVED[name]) for name in DECLARED}
    assert {row["model_name"] for row in rows if row["variant"] == "right"} == {"first", "second"}
    assert all(row["base"] and row["aligned"] and row["dtype"] and row["version"] for row in rows)


def test_dashboards_variables_find_both(prometheus: Prometheus) -> None:
    either = re.search(r"label_values\((\{.*?\}), namespace", str(dashboard()["templating"]))
    assert either is not None
    found = {name: prometheus.get(f"label/{name}/values", **{"match[]": either[1]}) for name in VARIABLES}
    everything = {**DECLARED, **FAILS}
    assert found == {
        "namespace": ["models"],
        "release": ["demo"],
        "variant": sorted(everything),
        "alpha": sorted(everything.values()),
    }


def test_every_metric_asked_for_is_exported(
    server: Server, status_ports: dict[str, int], prometheus: Prometheus
) -> None:
    """On the pages themselves. The fixture has sent a request, so that histograms are there."""
    pages = [server.get("/metrics").text, httpx.get(f"http://127.0.0.1:{status_ports['wrong']}/metrics").text]
    families = [family for page in pages for family in text_string_to_metric_families(page)]
    exported = {sample.name for family in families for sample in family.samples}
    # Gone with the command that failed.
    exported |= {one["metric"]["__name__"] for one in prometheus.query("last_over_time(expo_state_failed[1h])")}
    objects = render(values())
    rules = [rule for group in pick(objects, "PrometheusRule")["spec"]["groups"] for rule in group["rules"]]
    asked = {name for query in queries() for name in metric_names(query.expression)}
    asked |= {name for rule in rules for name in metric_names(rule["expr"])}
    asked |= {name for one in objects if one["kind"] == "ScaledObject" for name in metric_names(trigger(one))}
    # Descriptions and variables name metrics as well.
    text = str([rule["annotations"] for rule in rules]) + str(dashboard()["templating"])
    asked |= set(re.findall(r"\b(?:expo_|vllm:)\w+", text))
    assert len(asked) > 20
    assert asked - exported == NOT_ON_CPU | BY_PROMETHEUS


def test_alert_of_an_engine_that_hangs(wrong: Server, prometheus: Prometheus) -> None:
    """The last test: the engine is stopped for as long as it takes to be noticed, then goes on."""
    engine = next(one for one in wrong.family() if "EngineCore" in one.name())
    engine.send_signal(signal.SIGSTOP)
    try:
        prometheus.wait_for(lambda: "ExpoEngineHung" in names(firing(prometheus)))
    finally:
        engine.send_signal(signal.SIGCONT)
    prometheus.wait_for(lambda: prometheus.query("expo_state_ready == 1"))
    (alert,) = [alert for alert in firing(prometheus) if alert["labels"]["alertname"] == "ExpoEngineHung"]
    assert alert["labels"].items() >= (ALWAYS | {"variant": "wrong", "severity": "critical"}).items()


def trigger(scaled: Object) -> str:
    """The query that KEDA scales by."""
    query: str = scaled["spec"]["triggers"][0]["metadata"]["query"]
    return query


def firing(prometheus: Prometheus) -> list[dict[str, Any]]:
    """The alerts that fire."""
    return [alert for alert in prometheus.get("alerts")["alerts"] if alert["state"] == "firing"]


def names(alerts: list[dict[str, Any]]) -> set[str]:
    """Of alerts."""
    return {alert["labels"]["alertname"] for alert in alerts}


def evaluations(prometheus: Prometheus) -> list[float]:
    """When each rule was evaluated last."""
    times = [rule["lastEvaluation"] for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    return [datetime.fromisoformat(re.sub(r"(\.\d{6})\d*", r"\1", text)).timestamp() for text in times]
