"""Pages that are made from code are up to date; so are tables that repeat what code says.

``tests/conformance/test_families.py`` checks the page of models.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from expo_serve import errors, metrics
from expo_serve.cli.inspection import InspectedMemory, InspectedSource, InspectedTensor, Inspection
from expo_serve.errors import REASONS, ExpoError
from expo_serve.report import DeploymentReport
from expo_serve.state.exposition import exposition
from expo_serve.state.snapshot import PHASES, Words, snapshot
from tests.docs import cli_page
from tests.docs.pages import page, rows

OBSERVABILITY, TROUBLESHOOTING = page("observability.md"), page("troubleshooting.md")
ERRORS = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, ExpoError)]


def test_command_line_reference_is_up_to_date() -> None:
    assert cli_page.PAGE.read_text() == cli_page.written(), "run python -m tests.docs.cli_page"


def test_every_flag_has_an_explanation() -> None:
    for flag, _, meaning in rows(cli_page.written()):
        assert len(meaning) > 5, flag


def report() -> DeploymentReport:
    """The example of the page; unknown, missing and mistyped fields are errors."""
    example, _ = OBSERVABILITY.code("json")
    return DeploymentReport.model_validate_json(example)


def test_example_of_the_report_is_one() -> None:
    example, _ = OBSERVABILITY.code("json")
    assert json.loads(report().model_dump_json()) == json.loads(example)


def test_fields_that_are_explained_exist() -> None:
    fields = {*DeploymentReport.model_fields, *type(report().ranks[0]).model_fields}
    named = re.findall(r"`(\w+)`", " ".join(row[0] for row in rows(OBSERVABILITY.section("Report"))))
    assert named
    assert not set(named) - fields


def test_fields_of_an_inspection_are_those_of_the_page() -> None:
    table = rows(page("sources.md").section("JSON output"))
    named = {name for row in table for name in re.findall(r"`(\w+)`", row[0])}
    assert named == set(Inspection.model_fields) - {"schema_version", "version"}
    for name, part in (("sources", InspectedSource), ("memory", InspectedMemory), ("tensors", InspectedTensor)):
        (text,) = (row[1] for row in table if f"`{name}`" in row[0])
        assert set(part.__pydantic_fields__) <= set(re.findall(r"`(\w+)`", text)), name


def test_metrics_are_those_of_the_page() -> None:
    rank = report().ranks[0].model_copy(update={"peak_device_memory_bytes": 1})
    registry = CollectorRegistry()
    metrics.DeploymentGauges(registry).set(report().model_copy(update={"ranks": [rank]}))
    found = {
        metric.name: {label for sample in metric.samples for label in sample.labels} for metric in registry.collect()
    }
    table = rows(OBSERVABILITY.section("Metrics"))
    assert {name.strip("`"): set(re.findall(r"`(\w+)`", labels)) for name, labels, _ in table} == found


def started() -> dict[str, Any]:
    """The state of a start with everything in it."""
    command = {"role": "command", "started": 1.0, "started_at": 1.0, "phases": {"resolve": 1.0, "start": 1.0}}
    sources = {side: [1, 2] for side in ("base", "aligned")}
    rank = {"role": "rank", "engine": 0, "rank": 0, "began": 1.0, "updated": 1.0, "sources": sources}
    error = {"reason": "load", "message": "m"}
    return snapshot([command, rank, {"role": "api", "answered": 1.0, "error": error}], Words(), 2.0)


def shape(value: Any) -> Any:
    """Keys of JSON, all the way down."""
    return {key: shape(inner) for key, inner in value.items()} if isinstance(value, dict) else None


def test_example_of_the_state_is_one() -> None:
    _, example = OBSERVABILITY.code("json")
    assert shape({**started(), "error": None}) == shape(json.loads(example))
    for name in (*PHASES, *REASONS):
        assert f"`{name}`" in OBSERVABILITY.section("The state from second 0")


def test_metrics_of_the_state_are_those_of_the_page() -> None:
    families = text_string_to_metric_families(exposition(started()).decode())
    found = {family.name: {label for sample in family.samples for label in sample.labels} for family in families}
    named = {}
    for names, labels, *_ in rows(OBSERVABILITY.section("The state from second 0")):
        for name in re.findall(r"`(expo_state\w+)`", names):
            named[name] = set(re.findall(r"`(\w+)`", labels))
    assert named == found


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_every_error_has_a_section_with_its_exit_code(error: type[ExpoError]) -> None:
    assert TROUBLESHOOTING.section(error.__name__).lstrip().startswith(f"Exit code {error.exit_code}.")


def test_sections_of_errors_are_errors() -> None:
    named = {name for name in re.findall(r"^## (\w+)$", TROUBLESHOOTING.text, re.MULTILINE) if name.endswith("Error")}
    assert named == {error.__name__ for error in ERRORS}
