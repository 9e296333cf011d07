"""Modules without memory: parameters on meta, buffers right, and nothing spent on filling what holds nothing."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

from mmq_kernels.nn import parameters_on_meta
from mmq_kernels.nn.meta import HUGE

CONFIG = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)


class Counted(TorchDispatchMode):
    """Names of the operators that reach torch."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def filling(names: list[str]) -> set[str]:
    return {name for name in names if name.removesuffix("_") in ("normal", "uniform", "fill", "zero", "trunc_normal")}


def test_initializers_of_a_model_fill_nothing_on_meta() -> None:
    with Counted() as real:
        model = AutoModelForCausalLM.from_config(CONFIG)
    assert filling(real.names)
    with Counted() as counted, parameters_on_meta():
        empty = AutoModelForCausalLM.from_config(CONFIG)
    assert not filling(counted.names)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert [(name, p.shape, p.dtype) for name, p in empty.named_parameters()] == [
        (name, p.shape, p.dtype) for name, p in model.named_parameters()
    ]
    found, expected = dict(empty.named_buffers()), dict(model.named_buffers())
    assert found.keys() == expected.keys() and found
    assert all(torch.equal(found[name], buffer) for name, buffer in expected.items())


def test_what_has_memory_is_filled() -> None:
    with parameters_on_meta():
        tensor = torch.zeros(3)
        assert nn.init.constant_(tensor, 2.0) is tensor and tensor.tolist() == [2.0, 2.0, 2.0]
        assert tensor.add_(1).tolist() == [3.0, 3.0, 3.0]
        assert nn.init.normal_(tensor).unique().numel() == 3
        norm = nn.BatchNorm1d(4)
    assert norm.running_var.tolist() == [1.0] * 4 and norm.weight.is_meta


def test_nothing_huge_has_memory() -> None:
    with parameters_on_meta():
        assert torch.zeros(HUGE + 1, dtype=torch.int8).is_meta
        assert not torch.zeros(8).is_meta


def test_parameters_are_real_again_behind_an_error() -> None:
    with pytest.raises(ZeroDivisionError), parameters_on_meta():
        1 / 0  # noqa: B018
    assert not nn.Linear(2, 2).weight.is_meta
