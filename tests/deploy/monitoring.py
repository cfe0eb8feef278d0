"""Rules and dashboard as the tests read them, and the calls of promtool."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.chart import CHART, ROOT, Values, pick, render
from tests.deploy.tools import PROMTOOL, need

PROMETHEUS_FOLDER = ROOT / "deploy/prometheus"
DASHBOARD = CHART / "files/dashboard.json"
VARIABLES = ("namespace", "release", "variant", "alpha")
"""Labels that the monitors put, and variables of the dashboard."""
NOT_ON_CPU = frozenset({"expo_load_peak_device_memory_bytes"})
"""A load on CPU has no device whose memory it could measure, so the server leaves the metric out."""

BY_PROMETHEUS = frozenset({"up"})
"""Made by Prometheus itself of each scrape."""


@dataclass(frozen=True)
class Query:
    """One expression of a panel."""

    panel: str
    expression: str
    legend: str

    def filled(self, rate_interval: str = "1m", shown: str = "1h") -> str:
        """As Grafana sends it, with every variable at "All"."""
        text = self.expression.replace("$__rate_interval", rate_interval).replace("$__range", shown)
        for name in VARIABLES:
            text = text.replace(f"${name}", ".+")
        assert "$" not in text, text
        return text


def example() -> Values:
    """The values that deploy/prometheus/rules.yaml is rendered for."""
    values: Values = yaml.safe_load((PROMETHEUS_FOLDER / "values.yaml").read_text())
    return values


def groups(values: Values) -> list[dict[str, Any]]:
    """The groups of the rendered PrometheusRule."""
    found: list[dict[str, Any]] = pick(render(values), "PrometheusRule")["spec"]["groups"]
    return found


def dashboard() -> dict[str, Any]:
    """The dashboard, parsed."""
    parsed: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return parsed


def panels() -> list[dict[str, Any]]:
    """Those that show something: no rows."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def queries() -> list[Query]:
    """Every expression of every panel."""
    return [
        Query(panel["title"], target["expr"], target["legendFormat"])
        for panel in panels()
        for target in panel["targets"]
    ]


def selectors(expression: str) -> list[tuple[str, str]]:
    """Metric and matchers of each selector. Ours all have matchers, which tells them from functions and labels."""
    found = re.findall(r"([a-zA-Z_:][\w:]*)\{([^}]*)\}", expression)
    assert len(found) == len(re.findall(r"\{", expression)) > 0, expression
    return found


def metric_names(expression: str) -> set[str]:
    """The metrics that an expression asks for."""
    return {name for name, _ in selectors(expression)}


def promtool(*arguments: str | Path) -> None:
    """Run it; what it says is the test's message."""
    result = subprocess.run([need(PROMTOOL), *arguments], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr


def check_rules(found: list[dict[str, Any]], folder: Path) -> None:
    """Have promtool read rule groups."""
    path = folder / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": found}))
    promtool("check", "rules", path)
