"""The Dockerfile by hadolint, and against what the chart takes for granted. `make test-kube` builds the image."""

from __future__ import annotations

import json
import re
import subprocess

import pytest
import yaml

from tests.deploy.chart import CHART, ROOT, load, pick, render
from tests.deploy.tools import HADOLINT, need

DOCKERFILE = ROOT / "deploy/docker/Dockerfile"


def _lint(text: str) -> list[str]:
    command = [need(HADOLINT), "--no-fail", "--format", "json", "-"]
    result = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=True)
    return [f"{one['code']} line {one['line']}: {one['message']}" for one in json.loads(result.stdout)]


def test_hadolint_has_nothing_to_say() -> None:
    assert _lint(DOCKERFILE.read_text()) == []


@pytest.mark.parametrize(
    ("line", "code"), [("RUN sudo true", "DL3004"), ("USER root", "DL3002"), ("CMD run it", "DL3025")]
)
def test_hadolint_finds_what_is_wrong(line: str, code: str) -> None:
    assert any(code in found for found in _lint(f"{DOCKERFILE.read_text()}\n{line}\n"))


def test_every_ignored_rule_has_a_reason() -> None:
    lines = DOCKERFILE.read_text().splitlines()
    ignored = [number for number, line in enumerate(lines) if "hadolint ignore" in line]
    assert all(re.match(r"# \w.{30,}", lines[number - 1]) for number in ignored)


def test_image_and_chart_agree() -> None:
    """User, port, folders and entry point: the chart mounts and sets what the image expects."""
    text = re.sub(r"\\\n\s*", "", DOCKERFILE.read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    user = values["securityContext"]
    assert re.findall(r"^USER (.*)$", text, re.M)[-1] == f"{user['runAsUser']}:{user['runAsGroup']}"
    assert re.findall(r"^EXPOSE (\d+)$", text, re.M) == [str(values["service"]["port"])]
    assert re.findall(r"^HEALTHCHECK (.*)$", text, re.M) == ["NONE"]
    entry = json.loads(re.findall(r"^ENTRYPOINT (.*)$", text, re.M)[-1])
    assert entry[-1] == "expo-serve"
    in_image = dict(word.split("=", 1) for line in re.findall(r"^ENV (.*)$", text, re.M) for word in line.split())
    container = pick(render(load("one")), "Deployment")["spec"]["template"]["spec"]["containers"][0]
    in_chart = {one["name"]: one["value"] for one in container["env"] if "value" in one}
    shared = in_image.keys() & in_chart.keys()
    assert {name: in_image[name] for name in shared} == {name: in_chart[name] for name in shared}
    mounted = [mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")]
    folders = [value for name, value in in_image.items() if name.endswith(("HOME", "ROOT", "DIR", "BASE"))]
    assert len(folders) > 3
    assert all(any(f"{folder}/".startswith(f"{path}/") for path in mounted) for folder in folders), (
        "read-only at run time"
    )
