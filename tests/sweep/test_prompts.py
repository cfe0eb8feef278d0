"""What a sweep asks: files of prompts and of held-out text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from expo_serve.errors import UsageError
from expo_serve.sweep.prompts import read_prompts, read_texts, windows

EXPECTED = r"""expected \{"prompt": "\.\.\."\} or \{"messages": \[\{"role": "user", "content": "\.\.\."\}\]\}"""


def jsonl(path: Path, *lines: Any) -> Path:
    """Write a file with these objects, or these texts, as lines."""
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_prompts_and_messages(tmp_path: Path) -> None:
    chat = [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two"},
        {"role": "user", "content": "3"},
    ]
    file = jsonl(tmp_path / "p.jsonl", {"prompt": "Hello", "gold": "42"}, "", {"messages": chat})
    first, second = read_prompts(file, "--prompts")
    assert first.messages == ({"role": "user", "content": "Hello"},)
    assert first.extra == {"gold": "42"}
    assert (second.index, second.text) == (1, "3")


def test_separators_of_lines_that_json_may_hold(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "one\u2028two\x85three"}\r\n{"prompt": "Hi"}', encoding="utf-8")
    assert [prompt.text for prompt in read_prompts(file, "--prompts")] == ["one\u2028two\x85three", "Hi"]


def test_text_of_a_message_with_parts(tmp_path: Path) -> None:
    parts = [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "What is it?"}]
    (prompt,) = read_prompts(
        jsonl(tmp_path / "p.jsonl", {"messages": [{"role": "user", "content": parts}]}), "--prompts"
    )
    assert prompt.text.strip() == "What is it?"


def test_system_prompt_is_added_where_there_is_none(tmp_path: Path) -> None:
    own = [{"role": "system", "content": "Mine"}, {"role": "user", "content": "Hi"}]
    file = jsonl(tmp_path / "p.jsonl", {"prompt": "Hi"}, {"messages": own})
    first, second = read_prompts(file, "--prompts", system="Be brief.")
    assert first.messages[0] == {"role": "system", "content": "Be brief."}
    assert second.messages[0]["content"] == "Mine"


def test_a_draw_is_the_same_for_a_seed_and_in_order(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "p.jsonl", *({"prompt": f"{number:03}"} for number in range(100)))
    drawn = [[prompt.text for prompt in read_prompts(file, "--prompts", 10, seed)] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] == sorted(drawn[0])
    assert [prompt.index for prompt in read_prompts(file, "--prompts", 10)] == list(range(10))


@pytest.mark.parametrize(
    "line",
    [
        "not json", "[]", "{}", '{"prompt": 1}', '{"messages": []}', '{"messages": [{"role": "user"}]}',
        '{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}', "[" * 2000,
    ],
)  # fmt: skip
def test_a_line_that_is_no_prompt(tmp_path: Path, line: str) -> None:
    file = jsonl(tmp_path / "p.jsonl", {"prompt": "Hi"}, line)
    with pytest.raises(UsageError, match=f"^--prompts: {file}, line 2: {EXPECTED}, found "):
        read_prompts(file, "--prompts")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no prompts"):
        read_prompts(jsonl(tmp_path / "empty.jsonl", ""), "--prompts")
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        read_prompts(tmp_path, "--prompts")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="is not UTF-8 text"):
        read_texts(binary)
    with pytest.raises(UsageError, match=r"--n: .* has 1 prompts, fewer than 2"):
        read_prompts(jsonl(tmp_path / "one.jsonl", {"prompt": "Hi"}), "--prompts", 2)


def test_texts(tmp_path: Path) -> None:
    plain = tmp_path / "story.txt"
    plain.write_text("Once upon\na time.\n")
    assert read_texts(plain) == ["Once upon\na time."]
    assert read_texts(jsonl(tmp_path / "t.jsonl", {"text": "a"}, {"text": "b", "more": 1})) == ["a", "b"]
    with pytest.raises(UsageError, match=r'line 1: expected \{"text": "\.\.\."\}, found'):
        read_texts(jsonl(tmp_path / "u.jsonl", {"prompt": "a"}))


def test_windows() -> None:
    assert windows(range(7), 3) == [range(3), range(3, 6)]  # the last would have a single token, which has no context
    assert windows([1], 3) == []
