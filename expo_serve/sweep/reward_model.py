"""``--reward vllm:MODEL``: a reward model, which vLLM's pooling runner runs once the engine under test is gone.

What it scores is the conversation: the prompt's messages and the answer as the assistant's, under the chat template of
its own tokenizer. Two kinds of models are run:

* sequence classifiers with one label: the reward is the raw logit, without an activation (POST /classify);
* models with one reward a token: the reward is that of the last token (POST /pooling).

A conversation that is longer than the model takes is a failure of that answer: a truncated one would be another
answer's score.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from expo_serve.errors import ServeError, UsageError
from expo_serve.sweep.at_once import ask_at_once
from expo_serve.sweep.observations import Failure, Score
from expo_serve.sweep.pooling_server import PoolingServer
from expo_serve.sweep.scored import Found, Patience, Scored, shorten

AT_ONCE = 32
"""Requests under way; vLLM itself decides how many of them it computes together."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_ONE_LABEL = "ForSequenceClassification"
_EACH_TOKEN = "ForRewardModel"
_WEIGHTS = (".safetensors", ".bin", ".pt")
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")


@dataclass(frozen=True)
class _Checked:
    """A model that vLLM can run as a reward model."""

    location: str
    """Folder or hub id."""
    revision: str | None
    """Commit of a hub id."""
    has_each_token: bool
    """Whether it gives one reward a token, rather than one a conversation."""


class RewardModel:
    """A reward model. Its process is started for :meth:`score`, or for as long as the context is entered.

    Args:
        model: folder or hub id.
        log: file that the process's output is appended to.
        arguments: flags of vLLM's for this model.
        at_once: requests at once at most.

    Raises:
        UsageError: the model cannot be found, or its config is not that of a reward model. Nothing is started.
    """

    is_late = True
    """It needs the place of the engine under test, on a single GPU."""

    def __init__(self, model: str, log: Path, arguments: Sequence[str] = (), at_once: int = AT_ONCE) -> None:
        self.spec = f"vllm:{model}"
        self._model = _check(self.spec, model)
        self._log, self._arguments, self._at_once = log, tuple(arguments), at_once
        self._server: PoolingServer | None = None

    @property
    def revision(self) -> str | None:
        """Commit of a model of the hub; it is this one that is run."""
        return self._model.revision

    def __enter__(self) -> RewardModel:
        """Start the process and wait until it answers.

        Raises:
            ServeError: it does not; says why in one line.
        """
        revision = ["--revision", self._model.revision] if self._model.revision else []
        arguments = [*revision, *self._arguments]
        self._server = PoolingServer(self._model.location, arguments, self._log).__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.__exit__(kind, error, trace)

    def score(self, items: Sequence[Scored]) -> Iterator[Found]:
        """Score answers, many at once, and yield each score as it comes.

        A conversation that the model refuses, a too long one for example, is a :class:`Failure`.

        Raises:
            ServeError: the process does not start, ends, or refuses all of the first answers; what was yielded before
                stands.
        """
        if not items:
            return
        with nullcontext() if self._server else self:
            assert self._server is not None
            replies = ask_at_once(self._server.connect, items, self._ask, self._at_once)
            with closing(replies):
                yield from Patience(self._at_once, self._refuses_all).watch(replies)

    def _refuses_all(self, last: Failure) -> ServeError:
        return ServeError(f"{self.spec} scored none of the first answers: {last.reason} (its log: {self._log})")

    async def _ask(self, http: httpx.AsyncClient, item: Scored) -> Score | Failure:
        server = self._server
        assert server is not None
        messages = [*item.messages, {"role": "assistant", "content": item.answer}]
        route = "/pooling" if self._model.has_each_token else "/classify"
        try:
            response = await http.post(route, json={"messages": messages, "use_activation": False})
        except httpx.HTTPError as error:
            raise server.failure(f"does not answer ({type(error).__name__})") from None
        if response.status_code == 200:
            value = self._reward(response.json()["data"][0])
            return Score(alpha=item.alpha, prompt=item.prompt, reward=self.spec, value=value)
        said = f"status {response.status_code}: {_message(response)}"
        if response.status_code >= 500 and not server.is_well():
            raise server.failure(f"failed ({shorten(said, 100)})")
        return item.failure(self.spec, said)

    def _reward(self, found: dict[str, Any]) -> float:
        if self._model.has_each_token:
            return float(found["data"][-1][0])
        (logit,) = found["probs"]
        return float(logit)


def _message(response: httpx.Response) -> str:
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text
    return str(message)


def _check(spec: str, model: str) -> _Checked:
    """Find the model and read its config, before anything is started.

    Raises:
        UsageError: it cannot be found, or is no reward model; one line.
    """
    folder = _folder(model)
    if folder is not None:
        location, revision, files = str(folder.resolve()), None, folder
        _check_weights(spec, folder)
    elif _HUB_ID.fullmatch(model):
        files, revision = _from_hub(spec, model)
        location = model
    else:
        raise UsageError(f"--reward {spec}: {model!r} is neither a folder nor a hub id; give a reward model's")
    config = _read(spec, files / "config.json")
    has_each_token = _kind(spec, config)
    _check_template(spec, files)
    return _Checked(location, revision, has_each_token)


def _folder(model: str) -> Path | None:
    try:
        folder = Path(model).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # too long, a user that does not exist, a NUL
        return None


def _kind(spec: str, config: dict[str, Any]) -> bool:
    """Return whether a config is that of a model with a reward for each token, rather than one label.

    Raises:
        UsageError: it is neither.
    """
    architectures = [str(name) for name in config.get("architectures") or ["none"]]
    if architectures[0].endswith(_EACH_TOKEN):
        if "reward_token_id" in config:
            raise UsageError(
                f"--reward {spec}: its reward stands at a token that only its own code appends (reward_token_id), so "
                "vLLM cannot be asked for it; give a sequence classifier with one label"
            )
        return True
    if not architectures[0].endswith(_ONE_LABEL):
        raise UsageError(
            f"--reward {spec}: not a reward model: expected a config with architecture *{_ONE_LABEL} or "
            f"*{_EACH_TOKEN}, found {', '.join(architectures)}"
        )
    labels = config.get("id2label")
    count = len(labels) if labels else config.get("num_labels", 2)  # as transformers counts them
    if count != 1:
        raise UsageError(f"--reward {spec}: expected a classifier with one label, its logit the reward, found {count}")
    return False


def _check_weights(spec: str, folder: Path) -> None:
    """Refuse a folder without weights, which vLLM would find out only after all answers.

    Raises:
        UsageError: it has none.
    """
    if not any(any(folder.glob(f"*{suffix}")) for suffix in _WEIGHTS):
        raise UsageError(f"--reward {spec}: {folder} has no weights (*{', *'.join(_WEIGHTS)}); give a whole checkpoint")


def _check_template(spec: str, folder: Path) -> None:
    """Refuse a model that has no chat template, so no way to read a conversation.

    Raises:
        UsageError: it has none.
    """
    if any((folder / name).is_file() for name in _TEMPLATE_FILES):
        return
    settings = folder / "tokenizer_config.json"
    if not settings.is_file() or not _read(spec, settings).get("chat_template"):
        raise UsageError(
            f"--reward {spec}: its tokenizer has no chat template; add the one that it was trained with to its "
            f"folder, as {_TEMPLATE_FILES[0]}"
        )


def _read(spec: str, file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UsageError: there is none.
    """
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"--reward {spec}: {file} cannot be read: {reason}; give a reward model's folder") from None
    if not isinstance(content, dict):
        raise UsageError(f"--reward {spec}: {file}: expected a JSON object, found {type(content).__name__}")
    return content


def _from_hub(spec: str, model: str) -> tuple[Path, str]:
    """Return the cached folder of a model's configs, downloaded if needed, and its commit.

    Raises:
        UsageError: the hub, and its cache, do not have them.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(model, allow_patterns=["config.json", "tokenizer_config.json", "chat_template*"])
        )
    except Exception as error:  # noqa: BLE001 - whatever the hub, the network or the cache does
        reason = shorten(f"{type(error).__name__}: {error}", 200)
        raise UsageError(f"--reward {spec}: no such folder, and not to be had from the hub: {reason}") from None
    return folder, folder.name
