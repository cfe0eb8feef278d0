"""Which parameters count as written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from expo_serve.load.coverage import WriteTracker
from tests.load.lazies import Lazies, numbers


class Model(torch.nn.Module):
    """Two matrices and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Parameter(torch.zeros(4, 6), requires_grad=False)
        self.second = torch.nn.Parameter(torch.zeros(4, 6), requires_grad=False)
        self.bias = torch.nn.Parameter(torch.zeros(3), requires_grad=False)


class OwnParameter(torch.nn.Parameter):
    """Serving engines subclass parameters to hang their loaders on them."""


@pytest.fixture
def model() -> Model:
    return Model()


def test_nothing_written(model: Model) -> None:
    with WriteTracker(model) as tracker:
        model.first.sum()
    assert tracker.unwritten() == {"first": (0, 24), "second": (0, 24), "bias": (0, 3)}


def test_everything_written(model: Model) -> None:
    with WriteTracker(model) as tracker:
        model.first.copy_(torch.ones(4, 6))
        model.second.data.narrow(1, 0, 2).copy_(torch.ones(4, 2))
        model.second[:, 2:].fill_(1)
        model.bias.data = torch.ones(3)
    assert tracker.unwritten() == {}


def test_part_of_a_parameter(model: Model) -> None:
    with WriteTracker(model) as tracker:
        model.first[:3].copy_(torch.ones(3, 6))
        model.second.zero_()
        model.bias.add_(1)
    assert tracker.unwritten() == {"first": (18, 24)}


def test_one_place_written_twice_counts_once(model: Model) -> None:
    with WriteTracker(model) as tracker:
        for _ in range(2):
            model.first[:2].copy_(torch.ones(2, 6))
        model.second.zero_()
        model.bias.zero_()
    assert tracker.unwritten() == {"first": (12, 24)}


def test_places_that_overlap_count_once(model: Model) -> None:
    with WriteTracker(model) as tracker:
        model.first[:3].copy_(torch.ones(3, 6))
        model.first[1:3, 1:].zero_()
        model.first.view(-1)[2:14].zero_()
        model.second.zero_()
        model.bias.zero_()
    assert tracker.unwritten() == {"first": (18, 24)}


def test_parameters_that_share_a_storage_are_told_apart(model: Model) -> None:
    whole = torch.zeros(8, 6)
    model.first = torch.nn.Parameter(whole[:4], requires_grad=False)
    model.second = torch.nn.Parameter(whole[4:], requires_grad=False)
    with WriteTracker(model) as tracker:
        model.second.fill_(1)
        model.bias.fill_(1)
    assert tracker.unwritten() == {"first": (0, 24)}


def test_tied_parameters_are_written_together(model: Model) -> None:
    model.second = model.first
    with WriteTracker(model) as tracker:
        model.second.fill_(1)
        model.bias.fill_(1)
    assert tracker.unwritten() == {}


def test_transposed_and_strided_writes(model: Model) -> None:
    with WriteTracker(model) as tracker:
        model.first.t().copy_(torch.ones(6, 4))
        model.second[:, ::2].fill_(1)
        model.second[:, 1::2].fill_(1)
        model.bias[1:].fill_(1)
    assert tracker.unwritten() == {"bias": (2, 3)}


def test_parameter_of_a_class_of_its_own_is_seen(model: Model) -> None:
    model.first = OwnParameter(torch.zeros(4, 6), requires_grad=False)
    with WriteTracker(model) as tracker:
        model.first.copy_(torch.ones(4, 6))
        model.second.fill_(1)
        model.bias.fill_(1)
    assert tracker.unwritten() == {}


def test_out_argument_is_a_write(model: Model) -> None:
    with WriteTracker(model) as tracker:
        torch.add(model.second, 1, out=model.first)
        torch._foreach_zero_([model.second, model.bias])
    assert tracker.unwritten() == {}


def test_copies_of_lazy_tensors_are_seen(model: Model, tmp_path: Path) -> None:
    lazy = Lazies(tmp_path).make(numbers(4, 6), numbers(4, 6, seed=1)).lazy
    with WriteTracker(model) as tracker:
        model.first.copy_(lazy)
        model.second[:2].copy_(lazy[:2])
        lazy.add_(1)
    assert tracker.unwritten() == {"second": (12, 24), "bias": (0, 3)}


def test_parameter_without_memory_is_not_missed(model: Model) -> None:
    model.first = torch.nn.Parameter(torch.empty(4, 6, device="meta"), requires_grad=False)
    model.second = torch.nn.Parameter(torch.empty(0), requires_grad=False)
    with WriteTracker(model) as tracker:
        model.bias.fill_(1)
    assert tracker.unwritten() == {}
