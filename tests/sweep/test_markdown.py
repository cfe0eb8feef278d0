"""``sweep.md``, as a Markdown parser reads it."""

from __future__ import annotations

from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

from expo_serve.sweep.markdown import write_markdown
from expo_serve.sweep.results import SweepResult
from tests.sweep.results import EVIL, nasty_result, sweep_result


def parsed(result: SweepResult, folder: Path) -> list[Token]:
    """The tokens of a result's ``sweep.md``."""
    write_markdown(result, folder / "sweep.md")
    return MarkdownIt("commonmark", {"html": True}).enable("table").parse((folder / "sweep.md").read_text())


def inline(tokens: list[Token]) -> list[Token]:
    """All tokens within lines."""
    return [child for token in tokens for child in token.children or ()]


def words(token: Token) -> str:
    """What a reader sees of a line."""
    return "".join(child.content for child in token.children or ())


def table(tokens: list[Token]) -> list[list[str]]:
    """The cells of the table, by row."""
    rows: list[list[str]] = []
    for place, token in enumerate(tokens):
        if token.type == "tr_open":
            rows.append([])
        elif token.type in ("th_open", "td_open"):
            rows[-1].append(words(tokens[place + 1]))
    return rows


def test_recommendation_comes_first_with_its_reason(tmp_path: Path) -> None:
    result = sweep_result()
    title, first, *_ = (words(token) for token in parsed(result, tmp_path) if token.type == "inline")
    assert title == "Which alpha? some-lab/model-7b-sft and model-7b-dpo"
    assert first == f"alpha 0.4. {result.decision.reason}"


def test_table_has_a_row_for_each_alpha_and_a_column_for_each_measure(tmp_path: Path) -> None:
    result = sweep_result()
    head, *rows = table(parsed(result, tmp_path))
    assert len(head) == 3 + len(result.alphas[0].measures)
    assert [row[0] for row in rows] == ["0", "0.1", "0.2", "0.3", "0.4", "0.5", "0.75", "1", "1.5", "2"]
    assert [row[2] for row in rows[3:6]] == ["feasible", "recommended", "feasible"]
    assert rows[-1][2] == "refused"
    chosen = dict(zip(head, rows[4], strict=True))
    assert chosen["effective alpha"] == "0.22"
    assert chosen["Reward"] == "0.659 (0.589 to 0.729)"
    assert chosen["KL from alpha 0 (nats/token)"] == "0.00349 (0.00312 to 0.00386)"
    assert chosen["Unfinished answers"] == "8.1% (3.1% to 13.1%)"


def test_says_what_the_data_cannot_show_what_was_refused_and_how_to_deploy(tmp_path: Path) -> None:
    result = sweep_result()
    tokens = parsed(result, tmp_path)
    lines = [words(token) for token in tokens if token.type == "inline"]
    assert set(result.decision.remarks) <= set(lines)
    assert f"alpha 2: {result.alphas[-1].infeasible_because[0]}" in lines
    blocks = {token.info: token.content for token in tokens if token.type == "fence"}
    assert blocks == {"sh": result.deploy["command"] + "\n", "yaml": result.deploy["values"]}
    assert [token.attrs["src"] for token in inline(tokens) if token.type == "image"] == ["sweep.png", "reward-kl.png"]


def test_texts_of_users_and_models_are_no_markup(tmp_path: Path) -> None:
    result, _ = nasty_result()
    tokens = parsed(result, tmp_path)
    kinds = {token.type for token in [*tokens, *inline(tokens)]}
    assert not kinds & {"html_block", "html_inline", "link_open", "code_inline", "em_open", "hr"}
    lines = [words(token) for token in tokens if token.type == "inline"]
    assert lines.count(EVIL) == 2
    assert "| a | table | and a second line" in lines
    assert [token.content for token in tokens if token.type == "fence"] == [
        result.deploy["command"] + "\n",
        result.deploy["values"],
    ]
    assert all(len(row) == len(table(tokens)[0]) for row in table(tokens))


def test_without_a_recommendation_there_is_nothing_to_deploy(tmp_path: Path) -> None:
    for result, headline in (
        (sweep_result((0.0, 0.5), with_reward=False), "No recommendation. "),
        (sweep_result((0.0,), status="interrupted"), "Interrupted: no recommendation yet. So far: "),
    ):
        tokens = parsed(result, tmp_path)
        lines = [words(token) for token in tokens if token.type == "inline"]
        assert lines[1].startswith(headline)
        assert not [token for token in tokens if token.type == "fence"]
        assert [token.attrs["src"] for token in inline(tokens) if token.type == "image"] == ["sweep.png"]
