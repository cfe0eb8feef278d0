"""Objects against the schemas of Kubernetes, and of the custom resources that the chart makes.

Kubernetes' own are those of kubernetes-validate, strict: a field that it does not know is a problem. Those of the
custom resources lie in ``crds``, kept small. In one process, each file read once, it takes seconds, not minutes.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from referencing import Registry, Resource

from tests.deploy.chart import Object
from tests.deploy.install import FOLDER

VERSIONS = ("1.29", "1.30", "1.31", "1.32", "1.33", "1.34", "1.35")
CRDS = Path(__file__).parent / "crds"


def problems(one: Object, version: str) -> list[str]:
    """What is wrong with the object, a line for each."""
    validator = _validator(one["kind"], one["apiVersion"], version)
    if validator is None:
        return [f"no schema of {one['kind']} in {one['apiVersion']} for Kubernetes {version}"]
    found = sorted(validator.iter_errors(one), key=lambda error: list(map(str, error.absolute_path)))
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:300]}" for error in found]


@functools.cache
def _validator(kind: str, api_version: str, version: str) -> Draft202012Validator | None:
    """apps/v1 and Deployment are deployment-apps-v1.json; networking.k8s.io/v1 is networking-v1."""
    short = re.sub(r"^([^./]*)(\.[^/]*)?/", r"\1-", api_version)
    own, custom = _schemas() / f"v{version}.0-local-strict/{kind.lower()}-{short}.json", CRDS / f"{kind.lower()}.json"
    for path in (own, custom):
        if path.exists():
            return Draft202012Validator(_read(path), registry=_registry(version))
    return None


@functools.cache
def _registry(version: str) -> Registry[Any]:
    files = [_schemas() / f"v{version}.0-local-strict/_definitions.json", *CRDS.glob("*.json")]
    resources: list[Resource[Any]] = [Resource.from_contents(_read(path)) for path in files]
    registry: Registry[Any] = resources @ Registry()
    return registry.crawl()


@functools.cache
def _schemas() -> Path:
    found = list(FOLDER.glob("venv/lib/python*/site-packages/kubernetes_validate/kubernetes-json-schema"))
    if not found:
        pytest.fail("kubernetes-validate is not in .deploy: run `make test`")
    return found[0]


def _read(path: Path) -> Any:
    return json.loads(path.read_text())
