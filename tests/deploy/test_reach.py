"""Who reaches whom: servers their weights, the download its hub, requests their variant; and nothing else."""

from __future__ import annotations

import pytest

from tests.deploy.chart import Object, load, merged, names, pick, pod_templates, render


def _pod(objects: list[Object], ending: str = "") -> Object:
    template: Object = pick(objects, "Deployment", ending)["spec"]["template"]
    return template


@pytest.mark.parametrize("name", [name for name in names() if name not in ("none", "service-monitor")])
def test_pods_are_offline_and_read_the_weights_only(name: str) -> None:
    """Nothing that serves can reach the hub or change a checkpoint; only the download can, and only the hub's port."""
    servers = [one for one in render(load(name)) if one["kind"] in ("Deployment", "LeaderWorkerSet")]
    assert servers
    for template in (template for one in servers for template in pod_templates(one).values()):
        server = template["spec"]["containers"][0]
        assert {"name": "HF_HUB_OFFLINE", "value": "1"} in server["env"]
        (weights,) = (mount for mount in server["volumeMounts"] if mount["name"] == "weights")
        assert weights["readOnly"] is True
        shm = next(volume for volume in template["spec"]["volumes"] if volume["name"] == "shm")
        assert shm["emptyDir"]["medium"] == "Memory"


def _policy(objects: list[Object], ending: str) -> Object:
    spec: Object = pick(objects, "NetworkPolicy", ending)["spec"]
    return spec


def test_servers_reach_nothing_but_names_and_downloads_nothing_but_the_hub() -> None:
    dns = {"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]}
    # A mirror hands out large files from where it has them, so the usual port stays.
    for name, hub in (("hub-job", [443]), ("hub-hook", [443, 8443])):
        objects = render(load(name))
        assert _policy(objects, "-mild")["egress"] == [dns]
        weights = _policy(objects, "-weights")
        assert weights["egress"] == [dns, {"ports": [{"port": port, "protocol": "TCP"} for port in hub]}]
        assert weights.get("ingress", []) == []


def test_requests_come_from_the_gateway_the_tests_and_prometheus() -> None:
    rule, _ = _policy(render(load("routed")), "-mild")["ingress"]
    assert rule["ports"] == [{"port": "http", "protocol": "TCP"}]
    namespaces = [
        peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
        for peer in rule["from"]
        if "namespaceSelector" in peer
    ]
    assert namespaces == ["gateways", "monitoring"]
    (tests,) = (peer["podSelector"]["matchLabels"] for peer in rule["from"] if "podSelector" in peer)
    labels = pick(render(load("routed")), "Pod", "-mild-test")["metadata"]["labels"]
    assert tests.items() <= labels.items()
    server = _pod(render(load("routed")), "-mild")["metadata"]["labels"]
    assert not tests.items() <= server.items(), "another variant could come in as a test"


@pytest.mark.parametrize(
    ("gateway", "prometheus", "peers"),
    [
        ([], [{"podSelector": {"matchLabels": {"app": "p"}}}], [{}, {"app": "p"}]),
        ([], [], [{}]),
        (
            [{"podSelector": {"matchLabels": {"app": "g"}}}],
            [{"podSelector": {"matchLabels": {"app": "p"}}}],
            [{"app": "p"}],
        ),
        ([{"podSelector": {"matchLabels": {"app": "g"}}}], [], None),
    ],
)
def test_the_status_port_is_for_who_scrapes_and_no_gateway(
    gateway: list[Object], prometheus: list[Object], peers: list[Object] | None
) -> None:
    """A rule without peers would let all in."""
    policy = {"networkPolicy": {"gateway": gateway, "prometheus": prometheus}}
    rules = _policy(render(merged(load("one"), policy)), "-mild")["ingress"]
    assert [rule["ports"] for rule in rules[1:]] == ([] if peers is None else [[{"port": "status", "protocol": "TCP"}]])
    assert [[peer["podSelector"].get("matchLabels", {}) for peer in rule["from"]] for rule in rules[1:]] == (
        [] if peers is None else [peers]
    )
    (only,) = _policy(render(merged(load("one"), {**policy, "status": {"port": None}})), "-mild")["ingress"]
    assert only == rules[0]


def test_ranks_on_several_machines_talk_to_each_other_and_to_no_other_variant() -> None:
    objects = render(load("nodes-mp"))
    peers = {"podSelector": {"matchLabels": _policy(objects, "-wide")["podSelector"]["matchLabels"]}}
    assert [rule for rule in _policy(objects, "-wide")["ingress"] if rule.get("from") == [peers]]
    assert [rule for rule in _policy(objects, "-wide")["egress"] if rule.get("to") == [peers]]
    assert not [rule for rule in _policy(objects, "-small")["egress"] if "to" in rule]


def test_every_hub_source_is_downloaded_once_and_waited_for_by_those_who_read_it() -> None:
    objects, values = render(load("hub-job")), load("hub-job")
    both = [f"org/base@{values['defaults']['baseRevision']}", f"org/aligned@{values['defaults']['alignedRevision']}"]
    packed = f"org/packed@{values['variants']['other']['deltaRevision']}"
    job = pick(objects, "Job")["spec"]["template"]["spec"]["containers"][0]
    assert sorted(word for word in job["args"] if word.startswith("org/")) == sorted([*both, packed])
    assert all("readOnly" not in mount for mount in job["volumeMounts"])
    for variant, sources in (("mild", both), ("strong", both), ("other", [both[0], packed])):
        (waits,) = _pod(objects, variant)["spec"]["initContainers"]
        assert sorted(word for word in waits["args"] if word.startswith("org/")) == sorted(sources)
    assert pick(objects, "PersistentVolumeClaim")["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def test_a_hook_runs_before_the_release_with_all_that_it_needs() -> None:
    objects = render(load("hub-hook"))
    job = pick(objects, "Job")
    for one in (job, pick(objects, "NetworkPolicy", "-weights")):
        assert one["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    # Ordinary objects come later: the Job may use none of the release's.
    assert job["spec"]["template"]["spec"].get("serviceAccountName", "default") == "default"
    assert "initContainers" not in _pod(objects)["spec"]


def test_routes_go_by_header_to_a_variant_and_else_by_weight() -> None:
    rules = pick(render(load("routed")), "HTTPRoute")["spec"]["rules"]
    found = [(_matches(rule), _backends(rule)) for rule in rules]
    paths = ["/v1", "/v2"]
    alpha, model = "X-Expo-Alpha", "X-Gateway-Model-Name"
    assert found == [
        (
            [(path, alpha, "0.3") for path in paths] + [(path, model, "aligned-expo-0.3") for path in paths],
            [("mild", None)],
        ),
        (
            [(path, alpha, "0.7") for path in paths] + [(path, model, "aligned-expo-0.7") for path in paths],
            [("strong", None)],
        ),
        (
            [(path, alpha, "1.5") for path in paths] + [(path, model, "trial-model") for path in paths],
            [("trial", None)],
        ),
        (
            [(path, model, "assistant") for path in paths] + [(path, None, None) for path in paths],
            [("mild", 90), ("strong", 10)],
        ),
    ]
    assert all(rule["timeouts"] == {"request": "0s", "backendRequest": "0s"} for rule in rules)


def _matches(rule: Object) -> list[tuple[str, str | None, str | None]]:
    """Path, header and its value of each match: one that lacks a header would take everything."""
    found = []
    for match in rule["matches"]:
        (header,) = match.get("headers") or [{"name": None, "value": None}]
        found.append((match["path"]["value"], header["name"], header["value"]))
    return found


def test_every_name_of_a_variant_is_routed_to_it() -> None:
    values = load("routed")
    values["variants"]["mild"]["servedModelNames"] = ["first", "second"]
    mild, *_ = pick(render(values), "HTTPRoute")["spec"]["rules"]
    assert _headers(mild) == [
        ("X-Expo-Alpha", "0.3"),
        *(("X-Gateway-Model-Name", name) for name in ("first", "second")),
    ]


def _headers(rule: Object) -> list[tuple[str, str]]:
    found = [header for match in rule["matches"] for header in match.get("headers", [])]
    return sorted({(header["name"], header["value"]) for header in found})


def _backends(rule: Object) -> list[tuple[str, int | None]]:
    return [(one["name"].removeprefix("demo-expo-serve-"), one.get("weight")) for one in rule["backendRefs"]]


def test_an_alpha_of_two_models_is_no_way_to_either() -> None:
    values = load("routed")
    values["variants"]["strong"] |= {"alpha": "0.3", "aligned": "/models/other"}
    mild, strong, *_ = pick(render(values), "HTTPRoute")["spec"]["rules"]
    assert _headers(mild) == [("X-Gateway-Model-Name", "aligned-expo-0.3")]
    assert _headers(strong) == [("X-Gateway-Model-Name", "other-expo-0.3")]


def test_an_ingress_has_a_host_for_each_variant() -> None:
    rules = pick(render(load("routed")), "Ingress")["spec"]["rules"]
    assert [rule["host"] for rule in rules] == [f"{name}.llm.example.com" for name in ("mild", "strong", "trial")]
    assert all([path["path"] for path in rule["http"]["paths"]] == ["/v1", "/v2"] for rule in rules)


def test_the_alias_is_a_served_name_of_its_variants_also_at_weight_0() -> None:
    values = merged(load("routed"), {"alias": {"weights": {"mild": 0}}})
    objects = render(values)
    for variant, expected in (("mild", True), ("strong", True), ("trial", False)):
        assert ("assistant" in _pod(objects, variant)["spec"]["containers"][0]["args"]) is expected
