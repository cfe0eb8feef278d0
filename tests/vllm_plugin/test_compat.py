"""Every name of vLLM that we build on is there, and one that is gone gives one clear error."""

from __future__ import annotations

import pytest

from expo_serve.errors import CompatError
from expo_serve.vllm_plugin import compat


@pytest.mark.engine
@pytest.mark.parametrize("name", compat.NAMES)
def test_name_is_there(name: str) -> None:
    assert getattr(compat, name) is not None


@pytest.mark.parametrize("place", ["vllm.no_such_module", "vllm.logger:no_such_name"])
def test_name_that_is_gone(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setitem(compat.NAMES, "gone", place)
    with pytest.raises(
        CompatError, match=r"^vLLM \S+ has no vllm\.(no_such_module\.gone|logger\.no_such_name) .*0\.32"
    ):
        compat.gone  # noqa: B018


def test_unknown_attribute_is_no_compat_error() -> None:
    with pytest.raises(AttributeError):
        compat.not_listed  # noqa: B018


@pytest.mark.parametrize(
    ("version", "warned"), [("0.32.0", False), ("0.33.1+cu129", False), ("0.31.9", True), ("1.0", True)]
)
def test_version_outside_the_range_is_one_warning(monkeypatch: pytest.MonkeyPatch, version: str, warned: bool) -> None:
    monkeypatch.setattr(compat, "installed_version", lambda: version)
    warning = compat.version_warning()
    assert (warning is not None) == warned
    assert "\n" not in (warning or "")
