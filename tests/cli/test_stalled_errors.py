"""Nobody reads standard error, or its reader is gone: the command ends all the same, and as it would have."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from expo_serve import errors
from tests.cli.pipes import close, fill, new_pipe, read_until
from tests.server import ENGINE_ENV, EXPO_SERVE

WRONG = ["--base", "a", "--aligned", "b", "--alpha", "nan"]


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe that nobody reads yet."""
    with new_pipe() as ends:
        yield ends


def start(stderr: int, *command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr, env=ENGINE_ENV)


def test_error_that_nobody_reads_ends_the_command(pipe: tuple[int, int]) -> None:
    fill(pipe[1])
    with start(pipe[1], *EXPO_SERVE, *WRONG) as command:
        assert command.wait(20) == 2


def test_error_whose_reader_is_gone_keeps_the_exit_code(pipe: tuple[int, int]) -> None:
    close(pipe[0])
    with start(pipe[1], *EXPO_SERVE, *WRONG) as command:
        assert command.wait(20) == 2


def test_error_that_is_read_late_is_whole(pipe: tuple[int, int]) -> None:
    """By a reader that comes back within the time."""
    held = fill(pipe[1])
    with start(pipe[1], *EXPO_SERVE, *WRONG) as command:
        time.sleep(1)
        output = read_until(pipe[0], b"\n").removeprefix(held)
        assert output.startswith(b"expo-serve: error: ")
        assert command.wait(20) == 2


def test_only_the_first_of_many_warnings_is_waited_for(pipe: tuple[int, int]) -> None:
    """And none of them is lost when somebody reads again."""
    held = fill(pipe[1])
    code = "import time; from expo_serve import errors; began = time.monotonic()\n"
    code += "for number in range(50): errors.warn(str(number))\n"
    code += "assert time.monotonic() - began < 2 * errors._READER_SECONDS\n"
    code += "print('all', flush=True); time.sleep(10)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=pipe[1]) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"all\n"
        close(pipe[1])
        output = b""
        while output.count(b"\n") < 50:
            output += os.read(pipe[0], 1 << 16)
        child.kill()
    lines = output.removeprefix(held).decode().splitlines()
    assert sorted(lines) == sorted(errors.warning_line(str(number)) for number in range(50))


def test_warning_into_a_pipe_that_does_not_block_is_whole(pipe: tuple[int, int]) -> None:
    """Somebody else has set it so; a part of the warning finds room."""
    held = fill(pipe[1])
    code = "from expo_serve import errors; import os; os.set_blocking(2, False); errors.warn('x' * 100_000)"
    with start(pipe[1], sys.executable, "-c", code) as child:
        output = read_until(pipe[0], b"x\n").removeprefix(held)
        assert output == errors.warning_line("x" * 100_000).encode() + b"\n"
        assert child.wait(20) == 0
