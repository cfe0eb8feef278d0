"""Next-token log-probabilities of one model inside vLLM, quantised while it loads: a helper of loadtests.rounding.

python -m loadtests.rounding_vllm MODEL ROWS_OF_TOKENS_AS_JSON OUT.pt
"""

from __future__ import annotations

import json
import os
import sys

import torch

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def main() -> None:
    """Load, ask for the log-probabilities of the whole vocabulary at every position, write them."""
    from vllm import LLM, SamplingParams

    model, rows, out = sys.argv[1:]
    engine = LLM(
        model, quantization="fp8_per_channel", dtype="bfloat16", enforce_eager=True, max_model_len=512, max_logprobs=-1
    )
    asked = [{"prompt_token_ids": row} for row in json.loads(rows)]
    answers = engine.generate(asked, SamplingParams(max_tokens=1, prompt_logprobs=-1, temperature=0), use_tqdm=False)
    found = []
    for answer in answers:
        assert answer.prompt_logprobs is not None
        table = [torch.empty(len(place)) for place in answer.prompt_logprobs[1:] if place]
        for values, place in zip(table, answer.prompt_logprobs[1:], strict=True):
            assert place is not None
            for token, one in place.items():
                values[token] = one.logprob
        found.append(torch.stack(table))
    torch.save(found, out)


if __name__ == "__main__":
    main()
