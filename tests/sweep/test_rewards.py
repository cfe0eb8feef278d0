"""What ``--reward`` names, found before anything starts; and functions as rewards."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest

from expo_serve.errors import ExpoError, UsageError
from expo_serve.sweep.observations import Failure, Score
from expo_serve.sweep.python_reward import FIRST, PythonReward
from expo_serve.sweep.rewards import open_reward
from expo_serve.sweep.scored import Found, Scored

Write = Callable[[str], str]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Write:
    """Writes a module into the working directory; returns its name, which no other test has."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"reward_of_{abs(hash(request.node.nodeid))}"

    def write(text: str) -> str:
        (tmp_path / f"{name}.py").write_text(dedent(text))
        return name

    return write


def items(count: int) -> list[Scored]:
    """Answers ``0`` to ``count - 1``."""
    chat = [{"role": "system", "content": "Count."}, {"role": "user", "content": "From where?"}]
    return [Scored(0.5, number, chat, str(number), "0", {"gold": number, "answer": "taken"}) for number in range(count)]


def values(found: list[Found]) -> list[float]:
    """Scores in the order of the prompts; all must be scores."""
    assert [one for one in found if not isinstance(one, Score)] == []
    return [one.value for one in sorted(found, key=lambda one: one.prompt) if isinstance(one, Score)]


def reasons(found: list[Found]) -> dict[int, str]:
    """Reasons of failures by prompt."""
    return {one.prompt: one.reason for one in found if isinstance(one, Failure)}


@pytest.mark.parametrize("spec", ["", "python", "python:", "vllm:", "http://127.0.0.1/v1,model", "Python:a:b"])
def test_spec_names_no_reward(spec: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--reward: expected vllm:MODEL .*openai:URL,MODEL .*python:module:function"):
        open_reward(spec, tmp_path)


def test_missing_reward_model_is_found_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"vllm:{tmp_path}/none"):
        open_reward(f"vllm:{tmp_path}/none", tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{module}", "expected python:module:function"),
        ("{module}:", "expected python:module:function"),
        ("{module}.py:score", r"give the module's name, without folder and \.py"),
        ("{module}:missing", r"module {module} \(.*{module}\.py\) has no function missing"),
        ("{module}:VALUE", "expected a function, found int"),
        ("{module}:alone", r"expected function\(prompt, answer, \*\*more\), found alone\(prompt\)"),
        ("no_such_module:score", r"cannot be imported: ModuleNotFoundError: No module named 'no_such_module'; it is"),
        ("no_such.module:score", "No module named 'no_such'"),
    ],
)
def test_function_that_is_not_there(name: str, message: str, module: Write) -> None:
    found = module("VALUE = 3\ndef alone(prompt): return 1.0\n")
    with pytest.raises(UsageError, match=message.format(module=found)) as raised:
        PythonReward(name.format(module=found))
    assert raised.value.message.startswith(f"--reward python:{name.format(module=found)}: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_package", "No module named 'no_such_package' (/"),
        ("def score(:", "SyntaxError: invalid syntax (/"),
        ("raise SystemExit('no licence')", "SystemExit: no licence (/"),
        ("1 / 0", "ZeroDivisionError: division by zero (/"),
    ],
)
def test_module_that_cannot_be_imported(text: str, message: str, module: Write) -> None:
    name = module(f"\n{text}\n")
    with pytest.raises(UsageError) as raised:
        PythonReward(f"{name}:score")
    assert message in raised.value.message
    assert f"{name}.py, line 2); it is looked for" in raised.value.message
    assert "\n" not in raised.value.message


def test_function_gets_the_prompt_the_answer_and_more(module: Write) -> None:
    name = module("""
        def score(prompt, answer, **more):
            assert prompt == "From where?"
            assert more.keys() == {"messages", "alpha", "extra", "gold"}  # not the key that is also a parameter
            assert more["messages"][0]["content"] == "Count."
            assert more["extra"]["answer"] == "taken"
            return float(answer) + more["gold"] + more["alpha"]
    """)
    reward = PythonReward(f"{name}:score")
    found = list(reward.score(items(3)))
    assert values(found) == [0.5, 2.5, 4.5]
    assert {(one.alpha, one.reward) for one in found if isinstance(one, Score)} == {(0.5, f"python:{name}:score")}
    assert not reward.is_late


def test_function_gets_only_what_it_takes(module: Write) -> None:
    name = module("""
        import math
        def plain(question, reply): return len(question) + int(reply)
        def named(prompt, answer, gold, *, alpha, other=7): return gold + alpha + other
        def positional(prompt, answer, /, answer_key=None): return answer_key or int(answer)
        class Scorer:
            def __call__(self, prompt, answer): return int(answer)
            def method(self, prompt, answer, extra): return extra["gold"]
        scorer = Scorer()
    """)
    assert values(list(PythonReward(f"{name}:plain").score(items(2)))) == [11, 12]
    assert values(list(PythonReward(f"{name}:named").score(items(2)))) == [7.5, 8.5]
    assert values(list(PythonReward(f"{name}:positional").score(items(2)))) == [0, 1]
    assert values(list(PythonReward(f"{name}:scorer").score(items(2)))) == [0, 1]
    assert values(list(PythonReward(f"{name}:scorer.method").score(items(2)))) == [0, 1]


def test_function_that_is_built_in_is_called_as_well() -> None:
    chat = [{"role": "user", "content": "abc"}]
    assert values(list(PythonReward("operator:eq").score([Scored(0, 0, chat, "abc"), Scored(0, 1, chat, "x")]))) == [
        1,
        0,
    ]


def test_module_imports_its_neighbours_and_shadows_nothing_later(module: Write, tmp_path: Path) -> None:
    (tmp_path / "tabnanny.py").write_text("MINE = True\n")  # the name of a module that nothing has imported yet
    (tmp_path / "neighbour_of_it.py").write_text("VALUE = 2.5\n")
    name = module("""
        import neighbour_of_it
        def score(prompt, answer):
            import tabnanny
            import neighbour_of_it
            return neighbour_of_it.VALUE + hasattr(tabnanny, "MINE")
    """)
    sys.modules.pop("tabnanny", None)
    assert values(list(PythonReward(f"{name}:score").score(items(1)))) == [2.5]
    assert sys.path[-1] == str(tmp_path)
    assert sys.path[0] != str(tmp_path)


def test_numbers_of_every_kind_are_scores(module: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    name = module("VALUES = []\ndef score(prompt, answer): return VALUES[int(answer)]\n")
    reward = PythonReward(f"{name}:score")
    monkeypatch.setattr(sys.modules[name], "VALUES", [True, 2, np.float32(0.5), np.array(1.5)])
    assert values(list(reward.score(items(4)))) == [1, 2, 0.5, 1.5]


def test_what_is_no_number_is_a_failure(module: Write) -> None:
    name = module("""
        WRONG = [float("nan"), float("inf"), None, "1.0", [1.0], {}]
        def score(prompt, answer):
            number = int(answer)
            if number == 1:
                raise KeyError("two\\nlines")
            if number == 2:
                exit()
            return 1.0 if number == 0 else WRONG[number - 3]
    """)
    reward = PythonReward(f"{name}:score")
    found = list(reward.score(items(9)))
    assert [one.prompt for one in found if isinstance(one, Score)] == [0]
    failed = reasons(found)
    assert failed.keys() == set(range(1, 9))
    assert failed[1].startswith("KeyError: 'two\\nlines' (")
    assert failed[1].endswith(f"{name}.py, line 6)")
    assert failed[2].startswith("SystemExit")
    assert failed[3] == "expected a finite number, the function returned nan"
    assert {one.reward for one in found if isinstance(one, Failure)} == {reward.spec}


def test_function_that_always_fails_is_given_up_without_a_trace(module: Write) -> None:
    name = module("def score(prompt, answer, missing): return 1.0\n")
    found: list[Found] = []
    with pytest.raises(
        ExpoError, match=rf"each of the first {FIRST} answers.*missing.*'missing'; correct it.*--resume"
    ):
        found.extend(PythonReward(f"{name}:score").score(items(50)))
    assert found == []


def test_few_failures_from_the_start_are_kept(module: Write) -> None:
    name = module(f"def score(prompt, answer): return 1.0 if int(answer) >= {FIRST - 1} else None\n")
    reward = PythonReward(f"{name}:score")
    assert len(reasons(list(reward.score(items(3))))) == 3  # a resumed sweep may have as few left
    found = list(PythonReward(f"{name}:score").score(items(40)))
    assert len(found) == 40
    assert len(reasons(found)) == FIRST - 1
    with pytest.raises(ExpoError, match="each of the first"):
        list(reward.score(items(7)))


def test_answers_that_all_fail_later_are_failures(module: Write) -> None:
    name = module("def score(prompt, answer, alpha): return None if alpha else 1.0\n")
    reward = PythonReward(f"{name}:score")
    chat = [{"role": "user", "content": "x"}]
    assert values(list(reward.score([Scored(0, 0, chat, "")]))) == [1]
    assert len(reasons(list(reward.score(items(30))))) == 30


def test_each_answer_is_scored_when_it_is_asked_for(module: Write) -> None:
    """What was scored before an interruption is in the caller's hands already."""
    name = module("CALLS = []\ndef score(prompt, answer):\n    CALLS.append(answer)\n    return 1.0\n")
    assert len(list(islice(PythonReward(f"{name}:score").score(items(20)), 3))) == 3
    assert sys.modules[name].CALLS == ["0", "1", "2"]


def test_interruption_passes_through(module: Write) -> None:
    name = module("def score(prompt, answer): raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        list(PythonReward(f"{name}:score").score(items(1)))


def test_async_function_is_called_for_several_answers_at_once(module: Write) -> None:
    name = module("""
        import asyncio
        async def score(prompt, answer, gold):
            await asyncio.sleep(0.1)
            if gold == 5:
                raise ValueError("five")
            return gold
    """)
    started = time.monotonic()
    found = list(PythonReward(f"{name}:score").score(items(16)))
    assert time.monotonic() - started < 1
    assert sorted(value for value in values([one for one in found if isinstance(one, Score)])) == [
        number for number in range(16) if number != 5
    ]
    assert reasons(found)[5].startswith("ValueError: five (")
