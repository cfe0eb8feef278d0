"""Run vLLM offline in a process of its own: what its ranks hold, and what it answers.

``python -m tests.offline '{"llm": {...}, "prompts": [...]}'`` prints one line, ``answer: `` and
``{"hashes": [{parameter: sha256}, one of each rank], "tokens": [[token id, ...], one of each prompt]}``.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from typing import Any

import torch

from tests.server import ENGINE_ENV

MAX_TOKENS = 24
_MARK = "answer: "


def run_offline(llm: dict[str, Any], prompts: list[str] | None = None, **environment: str) -> dict[str, Any]:
    """Start ``vllm.LLM(**llm)`` in another process and collect its answer.

    Raises:
        AssertionError: it failed; the end of its output is in the message.
    """
    request = json.dumps({"llm": {"enforce_eager": True, "max_model_len": 128, **llm}, "prompts": prompts or []})
    done = subprocess.run(
        [sys.executable, "-m", "tests.offline", request],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={**ENGINE_ENV, "VLLM_ALLOW_INSECURE_SERIALIZATION": "1", **environment},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith(_MARK))
    answer: dict[str, Any] = json.loads(line.removeprefix(_MARK))
    return answer


def hash_state(model: torch.nn.Module) -> dict[str, str]:
    """SHA-256 of every parameter's and buffer's bits; runs in a worker. With what ``tests.inprocess`` has kept of the
    state as it was loaded, before vLLM packed it."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    loaded: dict[str, torch.Tensor] = getattr(model, "loaded_state", {})
    state |= {f"{name} (loaded)": tensor for name, tensor in loaded.items()}
    return {name: _digest(tensor) for name, tensor in state.items() if tensor.numel() and not tensor.is_meta}


def _digest(tensor: torch.Tensor) -> str:
    raw = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(raw).hexdigest()


def _main(request: dict[str, Any]) -> None:
    import vllm

    # The workers find the function by its module's name, which __main__ is not for them.
    from tests.offline import hash_state

    llm = vllm.LLM(**request["llm"])
    answer: dict[str, Any] = {"hashes": llm.apply_model(hash_state), "tokens": []}
    if request["prompts"]:
        sampling = vllm.SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
        outputs = llm.generate(request["prompts"], sampling, use_tqdm=False)
        answer["tokens"] = [list(output.outputs[0].token_ids) for output in outputs]
    print(f"\n{_MARK}{json.dumps(answer)}", flush=True)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
