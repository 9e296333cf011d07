"""The demo's BLIP-2, packed, generating from a static cache with its language model compiled: the tokens of eager.

Two routes. Transformers compiles by itself (`get_compiled_call`) once the cache is static and the device is one it
thinks worth it: CUDA and the like, or any with ``CompileConfig._compile_all_devices``; it compiles single-token steps
and leaves the prompt eager. Or the caller compiles ``language_model.forward``: then the prompt is a second graph.
Vision and Q-Former run once a caption, outside `generate`'s loop; they are compiled like any module.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("pydantic")  # a machine that is lent for its GPU may lack it

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import CompileConfig

from mmq_kernels import load, load_processor, quantize_model
from mmq_kernels.demo import weights_folder
from mmq_kernels.nn import QuantLinear

TOKENS = 12


@pytest.fixture
def model(device: str) -> Any:
    loaded = load(weights_folder("blip2"))
    quantize_model(loaded, "vision=rtn:4:g64 language=rtn:3:g64")
    assert sum(isinstance(m, QuantLinear) for m in loaded.language_model.modules()) > 10
    return loaded.to(device)


@pytest.fixture
def inputs(device: str) -> dict[str, Tensor]:
    images = [torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8).numpy() for _ in range(3)]
    return dict(load_processor(weights_folder("blip2"))(images=images, return_tensors="pt").to(device))


def generate(model: Any, inputs: dict[str, Tensor], **settings: Any) -> Tensor:
    return model.generate(**inputs, min_new_tokens=TOKENS, max_new_tokens=TOKENS, do_sample=False, **settings)


def everywhere(backend: str) -> CompileConfig:
    settings = CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode=None)
    settings._compile_all_devices = True
    return settings


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_transformers_compiles_each_step(backend, model, inputs) -> None:
    eager = generate(model, inputs)
    assert eager.shape[1] >= TOKENS
    counters.clear()
    for _ in range(2):
        found = generate(model, inputs, cache_implementation="static", compile_config=everywhere(backend))
        assert torch.equal(found, eager)
    assert hasattr(model.language_model, "_compiled_call")
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


def test_a_compiled_forward_takes_prompt_and_steps(model, inputs) -> None:
    eager = generate(model, inputs)
    language = model.language_model
    language.forward = torch.compile(language.forward, fullgraph=True, dynamic=False, backend="aot_eager")
    counters.clear()
    graphs = []
    for _ in range(3):
        assert torch.equal(generate(model, inputs, cache_implementation="static", disable_compile=True), eager)
        graphs.append(counters["stats"]["unique_graphs"])
    assert not counters["graph_break"]
    # Prompt and step; transformers 4 makes its cache inside the first prompt, and has another graph for later ones.
    assert 2 <= graphs[0] <= graphs[1] == graphs[2] <= 3


def test_every_part_compiled(model, inputs) -> None:
    eager = generate(model, inputs)
    for part in (model.vision_model, model.qformer):
        part.compile(fullgraph=True, backend="aot_eager")
    counters.clear()
    found = generate(model, inputs, cache_implementation="static", compile_config=everywhere("aot_eager"))
    assert torch.equal(found, eager)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 3
