"""Any model that vLLM serves: every family of the table, bit for bit and token for token."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers

from tests.conformance.checkpoints import write_pair
from tests.conformance.families import FAMILIES
from tests.conformance.family import Family
from tests.conformance.left_out import LEFT_OUT, REMOTE_CODE
from tests.conformance.readme import PAGE, written
from tests.conformance.running import Loaded, loads_of
from tests.models import read_tensors, reference_checkpoint

ALPHA = 1.7
RULE_ALPHA = 0.25


@pytest.mark.engine
@pytest.mark.usefixtures("engines")
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_family(family: Family, tmp_path: Path) -> None:
    base, aligned = write_pair(tmp_path, family)
    ruled = _largest_tensor(aligned)
    merged = reference_checkpoint(base, aligned, ALPHA, tmp_path / "merged", alphas={ruled: RULE_ALPHA})
    extra = {"base": str(base), "alpha": ALPHA, "alpha_rules": [f"^{re.escape(ruled)}$={RULE_ALPHA}"]}
    reports = []
    for load in loads_of(family):
        plain = load(merged)
        expo = load(aligned, load_format="expo", model_loader_extra_config=extra)
        assert_same(expo, plain, family.unfilled)
        assert expo.report is not None
        reports.append(expo.report)
    assert reports[0].tensors["materialized"] == family.materialized
    assert reports[0].alphas[str(RULE_ALPHA)] == 1
    assert reports[0].alphas.keys() == {str(ALPHA), str(RULE_ALPHA)}


def assert_same(expo: Loaded, plain: Loaded, unfilled: tuple[str, ...]) -> None:
    """Equal bits, but for what vLLM leaves without values: nobody knows those."""
    assert expo.report is not None
    assert tuple(expo.report.unfilled) == unfilled
    assert expo.state.keys() == plain.state.keys()
    differing = [
        name
        for name, tensor in plain.state.items()
        if name.removesuffix(" (processed)") not in unfilled
        and not (tensor.is_meta or torch.equal(expo.state[name], tensor))
    ]
    assert differing == []
    assert expo.tokens == plain.tokens


def _largest_tensor(folder: Path) -> str:
    """The one whose alpha a rule changes: it is a weight of the model in every family."""
    tensors = read_tensors(folder)
    return max((name for name in tensors if tensors[name].is_floating_point()), key=lambda name: tensors[name].numel())


@pytest.mark.engine
def test_every_architecture_has_a_line_or_a_reason() -> None:
    from vllm.model_executor.models.registry import _VLLM_MODELS

    built = {family.architecture for family in FAMILIES}
    assert not built & LEFT_OUT.keys()
    assert set(_VLLM_MODELS) - built == LEFT_OUT.keys()


def test_remote_code_is_said_only_of_what_transformers_lacks() -> None:
    remote = [name for name, reason in LEFT_OUT.items() if reason is REMOTE_CODE]
    assert [name for name in remote if hasattr(transformers, name)] == []


def test_names_tell_the_lines_apart() -> None:
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


def test_page_shows_the_tables() -> None:
    text = PAGE.read_text()
    assert text == written(text), "run python -m tests.conformance.readme"
