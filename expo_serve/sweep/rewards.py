"""The rewards that ``--reward`` can name: a reward model, a judge, a function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from expo_serve.errors import UsageError
from expo_serve.sweep.scored import Reward, Scored

__all__ = ["Reward", "Scored", "open_reward"]

_EXPECTED = (
    "vllm:MODEL (a reward model), openai:URL,MODEL (a judge at an OpenAI-compatible address) or "
    "python:module:function (a function of prompt and answer)"
)


def open_reward(spec: str, folder: Path) -> Reward:
    """Open the reward that a ``--reward`` names, and check what can be checked before an engine starts.

    Args:
        spec: the value of the flag.
        folder: of the sweep, where logs and answers of judges are kept; need not exist yet.

    Raises:
        UsageError: it names no reward, or one that is not there.
    """
    kind, _, rest = spec.partition(":")
    opener = _OPENERS.get(kind)
    if opener is None or not rest:
        raise UsageError(f"--reward: expected {_EXPECTED}, found {spec!r:.100}")
    return opener(rest, folder)


def _open_model(rest: str, folder: Path) -> Reward:
    from expo_serve.sweep.reward_model import RewardModel

    return RewardModel(rest, folder / "reward-model.log")


def _open_judge(rest: str, folder: Path) -> Reward:
    from expo_serve.sweep.judge import open_judge

    return open_judge(rest, folder / "judge.jsonl")


def _open_function(rest: str, folder: Path) -> Reward:
    from expo_serve.sweep.python_reward import PythonReward

    return PythonReward(rest)


_OPENERS: dict[str, Callable[[str, Path], Reward]] = {
    "vllm": _open_model,
    "openai": _open_judge,
    "python": _open_function,
}
