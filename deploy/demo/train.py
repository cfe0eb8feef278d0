"""Train the demo's adapter by DPO on the small base model, or measure how far ExPO carries it.

Without options: train, write the adapter, measure, and write training.json.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import prepare  # First: it keeps transformers off the network.
import task
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel, PreTrainedTokenizerBase

SEED = 7
SAMPLES = 3
TEMPERATURE = 0.8
# After 40 steps alpha 0.5 already repeats itself (reward 0.96, different words 0.29): no room to show anything.
STEPS = 24
PAIRS_A_STEP = 4
LEARNING_RATE = 3e-5
BETA = 0.1
RANK = 16
ALPHAS = (0.5, 1.0, 2.0)
RECORD = prepare.HERE / "training.json"


@dataclass(frozen=True)
class Pair:
    """A question's prompt with a better and a worse answer, as tokens."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """Two means over the held-out answers."""

    reward: float
    variety: float


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, question: str) -> tuple[int, ...]:
    """Return the tokens of the plain prompt: training never shows the request for a list."""
    encoded: Any = tokenizer.apply_chat_template(
        task.conversation(question), add_generation_prompt=True, return_dict=True
    )
    return tuple(encoded["input_ids"])


def sample_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Sequence[str], as_list: bool
) -> list[task.Answer]:
    """Sample one answer to each question."""
    conversations = [task.conversation(question, as_list) for question in asked]
    return task.generate(model, tokenizer, conversations, TEMPERATURE)


def sample_pairs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Pair]:
    """Sample answers with and without the request for a list; keep pairs that differ clearly in reward."""
    asked = [question for question in task.questions(task.TRAINING_TOPICS) for _ in range(SAMPLES)]
    chosen = sample_answers(model, tokenizer, asked, as_list=True)
    rejected = sample_answers(model, tokenizer, asked, as_list=False)
    return [
        Pair(prompt_tokens(tokenizer, question), better.tokens, worse.tokens)
        for question, better, worse in zip(asked, chosen, rejected, strict=True)
        if task.reward(better.text) > 0.5 and task.reward(worse.text) < 0.2
    ]


def shuffled_batches(pairs: Sequence[Pair]) -> Iterator[list[Pair]]:
    """Yield the batches of all steps; every pair comes once before any comes again."""
    order: list[int] = []
    for _ in range(STEPS):
        while len(order) < PAIRS_A_STEP:
            order += torch.randperm(len(pairs)).tolist()
        yield [pairs[order.pop(0)] for _ in range(PAIRS_A_STEP)]


def answer_log_probabilities(model: Any, pairs: Sequence[Pair]) -> torch.Tensor:
    """Return the summed log-probability of each answer: all chosen ones, then all rejected ones."""
    prompts = [pair.prompt for pair in pairs] * 2
    answers = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    rows = [torch.tensor(prompt + answer) for prompt, answer in zip(prompts, answers, strict=True)]
    # Padding on the right is never attended to by what stands before it, so no mask is needed.
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    log_probabilities = model(input_ids=tokens).logits[:, :-1].float().log_softmax(-1)
    picked = log_probabilities.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    spans = [(len(prompt) - 1, len(row) - 1) for prompt, row in zip(prompts, rows, strict=True)]
    return torch.stack([row[start:end].sum() for row, (start, end) in zip(picked, spans, strict=True)])


def dpo_loss(model: PeftModel, pairs: Sequence[Pair]) -> torch.Tensor:
    """Return the DPO loss of one batch; the model without its adapter is the reference."""
    with torch.no_grad(), model.disable_adapter():
        reference = answer_log_probabilities(model, pairs)
    gain = answer_log_probabilities(model, pairs) - reference
    better, worse = gain.chunk(2)
    return -logsigmoid(BETA * (better - worse)).mean()


def with_adapter(model: PreTrainedModel) -> PeftModel:
    """Put a fresh LoRA adapter on all linear layers; only it will be trained."""
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config)
    if not isinstance(adapted, PeftModel):
        raise TypeError(f"peft made a {type(adapted).__name__} instead of a PeftModel")
    return adapted


def train(model: PeftModel, pairs: Sequence[Pair]) -> list[float]:
    """Train the adapter and return the loss of every step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
    losses = []
    for step, batch in enumerate(shuffled_batches(pairs), start=1):
        optimizer.zero_grad()
        loss = dpo_loss(model, batch)
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step}/{STEPS}: loss {losses[-1]:.4f}")
    return losses


def save_adapter(model: PeftModel) -> None:
    """Write the adapter in bfloat16, with nothing in it that is about this machine."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    for config in model.peft_config.values():
        config.base_model_name_or_path = prepare.MODEL_NAME
    with tempfile.TemporaryDirectory() as scratch:
        # "auto" would look for the base model's config on a hub.
        model.save_pretrained(scratch, save_embedding_layers=False)
        prepare.ADAPTER.mkdir(exist_ok=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(Path(scratch) / name, prepare.ADAPTER / name)


def extrapolate(model: PreTrainedModel, base: PreTrainedModel, aligned: PreTrainedModel, alpha: float) -> None:
    """Give the model the weights aligned + alpha * (aligned - base): float32, rounded to its type once."""
    sources = zip(base.parameters(), aligned.parameters(), strict=True)
    with torch.no_grad():
        for target, (before, after) in zip(model.parameters(), sources, strict=True):
            target.copy_(torch.lerp(before.float(), after.float(), 1 + alpha))


def score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Score:
    """Answer the held-out questions greedily and return the mean reward and variety."""
    conversations = [task.conversation(question) for question in task.questions(task.HELD_OUT_TOPICS)]
    texts = [answer.text for answer in task.generate(model, tokenizer, conversations, temperature=0)]
    reward = sum(map(task.reward, texts)) / len(texts)
    return Score(round(reward, 3), round(sum(map(task.variety, texts)) / len(texts), 3))


def evaluate(out: Path, alphas: Sequence[float]) -> dict[str, Score]:
    """Print and return the scores of base, aligned and every alpha."""
    folders = prepare.ensure_base(out), prepare.ensure_aligned(out)
    base, aligned, model = (task.load_model(folder, torch.bfloat16) for folder in (*folders, folders[0]))
    tokenizer = task.load_tokenizer(folders[0])
    # The formula gives base at alpha -1 and aligned at alpha 0, both exactly.
    rows = {"base": -1.0, "aligned": 0.0} | {f"alpha {alpha:g}": alpha for alpha in alphas}
    scores = {}
    print("| weights | held-out reward | different words |\n|---|---|---|")
    for name, alpha in rows.items():
        extrapolate(model, base, aligned, alpha)
        scores[name] = score(model, tokenizer)
        print(f"| {name} | {scores[name].reward:.3f} | {scores[name].variety:.3f} |")
    return scores


def make_adapter(out: Path) -> dict[str, Any]:
    """Sample pairs, train and write the adapter; return the record of the run."""
    folder = prepare.ensure_base(out)
    prepare.quiet_transformers()
    torch.manual_seed(SEED)
    tokenizer = task.load_tokenizer(folder)
    print(f"sampling {SAMPLES} answers of each kind to every training question")
    pairs = sample_pairs(task.load_model(folder, torch.bfloat16), tokenizer)
    if len(pairs) < PAIRS_A_STEP:
        raise prepare.DemoError(f"only {len(pairs)} pairs were found: raise SAMPLES")
    print(f"training on {len(pairs)} pairs")
    model = with_adapter(task.load_model(folder, torch.float32))
    losses = train(model, pairs)
    save_adapter(model)
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    record = {"seed": SEED, "steps": STEPS, "pairs": len(pairs), "versions": versions}
    return record | {"loss": [round(loss, 4) for loss in losses]}


def train_and_record(out: Path) -> None:
    """Make the adapter, measure it, and write training.json."""
    record = make_adapter(out)
    scores = evaluate(out, ALPHAS)
    record["held_out_reward"] = {name: found.reward for name, found in scores.items()}
    record["held_out_variety"] = {name: found.variety for name, found in scores.items()}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    """Read the command line; train, or only measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(".demo"), help="where prepare.py puts the models")
    parser.add_argument("--evaluate", type=float, nargs="*", metavar="ALPHA", help="only measure")
    options = parser.parse_args()
    try:
        if options.evaluate is None:
            train_and_record(options.out)
        else:
            evaluate(options.out, options.evaluate)
    except (prepare.DemoError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
