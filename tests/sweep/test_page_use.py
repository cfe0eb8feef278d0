"""``report.html`` in a real browser: everybody can use it, by pointer and by keyboard."""

from __future__ import annotations

from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, expect

from tests.sweep.browser import PHONE, WIDE, Opened, assert_rounded, open_page
from tests.sweep.conftest import Reports

_RULES = {
    "runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"],
    "resultTypes": ["violations"],
}


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(("kind", "size"), [("usual", WIDE), ("nasty", PHONE)])
def test_is_accessible_with_contrast_in_both_themes(
    browser: Browser, reports: Reports, kind: str, size: dict[str, int], theme: str
) -> None:
    with open_page(browser, reports(kind), viewport=size, color_scheme=theme) as opened:
        opened.page.locator(".chart").first.press("ArrowRight")
        assert _violations(opened) == []


def _violations(opened: Opened) -> list[tuple[str, str]]:
    """Rules of accessibility that the page breaks, and where."""
    # Figures are hidden from it, as from screen readers: they take most of its time.
    found = Axe().run(opened.page, context={"exclude": [["svg"]]}, options=_RULES).response["violations"]
    return [(one["id"], node["html"]) for one in found for node in one["nodes"]]


def test_accessibility_check_would_find_something(usual: Opened) -> None:
    usual.page.evaluate("document.querySelector('.reason').style.color = '#ccc'")
    assert [rule for rule, _ in _violations(usual)] == ["color-contrast"]


def test_table_is_sorted_by_each_column_both_ways(usual: Opened) -> None:
    heads = usual.page.locator("#numbers thead th")
    for column in range(heads.count()):
        button = heads.nth(column).locator("button")
        for order in ("ascending", "descending"):
            if column or order == "descending":  # by alpha, rising, it is sorted already
                button.click()
            assert heads.evaluate_all("heads => heads.map(head => head.ariaSort).filter(Boolean)") == [order]
            assert heads.nth(column).get_attribute("aria-sort") == order
            values = usual.page.locator("#numbers tbody tr").evaluate_all(
                "(rows, column) => rows.map(row => row.cells[column].dataset.value)", column
            )
            keys = [value if column == 1 else float(value) for value in values]
            assert keys == sorted(keys, reverse=order == "descending")


def test_rows_without_a_value_are_last_both_ways(browser: Browser, reports: Reports) -> None:
    with open_page(browser, reports("nasty")) as opened:
        button = opened.page.locator("th[data-column='length'] button")
        for order in (["0", "1", "0.5"], ["1", "0", "0.5"]):
            button.click()
            assert opened.texts("#numbers tbody th") == order


def test_figures_tell_the_numbers_at_the_arrow_keys_and_the_pointer(usual: Opened, usual_json: dict[str, Any]) -> None:
    assert usual.page.locator(".chart").count() == 1 + len(usual_json["alphas"][0]["measures"]) + 1
    chart = usual.page.locator(".chart[data-chart='reward']")
    tip = chart.locator(".tip")
    chart.focus()
    for key, index in (("ArrowRight", 0), ("ArrowRight", 1), ("End", -1), ("ArrowLeft", -2), ("Home", 0)):
        usual.page.keyboard.press(key)
        row = usual_json["alphas"][index]
        lines = (tip.text_content() or "").split("\n")
        assert lines[0].startswith(f"alpha {row['alpha']}, effective")
        assert_rounded(lines[1].removeprefix("Reward: ").split(" ")[0], row["reward"], "")
        assert lines[1].endswith(f"n = {row['measures']['reward']['n']}")
    usual.page.keyboard.press("Escape")
    expect(tip).to_be_hidden()
    chart.locator(".point").nth(4).hover(force=True)
    expect(tip).to_contain_text("alpha 0.4, effective 0.22, recommended")


def test_command_and_values_are_copied_whole(browser: Browser, reports: Reports, usual_json: dict[str, Any]) -> None:
    with open_page(browser, reports("usual"), permissions=["clipboard-read", "clipboard-write"]) as opened:
        for name, button in zip(("command", "values"), opened.page.locator(".copy").all(), strict=True):
            button.press("Enter")
            expect(button).to_have_text("Copied")
            assert opened.page.evaluate("navigator.clipboard.readText()") == usual_json["deploy"][name]
            assert opened.text(f"#deploy-{name}") == usual_json["deploy"][name]


def test_keyboard_reaches_everything_and_the_focus_is_seen(usual: Opened) -> None:
    page = usual.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the recommendation"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    reached: list[str] = []
    for _ in range(200):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(_FOCUSED)
        if name == "BODY":
            break
        assert outline != "none", name
        reached.append(name)
    assert reached.count("FIGURE") == page.locator(".chart").count()
    assert reached.count("BUTTON") == page.locator("main button:visible").count()
    assert reached.count("SELECT") == 3
    assert reached.count("INPUT") == 2
    assert reached.count("PRE") == 2


_FOCUSED = """() => {
    const element = document.activeElement;
    return [element.tagName, getComputedStyle(element).outlineStyle];
}"""


def test_theme_is_the_systems_until_one_is_chosen_which_is_remembered(browser: Browser, reports: Reports) -> None:
    with open_page(browser, reports("usual"), color_scheme="dark") as opened:
        dark = _colours(opened)
        opened.page.get_by_label("Light").check(force=True)
        light = _colours(opened)
        assert all(one != other for one, other in zip(dark, light, strict=True))
        opened.page.reload()
        assert _colours(opened) == light
        assert opened.page.get_by_label("Light").is_checked()
        opened.page.get_by_label("Light").press("ArrowLeft")
        assert _colours(opened) == dark
        opened.page.emulate_media(color_scheme="light")
        assert _colours(opened) == light
        opened.page.get_by_label("Dark").check(force=True)
        assert _colours(opened) == dark


def _colours(opened: Opened) -> list[str]:
    """Colours of the page, of a card, of text, and of a mark and a label in a figure."""
    found: list[str] = opened.page.evaluate(
        """() => [
            [":root", "backgroundColor"], [".card", "backgroundColor"], [".reason", "color"],
            [".point use", "fill"], [".chart text", "fill"],
        ].map(([selector, name]) => getComputedStyle(document.querySelector(selector))[name])"""
    )
    return found


@pytest.mark.parametrize(("motion", "expected"), [("reduce", "auto"), ("no-preference", "smooth")])
def test_moves_only_where_motion_is_wanted(usual: Opened, motion: Any, expected: str) -> None:
    usual.page.emulate_media(reduced_motion=motion)
    assert usual.page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == expected
