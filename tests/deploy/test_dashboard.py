"""The Grafana dashboard: well formed, its queries PromQL, shipped as it is kept."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from expo_serve.state.exposition import exposition
from expo_serve.state.snapshot import Words, snapshot
from tests.deploy.chart import ROOT, pick, render
from tests.deploy.monitoring import (
    DASHBOARD,
    VARIABLES,
    Query,
    check_rules,
    dashboard,
    example,
    metric_names,
    panels,
    queries,
    selectors,
)

LINK = ROOT / "deploy/grafana/expo-serve.json"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
STARTING = 'phase=~"resolve|start|load|warm_up"'
"""Serving lasts, and would hide them."""
ROWS = ["Deployment", "Start", "Load", "Traffic", "Capacity"]


def test_the_file_for_import_is_the_charts_own() -> None:
    assert LINK.is_symlink()
    assert not LINK.readlink().is_absolute()
    assert LINK.resolve() == DASHBOARD.resolve()


def test_config_map_holds_it_unchanged() -> None:
    extra = {"enabled": True, "labels": {"look": "here"}, "annotations": {"folder": "LLM"}}
    config_map = pick(render(example() | {"monitoring": {"dashboard": extra}}), "ConfigMap", "-dashboard")
    assert config_map["data"] == {"expo-serve.json": DASHBOARD.read_text().rstrip("\n")}
    assert config_map["metadata"]["labels"].items() >= {"look": "here", "app.kubernetes.io/instance": "demo"}.items()
    assert config_map["metadata"]["annotations"] == {"folder": "LLM"}


def test_variables_narrow_each_other_down() -> None:
    source, *others = dashboard()["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == ("datasource", "datasource", "prometheus")
    assert [one["name"] for one in others] == list(VARIABLES)
    for position, one in enumerate(others):
        wanted = ", ".join(f'{name}=~"${name}"' for name in VARIABLES[:position])
        # A pod that starts for the first time has no alpha yet, one without a status port no state.
        either = '__name__=~"expo_alpha|expo_state_ready"'
        metric = ", ".join(filter(None, [either, wanted]))
        assert one["query"]["query"] == f"label_values({{{metric}}}, {one['name']})"
        assert one["datasource"] == SOURCE
        # Not ".*": series of other vLLM servers have none of these labels.
        assert (one["multi"], one["includeAll"], one["allValue"]) == (True, True, ".+")


def test_panels_are_told_apart_and_explained() -> None:
    everything = dashboard()["panels"]
    assert [panel["title"] for panel in everything if panel["type"] == "row"] == ROWS
    assert len({panel["id"] for panel in everything}) == len(everything)
    assert len({panel["title"] for panel in everything}) == len(everything)
    for panel in panels():
        assert panel["datasource"] == SOURCE, panel["title"]
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["targets"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        assert all(target["datasource"] == SOURCE and target["expr"] for target in panel["targets"])


def test_panels_do_not_overlap() -> None:
    everything = dashboard()["panels"]
    for one, other in combinations(everything, 2):
        assert not _overlap(one["gridPos"], other["gridPos"]), (one["title"], other["title"])
    for panel in everything:
        place = panel["gridPos"]
        assert place["x"] >= 0 < place["w"]
        assert place["x"] + place["w"] <= 24, panel["title"]


@pytest.mark.parametrize("query", queries(), ids=lambda query: f"{query.panel}-{query.legend}")
def test_queries_keep_to_the_chosen_deployments(query: Query) -> None:
    wanted = ", ".join(f'{name}=~"${name}"' for name in VARIABLES)
    found = {matchers for _, matchers in selectors(query.expression)}
    assert all(matchers.removeprefix(wanted) in ("", f", {STARTING}") for matchers in found), found
    if query.legend != "__auto":
        assert query.legend.startswith("{{variant}} (alpha {{alpha}})")
    # A legend can show no label that the query drops.
    for label in re.findall(r"{{(\w+)}}", query.legend):
        assert re.search(rf"\b(by|without) \([^)]*\b{label}\b", query.expression)


def test_queries_are_promql(tmp_path: Path) -> None:
    """promtool reads no single query, but it reads recording rules."""
    rules = [{"record": f"query:{number}", "expr": query.filled()} for number, query in enumerate(queries())]
    assert len(rules) > 20
    check_rules([{"name": "dashboard", "rules": rules}], tmp_path)
    with pytest.raises(AssertionError, match="could not parse expression"):
        check_rules([{"name": "dashboard", "rules": [*rules, {"record": "x", "expr": "sum by (le (up{})"}]}], tmp_path)


def test_it_shows_every_metric_of_the_load() -> None:
    """All of this project's own: whoever adds one also shows it."""
    source = (ROOT / "expo_serve/metrics.py").read_text()
    own = set(re.findall(r'"(expo_\w+)"', source))
    assert len(own) >= 11
    assert own <= {name for query in queries() for name in metric_names(query.expression)}


def test_it_shows_every_metric_of_the_status_port() -> None:
    """Of a command that has loaded, answered and failed, so that there is nothing it could not know."""
    rank = {"role": "rank", "engine": 0, "rank": 0, "began": 2.0, "updated": 3.0, "sources": {"base": [1, 2]}}
    api = {"role": "api", "answered": 4.0, "open": 1, "cut": 1}
    error = {"reason": "died", "message": "the engine was killed"}
    command = {"role": "command", "started": 1.0, "started_at": 1.0, "phases": {"resolve": 1.0, "failed": 5.0}}
    text = exposition(snapshot([command | {"error": error}, rank, api], Words(), 6.0)).decode()
    own = {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    assert len(own) >= 14
    shown = {name for query in queries() for name in metric_names(query.expression)}
    assert own == {name for name in shown if name.startswith("expo_state")}


def _overlap(one: dict[str, int], other: dict[str, int]) -> bool:
    return (
        one["x"] < other["x"] + other["w"]
        and other["x"] < one["x"] + one["w"]
        and one["y"] < other["y"] + other["h"]
        and other["y"] < one["y"] + one["h"]
    )
