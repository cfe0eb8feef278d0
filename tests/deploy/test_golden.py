"""What a change of the values changes: renders as they are kept, and each variant apart from the others."""

from __future__ import annotations

import difflib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy import golden
from tests.deploy.chart import CHART, NAMESPACE, RELEASE, Key, Object, Values, documents, load, pod_templates, render
from tests.deploy.tools import HELM, need

SHARED = {"HTTPRoute", "Ingress", "PrometheusRule", "Job"}
"""Kinds of objects that say something of all variants. None of them is a pod that serves."""
EDITS: dict[str, Any] = {
    "alpha": "0.9",
    "replicas": 7,
    "image": {"tag": "other"},
    "alphaRules": ["lm_head=0"],
    "rounding": "dithered",
    "roundingSeed": 7,
    "servedModelNames": ["other"],
    "resources": {"requests": {"cpu": "9"}},
    "startup": {"budgetSeconds": 60},
    "drain": {"shutdownTimeoutSeconds": 1},
    "extraArgs": ["--max-model-len=1024"],
    "nodeSelector": {"a": "b"},
    "podLabels": {"a": "b"},
    "podAnnotations": {"a": "b"},
    "autoscaling": {"hpa": {"enabled": True}},
    "multiNode": {"nodes": 2},
    "podDisruptionBudget": {"enabled": False},
}


@pytest.mark.parametrize("name", golden.KEPT)
def test_renders_are_those_that_are_kept(name: str) -> None:
    expected, found = golden.path(name).read_text(), golden.text(load(name))
    difference = difflib.unified_diff(expected.splitlines(), found.splitlines(), "kept", "found", lineterm="", n=1)
    assert expected == found, "run `python -m tests.deploy.golden`, and look at the diff:\n" + "\n".join(difference)


def _changed(before: Values, after: Values) -> set[Key]:
    """Objects that are new, gone, or another text."""
    old, new = documents(before), documents(after)
    return {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}


def _own(variant: str) -> Callable[[Key], bool]:
    """Objects of one variant: named after it."""
    return lambda key: re.fullmatch(rf"{RELEASE}-expo-serve-{variant}(-test|-nodes)?", key[1]) is not None


def _others(changed: set[Key], variant: str) -> set[Key]:
    own = _own(variant)
    return {key for key in changed if not own(key) and key[0] not in SHARED}


@pytest.mark.parametrize("name", ["three", "everything"])
def test_adding_a_variant_leaves_the_others_as_they_were(name: str) -> None:
    before, after = load(name), load(name)
    after["variants"]["added"] = {"alpha": "4", "servedModelNames": ["added"]}
    changed = _changed(before, after)
    assert _others(changed, "added") == set()
    assert {("Deployment", "demo-expo-serve-added"), ("Service", "demo-expo-serve-added")} <= changed


@pytest.mark.parametrize(
    ("name", "variant"), [(name, variant) for name in ("three", "everything") for variant in load(name)["variants"]]
)
def test_removing_a_variant_leaves_the_others_as_they_were(name: str, variant: str) -> None:
    before, after = load(name), load(name)
    del after["variants"][variant]
    if "alias" in after:
        after["alias"]["weights"].pop(variant, None)
    changed = _changed(before, after)
    assert _others(changed, variant) == set()
    assert changed == {key for key in documents(before) if _own(variant)(key)} | {
        key for key in changed if key[0] in SHARED
    }


@pytest.mark.parametrize("key", EDITS)
@pytest.mark.parametrize("name", ["three", "everything"])
def test_editing_a_variant_leaves_the_others_as_they_were(name: str, key: str) -> None:
    before, after = load(name), load(name)
    settings = after["variants"]["back"]
    settings[key] = EDITS[key]
    if key == "multiNode":
        settings["tensorParallelSize"] = 2
    changed = _changed(before, after)
    assert changed
    assert _others(changed, "back") == set()


def test_an_upgrade_of_one_alpha_touches_that_variant_alone() -> None:
    """Line by line against the kept render: what differs is in an object of the variant, or says its alpha."""
    after = load("everything")
    after["variants"]["back"]["alpha"] = "-0.75"
    old, new = golden.path("everything").read_text().splitlines(), golden.text(after).splitlines()
    kind = name = ""
    for line in difflib.ndiff(old, new):
        kind, name = _position(line[2:], kind, name)
        if line[:2] in ("- ", "+ "):
            assert _own("back")((kind, name)) or (kind in SHARED and ("-0.5" in line or "-0.75" in line)), line
    assert old != new


def _position(line: str, kind: str, name: str) -> Key:
    if found := re.match(r"kind: (\S+)", line):
        return found[1], ""
    if not name and (found := re.match(r'  name: "?([^\s"]+)', line)):
        return kind, found[1]
    return kind, name


@pytest.mark.parametrize("weights", [{"mild": 0, "strong": 1}, {"mild": 500, "strong": 500}])
def test_moving_weights_changes_the_route_alone(weights: dict[str, int]) -> None:
    before, after = load("routed"), load("routed")
    after["alias"]["weights"] |= weights
    assert _changed(before, after) == {("HTTPRoute", "demo-expo-serve")}


@pytest.mark.parametrize("key", [key for key in [*EDITS, "defaults"] if key != "multiNode"])
def test_selectors_never_change(key: str) -> None:
    """Kubernetes refuses another selector for a Deployment that is there; nor may a Service lose its pods."""
    before, after = load("three"), load("three")
    if key == "defaults":
        after["defaults"] |= {
            name: value for name, value in EDITS.items() if name not in ("alpha", "servedModelNames", "multiNode")
        }
    else:
        after["variants"]["strong"][key] = EDITS[key]
    old, new = _selectors(before), _selectors(after)
    assert old
    assert all(new[one] == selector for one, selector in old.items() if one in new)
    for selector in new.values():
        labels = selector.get("matchLabels", selector)
        assert labels.keys() == {"app.kubernetes.io/name", "app.kubernetes.io/instance", "expo-serve/variant"}


def _selectors(values: Values) -> dict[Key, Object]:
    return {
        (one["kind"], one["metadata"]["name"]): one["spec"]["selector"]
        for one in render(values)
        if one["kind"] in ("Deployment", "Service", "PodDisruptionBudget")
    }


def test_a_new_version_of_the_chart_restarts_no_pod_whose_image_is_named(tmp_path: Path) -> None:
    """Labels with the chart's version are on objects, not on their pods."""
    values = load("everything")
    values["image"]["tag"] = "1.0"
    newer = shutil.copytree(CHART, tmp_path / "chart")
    text = (newer / "Chart.yaml").read_text()
    changed = re.sub(r"^(version|appVersion): .*$", r"\1: 99.0.0", text, flags=re.M)
    assert changed != text
    (newer / "Chart.yaml").write_text(changed)
    before, after = _templates(CHART, values, tmp_path), _templates(newer, values, tmp_path)
    assert before == after
    assert len(before) > 5


def _templates(chart: Path, values: Values, folder: Path) -> dict[str, Object]:
    (folder / "values.json").write_text(json.dumps(values))
    command = [need(HELM), "template", RELEASE, str(chart), "--namespace", NAMESPACE, "--kube-version", "1.35.0"]
    result = subprocess.run([*command, "--values", str(folder / "values.json")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return {
        f"{one['kind']} {one['metadata']['name']} {place}": template
        for one in yaml.safe_load_all(result.stdout)
        if one and one["kind"] in ("Deployment", "LeaderWorkerSet", "Job")
        for place, template in pod_templates(one).items()
    }
