"""Tiny stock models with every weight random, one of each kind that quantizers and checkpoints have to get right."""

import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    OPTConfig,
    T5Config,
)

VOCABULARY = 50
IMAGE = 16
QUERIES = 3


def _config(text_config: OPTConfig | T5Config) -> Blip2Config:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE,
        "patch_size": 8,
    }
    qformer = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 40,
        "max_position_embeddings": 64,
        "encoder_hidden_size": 32,
        "use_qformer_text_input": True,
    }
    return Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=text_config.to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=3,
        image_text_hidden_size=16,
    )


def _opt() -> torch.nn.Module:
    text = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return Blip2ForConditionalGeneration(_config(text))


def _t5() -> torch.nn.Module:
    text = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return Blip2ForConditionalGeneration(_config(text))


def _itm() -> torch.nn.Module:
    return Blip2ForImageTextRetrieval(_config(OPTConfig(hidden_size=32, num_hidden_layers=1)))


KINDS = {"opt": _opt, "t5": _t5, "itm": _itm}


def make(kind: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A model of kind opt, t5 or itm."""
    model = KINDS[kind]()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise if parameter.dim() > 1 else parameter + 0.05 * noise)
    return model.to(dtype).eval()


def batches(model: torch.nn.Module, count: int = 4) -> list[dict[str, object]]:
    """Calls of the model that reach every linear in its blocks."""
    generator = torch.Generator().manual_seed(3)
    found: list[dict[str, object]] = []
    for _ in range(count):
        words = torch.randint(4, VOCABULARY, (3, 7), generator=generator)
        words = torch.cat([torch.full((3, QUERIES), 3), words], dim=1)
        batch = {
            "pixel_values": torch.randn(3, 3, IMAGE, IMAGE, generator=generator),
            "input_ids": words,
            "attention_mask": torch.ones_like(words),
        }
        if isinstance(model, Blip2ForImageTextRetrieval):
            found += [{**batch, "use_image_text_matching_head": match} for match in (False, True)]
        elif hasattr(model.language_model, "encoder"):
            found.append({**batch, "labels": words[:, -4:]})
        else:
            found.append(batch)
    return found


def outputs(model: torch.nn.Module) -> torch.Tensor:
    """Logits, or matching scores, for one fixed input."""
    generator = torch.Generator().manual_seed(2)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    pixels = torch.randn(2, 3, IMAGE, IMAGE, generator=generator).to(dtype)
    words = torch.randint(4, VOCABULARY, (2, 5), generator=generator)
    with torch.no_grad():
        if isinstance(model, Blip2ForImageTextRetrieval):
            mask = torch.ones_like(words)
            return model(pixels, words, mask, use_image_text_matching_head=True).logits_per_image
        words = torch.cat([torch.full((2, QUERIES), 3), words], dim=1)
        labels = {"decoder_input_ids": words[:, -4:]} if hasattr(model.language_model, "encoder") else {}
        return model(pixel_values=pixels, input_ids=words, **labels).logits


def assert_same_outputs(model: torch.nn.Module, other: torch.nn.Module) -> None:
    """Equal up to what torch's own float kernels make of memory that starts elsewhere: the last bits of a sum."""
    torch.testing.assert_close(outputs(model), outputs(other))
