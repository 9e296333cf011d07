"""GPTQ, blocks and decoding: small ones run on the CPU, and their rows say what was compared."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Blip2Config, Blip2ForConditionalGeneration

from mmq_kernels.bench.blocks import bench_blocks
from mmq_kernels.bench.decode import bench_decode
from mmq_kernels.bench.gptq import bench_gptq, gptq_by_blocks, gptq_by_columns, weighted_error
from mmq_kernels.bench.layers import held_bytes, replace_linears, rounded
from mmq_kernels.bench.models import Depth, blip2_config, random_model
from mmq_kernels.bench.setting import Setting
from mmq_kernels.nn import QuantLinear
from mmq_kernels.spec import QuantSpec

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting.standard(CPU, seconds=0.001, quick=True)


@pytest.fixture
def tiny() -> Blip2Config:
    config: Any = blip2_config(Depth(1, 1), Depth(1, 1), Depth(1, 1), vocabulary=64)
    config.vision_config.image_size = 28
    return config


def test_gptq_row(setting: Setting) -> None:
    (row,) = bench_gptq(setting, 136, rounds=2, beside=("reference",))
    assert row["reference_seconds"] > 0
    assert row["x_torch"] == pytest.approx(row["torch_seconds"] / row["seconds"])
    assert row["x_chain"] == pytest.approx(row["seconds"] / row["chain_seconds"])
    assert row["equal_codes"] > 0.99
    assert row["error_ratio"] == pytest.approx(1, abs=0.02)


def test_both_ways_of_gptq_agree_on_a_ragged_last_block() -> None:
    x = torch.randn(256, 136)
    hessian = x.t() @ x / 256 + 0.01 * torch.eye(136)
    weight = torch.randn(16, 136) * 0.02
    blocks, columns = gptq_by_blocks(weight, hessian), gptq_by_columns(weight, hessian)
    assert (blocks.codes == columns.codes).float().mean() > 0.99
    assert blocks.codes.max() <= 15
    assert (blocks.dequantize(QuantSpec(4, 128)) - weight).abs().max() < 0.02


def test_weighted_error_by_hand() -> None:
    weight, quantized = torch.zeros(1, 2), torch.tensor([[1.0, 2.0]])
    hessian = torch.tensor([[3.0, 1.0], [1.0, 5.0]])
    assert weighted_error(weight, quantized, hessian) == 3 + 2 * 2 + 4 * 5


def test_blocks_run_and_shrink(setting: Setting, tiny: Blip2Config) -> None:
    rows = list(bench_blocks(setting, (4,), group=32, config=tiny))
    assert [(row["block"], row["m"]) for row in rows] == [
        ("vision", 257),
        ("qformer", 32),
        ("language", 1),
        ("language", 32),
    ]
    for row in rows:
        assert row["x_torch_fp32"] == row["torch_fp32_us"] / row["us"]
        assert row["held_bytes"] < row["torch_held_bytes"] / 4


def test_decoding_runs_and_its_head_stays_dense(setting: Setting, tiny: Blip2Config) -> None:
    (row,) = bench_decode(setting, (4,), group=32, config=tiny, new_tokens=3, rounds=2)
    assert row["tokens_per_second"] == pytest.approx(3 / row["us"] * 1e6)
    assert row["torch_tokens_per_second"] == pytest.approx(3 / row["torch_fp32_us"] * 1e6)
    assert row["held_bytes"] < row["torch_held_bytes"]
    assert row["left_alone"] == ["lm_head"]


def test_random_models_keep_their_ties_and_dtype(tiny: Blip2Config) -> None:
    model = random_model(Blip2ForConditionalGeneration, tiny, CPU, torch.bfloat16)
    language = model.language_model
    assert language.lm_head.weight is language.model.decoder.embed_tokens.weight
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_published_sizes_are_the_default() -> None:
    config: Any = blip2_config()
    vision, qformer, text = config.vision_config, config.qformer_config, config.text_config
    assert (vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers) == (1408, 6144, 39)
    assert (qformer.hidden_size, qformer.intermediate_size, qformer.encoder_hidden_size) == (768, 3072, 1408)
    assert (text.hidden_size, text.ffn_dim, text.num_hidden_layers) == (2560, 10240, 32)


def test_linears_are_replaced_but_those_left_alone() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(32, 24), "head": nn.Linear(24, 8, bias=False)})
    before = copy.deepcopy(model)
    assert replace_linears(model, lambda _, linear: rounded(linear, QuantSpec(8, 32)), left_alone=("head",)) == 1
    assert isinstance(model["fc"], QuantLinear)
    assert isinstance(model["head"], nn.Linear)
    x = torch.randn(3, 32)
    assert (model["fc"](x) - before["fc"](x)).abs().max() < 0.05
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1] = tied[0]
    assert held_bytes(tied) == (16 + 4) * 4
