"""lm-evaluation-harness as a process of its own: what it is given, how its samples are read, how it fails."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from textwrap import dedent
from threading import Thread, Timer
from typing import Any

import psutil
import pytest

from expo_serve.errors import ExpoError, ServeError, UsageError
from expo_serve.sweep import lm_eval
from expo_serve.sweep.endpoint import Endpoint
from expo_serve.sweep.lm_eval import check_lm_eval, run_lm_eval
from expo_serve.sweep.observations import Question
from tests.server import free_port

KEY = "a-secret-key"
DATE = "2026-01-02T03-04-05.678901"


class _Engine(BaseHTTPRequestHandler):
    """The two routes of an engine that are asked before the harness starts."""

    def do_GET(self) -> None:
        self._send({"data": [{"id": "model", "max_model_len": 512}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/tokenize"
        self._send({"count": 1 + body["add_special_tokens"]})

    def _send(self, content: Any) -> None:
        text = json.dumps(content).encode()
        self.send_response(200 if self.headers["Authorization"] == f"Bearer {KEY}" else 401)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def engine() -> Iterator[Endpoint]:
    """An engine's address; nothing answers questions there."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Engine) as listening:
        Thread(target=listening.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{listening.server_address[1]}/v1"
        yield Endpoint(url=url, model="model", key=KEY, alpha="0.5", tokenizer="/tokenizer")
        listening.shutdown()


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the whole PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def install(folder: Path, code: str) -> None:
    """Put a program in the place of the harness; ``config`` and ``out`` are what it is given."""
    head = f"""\
        #!{sys.executable}
        import json, sys, pathlib
        if sys.argv[1] == "run":
            config = json.load(open(sys.argv[3]))
            out = pathlib.Path(config["output_path"], "model")
            out.mkdir(parents=True)
            print("arguments:", config)
            (out / "results_{DATE}.json").write_text(json.dumps({{"config": config}}))
        def leave(task, *samples):
            lines = [json.dumps({{"doc_id": number, "filter": "none", **sample}}, ensure_ascii=False) for number, sample
                     in enumerate(samples)]
            (out / f"samples_{{task}}_{DATE}.jsonl").write_text("\\n".join(lines) + "\\n", encoding="utf-8")
    """
    program = folder / "lm_eval"
    program.write_text(dedent(head) + dedent(code))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


def scores(found: Sequence[Question]) -> dict[str, list[float]]:
    """Scores by task, in the order of the questions."""
    return {task: [one.correct for one in found if one.task == task] for task in dict.fromkeys(q.task for q in found)}


def test_first_filter_and_best_known_metric_count(path: Path, engine: Endpoint, tmp_path: Path) -> None:
    code = """
        line = {"doc": "two\\u2028lines", "metrics": ["f1", "acc", "acc_norm"], "f1": [1, 0]}
        leave("choice", {**line, "acc": 1.0, "acc_norm": 0.0}, {**line, "acc": 0.0, "acc_norm": 1.0})
        leave("sums_2_digits", {"metrics": ["acc"], "acc": True})
        wrong, right = ({"filter": "strict", "metrics": ["exact_match"], "exact_match": score} for score in (0.0, 1.0))
        leave("words", wrong, right, {**right, "filter": "loose"})
        other = {"metrics": ["bleu", "mc2"], "bleu": ["a", "b"]}
        leave("other", {**other, "mc2": 0.25}, {**other, "mc2": float("nan")})
    """
    install(path, code)
    found = list(run_lm_eval(["choice"], engine, tmp_path / "out"))
    assert scores(found) == {"choice": [0, 1], "other": [0.25], "sums_2_digits": [1], "words": [0, 1]}
    assert {one.alpha for one in found} == {0.5}
    assert [one.question for one in found if one.task == "words"] == ["0", "1"]


def test_what_the_harness_is_given(
    path: Path, engine: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    install(path, """leave("t", {"metrics": ["acc"], "acc": 1.0})""")
    list(run_lm_eval(["arc_easy", "my [own].yaml"], engine, Path("out"), at_once=1))
    (results,) = Path("out").rglob("results_*.json")
    config = json.loads(results.read_text())["config"]
    assert config == {
        "model": "local-completions",
        "model_args": {
            "base_url": f"{engine.url}/completions",
            "model": "model",
            "tokenizer": "/tokenizer",
            "tokenizer_backend": "huggingface",
            "tokenized_requests": True,
            "num_concurrent": 2,
            "timeout": 3600,
            "header": {"Authorization": "Bearer ***", "X-Expo-Alpha": "0.5"},
            "max_length": 512,
            "add_bos_token": True,
        },
        "tasks": ["arc_easy", f"{tmp_path}/my [[]own].yaml"],
        "output_path": str(tmp_path / "out/results"),
        "log_samples": True,
    }


def test_key_stays_nowhere(path: Path, engine: Endpoint, tmp_path: Path) -> None:
    install(path, """print(sys.argv); leave("t", {"metrics": ["acc"], "acc": 1.0})""")
    list(run_lm_eval(["t"], engine, tmp_path / "out"))
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert len(files) == 3
    assert [file for file in files if KEY in file.read_text()] == []
    assert "Bearer ***" in (tmp_path / "out/lm-eval.log").read_text()


def test_results_of_an_earlier_run_do_not_count(path: Path, engine: Endpoint, tmp_path: Path) -> None:
    install(path, """leave("old", {"metrics": ["acc"], "acc": 1.0})""")
    list(run_lm_eval(["old"], engine, tmp_path / "out"))
    install(path, """leave("new", {"metrics": ["acc"], "acc": 0.0})""")
    assert scores(list(run_lm_eval(["new"], engine, tmp_path / "out"))) == {"new": [0]}


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "raise ValueError('no such dataset')",
            r"failed: ValueError: no such dataset \(its log: .*/out/lm-eval\.log\)",
        ),
        (
            "print('datasets.exceptions.DataError: gone\\nbye'); sys.exit(1)",
            "failed: datasets.exceptions.DataError: gone",
        ),
        ("print('first\\rlast words'); sys.exit(3)", "failed: last words"),
        ("import os; os.kill(os.getpid(), 9)", "failed: arguments: .*"),
        ("", "left no samples of t"),
        (
            "leave('t', {'metrics': ['word_perplexity'], 'word_perplexity': [-1.0, 3]})",
            "task t has no score .*perplexity",
        ),
    ],
)
def test_harness_that_fails_is_one_line(code: str, message: str, path: Path, engine: Endpoint, tmp_path: Path) -> None:
    install(path, code)
    with pytest.raises(ExpoError, match=message) as raised:
        list(run_lm_eval(["t"], engine, tmp_path / "out"))
    assert "\n" not in raised.value.message
    assert KEY not in raised.value.message


def ends(pid: int, within: float = 5.0) -> bool:
    """Whether a process that was killed ends: that takes a moment, and its parent may not ask for it."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def test_interruption_ends_the_harness_and_its_children(path: Path, engine: Endpoint, tmp_path: Path) -> None:
    install(path, "import subprocess\nprint(subprocess.Popen(['/bin/sleep', '60']).pid, flush=True)\nsys.stdin.read()\n"
                  "import time; time.sleep(60)")  # fmt: skip
    log, started = tmp_path / "out/lm-eval.log", time.monotonic()
    Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        list(run_lm_eval(["t"], engine, tmp_path / "out"))
    assert time.monotonic() - started < 10
    child = int(log.read_text().splitlines()[-1])
    assert ends(child)


def test_engine_that_is_gone_is_one_line(path: Path, tmp_path: Path) -> None:
    install(path, "")
    with pytest.raises(ServeError, match="the engine does not answer: ConnectError"):
        list(run_lm_eval(["t"], Endpoint(f"http://127.0.0.1:{free_port()}/v1", "model", alpha="0"), tmp_path / "out"))


def test_engine_of_another_key_is_one_line(path: Path, engine: Endpoint, tmp_path: Path) -> None:
    install(path, "")
    with pytest.raises(ServeError, match=r"the engine does not answer: HTTPStatusError .*401"):
        list(run_lm_eval(["t"], Endpoint(engine.url, "model", "wrong", "0"), tmp_path / "out"))


def test_folder_that_cannot_be_written_is_one_line(path: Path, engine: Endpoint, tmp_path: Path) -> None:
    install(path, "")
    (tmp_path / "file").write_text("")
    with pytest.raises(ExpoError, match=r"file/out cannot be written: .*--resume"):
        list(run_lm_eval(["t"], engine, tmp_path / "file/out"))


def test_harness_that_is_not_there(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lm_eval").mkdir()  # a folder of that name is not it
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=re.escape("--lm-eval needs lm-evaluation-harness: pip install 'lm-eval[api]")):
        check_lm_eval(["arc_easy"])


def test_harness_without_its_client_is_found_before(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lm_eval.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("expo_serve.sweep.lm_eval._OF_API", ("json", "no_such_package"))
    with pytest.raises(UsageError, match=r"lacks no_such_package; pip install 'lm-eval\[api\]"):
        check_lm_eval(["arc_easy"])


def test_names_are_checked_by_the_harness(path: Path) -> None:
    install(path, """
        assert sys.argv[1:] == ["validate", "--tasks", "arc_easy,foo"]
        print("Tasks not found: foo"); sys.exit(1)
    """)  # fmt: skip
    with pytest.raises(UsageError, match=r"has no task foo; `.*lm_eval ls tasks` lists them"):
        check_lm_eval(["arc_easy", "mmlu_*", "foo"])
    install(path, "import no_such_package")
    with pytest.raises(UsageError, match="does not run: ModuleNotFoundError: No module named 'no_such_package'"):
        check_lm_eval(["arc_easy"])
    install(path, "print('All tasks found and valid')")
    check_lm_eval(["arc_easy"])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.yaml", None, "none.yaml cannot be read: No such file"),
        ("task.yml", "task: x", "takes files that end in .yaml only; rename it"),
        ("task.yaml", "a: [", "cannot be read: while parsing"),
        ("task.yaml", "- task", "expected a key `task`"),
        ("task.yaml", "tasks: x", "expected a key `task`"),
    ],
)
def test_file_that_is_no_task(name: str, text: str | None, message: str, path: Path, tmp_path: Path) -> None:
    install(path, "raise SystemExit(1)")
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=message) as raised:
        check_lm_eval([str(tmp_path / name)])
    assert "\n" not in raised.value.message


def test_file_with_functions_is_a_task(path: Path, tmp_path: Path) -> None:
    install(path, "raise SystemExit(1)")  # is not asked
    (tmp_path / "task.yaml").write_text("task: x\nprocess_docs: !function utils.process\n")
    check_lm_eval([str(tmp_path / "task.yaml")])


def test_parts_of_a_group_are_one_capability(tmp_path: Path) -> None:
    """The keys of the harness's own results; a group of groups, and a task asked for beside it."""
    parts = {"knowledge": ["science", "history"], "science": ["physics", "biology"], "history": [], "sums": []}
    (tmp_path / "model").mkdir()
    (tmp_path / f"model/results_{DATE}.json").write_text(json.dumps({"group_subtasks": parts}))
    found = lm_eval._groups(["knowledge", "sums"], tmp_path)
    assert found == dict.fromkeys(("science", "history", "physics", "biology"), "knowledge")
