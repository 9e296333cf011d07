"""Bits per weight and bytes held, against sums by hand."""

import pytest
import torch
from torch import nn

from mmq_kernels.eval import model_size
from mmq_kernels.nn import QuantLinear
from mmq_kernels.spec import QuantSpec


class Pair(nn.Module):
    def __init__(self, second: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(64, 32)
        self.second = second
        self.scale = nn.Parameter(torch.ones(5))
        self.register_buffer("positions", torch.arange(10), persistent=False)


def test_unquantized() -> None:
    size = model_size(Pair(nn.Linear(32, 16, bias=False)))
    assert size.weights == 64 * 32 + 32 + 32 * 16 + 5
    assert size.bpw == 32.0
    assert size.memory_bytes == 4 * size.weights + 10 * 8
    assert model_size(Pair(nn.Linear(32, 16, bias=False)).half()).bpw == 16.0


def test_floats_counted_as_stored_in_half_precision() -> None:
    assert model_size(Pair(nn.Linear(32, 16)), float_bits=16).bpw == 16.0


@pytest.mark.parametrize("symmetric", [True, False])
def test_quantized_layer_counts_words_scales_and_zero_points(symmetric: bool) -> None:
    layer = QuantLinear(256, 16, QuantSpec(4, 64, symmetric))
    held = layer.packed_bytes
    assert held >= 256 * 16 // 2 + 2 * 16 * 4
    model = Pair(layer)
    size = model_size(model, {"first": ["first"], "second": ["second"], "rest": ["scale", "positions"]})
    floats = 64 * 32 + 32 + 5 + 16
    assert size.weights == floats + 256 * 16
    assert size.weight_bits == 32 * floats + 8 * held
    assert size.memory_bytes == 4 * floats + held + 80
    assert size.components["second"].weights == 256 * 16 + 16
    assert size.components["second"].weight_bits == 8 * held + 32 * 16
    assert size.components["rest"].weights == 5
    assert sum(part.memory_bytes for part in size.components.values()) == size.memory_bytes
    assert size.to_json()["components"]["second"]["bpw"] == pytest.approx(size.components["second"].bpw)


def test_tied_weights_count_once() -> None:
    model = Pair(nn.Linear(64, 32, bias=False))
    model.second.weight = model.first.weight
    assert model_size(model).weights == 64 * 32 + 32 + 5
    shared = Pair(nn.Linear(64, 32, bias=False))
    shared.second.weight = nn.Parameter(shared.first.weight.detach())
    assert model_size(shared).weights == 64 * 32 + 32 + 5
    assert model_size(shared).memory_bytes == 4 * (64 * 32 + 32 + 5) + 80


def test_a_view_is_charged_with_the_memory_it_keeps_alive() -> None:
    model = nn.Module()
    model.part = nn.Parameter(torch.zeros(1000)[:10])
    size = model_size(model)
    assert size.weights == 10 and size.memory_bytes == 4000


def test_a_prefix_is_a_whole_name() -> None:
    model = nn.ModuleDict({"vision": nn.Linear(4, 4), "vision_projection": nn.Linear(4, 2)})
    assert model_size(model, {"vision": ["vision"]}).components["vision"].weights == 20
