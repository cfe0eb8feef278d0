"""Files that fuzzing found, and those by which it reached every line: refused in one line, or planned.

``corpus.zip`` holds what reached something new in a run of ``python -m loadtests.fuzz.formats``; all of it is judged in
one process, as there.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from loadtests.fuzz.deployments import formats
from tests.models.adapters import CONFIG as ADAPTER
from tests.models.raw import CONFIG, entry, file_bytes

CORPUS = Path(__file__).with_name("corpus.zip")
ROOT = Path(__file__).parents[2]
Outcomes = dict[str, dict[str, str]]


def replayed(corpus: Path) -> Outcomes:
    """What became of each file of an archive."""
    command = [sys.executable, "-m", "loadtests.fuzz.replay", str(corpus)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {outcome["file"]: outcome for outcome in json.loads(done.stdout)}


@pytest.fixture(scope="module")
def corpus() -> Outcomes:
    return replayed(CORPUS)


@pytest.mark.parametrize("name", formats())
def test_corpus_keeps_the_promise(corpus: Outcomes, name: str) -> None:
    there = [outcome for file, outcome in corpus.items() if file.startswith(f"{name}/")]
    assert there
    assert [outcome for outcome in there if outcome["kind"] == "wrong"] == []


def test_corpus_is_small_and_reaches_far(corpus: Outcomes) -> None:
    assert CORPUS.stat().st_size < 200_000
    assert {outcome["kind"] for outcome in corpus.values()} == {"accepted", "refused"}
    assert len({outcome["place"] for outcome in corpus.values()}) >= 50


def _nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def _json(seed: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({**seed, **more}).encode()


def _flags(text: str) -> bytes:
    return f"base: base\naligned: aligned\n{text}\n".encode()


_DIGITS = "9" * 5000
_MERGES = "\n".join(["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, 24))])
_NUMBERED = {f"model.layers.{_DIGITS}.mlp.up_proj.weight": entry("U8", [1], 0, 1)}
FINDS: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "layer of 5000 digits": ("safetensors", file_bytes(_NUMBERED, b"x"), ("characters, expected at most 500",)),
    "name of 5000 characters": ("index", _json({}, weight_map={_DIGITS: "a.safetensors", "b": 1}), ("is mapped to 1",)),
    "shard of 5000 characters": ("index", _json({}, weight_map={"b": _DIGITS}), ("tensor 'b' is mapped to",)),
    "key that ends a line": ("adapter config", _json(ADAPTER, **{"\u2028\n": 2}), (r"(\u2028\n is set (2), and",)),
    "half a surrogate pair": ("adapter config", _json(ADAPTER, **{"\ud800": 2}), (r"\ud800 is set",)),
    "nests 960 levels": ("config", _json(CONFIG).replace(b"8,", _nested(960).encode() + b",", 1), ("100 levels deep",)),
    "long architectures": ("config", _json(CONFIG, architectures=[_DIGITS]), ("different architectures",)),
    "value with a line end": ("config", _json(CONFIG, hidden_act="a\nb", quantization="x"), ("quantised (MLX)",)),
    "method that colours": ("config", _json(CONFIG, quantization={"mode": "\x1b[31m"}), (r"quantised (\x1b[31m)",)),
    "config elsewhere": (
        "layout",
        json.dumps([["config.json", "link", "../outside/config.json"]]).encode(),
        ("config.json: link leaves the checkpoint", "--allow-links"),
    ),
    "name that colours": (
        "layout",
        json.dumps([["config.json", "copy", "config.json"], ["\x1b[31m.safetensors", "file", ""]]).encode(),
        (r"'\x1b[31m.safetensors' has unprintable characters in its name",),
    ),
    "link to too long a name": (
        "layout",
        json.dumps([["config.json", "link", "y" * 3000], ["tokenizer.json", "link", "y" * 3000]]).encode(),
        ("has no config.json",),
    ),
    "merges of merges": ("yaml", _flags(f"{_MERGES}\n<<: *a23"), ("its aliases stand for more than 10000 values",)),
    "alias in itself": ("yaml", _flags("alpha: &r [*r]"), ("its aliases stand for more than 10000 values",)),
    "byte order mark": ("yaml", _flags("alpha: 1\n\ufeff"), ("is not valid YAML", r"\ufeff")),
    "huge seed": ("yaml", _flags(f"alpha: 1\nrounding-seed: 0x{'f' * 5000}"), ("an integer of 20000 bits",)),
    "huge alpha": ("yaml", _flags(f"alpha: 0x{'f' * 5000}"), ("alpha must be", "an integer of 20000 bits")),
    "huge key": ("yaml", _flags(f"alpha: 1\nallow: [{_DIGITS}x]"), ("expected 'different-revisions'",)),
    "groups in a rule": ("yaml", _flags(f"alpha: 1\nalpha-rule: '{'(' * 600}{')' * 600}=1'"), ("regular expression",)),
    "number in a rule": ("yaml", _flags("alpha: 1\nalpha-rule: 'a{99999999999999}=1'"), ("regular expression",)),
    "groups in a pattern": (
        "adapter config", _json(ADAPTER, rank_pattern={"(" * 499 + ")" * 499: 2}), ("is not a regular expression",),
    ),
    "number in a pattern": (
        "adapter config", _json(ADAPTER, rank_pattern={"a{99999999999999}": 2}), ("is not a regular expression",),
    ),
    "many repetitions": ("adapter config", _json(ADAPTER, alpha_pattern={".*" * 12 + "=": 2}), ("repeats more than",)),
    "many options": ("adapter config", _json(ADAPTER, alpha_pattern={"a?" * 40: 2}), ("repeats more than",)),
}  # fmt: skip
"""Format, content, and words of the refusal; each once raised something else, was not one short line, or took long."""

USUAL = (r".*\.layers\.\d+\..*\.q_proj", r"layers\.(0|1)\.self_attn\.[qkv]_proj", "a?b?c", "layers.0.self_attn.q_proj")
"""Patterns as people write them into rank_pattern and alpha_pattern."""


@pytest.fixture(scope="module")
def finds(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    file = tmp_path_factory.mktemp("finds") / "finds.zip"
    with zipfile.ZipFile(file, "w") as archive:
        for name, (kind, data, _) in FINDS.items():
            archive.writestr(f"{kind}/{name}", data)
        for number, pattern in enumerate(USUAL):
            archive.writestr(f"adapter config/usual {number}", _json(ADAPTER, alpha_pattern={pattern: 2}))
    return replayed(file)


@pytest.mark.parametrize("name", FINDS)
def test_find_is_refused_in_a_line(finds: Outcomes, name: str) -> None:
    kind, _, words = FINDS[name]
    outcome = finds[f"{kind}/{name}"]
    assert outcome["kind"] == "refused", outcome
    assert [word for word in words if word not in outcome["message"]] == [], outcome["message"]


def test_usual_patterns_are_taken(finds: Outcomes) -> None:
    assert [finds[f"adapter config/usual {number}"]["kind"] for number in range(len(USUAL))] == ["accepted"] * len(
        USUAL
    )
