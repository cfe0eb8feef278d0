"""A real Prometheus scrapes two real servers: the alert of a wrong alpha, labels, the dashboard's queries, the names.

One server serves the alpha that the release declares, the other serves 0.7 where 0.9 is declared.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

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
from tests.deploy.prometheus import Prometheus, discovered, scrape_job
from tests.server import Server

pytestmark = [pytest.mark.engine, pytest.mark.slow]
SERVED = {"right": ALPHA, "wrong": "0.7"}
DECLARED = {"right": ALPHA, "wrong": "0.9"}
ALWAYS = {"namespace": "models", "release": "demo"}


def values() -> Values:
    """A release of both, with everything on that asks for metrics."""
    keda = {"autoscaling": {"keda": {"enabled": True}}}
    variants = {name: {"alpha": alpha} | keda for name, alpha in DECLARED.items()}
    monitoring = {"podMonitor": {"enabled": True, "interval": "1s"}, "rules": {"enabled": True}}
    return example() | {"variants": variants, "monitoring": monitoring}


@pytest.fixture(scope="module")
def wrong(tiny_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server with the wrong alpha."""
    base, aligned = tiny_pair
    flags = ["--base", str(base), "--aligned", str(aligned), "--alpha", SERVED["wrong"]]
    flags += ["--enforce-eager", "--max-model-len", "128"]
    running = Server(flags, tmp_path_factory.mktemp("wrong") / "log")
    try:
        yield running.wait_ready()
    finally:
        running.stop()


@pytest.fixture(scope="module")
def prometheus(server: Server, wrong: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """It scrapes both as the release's PodMonitor says, and has the release's rules. Each has answered a request."""
    objects, folder = render(values()), tmp_path_factory.mktemp("prometheus")
    (folder / "rules.yaml").write_text(yaml.safe_dump(pick(objects, "PrometheusRule")["spec"]))
    job = scrape_job(pick(objects, "PodMonitor"))
    job["static_configs"] = [
        discovered(pod(objects, name), "models", one.url.removeprefix("http://"))
        for name, one in {"right": server, "wrong": wrong}.items()
    ]
    config = {
        "global": {"evaluation_interval": "1s"},
        "rule_files": [str(folder / "rules.yaml")],
        "scrape_configs": [job],
    }
    with Prometheus(config, folder) as running:
        running.wait_for(lambda: len(running.query("up == 1")) == 2)
        for one in (server, wrong):
            model = one.get("/v1/models").json()["data"][0]["id"]
            assert one.post("/v1/completions", {"model": model, "prompt": "Hello", "max_tokens": 8}).status_code == 200
        running.wait_for(lambda: len(running.query("increase(vllm:generation_tokens_total[1m]) > 0")) == 2)
        yield running


def pod(objects: list[Object], variant: str) -> Object:
    """The pod template of a variant."""
    template: Object = pick(objects, "Deployment", variant)["spec"]["template"]
    return template


def test_alert_of_the_wrong_alpha_fires_for_it_alone(prometheus: Prometheus) -> None:
    prometheus.wait_for(lambda: firing(prometheus))
    # Others have had the same time, and three more evaluations of every rule.
    now = time.time()
    prometheus.wait_for(lambda: min(evaluations(prometheus)) > now + 2)
    (alert,) = firing(prometheus)
    labels = alert["labels"]
    assert labels["alertname"] == "ExpoAlphaMismatch"
    assert labels.items() >= (ALWAYS | {"variant": "wrong", "alpha": "0.9", "severity": "critical"}).items()
    assert "serves alpha 0.7, but the release declares 0.9" in alert["annotations"]["description"]


def test_every_series_says_where_it_comes_from(prometheus: Prometheus) -> None:
    series = [one for one in prometheus.get("series", **{"match[]": '{job=~".+"}'}) if one["__name__"] != "ALERTS"]
    assert len(series) > 200
    for one in series:
        alpha = DECLARED[one["variant"]]
        assert one.items() >= (ALWAYS | {"alpha": alpha, "pod": "a-pod"}).items()
    assert {one["variant"] for one in series if one["__name__"] == "expo_alpha"} == set(DECLARED)


@pytest.mark.parametrize("query", queries(), ids=lambda query: f"{query.panel}-{query.legend}")
def test_dashboard_shows_both(query: Query, prometheus: Prometheus) -> None:
    result = prometheus.query(query.filled())
    if metric_names(query.expression) & NOT_ON_CPU or "offset 1d" in query.expression:
        # Nothing is a day old here; promtool's unit tests go back that far.
        assert not result
        return
    assert {one["metric"]["variant"] for one in result} == set(DECLARED)
    for label in re.findall(r"{{(\w+)}}", query.legend):
        assert all(one["metric"][label] for one in result)


def test_dashboards_table_tells_served_from_declared(prometheus: Prometheus) -> None:
    (query,) = [query for query in queries() if query.legend == "__auto"]
    rows = [one["metric"] for one in prometheus.query(query.filled())]
    found = {(row["variant"], row["alpha"], row["served"]) for row in rows}
    assert found == {(name, DECLARED[name], SERVED[name]) for name in DECLARED}
    assert {row["model_name"] for row in rows if row["variant"] == "right"} == {"first", "second"}
    assert all(row["base"] and row["aligned"] and row["dtype"] and row["version"] for row in rows)


def test_dashboards_variables_find_both(prometheus: Prometheus) -> None:
    found = {name: prometheus.get(f"label/{name}/values", **{"match[]": "expo_alpha"}) for name in VARIABLES}
    assert found == {
        "namespace": ["models"],
        "release": ["demo"],
        "variant": sorted(DECLARED),
        "alpha": sorted(DECLARED.values()),
    }


def test_every_metric_asked_for_is_exported(server: Server, prometheus: Prometheus) -> None:
    """On the page itself. The fixture has sent a request, so that histograms are there."""
    families = text_string_to_metric_families(server.get("/metrics").text)
    exported = {sample.name for family in families for sample in family.samples}
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


def trigger(scaled: Object) -> str:
    """The query that KEDA scales by."""
    query: str = scaled["spec"]["triggers"][0]["metadata"]["query"]
    return query


def firing(prometheus: Prometheus) -> list[dict[str, Any]]:
    """The alerts that fire."""
    return [alert for alert in prometheus.get("alerts")["alerts"] if alert["state"] == "firing"]


def evaluations(prometheus: Prometheus) -> list[float]:
    """When each rule was evaluated last."""
    times = [rule["lastEvaluation"] for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    return [datetime.fromisoformat(re.sub(r"(\.\d{6})\d*", r"\1", text)).timestamp() for text in times]
