"""Every pod of every render passes Pod Security "restricted" and our own rules, and each rule can fail."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.deploy.chart import Object, load, names, pick, pod_templates, render
from tests.deploy.podsecurity import lapses, violations

HOST_PATH = ["volume weights is hostPath"]
"""Asked for by name, and said to be so in values.yaml."""
SECRETS = {"api": {"VLLM_API_KEY"}, "hub": {"HF_TOKEN"}, "proxy": {"PROXY_PASSWORD"}}
"""Names of secrets in the values files, and the variables that may hold them."""


@pytest.mark.parametrize("name", names())
def test_every_pod_is_restricted(name: str) -> None:
    templates = _templates(name)
    assert templates or name == "none"
    for place, template in templates.items():
        expected = HOST_PATH if name == "host-path" and "Deployment" in place else []
        assert violations(template) == expected, place
        assert lapses(template) == [], place


def _templates(name: str) -> dict[str, Object]:
    return {
        f"{one['kind']} {one['metadata']['name']} {place}": template
        for one in render(load(name))
        for place, template in pod_templates(one).items()
    }


def test_all_kinds_of_pods_are_looked_at() -> None:
    kinds = {key.split()[0] for key in _templates("everything")}
    assert kinds == {"Deployment", "LeaderWorkerSet", "Job", "Pod"}


def _first(template: Object) -> Object:
    container: Object = template["spec"]["containers"][0]
    return container


def _security(**changes: Any) -> Callable[[Object], None]:
    return lambda template: _first(template)["securityContext"].update(changes)


def _pod_security(**changes: Any) -> Callable[[Object], None]:
    return lambda template: template["spec"]["securityContext"].update(changes)


def _spec(**changes: Any) -> Callable[[Object], None]:
    return lambda template: template["spec"].update(changes)


def _volume(**kind: Any) -> Callable[[Object], None]:
    return lambda template: template["spec"]["volumes"].append({"name": "added", **kind})


def _drop(key: str) -> Callable[[Object], None]:
    return lambda template: _first(template)["securityContext"].pop(key)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_spec(hostNetwork=True), "hostNetwork is set"),
        (_spec(hostPID=True), "hostPID is set"),
        (_spec(hostIPC=True), "hostIPC is set"),
        (_volume(hostPath={"path": "/"}), "volume added is hostPath"),
        (_volume(nfs={"server": "a", "path": "/"}), "volume added is nfs"),
        (_pod_security(runAsUser=0), "runs as root"),
        (_pod_security(sysctls=[{"name": "kernel.msgmax", "value": "1"}]), "sysctl kernel.msgmax"),
        (_pod_security(seccompProfile={"type": "Unconfined"}), "seccompProfile is Unconfined"),
        (lambda template: template["spec"]["securityContext"].pop("seccompProfile"), "no seccompProfile"),
        (_pod_security(appArmorProfile={"type": "Unconfined"}), "appArmorProfile is Unconfined"),
        (_pod_security(windowsOptions={"hostProcess": True}), "Windows host"),
        (_security(seLinuxOptions={"type": "spc_t"}), "seLinuxOptions"),
        (_security(runAsNonRoot=False), "runAsNonRoot is false"),
        (_security(runAsUser=0), "runs as root"),
        (_security(privileged=True), "privileged"),
        (_security(procMount="Unmasked"), "procMount Unmasked"),
        (_security(allowPrivilegeEscalation=True), "allowPrivilegeEscalation is not false"),
        (_drop("allowPrivilegeEscalation"), "allowPrivilegeEscalation is not false"),
        (_drop("capabilities"), "ALL is not dropped"),
        (_security(capabilities={"drop": ["ALL"], "add": ["SYS_PTRACE"]}), "['SYS_PTRACE'] added"),
        (lambda template: _first(template)["ports"][0].update(hostPort=80), "a port of the host"),
        (lambda template: _first(template)["livenessProbe"]["httpGet"].update(host="10.0.0.1"), "another host"),
        (
            lambda template: template["metadata"]["annotations"].update(
                {"container.apparmor.security.beta.kubernetes.io/server": "unconfined"}
            ),
            "turns AppArmor off",
        ),
        (
            lambda template: template["spec"].update(initContainers=[{"name": "first"}]),
            "first: allowPrivilegeEscalation is not false",
        ),
    ],
)
def test_each_rule_of_the_standard_can_fail(spoil: Callable[[Object], None], words: str) -> None:
    template = copy.deepcopy(pick(render(load("one")), "Deployment")["spec"]["template"])
    assert violations(template) == []
    spoil(template)
    assert words in "\n".join(violations(template))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_spec(automountServiceAccountToken=True), "automountServiceAccountToken is not false"),
        (lambda template: template["spec"].pop("enableServiceLinks"), "enableServiceLinks is not false"),
        (_security(readOnlyRootFilesystem=False), "readOnlyRootFilesystem is not true"),
        (lambda template: template["spec"]["securityContext"].pop("runAsUser"), "no numeric user"),
        (lambda template: _first(template)["resources"]["requests"].pop("memory"), "no memory in requests"),
        (lambda template: _first(template)["resources"].pop("limits"), "no memory in limits"),
        (lambda template: _first(template)["args"].append("--api-key=abc"), "a secret in the command line"),
        (lambda template: _first(template)["env"].append({"name": "HF_TOKEN", "value": "hf_x"}), "in plain text"),
        (_volume(emptyDir={}), "emptyDir without a size"),
    ],
)
def test_each_rule_of_ours_can_fail(spoil: Callable[[Object], None], words: str) -> None:
    template = copy.deepcopy(pick(render(load("one")), "Deployment")["spec"]["template"])
    assert lapses(template) == []
    spoil(template)
    assert words in "\n".join(lapses(template))


@pytest.mark.parametrize("name", ["everything", "hub-job", "nodes-ray", "routed"])
def test_secrets_come_by_reference_and_only_where_they_are_needed(name: str) -> None:
    """The name of a secret stands in secretKeyRef and nowhere else; the hub's token only in the download."""
    for place, template in _templates(name).items():
        for container in [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]:
            references = {
                variable["name"]: variable["valueFrom"]["secretKeyRef"]["name"]
                for variable in container.get("env", [])
                if "secretKeyRef" in variable.get("valueFrom", {})
            }
            assert all(variable in SECRETS[secret] for variable, secret in references.items()), place
            assert ("HF_TOKEN" in references) == (place.startswith("Job") and name != "nodes-ray"), place
        assert "secretName" not in json.dumps(template), place


@pytest.mark.parametrize("name", ["everything", "nodes-ray", "routed"])
def test_the_api_key_reaches_those_who_ask_and_answer(name: str) -> None:
    """Every server and every test pod has it, a download and a waiting container have not."""
    expected = {"name": "api", "key": "token" if name == "routed" else "api-key"}
    for place, template in _templates(name).items():
        key = [
            variable["valueFrom"]["secretKeyRef"]
            for container in [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]
            for variable in container.get("env", [])
            if variable["name"] == "VLLM_API_KEY"
        ]
        if place.startswith("Job"):
            assert key == []
        elif not place.endswith("workerTemplate"):
            assert key == [expected], place


def test_the_users_number_can_be_another_but_never_root() -> None:
    values = load("one")
    values["securityContext"] = {"runAsUser": 2000, "runAsGroup": 3000, "fsGroup": 4000}
    for one in render(values):
        for template in pod_templates(one).values():
            assert violations(template) == []
            context = template["spec"]["securityContext"]
            assert (context["runAsUser"], context["runAsGroup"], context["fsGroup"]) == (2000, 3000, 4000)


@pytest.mark.parametrize("name", names())
def test_every_server_and_download_is_under_a_network_policy(name: str) -> None:
    """One policy for each pod, for both directions; helm's test pods are of no policy, since only tests run in them."""
    objects = render(load(name))
    policies = [one["spec"] for one in objects if one["kind"] == "NetworkPolicy"]
    for one in objects:
        for place, template in pod_templates(one).items():
            if one["kind"] == "Pod" or name == "service-monitor":
                continue
            labels = template["metadata"]["labels"].items()
            found = [policy for policy in policies if policy["podSelector"]["matchLabels"].items() <= labels]
            assert len(found) == 1, (one["metadata"]["name"], place)
            assert found[0]["policyTypes"] == ["Ingress", "Egress"]
            assert all(rule for rule in [*found[0].get("ingress", []), *found[0]["egress"]]), "a rule without a limit"
