"""``expo-serve inspect``: show what a load would do; only headers are read."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from expo_serve import errors, memory
from expo_serve.checkpoint.folder import Checkpoint, open_checkpoint
from expo_serve.checkpoint.links import is_file
from expo_serve.checkpoint.source import TOKENIZER_FILES, read_config
from expo_serve.cli.inspection import InspectedMemory, InspectedSource, InspectedTensor, Inspection, Refusal
from expo_serve.cli.options import Options, add_source_flags, read_options
from expo_serve.cli.output import command_progress
from expo_serve.cli.parser import Parser
from expo_serve.config import ExpoConfig, Source
from expo_serve.errors import ExpoError, PairError, UsageError
from expo_serve.measure.measurement import Measurement
from expo_serve.plan.delta import Delta, open_delta
from expo_serve.plan.doubts import unsettled
from expo_serve.plan.pair import plan_pair
from expo_serve.plan.plan import Plan, PlannedTensor
from expo_serve.plan.prepare import locate, review
from expo_serve.plan.tokenizers import all_warnings


def main(arguments: list[str]) -> int:
    """Inspect; returns 0, or 2 if the sources would be refused."""
    options, tensor_parallel_size, as_json = _read(arguments)
    inspection = inspect(options, tensor_parallel_size)
    if options.namespace.plot and inspection.measurement:
        from expo_serve.cli.plot import draw

        draw(inspection, options.namespace.plot)
    if as_json:
        print(inspection.model_dump_json(indent=2))
    else:
        from expo_serve.cli.inspect_table import show

        show(inspection)
    if inspection.refusals:
        sys.stdout.flush()
        errors.show(_summary([refusal.message for refusal in inspection.refusals]))
    return 2 if inspection.refusals else 0


def _summary(refusals: list[str]) -> ExpoError:
    """Return one error for all refusals; each is a detail if there are several."""
    if len(refusals) == 1:
        return PairError(refusals[0])
    return PairError(f"the pair is refused for {len(refusals)} reasons", refusals)


def parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser(
        prog="expo-serve inspect",
        description="Show what a load would do: sources, plan, bytes and memory. Reads headers only, unless\n"
        "--measure is given.",
        epilog="Exit codes: 0 the sources would be served; 2 they would be refused, or the command line is wrong.",
    )
    add_source_flags(parser)
    parser.add_argument("--tensor-parallel-size", "-tp", default="1", metavar="N", help="ranks that share the weights")
    parser.add_argument(
        "--measure", action="store_true",
        help="read all values too: how far the sides are apart, what arrives of alpha, whether this is a pair for ExPO",
    )  # fmt: skip
    parser.add_argument(
        "--plot", metavar="FILE.png", help="with --measure: draw step and effective alpha over the layers"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    return parser


def _read(arguments: list[str]) -> tuple[Options, int, bool]:
    options = read_options(parser(), arguments)
    if options.unknown:
        raise UsageError(f"inspect does not know {options.unknown[0]!r}; see expo-serve inspect --help")
    size = options.namespace.tensor_parallel_size
    if not size.isdecimal() or int(size) < 1:
        raise UsageError(f"--tensor-parallel-size: expected a number from 1, found {size!r}")
    _check_plot(options.namespace.plot, options.namespace.measure)
    return options, int(size), options.namespace.json


def _check_plot(file: str | None, is_measured: bool) -> None:
    if file is None:
        return
    if not is_measured:
        raise UsageError("--plot needs --measure, which reads what is drawn")
    if not file.endswith(".png") or not Path(file).absolute().parent.is_dir():
        raise UsageError(f"--plot: expected a name that ends with .png in an existing folder, found {file!r}")
    if find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'expo-serve[plot]'")


def inspect(options: Options, tensor_parallel_size: int) -> Inspection:
    """Find, check and pair the sources; refusals are listed instead of raised."""
    refusals: list[ExpoError] = []
    sources: dict[str, Source] = {}
    opened: dict[str, Checkpoint | Delta] = {}
    for side in ("base", "delta" if options.config.delta else "aligned"):
        try:
            sources[side] = locate(side, options.config, options.hub)
            opened[side] = open_delta(sources[side]) if side == "delta" else open_checkpoint(side, sources[side])
        except ExpoError as error:
            refusals.append(error)
    plan = None
    if len(opened) == 2:
        try:
            plan = plan_opened(opened, options.config)
            doubts = unsettled(plan, options.config)
            refusals += doubts
            plan = plan if doubts else review(plan, options.config)
        except ExpoError as error:
            refusals.append(error)
    return Inspection(
        alpha=options.config.alpha,
        alpha_rules=[rule.text for rule in options.config.alpha_rules],
        allowed=list(options.config.allow),
        rounding=options.config.rounding,
        rounding_seed=options.config.rounding_seed,
        sources={side: _source(source, opened.get(side)) for side, source in sources.items()},
        refusals=[Refusal(message=error.message, details=list(error.details)) for error in refusals],
        **(_planned(plan, options, tensor_parallel_size) if plan else {}),
        measurement=_measured(plan, options.config) if plan and options.namespace.measure else None,
    )


def _measured(plan: Plan, config: ExpoConfig) -> Measurement:
    side, files = _companion_source(plan)
    learned_to_talk = bool(_chat_template(side, files)) and not _chat_template("base", plan.base.source)
    with command_progress("inspect --measure", sum(tensor.result.nbytes for tensor in plan.extrapolated)) as progress:
        from expo_serve.measure.pair import measure_plan

        return measure_plan(plan, config, progress, learned_to_talk=learned_to_talk)


def plan_opened(opened: dict[str, Checkpoint | Delta], config: ExpoConfig) -> Plan:
    """Plan base with the other source, an aligned checkpoint or a delta."""
    base, other = opened.values()
    assert isinstance(base, Checkpoint)
    return plan_pair(base, other, config) if isinstance(other, Checkpoint) else other.plan(base, config)


def _source(source: Source, checkpoint: Checkpoint | Delta | None) -> InspectedSource:
    return InspectedSource(
        name=source.name,
        path=source.path,
        revision=source.revision,
        kind=getattr(checkpoint, "format", None),
        fingerprint=checkpoint.source.fingerprint if checkpoint else "",
        files=len(checkpoint.files) if checkpoint else 0,
        tensors=len(checkpoint.tensors) if checkpoint else 0,
        bytes=checkpoint.nbytes if checkpoint else 0,
        dtypes=sorted({record.dtype for record in checkpoint.tensors.values()}) if checkpoint else [],
    )


def _planned(plan: Plan, options: Options, ranks: int) -> dict[str, Any]:
    weights = sum(_share(tensor, tensor.result.nbytes, ranks) for tensor in plan.tensors.values())
    reads = {
        side: sum(_share(tensor, tensor.read_bytes.get(side, 0), ranks) for tensor in plan.tensors.values())
        for side in plan.sources
    }
    available = memory.available_bytes()
    side, files = _companion_source(plan)
    return {
        "served_model_name": f"{plan.aligned_or_delta.source.short_name}-expo-{options.config.alpha_text}",
        "tokenizer": _first_there(side, files, TOKENIZER_FILES),
        "chat_template": _chat_template(side, files),
        "counts": {"extrapolated": len(plan.extrapolated), "copied": len(plan.copied)},
        "alphas": plan.alphas,
        "copied_unmatched": list(plan.copied_unmatched),
        "ignored_base": list(plan.ignored_base),
        "unchanged": list(plan.unchanged),
        "tensor_parallel_size": ranks,
        "read_bytes_per_rank": reads,
        "memory": InspectedMemory(
            weight_bytes_per_rank=weights,
            weight_bytes=weights * ranks,
            available_host_bytes=available,
            fits_host=weights * ranks <= available,
        ),
        "warnings": all_warnings(plan),
        "tensors": [_tensor(tensor) for tensor in plan.tensors.values()],
    }


def _share(tensor: PlannedTensor, size: int, ranks: int) -> int:
    """Estimate one rank's share: vLLM splits matrices among the ranks and replicates vectors."""
    return -(-size // ranks) if len(tensor.aligned.shape) > 1 else size


def _tensor(tensor: PlannedTensor) -> InspectedTensor:
    return InspectedTensor(
        name=tensor.name,
        shape=list(tensor.aligned.shape),
        dtype=tensor.result.dtype,
        base_name=tensor.base.name if tensor.base else None,
        base_dtype=tensor.base.dtype if tensor.base else None,
        kind="extrapolated" if tensor.base else "copied",
        alpha=tensor.alpha if tensor.base else None,
        grown_rows=tensor.grown_rows,
    )


def _companion_source(plan: Plan) -> tuple[str, Source]:
    """Return the source of tokenizer, chat template and generation config, and which one it is."""
    source = plan.tokenizer or plan.model
    return next(side for side, there in plan.sources.items() if there == source), source


def _first_there(side: str, source: Source, names: tuple[str, ...]) -> str | None:
    return next((f"{side}: {name}" for name in names if is_file(Path(source.path, name))), None)


def _chat_template(side: str, source: Source) -> str | None:
    if found := _first_there(side, source, ("chat_template.jinja", "chat_template.json")):
        return found
    try:
        settings = read_config(side, source, "tokenizer_config.json")
    except ExpoError:
        return None
    return f"{side}: tokenizer_config.json" if settings.get("chat_template") else None
