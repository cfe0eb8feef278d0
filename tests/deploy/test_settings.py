"""Settings of a pod and of what stands around it that no schema checks, and that a cluster would suffer from."""

from __future__ import annotations

from typing import Any

import pytest

from tests.deploy.chart import Object, load, merged, pick, render


def container(pod: Object) -> Object:
    """The server of a pod template."""
    server: Object = pod["spec"]["containers"][0]
    return server


def single(values: dict[str, Any] | None = None) -> Object:
    """The pod template of the one variant, with these values over it."""
    template: Object = pick(render(merged(load("one"), values or {})), "Deployment")["spec"]["template"]
    return template


def group() -> Object:
    """The LeaderWorkerSet over two machines."""
    spec: Object = pick(render(load("nodes-mp")), "LeaderWorkerSet")["spec"]
    return spec


def environment(pod: Object) -> dict[str, Any]:
    """Name to value or source."""
    return {one["name"]: one.get("value", one.get("valueFrom")) for one in container(pod)["env"]}


@pytest.mark.parametrize(("port", "paths"), [(9000, ("/ready", "/live")), (None, ("/health", "/health"))])
def test_probes_that_need_no_key_ask_the_status_port_or_health(port: int | None, paths: tuple[str, str]) -> None:
    """Any other route of the server answers 401 where there is a key, and the pod would be killed for it."""
    server = container(single({"status": {"port": port}}))
    asked = [server[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness")]
    assert asked == [{"path": path, "port": "status" if port else "http"} for path in paths]
    startup, liveness, readiness = (server[f"{kind}Probe"] for kind in ("startup", "liveness", "readiness"))
    assert ("--state" in readiness["exec"]["command"]) == bool(port)
    assert startup["timeoutSeconds"] <= startup["periodSeconds"]
    assert liveness["periodSeconds"] * liveness["failureThreshold"] > 3 * (
        readiness["periodSeconds"] * readiness["failureThreshold"]
    )


def test_a_status_port_is_a_flag_a_port_of_the_pod_and_one_of_the_service() -> None:
    for port in (9000, 12345, None):
        objects = render(merged(load("one"), {"status": {"port": port}}))
        server = container(pick(objects, "Deployment")["spec"]["template"])
        flags = [word for word in server["args"] if word.startswith("--status-port")]
        assert flags == ([f"--status-port={port}"] if port else [])
        ports = {"http": 8000} | ({"status": port} if port else {})
        assert {one["name"]: one["containerPort"] for one in server["ports"]} == ports
        service = pick(objects, "Service")["spec"]["ports"]
        assert {one["name"]: (one["port"], one["targetPort"]) for one in service} == {
            name: (number, name) for name, number in ports.items()
        }


def test_only_the_pods_that_answer_requests_have_a_status_port_and_a_watchdog() -> None:
    values = merged(load("nodes-mp"), {"defaults": {"engineTimeoutSeconds": 7}})
    spec = pick(render(values), "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]
    leader, worker = (container(spec[role]) for role in ("leaderTemplate", "workerTemplate"))
    assert {"--status-port=9000", "--engine-timeout=7"} <= set(leader["args"])
    assert [word for word in worker["args"] if word.startswith(("--status", "--engine"))] == []
    assert not {"ports", "startupProbe", "readinessProbe", "livenessProbe"} & worker.keys()


@pytest.mark.parametrize(
    ("defaults", "own", "flags"),
    [
        ({}, {}, []),
        ({}, {"engineTimeoutSeconds": 0}, ["--engine-timeout=0"]),
        ({"engineTimeoutSeconds": 600}, {}, ["--engine-timeout=600"]),
        ({"engineTimeoutSeconds": 600}, {"engineTimeoutSeconds": None}, []),
    ],
)
def test_the_engines_time_reaches_the_command(defaults: Object, own: Object, flags: list[str]) -> None:
    (name,) = load("one")["variants"]
    server = container(single({"defaults": defaults, "variants": {name: own}}))
    assert [word for word in server["args"] if word.startswith("--engine-timeout")] == flags


def test_the_last_line_of_the_log_tells_why_it_ended() -> None:
    assert container(single())["terminationMessagePolicy"] == "FallbackToLogsOnError"


def test_files_of_a_volume_are_not_owned_anew_at_each_start() -> None:
    assert single()["spec"]["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"


def test_a_group_starts_anew_as_a_whole_and_takes_no_spare_machines() -> None:
    spec = group()
    assert spec["leaderWorkerTemplate"]["restartPolicy"] == "RecreateGroupOnPodRestart"
    assert spec["rolloutStrategy"]["rollingUpdateConfiguration"] == {"maxSurge": 0, "maxUnavailable": 1}
    for role in ("leaderTemplate", "workerTemplate"):
        pod = spec["leaderWorkerTemplate"][role]
        assert environment(pod)["VLLM_HOST_IP"] == {"fieldRef": {"fieldPath": "status.podIP"}}


def test_a_budget_guards_workers_too_and_no_pod_that_never_got_ready() -> None:
    for name in ("small", "wide"):
        budget = pick(render(load("nodes-mp")), "PodDisruptionBudget", name)["spec"]
        assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
        assert "leaderworkerset.sigs.k8s.io/worker-index" not in budget["selector"]["matchLabels"]


def test_ray_workers_wait_for_their_leader() -> None:
    spec = pick(render(load("nodes-ray")), "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]
    script = container(spec["workerTemplate"])["command"][-1]
    assert script.index("trap") < script.index("until ray health-check") < script.index("exec ray start")
    assert "--block" in script


def test_keda_asks_for_the_queue_of_this_variant_here() -> None:
    scaled = pick(render(load("scaling")), "ScaledObject")["spec"]["triggers"][0]
    assert scaled["metadata"]["query"] == (
        'sum(vllm:num_requests_waiting{namespace="models",model_name="aligned-expo-0.5"})'
    )


@pytest.mark.parametrize(("name", "selector"), [("plain", {"matchLabels": {"model_name": "plain"}}), ("org/x", None)])
def test_a_name_that_is_no_label_is_no_selector(name: str, selector: Any) -> None:
    scaling = {"defaults": {"servedModelNames": [name], "autoscaling": {"hpa": {"enabled": True}}}}
    hpa = pick(render(merged(load("one"), scaling)), "HorizontalPodAutoscaler")
    assert hpa["spec"]["metrics"][0]["pods"]["metric"].get("selector") == selector


def test_a_given_number_of_gpus_stays() -> None:
    values = {"defaults": {"extraArgs": ["-dp", "2"], "resources": {"limits": {"nvidia.com/gpu": 2}}}}
    resources = container(single(values))["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == "2"


def test_a_strategy_is_replaced_whole() -> None:
    values = load("three")
    values["defaults"]["strategy"] = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}}
    values["variants"]["mild"]["strategy"] = {"type": "Recreate"}
    objects = render(values)
    assert pick(objects, "Deployment", "-mild")["spec"]["strategy"] == {"type": "Recreate"}
    assert pick(objects, "Deployment", "-back")["spec"]["strategy"] == values["defaults"]["strategy"]


def test_an_aligned_model_takes_the_place_of_a_delta_and_its_image() -> None:
    values = load("one")
    values["defaults"] = {
        "base": "/models/base", "delta": "/delta/x", "deltaImage": {"reference": "registry.example/delta:1"},
        "extraVolumes": [], "device": "gpu",
    }  # fmt: skip
    (name,) = values["variants"]
    values["variants"][name] = {"alpha": "0.5", "aligned": "/models/aligned"}
    pod = pick(render(values), "Deployment")["spec"]["template"]
    assert [volume for volume in pod["spec"]["volumes"] if "image" in volume] == []


def test_a_test_pod_goes_where_its_variant_goes() -> None:
    placed = {"nodeSelector": {"pool": "gpu"}, "tolerations": [{"key": "gpu", "operator": "Exists"}]}
    pod = pick(render(merged(load("one"), {"defaults": placed})), "Pod")
    assert {key: pod["spec"][key] for key in placed} == placed
