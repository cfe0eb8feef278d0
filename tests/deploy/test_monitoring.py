"""Monitors and alert rules: what they select, what they are made of, and that each alert is tested."""

from __future__ import annotations

import re
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.chart import Object, Values, load, names, pick, pod_templates, refusal, render
from tests.deploy.monitoring import PROMETHEUS_FOLDER, check_rules, example, groups, promtool, selectors
from tests.deploy.prometheus import Prometheus, discovered, scrape_jobs

ALERTS = {
    "ExpoAlphaMismatch": "critical",
    "ExpoEffectiveAlphaOff": "warning",
    "ExpoStartOverBudget": "warning",
    "ExpoLoadStalled": "warning",
    "ExpoPodFailed": "warning",
    "ExpoEngineHung": "critical",
    "ExpoPodNotReady": "warning",
    "ExpoLoadTimeRegressed": "warning",
    "ExpoRestarts": "warning",
    "ExpoQueueLong": "warning",
    "ExpoKVCachePressure": "warning",
    "ExpoVariantAbsent": "critical",
}
OF_THE_STATUS_PORT = {"ExpoLoadStalled", "ExpoPodFailed", "ExpoEngineHung"}
TESTS = sorted(PROMETHEUS_FOLDER.glob("rules*_test.yaml"))
MONITORS = {"podMonitor": "PodMonitor", "serviceMonitor": "ServiceMonitor"}


def monitored(**monitoring: Any) -> list[Object]:
    """The example release with other monitoring."""
    return render(example() | {"monitoring": monitoring})


def rules_of(variant: str, values: Values) -> dict[str, dict[str, Any]]:
    """The alerts of one variant by name."""
    (group,) = [group for group in groups(values) if group["name"] == f"demo-expo-serve-{variant}"]
    return {rule["alert"]: rule for rule in group["rules"]}


def test_nothing_of_it_unless_asked_for() -> None:
    kinds = Counter(one["kind"] for one in monitored())
    assert not {"PodMonitor", "ServiceMonitor", "PrometheusRule", "ConfigMap"} & set(kinds)


@pytest.mark.parametrize(("key", "kind"), MONITORS.items())
def test_monitor_selects_the_servers_only(key: str, kind: str) -> None:
    objects = monitored(**{key: {"enabled": True, "labels": {"scraped-by": "us"}, "interval": "7s"}})
    monitor = pick(objects, kind)
    assert monitor["metadata"]["labels"]["scraped-by"] == "us"
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    if kind == "PodMonitor":
        labelled = [pod["metadata"] for one in objects for pod in pod_templates(one).values()]
    else:
        labelled = [one["metadata"] for one in objects if one["kind"] == "Service"]
    chosen = [one for one in labelled if wanted <= one["labels"].items()]
    assert [one["labels"]["expo-serve/variant"] for one in chosen] == ["cautious", "mild"]
    endpoints = monitor["spec"].get("podMetricsEndpoints") or monitor["spec"]["endpoints"]
    found = [(endpoint["port"], endpoint["path"], endpoint["interval"]) for endpoint in endpoints]
    assert found == [("http", "/metrics", "7s"), ("status", "/metrics", "7s")]
    ports = [port["name"] for port in pick(objects, "Service", "-mild")["spec"]["ports"]]
    assert ports == [endpoint["port"] for endpoint in endpoints]


@pytest.mark.parametrize(("key", "kind"), MONITORS.items())
def test_without_a_status_port_the_server_alone_is_scraped(key: str, kind: str) -> None:
    values = example() | {"status": {"port": None}, "monitoring": {key: {"enabled": True}}}
    spec = pick(render(values), kind)["spec"]
    assert [one["port"] for one in spec.get("podMetricsEndpoints") or spec["endpoints"]] == ["http"]


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, str]]]:
    """What a real Prometheus makes of the example's pods under each monitor and the example configuration, by job.

    Each pod has two ports. A second pod of mild has ended, a third one's port is another.
    """
    folder = tmp_path_factory.mktemp("prometheus")
    monitors = [pick(monitored(**{key: {"enabled": True}}), kind) for key, kind in MONITORS.items()]
    jobs = [job for monitor in monitors for job in scrape_jobs(monitor)]
    (example_job,) = example_configuration()["scrape_configs"]
    objects = render(example())
    mild, cautious = (discovered(pod(objects, name), "models") for name in ("mild", "cautious"))
    starting = [discovered(pod(objects, name), "models", "127.0.0.1:2", port="status") for name in ("mild", "cautious")]
    ended = deepcopy(mild)
    ended["labels"]["__meta_kubernetes_pod_phase"] = "Failed"
    other = deepcopy(mild)
    other["labels"]["__meta_kubernetes_pod_container_port_name"] = "metrics"
    for job in jobs:
        job["static_configs"] = [mild, cautious, *starting, other]
    jobs.append(without_discovery(example_job) | {"static_configs": [mild, cautious, *starting, other, ended]})
    with Prometheus({"scrape_configs": jobs}, folder) as prometheus:
        prometheus.wait_for(lambda: prometheus.get("targets")["activeTargets"])
        active = prometheus.get("targets")["activeTargets"]
    return {job["job_name"]: [one["labels"] for one in active if one["scrapePool"] == job["job_name"]] for job in jobs}


@pytest.mark.parametrize(
    ("job", "instances"),
    [
        *((f"{monitor}-http", ["127.0.0.1:1"]) for monitor in MONITORS.values()),
        *((f"{monitor}-status", ["127.0.0.1:2"]) for monitor in MONITORS.values()),
        ("expo-serve", ["127.0.0.1:1", "127.0.0.1:2"]),
    ],
)
def test_labels_that_scraping_puts(job: str, instances: list[str], targets: dict[str, list[dict[str, str]]]) -> None:
    always = {"namespace": "models", "pod": "a-pod", "release": "demo", "job": job}
    found = sorted(targets[job], key=lambda labels: (labels["instance"], labels["variant"]))
    variants = {"cautious": "-0.25", "mild": "0.3"}
    assert found == [
        always | {"instance": instance, "variant": variant, "alpha": alpha}
        for instance in instances
        for variant, alpha in variants.items()
    ]


def pod(objects: list[Object], variant: str) -> Object:
    """The pod template of a variant."""
    template: Object = pick(objects, "Deployment", variant)["spec"]["template"]
    return template


def example_configuration() -> dict[str, Any]:
    """deploy/prometheus/prometheus.yaml"""
    config: dict[str, Any] = yaml.safe_load((PROMETHEUS_FOLDER / "prometheus.yaml").read_text())
    return config


def without_discovery(job: dict[str, Any]) -> dict[str, Any]:
    """Debian's build of Prometheus knows no discovery in Kubernetes. What ours asks for is checked here instead."""
    (discovery,) = job["kubernetes_sd_configs"]
    assert discovery == {"role": "pod", "selectors": [{"role": "pod", "label": "expo-serve/variant"}]}
    pods = [pod for one in render(example()) for pod in pod_templates(one).values()]
    chosen = [pod for pod in pods if "expo-serve/variant" in pod["metadata"]["labels"]]
    assert [pod["metadata"]["labels"]["app.kubernetes.io/component"] for pod in chosen] == ["server", "server"]
    return {key: value for key, value in job.items() if key != "kubernetes_sd_configs"}


def test_promtool_reads_the_example_configuration(tmp_path: Path) -> None:
    config = example_configuration()
    config["scrape_configs"] = [without_discovery(job) for job in config["scrape_configs"]]
    config["rule_files"] = [str(PROMETHEUS_FOLDER / name) for name in config["rule_files"]]
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    promtool("check", "config", tmp_path / "prometheus.yaml")


def test_both_monitors_are_refused() -> None:
    both = {name: {"enabled": True} for name in MONITORS}
    said = refusal(example() | {"monitoring": both})
    assert "monitoring: podMonitor and serviceMonitor would scrape every pod twice; enable one of them" in said


def test_only_the_leader_of_a_group_is_scraped() -> None:
    """Workers carry the same labels, but answer nothing: without a port there is no target."""
    group = pick(render(load("nodes-mp")), "LeaderWorkerSet")
    ports = {name: pod["spec"]["containers"][0].get("ports", []) for name, pod in pod_templates(group).items()}
    assert [port["name"] for port in ports["leaderTemplate"]] == ["http", "status"]
    assert ports["workerTemplate"] == []


def test_kept_rules_are_the_rendered_ones() -> None:
    """How to renew the file: deploy/prometheus/README.md."""
    kept = yaml.safe_load((PROMETHEUS_FOLDER / "rules.yaml").read_text())
    assert kept == {"groups": groups(example())}


def test_rules_pass_promtool() -> None:
    promtool("check", "rules", PROMETHEUS_FOLDER / "rules.yaml")
    promtool("test", "rules", *TESTS)


@pytest.mark.parametrize("name", names())
def test_rules_of_other_releases_pass_promtool(name: str, tmp_path: Path) -> None:
    values = load(name)
    values["monitoring"] = {"rules": {"enabled": True}}
    if values.get("variants"):
        for status in ({}, {"status": {"port": None}}):
            check_rules(groups(values | status), tmp_path)
    else:
        assert "PrometheusRule" not in {one["kind"] for one in render(values)}


def test_each_alert_has_a_firing_and_a_silent_case() -> None:
    tests = [test for path in TESTS for test in yaml.safe_load(path.read_text())["tests"]]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    firing = {case["alertname"] for case in cases if case.get("exp_alerts")}
    silent = {case["alertname"] for case in cases if not case.get("exp_alerts")}
    assert firing == silent == set(ALERTS)
    # Against confusion: some series of each metric in use belong to others.
    for name in ("namespace", "release", "variant"):
        others = {
            series["series"].partition("{")[0]
            for test in tests
            for series in test["input_series"]
            if f'{name}="other"' in series["series"]
        }
        assert others == {metric for group in groups(example()) for rule in group["rules"] for metric in asked(rule)}


def asked(rule: dict[str, Any]) -> set[str]:
    """The metrics of a rule."""
    return {metric for metric, _ in selectors(rule["expr"])}


@pytest.mark.parametrize("variant", ["mild", "cautious"])
def test_alerts_of_one_variant(variant: str) -> None:
    rules = rules_of(variant, example())
    assert {name: rule["labels"]["severity"] for name, rule in rules.items()} == ALERTS
    for rule in rules.values():
        for _, matchers in selectors(rule["expr"]):
            assert matchers.startswith(f'namespace="models", release="demo", variant="{variant}"')
        assert re.fullmatch(r"\d+[ms]", rule["for"])
        assert {"summary", "description"} == set(rule["annotations"])
        assert variant in rule["annotations"]["summary"]
        assert not re.search(r"<no value>|%!|<nil>", str(rule))


def test_figures_come_from_the_values(tmp_path: Path) -> None:
    figures = {
        "startupBudgetRatio": 0.85, "loadStalledMinutes": 1000, "loadRegressionRatio": 1.25, "loadRegressionDays": 3,
        "restartsPerHour": 4, "waitingRequests": 1000000, "kvCacheUsage": 0.5, "effectiveAlphaDeviation": 0.05,
    }  # fmt: skip
    labels = {"team": "llm", "severity": "page"}
    values = example() | {"monitoring": {"rules": {"enabled": True, "alertLabels": labels, **figures}}}
    values["variants"] = {"mild": {"alpha": "+00.30", "startup": {"budgetSeconds": 1000000}}}
    rules = rules_of("mild", values)
    assert all(rule["labels"] == labels | {"variant": "mild"} for rule in rules.values())
    expressions = {name: rule["expr"] for name, rule in rules.items()}
    assert expressions["ExpoAlphaMismatch"].endswith(', alpha="0.3"}) != 0.3')
    assert expressions["ExpoEffectiveAlphaOff"].endswith(") > 0.05")
    assert expressions["ExpoStartOverBudget"].endswith("> 0.85 * 1000000")
    assert expressions["ExpoLoadStalled"].endswith("> 60000")
    assert "1.25 * avg by" in expressions["ExpoLoadTimeRegressed"]
    assert "[3d] offset 1d" in expressions["ExpoLoadTimeRegressed"]
    assert expressions["ExpoRestarts"].endswith(">= 4")
    assert float(expressions["ExpoQueueLong"].rpartition("> ")[2]) == 1000000
    assert expressions["ExpoKVCachePressure"].endswith("> 0.5")
    deployment = pick(render(values), "Deployment")
    assert rules["ExpoPodNotReady"]["for"] == rules["ExpoVariantAbsent"]["for"]
    assert f"[{rules['ExpoPodNotReady']['for']}]" in expressions["ExpoPodFailed"]
    assert rules["ExpoVariantAbsent"]["for"] == f"{deployment['spec']['progressDeadlineSeconds']}s"
    check_rules(groups(values), tmp_path)


def test_without_a_status_port_no_alert_asks_for_its_metrics() -> None:
    rules = rules_of("mild", example() | {"status": {"port": None}})
    assert set(rules) == set(ALERTS) - OF_THE_STATUS_PORT
    assert not [name for rule in rules.values() for name in asked(rule) if name.startswith("expo_state")]
    assert "expo_state" not in str([rule["annotations"] for rule in rules.values()])
    assert rules["ExpoPodNotReady"]["expr"].endswith(") == 0")


KEDA = {"autoscaling": {"keda": {"enabled": True, "minReplicas": 0, "triggers": [{"type": "cron", "metadata": {}}]}}}


@pytest.mark.parametrize("variant", [{"replicas": 0}, KEDA], ids=["no replicas", "scaled to zero"])
def test_a_variant_without_pods_is_not_missed(variant: Values) -> None:
    values = example() | {"variants": {"mild": {"alpha": "0.3"} | variant}}
    assert set(rules_of("mild", values)) == set(ALERTS) - {"ExpoVariantAbsent"}
