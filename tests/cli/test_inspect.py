"""What ``expo-serve inspect`` says of pairs, good and bad."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from expo_serve.cli import inspect
from expo_serve.cli.inspection import Inspection
from expo_serve.errors import UsageError
from tests.models.raw import tiny_tensors, write_pair, write_raw

ALL_BYTES = sum(tensor.nbytes for tensor in tiny_tensors().values())
COMMIT = "0123456789" * 4


class Inspector:
    """Runs the command in this process and keeps what it printed."""

    def __init__(self, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
        self.base, self.aligned = pair
        self._capsys = capsys
        self.output = ""
        self.errors = ""

    def run(self, *flags: str, alpha: str = "0.5") -> int:
        self._capsys.readouterr()
        code = inspect.main(["--base", str(self.base), "--aligned", str(self.aligned), "--alpha", alpha, *flags])
        self.output, self.errors = self._capsys.readouterr()
        return code

    def read(self, *flags: str, **options: Any) -> Inspection:
        """The JSON that the pair gives; it must be what the schema says, and no more."""
        code = self.run(*flags, "--json", **options)
        found = Inspection.model_validate_json(self.output)
        assert code == (2 if found.refusals else 0)
        assert json.loads(found.model_dump_json()) == json.loads(self.output)
        return found


@pytest.fixture
def inspector(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Inspector:
    return Inspector(write_pair(tmp_path), capsys)


def test_good_pair(inspector: Inspector) -> None:
    (inspector.aligned / "tokenizer.json").write_text("{}")
    found = inspector.read()
    assert (found.alpha, found.served_model_name) == (0.5, "aligned-expo-0.5")
    assert (found.counts, found.alphas) == ({"extrapolated": 8, "copied": 0}, {"0.5": 8})
    assert found.read_bytes_per_rank == {"base": ALL_BYTES, "aligned": ALL_BYTES}
    assert (found.refusals, found.warnings) == ([], [])
    assert [tensor.name for tensor in found.tensors] == list(found_names(inspector.aligned))
    assert inspector.errors == ""


def found_names(folder: Path) -> list[str]:
    """Names of a one-file checkpoint in the order of its data."""
    raw = (folder / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return sorted(header, key=lambda name: header[name]["data_offsets"])


def test_sources_are_described(inspector: Inspector) -> None:
    found = inspector.read().sources["base"]
    assert (found.name, found.path, found.revision) == ("base", str(inspector.base), None)
    assert (found.files, found.tensors, found.bytes, found.dtypes) == (1, 8, ALL_BYTES, ["BF16"])
    assert len(found.fingerprint) == 16


def test_alpha_is_written_as_its_one_text(inspector: Inspector) -> None:
    inspector.run("--json", "--alpha-rule", "lm_head=1.0", alpha="1.0")
    assert '"alpha": 1,' in inspector.output
    assert json.loads(inspector.output)["alpha_rules"] == ["lm_head=1"]


def test_ranks_share_matrices_and_repeat_vectors(inspector: Inspector) -> None:
    found = inspector.read("--tensor-parallel-size", "2")
    vectors = 2 * 8 * 2
    assert found.tensor_parallel_size == 2
    assert found.read_bytes_per_rank == {"base": (ALL_BYTES + vectors) // 2, "aligned": (ALL_BYTES + vectors) // 2}
    assert found.memory is not None
    assert found.memory.weight_bytes == 2 * found.memory.weight_bytes_per_rank == ALL_BYTES + vectors
    assert found.memory.fits_host


@pytest.mark.parametrize("flag", ["--tensor_parallel_size=2", "-tp=2"])
def test_ranks_may_be_given_as_vllm_takes_them(inspector: Inspector, flag: str) -> None:
    assert inspector.read(flag).tensor_parallel_size == 2


def test_side_that_is_not_used_is_not_read(inspector: Inspector) -> None:
    assert inspector.read(alpha="0").read_bytes_per_rank == {"base": 0, "aligned": ALL_BYTES}
    assert inspector.read(alpha="-1").read_bytes_per_rank == {"base": ALL_BYTES, "aligned": 0}


@pytest.mark.parametrize(
    ("file", "content", "tokenizer", "template"),
    [
        ("tokenizer.json", "{}", "aligned: tokenizer.json", None),
        ("vocab.json", "{}", "aligned: vocab.json", None),
        ("chat_template.jinja", "x", None, "aligned: chat_template.jinja"),
        ("tokenizer_config.json", '{"chat_template": "x"}', None, "aligned: tokenizer_config.json"),
        ("tokenizer_config.json", "{}", None, None),
        ("tokenizer_config.json", "[", None, None),
    ],
)
def test_tokenizer_and_template_are_aligneds(
    inspector: Inspector, file: str, content: str, tokenizer: str | None, template: str | None
) -> None:
    (inspector.base / "tokenizer.json").write_text("{}")
    (inspector.aligned / file).write_text(content)
    found = inspector.read()
    assert (found.tokenizer, found.chat_template) == (tokenizer, template)


def test_unmatched_tensors_are_listed(inspector: Inspector) -> None:
    write_raw(inspector.aligned, tiny_tensors(layers=3))
    found = inspector.read("--unmatched", "copy")
    assert len(found.copied_unmatched) == 3
    assert found.counts == {"extrapolated": 8, "copied": 3}
    copied = [tensor for tensor in found.tensors if tensor.kind == "copied"]
    assert all(tensor.alpha is None and tensor.base_name is None for tensor in copied)
    assert len(copied) == 3


def test_refused_pair_lists_all_details_in_json_and_ten_in_the_table(inspector: Inspector) -> None:
    write_raw(inspector.aligned, tiny_tensors(layers=7))
    found = inspector.read()
    assert (len(found.refusals), len(found.refusals[0].details)) == (1, 15)
    assert found.memory is None
    assert set(found.sources) == {"base", "aligned"}
    inspector.run()
    assert inspector.output.count("only in aligned: ") == 10
    assert "... and 5 more" in inspector.output
    assert inspector.errors == f"expo-serve: error: {found.refusals[0].message}\n"


def test_both_sides_refused_are_both_told_with_one_summary(inspector: Inspector) -> None:
    inspector.base, inspector.aligned = Path("/no/base"), Path("/no/aligned")
    found = inspector.read()
    assert [refusal.message.split(":")[0] for refusal in found.refusals] == ["base", "aligned"]
    assert found.sources == {}
    lines = inspector.errors.splitlines()
    assert ["/no/base" in lines[0], "/no/aligned" in lines[1]] == [True, True]
    assert lines[2:] == ["expo-serve: error: the pair is refused for 2 reasons"]
    assert inspector.run() == 2


def test_table_of_80_columns_cuts_nothing(
    inspector: Inspector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    name = "SomebodysName--A-Model-of-135M-Instruct-v0.2"
    snapshot = tmp_path / f"models--{name}" / "snapshots" / COMMIT
    inspector.aligned = write_raw(snapshot, tiny_tensors(vocabulary=18))
    assert inspector.run("--alpha-rule", "lm_head|[/b]embed=0") == 0
    lines = inspector.output.splitlines()
    assert max(len(line) for line in lines if not line.startswith("warning: ")) <= 80
    assert "…" not in inspector.output
    cells = "".join(line.split("│")[3].strip() for line in lines if line.count("│") == 4)
    assert name.replace("--", "/") in cells
    assert COMMIT in cells
    assert "lm_head|[/b]embed=0" in inspector.output
    assert "(+2 rows)" in inspector.output


def test_names_are_never_taken_for_markup(inspector: Inspector, tmp_path: Path) -> None:
    inspector.aligned = write_raw(tmp_path / "[bold]x[" / "[b]y")
    assert inspector.run() == 0
    assert any("[b]y" in line for line in inspector.output.splitlines() if line.startswith("│ name"))
    inspector.base = tmp_path / "[red]gone"
    assert inspector.run() == 2
    assert "[red]gone" in inspector.output


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tensor-parallel-size", "0"], "expected a number from 1"),
        (["--tensor-parallel-size", "two"], "expected a number from 1"),
        (["--port", "8000"], "does not know '--port'"),
        (["model"], "unexpected 'model'"),
    ],
)
def test_wrong_call_is_refused(inspector: Inspector, flags: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        inspector.run(*flags)


def test_values_are_measured_when_asked_for(inspector: Inspector) -> None:
    assert inspector.read().measurement is None
    found = inspector.read("--measure").measurement
    assert found is not None
    assert found.total.tensors == 8
    assert set(found.effective_alpha) == {"nearest", "dithered"}
    assert inspector.run("--measure") == 0
    assert "effective alpha for 0.5 by rounding" in " ".join(inspector.output.split())
    assert found.verdict.text in inspector.output
    assert "cannot be told from their values" in inspector.output or found.verdict.kind == "unrelated"


def test_measured_layers_are_drawn(inspector: Inspector, tmp_path: Path) -> None:
    file = tmp_path / "layers.png"
    assert inspector.run("--measure", "--plot", str(file)) == 0
    assert file.read_bytes().startswith(b"\x89PNG")
    assert file.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--plot", "x.png"), "--plot needs --measure"),
        (("--measure", "--plot", "x.pdf"), "ends with .png in an existing folder"),
        (("--measure", "--plot", "/no/such/folder/x.png"), "ends with .png in an existing folder"),
    ],
)
def test_plot_that_cannot_be_drawn_is_refused(inspector: Inspector, flags: tuple[str, ...], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        inspector.run(*flags)


def test_plot_without_its_library_is_refused(inspector: Inspector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'expo-serve\[plot\]'"):
        inspector.run("--measure", "--plot", "x.png")


def test_rounding_is_shown(inspector: Inspector) -> None:
    assert (inspector.read().rounding, inspector.read("--rounding", "nearest").rounding) == ("dithered", "nearest")
    assert inspector.read("--rounding-seed", "7").rounding_seed == 7
    inspector.run("--rounding", "nearest")
    assert "nearest (the bits" in inspector.output
