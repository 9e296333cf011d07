"""What these tests compile, export and train: packed layers of every kind, and a block of each part of BLIP-2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel, Blip2VisionConfig, Blip2VisionModel, OPTConfig, OPTModel

from mmq_kernels import ops
from mmq_kernels.bench.layers import replace_linears, rounded
from mmq_kernels.nn import QuantLinear
from mmq_kernels.spec import QuantSpec

N, K, GROUP = 24, 40, 16
WIDTH = 32

EPILOGUES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda y: nn.functional.gelu(y, approximate="tanh"),
    "quick_gelu": lambda y: y * torch.sigmoid(1.702 * y),
    "silu": nn.functional.silu,
}


def layer(
    spec: QuantSpec = QuantSpec(4, GROUP),  # noqa: B008 (frozen)
    n: int = N,
    k: int = K,
    *,
    bias: bool = True,
    ordered: bool = False,
    scaled: bool = False,
    activation: str = "none",
    dtype: torch.dtype = torch.float32,
) -> QuantLinear:
    """A layer of random weights; `ordered` by a random g_idx, `scaled` by a random divisor of x."""
    codes, scale, zero = ops.quantize_rtn(torch.randn(n, k), spec)
    g_idx = None
    if ordered:
        g_idx = torch.empty(k, dtype=torch.int32)
        g_idx[torch.randperm(k)] = torch.arange(k, dtype=torch.int32) // spec.group_length(k)
    return QuantLinear.from_codes(
        codes,
        scale,
        zero,
        spec,
        bias=torch.randn(n).to(dtype) if bias else None,
        g_idx=g_idx,
        input_scale=torch.rand(k) + 0.5 if scaled else None,
        activation=activation,
        dtype=dtype,
    )


def gemm_arguments(x: Tensor, q: QuantLinear, activation: str | None = None) -> list[Any]:
    """A call of `mmq::gemm` that does what the layer does."""
    return [
        *(x, q.weight_runtime, q.scale_runtime, q.zero_runtime, q.perm, q.weight_input_scale, q.bias),
        *(q.spec.bits, q.spec.group_size, q.out_features, q.in_features, q.layout, activation or q.activation),
    ]


def dense(q: QuantLinear) -> Callable[..., Tensor]:
    """``(x, bias) -> y`` of the layer, by torch's own operations on a dense weight."""
    weight, epilogue = q.dequantize(), EPILOGUES[q.activation]

    def run(x: Tensor, bias: Tensor | None = q.bias) -> Tensor:
        if q.weight_input_scale is not None:
            x = x / q.weight_input_scale
        return epilogue(nn.functional.linear(x, weight, bias))

    return run


class VisionBlock(nn.Module):
    """The encoder of a ViT with one block, tokens in, tokens out."""

    def __init__(self) -> None:
        super().__init__()
        config = Blip2VisionConfig(
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
            qkv_bias=True,
        )
        self.encoder = Blip2VisionModel(config).encoder

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(inputs_embeds=x).last_hidden_state


class QFormerLayer(nn.Module):
    """The encoder of a Q-Former with one layer, which looks at an image of five tokens; queries in, queries out."""

    image: Tensor

    def __init__(self) -> None:
        super().__init__()
        config = Blip2QFormerConfig(
            vocab_size=50,
            hidden_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=40,
            max_position_embeddings=64,
            encoder_hidden_size=WIDTH,
            cross_attention_frequency=1,
        )
        self.encoder = Blip2QFormerModel(config).encoder
        self.register_buffer("image", torch.randn(1, 5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        found = self.encoder(hidden_states=x, encoder_hidden_states=self.image, query_length=x.shape[1])
        return found.last_hidden_state


class LanguageBlock(nn.Module):
    """One decoder layer of OPT, tokens in, tokens out."""

    def __init__(self) -> None:
        super().__init__()
        config = OPTConfig(
            vocab_size=50,
            hidden_size=WIDTH,
            word_embed_proj_dim=WIDTH,
            ffn_dim=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
        )
        self.block = OPTModel(config).decoder.layers[0]

    def forward(self, x: Tensor) -> Tensor:
        found = self.block(hidden_states=x)
        return found[0] if isinstance(found, tuple) else found


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "vision": VisionBlock,
    "qformer": QFormerLayer,
    "language": LanguageBlock,
}


def block(kind: str) -> nn.Module:
    """A block of random weights, every linear of it packed."""
    module = BLOCKS[kind]().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    assert replace_linears(module, lambda _, linear: rounded(linear, QuantSpec(4, GROUP))) >= 4
    return module.requires_grad_(False)


def tokens(m: int) -> Tensor:
    return torch.randn(1, m, WIDTH)


class Counting:
    """A backend of torch.compile that runs what it is given, and counts how often it is given something."""

    def __init__(self) -> None:
        self.compiled = 0

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        self.compiled += 1
        return graph.forward
