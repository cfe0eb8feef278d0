"""Renders the chart with the real helm."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.tools import HELM, need

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy/helm/expo-serve"
VALUES = Path(__file__).parent / "values"
RELEASE = "demo"
NAMESPACE = "models"
KUBE_VERSION = "1.35.0"
"""What is rendered for, where a test says nothing else."""

Values = dict[str, Any]
Object = dict[str, Any]
Key = tuple[str, str]
"""Kind and name."""


class _Loader(yaml.CSafeLoader):
    """Refuses a key that stands twice in one map: helm lets it pass, and the last one would win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"keys that stand twice: {twice}", node.start_mark)
        return super().construct_mapping(node, deep)


# Kubernetes reads YAML in Go, where 1e3 is a number; here it would be a text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load(name: str) -> Values:
    """Values from ``tests/deploy/values``."""
    values: Values = yaml.load((VALUES / f"{name}.yaml").read_text(), _Loader)
    return values


def merged(under: Any, over: Any) -> Any:
    """Maps merged, all else replaced, as Helm does with one values file over another."""
    if not isinstance(under, dict) or not isinstance(over, dict):
        return over
    return {**under, **{key: merged(under.get(key), value) for key, value in over.items()}}


def names() -> list[str]:
    """Of all files there."""
    return sorted(path.stem for path in VALUES.glob("*.yaml"))


def render(
    values: Values | None = None,
    *arguments: str,
    release: str = RELEASE,
    namespace: str = NAMESPACE,
    kube_version: str | None = None,
) -> list[Object]:
    """All objects, hooks and tests among them."""
    result = template(values, *arguments, release=release, namespace=namespace, kube_version=kube_version)
    assert result.returncode == 0, result.stderr
    return copy.deepcopy([one for _, one in _split(result.stdout)])


def documents(
    values: Values | None = None,
    *arguments: str,
    release: str = RELEASE,
    namespace: str = NAMESPACE,
    kube_version: str | None = None,
) -> dict[Key, str]:
    """The text of each object, in the order of the render."""
    result = template(values, *arguments, release=release, namespace=namespace, kube_version=kube_version)
    assert result.returncode == 0, result.stderr
    texts = {(one["kind"], one["metadata"]["name"]): text for text, one in _split(result.stdout)}
    assert len(texts) == len(_split(result.stdout)), "an object is rendered twice"
    return texts


def refusal(values: Values, *arguments: str, release: str = RELEASE, kube_version: str | None = None) -> str:
    """Why helm does not render: the one reason, without helm's own words around it."""
    result = template(values, *arguments, release=release, kube_version=kube_version)
    assert result.returncode != 0, f"this was to be refused, and rendered {result.stdout.count('kind: ')} objects"
    assert not result.stdout
    reasons = re.findall(r"^ *- (at '.*)$|execution error at \(.*?\): (.*)$", result.stderr, re.M)
    assert len(reasons) == 1, f"expected one reason, found {len(reasons)}:\n{result.stderr}"
    return "".join(reasons[0])


def template(
    values: Values | None,
    *arguments: str,
    release: str = RELEASE,
    namespace: str = NAMESPACE,
    kube_version: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """``helm template``; a call that was made before is not made again."""
    command = [release, str(CHART), "--namespace", namespace, "--kube-version", kube_version or KUBE_VERSION]
    return _run(("template", *command, *arguments), json.dumps(values or {}))


def lint(values: Values | None) -> subprocess.CompletedProcess[str]:
    """``helm lint --strict``."""
    command = ("lint", "--strict", str(CHART), "--namespace", NAMESPACE, "--kube-version", KUBE_VERSION)
    return _run(command, json.dumps(values or {}))


@functools.cache
def _run(command: tuple[str, ...], values: str) -> subprocess.CompletedProcess[str]:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(values)
        file.flush()
        whole = [need(HELM), *command, "--values", file.name]
        try:
            # Hundreds of short runs: Go need not tidy up as often as it does.
            environment = os.environ | {"GOGC": "400"}
            return subprocess.run(whole, capture_output=True, text=True, timeout=60, env=environment)
        except subprocess.TimeoutExpired:
            pytest.fail(f"helm {command[0]} took over a minute")


@functools.cache
def _split(stream: str) -> list[tuple[str, Object]]:
    """Each object's text and what it says."""
    texts = re.split(r"^---\n(?:# Source: .*\n)?", stream, flags=re.M)
    loaded = [(text, yaml.load(text, _Loader)) for text in texts]
    return [(text, one) for text, one in loaded if one]


def pick(objects: list[Object], kind: str, ending: str = "") -> Object:
    """The one object of this kind whose name ends so."""
    found = [one for one in objects if one["kind"] == kind and one["metadata"]["name"].endswith(ending)]
    assert len(found) == 1, [(one["kind"], one["metadata"]["name"]) for one in objects]
    return found[0]


def pod_templates(one: Object) -> dict[str, Object]:
    """Pod templates of an object by their place in it; a Pod is its own."""
    spec = one.get("spec", {})
    match one["kind"]:
        case "Pod":
            return {"pod": one}
        case "Deployment" | "Job":
            return {"template": spec["template"]}
        case "LeaderWorkerSet":
            group = spec["leaderWorkerTemplate"]
            return {name: group[name] for name in ("leaderTemplate", "workerTemplate")}
    return {}
