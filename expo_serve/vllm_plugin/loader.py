"""The load format ``expo``: vLLM's default loader, fed with lazy tensors.

Which files and tensors are read stays vLLM's decision (index, patterns, expert and encoder filters): its iterator names
the tensors, and the loader yields a lazy tensor for each name.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from expo_serve.checkpoint.source import HubAccess, is_on_network
from expo_serve.checkpoint.wrappers import bare_names, possible_names
from expo_serve.config import ExpoConfig, parse_config
from expo_serve.errors import CheckpointError, ConfigError, LoadError, count_of
from expo_serve.load import sizes
from expo_serve.load.counts import Counts, ReadActivity
from expo_serve.load.coverage import WriteTracker, unwatched
from expo_serve.load.fill import compile_kernels
from expo_serve.load.lazy import LazyTensor, lazy_tensor
from expo_serve.load.session import LoadSession, load_into, stages_for
from expo_serve.load.stages import Stages
from expo_serve.load.threads import default_threads, device_threads, start_thread
from expo_serve.measure.sample import Sample
from expo_serve.plan.delta import format_of
from expo_serve.plan.plan import Plan, PlannedTensor
from expo_serve.plan.prepare import prepare
from expo_serve.progress import Progress
from expo_serve.report import LoadReport
from expo_serve.vllm_plugin import compat
from expo_serve.vllm_plugin.caches import refuse_weight_cache
from expo_serve.vllm_plugin.plain_vllm import check_config, refuse_elastic_experts, with_model
from expo_serve.vllm_plugin.processing import processed_unwatched
from expo_serve.vllm_plugin.rank_state import LoadState, failures_reported, rank_reporter
from expo_serve.vllm_plugin.reporting import LoadAccount, load_progress
from expo_serve.vllm_plugin.unwritten import check_taken, check_written

LOAD_FORMAT = "expo"
REPORT_ATTRIBUTE = "expo_load_report"
_COUNTS_ATTRIBUTE = "expo_load_counts"
_MADE_TOGETHER = 16
"""Lazy tensors made at a time: to leave the dispatch modes and to enter them again takes as long as making one."""
logger = compat.init_logger("vllm.expo_serve.loader")

NamedTensors = Iterable[tuple[str, torch.Tensor]]


@dataclass
class ModelLoad:
    """One pass over the weights of one model."""

    plan: Plan
    session: LoadSession
    progress: Progress | None = None
    state: LoadState | None = None
    given: list[str] = field(default_factory=list)
    """The tensors that the model is given, in vLLM's order."""

    def lazy_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each tensor by its name; a tensor is done with when the next one is asked for."""
        made: deque[LazyTensor] = deque()
        waiting = iter([self.plan.tensors[name] for name in self.given])
        while True:
            if len(made) < sizes.ANNOUNCED_TENSORS:
                with unwatched():
                    made.extend(self._announced(tensor) for tensor in islice(waiting, _MADE_TOGETHER))
            if not made:
                return
            lazy = made.popleft()
            planned = lazy.pending.planned
            yield planned.name, lazy
            self.session.stages.finish(lazy.pending)
            self._count(planned.read_bytes)

    def _announced(self, planned: PlannedTensor) -> LazyTensor:
        lazy = lazy_tensor(planned, self.session)
        self.session.stages.announce(lazy.pending)
        return lazy

    def _count(self, read_bytes: Mapping[str, int]) -> None:
        if self.progress:
            self.progress.advance(sum(read_bytes.values()))
        if self.state:
            self.state.advance(read_bytes)

    def dropped(self) -> dict[str, int]:
        """Return the tensors of which the model took nothing: name to number of elements."""
        taken = self.session.counts.kinds
        return {name: self.plan.tensors[name].aligned.numel for name in self.given if name not in taken}


class ExpoModelLoader(compat.DefaultModelLoader):
    """Computes ``aligned + alpha * (aligned - base)``, or the same from base and a delta, while vLLM loads a model.

    Args:
        load_config: vLLM's LoadConfig; its ``model_loader_extra_config`` is an :class:`ExpoConfig`.

    Raises:
        ConfigError: the extra config is wrong, or vLLM would cache the weights under the name of others.
    """

    def __init__(self, load_config: Any) -> None:
        refuse_weight_cache()
        extra = load_config.model_loader_extra_config
        if not isinstance(extra, dict):
            raise ConfigError('--model-loader-extra-config: expected an object such as {"base": ..., "alpha": 0.5}')
        self.config = parse_config(extra, "--model-loader-extra-config")
        self._plan: Plan | None = None
        self._load: ModelLoad | None = None
        """The load under way; None outside of one, when vLLM's ``reload_weights`` may ask for the weights."""
        self._opened: ExitStack | None = None
        """What stays open until the end of ``load_model``; None outside of it."""
        self._stages: Stages | None = None
        """Those that stay open."""
        self._unfinished: LoadAccount | None = None
        """A load that waits for layers that vLLM quantises late."""
        self._shows_progress = bool(load_config.use_tqdm_on_load)
        # vLLM's iterator only lists names here: it must neither read ahead nor show progress.
        super().__init__(
            replace(
                load_config,
                load_format="safetensors",
                model_loader_extra_config={},
                safetensors_load_strategy="lazy",
                use_tqdm_on_load=False,
            )
        )
        self._plain_config = replace(load_config, load_format="auto", model_loader_extra_config={})
        start_thread("expo-compile", partial(_compile, self.config))  # ready by the time the model is built

    def download_model(self, model_config: Any) -> None:
        """Find base and the other source, downloading them where they come from the hub."""
        self._prepare(model_config)

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> torch.nn.Module:
        """Build and load a model; the report includes layers that vLLM quantises after all weights have arrived."""
        self._take_unfinished()  # of a load that failed
        refuse_elastic_experts(vllm_config.parallel_config.enable_elastic_ep)
        with failures_reported(rank_reporter()), self._stages_kept_open():
            model: torch.nn.Module = super().load_model(vllm_config, model_config, prefix)
        if unfinished := self._take_unfinished():
            _say(self._report(model, unfinished))
        return model

    @contextmanager
    def _stages_kept_open(self) -> Iterator[None]:
        """Keep the ways onto devices open after ``load_weights``, for layers that vLLM quantises late.

        Raises:
            ExpoError: a value of such a layer is not finite.
        """
        with ExitStack() as self._opened:
            try:
                yield
                if self._stages:
                    self._stages.wait()
            finally:
                self._opened, self._stages = None, None

    def _take_unfinished(self) -> LoadAccount | None:
        unfinished, self._unfinished = self._unfinished, None
        return unfinished

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        """Load the extrapolated weights into ``model``; a model other than the deployed one is loaded plainly.

        Raises:
            ExpoError: the pair is refused, a weight is not finite, or a parameter got no weight.
        """
        if not self._is_deployed_model(model_config):
            compat.DefaultModelLoader(self._plain_config).load_weights(model, model_config)
            return
        account = LoadAccount.open(model)
        plan = self._prepare(model_config)
        account.resolved = time.perf_counter()
        account.sample = Sample.of_load(plan.weight_bytes, self.config.how_to_round)
        load, tracker = self._load_lazily(model, model_config, plan, account.sample)
        account.counts = load.session.counts
        setattr(model, _COUNTS_ATTRIBUTE, account.counts)
        account.unfilled = check_written(model, tracker, model_config.runner_type, load.dropped())
        if account.unfilled:
            names = ", ".join(account.unfilled)
            logger.warning("expo: vLLM fills these parameters from no tensor, with or without expo: %s", names)
        account.sort(model)
        self._unfinished = account if account.late else None
        report = self._report(model, account)
        if not account.late:
            _say(report)

    def reload(self, model: torch.nn.Module, model_config: Any, put: Callable[[NamedTensors], object]) -> LoadReport:
        """Load the extrapolated weights into a model that holds those of another alpha.

        On the CPU in this thread: vLLM processes each layer as soon as its tensors are there, by operations of its own
        that no dispatch mode sees, so nothing may be under way then. A device keeps the order by itself.

        Args:
            model: has been loaded by this load format, from the same sources.
            model_config: vLLM's ModelConfig of it.
            put: vLLM's ``reload_weights`` of the model's runner, which is given the tensors.

        Raises:
            ExpoError: the pair is refused, a weight is not finite, or other tensors were taken than by the first load.
        """
        account = LoadAccount.open(model)
        plan = self._prepare(model_config)
        account.resolved = time.perf_counter()
        account.sample = Sample.of_load(plan.weight_bytes, self.config.how_to_round)
        with stages_for(_threads(plan)) as stages:
            self._load = ModelLoad(plan, LoadSession(counts=account.counts, stages=stages, observe=account.sample))
            try:
                put(self.get_all_weights(model_config, model))
                stages.wait()
            finally:
                self._load = None
        first: Counts = getattr(model, _COUNTS_ATTRIBUTE)
        check_taken(first.kinds.keys(), account.counts.kinds.keys())
        account.sort(model)
        return self._report(model, account)

    def _load_lazily(
        self, model: torch.nn.Module, model_config: Any, plan: Plan, sample: Sample
    ) -> tuple[ModelLoad, WriteTracker]:
        """Let vLLM load the model while lazy tensors are copied by threads or onto devices, and watch the writes."""
        activity, threads = ReadActivity(), _threads(plan)
        state = LoadState(plan.read_bytes)
        with ExitStack() as opened:
            stages = (self._opened or opened).enter_context(stages_for(threads, activity))
            self._stages = stages if self._opened else None
            into_model = load_into(model, threads, activity, sample, stages)
            progress = opened.enter_context(self._progress(plan, activity, state))
            session = opened.enter_context(into_model)
            load = ModelLoad(plan, session, progress, state)
            tracker = WriteTracker(model, session.settle_for)
            self._load = load
            try:
                with tracker, processed_unwatched(model, session.settle_memory):
                    super().load_weights(model, model_config)
                session.settle()
            finally:
                self._load = None
        state.end()
        return load, tracker

    def get_all_weights(self, model_config: Any, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor that vLLM would read of the model, lazily extrapolated.

        Weights that the model takes from elsewhere (``secondary_weights``) come as they are.
        """
        pinned = self.config.pinned
        if pinned and not self._is_deployed_model(model_config):
            raise LoadError(f"weights of {model_config.model} were asked for, but {pinned.deployed.path} is deployed")
        if self._load is None:  # vLLM's ``reload_weights``
            plan = self._prepare(model_config)
            with stages_for(_threads(plan)) as stages:
                yield from self._all_weights(ModelLoad(plan, LoadSession(stages=stages)), model)
                stages.wait()
        else:
            yield from self._all_weights(self._load, model)

    def _all_weights(self, load: ModelLoad, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        further = getattr(model, "secondary_weights", ())
        for source in further:
            _refuse_pickles(source)
        with unwatched():
            load.given = self._names_to_read(load.plan, model)
        yield from load.lazy_tensors()
        for source in further:
            yield from self._get_weights_iterator(source)

    def _progress(self, plan: Plan, activity: ReadActivity, state: LoadState) -> Progress:
        is_shown = self._shows_progress and compat.get_current_vllm_config().parallel_config.rank == 0
        return load_progress(plan, activity, self.config, is_shown=is_shown, on_tick=state.report)

    def _names_to_read(self, plan: Plan, model: torch.nn.Module) -> list[str]:
        """List the names that vLLM's own iterator yields, in its order; the tensors that it opens are not read."""
        chosen = getattr(model, "allow_patterns_overrides", None)
        unused = getattr(model, "is_unused_checkpoint_weight", None) or (lambda name: False)
        if plan.model_files[0].suffix == ".bin":  # vLLM itself would run the pickles
            return [name for name in plan.tensors if not unused(name)]
        primary = self.Source(
            model_or_path=plan.model.path,
            revision=None,
            allow_patterns_overrides=chosen,
            # A file that the plan leaves out whole repeats the others in a publisher's own format.
            is_unused_weight=lambda name: (
                unused(name) or (chosen is None and plan.tensors.keys().isdisjoint(possible_names(name)))
            ),
        )
        stored = dict.fromkeys(name for name, _ in self._get_weights_iterator(primary))
        names = [name for name in bare_names(stored).values() if name not in plan.left_out]
        names += [name for name in plan.added if not unused(name)]
        if unplanned := [name for name in names if name not in plan.tensors]:
            raise CheckpointError(
                f"{plan.model.path}: vLLM reads {count_of(len(unplanned), 'tensor')} not in the plan", unplanned
            )
        return names

    def _is_deployed_model(self, model_config: Any) -> bool:
        """Return True for the model itself; drafts of speculative decoding get our load config too."""
        if self.config.pinned:
            return _same_path(model_config.model, self.config.pinned.deployed.path)
        deployed = compat.get_current_vllm_config()
        speculative = deployed.speculative_config
        target = speculative.target_model_config if speculative else None
        return bool(model_config.model == (target or deployed.model_config).model)

    def _prepare(self, model_config: Any) -> Plan:
        if self._plan is None:
            hub = HubAccess(getattr(model_config, "hf_token", None), self.load_config.download_dir)
            config = self.config if self.config.pinned else with_model(self.config, model_config, hub)
            self._plan = prepare(config, hub)
            if not config.pinned:
                check_config(self._plan, model_config)
                for warning in self._plan.warnings:
                    logger.warning("expo: %s", warning)
        return self._plan

    def _report(self, model: torch.nn.Module, account: LoadAccount) -> LoadReport:
        """Report what has been done so far, and attach the report to the model."""
        assert self._plan is not None
        report = account.report(model, self._plan, self.config)
        setattr(model, REPORT_ATTRIBUTE, report)
        return report


def _say(report: LoadReport) -> None:
    logger.info("%s", report.line())
    for warning in report.warnings():
        logger.warning("expo: %s", warning)


def register_loader() -> None:
    """Register the load format in this process, once."""
    if compat.LOADERS.get(LOAD_FORMAT) is not ExpoModelLoader:
        compat.register_model_loader(LOAD_FORMAT)(ExpoModelLoader)


def _compile(config: ExpoConfig) -> None:
    """Compile the loops that this load needs."""
    delta = config.pinned.delta.path if config.pinned and config.pinned.delta else config.delta
    delta_format = format_of(Path(delta)).format if delta and Path(delta).is_dir() else None
    if reason := compile_kernels(delta_format, for_device=not compat.current_platform.is_cpu()):
        logger.warning("expo: %s", reason)


def _threads(plan: Plan) -> int:
    """Return how many threads read and combine."""
    on_network = any(is_on_network(side.files[0]) for side in (plan.base, plan.aligned_or_delta))
    if compat.current_platform.is_cpu():
        return default_threads(on_network)
    parallel = compat.get_current_vllm_config().parallel_config
    # Of data parallelism vLLM tells ranks of experts only: those of a dense model know of no others.
    ranks = parallel.local_world_size * max(1, parallel.data_parallel_size_local)
    return device_threads(on_network, ranks)


def _same_path(one: str, other: str) -> bool:
    return Path(one).resolve() == Path(other).resolve()


def _refuse_pickles(source: Any) -> None:
    """Refuse further weight files of a model that are pickles: those are never opened."""
    patterns = source.allow_patterns_overrides or ()
    if pickles := [pattern for pattern in patterns if not pattern.endswith(".safetensors")]:
        raise CheckpointError(
            f"{source.model_or_path}: the model takes further weights from {', '.join(pickles)}: pickle files can run "
            "code and are never opened; this model cannot be extrapolated"
        )
