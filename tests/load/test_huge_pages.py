"""Parameters get huge pages where the kernel gives them, and nothing beyond their own memory is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from expo_serve.load import huge_pages
from expo_serve.load.huge_pages import ask_for_huge_pages

MEBIBYTE = 1 << 20


class Model(torch.nn.Module):
    """One parameter of so many bytes."""

    def __init__(self, size: int, device: str = "cpu") -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(size, dtype=torch.uint8, device=device), requires_grad=False)


def test_whole_huge_pages_within_a_parameter_are_asked_for() -> None:
    if "never" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().split("[")[1].split("]")[0]:
        pytest.skip("this kernel gives no huge pages")
    noted = ask_for_huge_pages(Model(9 * MEBIBYTE))
    assert noted in (6 * MEBIBYTE, 8 * MEBIBYTE)
    assert ask_for_huge_pages(Model(MEBIBYTE)) == 0


def test_other_devices_and_platforms_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask_for_huge_pages(Model(9 * MEBIBYTE, "meta")) == 0
    monkeypatch.setattr(huge_pages, "_ADVICE", None)
    assert ask_for_huge_pages(Model(9 * MEBIBYTE)) == 0


def test_what_the_kernel_refuses_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_ADVICE", 12345)
    assert ask_for_huge_pages(Model(9 * MEBIBYTE)) == 0
