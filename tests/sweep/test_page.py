"""``report.html`` in a real browser: it shows the numbers of ``sweep.json``, asks nobody, and everybody can use it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, expect

from expo_serve.sweep.observations import Answer
from expo_serve.sweep.page import write_page
from expo_serve.sweep.results import SweepResult
from tests.sweep.browser import PHONE, WIDE, Opened, open_page, start_browser
from tests.sweep.results import ANSWERS, EVIL, answer, answers, nasty_result, sweep_result

_KINDS: dict[str, Callable[[], tuple[SweepResult, list[Answer]]]] = {
    "usual": lambda: _with_answers(sweep_result()),
    "nasty": nasty_result,
    "zero": lambda: _with_answers(sweep_result((0.0, 0.5), 8, best=0.0)),
    "without-reward": lambda: _with_answers(sweep_result((0.0, 0.5), 8, with_reward=False)),
    "interrupted": lambda: _with_answers(sweep_result((0.0,), 8, status="interrupted")),
    "many": lambda: _with_answers(sweep_result([step / 20 for step in range(40)], 12)),
}
_RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}


def _with_answers(result: SweepResult) -> tuple[SweepResult, list[Answer]]:
    return result, answers(result)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with start_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Write a report of a kind, once; beside it lies the ``sweep.json``."""
    folder = tmp_path_factory.mktemp("reports")

    def write(kind: str) -> Path:
        file = folder / f"{kind}.html"
        if not file.exists():
            result, given = _KINDS[kind]()
            write_page(result, given, file)
            file.with_suffix(".json").write_text(result.model_dump_json())
        return file

    return write


@pytest.fixture
def usual(browser: Browser, reports: Callable[[str], Path]) -> Iterator[Opened]:
    """The report of a usual sweep, which must not have complained of anything when the test is over."""
    with open_page(browser, reports("usual")) as opened:
        yield opened
        assert opened.complaints == []


@pytest.fixture(scope="module")
def sweep(reports: Callable[[str], Path]) -> dict[str, Any]:
    """The usual sweep's ``sweep.json``."""
    found: dict[str, Any] = json.loads(reports("usual").with_suffix(".json").read_text())
    return found


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_asks_nobody_complains_of_nothing_and_fits_a_phone(
    browser: Browser, reports: Callable[[str], Path], kind: str, theme: str
) -> None:
    with open_page(browser, reports(kind), viewport=PHONE, color_scheme=theme) as opened:
        assert opened.page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
        expect(opened.page.locator(".pair").first).to_be_visible()
        assert opened.requests == [reports(kind).as_uri()]
        assert opened.complaints == []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(("kind", "size"), [("usual", WIDE), ("nasty", PHONE)])
def test_is_accessible_with_contrast_in_both_themes(
    browser: Browser, reports: Callable[[str], Path], kind: str, size: dict[str, int], theme: str
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


def test_policy_lets_nothing_else_run_and_nothing_be_fetched(browser: Browser, reports: Callable[[str], Path]) -> None:
    with open_page(browser, reports("usual")) as opened:
        opened.page.evaluate(
            "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'}))"
        )
        assert opened.page.evaluate("window.ran") is None
        assert opened.page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'fetched', () => 'refused')") == "refused"
        assert len([line for line in opened.complaints if "Content Security Policy" in line]) >= 2


def test_numbers_are_those_of_sweep_json(usual: Opened, sweep: dict[str, Any]) -> None:
    rows = usual.page.locator("#numbers tbody tr")
    assert rows.count() == len(sweep["alphas"])
    for row, expected in zip(rows.all(), sweep["alphas"], strict=True):
        cells = row.locator("td").evaluate_all(_READ_CELLS)
        shown = {cell["name"]: cell for cell in cells}
        assert row.locator("th").text_content() == str(expected["alpha"])
        assert float(shown["effective_alpha"]["value"]) == expected["effective_alpha"]
        assert float(shown["kl"]["value"]) == expected["kl"]
        assert float(shown["reward"]["value"]) == expected["reward"]
        assert set(expected["measures"]) == set(shown) - {"status", "effective_alpha", "failures"}
        for name, measured in expected["measures"].items():
            unit = sweep["measures"].get(name, {"unit": "share"})["unit"]
            assert float(shown[name]["value"]) == measured["value"]
            _assert_rounded(shown[name]["text"], measured["value"], unit)
            low, high = shown[name]["interval"].split(" to ")
            _assert_rounded(low, measured["low"], unit)
            _assert_rounded(high, measured["high"], unit)


_READ_CELLS = """cells => cells.map(cell => ({
    name: cell.dataset.column,
    value: cell.dataset.value,
    text: cell.firstChild.textContent.trim(),
    interval: cell.querySelector(".note")?.textContent ?? "",
}))"""


def _assert_rounded(text: str, value: float, unit: str) -> None:
    """What is shown is the number, rounded at its last digit, which is at least the second one that counts."""
    scale = 100 if unit == "share" else 1
    assert text.endswith("%") == (unit == "share")
    digits = text.rstrip("%")
    decimals = len(digits.partition(".")[2])
    assert float(digits) == pytest.approx(value * scale, abs=0.5001 * 10**-decimals)


def test_recommendation_its_reason_and_what_it_rests_on(usual: Opened, sweep: dict[str, Any]) -> None:
    decision = sweep["decision"]
    assert usual.text("#headline") == f"alpha {sweep['recommendation']}"
    section = usual.text("#recommendation")
    for text in (decision["reason"], *decision["remarks"], *sweep["warnings"]):
        assert text in section
    assert "+0.20" in section
    assert "95% interval 0.08 to 0.31, on 20 prompts" in section
    assert usual.texts(".shares .number") == ["4%", "21%", "61%", "14%"]
    assert usual.page.locator("tr.recommended th").all_text_contents() == [str(sweep["recommendation"])]
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
    browser: Browser, reports: Callable[[str], Path], kind: str, headline: str, said: str
) -> None:
    with open_page(browser, reports(kind)) as opened:
        assert opened.text("#headline") == headline
        assert said in opened.text("#recommendation")
        assert (opened.page.locator("#deploy pre").count() > 0) == (kind == "zero")


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


def test_rows_without_a_value_are_last_both_ways(browser: Browser, reports: Callable[[str], Path]) -> None:
    with open_page(browser, reports("nasty")) as opened:
        button = opened.page.locator("th[data-column='length'] button")
        for order in (["0", "1", "0.5"], ["1", "0", "0.5"]):
            button.click()
            assert opened.texts("#numbers tbody th") == order


def test_figures_tell_the_numbers_at_the_arrow_keys_and_the_pointer(usual: Opened, sweep: dict[str, Any]) -> None:
    assert usual.page.locator(".chart").count() == 1 + len(sweep["alphas"][0]["measures"]) + 1
    chart = usual.page.locator(".chart[data-chart='reward']")
    tip = chart.locator(".tip")
    chart.focus()
    for key, index in (("ArrowRight", 0), ("ArrowRight", 1), ("End", -1), ("ArrowLeft", -2), ("Home", 0)):
        usual.page.keyboard.press(key)
        row = sweep["alphas"][index]
        lines = (tip.text_content() or "").split("\n")
        assert lines[0].startswith(f"alpha {row['alpha']}, effective")
        _assert_rounded(lines[1].removeprefix("Reward: ").split(" ")[0], row["reward"], "")
        assert lines[1].endswith(f"n = {row['measures']['reward']['n']}")
    usual.page.keyboard.press("Escape")
    expect(tip).to_be_hidden()
    chart.locator(".point").nth(4).hover(force=True)
    expect(tip).to_contain_text("alpha 0.4, effective 0.22, recommended")


def test_every_measure_has_a_mark_for_every_alpha(usual: Opened, sweep: dict[str, Any]) -> None:
    names = ["reward-kl", "effective_alpha", *sweep["alphas"][0]["measures"]]
    for name in names:
        assert usual.page.locator(f".chart[data-chart='{name}'] .point").count() == len(sweep["alphas"])
    places = usual.page.locator(".chart[data-chart='length'] .point").evaluate_all(
        "points => points.map(point => point.getBoundingClientRect()).map(box => [box.x, -box.y])"
    )
    values = [row["measures"]["length"]["value"] for row in sweep["alphas"]]
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    assert [y for _, y in places] == sorted(y for _, y in places)
    assert values == sorted(values)


def test_two_answers_stand_side_by_side_with_scores_and_differences_marked(
    usual: Opened, sweep: dict[str, Any]
) -> None:
    expected = {(one.alpha, one.prompt): one.text for one in answers(SweepResult.model_validate(sweep))}
    scores = {(one["alpha"], one["prompt"]): one["scores"] for one in sweep["samples"]}
    usual.page.get_by_label("Left").select_option(label="alpha 0.2")
    usual.page.get_by_label("Right").select_option(label="alpha 1.5 (refused)")
    pairs = usual.page.locator(".pair").all()
    assert len(pairs) == 5
    for prompt, pair in enumerate(pairs):
        left, right = pair.locator(".text").all()
        assert pair.locator(".asked").text_content() == sweep["prompts"][prompt]
        assert left.text_content() == expected[0.2, prompt]
        assert right.text_content() == expected[1.5, prompt]
        assert left.locator("del").count() > 0
        assert right.locator("ins").count() > 0
        unmarked = [side.evaluate(_UNMARKED).split() for side in (left, right)]
        assert unmarked[0] == unmarked[1]
        assert len(unmarked[0]) > 30
        cells = pair.locator("tr[data-measure='reward'] td").all_text_contents()
        one, other = scores[0.2, prompt]["reward"], scores[1.5, prompt]["reward"]
        assert [float(cell) for cell in cells] == pytest.approx([one, other, other - one], abs=1e-4, rel=1e-3)
    usual.page.get_by_label("Right").select_option(label="alpha 0.2")
    assert usual.page.locator(".pair del, .pair ins").count() == 0
    assert all(left == right for left, right in zip(*[iter(usual.texts(".pair .text"))] * 2, strict=True))


_UNMARKED = """side => {
    const copy = side.cloneNode(true);
    copy.querySelectorAll("del, ins").forEach(mark => mark.remove());
    return copy.textContent;
}"""


def test_answers_are_ordered_searched_and_turned_page_by_page(usual: Opened, sweep: dict[str, Any]) -> None:
    scores = {(one["alpha"], one["prompt"]): one["scores"]["reward"] for one in sweep["samples"]}
    gains = {prompt: scores[0.4, prompt] - scores[0, prompt] for prompt in range(40)}
    usual.page.get_by_label("Order").select_option(label="Reward: rises most")
    falling = sorted(gains, key=lambda prompt: -gains[prompt])
    assert _shown(usual) == falling[:5]
    usual.page.get_by_role("button", name="Next").click()
    assert _shown(usual) == falling[5:10]
    usual.page.get_by_label("Page", exact=True).fill("8")
    usual.page.keyboard.press("Enter")
    assert _shown(usual) == falling[35:]
    usual.page.get_by_role("button", name="Next").click(force=True)  # there is none
    assert _shown(usual) == falling[35:]
    usual.page.get_by_label("Order").select_option(label="Reward: falls most")
    assert _shown(usual) == falling[::-1][:5]
    usual.page.get_by_label("Search").fill("qUESTION 7:")
    expect(usual.page.locator("#found")).to_have_text("Prompts 1 to 1 of 1")
    assert _shown(usual) == [7]
    usual.page.get_by_label("Search").fill("nobody says this")
    expect(usual.page.locator("#found")).to_have_text("No prompt or answer has this text.")


def _shown(opened: Opened) -> list[int]:
    return [int(pair.get_attribute("data-prompt") or -1) for pair in opened.page.locator(".pair").all()]


def test_texts_of_users_and_models_are_shown_as_they_are(browser: Browser, reports: Callable[[str], Path]) -> None:
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


def test_long_answers_are_folded_until_they_are_asked_for(browser: Browser, reports: Callable[[str], Path]) -> None:
    with open_page(browser, reports("nasty")) as opened:
        pair = opened.page.locator(".pair[data-prompt='4']")
        height = "pair => pair.getBoundingClientRect().height"
        folded = pair.evaluate(height)
        pair.get_by_role("button", name="Show all of it").press("Enter")
        assert pair.evaluate(height) > 3 * folded
        pair.get_by_role("button", name="Show less").press("Enter")
        assert pair.evaluate(height) == folded


def test_command_and_values_are_copied_whole(
    browser: Browser, reports: Callable[[str], Path], sweep: dict[str, Any]
) -> None:
    with open_page(browser, reports("usual"), permissions=["clipboard-read", "clipboard-write"]) as opened:
        for name, button in zip(("command", "values"), opened.page.locator(".copy").all(), strict=True):
            button.press("Enter")
            expect(button).to_have_text("Copied")
            assert opened.page.evaluate("navigator.clipboard.readText()") == sweep["deploy"][name]
            assert opened.text(f"#deploy-{name}") == sweep["deploy"][name]


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


def test_theme_is_the_systems_until_one_is_chosen_which_is_remembered(
    browser: Browser, reports: Callable[[str], Path]
) -> None:
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


def test_everything_but_the_answers_is_there_without_scripts(
    browser: Browser, reports: Callable[[str], Path], sweep: dict[str, Any]
) -> None:
    with open_page(browser, reports("usual"), java_script_enabled=False) as opened:
        expect(opened.page.locator("#headline")).to_be_visible()
        expect(opened.page.locator("noscript p")).to_be_visible()
        expect(opened.page.locator(".chart svg").first).to_be_visible()
        assert opened.page.locator("#numbers tbody tr").count() == len(sweep["alphas"])
        assert opened.page.locator("button:visible").count() == opened.page.locator("#numbers button").count()


def test_a_thousand_prompts_at_ten_alphas_stay_usable(browser: Browser, tmp_path: Path) -> None:
    result = sweep_result(prompts=1000)
    filler = [
        answer(alpha.alpha, prompt, f"{prompt} " + "word " * 250) for alpha in result.alphas for prompt in range(1000)
    ]
    write_page(result, filler, tmp_path / "report.html")
    size = (tmp_path / "report.html").stat().st_size
    assert 12e6 < size < 16e6
    with open_page(browser, tmp_path / "report.html") as opened:
        assert opened.page.locator("*").count() < 6000
        before = opened.page.evaluate("performance.now()")
        opened.page.get_by_label("Right").select_option(label="alpha 2 (refused)")
        opened.page.get_by_label("Order").select_option(label="Reward: rises most")
        opened.page.get_by_label("Page", exact=True).fill("200")
        opened.page.keyboard.press("Enter")
        expect(opened.page.locator("#found")).to_have_text("Prompts 996 to 1000 of 1000")
        assert opened.page.evaluate("performance.now()") - before < 3000


def test_unmarked_words_are_a_longest_common_subsequence(usual: Opened) -> None:
    chance = random.Random(1)
    pairs = [["".join(chance.choices("ab c\n", k=chance.randrange(30))) for _ in "lr"] for _ in range(60)]
    pairs += [["", ""], ["one", ""], ["one two", "two one"], ["same text", "same text"]]
    found = usual.page.evaluate("pairs => pairs.map(([left, right]) => compareTexts(left, right))", pairs)
    for texts, sides in zip(pairs, found, strict=True):
        words = usual.page.evaluate("texts => texts.map(text => wordsOf(text).map(word => word.trim()))", texts)
        for text, runs in zip(texts, sides, strict=True):
            assert "".join(run["text"] for run in runs) == text
        same = [
            usual.page.evaluate(
                "runs => runs.filter(run => run.same).flatMap(run => wordsOf(run.text)).map(word => word.trim())", runs
            )
            for runs in sides
        ]
        assert "".join(same[0]) == "".join(same[1])
        assert len(same[0]) >= _common_length(*words) - 1


def _common_length(left: list[str], right: list[str]) -> int:
    above = [0] * (len(right) + 1)
    for one in left:
        row = [0]
        for index, other in enumerate(right):
            row.append(above[index] + 1 if one == other else max(above[index + 1], row[index]))
        above = row
    return above[-1]


def test_texts_too_long_for_words_are_compared_by_sentences(usual: Opened) -> None:
    left = " ".join(f"Sentence {number} has some words in it." for number in range(600))
    right = " ".join(f"Sentence {number} has some words in it." for number in range(1, 601) if number != 300)
    one, other = usual.page.evaluate("([left, right]) => compareTexts(left, right)", [left, f"First. {right} Last."])
    assert [run["text"].strip() for run in one if not run["same"]] == [
        "Sentence 0 has some words in it.",
        "Sentence 300 has some words in it.",
    ]
    assert "".join(run["text"] for run in other if not run["same"]).split()[0] == "First."
