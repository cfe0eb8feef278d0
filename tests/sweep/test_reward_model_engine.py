"""A real reward model, run by vLLM's pooling runner: its scores are those of transformers, and its processes end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Qwen2Config, Qwen2Model

from expo_serve.errors import ServeError
from expo_serve.sweep.observations import Score
from expo_serve.sweep.reward_model import AT_ONCE, RewardModel
from expo_serve.sweep.scored import Found, Scored
from tests.server import ENGINE_ENV
from tests.vllm_plugin.trees import assert_all_gone, assert_nothing_new, shared_memory

pytestmark = pytest.mark.engine
ROOT = Path(__file__).parents[2]
DEMO = ROOT / ".demo"
PAIRS = ROOT / "deploy/demo/reward/pairs.jsonl"
# In float32, so that the difference from transformers is that of the order of sums; without a process for the worker.
FLAGS = ["--dtype", "float32", "--distributed-executor-backend", "uni"]
TOO_LONG = "word " * 9000
Values = dict[tuple[float, int], float]
"""Scores by alpha and prompt."""


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    """Engines start as in a shell, whatever other tests have imported."""
    with mock.patch.dict(os.environ, ENGINE_ENV, clear=True):
        yield


@pytest.fixture(scope="module")
def model() -> Path:
    """The demo's reward model, which was trained to prefer lists."""
    prepare = [sys.executable, str(ROOT / "deploy/demo/prepare_reward.py"), "--out", str(DEMO)]
    subprocess.run(prepare, check=True, stdout=subprocess.DEVNULL)
    return DEMO / "reward-model"


@pytest.fixture(scope="module")
def pairs() -> list[dict[str, Any]]:
    """Answers to questions that the training never saw: a list and plain text each."""
    lines = PAIRS.read_text(encoding="utf-8").splitlines()
    held_out = [pair for pair in map(json.loads, lines) if pair["held_out"]]
    return held_out[::13]


@pytest.fixture(scope="module")
def asked(pairs: list[dict[str, Any]]) -> list[Scored]:
    """Their plain answers, as of alpha 0, an empty one, and their lists, as of alpha 1."""
    plain = [scored(number, pair["question"], pair["rejected"]) for number, pair in enumerate(pairs)]
    lists = [scored(number, pair["question"], pair["chosen"], alpha=1.0) for number, pair in enumerate(pairs)]
    return [*plain, scored(100, "And?", ""), *lists]


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Two would wait for one another at each step wherever something else runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def expected(one_thread: None, model: Path, asked: list[Scored]) -> Values:
    """Their scores without vLLM: the logit of each conversation by itself."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    classifier = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32)
    found = {}
    for item in asked:
        with torch.inference_mode():
            found[item.alpha, item.prompt] = classifier(**tokens_of(tokenizer, item)).logits.item()
    return found


@pytest.fixture(scope="module")
def running(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RewardModel]:
    """The reward model, started once; at the end nothing of it is left."""
    before, others = shared_memory(), set(psutil.Process().children(recursive=True))  # other tests' servers
    log = tmp_path_factory.mktemp("reward") / "reward-model.log"
    with RewardModel(str(model), log, FLAGS) as reward:
        family = [process for process in psutil.Process().children(recursive=True) if process not in others]
        yield reward
    assert_all_gone(family)
    assert_nothing_new(before)


def scored(prompt: int, question: str, answer: str, alpha: float = 0.0) -> Scored:
    return Scored(alpha, prompt, [{"role": "user", "content": question}], answer)


def values(found: list[Found]) -> Values:
    return {(one.alpha, one.prompt): one.value for one in found if isinstance(one, Score)}


def tokens_of(tokenizer: Any, item: Scored) -> Any:
    """The conversation under the model's own template."""
    messages = [*item.messages, {"role": "assistant", "content": item.answer}]
    return tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)


# The expected ones come first: what waits for an engine's requests takes its cores.
def test_scores_are_those_of_transformers(expected: Values, asked: list[Scored], running: RewardModel) -> None:
    too_long = scored(101, "Why?", TOO_LONG)
    found = list(running.score([too_long, *asked]))
    assert values(found) == pytest.approx(expected, abs=1e-3)
    assert {one.reward for one in found} == {running.spec}
    (failure,) = [one for one in found if one.kind == "failure"]
    assert (failure.use, failure.prompt) == ("reward", 101)
    assert "maximum context length is 8192 tokens" in failure.reason


def test_lists_have_the_higher_reward(expected: Values, pairs: list[dict[str, Any]]) -> None:
    differences = [expected[1.0, number] - expected[0.0, number] for number in range(len(pairs))]
    assert min(differences) > 1


def test_caller_that_stops_early(running: RewardModel, asked: list[Scored], expected: Values) -> None:
    results = running.score(asked)
    assert isinstance(next(results), Score)
    results.close()  # type: ignore[attr-defined]
    assert values(list(running.score(asked[:3]))) == pytest.approx(dict(list(expected.items())[:3]), abs=1e-3)


def test_model_that_refuses_everything_leaves_no_failures(running: RewardModel) -> None:
    results = running.score([scored(number, "Why?", TOO_LONG) for number in range(AT_ONCE)])
    with pytest.raises(ServeError, match=r"scored none of the first answers: status 400: .* \(its log: .*\)$"):
        next(results)


def test_engine_that_dies(running: RewardModel) -> None:
    """The last of those that share the server."""
    assert running._server is not None
    family = psutil.Process(running._server._keeper.pid).children(recursive=True)  # not those of other tests' servers
    engine = next(one for one in family if "EngineCore" in one.cmdline()[0])
    engine.kill()
    results = running.score([scored(0, "Why?", "So.")])
    with pytest.raises(ServeError, match=r"^the reward model \S+ [a-z ]+ \(.+\): .+ \(its log: \S+\)$"):
        list(results)


@pytest.mark.slow
def test_model_that_does_not_load(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "wondrous"}))
    reward = RewardModel(str(folder), tmp_path / "log")
    with pytest.raises(ServeError) as caught:
        next(reward.score([scored(0, "Why?", "So.")]))
    reason = "The checkpoint you are trying to load has model type `wondrous` but Transformers does not recognize"
    assert str(caught.value).startswith(f"the reward model {folder} did not start: {reason}")
    assert str(caught.value).endswith(f" (its log: {tmp_path / 'log'})")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_nothing_outlives_a_command_that_is_killed(model: Path, tmp_path: Path) -> None:
    code = "import sys\nfrom pathlib import Path\nfrom expo_serve.sweep.reward_model import RewardModel\n"
    code += "RewardModel(sys.argv[1], Path(sys.argv[2])).__enter__()"
    before = shared_memory()
    process = subprocess.Popen([sys.executable, "-c", code, str(model), str(tmp_path / "log")])
    family: list[psutil.Process] = []
    deadline = time.monotonic() + 30
    while not any("expo_serve.vllm_plugin.pooling" in one.cmdline() for one in family):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
        family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert_all_gone(family)
    assert_nothing_new(before)


def build_token_rewards(folder: Path, tokenizer: Path) -> None:
    """A tiny random model with one reward a token: a decoder, then two layers with a ReLU between."""
    torch.manual_seed(7)
    config = Qwen2Config(
        vocab_size=49152, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, architectures=["Qwen2ForRewardModel"],
    )  # fmt: skip
    decoder = Qwen2Model(config).to(torch.float32)
    decoder.save_pretrained(folder)
    tensors = {f"model.{name}": tensor for name, tensor in decoder.state_dict().items()}
    for name, shape in {"0.weight": (64, 64), "0.bias": (64,), "2.weight": (1, 64), "2.bias": (1,)}.items():
        tensors[f"score.{name}"] = torch.randn(shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, "architectures": ["Qwen2ForRewardModel"]}))
    for file in [*tokenizer.glob("tokenizer*"), tokenizer / "chat_template.jinja"]:
        (folder / file.name).write_bytes(file.read_bytes())


@pytest.mark.slow
def test_reward_of_a_model_with_one_each_token_is_that_of_the_last(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build_token_rewards(folder, model)
    items = [scored(0, "Why?", "So it is."), scored(1, "How can I sleep well?", "- Go to bed early.\n- No coffee.")]
    found = values(list(RewardModel(str(folder), tmp_path / "log", FLAGS).score(items)))
    tokenizer, tensors = AutoTokenizer.from_pretrained(folder), load_file(folder / "model.safetensors")
    decoder = Qwen2Model(Qwen2Config.from_pretrained(folder)).to(torch.float32)
    decoder.load_state_dict({name[6:]: tensor for name, tensor in tensors.items() if name.startswith("model.")})
    for item in items:
        with torch.inference_mode():
            state = decoder(**tokens_of(tokenizer, item)).last_hidden_state[0, -1]
        inner = torch.relu(tensors["score.0.weight"] @ state + tensors["score.0.bias"])
        expected = tensors["score.2.weight"] @ inner + tensors["score.2.bias"]
        assert found[0.0, item.prompt] == pytest.approx(expected.item(), abs=1e-3)
    assert abs(found[0.0, 0] - found[0.0, 1]) > 0.1
