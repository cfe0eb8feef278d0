"""Whether a server answers, and the socket file that it leaves."""

from __future__ import annotations

import socket
from pathlib import Path

from expo_serve.cli.answering import answers, remove_socket
from tests.server import free_port


def test_address_answers_while_somebody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = {"uds": None, "host": "0.0.0.0", "port": listener.getsockname()[1]}
        assert answers(address)
    assert not answers({**address, "port": free_port()})


def test_socket_file_of_nobody_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        assert answers({"uds": str(path)})
        remove_socket(str(path))
        assert path.exists()
    assert not answers({"uds": str(path)})
    remove_socket(str(path))
    assert not path.exists()


def test_what_is_no_socket_stays(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    remove_socket(str(path))
    remove_socket(str(tmp_path / "nothing"))
    assert path.read_text() == "mine"
