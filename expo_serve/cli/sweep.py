"""``expo-serve sweep``: which alpha? Loads one alpha after another into one engine, and measures the answers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from expo_serve import errors
from expo_serve.cli.options import Options, add_source_flags, read_options
from expo_serve.cli.parser import Parser
from expo_serve.cli.serve import check_vllm, refuse_variables, resolve
from expo_serve.errors import UsageError

_FLAGS = (
    "alphas", "prompts", "n", "out", "reward", "lm-eval", "measure", "max-tokens", "temperature", "system-prompt",
    "text", "refusals", "kl-budget", "margin", "budget", "seed", "resume", "emit-values",
)  # fmt: skip
_CODE_ZERO = 3
"""Exit code of a sweep whose answer is alpha 0."""
_EPILOG = """\
All flags of vLLM's engine are accepted too, and mean what they mean for `vllm serve` (--max-model-len,
--tensor-parallel-size, --chat-template, --default-chat-template-kwargs, ...).

Exit codes: 0 an alpha is recommended, or no --reward was given; 3 the recommendation is alpha 0; 2 the command line or
the pair is wrong; 1 something failed; 130 after Ctrl-C. What was observed is kept: go on with --resume.
"""


def main(arguments: list[str], started: float) -> int:
    """Sweep; returns the exit code.

    Args:
        arguments: the command line without ``sweep``.
        started: CLOCK_MONOTONIC at the start of the command, in seconds.
    """
    options, given = _read(arguments)
    refuse_variables()
    check_vllm()
    settings = _settings(options, given)
    config = resolve(options, started)

    from dataclasses import replace

    from expo_serve.sweep.run import carry_out

    result = carry_out(replace(settings, config=config))
    _show(result, settings.out)
    if given["emit-values"]:
        _emit(result.deploy, given["emit-values"])
    return _CODE_ZERO if result.decision.kind == "zero" else 0


def parser() -> Parser:
    """Return the parser of the command; vLLM's flags are not in it."""
    parser = Parser(
        prog="expo-serve sweep",
        description="Which alpha? One engine loads one alpha after another and answers the same prompts;\n"
        "measures with intervals, a rule that may say alpha 0, and a page to look at.",
        epilog=_EPILOG,
    )
    add_source_flags(parser, with_alpha=False)
    group = parser.add_argument_group("sweep")
    group.add_argument(
        "--prompts", metavar="FILE.jsonl", help='what to ask: {"prompt": ...} or {"messages": [...]} a line'
    )
    group.add_argument("--n", metavar="N", help="draw so many of the prompts (default: all)")
    group.add_argument(
        "--alphas", metavar="A,B,...", help="the alphas, or auto (default 0,0.1,0.2,0.3,0.4,0.5,0.75,1,1.5,2)"
    )
    group.add_argument(
        "--out", metavar="DIR", help="folder for what the sweep leaves; must not exist (default ./sweep)"
    )
    group.add_argument("--resume", action="store_const", const=True, help="go on with the sweep in --out")
    group.add_argument(
        "--reward", metavar="SPEC", action="append", default=[],
        help="what to maximise: vllm:MODEL (a reward model), openai:URL,MODEL (a judge) or python:module:function; "
             "further ones are measured only; can be repeated",
    )  # fmt: skip
    group.add_argument("--lm-eval", metavar="TASKS", help="capability: tasks of lm-evaluation-harness, or YAML files")
    group.add_argument("--text", metavar="FILE", help="held-out text, for perplexity")
    group.add_argument("--refusals", metavar="FILE.jsonl", help="harmless prompts that sound harmful, for over-refusal")
    group.add_argument(
        "--measure", metavar="NAME", action="append", default=[], help="show only this measure; can be repeated"
    )
    group.add_argument("--max-tokens", metavar="N", help="of an answer (default 256)")
    group.add_argument("--temperature", metavar="T", help="of sampling; 0 is greedy (default 0.7)")
    group.add_argument("--system-prompt", metavar="TEXT", help="of every chat that has none of its own")
    group.add_argument("--kl-budget", metavar="X", help="refuse alphas farther than this from alpha 0, in nats a token")
    group.add_argument("--margin", metavar="X", help="loss of a capability that is too much (default 0.02)")
    group.add_argument("--budget", metavar="TIME", help="take no further alpha after this time, such as 30m")
    group.add_argument(
        "--seed", metavar="S", help="of sampling, of the draw of prompts and of the bootstrap (default 0)"
    )
    group.add_argument(
        "--emit-values", metavar="FILE.yaml", help="write the chart's values for a canary of the recommended alpha"
    )
    return parser


def _read(arguments: list[str]) -> tuple[Options, dict[str, Any]]:
    """Parse the command line; returns the options, and the sweep's own by their names."""
    options = read_options(parser(), arguments, needs_alpha=False)
    given: dict[str, Any] = {}
    for flag in _FLAGS:
        value = getattr(options.namespace, flag.replace("-", "_"))
        in_file = options.file_options.pop(flag, None)
        given[flag] = in_file if value in (None, []) else value
    return options, given


def _settings(options: Options, given: dict[str, Any]) -> Any:
    from expo_serve.sweep.grid import parse_alphas
    from expo_serve.sweep.settings import SweepSettings, parse_duration

    _refuse_alpha(options)
    if given["prompts"] is None:
        raise UsageError('--prompts is missing: expected a file with {"prompt": "..."} or {"messages": [...]} a line')
    return SweepSettings(
        config=options.config,
        prompts=_file("prompts", given),
        out=_out(given),
        alphas=parse_alphas(given["alphas"]),
        n=_count("n", given, None),
        rewards=tuple(_list(given["reward"])),
        lm_eval=tuple(task.strip() for text in _list(given["lm-eval"]) for task in text.split(",") if task.strip()),
        measures=tuple(_list(given["measure"])) or None,
        max_tokens=_count("max-tokens", given, 256),
        temperature=_number("temperature", given, 0.7),
        seed=_count("seed", given, 0, least=0),
        system_prompt=None if given["system-prompt"] is None else str(given["system-prompt"]),
        text=_file("text", given),
        refusals=_file("refusals", given),
        kl_budget=_number("kl-budget", given, None),
        margin=_number("margin", given, 0.02),
        budget_seconds=parse_duration(str(given["budget"])) if given["budget"] is not None else None,
        resume=bool(given["resume"]),
        arguments=tuple(options.arguments),
        file_options=options.file_options,
    )


def _refuse_alpha(options: Options) -> None:
    if any(argument.split("=")[0] == "--alpha" for argument in options.arguments):
        raise UsageError("--alpha: a sweep has several; give --alphas, such as 0,0.1,0.3")


def _out(given: dict[str, Any]) -> Path:
    out = Path(given["out"] or "sweep").expanduser()
    try:
        if not out.absolute().parent.is_dir():
            raise UsageError(f"--out: {out.absolute().parent} does not exist")
        if out.exists() and not given["resume"]:
            raise UsageError(
                f"--out: {out} exists; give a folder that does not exist yet, or --resume to go on with it"
            )
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise UsageError(f"--out: {str(out)!r:.200} cannot be written: {error.strerror}") from None
    values = None if given["emit-values"] is None else Path(given["emit-values"]).expanduser().absolute()
    if values is not None and (values.is_dir() or not values.parent.is_dir()):
        raise UsageError(
            f"--emit-values: expected the name of a file in an existing folder, found {str(values)!r:.200}"
        )
    return out


def _file(flag: str, given: dict[str, Any]) -> Any:
    if given[flag] is None:
        return None
    path = Path(str(given[flag])).expanduser()
    if not path.is_file():
        raise UsageError(f"--{flag}: {path} is not a file")
    return path


def _count(flag: str, given: dict[str, Any], default: int | None, least: int = 1) -> Any:
    text = given[flag]
    if text is None:
        return default
    if not str(text).isascii() or not str(text).isdigit() or int(text) < least:
        raise UsageError(f"--{flag}: expected an integer from {least}, found {text!r:.50}")
    return int(text)


def _number(flag: str, given: dict[str, Any], default: float | None) -> Any:
    text = given[flag]
    if text is None:
        return default
    try:
        number = float(text)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise UsageError(f"--{flag}: expected a number from 0, found {text!r:.50}")
    return number


def _list(given: Any) -> list[str]:
    if given is None:
        return []
    return [str(one) for one in given] if isinstance(given, list) else [str(given)]


def _emit(deploy: dict[str, str], file: str) -> None:
    if "values" not in deploy:
        errors.warn("--emit-values: nothing was recommended, so there are no values to write")
        return
    path = Path(file).expanduser()
    try:
        path.write_text(deploy["values"], encoding="utf-8")
    except OSError as error:
        raise errors.ExpoError(f"--emit-values: {path} cannot be written: {error.strerror}") from None


def _show(result: Any, out: Path) -> None:
    from expo_serve.cli.sweep_table import show

    show(result, out)
