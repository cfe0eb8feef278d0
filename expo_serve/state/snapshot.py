"""What ``/state`` shows: the reports of all processes of a command, put together.

No key, path, prompt or token is in it, as it is open to whoever reaches the port: errors and warnings name files by
their last part only.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from expo_serve.version import __version__

SCHEMA_VERSION = 1
PHASES = ("resolve", "start", "load", "warm_up", "serving", "draining", "failed")
"""``resolve``: find, download and check the sources. ``start``: import vLLM, check its flags, start its processes.
``load``: read and combine weights. ``warm_up``: from the weights to the first answer."""
_MAX_WARNINGS = 20
_SAME_MOMENT_SECONDS = 1.0
"""vLLM, which waits for the same end, may be the first to tell; it gives its own processes longer before it kills."""
_OF_VLLM = (signal.SIGTERM, signal.SIGINT)
"""With which vLLM asks its processes to end."""
_PATH = re.compile(
    r"""
    (?P<quote>['"]) (?: (?:file:|~|\.{1,2})?/ | [^'"/]+/[^'"/]+/ ) (?: [^'"]*/ )? (?P<quoted>[^'"]*) (?P=quote)
    | (?<![\w:/.~-]) (?: (?:file:|~|\.{1,2})?/ | [\w.-]+/[\w.-]+/ ) (?: [^\s'"]*/ )? (?P<last>[^\s'"]*)
    """,
    re.VERBOSE,
)
"""In quotes, where it may have spaces, or not; a relative one has two slashes, as a hub id has one."""

Report = Mapping[str, Any]


class Words(NamedTuple):
    """What the shared memory holds beside the reports (:class:`expo_serve.state.shared.SharedState`)."""

    draining: float = 0.0
    engine_timeout: float = 0.0


def snapshot(reports: Sequence[Report], words: Words, now: float) -> dict[str, Any]:
    """Return the state of a command as JSON values.

    Args:
        reports: what its processes have written.
        words: what the keeper and the command have set.
        now: CLOCK_MONOTONIC, in seconds.
    """
    command: Report = next((report for report in reports if report["role"] == "command"), {})
    servers = [report for report in reports if report["role"] == "api"]
    ranks = _newest_ranks(reports)
    begun = _phases(reports, ranks, words)
    phase = max(begun, key=PHASES.index, default="resolve")
    silent = _silence(servers, now)
    is_hung = silent is not None and 0 < words.engine_timeout < silent
    has_lost = any(report.get("has_lost") for report in reports if report["role"] == "keeper")
    reason = _not_ready(phase, is_hung, silent) or ("a process of vLLM has died" if has_lost else None)
    error = reported_error(reports)
    return {
        "schema_version": SCHEMA_VERSION,
        "version": __version__,
        "phase": phase,
        "ready": reason is None,
        "reason": reason,
        "alpha": command.get("alpha"),
        "served_model_names": _names(servers) or command.get("names", []),
        "start_time_seconds": command.get("started_at"),
        "uptime_seconds": _rounded(now - command["started"]) if "started" in command else None,
        "phase_seconds": _durations(begun, now),
        "load": _load(ranks, now) if ranks else None,
        "engine": {"silent_seconds": _rounded(silent), "is_hung": is_hung},
        "requests": {name: sum(server.get(name, 0) for server in servers) for name in ("open", "cut")},
        "warnings": [without_paths(text) for report in reports for text in report.get("warnings", ())][:_MAX_WARNINGS],
        "error": error and {**error, "message": without_paths(error["message"])},
    }


def without_paths(text: str) -> str:
    """Return a message with the last part of each path in it only."""
    return _PATH.sub(_last_part, text)


def _last_part(found: re.Match[str]) -> str:
    if quote := found["quote"]:
        return f"{quote}{found['quoted'] or '/'}{quote}"
    return found["last"] or "/"


def _newest_ranks(reports: Iterable[Report]) -> list[Report]:
    """Return the last report of each rank: a worker that was started anew has two."""
    ranks = {(report["engine"], report["rank"]): report for report in reports if report["role"] == "rank"}
    return [ranks[key] for key in sorted(ranks)]


def _phases(reports: Iterable[Report], ranks: Sequence[Report], words: Words) -> dict[str, float]:
    """Return when each phase has begun; one that has been left out is missing."""
    begun: dict[str, float] = {}
    for report in reports:
        if report["role"] in ("command", "keeper"):
            begun |= report.get("phases", {})
    if ranks:
        begun["load"] = min(rank["began"] for rank in ranks)
        if all("ended" in rank for rank in ranks):
            begun["warm_up"] = max(rank["ended"] for rank in ranks)
    if words.draining:
        begun["draining"] = words.draining
    return begun


def _durations(begun: Mapping[str, float], now: float) -> dict[str, float | None]:
    """Return how long each phase took, or has taken until now."""
    order = sorted(begun, key=PHASES.index)
    ends = [*(begun[name] for name in order[1:]), now]
    return {name: _rounded(max(0.0, end - begun[name])) for name, end in zip(order, ends, strict=False)}


def _silence(servers: Iterable[Report], now: float) -> float | None:
    """Return the seconds since all engines last answered, as the server knows that has waited longest for it."""
    answered = [server["answered"] for server in servers if "answered" in server]
    return max(0.0, now - min(answered)) if answered else None


def _not_ready(phase: str, is_hung: bool, silent: float | None) -> str | None:
    """Return why no request should be sent; None if it should."""
    if phase != "serving":
        return {"draining": "the server is draining", "failed": "the start or the server failed"}.get(
            phase, f"the server starts: {phase}"
        )
    return f"the engine has not answered for {silent:.0f} s" if is_hung else None


def _names(servers: Iterable[Report]) -> list[str]:
    return next((list(server["names"]) for server in servers if "names" in server), [])


def reported_error(reports: Sequence[Report]) -> dict[str, str] | None:
    """Return the cause of a failure: the error of whoever is nearest to it; keys are reason and message."""
    nearness = ("rank", "api", "server", "keeper", "command")
    failed = [report for report in reports if "error" in report and report["role"] in nearness]
    if not failed:
        return None
    error: dict[str, str] = min(failed, key=lambda report: nearness.index(report["role"]))["error"]
    return error


def first_killed(parents: Iterable[Report], before: float) -> tuple[int, str, int] | None:
    """Return id, name and exit code of the first process that a signal has killed.

    Args:
        parents: reports of processes whose children have ended.
        before: CLOCK_MONOTONIC at which vLLM said that something had failed: from then on it kills its own processes.
    """
    limit = before + _SAME_MOMENT_SECONDS
    ended = [tuple(end) for parent in parents for end in parent.get("ended", ())]
    killed = [
        (when, pid, name, code)
        for pid, name, code, when in ended
        if code < 0 and -code not in _OF_VLLM and when < limit
    ]
    return min(killed)[1:] if killed else None


def _load(ranks: Sequence[Report], now: float) -> dict[str, Any]:
    """Return the progress of all ranks; a rank of several reads less than the sources' sizes, which count here."""
    each = [_rank(rank) for rank in ranks]
    done, total = (
        sum(source[size] for rank in each for source in rank["sources"].values())
        for size in ("done_bytes", "total_bytes")
    )
    is_done = all(rank["is_done"] for rank in each)
    end = max(rank["ended"] for rank in ranks) if is_done else now
    seconds = max(end - min(rank["began"] for rank in ranks), 1e-3)
    rate = done / seconds
    waits = [now - rank["updated"] for rank in ranks if "ended" not in rank]
    return {
        "done_bytes": done,
        "total_bytes": total,
        "bytes_per_second": round(rate),
        "seconds_left": 0.0 if is_done else _rounded((total - done) / rate) if rate else None,
        "stalled_seconds": _rounded(max(0.0, *waits)) if waits else 0.0,
        "ranks": each,
    }


def _rank(report: Report) -> dict[str, Any]:
    sources = {
        side: {"done_bytes": done, "total_bytes": total} for side, (done, total) in report.get("sources", {}).items()
    }
    return {"engine": report["engine"], "rank": report["rank"], "is_done": "ended" in report, "sources": sources}


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)
