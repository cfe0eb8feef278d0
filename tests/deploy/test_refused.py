"""Mistakes end the render with one clear line, and what lies next to them does not."""

from __future__ import annotations

from typing import Any

import pytest

from tests.deploy import chart, refusals, refusals_release
from tests.deploy.chart import Values, merged, refusal, render

CASES = [
    pytest.param(*case, id=f"{group}-{name}")
    for group in ("NAMES", "ALPHA", "SOURCES", "KEYS", "RUNNING", "RELEASE")
    for name, case in getattr(refusals_release if group == "RELEASE" else refusals, group).items()
]
DELTA_IMAGE = {
    "variants": {"a": {"alpha": "0.5", "delta": "/delta/x", "deltaImage": {"reference": "registry.example/delta:1"}}}
}


def _values(case: dict[str, Any]) -> Values:
    variants = {} if "variants" in case else {"variants": {"a": {"alpha": "0.5"}}}
    values: Values = merged(refusals.ONE, {**variants, **case})
    return values


@pytest.mark.parametrize(("case", "words"), CASES)
def test_a_mistake_is_refused_in_one_line(case: dict[str, Any], words: tuple[str, ...]) -> None:
    line = refusal(_values(case))
    assert [word for word in words if word not in line] == [], line
    assert len(line) < 330, line


def test_without_the_mistake_it_renders() -> None:
    """So none of the cases above is refused for what they share."""
    assert render(_values({}))


@pytest.mark.parametrize("version", ["1.29.0", "1.32.9", "1.33.0", "1.34.1-gke.100"])
def test_image_volumes_only_where_there_are_any(version: str) -> None:
    if version < "1.33":
        line = refusal(_values(DELTA_IMAGE), kube_version=version)
        assert all(word in line for word in ("variants.a.deltaImage", "1.33", version)), line
    else:
        assert render(_values(DELTA_IMAGE), kube_version=version)


def test_a_cluster_that_is_too_old_is_refused() -> None:
    result = chart.template(_values({}), kube_version="1.28.9")
    assert result.returncode != 0
    assert "kubeVersion: >=1.29" in result.stderr


@pytest.mark.parametrize(
    "case",
    [
        {"variants": {"a": {"alpha": "10000"}, "b": {"alpha": "-10000.0"}, "c": {"alpha": "+0"}}},
        {"variants": {"a": {"alpha": "9999.9999999999"}, "b": {"alpha": "9999.9999999998"}}},
        {"variants": {"a": {"alpha": "0.5"}, "b": {"alpha": "0.5", "rounding": "nearest", "servedModelNames": ["b"]}}},
        {"variants": {"a": {"alpha": "0.5"}, "b": {"alpha": "0.5", "roundingSeed": 1, "servedModelNames": ["b"]}}},
        {"variants": {"a": {"alpha": "0.5"}, "b": {"alpha": "0.5", "aligned": "/models/other"}}},
        {"variants": {"a": {"alpha": "0.5"}, "b": {"alpha": "0.5", "image": {"tag": "x"}, "servedModelNames": ["b"]}}},
        {"variants": {"a": {"alpha": "0.5"}, "b": {"alpha": "0.5", "delta": "/models/aligned-delta"}}},
        {"variants": {"a": {"alpha": "0.5", "drain": {"terminationGracePeriodSeconds": 600}}}},
        {"variants": {"a": {"alpha": "0.5", "tensorParallelSize": 8, "multiNode": {"nodes": 4}}}},
        {"variants": {"v" * (52 - len("demo-expo-serve-")): {"alpha": "0.5"}}},
        {"variants": {"a": {"alpha": "0.5"}}, "alias": {"name": "x", "weights": {"a": 1000000}}},
        {"variants": {"a": {"alpha": "0.5", "extraArgs": ["--max-model-len", "-1", "--disable-log-requests"]}}},
        {"service": {"port": 9000}, "status": {"port": None}},
        {"service": {"port": 9000}, "status": {"port": 8000}},
        {"variants": {"a": {"alpha": "0.5", "base": "/models", "aligned": "/models/sub/dir"}}},
    ],
)
def test_what_is_near_a_mistake_renders(case: dict[str, Any]) -> None:
    assert render(_values(case))
