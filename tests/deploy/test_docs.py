"""What stands written about the chart is what it does: README, notes, schema and defaults name the same keys."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import expo_serve
from tests.deploy.chart import CHART
from tests.deploy.tools import HELM

THREE = CHART.parents[2] / "tests/deploy/values/three.yaml"


def readme_maker() -> Any:
    """deploy/helm/readme.py, which lies in no package."""
    spec = importlib.util.spec_from_file_location("readme", CHART.parent / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def differences(schema: dict[str, Any], values: dict[str, Any], root: dict[str, Any], prefix: str = "") -> set[str]:
    """Keys that one of the two knows alone, where the schema names the keys of a map."""
    found = {f"{prefix}{key}" for key in schema["properties"].keys() ^ values.keys()}
    for key in schema["properties"].keys() & values.keys():
        inner = schema["properties"][key]
        while "$ref" in inner:
            parts = inner["$ref"].removeprefix("#/").split("/")
            inner = functools.reduce(lambda node, part: node[part], parts, root)
        if "properties" in inner:
            found |= differences(inner, values[key], root, f"{prefix}{key}.")
    return found


def test_readme_has_the_table_of_now() -> None:
    """`make chart-docs` renews it."""
    readme = (CHART / "README.md").read_text()
    assert readme_maker().renewed(readme) == readme
    assert readme.count("\n| `defaults.") > 40


def test_a_value_without_description_is_an_error() -> None:
    rows = readme_maker().rows
    assert list(rows("# -- One\none: 1\n")) == [("one", 1, "One")]
    with pytest.raises(ValueError, match="two"):
        list(rows("# -- One\none: 1\n# plain\ntwo: 2\n"))


def test_schema_and_values_know_the_same_keys() -> None:
    """But for Helm's own ``global``, and what Kubernetes or the release's image fill in where it is not given."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    filled = {"global", "defaults.resources.limits"}
    filled |= {f"defaults.image.{key}" for key in values["image"]}
    assert differences(schema, values, schema) == filled


def test_chart_has_the_version_of_the_package() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == expo_serve.__version__


def notes(*arguments: str) -> str:
    """What `helm install` prints at its end."""
    command = [HELM, "install", "demo", str(CHART), "-n", "models", "--dry-run=client", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return result.stdout.split("NOTES:\n")[1]


def test_notes_have_a_row_and_a_curl_for_each_variant() -> None:
    text = notes("-f", str(THREE))
    variants = yaml.safe_load(THREE.read_text())["variants"]
    for name, variant in variants.items():
        alpha = variant["alpha"]
        row = next(line for line in text.splitlines() if line.startswith(f"{name} "))
        assert alpha in row.split()
        served = re.search(rf"^{name} +\S+ +([^ ,]+)", text, re.MULTILINE)
        assert served is not None
        curl = f"curl http://demo-expo-serve-{name}.models:8000/v1/chat/completions"
        call = next(line for line in text.split("\n  ") if line.startswith(curl))
        assert f"X-Expo-Alpha: {alpha}'" in call
        assert f'"model": "{served[1]}"' in text


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["-f", str(THREE)], "deployment/demo-expo-serve-back 9000"),
        (["-f", str(THREE), "--set", "status.port=9100"], "deployment/demo-expo-serve-back 9100"),
        (["-f", str(THREE.with_name("nodes-ray.yaml"))], "pod/demo-expo-serve-wide-nodes-0 9000"),
        (["-f", str(THREE), "--set", "status.port=null"], None),
    ],
)
def test_notes_say_how_to_watch_a_start(arguments: list[str], what: str | None) -> None:
    found = re.findall(r"^  kubectl -n models port-forward (.*)$", notes(*arguments), re.MULTILINE)
    assert found == ([what] if what else [])


def test_notes_of_nothing_say_what_to_do() -> None:
    assert "variants.mild.alpha=0.3" in notes()


def test_files_of_the_readme_exist() -> None:
    readme = CHART / "README.md"
    for link in re.findall(r"\]\((?!https?://)([^)]+)\)", readme.read_text()):
        assert Path(readme.parent, link).exists(), link
