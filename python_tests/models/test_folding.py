"""Scales move into norms and linears where that is an identity, on every family, and nowhere else."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import tiny_vlms
import torch
from tiny_families import TINY, logits
from torch import nn

from mmq_kernels.models import make_plan, quantize_model
from mmq_kernels.quantize import Recipe, folding
from mmq_kernels.quantize.folding import Producer, find_producer, fold
from mmq_kernels.quantize.walk import record, without_cache

PAIRS = {
    "llama": {"input_layernorm": "q_proj k_proj v_proj", "post_attention_layernorm": "gate_proj up_proj"}
    | {"mlp.up_proj": "down_proj"},
    "opt": {"self_attn_layer_norm": "q_proj k_proj v_proj", "self_attn.v_proj": "out_proj"}
    | {"final_layer_norm": "fc1", "fc1": "fc2"},  # through a ReLU
    "vit": None,
    "gemma3": None,
    "clip": {"layer_norm1": "q_proj k_proj v_proj", "self_attn.v_proj": "out_proj", "layer_norm2": "fc1"},
}
"""Of the language model's blocks (CLIP: of its text tower's); what takes a scale, and from which layers."""


def tiny(name):
    if name in TINY:
        return TINY[name].make(), TINY[name].calls(2)
    model = tiny_vlms.make(name)
    return model, [
        {k: v.contiguous() if hasattr(v, "contiguous") else v for k, v in b.items()}
        for b in tiny_vlms.batches(model, 2)
    ]


@torch.no_grad()
def fold_everything(model: nn.Module, calls: list[dict]) -> list[tuple[str, Producer, list[str]]]:
    """Give every group of layers a random scale, and move it into what makes their input where something can."""
    generator = torch.Generator().manual_seed(5)
    folded = []
    with without_cache(model):
        for stage in make_plan(model, Recipe.parse("all=awq:4:g16")).stages:
            walk = None
            for index, jobs in enumerate(stage.jobs):
                if walk is None or index == walk.end:
                    walk = record(model, stage, calls, index)
                groups: dict[int, list[str]] = {}
                for name, hessian in walk.hessians(model, index, jobs).items():
                    groups.setdefault(id(hessian), []).append(name)
                name = stage.blocks[index]
                for names in groups.values():
                    layers = [model.get_submodule(one) for one in names]
                    found = find_producer(
                        model.get_submodule(name), name, layers, lambda w=walk, i=index: w.outputs(model, i)
                    )
                    if found is not None:
                        scale = torch.exp(torch.rand(layers[0].in_features, generator=generator) * 3 - 1.5)
                        fold(found, layers, scale)
                        folded.append((name, found, names))
                walk.advance(model, index)
    return folded


@pytest.mark.parametrize("name", [*TINY, *tiny_vlms.KINDS])
def test_folding_leaves_the_outputs_of_every_family(name) -> None:
    model, calls = tiny(name)
    with torch.no_grad():
        before = [logits(model(**call)) for call in calls]
        untouched = copy.deepcopy(model.state_dict())
        folded = fold_everything(model, calls)
        after = [logits(model(**call)) for call in calls]
    for old, new in zip(before, after, strict=True):
        assert (new - old).norm() < 1e-5 * old.norm()
    assert folded
    for _, producer, names in folded:  # the scales were really moved
        for changed in (producer.name, *names):
            assert not torch.equal(model.state_dict()[f"{changed}.weight"], untouched[f"{changed}.weight"])


@pytest.mark.parametrize("name", [name for name, pairs in PAIRS.items() if pairs])
def test_the_pairs_of_known_blocks(name) -> None:
    model, calls = tiny(name)
    folded = fold_everything(model, calls)
    pairs: Counter[tuple[str, str]] = Counter()
    for block, producer, names in folded:
        if "vision" not in block and "projection" not in block:
            pairs[producer.name.removeprefix(f"{block}."), " ".join(n.rpartition(".")[2] for n in names)] += 1
    expected = {pair: 2 if name == "clip" else 3 for pair in PAIRS[name].items()}
    assert pairs == expected


def test_what_has_no_identity_keeps_its_scale() -> None:
    """Grouped heads share their values, a GELU is in the way, and post-norms feed a residual too."""
    model, calls = tiny("instructblip")
    into = {producer.name for _, producer, _ in fold_everything(model, calls)}
    layers = {name for _, _, names in fold_everything(model, calls) for name in names}
    assert not any("LayerNorm" in name for name in into if name.startswith("qformer"))  # post-norm
    assert "vision_model.encoder.layers.0.mlp.fc2" not in layers  # behind a GELU
    assert "language_model.model.layers.0.self_attn.o_proj" not in layers  # four heads of queries, two of values
    assert "vision_model.encoder.layers.0.self_attn.qkv" in into  # its last third
    first = next(p for _, p, _ in fold_everything(model, calls) if p.name.endswith("layers.0.self_attn.qkv"))
    assert first.start == 64


def test_norms_that_add_one_to_their_weight() -> None:
    model, calls = tiny("gemma3")
    offsets = {p.name: p.offset for _, p, _ in fold_everything(model, calls) if not isinstance(p.module, nn.Linear)}
    language = {name: offset for name, offset in offsets.items() if "language" in name}
    assert set(language.values()) == {1.0}
    assert {offset for name, offset in offsets.items() if name not in language} == {0.0}


def test_a_layer_left_out_keeps_the_norm_as_it_is() -> None:
    """A norm that also feeds a layer without this scale cannot take it."""
    model, calls = tiny("llama")
    for stage in make_plan(model, Recipe.parse("*.q_proj=awq:4:g16")).stages:
        walk = record(model, stage, calls)
        name = stage.blocks[0]
        layers = [model.get_submodule(f"{name}.self_attn.q_proj")]

        def run(walk=walk):
            return walk.outputs(model, 0)

        with torch.no_grad():
            assert find_producer(model.get_submodule(name), name, layers, run) is None


def test_what_was_folded_before_does_not_hide_the_next(monkeypatch) -> None:
    """A fold rounds weights: the block as it was at first is not what a later group's identity is held against."""
    monkeypatch.setattr(folding, "TOLERANCE", 0.25)
    model, calls = tiny("t5")
    rows = [row for row in quantize_model(model, "all=awq:4:g16", calls).layers if "language_model" in row.name]
    left = [row.name for row in rows if not row.folded_into]
    assert len(rows) == 36
    assert all("EncDecAttention.k" in name or "EncDecAttention.v" in name for name in left), left  # read the encoder


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_the_scale_that_the_rounded_norm_has(dtype) -> None:
    norm = nn.LayerNorm(64).to(dtype)
    with torch.no_grad():
        norm.weight.normal_(1, 0.3)
        norm.weight[3] = 0
    x, before = torch.randn(5, 64, dtype=dtype), norm.weight.detach().float().clone()
    scale = torch.rand(64) + 0.5
    got = Producer("norm", norm).absorb(scale)
    kept = before != 0
    assert torch.equal((norm.weight.float() * got)[kept].to(dtype), before[kept].to(dtype))
    torch.testing.assert_close(got, scale, rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert torch.isfinite(norm(x)).all()
