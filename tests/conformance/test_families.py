"""Any model that vLLM serves: every family of the table, bit for bit and token for token."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers

from tests.compare import by_expo, differing
from tests.conformance.checkpoints import has_transformers_class, write_pair
from tests.conformance.families import FAMILIES
from tests.conformance.family import Family
from tests.conformance.left_out import LEFT_OUT, REMOTE_CODE
from tests.conformance.readme import PAGE, written
from tests.conformance.running import Loaded, loads_of
from tests.conformance.seen import CORE, recorded, watched
from tests.models import read_tensors, reference_checkpoint

ALPHA = 1.7
RULE_ALPHA = 0.25


@pytest.mark.engine
@pytest.mark.usefixtures("engines")
@pytest.mark.parametrize(
    "family",
    [pytest.param(one, id=one.name, marks=() if one.name in CORE else pytest.mark.slow) for one in FAMILIES],
)
def test_family(family: Family, tmp_path: Path) -> None:
    base, aligned = write_pair(tmp_path, family)
    ruled = _largest_tensor(aligned)
    merged = reference_checkpoint(base, aligned, ALPHA, tmp_path / "merged", alphas={ruled: RULE_ALPHA})
    ours = by_expo(base, ALPHA, alpha_rules=[f"^{re.escape(ruled)}$={RULE_ALPHA}"])
    reports, through = [], []
    for load in loads_of(family):
        plain = load(merged)
        with watched() as seen:
            expo = load(aligned, **ours)
        assert_same(expo, plain, family.unfilled)
        assert expo.report is not None
        reports.append(expo.report)
        through.append(seen.as_lists())
    assert through[0] == recorded()[family.name], "run python -m tests.conformance.seen"
    assert reports[0].tensors["materialized"] == family.materialized
    assert reports[0].alphas[str(RULE_ALPHA)] == 1
    assert reports[0].alphas.keys() == {str(ALPHA), str(RULE_ALPHA)}


def assert_same(expo: Loaded, plain: Loaded, unfilled: tuple[str, ...]) -> None:
    """Equal bits, but for what vLLM leaves without values: nobody knows those."""
    assert expo.report is not None
    assert tuple(expo.report.unfilled) == unfilled
    assert differing(expo.state, plain.state, unfilled) == []
    assert expo.tokens == plain.tokens


def _largest_tensor(folder: Path) -> str:
    """The one whose alpha a rule changes: it is a weight of the model in every family."""
    tensors = read_tensors(folder)
    return max((name for name in tensors if tensors[name].is_floating_point()), key=lambda name: tensors[name].numel())


def kinds(family: Family) -> set[str]:
    """All that a family could be the only one to show, by its line and by what was recorded of it."""
    seen = recorded()[family.name]
    shown = {*seen["operations"], *seen["layers"], f"layout {family.layout}", f"engine {sorted(family.engine.items())}"}
    shown |= {name for name in LINE if getattr(family, name)}
    return shown | {"with transformers' class" if has_transformers_class(family) else "named after vLLM's model"}


LINE = ("like", "config", "hub_names", "transposed", "multimodal", "materialized", "unfilled", "not_run")


def test_core_shows_every_kind_of_layer_layout_and_operation() -> None:
    by_name = {family.name: kinds(family) for family in FAMILIES}
    shown = set().union(*(by_name[name] for name in CORE))
    assert set().union(*by_name.values()) - shown == set()
    assert len(CORE) == 25
    # The lists themselves are no smaller than they were: a record that went missing would be no kind any more.
    seen = recorded()
    assert seen.keys() == by_name.keys()
    assert len({name for one in seen.values() for name in one["operations"]}) == 19
    assert len({name for one in seen.values() for name in one["layers"]}) == 29


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
