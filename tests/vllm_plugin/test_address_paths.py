"""A path that vLLM could not have a socket at is refused in one line; the socket of a dead server is taken over."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from expo_serve.vllm_plugin.address import refuse_taken
from tests.vllm_plugin.addresses import as_nobody, process, refusal


@pytest.fixture
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A path for a socket, short enough."""
    return str(tmp_path_factory.mktemp("uds") / "vllm.sock")


@contextmanager
def served(path: str, backlog: int | None = 5) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        if backlog is not None:
            listener.listen(backlog)
        yield listener


def test_free_path_is_left_free(path: str) -> None:
    refuse_taken("no-such-name.invalid", 99999, path)
    assert not os.path.exists(path)


def test_socket_of_a_dead_server_is_taken_over(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    with served(path):
        pass
    assert os.path.exists(path)
    refuse_taken(None, 8000, path)
    assert not os.path.exists(path)
    assert capsys.readouterr().err == (
        f"expo-serve: warning: --uds: {path} was left by a server that is gone; removed\n"
    )


def test_socket_of_a_dead_server_whose_last_connection_is_open_is_taken_over(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        with served(path) as listener:
            client.connect(path)
            accepted, _ = listener.accept()
        with accepted:
            refuse_taken(None, 8000, path)


@pytest.mark.parametrize("backlog", [None, 0, 5], ids=["not listening yet", "full", "listening"])
def test_socket_of_a_living_server_names_it(path: str, backlog: int | None) -> None:
    with served(path, backlog):
        waiting = [socket.socket(socket.AF_UNIX) for _ in range(3 if backlog == 0 else 0)]
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(path)
        line = refusal(None, 8000, path)
        for client in waiting:
            client.close()
        assert os.path.exists(path)
    assert line.startswith(f"--uds: {path} is taken by process {os.getpid()} (")


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_living_socket_of_another_kind_is_left(path: str, kind: int) -> None:
    with socket.socket(socket.AF_UNIX, kind) as other:
        other.bind(path)
        assert f"--uds: {path} is taken by process {os.getpid()} (" in refusal(None, 8000, path)


def test_path_in_another_spelling_is_recognised(path: str) -> None:
    """The server was given a relative one."""
    folder, name = os.path.split(path)
    code = "import os; os.chdir(sys.argv[1]); s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[2])"
    with process(code, folder, name) as pid:
        assert f"is taken by process {pid} (" in refusal(None, 8000, f"{folder}/../{os.path.basename(folder)}/{name}")


def test_killed_servers_socket_is_taken_over(path: str) -> None:
    code = "s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen()"
    with process(code, path) as pid:
        assert f"is taken by process {pid} (" in refusal(None, 8000, path)
    refuse_taken(None, 8000, path)
    assert not os.path.exists(path)


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda path: path.symlink_to("/dev/null")])
def test_what_is_no_socket_is_never_removed(path: str, make: Callable[[Path], None]) -> None:
    make(Path(path))
    assert refusal(None, 8000, path) == f"--uds: {path} exists and is no socket; remove it, or choose another path"
    assert os.path.lexists(path)


def test_folder_that_is_missing(path: str) -> None:
    missing = f"{os.path.dirname(path)}/no/vllm.sock"
    assert refusal(None, 0, missing) == f"--uds: no socket can be made at {missing}: No such file or directory"


def test_folder_that_is_a_file() -> None:
    assert refusal(None, 0, "/dev/null/s") == "--uds: no socket can be made at /dev/null/s: Not a directory"


def test_path_that_is_too_long(path: str) -> None:
    longest = path.ljust(107, "x")
    refuse_taken(None, 0, longest)
    assert refusal(None, 0, f"{longest}x") == f"--uds: a socket's path has at most 107 bytes, found {longest}x"


def test_path_that_is_none(path: str) -> None:
    assert r"vllm.sock\x00': " in refusal(None, 0, f"{path}\0")


def test_folder_that_may_not_be_written(path: str) -> None:
    result = as_nobody("refuse_taken(None, 0, sys.argv[1])", path)
    assert f"AddressError: --uds: no socket can be made at {path}: Permission denied" in result.stderr


def test_dead_socket_that_may_not_be_removed(path: str) -> None:
    with served(path):
        os.chmod(path, 0o777)
        os.chmod(os.path.dirname(path), 0o1777)
        for folder in Path(path).parents[1:]:
            if folder.name.startswith(("pytest-", "popen-")):  # pytest's own, which are for their owner alone
                folder.chmod(0o755)
    result = as_nobody("refuse_taken(None, 0, sys.argv[1])", path)
    assert "was left by a server that is gone, and cannot be removed: Operation not permitted" in result.stderr
