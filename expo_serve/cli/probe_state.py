"""``expo-serve probe --state``: the state of a command, from its status port, in one line."""

from __future__ import annotations

from typing import Any

from expo_serve.cli.asking import Server, printable
from expo_serve.errors import ServeError

_WHAT = {
    "resolve": "finds and checks the sources",
    "start": "starts vLLM",
    "load": "loads weights",
    "warm_up": "warms up",
    "serving": "serves",
    "draining": "drains",
    "failed": "has failed",
}


def probe_state(server: Server, alpha: str | None, name: str | None, seconds: float) -> str:
    """Ask a status port; returns the line to print.

    Args:
        server: the status port.
        alpha: that it must serve; None for any.
        name: that it must serve; None for any.
        seconds: for which the caller waits.

    Raises:
        ServeError: it does not answer, is not ready, or serves something else.
    """
    state = server.ask("/state", seconds)
    try:
        line = line_of_state(state)
        is_ready, names, served = state["ready"], state["served_model_names"], state["alpha"]
        is_other = alpha is not None and float(served) != float(alpha)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise ServeError(f"{server.url}/state is not from expo-serve's status port (--status-port)") from None
    if is_ready is not True:
        raise ServeError(f"not ready: {line}")
    if is_other:
        raise ServeError(f"the server serves alpha {printable(served)}, expected {alpha}")
    if name is not None and name not in names:
        raise ServeError(f"the server serves {printable(', '.join(names))}, expected {printable(name)}")
    return line


def line_of_state(state: dict[str, Any]) -> str:
    """Return a state (:func:`expo_serve.state.snapshot.snapshot`) in one line."""
    phase = state["phase"]
    line = f"{printable(_WHAT.get(phase, phase))} for {state['phase_seconds'].get(phase) or 0.0:.0f} s"
    match phase:
        case "load":
            line += f": {_progress(state['load'])}"
        case "serving" | "draining":
            line += f", {int(state['requests']['open'])} requests open"
            if phase == "serving":
                line += f", alpha {printable(state['alpha'])}"
            if state["engine"]["is_hung"] is True:
                line += f"; the engine has not answered for {state['engine']['silent_seconds']:.0f} s"
        case "failed":
            error = state["error"] or {"reason": "error", "message": "the cause is not known"}
            line = f"has failed ({printable(error['reason'])}): {printable(error['message'])}"
    return line


def _progress(load: dict[str, Any]) -> str:
    done, total = load["done_bytes"] / 1e9, load["total_bytes"] / 1e9
    rate = load["bytes_per_second"] / 1e6
    text = f"{done / total if total else 0.0:.0%}, {done:.1f} of {total:.1f} GB, {rate:,.0f} MB/s"
    left = load["seconds_left"]
    return text if left is None else f"{text}, about {left:.0f} s left"
