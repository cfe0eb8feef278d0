"""Every rendered object is one that Kubernetes 1.29 to 1.35 and the controllers take."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest

from tests.deploy import chart, schemas
from tests.deploy.chart import NAMESPACE, Object, load, names, pick, render
from tests.deploy.consistency import mismatches

IMAGE_VOLUMES = ("delta", "everything")
"""Refused before Kubernetes 1.33 (test_refused), which has the feature."""
PAIRS = [
    (name, version)
    for version in schemas.VERSIONS
    for name in names()
    if name not in IMAGE_VOLUMES or version in ("1.33", "1.34", "1.35")
]


@pytest.mark.parametrize(("name", "version"), PAIRS)
def test_every_object_fits_its_schema(name: str, version: str) -> None:
    objects = render(load(name), kube_version=f"{version}.0")
    found = [f"{one['kind']}: {line}" for one in objects for line in schemas.problems(one, version)]
    assert not found
    assert mismatches(objects, NAMESPACE) == []
    assert bool(objects) == (name != "none")


@pytest.mark.parametrize("name", names())
def test_lint_has_nothing_to_say(name: str) -> None:
    result = chart.lint(load(name))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "[WARNING]" not in result.stdout
    assert "[ERROR]" not in result.stdout


def test_every_kind_is_rendered_somewhere() -> None:
    """The values files leave no template out."""
    templates = {path.relative_to(chart.CHART) for path in chart.CHART.glob("templates/**/*.yaml")}
    used = set()
    for name in names():
        output = chart.template(load(name)).stdout
        used |= {path for path in templates if f"# Source: expo-serve/{path}\n" in output}
    assert {str(path) for path in templates - used} <= {"templates/validate.yaml"}


@pytest.mark.parametrize(
    ("kind", "spoil", "words"),
    [
        ("Deployment", lambda spec: spec.update(replica=1), "'replica' was unexpected"),
        ("Deployment", lambda spec: spec["template"]["spec"]["containers"][0].update(tty="yes"), "tty: 'yes' is not"),
        ("LeaderWorkerSet", lambda spec: spec.update(size=2), "'size' was unexpected"),
        (
            "LeaderWorkerSet",
            lambda spec: spec["leaderWorkerTemplate"]["workerTemplate"]["spec"].update(hostNetworks=True),
            "'hostNetworks' was unexpected",
        ),
        ("HTTPRoute", lambda spec: spec["rules"][0]["backendRefs"][0].update(weight=1000001), "greater than the max"),
        ("HTTPRoute", lambda spec: spec["rules"][0]["timeouts"].update(request="0"), "does not match"),
        ("ScaledObject", lambda spec: spec.update(minReplicas=1), "'minReplicas' was unexpected"),
        ("ScaledObject", lambda spec: spec["triggers"][0]["metadata"].update(threshold=5), "5 is not of type 'string'"),
        ("PodMonitor", lambda spec: spec["podMetricsEndpoints"][0].update(interval="15"), "does not match"),
        ("PodMonitor", lambda spec: spec.update(selectors={}), "'selectors' was unexpected"),
        ("PrometheusRule", lambda spec: spec["groups"][0]["rules"][0].update(severity="page"), "was unexpected"),
        ("ServiceMonitor", lambda spec: spec["endpoints"][0].update(scheme="ftp"), "'ftp' is not one of"),
    ],
)
def test_the_schemas_refuse(kind: str, spoil: Callable[[Object], None], words: str) -> None:
    """A schema that takes everything proves nothing."""
    objects = render(load("service-monitor" if kind == "ServiceMonitor" else "everything"))
    one = copy.deepcopy(next(one for one in objects if one["kind"] == kind))
    spoil(one["spec"])
    assert words in "\n".join(schemas.problems(one, "1.35"))


@pytest.mark.parametrize(
    ("kind", "spoil", "words"),
    [
        ("Service", lambda one: one["metadata"].update(name="1st"), "is no name"),
        ("Deployment", lambda one: one["metadata"].update(namespace="other"), "namespace 'other'"),
        ("Deployment", lambda one: one["metadata"]["labels"].update(bad="-0.5"), "label bad: '-0.5'"),
        ("Deployment", lambda one: one["metadata"]["labels"].update(bad=1), "label bad: 1"),
        ("Deployment", lambda one: one["spec"].update(replicas=None), "spec.replicas is null"),
        ("Deployment", lambda one: one["spec"]["selector"]["matchLabels"].update(a="b"), "does not find its pods"),
        ("Deployment", lambda one: one["spec"]["template"]["spec"]["volumes"].pop(), "but mounted"),
        ("Deployment", lambda one: _container(one)["env"].append(_container(one)["env"][0]), "stands 2 times"),
        ("Deployment", lambda one: _container(one)["ports"].clear(), "startupProbe asks port 'status'"),
        ("Deployment", lambda one: _container(one)["resources"]["limits"].update(memory="1Mi"), "over the limit"),
        ("Service", lambda one: one["spec"]["selector"].pop("expo-serve/variant"), "finds ["),
        ("Service", lambda one: one["spec"]["ports"][1].update(targetPort="metrics"), "no port 'metrics'"),
        ("PodDisruptionBudget", lambda one: one["spec"]["selector"]["matchLabels"].update(a="b"), "finds []"),
        ("HorizontalPodAutoscaler", lambda one: one["spec"]["scaleTargetRef"].update(name="x"), "nothing to scale"),
        ("HTTPRoute", lambda one: one["spec"]["rules"][0]["backendRefs"][0].update(name="x"), "no Service x"),
        ("Ingress", lambda one: _path(one)["backend"]["service"].update(name="x"), "no Service x"),
        ("LeaderWorkerSet", lambda one: one["metadata"].update(name="demo-expo-serve-ray"), "headless"),
    ],
)
def test_the_rules_refuse(kind: str, spoil: Callable[[Object], None], words: str) -> None:
    objects = copy.deepcopy(render(load("everything")))
    spoil(next(one for one in objects if one["kind"] == kind))
    assert words in "\n".join(mismatches(objects, NAMESPACE))


def _container(one: Object) -> Object:
    container: Object = one["spec"]["template"]["spec"]["containers"][0]
    return container


def _path(one: Object) -> Object:
    path: Object = one["spec"]["rules"][0]["http"]["paths"][0]
    return path


@pytest.mark.parametrize("release", ["123", "1e3", "true", "null", "a" * 40, "expo-serve"])
def test_any_release_name_gives_legal_objects_or_one_line(release: str) -> None:
    """Helm takes names that YAML would read as something else, and names that are long."""
    values = load("hub-job")
    if chart.template(values, release=release).returncode:
        assert "fullnameOverride" in chart.refusal(values, release=release)
        return
    objects = render(values, release=release)
    assert mismatches(objects, NAMESPACE) == []
    assert [line for one in objects for line in schemas.problems(one, "1.35")] == []


def test_strings_stay_strings() -> None:
    """What looks like a number or a boolean to YAML reaches the objects as the text that was given."""
    values = load("one")
    values["variants"] = {"null": {"alpha": "1", "servedModelNames": ["1.50"], "podLabels": {"a": "true"}}}
    values["defaults"] |= {"nodeSelector": {"gpu": "true"}, "priorityClassName": "0x10", "runtimeClassName": "1e3"}
    values["image"] = {"repository": "images/serve", "tag": "1.10"}
    values["serviceAccount"] = {"name": "1234"}
    values["apiKey"] = {"existingSecret": "123", "key": "0"}
    objects = render(values)
    assert [line for one in objects for line in schemas.problems(one, "1.35")] == []
    assert mismatches(objects, NAMESPACE) == []
    spec = pick(objects, "Deployment")["spec"]["template"]["spec"]
    assert (spec["priorityClassName"], spec["runtimeClassName"]) == ("0x10", "1e3")
    assert spec["containers"][0]["image"] == "images/serve:1.10"


def test_a_release_may_lose_its_last_variant() -> None:
    """All options on, and nothing to serve: what says something of variants is left out."""
    values = load("everything")
    values["variants"] = {}
    values["alias"] = {}
    objects = render(values)
    assert [line for one in objects for line in schemas.problems(one, "1.35")] == []
    assert mismatches(objects, NAMESPACE) == []
    assert not {one["kind"] for one in objects} & {"Ingress", "HTTPRoute", "Job", "PrometheusRule"}
