"""What alpha does to a model under both roundings: the figures by which the default was chosen.

For each kind of pair, rounding and alpha: KL(exact || served) in nats a token, where exact has the weights in fp32
without rounding; and what arrives of the change that alpha asks for, in weights and in logits (1 is all of it). Logits:
the projection of served's change of the centred log-probabilities, weighted by aligned's probabilities, on exact's.
Intervals are 95% by bootstrap over the prompts. But for `quantised` both sides compute in fp32; only weights differ.

Kinds of pairs, made from the demo's real model::

    demo       the demo's pair: DPO by LoRA, merged, in bf16
    all        DPO of all parameters, a short run made here, in bf16
    fp16       the demo's pair in fp16
    large      the demo's adapter ten times as large, merged, in bf16
    adapter    the demo's adapter, served as a LoRA delta
    quantised  the demo's pair, quantised by vLLM while it loads (fp8_per_channel, with vLLM's own arithmetic in bf16)

    python -m loadtests.rounding [--kinds demo,all,...] [--alphas 0.1,0.5,...] [--prompts 16]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file

from expo_serve.config import ExpoConfig, Method
from expo_serve.load.lazy import lazy_tensor
from expo_serve.load.session import LoadSession
from expo_serve.plan.prepare import prepare
from loadtests.results import RESULTS, WORK, save, table

sys.path.insert(0, "deploy/demo")
import prepare as demo_models  # the demo's scripts are no package
import task
import train

DEMO = Path(".demo")
ADAPTER = Path("deploy/demo/adapter")
ALPHAS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0)
METHODS: tuple[Method, ...] = get_args(Method)
_RESAMPLES = 2000
_FULL_STEPS, _FULL_RATE, _FULL_TOPICS = 16, 5e-6, 12
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Kind:
    """One kind of pair: its folders, and a model with the weights that nothing rounds."""

    base: Path
    other: Path
    is_delta: bool = False

    def config(self, alpha: float, rounding: Method) -> ExpoConfig:
        """The deployment."""
        side = {"delta" if self.is_delta else "aligned": str(self.other)}
        return ExpoConfig.model_validate({"base": str(self.base), "alpha": alpha, "rounding": rounding, **side})

    def served(self, alpha: float, rounding: Method) -> Tensors:
        """The weights as a load computes them."""
        plan, session = prepare(self.config(alpha, rounding)), LoadSession()
        return {name: lazy_tensor(tensor, session).materialize() for name, tensor in plan.tensors.items()}

    def exact(self, alpha: float) -> Tensors:
        """The weights in fp32, without any rounding to 16 bits."""
        base = {name: tensor.float() for name, tensor in load_file(self.base / "model.safetensors").items()}
        if not self.is_delta:
            aligned = load_file(self.other / "model.safetensors")
            return {name: torch.lerp(base[name], aligned[name].float(), 1 + alpha) for name in base}
        steps = adapter_steps(1 + alpha)
        return {name: tensor + steps.get(name, 0.0) for name, tensor in base.items()}


def adapter_steps(weight: float) -> Tensors:
    """What the demo's adapter adds to each tensor, times ``weight``."""
    config = json.loads((ADAPTER / "adapter_config.json").read_text())
    factors = load_file(ADAPTER / "adapter_model.safetensors")
    scale = weight * config["lora_alpha"] / config["r"]
    steps: Tensors = {}
    for name, a in factors.items():
        if "lora_A" in name:
            b = factors[name.replace("lora_A", "lora_B")]
            bare = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            steps[bare] = (b.double() @ a.double() * scale).float()
    return steps


def kinds(work: Path) -> dict[str, Callable[[], Kind]]:
    """How each kind of pair is made."""
    return {
        "demo": lambda: Kind(DEMO / "base", DEMO / "aligned"),
        "all": lambda: Kind(DEMO / "base", trained(work / "all")),
        "fp16": lambda: Kind(saved(work / "base16", torch.float16, 0.0), saved(work / "aligned16", torch.float16, 1.0)),
        "large": lambda: Kind(DEMO / "base", saved(work / "large", torch.bfloat16, 10.0)),
        "adapter": lambda: Kind(DEMO / "base", ADAPTER, is_delta=True),
        "quantised": lambda: Kind(DEMO / "base", DEMO / "aligned"),
    }


def saved(folder: Path, dtype: torch.dtype, weight: float) -> Path:
    """Write base plus ``weight`` times the demo's adapter, rounded once."""
    model = task.load_model(DEMO / "base", torch.float32)
    steps = adapter_steps(weight)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in steps:
                parameter += steps[name]
    demo_models.save(model.to(dtype), task.load_tokenizer(DEMO / "base"), folder)
    return folder


def trained(folder: Path) -> Path:
    """Train all parameters by DPO for a few steps, and write the result in bf16."""
    torch.manual_seed(train.SEED)
    model = task.load_model(DEMO / "base", torch.float32)
    tokenizer = task.load_tokenizer(DEMO / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "TRAINING_TOPICS", task.TRAINING_TOPICS[:_FULL_TOPICS])
        pairs = train.sample_pairs(model, tokenizer)
    with torch.no_grad():
        reference = [train.answer_log_probabilities(model, [pair]) for pair in pairs]
    known = dict(zip(pairs, reference, strict=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=_FULL_RATE)
    for batch in islice(train.shuffled_batches(pairs), _FULL_STEPS):
        optimizer.zero_grad()
        gain = train.answer_log_probabilities(model, batch) - torch.stack([known[pair] for pair in batch]).T.reshape(-1)
        better, worse = gain.chunk(2)
        torch.autograd.backward(-torch.nn.functional.logsigmoid(train.BETA * (better - worse)).mean())
        optimizer.step()
    demo_models.save(model.to(torch.bfloat16), tokenizer, folder)
    return folder


def texts(count: int) -> list[list[int]]:
    """Conversations about held-out topics, each with the beginning of an answer, as tokens."""
    tokenizer = task.load_tokenizer(DEMO / "base")
    asked = task.questions(task.HELD_OUT_TOPICS)[:count]
    begun = (
        " Here is what matters most about it, in a few words: first of all, it depends on what you want, and on when."
    )
    return [[*train.prompt_tokens(tokenizer, question), *tokenizer(begun)["input_ids"]] for question in asked]


class Model:
    """The demo's model in fp32, with any weights."""

    def __init__(self) -> None:
        self._model = task.load_model(DEMO / "base", torch.float32).eval()

    def log_probabilities(self, weights: Tensors, rows: list[list[int]]) -> Iterator[torch.Tensor]:
        """Of the next token, at each position of each row."""
        parameters = dict(self._model.named_parameters())
        with torch.no_grad():
            for name, values in weights.items():
                if name in parameters:
                    parameters[name].copy_(values)
            for row in rows:
                yield self._model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)


def compared(
    exact: torch.Tensor, served: torch.Tensor, aligned: torch.Tensor, served_aligned: torch.Tensor | None = None
) -> tuple[float, float, float, int]:
    """Of one prompt: the sum of KL(exact || served), the two sums of the projection, and the number of tokens.

    ``served_aligned``: what is served at alpha 0, if that is not ``aligned``.
    """
    probabilities = aligned.exp()
    from_where = aligned if served_aligned is None else served_aligned

    def centred(change: torch.Tensor) -> torch.Tensor:
        return change - (probabilities * change).sum(-1, keepdim=True)

    wanted, got = centred(exact - aligned), centred(served - from_where)
    divergence = (exact.exp() * (exact - served)).sum().item()
    return divergence, (probabilities * wanted * got).sum().item(), (probabilities * wanted**2).sum().item(), len(exact)


def with_intervals(sums: list[tuple[float, float, float, int]]) -> dict[str, Any]:
    """KL and share with their intervals, from the sums of each prompt."""
    of_prompts = torch.tensor(sums, dtype=torch.float64)
    draws = torch.randint(len(sums), (_RESAMPLES, len(sums)), generator=torch.Generator().manual_seed(1))
    resampled = of_prompts[draws].sum(1)
    total = of_prompts.sum(0, keepdim=True)
    found: dict[str, Any] = {}
    for name, above, below in (("kl", 0, 3), ("share_in_logits", 1, 2)):
        values = resampled[:, above] / resampled[:, below]
        low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        found[name] = {"value": float(total[0, above] / total[0, below]), "low": low, "high": high}
    return found


def share_in_weights(kind: Kind, weights: Tensors, alpha: float) -> float:
    """What arrives of ``alpha * step`` in the weights."""
    base, aligned = kind.exact(-1), kind.exact(0)
    moved = step_squares = 0.0
    for name, tensor in aligned.items():
        step = (tensor.double() - base[name].double()).view(-1)
        moved += float(torch.dot(weights[name].double().view(-1) - tensor.double().view(-1), step))
        step_squares += float(torch.dot(step, step))
    return moved / (alpha * step_squares)


def measure(kind: Kind, alphas: list[float], count: int) -> dict[str, Any]:
    """All alphas and roundings of one kind."""
    model, rows, figures = Model(), texts(count), {}
    aligned = list(model.log_probabilities(kind.exact(0), rows))
    for alpha in alphas:
        exact = list(model.log_probabilities(kind.exact(alpha), rows))
        for rounding in METHODS:
            weights = kind.served(alpha, rounding)
            served = model.log_probabilities(weights, rows)
            sums = [compared(*three) for three in zip(exact, served, aligned, strict=True)]
            figures[f"{alpha} {rounding}"] = {
                "share_in_weights": share_in_weights(kind, weights, alpha),
                **with_intervals(sums),
            }
            print(alpha, rounding, figures[f"{alpha} {rounding}"], flush=True)
    return figures


def measure_quantised(kind: Kind, alphas: list[float], count: int, work: Path) -> dict[str, Any]:
    """The same with served inside vLLM, whose quantisation wants bf16: its own change from aligned, on exact's."""
    model, rows, figures = Model(), texts(count), {}

    def inside(folder: Path) -> list[torch.Tensor]:
        out = work / "log_probabilities.pt"
        command = [sys.executable, "-m", "loadtests.rounding_vllm", str(folder), json.dumps(rows), str(out)]
        subprocess.run(command, check=True)
        found: list[torch.Tensor] = torch.load(out)
        return found

    def written(weights: Tensors) -> Path:
        served = task.load_model(DEMO / "base", torch.bfloat16)
        with torch.no_grad():
            for name, parameter in served.named_parameters():
                parameter.copy_(weights[name])
        demo_models.save(served, task.load_tokenizer(DEMO / "base"), work / "served")
        return work / "served"

    # The logits of the last position come with no prompt token.
    exact_aligned = [found[:-1] for found in model.log_probabilities(kind.exact(0), rows)]
    aligned = inside(DEMO / "aligned")
    for alpha in alphas:
        exact = [found[:-1] for found in model.log_probabilities(kind.exact(alpha), rows)]
        for rounding in METHODS:
            served = inside(written(kind.served(alpha, rounding)))
            sums = [compared(*four) for four in zip(exact, served, exact_aligned, aligned, strict=True)]
            figures[f"{alpha} {rounding}"] = with_intervals(sums)
            print(alpha, rounding, figures[f"{alpha} {rounding}"], flush=True)
    return figures


def show(name: str, figures: dict[str, Any]) -> str:
    """The figures of one kind as a table."""

    def shown(found: dict[str, float], form: str) -> str:
        return f"{found['value']:{form}} ({found['low']:{form}} to {found['high']:{form}})"

    rows = []
    for key, found in figures.items():
        alpha, rounding = key.split()
        in_weights = f"{found['share_in_weights']:.3f}" if "share_in_weights" in found else "-"
        rows.append(
            [name, alpha, rounding, in_weights, shown(found["share_in_logits"], ".2f"), shown(found["kl"], ".1e")]
        )
    return table(["pair", "alpha", "rounding", "share in weights", "share in logits", "KL(exact, served)"], rows)


def main() -> None:
    """Measure the kinds that are asked for, print the figures, add them to the result file."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kinds", default="demo,all,fp16,large,adapter,quantised")
    options.add_argument("--alphas", default=",".join(map(str, ALPHAS)))
    options.add_argument("--prompts", type=int, default=16)
    options.add_argument("--work", type=Path, default=WORK)
    options.add_argument("--results", type=Path, default=RESULTS)
    chosen = options.parse_args()
    alphas = [float(alpha) for alpha in chosen.alphas.split(",")]
    chosen.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=chosen.work) as folder:
        work = Path(folder)
        for name in chosen.kinds.split(","):
            kind = kinds(work)[name]()
            if name == "quantised":
                figures = measure_quantised(kind, alphas, chosen.prompts, work)
            else:
                figures = measure(kind, alphas, chosen.prompts)
            save("rounding", name, figures, chosen.results)
            print(show(name, figures), flush=True)


if __name__ == "__main__":
    main()
