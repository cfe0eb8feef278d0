"""The check of the load onto a GPU: its command and its cases run on the CPU, and each of its oracles has teeth."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from loadtests import results
from loadtests.device_check import bits, stage, vllm_loads
from loadtests.device_check.case import perform
from loadtests.device_check.cases import CASES, Case, chosen
from loadtests.device_check.distance import distance, ordered
from loadtests.device_check.outcome import Outcome, last_outcome
from loadtests.device_check.running import outcome_of
from loadtests.device_check.setting import Setting

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
RIGHT = ["bits-pair-nearest", "bits-lora-dithered", "bits-packed-nearest", "order-behind-sleep", "order-freed"]
RIGHT += ["errors-nan", "errors-overflow"]
SKIPPED = ["order-memcpy-reader", "order-triton-reader", "order-streams", "pool", "errors-pinned", "errors-memory"]
SKIPPED += ["rates-pieces", "vllm-sleep-pool"]
MEASURED = ["machine", "rates-contiguous", "rates-row", "rates-small", "rates-cold", "rates-threads"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("device-check")


def done(name: str, work: Path, plants: bool = False) -> Outcome:
    return perform(CASES[name], "cpu", True, work, plants)


@pytest.mark.parametrize("name", RIGHT)
def test_cases_find_nothing_wrong_on_the_cpu(name: str, work: Path) -> None:
    outcome = done(name, work)
    assert (outcome.status, outcome.reason) == ("right", "")
    json.loads(outcome.line())


@pytest.mark.parametrize("name", RIGHT)
def test_cases_find_what_was_falsified(name: str, work: Path) -> None:
    outcome = done(name, work, plants=True)
    assert outcome.status == "wrong"
    assert outcome.is_bad
    assert outcome.reason


def test_one_wrong_bit_of_an_interpolation_is_told_and_more_is_wrong(work: Path) -> None:
    """The last place of an interpolation may differ between processors: it is counted, and no more than that."""
    figures = done("bits-pair-nearest", work, plants=True).figures
    assert all(sentence.startswith(("bf16 alpha 0,", "fp32+bf16 alpha 0,")) for sentence in figures["wrong"])
    assert figures["combinations"]["bf16 alpha 0.5"]["differing"] == 1
    assert figures["combinations"]["bf16 alpha 0.5"]["largest"] == 1


@pytest.mark.parametrize("name", SKIPPED)
def test_what_needs_a_gpu_is_skipped_with_a_reason(name: str, work: Path) -> None:
    outcome = done(name, work)
    assert outcome.status == "skipped"
    assert "only on a GPU" in outcome.reason


@pytest.mark.parametrize("name", MEASURED)
def test_rates_are_measured(name: str, work: Path) -> None:
    outcome = done(name, work)
    assert (outcome.status, outcome.reason) == ("measured", "")
    if name != "machine":
        assert all(one["min"] > 0 for one in outcome.figures["gigabytes_per_second"].values())


def test_a_peer_that_brings_other_values_is_found(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert done("peers-safetensors", work).status == "right"
    peers = import_module("loadtests.device_check.peers")
    load = peers._safetensors
    monkeypatch.setattr(peers, "_safetensors", lambda *given: {name: one.zero_() for name, one in load(*given).items()})
    assert done("peers-safetensors", work).status == "wrong"


def test_without_a_gpu_every_case_is_skipped(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    outcome = perform(CASES["machine"], "cuda", True, work)
    assert outcome.status == "skipped"
    assert "torch sees no GPU" in outcome.reason


def test_a_case_that_raises_is_a_result(work: Path) -> None:
    outcome = perform(Case("broken", 1, "no_such_module"), "cpu", True, work)
    assert outcome.status == "failed"
    assert "no_such_module" in outcome.reason


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_cases_call_what_is_there(case: Case) -> None:
    module = import_module(f"loadtests.device_check.{case.module}")
    inspect.signature(module.run).bind(None, **case.options)


def test_cases_are_chosen_by_stage_and_name() -> None:
    assert chosen(None, None) == list(CASES.values())
    assert {case.stage for case in chosen([1, 3], None)} == {1, 3}
    assert [case.name for case in chosen(None, ["order-f", "pool"])] == ["order-freed", "pool"]
    assert chosen([2], ["pool"]) == []
    with pytest.raises(ValueError, match="no case is called 'nope'"):
        chosen(None, ["nope"])


# The process of a case


def ended(tmp_path: Path, code: str, limit: float = 60) -> Outcome:
    return outcome_of("it", [sys.executable, "-c", code], limit)


def test_a_crash_is_a_result(tmp_path: Path) -> None:
    outcome = ended(tmp_path, "import os, sys; print('almost', file=sys.stderr, flush=True); os.abort()")
    assert outcome.status == "crashed"
    assert outcome.reason == "exit code -6 without an answer: almost"


def test_a_case_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    file = tmp_path / "child"
    code = (
        "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)']);"
    )
    code += f"open({str(file)!r}, 'w').write(str(child.pid)); time.sleep(99)"
    outcome = ended(tmp_path, code, limit=3)
    assert (outcome.status, outcome.is_bad) == ("timed out", True)
    stat = Path(f"/proc/{file.read_text()}/stat")
    for _ in range(50):
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("its child lives on")


def test_what_libraries_say_after_the_answer_does_no_harm() -> None:
    line = Outcome("it", "right", figures={"a": 1}).line()
    assert last_outcome(f"before\n{line}\nafter\n") == Outcome("it", "right", figures={"a": 1})
    assert last_outcome('{"case": torn\n') is None


# The command


@pytest.fixture
def without_torch(tmp_path: Path) -> dict[str, str]:
    """An environment in which torch cannot be imported."""
    for name in ("torch", "vllm"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')")
    return {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}


def command(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    called = [sys.executable, "-m", *arguments]
    return subprocess.run(called, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["loadtests.device_check", "--help"], 0, "--stage"),
        (["loadtests.device_check", "--list"], 0, "bits-pair-nearest  (stage 1, torch alone)"),
        (["loadtests.device_check", "--stage", "4"], 2, "invalid choice: 4"),
        (["loadtests.device_check", "--only", "nope"], 2, "no case is called 'nope'"),
        (["loadtests.device_check", "--stage", "2", "--only", "pool"], 2, "in these stages"),
        (["loadtests.device_check.case", "--help"], 0, "--plant"),
        (["loadtests.device_check.case", "nope"], 2, "invalid choice: 'nope'"),
        (["loadtests.device_check.case", "machine"], 0, '"status": "skipped", "reason": "torch cannot be imported'),
    ],
)
def test_help_and_mistakes_need_no_torch(
    arguments: list[str], code: int, said: str, without_torch: dict[str, str], tmp_path: Path
) -> None:
    is_done = arguments[-1] == "machine"
    answered = command(without_torch, *arguments, *(["--work", str(tmp_path)] if is_done else []))
    assert answered.returncode == code
    assert said in answered.stdout + answered.stderr
    assert "Traceback" not in answered.stderr


def test_the_command_prints_and_keeps_what_it_finds(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = ["--device", "cpu", "--quick", "--only", "machine", "order-freed", "pool"]
    places = ["--results", str(tmp_path / "results"), "--work", str(tmp_path / "work"), "--key", "here"]
    answered = command(environment, "loadtests.device_check", *arguments, *places)
    assert answered.returncode == 0, answered.stderr
    assert "order-freed: right" in answered.stdout
    assert "1 measured, 1 right, 1 skipped; kept in" in answered.stdout
    kept = results.read("device_check", tmp_path / "results")["here"]
    assert kept["machine"]["versions"]["torch"] == torch.__version__
    assert {name: one["status"] for name, one in kept["cases"].items()} == {
        "machine": "measured",
        "order-freed": "right",
        "pool": "skipped",
    }
    assert "a CPU has no stage" in kept["cases"]["machine"]["figures"]["way"]


# The oracles


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn])
def test_every_flipped_bit_is_counted(dtype: torch.dtype) -> None:
    expected = torch.linspace(-3, 3, 64).to(dtype)
    for bit in range(dtype.itemsize * 8):
        found = expected.clone()
        found.view(torch.uint8)[7 * dtype.itemsize + bit // 8] ^= 1 << bit % 8
        assert distance(found, expected).differing == 1
    assert distance(expected.clone(), expected).differing == 0


def test_distance_counts_steps_of_the_dtype_also_across_zero() -> None:
    values = torch.tensor([-1e-40, -0.0, 0.0, 1e-40, 1.0, 1.0078125]).bfloat16()
    places = ordered(values).tolist()
    assert places[1] == places[2] == 0
    assert places[0] == -places[3] < 0
    assert places[5] - places[4] == 1
    zero = distance(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert (zero.differing, zero.largest, zero.beyond) == (1, 0, 0)


def test_values_that_were_not_written_are_never_near() -> None:
    hole = distance(torch.tensor([torch.nan, 1.0]), torch.tensor([1.0, 1.0]), slack=1e9)
    assert (hole.unwritten, hole.beyond) == (1, 1)


@pytest.mark.parametrize("gap", [0, 3])
def test_a_byte_beside_the_destination_is_found(gap: int) -> None:
    made = bits.Destination(torch.Size((4, 6)), torch.bfloat16, gap, CPU)
    assert made.tensor.isnan().all()
    made.tensor.fill_(1)
    assert made.spilled() == 0
    assert (made.tensor == 1).all()
    made._raw[2 * bits._MARGIN - 1] = 0
    assert made.spilled() == 1
    made._raw[-1] = 0
    assert made.spilled() == 2
    if gap:
        made._raw[2 * (bits._MARGIN + 6)] = 0
        assert made.spilled() == 3


def test_rates_of_a_load_that_leaves_holes_are_refused(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = torch.full((1024, 1024), torch.nan)
    monkeypatch.setattr(stage, "walk", lambda plan, names, session: ((name, nothing) for name in names))
    outcome = done("rates-contiguous", work)
    assert outcome.status == "failed"
    assert "2 of 2 tensors have values that were not written" in outcome.reason


def test_states_of_vllm_are_compared_value_by_value(work: Path) -> None:
    def compared(plain: dict[str, torch.Tensor], expo: dict[str, torch.Tensor], plants: bool = False) -> dict[str, Any]:
        return vllm_loads.compare(Setting(CPU, True, work, plants), plain, expo)

    state = {"a": torch.ones(4).bfloat16(), "b": torch.arange(4, dtype=torch.int8)}
    copies = {name: one.clone() for name, one in state.items()}
    assert compared(state, copies)["wrong"] == []
    assert compared(state, copies, plants=True)["wrong"] == ["a: 1 of 4 values are others"]
    assert compared(state, {"a": state["a"]})["wrong"] == ["b is there on one side only"]
    assert len(compared(state, {**state, "b": torch.arange(5, dtype=torch.int8)})["wrong"]) == 1
    assert compared({}, {})["wrong"] == ["vLLM has loaded nothing"]


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.timeout(1300)
@pytest.mark.parametrize("name", ["vllm-llama", "vllm-mixtral", "vllm-int8", "tokens", "ranks-tensor", "ranks-expert"])
def test_vllm_on_the_cpu(name: str, tmp_path: Path) -> None:
    arguments = [name, "--device", "cpu", "--quick", "--work", str(tmp_path)]
    for extra, status in (([], "right"), (["--plant"], "wrong")):
        if extra and name.startswith("ranks"):
            continue
        called = [sys.executable, "-m", "loadtests.device_check.case", *arguments, *extra]
        found = outcome_of(name, called, limit=600)  # ends ranks and engines too
        assert found.status == status, found.reason
