"""The results of a soak, as JSON to keep and as tables to read."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from loadtests.chaos.drift import Sampler, drift
from loadtests.chaos.outcomes import Answer, Outcome
from loadtests.chaos.victim import Look
from loadtests.results import ratio_spread, shown, spread, table
from loadtests.serving import _interval

if TYPE_CHECKING:
    from loadtests.chaos.soak import Round, Soak

_RIGHT = (Outcome.COMPLETE, Outcome.LEFT)
_PERCENTILES = (50, 90, 99)
_COMPARED = ("tokens_per_second", "median_first_token_seconds", "median_seconds_per_token")
_MAX_DETAILS = 10


def as_figures(soak: Soak, seed: int) -> dict[str, Any]:
    """Return what a result file keeps."""
    steady = soak.rounds[(len(soak.rounds) + 3) // 4 :]  # caches and pools fill in the first quarter
    blocks = [(one.began, one.ended) for one in steady]
    wrong = [answer for answer in soak.answers if answer.outcome not in _RIGHT]
    figures = {
        "seed": seed,
        "minutes": round(soak.seconds / 60, 1),
        "rounds": len(soak.rounds),
        "requests": len(soak.answers),
        "tokens": sum(answer.tokens or answer.chunks for answer in soak.answers),
        "outcomes": _counts(answer.outcome for answer in soak.answers),
        "kinds": _counts(answer.label for answer in soak.answers),
        "errors": {"count": len(wrong), "first": [f"{a.label}: {a.outcome}: {a.detail}" for a in wrong[:_MAX_DETAILS]]},
        "ports": {port: _port(looks) for port, looks in soak.looks.items()},
        "greedy_answers": {"compared": soak.compared, "changed": soak.changed},
        "latency_seconds": latency(soak.answers),
        "memory": {name: memory(sampler, blocks) for name, sampler in soak.samplers.items()},
        "throughput": _throughput(soak.rounds),
        "requests_cut": soak.state.get("requests", {}).get("cut"),
        "warnings": soak.state.get("warnings"),
        "exit_code": soak.code,
    }
    return {**figures, "broken": _broken(soak, len(wrong))}


def _port(looks: Sequence[Look]) -> dict[str, Any]:
    seconds = [look.seconds for look in looks]
    return {"looks": len(looks), "noes": _noes(looks), "slowest_seconds": round(max(seconds, default=0.0), 3)}


def _noes(looks: Iterable[Look]) -> dict[str, int]:
    """Return how often there was no yes, by the status that came, or by the error where none came."""
    return _counts(str(look.code or look.error) for look in looks if look.code != 200)


def _counts(items: Iterable[str]) -> dict[str, int]:
    return {str(item): count for item, count in sorted(Counter(items).items())}


def _broken(soak: Soak, wrong: int) -> list[str]:
    """Return what was not as it must be."""
    noes = {port: _noes(looks) for port, looks in soak.looks.items()}
    found = {
        f"{wrong} requests failed": wrong,
        f"{soak.changed} greedy answers changed": soak.changed,
        f"exit code {soak.code} after SIGTERM": soak.code,
        f"left behind: {soak.remains}": bool(soak.remains),
        **{f"/{port} did not always say yes: {each}": each for port, each in noes.items()},
    }
    return [text for text, is_so in found.items() if is_so]


def latency(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return percentiles by the number of clients: to the first token, of each further token, of the whole answer."""
    levels: dict[int, list[Answer]] = defaultdict(list)
    for answer in answers:
        if answer.outcome is Outcome.COMPLETE:
            levels[answer.clients].append(answer)
    return {str(level): _percentiles(levels[level]) for level in sorted(levels)}


def _percentiles(answers: Sequence[Answer]) -> dict[str, Any]:
    series = {
        "first_token": [answer.first_token - answer.began for answer in answers if answer.first_token is not None],
        "per_token": [seconds for answer in answers if (seconds := answer.seconds_per_token) is not None],
        "whole": [answer.seconds for answer in answers],
    }
    return {
        "requests": len(answers),
        **{
            name: {f"p{p}": round(float(np.percentile(values, p)), 4) for p in _PERCENTILES}
            for name, values in series.items()
            if values
        },
    }


def memory(sampler: Sampler, blocks: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Return what each process held, from block to block."""
    return {role: drift(samples, blocks) for role, samples in sorted(sampler.samples.items())}


def _throughput(rounds: Sequence[Round]) -> dict[str, Any]:
    sides = {
        name: {key: [one.compared[name][key] for one in rounds] for key in _COMPARED} for name in ("expo", "plain")
    }
    ratios = {key: ratio_spread(sides["expo"][key], sides["plain"][key])["all"] for key in _COMPARED}
    idle = "busy_cores_of_the_idle_server"
    return {
        **{name: {key: spread(values) for key, values in side.items()} for name, side in sides.items()},
        "expo_to_plain": {key: _interval(values) for key, values in ratios.items()},
        idle: {name: spread([one.compared[name][idle] for one in rounds]) for name in ("expo", "plain")},
    }


def summary(figures: dict[str, Any]) -> str:
    """Return the tables of a soak."""
    errors, greedy = figures["errors"], figures["greedy_answers"]
    lines = [
        f"{figures['requests']} requests in {figures['minutes']} minutes, {figures['tokens']} tokens: "
        + ", ".join(f"{count} {outcome}" for outcome, count in figures["outcomes"].items()),
        f"{errors['count']} errors; {greedy['changed']} of {greedy['compared']} greedy answers changed; "
        f"exit code {figures['exit_code']}",
        *errors["first"],
    ]
    tables = (_latency_table(figures), memory_table(figures), _throughput_table(figures))
    return "\n\n".join(["\n".join(lines), *tables, *figures["broken"]])


def _latency_table(figures: dict[str, Any]) -> str:
    head = ["clients", "requests", "first token, s (p50, p90, p99)", "each further token, s", "whole answer, s"]
    rows = [
        (
            level,
            found["requests"],
            *(_shown_percentiles(found.get(key)) for key in ("first_token", "per_token", "whole")),
        )
        for level, found in figures["latency_seconds"].items()
    ]
    return table(head, rows)


def _shown_percentiles(found: dict[str, float] | None) -> str:
    return ", ".join(f"{value:.3f}" for value in found.values()) if found else "-"


def memory_table(figures: dict[str, Any]) -> str:
    """Return what each process held, and whether it grew."""
    rows = []
    for server, roles in figures["memory"].items():
        for role, found in roles.items():
            if found is None:
                rows.append((server, role, "-", "-", "too short to tell", "-"))
                continue
            growth = f"{found['mib_per_hour']:+.2f} (p {found['p']:.4f})"
            sign = "yes" if found["is_significant"] else "no"
            rows.append((server, role, found["mib_first"], found["mib_last"], growth, sign))
    return table(["server", "process", "PSS, MiB, first round", "last round", "MiB an hour", "significant"], rows)


def _throughput_table(figures: dict[str, Any]) -> str:
    rows = []
    for key, ratio in figures["throughput"]["expo_to_plain"].items():
        sides = [shown(figures["throughput"][name][key], 3) for name in ("expo", "plain")]
        interval = " to ".join(f"{end:.3f}" for end in ratio["interval"]) if ratio["interval"] else "one round"
        rows.append((key, *sides, f"{ratio['mean']:.3f}", interval))
    return table(("figure", "expo", "plain", "mean ratio", "95% interval"), rows)
