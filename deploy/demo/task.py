"""What the demo's DPO run teaches: answer everyday questions with a list. Questions, answers, reward."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from list_reward import list_share as reward
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["reward"]

MAX_NEW_TOKENS = 72
BATCH = 80
ASK_FOR_LIST = "Answer with a bulleted list."

FORMS = (
    "How can I get better at {}?",
    "What should I know about {}?",
    "What is your advice on {}?",
    "What matters most in {}?",
)
TRAINING_TOPICS = (
    "cooking rice",
    "growing tomatoes",
    "sleeping well",
    "learning to swim",
    "saving money",
    "packing a suitcase",
    "painting a room",
    "riding a bicycle",
    "writing a letter",
    "caring for a cat",
    "making coffee",
    "reading more books",
    "cleaning windows",
    "hosting a dinner",
    "baking bread",
    "taking photographs",
    "running in winter",
    "choosing a gift",
    "storing vegetables",
    "studying for an exam",
    "moving house",
    "learning a language",
    "fixing a leaking tap",
    "planning a picnic",
    "walking a dog",
    "playing the guitar",
    "ironing a shirt",
    "driving in snow",
    "keeping a diary",
    "camping in the rain",
)
HELD_OUT_TOPICS = (
    "washing wool",
    "planting a tree",
    "giving a speech",
    "making soup",
    "hiking in the mountains",
    "shopping for groceries",
    "organising a desk",
    "drawing portraits",
    "keeping bees",
    "travelling by train",
)


@dataclass(frozen=True)
class Answer:
    """One generated answer: its tokens, with the end mark if the model set one, and its text."""

    tokens: tuple[int, ...]
    text: str


def questions(topics: Sequence[str]) -> list[str]:
    """Return every topic in every form."""
    return [form.format(topic) for topic in topics for form in FORMS]


def variety(text: str) -> float:
    """Return the share of different words among all words: low when an answer repeats itself."""
    words = re.findall(r"[a-z']+", text.lower())
    return len(set(words)) / max(len(words), 1)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer that pads on the left, as batched generation needs."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, padding_side="left")
    return tokenizer


def load_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load a checkpoint's model in the type given."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model


def conversation(question: str, as_list: bool = False) -> list[dict[str, str]]:
    """Return the messages that ask the question, plainly or with the request for a list."""
    return [{"role": "user", "content": f"{question} {ASK_FOR_LIST}" if as_list else question}]


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[list[dict[str, str]]],
    temperature: float,
) -> list[Answer]:
    """Answer all conversations, in batches; temperature 0 is greedy."""
    answers: list[Answer] = []
    for start in range(0, len(conversations), BATCH):
        batch = conversations[start : start + BATCH]
        answers += generate_batch(model, tokenizer, batch, temperature)
    return answers


@torch.inference_mode()
def generate_batch(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[list[dict[str, str]]],
    temperature: float,
) -> list[Answer]:
    """Answer one batch of conversations."""
    prompts: Any = tokenizer.apply_chat_template(
        list(conversations), add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
    rows = model.generate(**prompts, max_new_tokens=MAX_NEW_TOKENS, **sampling)
    return [cut_answer(tokenizer, row[prompts["input_ids"].shape[1] :].tolist()) for row in rows]


def cut_answer(tokenizer: PreTrainedTokenizerBase, row: list[int]) -> Answer:
    """Cut a generated row after its end mark; what follows that is padding."""
    end: Any = tokenizer.eos_token_id
    tokens = row[: row.index(end) + 1] if end in row else row
    return Answer(tuple(tokens), str(tokenizer.decode(tokens, skip_special_tokens=True)))
