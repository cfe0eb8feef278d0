"""The rules of Pod Security "restricted" (with "baseline", which it contains), and those that this project adds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tests.deploy.chart import Object

_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
_VOLUMES |= {"image"}
"""Image volumes are allowed from Kubernetes 1.33 on; before it the chart does not render them."""
_SYSCTLS = {
    "kernel.shm_rmid_forced",
    *(f"net.ipv4.ip_{name}" for name in ("local_port_range", "unprivileged_port_start", "local_reserved_ports")),
    *(f"net.ipv4.tcp_{name}" for name in ("syncookies", "keepalive_time", "keepalive_intvl", "keepalive_probes")),
    *("net.ipv4.ping_group_range", "net.ipv4.tcp_fin_timeout", "net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem"),
}
_SELINUX = {None, "", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}
_SECRET_NAME = re.compile(r"key|token|password|passwd|secret|credential", re.I)
_SECRET_FLAG = re.compile(r"--?(api[-_]key|hf[-_]token|token|password)\b")


def violations(template: Object) -> list[str]:
    """Where a pod template breaks "restricted"."""
    spec = template["spec"]
    found = [*_pod(spec), *_annotations(template["metadata"])]
    for container in _containers(spec):
        found += [f"{container['name']}: {line}" for line in _container(container, spec.get("securityContext", {}))]
    return found


def lapses(template: Object) -> list[str]:
    """Where a pod template breaks what this project asks for beyond it."""
    spec = template["spec"]
    switches = ("automountServiceAccountToken", "enableServiceLinks")
    found = [f"{key} is not false" for key in switches if spec.get(key) is not False]
    unlimited = [volume["name"] for volume in spec.get("volumes", []) if volume.get("emptyDir") == {}]
    found += [f"volume {name}: emptyDir without a size" for name in unlimited]
    if not spec.get("securityContext", {}).get("runAsUser"):
        found.append("no numeric user")
    for container in _containers(spec):
        found += [f"{container['name']}: {line}" for line in _hardened(container)]
    return found


def _containers(spec: Object) -> list[Object]:
    return [one for key in ("initContainers", "containers", "ephemeralContainers") for one in spec.get(key, [])]


def _pod(spec: Object) -> Iterator[str]:
    context = spec.get("securityContext", {})
    yield from (f"{key} is set" for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key))
    for volume in spec.get("volumes", []):
        kinds = volume.keys() - {"name"}
        if len(kinds) != 1 or not kinds <= _VOLUMES:
            yield f"volume {volume['name']} is {', '.join(sorted(kinds)) or 'of no kind'}"
    for sysctl in context.get("sysctls", []):
        if sysctl["name"] not in _SYSCTLS:
            yield f"sysctl {sysctl['name']}"
    yield from _context(context)


def _annotations(metadata: Object) -> Iterator[str]:
    for key, value in metadata.get("annotations", {}).items():
        if key.startswith("container.apparmor.security.beta.kubernetes.io/") and value == "unconfined":
            yield "an annotation turns AppArmor off"


def _context(context: Object) -> Iterator[str]:
    """What pods and containers may say alike."""
    if context.get("runAsUser") == 0:
        yield "runs as root"
    if context.get("runAsNonRoot") is False:
        yield "runAsNonRoot is false"
    for key in ("seccompProfile", "appArmorProfile"):
        if context.get(key, {}).get("type") == "Unconfined":
            yield f"{key} is Unconfined"
    selinux = context.get("seLinuxOptions", {})
    if selinux.get("type") not in _SELINUX or selinux.get("user") or selinux.get("role"):
        yield f"seLinuxOptions {selinux}"
    if context.get("windowsOptions", {}).get("hostProcess"):
        yield "a process of a Windows host"


def _container(container: Object, pod: Object) -> Iterator[str]:
    context: Object = container.get("securityContext", {})
    yield from _context(context)
    if not context.get("runAsNonRoot", pod.get("runAsNonRoot")):
        yield "runAsNonRoot is not true"
    seccomp: Object = {**pod, **context}.get("seccompProfile", {})
    if seccomp.get("type") not in ("RuntimeDefault", "Localhost"):
        yield "no seccompProfile"
    if context.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation is not false"
    if context.get("privileged"):
        yield "privileged"
    if "ALL" not in context.get("capabilities", {}).get("drop", []):
        yield "capabilities: ALL is not dropped"
    if added := set(context.get("capabilities", {}).get("add", [])) - {"NET_BIND_SERVICE"}:
        yield f"capabilities: {sorted(added)} added"
    if context.get("procMount") not in (None, "Default"):
        yield f"procMount {context['procMount']}"
    if any(port.get("hostPort") for port in container.get("ports", [])):
        yield "a port of the host"
    if any(handler.get("host") for handler in _handlers(container)):
        yield "a probe or hook of another host"


def _handlers(container: Object) -> Iterator[Object]:
    hooks = container.get("lifecycle", {})
    owners = [container.get(f"{name}Probe", {}) for name in ("startup", "readiness", "liveness")]
    for owner in [*owners, hooks.get("postStart", {}), hooks.get("preStop", {})]:
        yield from (owner[kind] for kind in ("httpGet", "tcpSocket") if kind in owner)


def _hardened(container: Object) -> Iterator[str]:
    if container.get("securityContext", {}).get("readOnlyRootFilesystem") is not True:
        yield "readOnlyRootFilesystem is not true"
    resources = container.get("resources", {})
    for kind in ("requests", "limits"):
        if "memory" not in resources.get(kind, {}):
            yield f"no memory in {kind}"
    for variable in container.get("env", []):
        if "value" in variable and _SECRET_NAME.search(variable["name"]):
            yield f"{variable['name']} stands in plain text"
    words: list[Any] = [*container.get("command", []), *container.get("args", [])]
    for word in words:
        if _SECRET_FLAG.search(str(word)):
            yield f"a secret in the command line: {word}"
