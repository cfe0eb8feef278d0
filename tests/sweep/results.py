"""Results of sweeps as the page, the plots and ``sweep.md`` may get them, made of planted numbers; some are nasty."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Literal

from expo_serve.config import format_alpha
from expo_serve.report import PublicSource
from expo_serve.sweep.observations import Answer
from expo_serve.sweep.results import (
    AlphaResult,
    Decision,
    Effect,
    Measured,
    MeasureInfo,
    SampleScores,
    SweepResult,
    Timing,
)

ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.0)
EVIL = '</script><script>document.title = "broken"</script><!-- <img src=x onerror=alert(1)> {{ 7 * 7 }}'
ANSWERS = (
    EVIL,
    "",
    "שלום, זו תשובה בעברית עם English באמצע.",
    "🦜 naïve — “quotes” & <b>tags</b>\n\n- one\n- two\u2028three",
    "word " * 6000,
    "同じ質問に対する答えです。空白がありません。",
)


def _info(label: str, unit: str, better: Literal["higher", "lower", ""], formula: str) -> MeasureInfo:
    return MeasureInfo(label=label, unit=unit, better=better, formula=formula)


_INFO = {
    "reward": _info("Reward", "", "higher", "mean_i r(x_i, y_i)"),
    "reward_lc": _info("Length-controlled reward", "", "higher", "OLS r_ia = g_i + m_a + b (len_ia - len_i0)/sd"),
    "win_rate": _info("Win rate against alpha 0", "share", "higher", "mean 1[r_ia > r_i0]"),
    "kl": _info("KL from alpha 0", "nats/token", "", "mean (q/p - 1) - log(q/p)"),
    "length": _info("Length", "tokens", "", "mean number of tokens"),
    "unfinished": _info("Unfinished answers", "share", "lower", "share with finish_reason = length"),
    "distinct_4": _info("Distinct 4-grams", "share", "higher", "different 4-grams / 4-grams"),
    "perplexity": _info("Perplexity of held-out text", "", "lower", "exp(-mean log p)"),
    "capability": _info("Capability", "share", "higher", "mean accuracy, paired by question"),
    "over_refusal": _info("Over-refusal", "share", "lower", "share of refusals"),
}
_TEXT = "the quick small brown fox answers a question about rain and snow with care then stops because it is done"
_WORDS = tuple(_TEXT.split(" "))


def sweep_result(
    alphas: Sequence[float] = ALPHAS,
    prompts: int = 40,
    *,
    best: float | None = 0.4,
    with_reward: bool = True,
    status: str = "complete",
) -> SweepResult:
    """A result with a reward that rises, bends and falls, and a collapse above alpha 1.

    Args:
        best: the recommended alpha; 0 for "nothing helps".
    """
    is_whole = status == "complete"
    recommendation = best if with_reward and is_whole else None
    return SweepResult(
        status="complete" if is_whole else "interrupted",
        recommendation=recommendation,
        decision=_decision(alphas, best, with_reward),
        alphas=[_alpha_result(alpha, prompts, with_reward) for alpha in alphas],
        measures={name: info for name, info in _INFO.items() if with_reward or name not in _REWARDS},
        samples=list(_samples(alphas, prompts, with_reward)),
        prompts=[f"Question {index}: what about {_WORDS[index % len(_WORDS)]}?" for index in range(prompts)],
        sources={
            "base": PublicSource(name="some-lab/model-7b-sft", revision="a" * 40, fingerprint="0123abcd" * 8),
            "aligned": PublicSource(name="model-7b-dpo", revision=None, fingerprint="89efcdab" * 8),
        },
        settings={"n": prompts, "temperature": 0.7, "reward": ["python:rewards:lists"], "system-prompt": None},
        deploy=_deploy(recommendation),
        versions={"vllm": "0.32.0", "python": "3.11.9"},
        timing=Timing(engine_starts=1, start_seconds=31.5, total_seconds=611.25),
        warnings=["effective alpha is 0.22 instead of 0.4: rounding to nearest swallows small steps"],
    )  # fmt: skip


_REWARDS = {"reward", "reward_lc", "win_rate"}


def answers(result: SweepResult, *, seed: int = 0) -> list[Answer]:
    """An answer to each prompt at each alpha: sentences that differ in a few words, more of them at larger alphas."""
    return [
        answer(alpha.alpha, prompt, _sentence(alpha.alpha, prompt, seed))
        for alpha in result.alphas
        for prompt in range(len(result.prompts))
    ]


def answer(alpha: float, prompt: int, text: str, finish_reason: str = "stop") -> Answer:
    """One answer; its tokens are not the text's."""
    return Answer(
        alpha=alpha,
        prompt=prompt,
        text=text,
        prompt_tokens=(1, 2),
        tokens=(3,),
        logprobs=(-0.5,),
        finish_reason=finish_reason,
    )


def nasty_result() -> tuple[SweepResult, list[Answer]]:
    """Markup, scripts and formulas in all texts of users and models; values that are missing or not finite."""
    result = sweep_result((0.0, 0.5, 1.0), prompts=len(ANSWERS))
    first, second, third = result.alphas
    gone = {name: Measured(value=None) for name in second.measures}
    changed = [
        first.model_copy(update={"effective_alpha": None}),
        second.model_copy(update={"measures": gone, "reward": None, "kl": None, "infeasible_because": [EVIL]}),
        third.model_copy(update={"measures": {**third.measures, "perplexity": Measured(value=math.inf, n=3)}}),
    ]
    info = result.measures["reward"].model_copy(update={"label": f"Reward $\\alpha$ {EVIL}", "formula": EVIL})
    evil = result.model_copy(
        update={
            "alphas": changed,
            "recommendation": 0.5,
            "prompts": [f"{index} {EVIL}" for index in range(len(ANSWERS))],
            "measures": {**result.measures, "reward": info},
            "decision": result.decision.model_copy(update={"reason": EVIL, "remarks": [EVIL], "best": 0.5}),
            "sources": {"base": PublicSource(name=EVIL, revision=EVIL, fingerprint=EVIL)},
            "settings": {EVIL: EVIL, "nested": {"key": [EVIL]}},
            "deploy": {"command": f"expo-serve --base '{EVIL}' ```", "values": f"# {EVIL}\n```yaml\n" * 3},
            "versions": {EVIL: EVIL},
            "warnings": [EVIL, "| a | table |\nand a second line"],
        }
    )
    texts = [
        answer(alpha, prompt, text, "length" if prompt == 4 else "stop")
        for alpha in (0.0, 0.5)
        for prompt, text in enumerate(ANSWERS if alpha else ANSWERS[::-1])
    ]
    return evil, texts


def _decision(alphas: Sequence[float], best: float | None, with_reward: bool) -> Decision:
    if not with_reward or best is None:
        return Decision(
            kind="none", reason="Without a reward no alpha is better than another.", feasible=list(alphas[:3])
        )
    shown = best or 0.3
    low, high = (0.08, 0.31) if best else (-0.05, 0.16)
    return Decision(
        kind="alpha" if best else "zero",
        reason=(
            "The smallest alpha within one standard error of the best length-controlled reward; better than alpha 0."
            if best
            else "No alpha is shown to be better than alpha 0: the interval of the best one's difference includes 0."
        ),
        feasible=[alpha for alpha in alphas if alpha <= 1],
        best=0.5 if best else 0.3,
        effect=Effect(alpha=shown, measure="reward_lc", difference=(low + high) / 2, low=low, high=high, n=20),
        chosen_share={"0": 0.041, "0.1": 0.002, "0.3": 0.2085, "0.4": 0.6125, "0.5": 0.136},
        alpha_low=0.0,
        alpha_high=0.5,
        remarks=["20 prompts can show a difference of 0.11 in length-controlled reward; for half of it 80 are needed."],
    )


def _alpha_result(alpha: float, prompts: int, with_reward: bool) -> AlphaResult:
    values = {name: one for name, one in _measures(alpha, prompts).items() if with_reward or name not in _REWARDS}
    because = ["unfinished answers: 31% against 6% at alpha 0, more than 5 points above"] if alpha > 1 else []
    return AlphaResult(
        alpha=alpha,
        effective_alpha=alpha * (1.2 if alpha >= 0.5 else 0.55) if alpha else 0.0,
        reward=values["reward"].value if with_reward else None,
        kl=values["kl"].value,
        feasible=not because,
        infeasible_because=because,
        measures=values,
        failures=1 if alpha == 2 else 0,
        deployment_id=f"id-{format_alpha(alpha)}",
        load_seconds=3.25,
        generate_seconds=41.5,
    )


def _measures(alpha: float, prompts: int) -> dict[str, Measured]:
    def over(value: float, half: float, *, share: bool = False) -> Measured:
        low, high = value - half, value + half
        return Measured(
            value=value, low=max(0.0, low) if share else low, high=min(1.0, high) if share else high, n=prompts
        )

    distance = 0.14 * alpha
    reward = 0.52 + 3.1 * distance * (1 - 3.6 * distance)
    return {
        "reward": over(reward, 0.07),
        "reward_lc": over(reward - 0.05 * alpha, 0.06),
        "win_rate": over(0.5 + 0.3 * math.sin(alpha * 2), 0.08, share=True),
        "kl": over(0.0199 * abs(alpha) ** 1.9, 0.0021 * abs(alpha) ** 1.9),
        "length": over(96 + 45 * alpha**2, 9),
        "unfinished": over(min(1.0, 0.06 + 0.11 * abs(alpha) ** 1.8), 0.05, share=True),
        "distinct_4": over(max(0.1, 0.93 - 0.09 * alpha**2), 0.02, share=True),
        "perplexity": over(11.4 * math.exp(min(9.0, 0.35 * alpha**2)), 0.4),
        "capability": over(max(0.0, 0.52 - 0.04 * alpha**2), 0.05, share=True),
        "capability:arc_easy": over(max(0.0, 0.6 - 0.03 * alpha**2), 0.05, share=True),
        "over_refusal": over(min(1.0, 0.08 + 0.05 * alpha), 0.04, share=True),
    }  # fmt: skip


def _samples(alphas: Sequence[float], prompts: int, with_reward: bool) -> list[SampleScores]:
    chance = random.Random(5)
    found = []
    for alpha in alphas:
        for prompt in range(prompts):
            scores = {
                "reward": round(chance.gauss(0.5 + 0.3 * alpha * (1 - alpha / 1.6), 0.3), 6),
                "length": float(round(chance.gauss(96 + 45 * alpha**2, 20))),
                "distinct_4": round(min(1.0, chance.gauss(0.93 - 0.09 * alpha**2, 0.03)), 6),
                "unfinished": float(chance.random() < 0.06 + 0.1 * alpha),
            }
            scores = {name: score for name, score in scores.items() if with_reward or name not in _REWARDS}
            reason = "length" if scores["unfinished"] else "stop"
            found.append(SampleScores(alpha=alpha, prompt=prompt, finish_reason=reason, scores=scores))
    return found


def _sentence(alpha: float, prompt: int, seed: int) -> str:
    """Return sentences that share most words between alphas."""
    chance = random.Random(f"{seed}:{prompt}")
    words = [chance.choice(_WORDS) for _ in range(90)]
    change = random.Random(f"{seed}:{prompt}:{alpha}")
    changed = [change.choice(_WORDS) if change.random() < 0.12 * alpha else word for word in words]
    text = " ".join(changed + [_WORDS[0]] * int(12 * alpha))
    return text.capitalize() + "."


def _deploy(recommendation: float | None) -> dict[str, str]:
    if recommendation is None:
        return {}
    alpha = format_alpha(recommendation)
    return {
        "command": f"expo-serve --base some-lab/model-7b-sft --base-revision {'a' * 40} --aligned ./model-7b-dpo "
        f"--alpha {alpha} --rounding nearest --max-model-len 2048",
        "values": f"# Alpha {alpha} as a canary beside alpha 0.\n\nimage:\n  repository: expo-serve\n"
        f'variants:\n  alpha-0:\n    alpha: "0"\n  alpha-{alpha.replace(".", "-")}:\n    alpha: "{alpha}"\n',
    }


def _with_answers(result: SweepResult) -> tuple[SweepResult, list[Answer]]:
    return result, answers(result)


KINDS: dict[str, Callable[[], tuple[SweepResult, list[Answer]]]] = {
    "usual": lambda: _with_answers(sweep_result()),
    "nasty": nasty_result,
    "zero": lambda: _with_answers(sweep_result((0.0, 0.5), 8, best=0.0)),
    "without-reward": lambda: _with_answers(sweep_result((0.0, 0.5), 8, with_reward=False)),
    "interrupted": lambda: _with_answers(sweep_result((0.0,), 8, status="interrupted")),
    "many": lambda: _with_answers(sweep_result([step / 20 for step in range(40)], 12)),
}
"""Makers of results with their answers."""
