"""The real command where there is next to nothing: no locale, no home, no folder to write to, closed descriptors.

What it answers is what it answers elsewhere, and a failure is one line.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from tests.cli.bare import ASCII, COMMAND, ENVIRONMENTS, PROCESS_1, ROOT, UNKNOWN_USER, Bare
from tests.models.raw import tiny_tensors, write_pair, write_raw
from tests.server import free_port
from tests.vllm_plugin.trees import assert_all_gone

SECONDS = 60
REFUSAL = "expo-serve: error: 3 tensors are in one checkpoint only (3 in aligned, 0 in base); "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good pair, and a checkpoint that does not fit to it. Names of files are not ASCII."""
    folder = tmp_path_factory.mktemp("größe ☃")
    _, aligned = write_pair(folder)
    (aligned / "tokenizer.json").write_text("{}")
    write_raw(folder / "other", tiny_tensors(layers=3))
    return folder


def pair(folder: Path, aligned: str = "aligned") -> list[str]:
    """Flags."""
    return ["--base", str(folder / "base"), "--aligned", str(folder / aligned), "--alpha", "0.5"]


def run(bare: Bare, *arguments: str) -> tuple[int, str, str]:
    """Run the command to its end; returns the exit code, standard output and standard error."""
    with bare.start(*COMMAND, *arguments) as process:
        try:
            output, errors = process.communicate(timeout=SECONDS)
        finally:
            process.kill()
    assert "Traceback" not in output + errors
    return process.returncode, output, errors


@pytest.fixture(params=ENVIRONMENTS)
def bare(request: pytest.FixtureRequest) -> Bare:
    """Each of the environments."""
    return ENVIRONMENTS[request.param]


def said(bare: Bare, output: str, errors: str) -> str:
    """Where an error is to be found: on standard output if only standard error is closed."""
    if "2>" not in bare.redirections:
        return errors
    assert errors == ""
    return output


def test_help(bare: Bare) -> None:
    code, output, errors = run(bare, "--help")
    assert (code, errors) == (0, "")
    assert output.startswith("usage: expo-serve") == (">&-" not in bare.redirections.replace("2>&-", ""))


def test_inspection(bare: Bare, folder: Path) -> None:
    code, output, errors = run(bare, "inspect", *pair(folder), "--json")
    assert (code, errors) == (0, "")
    if ">&-" in bare.redirections.replace("2>&-", ""):
        assert output == ""
    else:
        assert json.loads(output)["alpha"] == 0.5


def test_refused_pair(bare: Bare, folder: Path) -> None:
    code, output, errors = run(bare, *pair(folder, "other"))
    assert code == 2
    if lines := said(bare, output, errors).splitlines():
        assert lines[-1].startswith(REFUSAL)
    else:
        assert "2>&-" in bare.redirections
        assert ">&-" in bare.redirections.replace("2>&-", "")


def test_probe_of_nobody(bare: Bare) -> None:
    code, output, errors = run(bare, "probe", "--url", "http://127.0.0.1:9", "--alpha", "0.5")
    assert code == 1
    text = said(bare, output, errors)
    assert text == "" or text.startswith("expo-serve: error: http://127.0.0.1:9/v1/expo does not answer")


@pytest.mark.parametrize("is_buffered", [True, False], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize(
    "arguments", [["--version"], ["--help"], ["inspect"], ["inspect", "--json"], ["pairs"]], ids=str
)
def test_output_that_cannot_be_written(folder: Path, arguments: list[str], is_buffered: bool) -> None:
    bare = Bare({} if is_buffered else {"PYTHONUNBUFFERED": "1"}, redirections=">/dev/full")
    code, _, errors = run(bare, *arguments, *(pair(folder) if "inspect" in arguments else []))
    assert code == 1
    assert errors == "expo-serve: error: standard output cannot be written: No space left on device\n"


def test_refusal_where_output_cannot_be_written(folder: Path) -> None:
    code, _, errors = run(Bare(redirections=">/dev/full"), *pair(folder, "other"))
    assert code == 2
    assert errors.splitlines()[-1].startswith(REFUSAL)


def test_no_folder_for_temporary_files(folder: Path) -> None:
    """Where a server would start: one line, instead of a traceback of torch's."""
    code, _, errors = run(ENVIRONMENTS["read-only"], *pair(folder))
    assert code == 1
    assert re.fullmatch(r"expo-serve: error: vLLM needs a folder .*; set TMPDIR to .*", errors.splitlines()[-1])


@pytest.mark.parametrize("redirections", ["2>&-", "<&- >&- 2>&-"])
def test_merge_without_standard_error(folder: Path, tmp_path: Path, redirections: str) -> None:
    """The progress that it shows there, and nothing else, is lost."""
    code, _, _ = run(Bare(redirections=redirections), "merge", *pair(folder), "--out", str(tmp_path / "out"))
    assert code == 0
    assert (tmp_path / "out/model.safetensors").is_file()


def test_names_are_written_though_the_locale_is_ascii(folder: Path) -> None:
    code, _, errors = run(Bare(ASCII), "--base", str(folder / "mißt"), "--aligned", str(folder), "--alpha", "1")
    assert code == 2
    assert f"{folder.name}/mißt" in errors


def test_hub_id_of_a_user_without_a_home(tmp_path: Path) -> None:
    bare = Bare({"HF_HUB_OFFLINE": "1"}, namespaces=UNKNOWN_USER)
    code, _, errors = run(bare, "--base", "someone/model", "--aligned", str(tmp_path), "--alpha", "1")
    assert code == 2
    assert errors == (
        "expo-serve: error: base: 'someone/model' needs a folder for downloads, and this user has no home: "
        "set HF_HOME, or give --download-dir\n"
    )


@pytest.mark.parametrize("redirections", ["", "<&-", "2>&-", "<&- >&- 2>&-"])
def test_status_port_of_a_failed_start(folder: Path, redirections: str) -> None:
    """Nothing that the command opens may take the place of what is closed: its children would write there."""
    port = free_port()
    arguments = [*pair(folder, "other"), "--host", "127.0.0.1", "--status-port", str(port)]
    with Bare(redirections=redirections).start(*COMMAND, *arguments) as process:
        try:
            state = wait_for_failure(port)
            httpx.get(f"http://127.0.0.1:{port}/metrics").raise_for_status()  # it was seen: the command may end
            assert process.wait(SECONDS) == 2
        finally:
            process.kill()
        assert "Traceback" not in process.communicate()[1]
    assert state["reason"] == "pair"


def wait_for_failure(port: int) -> dict[str, str]:
    """Wait until a start has failed; returns the error."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        try:
            error: dict[str, str] | None = httpx.get(f"http://127.0.0.1:{port}/state", timeout=5).json()["error"]
        except httpx.TransportError:
            error = None
        if error:
            return error
        time.sleep(0.05)
    raise AssertionError("the start never failed")


@contextmanager
def process_1(*command: str, before: str = "", **variables: str) -> Iterator[psutil.Process]:
    """A program as process 1 of its own tree; gives the process as it is seen from outside."""
    with Bare(variables, namespaces=PROCESS_1, before=before).start(*command) as outside:
        try:
            deadline = time.monotonic() + SECONDS
            while not (children := psutil.Process(outside.pid).children()):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield children[0]
        finally:
            for child in psutil.Process(outside.pid).children():
                child.kill()
            outside.wait(SECONDS)


def zombies(process: psutil.Process) -> list[str]:
    """Names of the children that nobody has reaped."""
    return [child.name() for child in process.children() if child.status() == psutil.STATUS_ZOMBIE]


def test_process_1_reaps_what_is_not_its_own() -> None:
    """Orphans of whoever came before it, and of whoever runs something in its container later."""
    request = {"request": {"port": free_port()}, "status_port": (port := free_port())}
    orphans = "for after in 0.1 3 4; do (sleep $after &); done; exec "
    command = [sys.executable, "-m", "tests.cli.family_command", json.dumps(request)]
    with process_1(*command, before=orphans) as process:
        wait_ready(port)
        sleepers = [child for child in process.children() if child.name() == "sleep"]
        assert sleepers, "none was left: this shows nothing"
        inside = ["nsenter", "--target", str(process.pid), "--pid", "sh", "-c", "(sleep 0.2 &)"]
        subprocess.run(inside, check=True)
        family = [process, *process.children(recursive=True)]
        deadline = time.monotonic() + SECONDS
        while any(child.name() == "sleep" for child in process.children()):
            assert time.monotonic() < deadline, zombies(process)
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert_all_gone(family)


def test_process_1_reaps_before_it_has_started_anything(tmp_path: Path) -> None:
    """While a download of the sources takes its time, for example."""
    began = tmp_path / "began"
    code = (
        "import pathlib, sys, time; from expo_serve.cli.family import Family\n"
        "with Family(time.monotonic(), 0.0, None) as family, family.reaping():\n"
        "    pathlib.Path(sys.argv[1]).touch(); time.sleep(60)"
    )
    with process_1(sys.executable, "-c", code, str(began), before="(sleep 4 &); exec ") as process:
        deadline = time.monotonic() + SECONDS
        while not began.exists() or process.children():
            assert time.monotonic() < deadline, zombies(process)
            time.sleep(0.1)


def wait_ready(port: int, seconds: float = SECONDS) -> None:
    """Wait until a server is ready."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/ready", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError("it was never ready")


SERVING = {
    "process 1 with nothing": Bare(ASCII, redirections="<&-", namespaces=PROCESS_1),
    "unknown user": Bare(ASCII, namespaces=UNKNOWN_USER),
    "all is closed": Bare(redirections="<&- >&- 2>&-"),
}


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("name", SERVING)
def test_it_serves(demo_pair: tuple[Path, Path], name: str) -> None:
    port, status_port = free_port(), free_port()
    base, aligned = (str(folder.resolve()) for folder in demo_pair)
    arguments = ["--base", base, "--aligned", aligned, "--alpha", "0.5", "--enforce-eager", "--max-model-len", "256"]
    arguments += ["--host", "127.0.0.1", "--port", str(port), "--status-port", str(status_port)]
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    bare = SERVING[name]._replace(variables={**SERVING[name].variables, **variables})
    with bare.start(*COMMAND, *arguments, folder=ROOT) as process:
        try:
            wait_ready(status_port, 240)
            body = {"prompt": "The capital of France is ☃", "max_tokens": 4}
            answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60)
            assert answer.json()["choices"][0]["text"]
            root = psutil.Process(process.pid)
            root = root.children()[0] if bare.namespaces == PROCESS_1 else root
            family = [root, *root.children(recursive=True)]
            root.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
            assert_all_gone(family)
        finally:
            process.kill()
