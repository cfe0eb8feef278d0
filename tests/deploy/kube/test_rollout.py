"""From alpha to alpha behind a real proxy, under load: no request is lost, and each answer's alpha is its server's.

The pods are those that the chart renders. HAProxy stands for the gateway: it checks ``/ready`` of the status port, and
a test moves its weights, as an edit of the route would. The tests follow one another.
"""

from __future__ import annotations

import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from loadtests.results import RESULTS, save
from tests.deploy.chart import Values, pick, render
from tests.deploy.kube.clients import Clients, Stream
from tests.deploy.kube.conftest import KEY, Figures
from tests.deploy.kube.haproxy import SERVED_BY, HAProxy, wait_until
from tests.deploy.kube.podman import Podman
from tests.deploy.kube.pods import Pod, playing, secret
from tests.server import run_command

pytestmark = [pytest.mark.kube, pytest.mark.timeout(3000)]

ALPHAS = {"first": "0.5", "second": "-0.5", "third": "0.7"}
"""Alpha by the proxy's name of a server. The third one takes the first one's place in the release."""
CORES = {"one": 0, "two": 1}
"""By variant."""
PORTS = (8000, 9000)
ALIAS = "assistant"
RELEASE = "rollout"
SECRET = "rollout-key"
START_SECONDS = 900.0
"""A start under load on a busy machine of two cores; nothing here is about speed."""
DRAIN_SECONDS = 300
"""More than the chart's default: a busy machine may be slow."""
LONG_STREAMS = 2
LONG_SECONDS = 40.0
"""For which a long stream is to last: longer than its pod needs to be told of its end, far shorter than the drain."""
LONG_TOKENS = (100, 900)
"""At least and at most."""
LEAST_LEFT = 20
"""Tokens of each long stream that are still to come when the proxy knows of the end."""
LOAD = {"streams": 2, "shorts": 2}
ENOUGH = 12
"""Answers of one server after which it has shown that it answers."""
PATIENCE_SECONDS = 320.0


class Stage:
    """The pods of one release, a variant each, which come and go."""

    def __init__(self, podman: Podman, release: Values, folder: Path) -> None:
        self._podman, self._release, self._folder = podman, release, folder
        self._running: dict[str, ExitStack] = {}

    def play(self, variant: str, alpha: str) -> Pod:
        """Begin to run a variant; it is not ready yet."""
        # Each of the two at a time has a core of its own. By default both would bind themselves to the same one, and
        # the one that starts gets next to nothing beside one that spins there under load.
        core = {"name": "VLLM_CPU_OMP_THREADS_BIND", "value": str(CORES[variant])}
        own = {"alpha": alpha, "extraEnv": [core], "drain": {"shutdownTimeoutSeconds": DRAIN_SECONDS}}
        values = {**self._release, "variants": {variant: own}}
        values["alias"] = {"name": ALIAS, "weights": {variant: 1}}
        values["apiKey"] = {"existingSecret": SECRET}
        folder = self._folder / f"{variant}{alpha}"
        folder.mkdir()
        self._running[variant] = ExitStack()
        deployment = pick(render(values, release=RELEASE), "Deployment")
        (pod,) = self._running[variant].enter_context(playing(self._podman, [deployment], folder))
        return pod

    def remove(self, *variants: str) -> None:
        """Take variants away, whatever they do."""
        for variant in variants or list(self._running):
            self._running.pop(variant).close()

    def terminate(self, pod: Pod) -> subprocess.Popen[bytes]:
        """Send SIGTERM, as the kubelet does after preStop; the process ends when the container has ended."""
        return self._podman.start("stop", "--time", str(pod.spec["terminationGracePeriodSeconds"]), pod.server)

    def exit_code(self, pod: Pod) -> str:
        """Of a container that has ended."""
        return self._podman.ask("{{.State.ExitCode}}", pod.server)


@pytest.fixture(scope="module")
def stage(podman: Podman, release: Values, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Empty."""
    folder = tmp_path_factory.mktemp("rollout")
    made = Stage(podman, release, folder)
    with secret(podman, folder, SECRET, **{"api-key": KEY}):
        try:
            yield made
        finally:
            made.remove()


@pytest.fixture(scope="module")
def pods(stage: Stage) -> dict[str, Pod]:
    """Those that run, by the proxy's name; at first two, and both are ready."""
    running = {"first": stage.play("one", ALPHAS["first"]), "second": stage.play("two", ALPHAS["second"])}
    for pod in running.values():
        pod.wait_ready(START_SECONDS)
    return running


@pytest.fixture(scope="module")
def measured() -> Figures:
    """By both tests, for the result file."""
    return {}


def test_a_rollout_from_alpha_to_alpha_loses_no_request(
    stage: Stage, pods: dict[str, Pod], measured: Figures, tmp_path: Path
) -> None:
    """Weights move, the old pod drains with streams running, one of a new alpha takes its place, weights move again."""
    with HAProxy(list(ALPHAS), PORTS, tmp_path) as proxy:
        _place(proxy, pods)
        proxy.weigh(first=100)
        with Clients(proxy.url, KEY, ALIAS, **LOAD) as clients:
            _wait_for_answers(clients, "first")
            _share(proxy, clients, "first", "second")
            streams = _long_streams(proxy, "first")
            _move(proxy, clients, "first", "second")
            measured["drain"] = _drain(stage, proxy, "first", pods.pop("first"), streams)
            stage.remove("one")
            pods["third"] = stage.play("one", ALPHAS["third"])
            measured["new_alpha_ready_seconds"] = _start(proxy, pods["third"])
            _share(proxy, clients, "second", "third")
            _move(proxy, clients, "second", "third")
        measured["rollout"] = _account(clients)
        assert not any(proxy.counts().values()), proxy.counts()
    assert measured["rollout"]["answers"].keys() == ALPHAS.keys()


def test_a_pod_may_end_before_the_proxy_knows_where_that_asks_again(
    stage: Stage, pods: dict[str, Pod], measured: Figures, tmp_path: Path
) -> None:
    """A refusal comes before any work, so another pod may be asked. The last test: it writes down what was measured."""
    assert pods.keys() == {"second", "third"}, "the test before this one has not come to its end"
    with HAProxy(list(ALPHAS), PORTS, tmp_path, retries=True) as proxy:
        _place(proxy, pods)
        proxy.weigh(second=50, third=50)
        with Clients(proxy.url, KEY, ALIAS, **LOAD) as clients:
            for name in pods:
                _wait_for_answers(clients, name)
            streams = _long_streams(proxy, "second")
            measured["sudden_drain"] = _drain(stage, proxy, "second", pods.pop("second"), streams)
            _wait_for_answers(clients, "third")
        measured["sudden"] = _account(clients) | {"asked_again": proxy.counts()["retries"]}
    save("kube", "rollout", measured, RESULTS)
    assert measured["sudden"]["asked_again"] > 0, "no request met the pod that drained"


def _place(proxy: HAProxy, pods: dict[str, Pod]) -> None:
    for name, pod in pods.items():
        proxy.place(name, pod.address)
    wait_until(lambda: all(proxy.is_up(name) for name in pods), 30, proxy.log.read_text)


def _share(proxy: HAProxy, clients: Clients, old: str, new: str) -> None:
    """Both are asked."""
    proxy.weigh(**{old: 50, new: 50})
    for name in (old, new):
        _wait_for_answers(clients, name)


def _move(proxy: HAProxy, clients: Clients, old: str, new: str) -> None:
    """The old one is not asked any more."""
    proxy.weigh(**{old: 0, new: 100})
    moved = time.monotonic()
    _wait_for_answers(clients, new, answers=1)
    assert not [one for one in clients.answers if one.began > moved and one.headers.get(SERVED_BY) == old]


def _wait_for_answers(clients: Clients, server: str, answers: int = ENOUGH) -> None:
    """So many, to requests that begin from now on."""
    now = time.monotonic()

    def answered() -> bool:
        assert not clients.problems(), clients.problems()
        found = [one for one in clients.answers if one.began > now and one.headers.get(SERVED_BY) == server]
        return len(found) >= answers

    wait_until(answered, PATIENCE_SECONDS, lambda: f"{server}: {Counter(one.kind for one in clients.answers)}")


def _long_streams(proxy: HAProxy, server: str) -> list[Stream]:
    """As many as are asked for by one server, each at its begin; others may run at other servers."""
    tokens = _tokens_in(proxy, LONG_SECONDS)
    found: list[Stream] = []
    for _ in range(10 * LONG_STREAMS):
        stream = Stream(proxy.url, KEY, ALIAS, tokens)
        stream.start()
        stream.wait_for(1, PATIENCE_SECONDS)
        if stream.headers[SERVED_BY] == server:
            found.append(stream)
        if len(found) == LONG_STREAMS:
            return found
    raise AssertionError(f"{server} gets no requests")


def _tokens_in(proxy: HAProxy, seconds: float) -> int:
    """As many as a stream gets in that time beside the others, as one that was just measured says."""
    least, most = LONG_TOKENS
    stream = Stream(proxy.url, KEY, ALIAS, least)
    began = time.monotonic()
    stream.run()
    assert stream.problem() is None
    return max(least, min(most, round(seconds * least / (time.monotonic() - began))))


def _drain(stage: Stage, proxy: HAProxy, name: str, pod: Pod, streams: list[Stream]) -> Figures:
    """End a pod with streams running: it says that it is not ready, is live, and ends with its last stream."""
    began = time.monotonic()
    stop = stage.terminate(pod)
    wait_until(lambda: proxy.is_refused(name), 30, proxy.log.read_text)
    refused = time.monotonic() - began
    left = [stream.left for stream in streams]
    assert min(left) >= LEAST_LEFT
    assert pod.state()["phase"] == "draining"
    assert pod.probe("liveness")
    probe = [word.replace("127.0.0.1", pod.address) for word in pod.container["readinessProbe"]["exec"]["command"]]
    asked = run_command(*probe[1:])
    assert (asked.returncode, "drain" in asked.stderr) == (1, True), asked
    for stream in streams:
        stream.join(PATIENCE_SECONDS)
    assert [problem for stream in streams if (problem := stream.problem())] == []
    assert {float(stream.headers["X-Expo-Alpha"]) for stream in streams} == {float(ALPHAS[name])}
    streamed = time.monotonic() - began
    assert stop.wait(PATIENCE_SECONDS) == 0
    assert stage.exit_code(pod) == "0", pod.log()
    return {
        "proxy_knows_seconds": refused,
        "last_stream_seconds": streamed,
        "seconds": time.monotonic() - began,
        "tokens_left_of_each_stream": left,
    }


def _start(proxy: HAProxy, pod: Pod) -> float:
    """A pod that starts has its weight from the beginning, and gets requests when it says that it is ready."""
    began = time.monotonic()
    proxy.place("third", pod.address)
    proxy.weigh(third=50)
    pod.wait_ready(START_SECONDS)
    wait_until(lambda: proxy.is_up("third"), 30, proxy.log.read_text)
    return time.monotonic() - began


def _account(clients: Clients) -> Figures:
    """No request failed, each answer's alpha is that of the pod that gave it; how many there were of each."""
    assert clients.problems() == []
    wrong = [
        one.headers
        for one in clients.answers
        if float(one.headers["X-Expo-Alpha"]) != float(ALPHAS[one.headers[SERVED_BY]])
    ]
    assert wrong == []
    servers = {one.headers[SERVED_BY] for one in clients.answers}
    return {
        "answers": {
            name: dict(Counter(one.kind for one in clients.answers if one.headers[SERVED_BY] == name))
            for name in sorted(servers)
        },
        "longest_seconds": max(one.seconds for one in clients.answers),
    }
