"""Every key of values.yaml has an effect, and nothing invalid or insecure comes of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy import chart, refusals, schemas
from tests.deploy.chart import CHART, NAMESPACE, Values, documents, merged, refusal, render
from tests.deploy.consistency import mismatches
from tests.deploy.podsecurity import violations

OPTIONS: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("options.yaml").read_text())
SWITCHES: dict[str, tuple[set[str], set[str]]] = {
    "defaults.allowPickleIndex": (set(), set()),
    "defaults.podDisruptionBudget.enabled": (set(), {"PodDisruptionBudget"}),
    "defaults.autoscaling.hpa.enabled": ({"HorizontalPodAutoscaler"}, set()),
    "defaults.autoscaling.keda.enabled": ({"ScaledObject"}, set()),
    "weights.volume.claim.create": ({"PersistentVolumeClaim"}, set()),
    "weights.download.enabled": ({"Job"}, set()),
    "serviceAccount.create": (set(), {"ServiceAccount"}),
    "networkPolicy.enabled": (set(), {"NetworkPolicy"}),
    "monitoring.podMonitor.enabled": ({"PodMonitor"}, set()),
    "monitoring.serviceMonitor.enabled": ({"ServiceMonitor"}, set()),
    "monitoring.rules.enabled": ({"PrometheusRule"}, set()),
    "monitoring.dashboard.enabled": ({"ConfigMap"}, set()),
    "route.enabled": ({"HTTPRoute"}, set()),
    "ingress.enabled": ({"Ingress"}, set()),
    "tests.enabled": (set(), {"Pod"}),
    "allowMutableRevisions": (set(), set()),
}
"""Switch to the kinds of objects that turning it over brings and takes away."""


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, below in value.items():
            yield from _leaves(below, f"{path}.{key}" if path else key)
    else:
        yield path, value


def _before(path: str) -> Values:
    two = {"variants": {"a": {"alpha": "0.5"}, "b": {"alpha": "1"}}}
    values: Values = merged(merged(refusals.ONE, two), OPTIONS[path].get("with", {}))
    return values


def _after(path: str) -> Values:
    change = OPTIONS[path]["to"]
    for key in reversed(path.split(".")):
        change = {key: change}
    values: Values = merged(_before(path), change)
    return values


def test_every_key_is_tried() -> None:
    defaults = dict(_leaves(yaml.safe_load((CHART / "values.yaml").read_text())))
    assert defaults.keys() == OPTIONS.keys()
    assert {path for path, value in defaults.items() if isinstance(value, bool)} == SWITCHES.keys()


@pytest.mark.parametrize("path", OPTIONS)
def test_every_key_has_an_effect_that_is_valid(path: str) -> None:
    if OPTIONS[path].get("refused"):
        refusal(_before(path))
    else:
        assert documents(_before(path)) != documents(_after(path))
    objects = render(_after(path))
    assert [line for one in objects for line in schemas.problems(one, "1.35")] == []
    assert mismatches(objects, NAMESPACE) == []
    broken = {line for one in objects for part in chart.pod_templates(one).values() for line in violations(part)}
    assert broken <= ({"volume weights is hostPath"} if path.endswith("hostPath") else set())


@pytest.mark.parametrize("path", [path for path in SWITCHES if not OPTIONS[path].get("refused")])
def test_a_switch_brings_and_takes_what_it_says(path: str) -> None:
    before, after = ({kind for kind, _ in documents(values)} for values in (_before(path), _after(path)))
    assert (after - before, before - after) == SWITCHES[path]
