"""``expo-serve probe --state`` against the real status port, and against what is none."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from threading import Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expo_serve.cli import probe
from expo_serve.cli.asking import Server
from expo_serve.cli.family import listen
from expo_serve.cli.probe_state import line_of_state, probe_state
from expo_serve.errors import ServeError, UsageError
from expo_serve.state.server import StatusServer
from expo_serve.state.shared import Reporter, SharedState
from expo_serve.state.snapshot import Words, snapshot


class Shown:
    """A status port in this process, and what its command reports."""

    def __init__(self) -> None:
        self.state = SharedState.create()
        now = time.monotonic()
        self.command = self.state.reporter("command", started=now, started_at=1.0, alpha="0.5", phases={"resolve": now})
        listener = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._loop = asyncio.new_event_loop()
        self._serving = self._loop.create_task(StatusServer(listener, self.state).serve())
        self._thread = Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._serving)
        self._loop.close()

    def close(self) -> None:
        """Close the port."""
        self._loop.call_soon_threadsafe(self._serving.cancel)
        self._thread.join()
        self.state.close()

    def rank(self) -> Reporter:
        """A rank that loads."""
        now = time.monotonic()
        sources = {"base": [25, 100]}
        return self.state.reporter("rank", engine=0, rank=0, began=now - 1, updated=now, sources=sources)

    def serve(self) -> None:
        """Have it serve."""
        self.state.reporter("keeper").enter("serving")
        self.state.reporter("api", names=["one", "two"], answered=time.monotonic(), open=3)


@pytest.fixture
def shown() -> Iterator[Shown]:
    """A status port."""
    shown = Shown()
    yield shown
    shown.close()


def test_start(shown: Shown) -> None:
    with pytest.raises(ServeError, match=r"^not ready: finds and checks the sources for \d s$"):
        probe.main(["--state", "--url", shown.url])
    rank = shown.rank()
    line = r"^not ready: loads weights for \d s: 25%, 0\.0 of 0\.0 GB, 0 MB/s, about \d+ s left$"
    with pytest.raises(ServeError, match=line):
        probe.main(["--state", "--url", shown.url, "--alpha", "0.5"])
    rank.update(ended=time.monotonic())
    with pytest.raises(ServeError, match=r"^not ready: warms up for \d s$"):
        probe.main(["--state", "--url", shown.url])


def test_serving(shown: Shown, capsys: pytest.CaptureFixture[str]) -> None:
    shown.serve()
    for arguments in ([], ["--alpha", "0.50"], ["--served-model-name", "two"]):
        assert probe.main(["--state", "--url", shown.url, *arguments]) == 0
        assert re.fullmatch(r"serves for \d s, 3 requests open, alpha 0\.5\n", capsys.readouterr().out)
    with pytest.raises(ServeError, match=r"serves alpha 0\.5, expected 0\.4"):
        probe.main(["--state", "--url", shown.url, "--alpha", "0.4"])
    with pytest.raises(ServeError, match="serves one, two, expected three"):
        probe.main(["--state", "--url", shown.url, "--served-model-name", "three"])
    shown.state.draining = time.monotonic()
    with pytest.raises(ServeError, match=r"^not ready: drains for \d s, 3 requests open$"):
        probe.main(["--state", "--url", shown.url])


def test_failed_and_hung(shown: Shown) -> None:
    shown.serve()
    shown.state.engine_timeout = 1e-6
    with pytest.raises(ServeError, match=r"^not ready: serves .*; the engine has not answered for \d s"):
        probe.main(["--state", "--url", shown.url])
    shown.command.fail("pair", "they do not fit: \x1b /a/b")
    shown.command.enter("failed")
    with pytest.raises(ServeError, match=r"^not ready: has failed \(pair\): they do not fit: \\x1b b$"):
        probe.main(["--state", "--url", shown.url])


def test_wrong_calls() -> None:
    with pytest.raises(UsageError, match="--alpha is missing"):
        probe.main([])
    with pytest.raises(UsageError, match="--completion: the status port answers no completions"):
        probe.main(["--state", "--completion"])
    with pytest.raises(UsageError, match="--alpha: expected a decimal number"):
        probe.main(["--state", "--alpha", "x"])


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text() | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
KEYS = snapshot([], Words(), 1.0).keys()


@given(
    st.one_of(
        JSON, st.dictionaries(st.sampled_from(sorted(KEYS)), JSON), st.fixed_dictionaries(dict.fromkeys(KEYS, JSON))
    )
)
def test_whatever_answers_gives_one_clean_line(answer: object) -> None:
    class Answers(Server):
        def ask(self, *_: object, **__: object) -> object:
            return answer

    server = Answers("http://h", False, "h", 80, "", None)
    try:
        line = probe_state(server, "0.5", "m", 1.0)
    except ServeError as error:
        line = error.message
    assert re.fullmatch(r"[^\x00-\x1f\x7f]+", line)


def test_line_of_a_state_without_anything() -> None:
    assert line_of_state(snapshot([], Words(), 1.0)) == "finds and checks the sources for 0 s"
