"""Adapters that are no plain sum on base's weights, or not as they should be, asked of the real command."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.command import refused
from tests.models.adapters import CONFIG, FILE, PREFIX, factors, write_adapter
from tests.models.raw import entry, file_bytes, tiny_tensors, write_raw
from tests.server import run_command

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
GOOD = factors(Q, 8, 8)
NO_SUM = ("adapter_config.json", "not a plain sum", "merge it with PEFT", "--aligned")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base that the good adapter fits."""
    return str(write_raw(tmp_path_factory.mktemp("pair") / "base"))


def flags(base: str, adapter: Path, *more: str) -> tuple[str, ...]:
    return ("--base", base, "--delta", str(adapter), "--alpha", "0.5", *more)


@dataclass(frozen=True)
class Bad:
    """What is wrong with an adapter, and what the refusal must say."""

    words: tuple[str, ...]
    tensors: Callable[[], dict[str, torch.Tensor]] = GOOD.copy
    config: dict[str, Any] | None = None


def _without(name: str) -> Callable[[], dict[str, torch.Tensor]]:
    return lambda: {**factors(UP, 12, 8), **{key: tensor for key, tensor in GOOD.items() if key != name}}


def _start(start: str) -> Bad:
    return Bad((*NO_SUM, "init_lora_weights", start), config={"init_lora_weights": start})


def _key(key: str, value: Any, *words: str) -> Bad:
    return Bad((*NO_SUM, key, *words), config={key: value})


CASES = {
    "another architecture": Bad(
        ("1 tensor that base", "lacks", "transformer.h.0.attn.c_attn.weight", "trained on"),
        lambda: factors("transformer.h.0.attn.c_attn", 24, 8),
    ),
    "more layers": Bad(
        ("1 tensor that base", "lacks, the first model.layers.7.self_attn.q_proj.weight"),
        lambda: {**GOOD, **factors(Q.replace("0", "7"), 8, 8)},
    ),
    "no A": Bad((FILE, f"module '{Q}' has no A", f"{PREFIX}{B}"), _without(A)),
    "no B": Bad((FILE, f"module '{Q}' has no B", f"{PREFIX}{A}"), _without(B)),
    "factors of two kinds": Bad(
        (FILE, f"module '{Q}'", "both factors"),
        lambda: {**GOOD, f"{Q}.lora_embedding_A": torch.ones(2, 8)},
    ),
    "rank 0": Bad(("rank 'r'", "whole number from 1", "0"), config={"r": 0}),
    "rank missing": Bad(("rank 'r'", "whole number from 1", "None"), config={"r": None}),
    "rank a text": Bad(("rank 'r'", "whole number from 1", "'2'"), config={"r": "2"}),
    "rank 0 of a pattern": Bad(("rank 'q_proj'", "whole number from 1", "0"), config={"rank_pattern": {"q_proj": 0}}),
    "rank other than the factors'": Bad((FILE, f"'{Q}'", "A [2, 8]", "B [8, 2]", "rank 3"), config={"r": 3}),
    "alpha a text": Bad(("'lora_alpha'", "a number", "'much'"), config={"lora_alpha": "much"}),
    "alpha infinite": Bad(("adapter_config.json",), config={"lora_alpha": float("inf")}),
    "pattern that is none": Bad(("pattern '('", "regular expression"), config={"alpha_pattern": {"(": 2}}),
    "patterns in a list": Bad(("rank_pattern", "must be an object"), config={"rank_pattern": [1]}),
    "other width": Bad(
        ("shape or kind differs in 1 of 1 module,", f"{Q}.weight: base [8, 8], adapter B [8, 2] times A [2, 6]"),
        lambda: factors(Q, 8, 6),
    ),
    "other height": Bad(
        ("shape or kind differs in 1 of 2 modules,", f"{UP}.weight: base [12, 8], adapter B [16, 2] times A [2, 8]"),
        lambda: {**GOOD, **factors(UP, 16, 8)},
    ),
    "factors of integers": Bad(
        (FILE, f"'{Q}'", "I8"), lambda: {name: torch.ones_like(tensor).to(torch.int8) for name, tensor in GOOD.items()}
    ),
    "factors of one dimension": Bad((FILE, f"'{Q}'", "A [8]"), lambda: {**GOOD, A: torch.ones(8)}),
    "whole tensor of another shape": Bad(
        ("shape or kind differs in 1 tensor that it stores whole", "lm_head.weight: base [16, 8], adapter [15, 8]"),
        lambda: {**GOOD, "lm_head.weight": torch.ones(15, 8)},
    ),
    "whole tensor that base lacks": Bad(
        ("1 tensor that base", "lacks, the first score.weight", "--unmatched copy"),
        lambda: {**GOOD, "score.weight": torch.ones(2, 8)},
    ),
    "whole tensor and factors": Bad(
        ("both factors and a whole tensor of another shape for model.embed_tokens.weight", "merge it with PEFT"),
        lambda: {
            "model.embed_tokens.lora_embedding_A": torch.ones(2, 16),
            "model.embed_tokens.lora_embedding_B": torch.ones(8, 2),
            "model.embed_tokens.base_layer.weight": torch.ones(18, 8),
        },
    ),
    "nothing": Bad((FILE, "no tensor"), dict),
    "LoHa": Bad(("adapter_config.json", "peft_type is 'LOHA'", "only LORA"), config={"peft_type": "LOHA"}),
    "no kind": Bad(("adapter_config.json", "peft_type is None"), config={"peft_type": None}),
    "DoRA": _key("use_dora", True, "magnitude"),
    "layer replication": _key("layer_replication", [[0, 2], [1, 2]], "more layers"),
    "target parameters": _key("target_parameters", ["mlp.experts.down_proj"], "parameters"),
    "bias in B": _key("lora_bias", True, "bias"),
    "single rows of the embedding": _key("trainable_token_indices", [3], "rows"),
    "unknown key": _key("use_something_new", True, "not known to this version"),
    "PiSSA": _start("pissa"),
    "PiSSA, fast": _start("pissa_niter_16"),
    "OLoRA": _start("olora"),
    "LoftQ": _start("loftq"),
    "CorDA": _start("corda"),
    "pattern that holds alone only": Bad(("pattern", "regular expression"), config={"rank_pattern": {"(?i)q_proj": 2}}),
    "absurd alpha": Bad(("lora_alpha", "expected a number"), config={"lora_alpha": 10**400}),
    "convolution whose B is no point": Bad(
        ("does not fit base", f"{Q}.weight"), lambda: {A: torch.ones(2, 8), B: torch.ones(4, 2, 2, 1)}
    ),
    "unknown start": _start("something_new"),
}


@pytest.mark.parametrize("bad", CASES.values(), ids=CASES)
def test_adapter_is_refused(base: str, tmp_path: Path, bad: Bad) -> None:
    adapter = write_adapter(tmp_path / "adapter", bad.tensors(), **(bad.config or {}))
    refused(*flags(base, adapter), words=bad.words)


@pytest.mark.parametrize("name", ["DoRA", "another architecture"])
def test_inspection_refuses_it_as_well(base: str, tmp_path: Path, name: str) -> None:
    bad = CASES[name]
    adapter = write_adapter(tmp_path / "adapter", bad.tensors(), **(bad.config or {}))
    refused("inspect", *flags(base, adapter), words=bad.words)


def test_pickle_is_refused(base: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", GOOD)
    (adapter / FILE).rename(adapter / "adapter_model.bin")
    refused("inspect", *flags(base, adapter), words=("delta:", "pickle file only (adapter_model.bin)", "safetensors"))


def test_config_alone_is_refused(base: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", GOOD)
    (adapter / FILE).unlink()
    refused("inspect", *flags(base, adapter), words=("delta:", "adapter_config.json but no", FILE))


FILES = {
    "cut by one byte": (lambda good: good[:-1], ("is truncated",)),
    "cut within the header": (lambda good: good[:50], ("is truncated: the header needs",)),
    "no bytes": (lambda _: b"", ("file is empty",)),
    "absurd header length": (lambda _: b"\xff" * 64, ("header length is",)),
    "quantised": (
        lambda _: file_bytes({f"{PREFIX}{A}": entry("F8_E4M3", [2, 8], 0, 16)}, bytes(16)),
        ("quantised (F8_E4M3)",),
    ),
}


@pytest.mark.parametrize(("spoil", "words"), FILES.values(), ids=FILES)
def test_damaged_file_is_refused(
    base: str, tmp_path: Path, spoil: Callable[[bytes], bytes], words: tuple[str, ...]
) -> None:
    file = write_adapter(tmp_path / "adapter", GOOD) / FILE
    file.write_bytes(spoil(file.read_bytes()))
    refused("inspect", *flags(base, file.parent), words=(FILE, *words))


@pytest.mark.parametrize("text", ["{", "[]", "3", ""])
def test_config_that_is_no_object_is_refused(base: str, tmp_path: Path, text: str) -> None:
    adapter = write_adapter(tmp_path / "adapter", GOOD)
    (adapter / "adapter_config.json").write_text(text)
    refused("inspect", *flags(base, adapter), words=("adapter_config.json", "JSON"))


def test_rule_that_matches_nothing_is_refused(base: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", GOOD)
    refused("inspect", *flags(base, adapter, "--alpha-rule", "no_such=0"), words=("no_such=0", "matches no tensor"))


def test_tensor_of_integers_in_base_is_refused(tmp_path: Path) -> None:
    tensors = {**tiny_tensors(), f"{Q}.weight": torch.ones(8, 8).to(torch.int32)}
    base = str(write_raw(tmp_path / "base", tensors))
    refused("inspect", *flags(base, write_adapter(tmp_path / "adapter", GOOD)), words=(f"{Q}.weight", "does not fit"))


def warned(base: str, adapter: Path, *more: str) -> list[str]:
    """The warnings of an adapter that is not refused."""
    Path(base, "tokenizer.json").write_text("{}")
    result = run_command("inspect", *flags(base, adapter), *more, "--json", timeout=30)
    assert result.returncode == 0, result.stderr
    warnings: list[str] = json.loads(result.stdout)["warnings"]
    return warnings


def test_name_of_another_model_is_refused_unless_it_is_allowed(base: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", GOOD, base_model_name_or_path="someone/other-7b")
    words = ("was trained on 'someone/other-7b'", "base is 'base'", "--allow other-base")
    refused("inspect", *flags(base, adapter), words=words)
    (warning,) = warned(base, adapter, "--allow", "other-base")
    assert "(allowed: other-base)" in warning


@pytest.mark.parametrize("name", ["{base}", "{base}/", "someone/base", "", None])
def test_name_of_the_same_model_or_of_none_is_no_warning(base: str, tmp_path: Path, name: str | None) -> None:
    theirs = name.format(base=base) if name else name
    assert warned(base, write_adapter(tmp_path / "adapter", GOOD, base_model_name_or_path=theirs)) == []


def test_keys_that_say_how_it_was_trained_do_not_matter(base: str, tmp_path: Path) -> None:
    trained = {"inference_mode": True, "lora_dropout": 0.1, "task_type": "CAUSAL_LM", "peft_version": "0.21.2"}
    unset = {"use_dora": False, "use_something_new": None, "layer_replication": None}
    assert CONFIG.keys().isdisjoint({*trained, *unset})
    adapter = write_adapter(tmp_path / "adapter", GOOD, **trained, **unset, init_lora_weights=True, bias="none")
    assert warned(base, adapter) == []
