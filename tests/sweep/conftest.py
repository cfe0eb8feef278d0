"""Fixtures of the report's tests: a browser, and reports that are written once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.sweep.results import KINDS

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.sweep.browser import Opened

Reports = Callable[[str], Path]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium; of one module, since its event loop is in the way of others."""
    from tests.sweep.browser import start_browser  # Playwright is not everywhere.

    with start_browser() as browser:
        yield browser


@pytest.fixture(scope="session")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """Write the report of a kind, once; beside it lies the ``sweep.json``."""
    from expo_serve.sweep.page import write_page

    folder = tmp_path_factory.mktemp("reports")

    def write(kind: str) -> Path:
        file = folder / f"{kind}.html"
        if not file.exists():
            result, given = KINDS[kind]()
            write_page(result, given, file)
            file.with_suffix(".json").write_text(result.model_dump_json())
        return file

    return write


@pytest.fixture
def usual(browser: Browser, reports: Reports) -> Iterator[Opened]:
    """The report of a usual sweep, which must not have complained of anything when the test is over."""
    from tests.sweep.browser import open_page

    with open_page(browser, reports("usual")) as opened:
        yield opened
        assert opened.complaints == []


@pytest.fixture(scope="session")
def usual_json(reports: Reports) -> dict[str, Any]:
    """The usual sweep's ``sweep.json``."""
    found: dict[str, Any] = json.loads(reports("usual").with_suffix(".json").read_text())
    return found
