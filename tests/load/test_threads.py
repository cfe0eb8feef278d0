"""A few threads that do tasks together, and what happens where threads are refused."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from expo_serve.load.threads import DaemonPool, default_threads


@pytest.fixture
def workers() -> Iterator[DaemonPool]:
    made = DaemonPool(3, "expo-test")
    yield made
    made.close()


def test_all_tasks_are_done_side_by_side(workers: DaemonPool) -> None:
    met = threading.Barrier(3, timeout=10)
    workers.run_all([met.wait] * 3)
    done: list[int] = []
    workers.run_all([lambda number=number: done.append(number) for number in range(50)])  # type: ignore[misc]
    assert sorted(done) == list(range(50))


def test_a_failure_comes_when_no_task_is_at_work_any_more(workers: DaemonPool) -> None:
    done: list[int] = []

    def fail() -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        workers.run_all([fail, *(lambda number=number: done.append(number) for number in range(20))])
    assert len(done) == 20
    workers.run_all([lambda: done.append(99)])
    assert done[-1] == 99


def test_threads_are_daemons_and_end(workers: DaemonPool) -> None:
    mine = [thread for thread in threading.enumerate() if thread.name.startswith("expo-test")]
    assert len(mine) == 3
    assert all(thread.daemon for thread in mine)
    workers.close()
    for thread in mine:
        thread.join(10)
        assert not thread.is_alive()


def test_without_threads_the_caller_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    done: list[int] = []
    DaemonPool(3, "expo-refused").run_all([lambda: done.append(threading.get_ident())])
    assert done == [threading.get_ident()]


def test_more_threads_where_reads_have_far_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    assert default_threads() == 4
    assert default_threads(on_network=True) == 8
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert default_threads() == 1
