"""The root cause of a failure, out of what vLLM prints about it."""

from __future__ import annotations

import os

from expo_serve.cli.log_tail import LogTail

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
    os.write(write_end, text.encode())
    os.close(write_end)
    tail.finish()
    return tail


def test_first_exception_after_the_failure() -> None:
    tail = follow("ValueError: handled earlier\n" + WORKER)
    assert tail.failed.is_set()
    assert tail.root_cause() == "torch.OutOfMemoryError: out of memory, 8 GiB"


def test_an_error_of_ours_comes_without_its_class() -> None:
    ours = "(Worker pid=9) ERROR 11-23 10:00:01 [x.py:1] expo_serve.errors.ValuesError: tensor 'a' holds NaN\n"
    assert follow(WORKER + ours).root_cause() == "tensor 'a' holds NaN"


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
