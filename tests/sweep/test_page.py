"""``report.html`` in a real browser: it shows the numbers of ``sweep.json`` and asks nobody."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from tests.sweep.browser import PHONE, Opened, assert_rounded, open_page
from tests.sweep.conftest import Reports
from tests.sweep.results import ANSWERS, EVIL, KINDS


@pytest.mark.parametrize(("kind", "theme"), [*((kind, "light") for kind in KINDS), ("usual", "dark")])
def test_asks_nobody_complains_of_nothing_and_fits_a_phone(
    browser: Browser, reports: Reports, kind: str, theme: str
) -> None:
    with open_page(browser, reports(kind), viewport=PHONE, color_scheme=theme) as opened:
        assert opened.page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
        expect(opened.page.locator(".pair").first).to_be_visible()
        assert opened.requests == [reports(kind).as_uri()]
        assert opened.complaints == []


def test_policy_lets_nothing_else_run_and_nothing_be_fetched(browser: Browser, reports: Reports) -> None:
    with open_page(browser, reports("usual")) as opened:
        opened.page.evaluate(
            "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'}))"
        )
        assert opened.page.evaluate("window.ran") is None
        assert opened.page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'fetched', () => 'refused')") == "refused"
        assert len([line for line in opened.complaints if "Content Security Policy" in line]) >= 2


def test_numbers_are_those_of_sweep_json(usual: Opened, usual_json: dict[str, Any]) -> None:
    rows = usual.page.locator("#numbers tbody tr")
    assert rows.count() == len(usual_json["alphas"])
    for row, expected in zip(rows.all(), usual_json["alphas"], strict=True):
        cells = row.locator("td").evaluate_all(_READ_CELLS)
        shown = {cell["name"]: cell for cell in cells}
        assert row.locator("th").text_content() == str(expected["alpha"])
        assert float(shown["effective_alpha"]["value"]) == expected["effective_alpha"]
        assert float(shown["kl"]["value"]) == expected["kl"]
        assert float(shown["reward"]["value"]) == expected["reward"]
        assert set(expected["measures"]) == set(shown) - {"status", "effective_alpha", "failures"}
        for name, measured in expected["measures"].items():
            unit = usual_json["measures"].get(name, {"unit": "share"})["unit"]
            assert float(shown[name]["value"]) == measured["value"]
            assert_rounded(shown[name]["text"], measured["value"], unit)
            low, high = shown[name]["interval"].split(" to ")
            assert_rounded(low, measured["low"], unit)
            assert_rounded(high, measured["high"], unit)


_READ_CELLS = """cells => cells.map(cell => ({
    name: cell.dataset.column,
    value: cell.dataset.value,
    text: cell.firstChild.textContent.trim(),
    interval: cell.querySelector(".note")?.textContent ?? "",
}))"""


def test_recommendation_its_reason_and_what_it_rests_on(usual: Opened, usual_json: dict[str, Any]) -> None:
    decision = usual_json["decision"]
    assert usual.text("#headline") == f"alpha {usual_json['recommendation']}"
    section = usual.text("#recommendation")
    for text in (decision["reason"], *decision["remarks"], *usual_json["warnings"]):
        assert text in section
    assert "+0.20" in section
    assert "95% interval 0.08 to 0.31, on 20 prompts" in section
    assert usual.texts(".shares .number") == ["4%", "21%", "61%", "14%"]
    assert usual.page.locator("tr.recommended th").all_text_contents() == [str(usual_json["recommendation"])]
    assert usual.page.locator("tr.refused th").all_text_contents() == ["1.5", "2"]


@pytest.mark.parametrize(
    ("kind", "headline", "said"),
    [
        ("zero", "alpha 0", "No alpha is shown to be better"),
        ("without-reward", "No recommendation", "Without a reward"),
        ("interrupted", "Interrupted: no recommendation yet", "--resume"),
    ],
)
def test_says_where_no_alpha_is_recommended(
    browser: Browser, reports: Reports, kind: str, headline: str, said: str
) -> None:
    with open_page(browser, reports(kind)) as opened:
        assert opened.text("#headline") == headline
        assert said in opened.text("#recommendation")
        assert (opened.page.locator("#deploy pre").count() > 0) == (kind == "zero")


def test_every_measure_has_a_mark_for_every_alpha(usual: Opened, usual_json: dict[str, Any]) -> None:
    names = ["reward-kl", "effective_alpha", *usual_json["alphas"][0]["measures"]]
    for name in names:
        assert usual.page.locator(f".chart[data-chart='{name}'] .point").count() == len(usual_json["alphas"])
    places = usual.page.locator(".chart[data-chart='length'] .point").evaluate_all(
        "points => points.map(point => point.getBoundingClientRect()).map(box => [box.x, -box.y])"
    )
    values = [row["measures"]["length"]["value"] for row in usual_json["alphas"]]
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    assert [y for _, y in places] == sorted(y for _, y in places)
    assert values == sorted(values)


def test_texts_of_users_and_models_are_shown_as_they_are(browser: Browser, reports: Reports) -> None:
    with open_page(browser, reports("nasty")) as opened:
        assert opened.page.title().endswith(EVIL)
        assert opened.page.locator("img").count() == 0
        for section in ("#recommendation", "#measures", "#table", "#deploy", "#details"):
            assert EVIL in opened.text(section)
        first = opened.page.locator(".pair").first.locator(".text")
        assert first.nth(1).text_content() == EVIL
        assert opened.texts(".pair .asked") == [f"{prompt} {EVIL}" for prompt in range(5)]
        shown = opened.page.locator(".side:last-child .text").all_text_contents()
        assert shown == [ANSWERS[0], "The answer is empty.", *ANSWERS[2:5]]
        hebrew = opened.page.locator(".side:last-child .text").nth(2)
        assert hebrew.evaluate("text => getComputedStyle(text).direction") == "rtl"
        assert opened.page.locator(".chip").all_text_contents() == ["cut at the limit"] * 2
        opened.page.get_by_label("Right").select_option(label="alpha 1")
        assert set(opened.texts(".side:last-child .text")) == {"There is no answer: the prompt failed."}


def test_everything_but_the_answers_is_there_without_scripts(
    browser: Browser, reports: Reports, usual_json: dict[str, Any]
) -> None:
    with open_page(browser, reports("usual"), java_script_enabled=False) as opened:
        expect(opened.page.locator("#headline")).to_be_visible()
        expect(opened.page.locator("noscript p")).to_be_visible()
        expect(opened.page.locator(".chart svg").first).to_be_visible()
        assert opened.page.locator("#numbers tbody tr").count() == len(usual_json["alphas"])
        assert opened.page.locator("button:visible").count() == opened.page.locator("#numbers button").count()
