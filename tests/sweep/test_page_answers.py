"""``report.html`` in a real browser: answers side by side, however many and however long."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from expo_serve.sweep.page import write_page
from expo_serve.sweep.results import SweepResult
from tests.sweep.browser import Opened, open_page
from tests.sweep.conftest import Reports
from tests.sweep.results import answer, answers, sweep_result


def test_two_answers_stand_side_by_side_with_scores_and_differences_marked(
    usual: Opened, usual_json: dict[str, Any]
) -> None:
    expected = {(one.alpha, one.prompt): one.text for one in answers(SweepResult.model_validate(usual_json))}
    scores = {(one["alpha"], one["prompt"]): one["scores"] for one in usual_json["samples"]}
    usual.page.get_by_label("Left").select_option(label="alpha 0.2")
    usual.page.get_by_label("Right").select_option(label="alpha 1.5 (refused)")
    pairs = usual.page.locator(".pair").all()
    assert len(pairs) == 5
    for prompt, pair in enumerate(pairs):
        left, right = pair.locator(".text").all()
        assert pair.locator(".asked").text_content() == usual_json["prompts"][prompt]
        assert left.text_content() == expected[0.2, prompt]
        assert right.text_content() == expected[1.5, prompt]
        assert pair.locator("h4").evaluate_all("heads => heads.map(head => head.firstChild.textContent)") == [
            "alpha 0.2",
            "alpha 1.5",
        ]
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


def test_answers_are_ordered_searched_and_turned_page_by_page(usual: Opened, usual_json: dict[str, Any]) -> None:
    scores = {(one["alpha"], one["prompt"]): one["scores"]["reward"] for one in usual_json["samples"]}
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


def test_long_answers_are_folded_until_they_are_asked_for(browser: Browser, reports: Reports) -> None:
    with open_page(browser, reports("nasty")) as opened:
        pair = opened.page.locator(".pair[data-prompt='4']")
        height = "pair => pair.getBoundingClientRect().height"
        folded = pair.evaluate(height)
        pair.get_by_role("button", name="Show all of it").press("Enter")
        assert pair.evaluate(height) > 3 * folded
        pair.get_by_role("button", name="Show less").press("Enter")
        assert pair.evaluate(height) == folded


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
        assert opened.page.evaluate("performance.now()") - before < 5000


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
