"""The root cause of a failure, out of what vLLM prints about it."""

from __future__ import annotations

import os
import time
import tracemalloc
from pathlib import Path
from threading import Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expo_serve.cli.log_tail import LogTail
from expo_serve.cli.printable import printable
from expo_serve.cli.vllm_log import FATAL, is_exception, without_prefix

WORKER = """\
(EngineCore pid=7) INFO 11-23 10:00:00 [core.py:1] Initializing
(Worker_TP1 pid=9) ERROR 11-23 10:00:01 [multiproc_executor.py:866] WorkerProc failed to start.
(Worker_TP1 pid=9) ERROR 11-23 10:00:01 [multiproc_executor.py:866] Traceback (most recent call last):
(Worker_TP1 pid=9) ERROR 11-23 10:00:01 [multiproc_executor.py:866] torch.OutOfMemoryError: out of memory, 8 GiB
(EngineCore pid=7) ERROR 11-23 10:00:02 [core.py:1510] EngineCore failed to start.
(EngineCore pid=7) ERROR 11-23 10:00:02 [core.py:1510] Exception: WorkerProc initialization failed due to an exception
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


def follow(text: str) -> LogTail:
    tail = LogTail()
    read_end, write_end = os.pipe()
    target = os.open(os.devnull, os.O_WRONLY)
    tail.follow(read_end, target)
    with os.fdopen(write_end, "wb") as pipe:
        pipe.write(text.encode())
    tail.finish()
    return tail


def test_first_exception_after_the_failure() -> None:
    tail = follow("ValueError: handled earlier\n" + WORKER)
    assert tail.failed.is_set()
    assert tail.root_cause() == "torch.OutOfMemoryError: out of memory, 8 GiB"


def test_an_error_of_ours_comes_without_its_class() -> None:
    ours = "(Worker pid=9) ERROR 11-23 10:00:01 [x.py:1] expo_serve.errors.ValuesError: tensor 'a' holds NaN\n"
    assert follow(ours).root_cause() is None
    assert follow(ours).last_exception() == "tensor 'a' holds NaN"
    assert follow(WORKER + ours).root_cause() == "torch.OutOfMemoryError: out of memory, 8 GiB"  # it came first


def test_where_vllm_calls_none_fatal_there_is_a_last_one() -> None:
    tail = follow("ValueError: first\nKeyError: 'second'")
    assert tail.root_cause() is None
    assert tail.last_exception() == "KeyError: 'second'"


def test_colours_and_carriage_returns() -> None:
    line = "\x1b[0;36m(EngineCore pid=7)\x1b[0;0m ERROR 11-23 10:00:01 [core.py:1] OSError: no room\r\n"
    assert follow(line).last_exception() == "OSError: no room"


def test_a_request_cannot_call_the_engine_failed() -> None:
    line = "(APIServer pid=7) ERROR 11-23 10:00:01 [serving.py:274] Error with model EngineCore failed to start\n"
    assert not follow(line).failed.is_set()


def test_nothing_to_say() -> None:
    tail = follow("all is well\n")
    assert tail.root_cause() is None
    assert tail.last_exception() is None
    assert not tail.failed.is_set()
    assert not tail.ends_with_error()
    assert follow("expo-serve: error: no vLLM\n").ends_with_error()
    assert not follow("expo-serve: error: no vLLM\nresource_tracker: 3 leaked objects\n").ends_with_error()


@pytest.mark.parametrize("words", FATAL)
def test_every_report_of_a_failure_is_seen(words: str) -> None:
    """Alone, and among so many lines that they are not looked at one by one."""
    assert follow(f"{words}\n").failed.is_set()
    assert follow("all is well\n" * 50 + f"(Worker pid=9) {words}.\n" + "all is well\n" * 50).failed.is_set()


words = st.sampled_from(
    [
        "ValueError: a",
        "torch.OutOfMemoryError: b",
        "EngineDead: c",
        "SystemExit: d",
        "KeyboardInterrupt: e",
        "f",
        "500 ",
        "asyncio.CancelledError: g",
        "expo_serve.errors.PairError: h",
        "\x1b[1;35mKeyError\x1b[0m: 'i'",
        "  File k",
        "\r",
    ]
)


@given(st.lists(st.lists(words, max_size=3).map(" ".join), max_size=200), st.integers(1, 500))
def test_exceptions_are_found_as_if_each_line_were_looked_at(lines: list[str], size: int) -> None:
    """Whatever else is in the log, and wherever what is read at a time ends."""
    tail, rest = LogTail(), b""
    text = "".join(f"{line}\n" for line in lines).encode()
    for begin in range(0, len(text), size):
        rest = tail._look_at(rest + text[begin : begin + size])
    plain = [without_prefix(line) for line in lines]
    exceptions = [printable(line.removeprefix("expo_serve.errors.PairError: ")) for line in plain if is_exception(line)]
    assert tail.last_exception() == (exceptions[-1] if exceptions else None)
    assert tail.root_cause() is None  # no line reports a failed engine


def test_cause_is_not_lost_behind_what_follows() -> None:
    """Clients that go on asking a dead engine, each of them with a line that has an error's name in it."""
    others = '(APIServer pid=7) INFO: "POST /v1/completions HTTP/1.1" 500 Internal Server Error\n' * 15_000
    tail = follow(others + WORKER + others)
    assert tail.root_cause() == "torch.OutOfMemoryError: out of memory, 8 GiB"


def test_what_is_far_back_is_no_cause() -> None:
    assert follow("KeyError: 'old'\n" + "all is well\n" * 25_000).last_exception() is None


def test_long_lines_are_cut_and_found() -> None:
    tail = follow("x" * 100_000 + " ValueError: no\n" + "ValueError: " + "y" * 100_000 + "\nall is well\n")
    cause = tail.last_exception()
    assert cause is not None
    assert cause.startswith("ValueError: yyy")
    assert cause.endswith("y ...")
    assert len(cause) < 10_000


def test_line_without_end_takes_time_in_proportion() -> None:
    """48 MB took 49 s when each part of it was joined to all before."""
    began = time.process_time()
    follow("x" * (48 << 20) + "\nValueError: after it\n")
    assert time.process_time() - began < 5


def test_memory_is_bounded_in_bytes() -> None:
    """Whatever the lines: two thousand that are kept had no limit of their own."""
    tail = LogTail()
    line = b"ValueError: " + b"x" * 60_000 + b"\n"
    tracemalloc.start()
    try:
        for _ in range(2500):
            tail._look_at(line)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20
    assert tail.last_exception() is not None


def test_anything_passes_unchanged() -> None:
    """Bytes that are no text, control characters, a line without an end."""
    data = bytes(range(256)) * 300 + b"\x1b]0;title\x07\x1b[2J\r\x00no end"
    tail = LogTail()
    (source, into), (out, target) = os.pipe(), os.pipe()
    tail.follow(source, target)

    def feed() -> None:
        with os.fdopen(into, "wb") as pipe:
            pipe.write(data)

    Thread(target=feed).start()
    found = b""
    while len(found) < len(data):
        found += os.read(out, 1 << 16)
    tail.finish()
    assert found == data


def test_cause_has_no_control_characters() -> None:
    line = "ValueError: \x1b]0;title\x07a\x1b[31mb\x1b[0m\x1b(B\x07c\u202ed\te\u2028f\x00\r\n"
    assert follow(line).last_exception() == "ValueError: ab\\x07c\\u202ed e f\\x00"


def test_streams_into_one_file_take_turns(tmp_path: Path) -> None:
    """Whatever the numbers of its descriptors: then none tears the other's lines."""
    with (tmp_path / "log").open("wb") as log, (tmp_path / "other").open("wb") as other:
        tail = LogTail()
        for target in (log.fileno(), os.dup(log.fileno()), other.fileno()):
            source, into = os.pipe()
            os.close(into)
            tail.follow(source, target)
        first, second, third = (outlet._turn for outlet in tail._outlets)
    assert first is second
    assert first is not third
