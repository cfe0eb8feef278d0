"""The flags of the running server."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from expo_serve.cli.options import Options, read_options
from expo_serve.cli.running import DEFAULT_ENGINE_TIMEOUT, Running, host_of, read_running
from expo_serve.cli.serve import parser
from expo_serve.errors import UsageError

PAIR = ["--base", "b", "--aligned", "a", "--alpha", "0.5"]


def options(*arguments: str) -> Options:
    """Parsed flags."""
    return read_options(parser(), [*PAIR, *arguments])


def test_defaults() -> None:
    assert read_running(options()) == Running(None, DEFAULT_ENGINE_TIMEOUT)


def test_command_line_wins_over_the_file_and_vllm_gets_neither(tmp_path: Path) -> None:
    file = tmp_path / "flags.yaml"
    file.write_text(yaml.safe_dump({"status_port": 9000, "engine-timeout": 7, "host": "::1", "port": 1}))
    given = options("--config", str(file), "--status_port=9001")
    assert read_running(given) == Running(9001, 7.0)
    assert given.file_options == {"host": "::1", "port": 1}
    assert given.arguments == []
    assert host_of(given) == "::1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--status-port", "0"], "--status-port: expected a port from 1 to 65535, found '0'"),
        (["--status-port", "65536"], "--status-port: expected a port"),
        (["--status-port", "1.5"], "--status-port: expected a port"),
        (["--status-port="], "--status-port: expected a port"),
        (["--engine-timeout", "-1"], "--engine-timeout: expected seconds from 0"),
        (["--engine-timeout", "nan"], "--engine-timeout: expected seconds from 0"),
        (["--engine-timeout", "inf"], "--engine-timeout: expected seconds from 0"),
        (["--engine-timeout", "soon"], "--engine-timeout: expected seconds from 0"),
    ],
)
def test_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_running(options(*arguments))


@pytest.mark.parametrize(
    ("arguments", "host"),
    [
        ([], ""),
        (["--host", "h"], "h"),
        (["--host=h"], "h"),
        (["--host", "a", "--host=b"], "b"),
        (["--host"], ""),
        (["--ho", "h"], "h"),
    ],
)
def test_host(arguments: list[str], host: str) -> None:
    assert host_of(options(*arguments)) == host
