"""A headless Chromium for the tests of the report, and pages that note all that they complain of or ask for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.sweep.install import environment, find_browser

WIDE = {"width": 1280, "height": 900}
PHONE = {"width": 375, "height": 700}


@contextmanager
def start_browser() -> Iterator[Browser]:
    """Start the browser; skip where there is none, but in CI, which has to have one."""
    path = find_browser()
    if path is None:
        stop = pytest.fail if os.environ.get("CI") else pytest.skip
        stop("no Chromium is on PATH or in .browser: run `make tools` where npm reaches its registry")
    with sync_playwright() as playwright:
        # The pages are ours, and its sandbox does not run for root or in most containers.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"], env={**environment(path)})
        yield browser
        browser.close()


@dataclass
class Opened:
    """A page, and what happened in it."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    """Messages of the console, errors, and dialogs."""
    requests: list[str] = field(default_factory=list)

    def text(self, selector: str) -> str:
        """Text of the one element that a selector names, as it is in the document."""
        return self.page.locator(selector).text_content() or ""

    def texts(self, selector: str) -> list[str]:
        """Texts of all elements that a selector names."""
        return self.page.locator(selector).all_text_contents()


@contextmanager
def open_page(browser: Browser, file: Path, **context: Any) -> Iterator[Opened]:
    """Open a file in a context of its own, by default as wide as a small desktop's window."""
    # Motion would make tests wait.
    with browser.new_context(**{"viewport": WIDE, "reduced_motion": "reduce", **context}) as own:
        opened = Opened(own.new_page())
        opened.page.set_default_timeout(10_000)
        opened.page.on("console", lambda message: opened.complaints.append(message.text))
        opened.page.on("pageerror", lambda error: opened.complaints.append(str(error)))
        opened.page.on("dialog", lambda dialog: opened.complaints.append(dialog.message))
        opened.page.on("request", lambda request: opened.requests.append(request.url))
        opened.page.goto(file.as_uri())
        yield opened


def assert_rounded(text: str, value: float, unit: str) -> None:
    """Assert that what is shown is the number, rounded at its last digit."""
    scale = 100 if unit == "share" else 1
    assert text.endswith("%") == (unit == "share")
    digits = text.rstrip("%")
    decimals = len(digits.partition(".")[2])
    assert float(digits) == pytest.approx(value * scale, abs=0.5001 * 10**-decimals)
