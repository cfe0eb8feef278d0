"""Refuses an address that vLLM could not serve at, before the engine starts; where it is taken, says by whom.

vLLM itself binds a port before its engine starts too, but listens on it when all is loaded. So two servers that start
at the same time both get it, and one of them fails in the end; here the second one is refused.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from expo_serve.errors import AddressError, UsageError, warn

_MOST_PATH_BYTES = 107
"""Of a socket's path: ``sun_path`` has room for 108 with the 0 at the end."""
_CONNECT_SECONDS = 1.0
_UNIX_SOCKETS = Path("/proc/net/unix")


def refuse_taken(host: str | None, port: int, uds: str | None) -> None:
    """Check that a server can be had at an address. The socket of a dead server is removed.

    Args:
        host: address or name, as vLLM's ``--host``; None or empty for all interfaces.
        port: as vLLM's ``--port``.
        uds: path of a socket, as vLLM's ``--uds``, which wins over the others; None or empty for none.

    Raises:
        AddressError: the address is taken, or cannot be had; the message says by whom, or why.
        UsageError: there is no such port.
    """
    if uds:
        _refuse_taken_path(uds)
        return
    if not 0 < port <= 65535:
        raise UsageError(f"--port: expected a port from 1 to 65535, found {port}")
    problem = _problem_of(host or "", port)
    if problem:
        raise AddressError(problem)


def _problem_of(host: str, port: int) -> str | None:
    """Return why a server cannot have a port, in one line; None if it can."""
    where = _shown(host) if host else "all interfaces"
    try:
        _bind(host, port, reuse=True)
    except (OSError, UnicodeError, TypeError) as error:
        return _why_not(error, host, where, port)
    if not _is_bound(host, port):
        return None
    return (
        f"--port: port {port} of {where} is taken by another server that does not listen yet; end it, or choose "
        "another port"
    )


def _bind(host: str, port: int, reuse: bool) -> None:
    """Bind as vLLM does, with SO_REUSEADDR, or without, and let go again."""
    with socket.socket(socket.AF_INET6 if _is_ipv6(host) else socket.AF_INET) as listener:
        if reuse:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True


def _is_bound(host: str, port: int) -> bool:
    """Return whether somebody has bound a port, but does not listen on it.

    Nothing in ``/proc`` shows that. A bind without SO_REUSEADDR fails then, and also where connections of a server
    that is gone linger; those can be seen.
    """
    for _ in range(2):  # in between the last of them may end
        try:
            _bind(host, port, reuse=False)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or _uses_of(port) != []:
                return False
        else:
            return False
    return True


def _uses_of(port: int) -> list[Any] | None:
    """Return the connections of a port of this machine, those that listen first; None where they cannot be read."""
    uses = _connections("tcp")
    if uses is None:
        return None
    return sorted((use for use in uses if use.laddr and use.laddr.port == port), key=lambda use: use.status != "LISTEN")


def _connections(kind: str) -> list[Any] | None:
    try:
        return list(psutil.net_connections(kind))
    except (OSError, psutil.Error):  # no Linux, or no /proc/net
        return None


def _why_not(error: Exception, host: str, where: str, port: int) -> str:
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EADDRINUSE:
        return _taken(where, port)
    if number == errno.EADDRNOTAVAIL:
        return f"--host: {where} is no address of this machine; leave it out to serve on all interfaces"
    if number in (errno.EACCES, errno.EPERM):
        return f"--port: port {port} needs a right that this process does not have; choose one from 1024"
    if isinstance(error, (socket.gaierror, UnicodeError, TypeError)):
        hint = "; write an IPv6 address without brackets" if host.startswith("[") else ""
        return f"--host: {where} is neither an address nor the name of an IPv4 one ({_without_path(error)}){hint}"
    return f"--host: {where} cannot be served at: {_without_path(error)}"


def _taken(where: str, port: int) -> str:
    pids = [use.pid for use in _uses_of(port) or [] if use.pid]
    own = {process.pid for process in psutil.Process().parents()}.intersection(pids)
    if own:
        return f"--port: {port} is taken by {_owner(own)}, which started vLLM: as --status-port? Choose another port"
    return f"--port: port {port} of {where} is taken by {_owner(pids)}; end it, or choose another port"


def _owner(pids: Iterable[int]) -> str:
    """Return the name and the id of the first process that can be seen."""
    for pid in pids:
        with suppress(psutil.Error):
            return f"process {pid} ({_name_of(psutil.Process(pid))})"
    return "a process that cannot be seen from here (another user's or another container's)"


def _name_of(process: psutil.Process) -> str:
    """Return the name of a process, and of the module where it is Python; nothing else of its command line."""
    name = _shown(process.name())
    with suppress(psutil.Error):
        match process.cmdline():
            case [_, "-m", module, *_] if name.startswith("python"):
                return f"{name} -m {_shown(module)}"
    return name


def _refuse_taken_path(path: str) -> None:
    shown = _shown(path)
    if len(os.fsencode(path)) > _MOST_PATH_BYTES:
        raise AddressError(f"--uds: a socket's path has at most {_MOST_PATH_BYTES} bytes, found {shown}")
    if _exists(path, shown):
        _take_over(path, shown)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
        os.unlink(path)
    except (OSError, ValueError) as error:
        raise AddressError(f"--uds: no socket can be made at {shown}: {_without_path(error)}") from None


def _exists(path: str, shown: str) -> bool:
    """Return whether a socket is there.

    Raises:
        AddressError: something else is.
    """
    try:
        mode = os.lstat(path).st_mode
    except (OSError, ValueError):  # nothing, or what the bind fails at too
        return False
    if not stat.S_ISSOCK(mode):
        raise AddressError(f"--uds: {shown} exists and is no socket; remove it, or choose another path")
    return True


def _take_over(path: str, shown: str) -> None:
    """Remove the socket of a dead server.

    Raises:
        AddressError: the server lives, or the socket cannot be removed.
    """
    pids = _holders_of(path)
    if pids is not None or _answers(path, shown):
        owner = _owner(pids or [])
        raise AddressError(f"--uds: {shown} is taken by {owner}; end it, or choose another path")
    try:
        os.unlink(path)
    except OSError as error:
        raise AddressError(
            f"--uds: {shown} was left by a server that is gone, and cannot be removed: {_without_path(error)}"
        ) from None
    warn(f"--uds: {shown} was left by a server that is gone; removed")


def _answers(path: str, shown: str) -> bool:
    """Return whether somebody listens on a socket."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_CONNECT_SECONDS)
        try:
            connection.connect(path)
        except ConnectionRefusedError:
            return False
        except PermissionError:
            raise AddressError(f"--uds: {shown} is another user's socket; choose another path") from None
        except OSError:  # it is not of this kind, or its queue is full
            return True
    return True


def _holders_of(path: str) -> list[int] | None:
    """Return who has bound a path, also who does not listen yet, as far as can be seen; None if nobody has."""
    unconnected = _unconnected()
    uses = [use for use in _connections("unix") or [] if use.laddr in unconnected and _is_same(use, path)]
    return [use.pid for use in uses if use.pid] if uses else None


def _unconnected() -> set[str]:
    """Return the paths of sockets that are bound, without those of connections, which outlive a server's socket."""
    try:
        lines = _UNIX_SOCKETS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return set()
    fields = [line.split(maxsplit=7) for line in lines]
    return {each[7] for each in fields if len(each) == 8 and each[5] == "01"}  # SS_UNCONNECTED


def _is_same(use: Any, path: str) -> bool:
    """Return whether a socket's path, which may be relative to its owner's folder, is that one."""
    bound = Path(use.laddr)
    if not bound.is_absolute() and use.pid:
        with suppress(psutil.Error):
            bound = Path(psutil.Process(use.pid).cwd(), bound)
    return os.path.realpath(bound) == os.path.realpath(path)


def _without_path(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _shown(text: str) -> str:
    return text if text.isprintable() else repr(text)
