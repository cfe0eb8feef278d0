"""What the chart promises of its objects: how variants start, end, are found, fed and sized."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.deploy import refusals, schemas
from tests.deploy.chart import (
    CHART,
    NAMESPACE,
    RELEASE,
    VALUES,
    Object,
    Values,
    load,
    merged,
    names,
    pick,
    pod_templates,
    render,
)
from tests.deploy.consistency import mismatches, quantity
from tests.deploy.tools import HELM, need

SERVERS = ("Deployment", "LeaderWorkerSet")


def _one(**settings: Any) -> Values:
    """The values of one variant, `a`, with these settings."""
    values: Values = merged(refusals.ONE, {"variants": {"a": {"alpha": "0.5", **settings}}})
    return values


def _pod(objects: list[Object], ending: str = "") -> Object:
    template: Object = pick(objects, "Deployment", ending)["spec"]["template"]
    return template


def _server(objects: list[Object], ending: str = "") -> Object:
    container: Object = _pod(objects, ending)["spec"]["containers"][0]
    assert container["name"] == "server"
    return container


@pytest.mark.parametrize(("name", "count"), [("none", 0), ("one", 1), ("three", 3)])
def test_each_variant_has_a_deployment_and_a_service(name: str, count: int) -> None:
    objects = render(load(name))
    expected = [f"demo-expo-serve-{variant}" for variant in sorted(load(name)["variants"])]
    for kind in ("Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"):
        assert sorted(one["metadata"]["name"] for one in objects if one["kind"] == kind) == expected
    assert len(expected) == count


@pytest.mark.parametrize(
    ("given", "text", "label"),
    [
        *[
            ("0.5", "0.5", "0.5"),
            ("-0.50", "-0.5", "m0.5"),
            ("+00.70", "0.7", "0.7"),
            ("1", "1", "1"),
            ("-0", "0", "0"),
        ],
        *[
            ("007", "7", "7"),
            ("100.000", "100", "100"),
            ("-1.25", "-1.25", "m1.25"),
            ("0.000001", "0.000001", "0.000001"),
        ],
        *[
            ("1000", "1000", "1000"),
            ("-10000", "-10000", "m10000"),
            ("10000.0000000000", "10000", "10000"),
            ("9999.12345", "9999.12345", "9999.12345"),
            ("-9999.1234567891", "-9999.1234567891", "m9999.1234567891"),
        ],
    ],
)
def test_alpha_has_its_one_text(given: str, text: str, label: str) -> None:
    objects = render({**_one(), "variants": {"a": {"alpha": given}}})
    template = _pod(objects)
    assert template["metadata"]["annotations"]["expo-serve/alpha"] == text
    assert template["metadata"]["labels"]["expo-serve/alpha"] == label
    for kind in ("Deployment", "Service"):
        assert pick(objects, kind)["metadata"]["labels"]["expo-serve/alpha"] == label
    arguments = _server(objects)["args"]
    assert f"--alpha={text}" in arguments
    assert arguments[arguments.index("--served-model-name") + 1] == f"aligned-expo-{text}"


def test_alphas_of_all_sizes_make_legal_names_that_differ() -> None:
    alphas = ["1000", "-1000", "10000", "-10000", "0.0001", "-0.0001", "9999.12345", "-9999.1234567891"]
    values = {**_one(), "variants": {f"v{number}": {"alpha": alpha} for number, alpha in enumerate(alphas)}}
    values |= {"route": {"enabled": True, "parentRefs": [{"name": "g"}]}, "networkPolicy": {"enabled": False}}
    values["monitoring"] = {"rules": {"enabled": True}}
    objects = render(values)
    assert mismatches(objects, NAMESPACE) == []
    assert [line for one in objects for line in schemas.problems(one, "1.35")] == []
    pods = [_pod(objects, f"-v{number}") for number in range(len(alphas))]
    assert [pod["metadata"]["annotations"]["expo-serve/alpha"] for pod in pods] == alphas
    assert len({pod["metadata"]["labels"]["expo-serve/alpha"] for pod in pods}) == len(alphas)
    rules = pick(objects, "HTTPRoute")["spec"]["rules"]
    headers = [rule["matches"][0]["headers"][0] for rule in rules]
    assert [(header["name"], header["value"]) for header in headers] == [("X-Expo-Alpha", alpha) for alpha in alphas]


@pytest.mark.parametrize(
    ("defaults", "own", "flags"),
    [
        ({}, {}, []),
        ({"rounding": "", "roundingSeed": None}, {}, []),
        ({}, {"rounding": "nearest"}, ["--rounding=nearest"]),
        ({"rounding": "nearest"}, {}, ["--rounding=nearest"]),
        ({"rounding": "nearest"}, {"rounding": "dithered"}, ["--rounding=dithered"]),
        ({"rounding": "nearest"}, {"rounding": ""}, []),
        ({}, {"roundingSeed": 0}, ["--rounding-seed=0"]),
        ({"roundingSeed": 7}, {"roundingSeed": 0}, ["--rounding-seed=0"]),
        ({"roundingSeed": 4294967295}, {"rounding": "dithered"}, ["--rounding=dithered", "--rounding-seed=4294967295"]),
        ({}, {"roundingSeed": 4294967295}, ["--rounding-seed=4294967295"]),
        ({}, {"roundingSeed": 16777217}, ["--rounding-seed=16777217"]),
    ],
)
def test_rounding_reaches_the_command_line(defaults: Values, own: Values, flags: list[str]) -> None:
    arguments = _server(render(merged(_one(**own), {"defaults": defaults})))["args"]
    assert [word for word in arguments if word.startswith("--rounding")] == flags


@pytest.mark.parametrize("given", ["4294967295", "4.294967295e+09"])
def test_a_seed_is_an_integer_however_yaml_has_it(given: str, tmp_path: Path) -> None:
    (tmp_path / "seed.yaml").write_text(f"defaults: {{roundingSeed: {given}}}\n")
    for arguments in (["--values", str(tmp_path / "seed.yaml")], ["--set", "variants.a.roundingSeed=4294967295"]):
        assert "--rounding-seed=4294967295" in _server(render(_one(), *arguments))["args"]


def test_all_pods_of_a_group_round_alike() -> None:
    objects = render(_one(rounding="dithered", roundingSeed=3, tensorParallelSize=2, multiNode={"nodes": 2}))
    for template in pod_templates(pick(objects, "LeaderWorkerSet")).values():
        assert {"--rounding=dithered", "--rounding-seed=3"} <= set(template["spec"]["containers"][0]["args"])


@pytest.mark.parametrize("name", [name for name in names() if name != "none"])
def test_starts_and_ends_add_up(name: str) -> None:
    """The startup probe covers the budget, the rollout waits for it, and the grace for the drain."""
    values = load(name)
    for one in (one for one in render(values) if one["kind"] in SERVERS):
        group = one["spec"].get("leaderWorkerTemplate", {})
        spec = (group.get("leaderTemplate") or one["spec"]["template"])["spec"]
        server = spec["containers"][0]
        own = values["variants"][one["metadata"]["labels"]["expo-serve/variant"]]
        budget = own.get("startup", {}).get("budgetSeconds", 1800)
        startup = server["startupProbe"]
        assert budget <= startup["periodSeconds"] * startup["failureThreshold"] < budget + startup["periodSeconds"]
        drain = {"preStopSeconds": 15, "shutdownTimeoutSeconds": 120}
        drain |= values["defaults"].get("drain", {}) | own.get("drain", {})
        assert spec["terminationGracePeriodSeconds"] >= sum(drain.values()) + 20
        assert f"--shutdown-timeout={drain['shutdownTimeoutSeconds']}" in server["args"]
        if one["kind"] == "Deployment":
            least = budget + spec["terminationGracePeriodSeconds"] + (7200 if spec.get("initContainers") else 0)
            assert one["spec"]["progressDeadlineSeconds"] > least
        assert server["livenessProbe"]["periodSeconds"] > server["readinessProbe"]["periodSeconds"]


@pytest.mark.parametrize(("version", "kind"), [("1.29.0", "exec"), ("1.30.0", "sleep"), ("1.30.1-eks-1", "sleep")])
def test_the_pause_before_the_end_is_the_clusters_own_where_it_has_one(version: str, kind: str) -> None:
    hook = _server(render(_one(), kube_version=version))["lifecycle"]["preStop"]
    assert hook == ({"sleep": {"seconds": 15}} if kind == "sleep" else {"exec": {"command": ["sleep", "15"]}})


@pytest.mark.parametrize(
    ("settings", "strategy", "replicas"),
    [
        ({}, {"type": "Recreate"}, 1),
        ({"replicas": 0}, {"type": "Recreate"}, 0),
        ({"replicas": 2}, {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}, 2),
        (
            {"autoscaling": {"hpa": {"enabled": True}}},
            {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
            None,
        ),
        ({"strategy": {"type": "RollingUpdate"}}, {"type": "RollingUpdate"}, 1),
    ],
)
def test_no_rollout_needs_a_gpu_more(settings: dict[str, Any], strategy: Object, replicas: int | None) -> None:
    spec = pick(render(_one(**settings)), "Deployment")["spec"]
    assert spec["strategy"] == strategy
    assert spec.get("replicas") == replicas


@pytest.mark.parametrize(
    ("settings", "gpus"),
    [
        ({}, 1),
        ({"tensorParallelSize": 4}, 4),
        ({"tensorParallelSize": 4, "pipelineParallelSize": 2}, 8),
        ({"tensorParallelSize": 8, "pipelineParallelSize": 2, "multiNode": {"nodes": 2}}, 8),
        ({"tensorParallelSize": 16, "multiNode": {"nodes": 4}}, 4),
    ],
)
def test_each_rank_has_a_gpu(settings: dict[str, Any], gpus: int) -> None:
    found = [one for one in render(_one(**settings)) if one["kind"] in SERVERS]
    (spec,) = (one["spec"] for one in found)
    group = spec.get("leaderWorkerTemplate")
    templates = [group["leaderTemplate"], group["workerTemplate"]] if group else [spec["template"]]
    for template in templates:
        resources = template["spec"]["containers"][0]["resources"]
        for kind in ("requests", "limits"):
            assert int(resources[kind]["nvidia.com/gpu"]) == gpus
    if group:
        assert gpus * group["size"] == settings["tensorParallelSize"] * settings.get("pipelineParallelSize", 1)


def test_memory_on_cpu_holds_the_weights_and_each_ranks_cache() -> None:
    objects = render(load("cpu"))
    computed = _server(objects, "computed")["resources"]
    gibibytes = 1.5 + 2 * (0.5 + 1)
    assert quantity(computed["requests"]["memory"]) == math.ceil(gibibytes * 1024 + 269032448 / 2**20) * 2**20
    assert quantity(computed["limits"]["memory"]) >= quantity(computed["requests"]["memory"])
    assert "nvidia.com/gpu" not in computed["limits"]
    assert {"name": "VLLM_CPU_KVCACHE_SPACE", "value": "1"} in _server(objects, "computed")["env"]
    given = _server(objects, "given")["resources"]
    assert given == {"requests": {"cpu": "2", "memory": "3Gi"}, "limits": {"memory": "4Gi"}}


def test_a_limit_that_is_given_alone_is_no_less_than_the_request() -> None:
    resources = _server(render(_one(resources={"limits": {"memory": "5Gi"}})))["resources"]
    assert quantity(resources["requests"]["memory"]) <= quantity(resources["limits"]["memory"]) == quantity("5Gi")


def test_scaling_looks_at_the_variants_own_requests() -> None:
    objects = render(load("scaling"))
    metric = pick(objects, "HorizontalPodAutoscaler")["spec"]["metrics"][0]["pods"]["metric"]
    assert metric["selector"]["matchLabels"] == {"model_name": "aligned-expo-0.3"}
    query = pick(objects, "ScaledObject")["spec"]["triggers"][0]["metadata"]["query"]
    assert "vllm:num_requests_waiting{" in query
    assert 'model_name="aligned-expo-0.5"' in query


def test_a_test_pod_for_each_variant() -> None:
    pods = [one for one in render(load("three")) if one["kind"] == "Pod"]
    assert len(pods) == 3
    assert all(one["metadata"]["annotations"]["helm.sh/hook"] == "test" for one in pods)
    assert render(load("three"), "--skip-tests") == [one for one in render(load("three")) if one["kind"] != "Pod"]


@pytest.mark.parametrize("name", ["none", "routed", "nodes-ray", "hub-hook"])
def test_notes_list_the_variants_and_how_to_ask_them(name: str) -> None:
    values = load(name)
    command = [need(HELM), "install", RELEASE, str(CHART), "--dry-run=client", "--namespace", NAMESPACE]
    command += ["--values", str(VALUES / f"{name}.yaml")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    notes = result.stdout.split("\nNOTES:\n")[1]
    lines = notes.splitlines()
    for variant, settings in values["variants"].items():
        (row,) = (line for line in lines if line.split()[:2] == [variant, settings["alpha"]])
        assert f"demo-expo-serve-{variant}:8000" in row
        assert f"curl http://demo-expo-serve-{variant}.models:8000/v1/" in notes
    assert ("Authorization: Bearer" in notes) == ("apiKey" in values)
    assert json.dumps(values["variants"]) != "{}" or "No variants" in notes
