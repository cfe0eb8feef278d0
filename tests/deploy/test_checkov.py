"""checkov finds nothing in the renders but what ``checkov.yaml`` lists with a reason."""

from __future__ import annotations

import json
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.chart import Object, load, names, pod_templates, render
from tests.deploy.tools import CHECKOV, need

EXCEPTIONS = Path(__file__).with_name("checkov.yaml")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run over all renders: starting costs more than scanning."""
    folder = tmp_path_factory.mktemp("renders")
    for name in names():
        objects = [one for given in render(load(name)) for one in _known(given)]
        (folder / f"{name}.yaml").write_text(yaml.safe_dump_all(objects))
    # What is refused by our own rules, and must be found here too.
    bad = render(load("one"))
    for one in bad:
        for template in pod_templates(one).values():
            template["spec"] |= {"hostNetwork": True}
    (folder / "bad.yaml").write_text(yaml.safe_dump_all(bad))
    words = ["-d", str(folder), "--framework", "kubernetes", "--output", "json", "--compact", "--quiet"]
    result = subprocess.run([need(CHECKOV), *words, "--skip-download"], capture_output=True, text=True, timeout=120)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def _known(one: Object) -> list[Object]:
    """checkov does not know a LeaderWorkerSet: its leader and workers are shown to it as Deployments."""
    if one["kind"] != "LeaderWorkerSet":
        return [one]
    return [
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": one["metadata"] | {"name": f"{one['metadata']['name']}-{place}"},
            "spec": {"selector": {"matchLabels": template["metadata"]["labels"]}, "template": template},
        }
        for place, template in pod_templates(one).items()
    ]


def _failed(report: dict[str, Any]) -> dict[str, set[tuple[str, str]]]:
    """Check to the kinds and names that fail it, in the renders as they are."""
    found = defaultdict(set)
    for check in report["results"]["failed_checks"]:
        kind, _, name = check["resource"].split(".")[:3]
        if check["file_path"] != "/bad.yaml":
            found[check["check_id"]].add(("Worker" if name.endswith("-workerTemplate") else kind, name))
    return found


def test_nothing_fails_but_what_has_a_reason(report: dict[str, Any]) -> None:
    exceptions = yaml.safe_load(EXCEPTIONS.read_text())
    assert report["summary"]["parsing_errors"] == 0
    assert report["summary"]["passed"] > 1000
    found = [
        f"{check}: {kind} {name}"
        for check, objects in _failed(report).items()
        for kind, name in objects
        if kind not in exceptions.get(check, {}).get("kinds", [])
    ]
    assert sorted(found) == []


def test_every_exception_is_needed_and_has_a_reason(report: dict[str, Any]) -> None:
    failed = _failed(report)
    for check, exception in yaml.safe_load(EXCEPTIONS.read_text()).items():
        assert len(exception["reason"].split()) > 5, check
        assert set(exception["kinds"]) == {kind for kind, _ in failed[check]}, check


def test_it_does_find_what_is_wrong(report: dict[str, Any]) -> None:
    failed = [check for check in report["results"]["failed_checks"] if check["file_path"] == "/bad.yaml"]
    assert "CKV_K8S_19" in {check["check_id"] for check in failed}, "hostNetwork"
