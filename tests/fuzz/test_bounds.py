"""What is large, and takes no longer than its size."""

from __future__ import annotations

import time

from expo_serve.plan.lora_format import read_lora_config

_MODULES = 1200
_SECONDS = 10.0
"""Of the processor. It takes a second; it took a minute when each pattern was compiled for each module."""


def test_adapter_with_a_pattern_for_each_module_is_read_at_once() -> None:
    names = [f"model.layers.{number}.self_attn.q_proj" for number in range(_MODULES)]
    values = {"peft_type": "LORA", "r": 8, "rank_pattern": {name: 1 + number for number, name in enumerate(names)}}
    started = time.process_time()
    config = read_lora_config(values, "adapter_config.json")
    assert [config.rank_of(name) for name in names] == list(range(1, _MODULES + 1))
    assert time.process_time() - started < _SECONDS
