"""What an API server or a cluster would refuse and no schema says: names, labels, references from object to object."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from tests.deploy.chart import Object, pod_templates

_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)(m|k|M|G|T|Ki|Mi|Gi|Ti)?")
_UNITS = {"m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_UNITS |= {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_LONGEST = {"Service": 63, "Pod": 63, "Deployment": 63, "Job": 63, "LeaderWorkerSet": 52}
"""A Deployment's name is a label of its pods in some tools, a Job's and a LeaderWorkerSet's (with a hash) always."""
_WORKER_INDEX = {"leaderTemplate": {"leaderworkerset.sigs.k8s.io/worker-index": "0"}}
"""Labels that the LeaderWorkerSet's controller adds."""


def mismatches(objects: list[Object], namespace: str) -> list[str]:
    """What is wrong with the objects of one release, a line for each."""
    found: list[str] = []
    for one in objects:
        lines = [*_metadata(one, namespace), *_nulls(one), *_references(one, objects)]
        for place, template in pod_templates(one).items():
            lines += [f"{place}: {line}" for line in _pod(template)]
        found += [f"{one['kind']} {one['metadata']['name']}: {line}" for line in lines]
    return found


def quantity(value: Any) -> float:
    """What a quantity such as 1.5Gi amounts to."""
    match = _QUANTITY.fullmatch(str(value))
    assert match, f"{value!r} is no quantity"
    return float(match[1]) * _UNITS[match[2] or ""]


def selects(selector: dict[str, str], labels: dict[str, str]) -> bool:
    """Whether every label that is asked for is there."""
    return selector.items() <= labels.items()


def selected(selector: dict[str, str], objects: list[Object]) -> list[str]:
    """`kind/name/place` of the pod templates that the selector finds, tests of helm left out."""
    return [
        f"{one['kind']}/{one['metadata']['name']}/{place}"
        for one in objects
        for place, template in pod_templates(one).items()
        if selects(selector, {**template["metadata"].get("labels", {}), **_WORKER_INDEX.get(place, {})})
    ]


def _metadata(one: Object, namespace: str) -> Iterator[str]:
    metadata, kind = one["metadata"], one["kind"]
    name = metadata["name"]
    pattern = _DNS_LABEL if kind in ("Service", "LeaderWorkerSet") else _SUBDOMAIN
    if not pattern.fullmatch(name) or len(name) > _LONGEST.get(kind, 253):
        yield f"{name!r} ({len(name)} characters) is no name for it"
    if metadata.get("namespace") != namespace:
        yield f"namespace {metadata.get('namespace')!r}"
    yield from _labels(metadata)
    if not {"app.kubernetes.io/name", "app.kubernetes.io/instance"} <= metadata.get("labels", {}).keys():
        yield "the common labels are not all there"


def _labels(metadata: Object) -> Iterator[str]:
    for key, value in metadata.get("labels", {}).items():
        if not _LABEL_KEY.fullmatch(key) or not isinstance(value, str) or not _LABEL_VALUE.fullmatch(value):
            yield f"label {key}: {value!r}"
    for key, value in metadata.get("annotations", {}).items():
        if not _LABEL_KEY.fullmatch(key) or not isinstance(value, str):
            yield f"annotation {key}: {value!r}"


def _nulls(value: Any, path: str = "") -> Iterator[str]:
    """A template that left a value out leaves a null, which schemas let pass."""
    if value is None:
        yield f"{path} is null"
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in inside:
        yield from _nulls(below, f"{path}.{key}")


def _pod(template: Object) -> Iterator[str]:
    yield from _labels(template["metadata"])
    spec = template["spec"]
    volumes = [volume["name"] for volume in spec.get("volumes", [])]
    containers = [*spec.get("initContainers", []), *spec["containers"]]
    mounted = {mount["name"] for container in containers for mount in container.get("volumeMounts", [])}
    yield from _twice("volume", volumes)
    yield from _twice("container", [container["name"] for container in containers])
    if mounted != set(volumes):
        yield f"volumes {sorted(volumes)} but mounted {sorted(mounted)}"
    for container in containers:
        yield from (f"{container['name']}: {line}" for line in _container(container))


def _container(container: Object) -> Iterator[str]:
    ports = [port.get("name") for port in container.get("ports", [])]
    yield from _twice("env", [one["name"] for one in container.get("env", [])])
    yield from _twice("mount", [one["mountPath"] for one in container.get("volumeMounts", [])])
    yield from _twice("port", ports)
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        port = container.get(probe, {}).get("httpGet", {}).get("port")
        if port is not None and port not in ports:
            yield f"{probe} asks port {port!r}, there are {ports}"
    resources = container.get("resources", {})
    for name, limit in resources.get("limits", {}).items():
        request = resources.get("requests", {}).get(name, limit)
        if quantity(request) > quantity(limit):
            yield f"{name}: the request {request} is over the limit {limit}"
        if "/" in name and quantity(request) != quantity(limit):
            yield f"{name}: an extended resource has one number, found {request} and {limit}"


def _twice(what: str, names: list[Any]) -> Iterator[str]:
    """The API server merges these lists by name: one that stands twice is refused, or replaces the first."""
    yield from (f"{what} {name!r} stands {count} times" for name, count in Counter(names).items() if count > 1)


def _references(one: Object, objects: list[Object]) -> Iterator[str]:
    spec: Object = one.get("spec", {})
    services = {other["metadata"]["name"]: other for other in objects if other["kind"] == "Service"}
    match one["kind"]:
        case "Deployment":
            if not selects(spec["selector"]["matchLabels"], spec["template"]["metadata"]["labels"]):
                yield "its selector does not find its pods"
        case "Service":
            if len(found := selected(spec["selector"], objects)) != 1:
                yield f"finds {found}"
            yield from _target_ports(spec, objects)
        case "PodDisruptionBudget":
            # All pods of a group: without one of them the others are of no use.
            if len({one.rpartition("/")[0] for one in selected(spec["selector"]["matchLabels"], objects)}) != 1:
                yield f"finds {selected(spec['selector']['matchLabels'], objects)}"
        case "NetworkPolicy":
            if not selected(spec["podSelector"]["matchLabels"], objects):
                yield "finds no pod"
        case "HorizontalPodAutoscaler" | "ScaledObject":
            yield from _scaled(spec["scaleTargetRef"], objects)
        case "HTTPRoute":
            for backend in (backend for rule in spec["rules"] or () for backend in rule["backendRefs"]):
                service = services.get(backend["name"])
                if not service or backend["port"] not in [port["port"] for port in service["spec"]["ports"]]:
                    yield f"no Service {backend['name']} with port {backend['port']}"
        case "Ingress":
            for backend in (
                path["backend"]["service"] for rule in spec["rules"] or () for path in rule["http"]["paths"]
            ):
                service = services.get(backend["name"])
                if not service or backend["port"]["name"] not in [port["name"] for port in service["spec"]["ports"]]:
                    yield f"no Service {backend['name']} with port {backend['port']}"
        case "LeaderWorkerSet":
            own = spec.get("networkConfig", {}).get("subdomainPolicy") == "UniquePerReplica"
            if one["metadata"]["name"] in services and not own:
                yield "its controller needs a headless Service of its name, and finds another one there"


def _target_ports(service: Object, objects: list[Object]) -> Iterator[str]:
    """A named port that a pod does not have leaves the pod out of the Service's endpoints."""
    for one in objects:
        for place, template in pod_templates(one).items():
            labels = {**template["metadata"].get("labels", {}), **_WORKER_INDEX.get(place, {})}
            if selects(service["selector"], labels):
                there = [port["name"] for port in template["spec"]["containers"][0].get("ports", [])]
                wanted = [port["targetPort"] for port in service["ports"]]
                yield from (f"no port {name!r} in {one['metadata']['name']}" for name in wanted if name not in there)


def _scaled(target: Object, objects: list[Object]) -> Iterator[str]:
    key = target["apiVersion"], target["kind"], target["name"]
    found = [one for one in objects if (one["apiVersion"], one["kind"], one["metadata"]["name"]) == key]
    if not found:
        yield f"nothing to scale: {key}"
    if any("replicas" in one["spec"] for one in found):
        yield "its target says a number of replicas itself, and each upgrade would undo the scaling"
