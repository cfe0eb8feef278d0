"""The download Job and the pods that wait for it: the rendered containers' commands, against a hub on this machine."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest

from tests.deploy.chart import Object, load, pick, render
from tests.deploy.container import Container
from tests.deploy.hub import Request, running_hub
from tests.deploy.weights import LEFT_OUT, WANTED, Release, unshare, write_checkpoints

TOKEN = "hf_a-token-that-nobody-may-see"


@dataclass
class Filled:
    """A release whose Job has run once; ``seen`` are the hub's requests with what was marked then."""

    release: Release
    commits: dict[str, str]
    seen: list[tuple[Request, set[str]]]
    result: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    write_checkpoints(folder)
    return folder


@pytest.fixture(scope="module")
def filled(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Filled]:
    """Three variants: two share a pair, the third has an adapter in place of aligned."""
    with running_hub() as hub:
        commits = {side: hub.add(f"org/{side}", checkpoints / side) for side in ("adapter", "aligned", "base")}
        defaults = {side: f"org/{side}" for side in ("aligned", "base")}
        defaults |= {f"{side}Revision": commits[side] for side in defaults}
        adapter = {"alpha": "0.3", "delta": "org/adapter", "deltaRevision": commits["adapter"]}
        variants = {"mild": {"alpha": "0.3"}, "strong": {"alpha": "-0.5"}, "small": adapter}
        release = Release(tmp_path_factory.mktemp("filled"), hub, defaults, variants)
        seen: list[tuple[Request, set[str]]] = []
        hub.watch = lambda request: seen.append((request, release.marked()))
        yield Filled(release, commits, seen, release.job().run())


@pytest.fixture
def guarded(tmp_path: Path, checkpoints: Path) -> Iterator[Release]:
    """One repository, behind a gate, at a branch; base is a path on the volume."""
    with running_hub(TOKEN) as hub:
        hub.add("org/aligned", checkpoints / "aligned", gated=True)
        defaults = {"base": f"{tmp_path}/models/base", "aligned": "org/aligned"}
        download = {"tokenSecret": {"name": "hub", "key": "token"}}
        more = {"allowMutableRevisions": True}
        yield Release(tmp_path, hub, defaults, download=download, more=more, secrets={("hub", "token"): TOKEN})


def test_every_source_comes_once(filled: Filled) -> None:
    assert filled.result.returncode == 0, filled.result.stderr
    wanted = {"adapter": {"adapter_config.json", "adapter_model.safetensors"}, "aligned": WANTED, "base": WANTED}
    expected = [f"org/{side}/{file}" for side, files in wanted.items() for file in files]
    assert Counter(filled.release.hub.downloads()) == Counter(expected)
    for side, commit in filled.commits.items():
        files = filled.release.hub.repositories[f"org/{side}"].commits[commit]
        kept = {name: file.content for name, file in files.items() if name not in LEFT_OUT}
        assert filled.release.snapshot(f"org/{side}", commit) == kept
    assert not list(filled.release.models.rglob("*.incomplete"))


def test_a_source_is_marked_after_its_checksums_are_compared(filled: Filled) -> None:
    """The last question about a repository is for its checksums, a second time; there is no mark until then."""
    assert filled.release.marked() == {f"org/{side}@{commit}" for side, commit in filled.commits.items()}
    for side, commit in filled.commits.items():
        asked = [(request, marked) for request, marked in filled.seen if request.repository == f"org/{side}"]
        assert [request.file is None for request, _ in asked] == [True, *[False] * (len(asked) - 2), True]
        assert not [request for request, marked in asked if f"org/{side}@{commit}" in marked]


def test_a_second_run_asks_for_nothing(filled: Filled) -> None:
    before = len(filled.release.hub.requests)
    result = filled.release.job().run()
    assert (result.returncode, result.stdout.count("there already")) == (0, 3), result.stderr
    assert len(filled.release.hub.requests) == before


@pytest.mark.parametrize("variant", ["mild", "strong", "small"])
def test_a_pod_finds_its_sources_offline_and_read_only(filled: Filled, variant: str) -> None:
    assert filled.release.waiting(variant).run().returncode == 0
    result = filled.release.inspect_offline(variant)
    assert result.returncode == 0, result.stderr


def test_a_branch_is_what_it_was_when_it_came(guarded: Release, checkpoints: Path) -> None:
    """Also after the branch has moved: all pods of all variants read one commit."""
    repository = guarded.hub.repositories["org/aligned"]
    commit = repository.main
    result = guarded.job().run()
    assert (result.returncode, guarded.marked()) == (0, {"org/aligned@main"}), result.stderr
    guarded.hub.add("org/aligned", checkpoints / "base")
    assert commit != repository.main
    assert guarded.job().run().returncode == 0
    assert (guarded.cached("org/aligned") / "refs/main").read_text() == commit
    shutil.copytree(checkpoints / "base", guarded.models / "base")
    result = guarded.inspect_offline()
    assert result.returncode == 0, result.stderr
    assert commit[:7] in result.stdout


def test_other_patterns_bring_what_was_left_out(guarded: Release) -> None:
    assert guarded.job().run().returncode == 0
    guarded.hub.requests.clear()
    guarded.download["exclude"] = ["*.bin", "*.pt", "*.pth"]
    result = guarded.job().run()
    assert result.returncode == 0, result.stderr
    assert guarded.hub.downloads() == ["org/aligned/onnx/model.onnx"]


def test_the_token_goes_to_the_hub_and_nowhere_else(guarded: Release) -> None:
    """Not to where large files lie, not into the logs, a command line or a file."""
    commands: list[list[str]] = []
    guarded.hub.watch = lambda request: commands.extend(_command_lines())
    result = guarded.job().run()
    assert result.returncode == 0, result.stderr
    assert {request.token for request in guarded.hub.requests if not request.from_cdn} == {TOKEN}
    assert {request.token for request in guarded.hub.requests if request.from_cdn} == {None}
    assert [line for line in commands if "download" in line]
    assert TOKEN not in str(commands) + result.stdout + result.stderr
    assert not [path for path in guarded.folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    ("token", "words"),
    [("hf_another-one-nobody-may-see", "Invalid credentials in Authorization header"), (None, "requires approval")],
    ids=["another token", "no token"],  # pytest-xdist's workers show the test's id in their command line
)
def test_a_token_that_does_not_open_the_gate(guarded: Release, token: str | None, words: str) -> None:
    guarded.secrets = {("hub", "token"): token or ""}
    if token is None:
        del guarded.download["tokenSecret"]
    commands: list[list[str]] = []
    guarded.hub.watch = lambda request: commands.extend(_command_lines())
    result = guarded.job().run()
    assert result.returncode == 1
    assert words in result.stderr
    assert result.stderr.splitlines()[-1].startswith("org/aligned@main: the download failed")
    assert "Traceback" not in result.stderr
    assert (guarded.marked(), guarded.hub.downloads()) == (set(), [])
    if token:
        assert [line for line in commands if "download" in line]
        assert token not in str(commands) + result.stdout + result.stderr


def _command_lines() -> list[list[str]]:
    """Of all processes on this machine."""
    return [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]


@pytest.mark.parametrize(
    "change",
    [
        'image.tag="another"',
        'imagePullSecrets=[{"name": "registry"}]',
        "securityContext.runAsUser=1234",
        'weights.download.exclude=["*.h5"]',
        'weights.download.tokenSecret.name="another"',
        'weights.download.resources.limits.memory="6Gi"',
    ],
)
def test_what_changes_the_pod_of_the_job_changes_its_name(change: str) -> None:
    """Kubernetes refuses another pod template under the same name, and the upgrade would fail."""
    before, after = _jobs(change)
    assert before["spec"]["template"] != after["spec"]["template"]
    assert before["metadata"]["name"] != after["metadata"]["name"]


@pytest.mark.parametrize("change", ["weights.download.backoffLimit=9", 'variants.strong.alpha="0.9"'])
def test_what_leaves_the_pod_of_the_job_leaves_its_name(change: str) -> None:
    before, after = _jobs(change)
    assert (before["metadata"], before["spec"]["template"]) == (after["metadata"], after["spec"]["template"])


def _jobs(change: str) -> list[Object]:
    """Without and with a change."""
    return [pick(render(load("hub-job"), *more), "Job") for more in ([], ["--set-json", change])]


def test_a_pod_waits_until_each_of_its_sources_is_marked(filled: Filled, tmp_path: Path) -> None:
    release = replace(filled.release, folder=tmp_path)
    base, delta, other = (f"org/{side}@{filled.commits[side]}" for side in ("base", "adapter", "aligned"))
    with _running(release.waiting("small")) as process:
        assert _line(process) == f"waiting for {base}"
        release.marker(base).parent.mkdir()
        release.marker(other).touch()
        release.marker(base).touch()
        assert _line(process) == f"waiting for {delta}"
        assert process.poll() is None
        release.marker(delta).touch()
        assert process.wait(timeout=20) == 0


def test_a_pod_that_waits_ends_when_it_is_told_to(filled: Filled, tmp_path: Path) -> None:
    """As process 1 of its container: what has no handler there does not hear a signal."""
    release = replace(filled.release, folder=tmp_path)
    before = unshare("--pid", "--fork", "--kill-child")
    with _running(release.waiting(), *before) as process:
        assert _line(process).startswith("waiting for ")
        (shell,) = psutil.Process(process.pid).children()
        shell.terminate()
        assert process.wait(timeout=20) == 128 + signal.SIGTERM


@contextmanager
def _running(container: Container, *before: str) -> Iterator[subprocess.Popen[str]]:
    process = container.start(before=before)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().rstrip()
