"""Train the demo's reward model on the demo's preferences, or measure it: a classifier with one label, by trl.

Without options: sample answers unless ``reward/pairs.jsonl`` is there, train, write the adapter, measure, and write
``reward/training.json``. trl and what it needs beyond the environment go into a folder of their own.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import prepare  # First: it keeps transformers off the network.
import prepare_reward
import task
import torch
import train
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

SEED = 7
SAMPLES = 1
"""Answers of each kind to each question."""
LEAST_DIFFERENCE = 0.5
"""Between the rewards of the two answers of a pair."""
EPOCHS = 1
PAIRS_A_STEP = 8
LEARNING_RATE = 5e-4
RANK = 8
TARGETS = ["q_proj", "v_proj"]
PAIRS = prepare_reward.FOLDER / "pairs.jsonl"
RECORD = prepare_reward.FOLDER / "training.json"
TRL = prepare.HERE.parents[1] / ".venv" / "trl"
REQUIREMENTS = prepare.HERE.parents[1] / "requirements" / "trl.txt"


@dataclass(frozen=True)
class Pair:
    """Two answers to a question, as sampled, of which the task's reward prefers the first."""

    held_out: bool
    question: str
    chosen: str
    rejected: str


def sample_pairs(out: Path) -> list[Pair]:
    """Sample answers of both models to all questions and pair those to one question that differ clearly in reward."""
    torch.manual_seed(SEED)
    asked = task.questions(task.TRAINING_TOPICS) + task.questions(task.HELD_OUT_TOPICS)
    base, aligned = prepare.ensure_base(out), prepare.ensure_aligned(out)
    tokenizer = task.load_tokenizer(base)
    answers: dict[str, set[str]] = {question: set() for question in asked}
    for folder, as_list in ((base, True), (base, False), (aligned, False)):
        model = task.load_model(folder, torch.bfloat16)
        for _ in range(SAMPLES):
            print(f"sampling an answer to each of {len(asked)} questions", flush=True)
            sampled = train.sample_answers(model, tokenizer, asked, as_list)
            for question, answer in zip(asked, sampled, strict=True):
                answers[question].add(answer.text.strip())
    held_out = set(task.questions(task.HELD_OUT_TOPICS))
    return [
        Pair(question in held_out, question, better, worse)
        for question, found in answers.items()
        for better, worse in ordered_pairs(sorted(found))
    ]


def ordered_pairs(answers: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield all pairs of answers that differ clearly in the task's reward, the better one first."""
    for one, other in itertools.permutations(answers, 2):
        if task.reward(one) - task.reward(other) >= LEAST_DIFFERENCE:
            yield one, other


def read_pairs() -> list[Pair]:
    """Read the pairs that were sampled before."""
    return [Pair(**json.loads(line)) for line in PAIRS.read_text(encoding="utf-8").splitlines()]


def write_pairs(pairs: Sequence[Pair]) -> None:
    """Write the pairs, one a line."""
    PAIRS.parent.mkdir(exist_ok=True)
    lines = [json.dumps(asdict(pair), ensure_ascii=False) + "\n" for pair in pairs]
    PAIRS.write_text("".join(lines), encoding="utf-8")


def conversation(question: str, answer: str) -> list[dict[str, str]]:
    """Return the chat of a question and an answer."""
    return [*task.conversation(question), {"role": "assistant", "content": answer}]


def bring_trl() -> None:
    """Install trl and what it needs beyond the environment into its folder, once, and make it importable."""
    if not TRL.exists():
        print(f"{TRL}: installing trl and what it needs (270 MB)", flush=True)
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
        with tempfile.TemporaryDirectory(dir=TRL.parent) as scratch:
            made = Path(scratch) / "trl"
            command = [sys.executable, "-m", "pip", "install", *options, "--target", str(made), "-r", str(REQUIREMENTS)]
            if subprocess.run(command, check=False).returncode != 0:
                raise prepare.DemoError(f"pip could not install {REQUIREMENTS.name}")
            made.rename(TRL)
    sys.path.append(str(TRL))


def dataset(pairs: Sequence[Pair]) -> Any:
    """Return trl's preference data set of the pairs: conversations, whose template is applied by trl."""
    from datasets import Dataset  # type: ignore[import-not-found]

    return Dataset.from_list(
        [
            {"chosen": conversation(pair.question, pair.chosen), "rejected": conversation(pair.question, pair.rejected)}
            for pair in pairs
        ]
    )


def fit(base: Path, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], scratch: Path) -> list[float]:
    """Train an adapter and the head by trl, write them, and return the loss of every step."""
    from trl import RewardConfig, RewardTrainer  # type: ignore[import-not-found]

    config = RewardConfig(
        output_dir=str(scratch),
        seed=SEED,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=PAIRS_A_STEP,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        center_rewards_coefficient=0.01,
    )
    trainer = RewardTrainer(
        model=str(base),
        args=config,
        train_dataset=dataset(pairs),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, modules_to_save=["score"], task_type="SEQ_CLS"
        ),
    )
    trainer.train()
    prepare_reward.save_adapter(trainer.model)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@torch.inference_mode()
def scores(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Any]) -> list[float]:
    """Return the reward of each conversation: the one logit at its last token."""
    found = []
    for messages in texts:
        tokens: Any = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
        found.append(model(**tokens).logits[0, 0].item())
    return found


def measure(folder: Path, pairs: Sequence[Pair]) -> dict[str, float]:
    """Return the share of the pairs whose better answer has the higher reward, and the mean difference."""
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = task.load_tokenizer(folder)
    better = scores(model, tokenizer, [conversation(pair.question, pair.chosen) for pair in pairs])
    worse = scores(model, tokenizer, [conversation(pair.question, pair.rejected) for pair in pairs])
    differences = [high - low for high, low in zip(better, worse, strict=True)]
    accuracy = sum(difference > 0 for difference in differences) / len(pairs)
    return {
        "pairs": len(pairs),
        "accuracy": round(accuracy, 3),
        "mean_difference": round(sum(differences) / len(pairs), 3),
    }


def make_adapter(out: Path) -> dict[str, Any]:
    """Train and write the adapter; return the record of the run."""
    if not PAIRS.exists():
        write_pairs(sample_pairs(out))
    pairs = [pair for pair in read_pairs() if not pair.held_out]
    base = prepare.ensure_base(out)
    print(f"training on {len(pairs)} pairs", flush=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        losses = fit(base, task.load_tokenizer(base), pairs, Path(scratch))
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "trl")}
    seconds = round(time.monotonic() - started)
    record = {"seed": SEED, "pairs": len(pairs), "steps": len(losses), "seconds": seconds, "versions": versions}
    return record | {"loss": [round(loss, 4) for loss in losses]}


def train_and_record(out: Path) -> None:
    """Make the adapter, measure the merged model, and write training.json."""
    record = make_adapter(out)
    record["held_out"] = evaluate(out)
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


def evaluate(out: Path) -> dict[str, float]:
    """Print and return how well the merged model orders the held-out pairs."""
    found = measure(prepare_reward.ensure_reward_model(out), [pair for pair in read_pairs() if pair.held_out])
    print(f"held-out pairs: {found}")
    return found


def main() -> None:
    """Read the command line; train, or only measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(".demo"), help="where prepare.py puts the models")
    parser.add_argument("--evaluate", action="store_true", help="only measure")
    options = parser.parse_args()
    prepare.quiet_transformers()
    try:
        if options.evaluate:
            evaluate(options.out)
        else:
            bring_trl()
            train_and_record(options.out)
    except (prepare.DemoError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
