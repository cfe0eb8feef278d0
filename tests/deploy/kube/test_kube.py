"""The image and the rendered chart, for real: two variants of the demo's pair as pods of podman.

What podman has no part for is left out (Services, policies) or done by these tests (probes, the kubelet's emptyDirs).
The tests follow one another: the last ones stop the pods.
"""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import openai
import pytest

from loadtests.results import RESULTS, save
from tests.deploy.consistency import quantity
from tests.deploy.kube.clients import QUESTION, Stream
from tests.deploy.kube.conftest import ALPHAS, KEY, Figures
from tests.deploy.kube.podman import Podman
from tests.deploy.kube.pods import Pod

pytestmark = [pytest.mark.kube, pytest.mark.timeout(1200)]

VARIANTS = list(ALPHAS)
TOKENS = 120
LEAST_LEFT = 20
"""Tokens of the stream that are still to come when SIGTERM is there."""


def _client(pod: Pod, alpha: str, key: str = KEY) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{pod.url}/v1", api_key=key, default_headers={"X-Expo-Alpha": alpha}, max_retries=0, timeout=120
    )


def _ask(pod: Pod, name: str, alpha: str, key: str = KEY) -> str:
    answer = _client(pod, alpha, key).chat.completions.create(
        model=name, messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=24
    )
    return answer.choices[0].message.content or ""


def test_each_answers_with_its_own_alpha(pods: dict[str, Pod]) -> None:
    answers = {variant: _ask(pods[variant], f"aligned-expo-{alpha}", alpha) for variant, alpha in ALPHAS.items()}
    assert all(answers.values())
    assert answers["strong"] != answers["weak"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_other_alpha_and_name_are_refused(pods: dict[str, Pod], variant: str) -> None:
    own, (other,) = ALPHAS[variant], [alpha for name, alpha in ALPHAS.items() if name != variant]
    with pytest.raises(openai.APIStatusError, match=r"alpha"):
        _ask(pods[variant], f"aligned-expo-{own}", other)
    with pytest.raises(openai.NotFoundError):
        _ask(pods[variant], f"aligned-expo-{other}", own)


def test_the_other_variants_probe_fails(pods: dict[str, Pod]) -> None:
    strong, weak = (pods[variant].container["readinessProbe"]["exec"]["command"] for variant in VARIANTS)
    code, output = pods["weak"].execute(*strong)
    assert (code, "alpha -0.5" in output) == (1, True), output
    assert pods["weak"].execute(*weak)[0] == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_key_of_the_secret_is_asked_for(pods: dict[str, Pod], variant: str) -> None:
    for headers in ({}, {"Authorization": "Bearer another"}):
        assert httpx.get(f"{pods[variant].url}/v1/models", headers=headers).status_code == 401
    assert KEY not in Path(f"/proc/{pods[variant].pid}/cmdline").read_text()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_process_is_confined(pods: dict[str, Pod], variant: str) -> None:
    """Of the user 10001, without capabilities or a way to new ones, and filtered by seccomp."""
    wanted = {"Uid": ["10001"] * 4, "Gid": ["10001"] * 4, "CapEff": ["0" * 16], "NoNewPrivs": ["1"], "Seccomp": ["2"]}
    found = [_status(pid) for pid in pods[variant].family()]
    assert len(found) > 3
    assert [{key: one[key] for key in wanted} for one in found] == [wanted] * len(found)


def _status(pid: int) -> dict[str, list[str]]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.split() for key, _, value in (line.partition(":") for line in lines)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_scratch_volumes_can_be_written(pods: dict[str, Pod], variant: str) -> None:
    pod = pods[variant]
    for path in ("/", "/usr", "/opt/expo", "/models", "/models/base"):
        code, output = pod.execute("touch", f"{path}/new")
        assert (code, "Read-only file system" in output) == (1, True), output
    for path in ("/tmp", "/home/expo", "/cache", "/dev/shm"):
        assert pod.execute("touch", f"{path}/new") == (0, "")
    mounts = [line.split() for line in Path(f"/proc/{pod.pid}/mounts").read_text().splitlines()]
    options = {line[1]: line[3].split(",")[0] for line in mounts}
    assert (options["/"], options["/models"], options["/dev/shm"]) == ("ro", "ro", "rw")


def test_both_have_the_same_files(pods: dict[str, Pod]) -> None:
    for side in ("base", "aligned"):
        files = {pod.execute("stat", "--format=%d %i", f"/models/{side}/model.safetensors") for pod in pods.values()}
        assert len(files) == 1
        assert next(iter(files))[0] == 0


def test_the_compiler_of_the_image_works(pods: dict[str, Pod]) -> None:
    """What expo-serve asks before it lets vLLM compile; and Python's headers, which the compiled code includes."""
    ask = "from expo_serve.vllm_plugin.server import compiler_problem; print(compiler_problem())"
    assert pods["weak"].execute("python", "-c", ask) == (0, "None\n")
    headers = pods["weak"].execute("python", "-c", "import sysconfig; print(sysconfig.get_path('include'))")[1].strip()
    assert pods["weak"].execute("test", "-f", f"{headers}/Python.h") == (0, "")


def test_nothing_stays_of_a_command_from_outside(pods: dict[str, Pod]) -> None:
    """The first process reaps what others left behind."""
    assert pods["weak"].execute("sh", "-c", "sleep 0.5 & sleep 0.6 &")[0] == 0
    time.sleep(2)
    states = [_status(pid)["State"][0] for pid in pods["weak"].family()]
    assert "Z" not in states


def test_sigterm_lets_a_stream_end(podman: Podman, pods: dict[str, Pod], figures: Figures) -> None:
    pod = pods["strong"]
    grace = pod.spec["terminationGracePeriodSeconds"]
    stream = Stream(pod.url, KEY, "aligned-expo-0.5", TOKENS)
    stream.start()
    stream.wait_for(5)
    started = time.monotonic()
    stop = podman.start("stop", "--time", str(grace), pod.server)
    while podman.ask("{{.State.Status}}", pod.server) == "running":
        time.sleep(0.05)
    seen = len(stream.pieces)
    stream.join(60)
    assert stop.wait(60) == 0
    figures["drain"] = {
        "seconds": time.monotonic() - started,
        "grace_seconds": grace,
        "tokens_after_sigterm": TOKENS - seen,
    }
    assert stream.problem() is None
    assert TOKENS - seen >= LEAST_LEFT
    assert podman.ask("{{.State.ExitCode}}", pod.server) == "0", pod.log()


def test_memory_stood_under_the_request(pods: dict[str, Pod], figures: Figures) -> None:
    """The last test: it writes down what all of them measured."""
    figures["memory"] = {
        variant: {
            "peak_bytes": pod.memory.stop(),
            "request_bytes": int(quantity(pod.container["resources"]["requests"]["memory"])),
            "limit_bytes": int(quantity(pod.container["resources"]["limits"]["memory"])),
        }
        for variant, pod in pods.items()
    }
    save("kube", "pods", figures, RESULTS)
    for variant, one in figures["memory"].items():
        assert 0 < one["peak_bytes"] < one["request_bytes"], (variant, one)
