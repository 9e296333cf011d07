"""One tiny model of every family, all weights random, with calls that reach every linear in its blocks.

Built from transformers' own config classes; the sizes are the smallest that the architectures allow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf

VOCABULARY = 64
IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END = 60, 61, 62, 63
IMAGE, PATCH = 32, 8
PATCHES = (IMAGE // PATCH) ** 2

Batch = dict[str, Any]


@dataclass(frozen=True)
class Tiny:
    """A model class with its config, and the arguments of a call with a given seed."""

    model_class: str
    config: Callable[[], Any]
    batch: Callable[[torch.Generator], Batch]

    def make(self, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        torch.manual_seed(0)
        model = getattr(tf, self.model_class)(self.config())
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.2 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
        return model.to(dtype).eval()

    def calls(self, count: int = 3, dtype: torch.dtype = torch.float32) -> list[Batch]:
        generator = torch.Generator().manual_seed(3)
        batches = [self.batch(generator) for _ in range(count)]
        return [
            {key: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for key, v in b.items()}
            for b in batches
        ]


def logits(output: Any) -> torch.Tensor:
    """What a model is judged by, flat: logits, or the embeddings of an encoder."""
    for name in ("logits", "logits_per_image", "last_hidden_state", "pooler_output"):
        if getattr(output, name, None) is not None:
            return getattr(output, name).flatten()
    raise AssertionError(f"{type(output).__name__} has no output to compare")


def _text(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        **more,
    }


def _vision(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": IMAGE,
        "patch_size": PATCH,
        **more,
    }


def _words(generator: torch.Generator, images: int, start: tuple[int, ...] = (), end: tuple[int, ...] = ()) -> Batch:
    """Two prompts, each with `images` image tokens in its middle."""
    before, after = (torch.randint(3, 60, (2, count), generator=generator) for count in (3, 4))
    middle = torch.tensor([*start, *([IMAGE_TOKEN] * images), *end], dtype=torch.long).expand(2, -1)
    ids = torch.cat([before, middle, after], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _pixels(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


def _llava(generator: torch.Generator) -> Batch:
    return {**_words(generator, PATCHES), "pixel_values": _pixels(generator, 2, 3, IMAGE, IMAGE)}


def _anyres(generator: torch.Generator) -> Batch:
    """A base image and a 2 x 1 grid of tiles, with a newline behind each row of patches."""
    side = IMAGE // PATCH
    tokens = PATCHES + 2 * side * (side + 1)
    return {
        **_words(generator, tokens),
        "pixel_values": _pixels(generator, 2, 3, 3, IMAGE, IMAGE),
        "image_sizes": torch.tensor([[2 * IMAGE, IMAGE]] * 2),
    }


def _qwen(generator: torch.Generator) -> Batch:
    """Images of 4 x 4 patches, merged two by two."""
    columns = 3 * 2 * PATCH * PATCH
    words = _words(generator, PATCHES // 4, (VISION_START,), (VISION_END,))
    return {
        **words,
        "pixel_values": _pixels(generator, 2 * PATCHES, columns),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "mm_token_type_ids": (words["input_ids"] == IMAGE_TOKEN).int(),
    }


def _qwen2_5(generator: torch.Generator) -> Batch:
    return _qwen(generator)


def _idefics(generator: torch.Generator) -> Batch:
    return {**_words(generator, PATCHES // 4), "pixel_values": _pixels(generator, 2, 1, 3, IMAGE, IMAGE)}


def _gemma(generator: torch.Generator) -> Batch:
    words = _words(generator, PATCHES)
    kinds = (words["input_ids"] == IMAGE_TOKEN).long()
    return {**words, "token_type_ids": kinds, "pixel_values": _pixels(generator, 2, 3, IMAGE, IMAGE)}


def _gemma3(generator: torch.Generator) -> Batch:
    words = _words(generator, 4)
    kinds = (words["input_ids"] == IMAGE_TOKEN).long()
    return {**words, "token_type_ids": kinds, "pixel_values": _pixels(generator, 2, 3, IMAGE, IMAGE)}


def _mllama(generator: torch.Generator) -> Batch:
    words = _words(generator, 1)
    length = words["input_ids"].shape[1]
    return {
        **words,
        "pixel_values": _pixels(generator, 2, 1, 2, 3, IMAGE, IMAGE),
        "aspect_ratio_ids": torch.full((2, 1), 2),
        "aspect_ratio_mask": torch.ones(2, 1, 2, dtype=torch.long),
        "cross_attention_mask": torch.ones(2, length, 1, 2, dtype=torch.long),
    }


def _internvl(generator: torch.Generator) -> Batch:
    return {**_words(generator, PATCHES // 4), "pixel_values": _pixels(generator, 2, 3, IMAGE, IMAGE)}


def _instructblip(generator: torch.Generator) -> Batch:
    words = _words(generator, 3)
    question = torch.randint(3, 60, (2, 5), generator=generator)
    return {
        **words,
        "pixel_values": _pixels(generator, 2, 3, IMAGE, IMAGE),
        "qformer_input_ids": question,
        "qformer_attention_mask": torch.ones_like(question),
    }


def _dual(generator: torch.Generator) -> Batch:
    words = torch.randint(3, 60, (2, 8), generator=generator)
    return {"input_ids": words, "pixel_values": _pixels(generator, 2, 3, IMAGE, IMAGE)}


def _language(generator: torch.Generator) -> Batch:
    words = torch.randint(3, 60, (2, 9), generator=generator)
    return {"input_ids": words, "attention_mask": torch.ones_like(words)}


def _image(generator: torch.Generator) -> Batch:
    return {"pixel_values": _pixels(generator, 2, 3, IMAGE, IMAGE)}


def _clip_vision(**more: Any) -> Any:
    return tf.CLIPVisionConfig(**_vision(), **more)


def _instructblip_config() -> Any:
    qformer = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 40,
        "max_position_embeddings": 64,
        "encoder_hidden_size": 32,
    }
    return tf.InstructBlipConfig(
        vision_config=_vision(),
        qformer_config=qformer,
        text_config=tf.LlamaConfig(**_text()).to_dict(),
        num_query_tokens=3,
        image_token_index=IMAGE_TOKEN,
    )


def _llava_config() -> Any:
    return tf.LlavaConfig(
        vision_config=_clip_vision(), text_config=tf.LlamaConfig(**_text()), image_token_index=IMAGE_TOKEN
    )


def _pixtral_config() -> Any:
    vision = tf.PixtralVisionConfig(**_vision())
    return tf.LlavaConfig(
        vision_config=vision,
        text_config=tf.MistralConfig(**_text()),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def _pixtral(generator: torch.Generator) -> Batch:
    return {**_llava(generator), "image_sizes": torch.tensor([[IMAGE, IMAGE]] * 2)}


def _next_config() -> Any:
    return tf.LlavaNextConfig(
        vision_config=_clip_vision(),
        text_config=tf.MistralConfig(**_text()),
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=[[2 * IMAGE, IMAGE]],
        image_seq_length=PATCHES,
    )


def _onevision_config() -> Any:
    return tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**_vision(vision_use_head=False)),
        text_config=tf.Qwen2Config(**_text()),
        image_token_index=IMAGE_TOKEN,
        video_token_index=VIDEO_TOKEN,
        image_grid_pinpoints=[[2 * IMAGE, IMAGE]],
        vision_feature_layer=-1,
    )


_QWEN_TOKENS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": VIDEO_TOKEN,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
_ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}


def _qwen2_config() -> Any:
    vision = {"depth": 3, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": PATCH}
    return tf.Qwen2VLConfig(
        vision_config={**vision, "spatial_merge_size": 2}, text_config=_text(rope_scaling=_ROPE), **_QWEN_TOKENS
    )


def _qwen2_5_config() -> Any:
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "out_hidden_size": 32,
        "intermediate_size": 44,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "window_size": 2 * PATCH * 2,
        "fullatt_block_indexes": [1],
    }
    return tf.Qwen2_5_VLConfig(vision_config=vision, text_config=_text(rope_scaling=_ROPE), **_QWEN_TOKENS)


def _qwen3_config() -> Any:
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "out_hidden_size": 32,
        "intermediate_size": 40,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    return tf.Qwen3VLConfig(vision_config=vision, text_config=_text(rope_scaling=_ROPE, head_dim=8), **_QWEN_TOKENS)


def _idefics_config(name: str) -> Any:
    return getattr(tf, f"{name}Config")(
        vision_config=_vision(),
        text_config=tf.LlamaConfig(**_text()),
        image_token_id=IMAGE_TOKEN,
        scale_factor=2,
        tie_word_embeddings=False,
        pad_token_id=0,
    )


def _paligemma_config() -> Any:
    return tf.PaliGemmaConfig(
        vision_config=tf.SiglipVisionConfig(**_vision(vision_use_head=False)),
        text_config=tf.GemmaConfig(**_text(head_dim=8)),
        image_token_index=IMAGE_TOKEN,
        vocab_size=VOCABULARY,
        projection_dim=32,
    )


def _gemma3_config() -> Any:
    return tf.Gemma3Config(
        vision_config=tf.SiglipVisionConfig(**_vision(vision_use_head=False)),
        text_config=tf.Gemma3TextConfig(**_text(head_dim=8, sliding_window=8, query_pre_attn_scalar=8)),
        image_token_index=IMAGE_TOKEN,
        mm_tokens_per_image=4,
    )


def _mllama_config() -> Any:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_global_layers": 2,
        "attention_heads": 2,
        "image_size": IMAGE,
        "patch_size": PATCH,
        "max_num_tiles": 2,
        "vision_output_dim": 64,
        "intermediate_layers_indices": [1],
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    }
    return tf.MllamaConfig(
        vision_config=vision,
        text_config=_text(cross_attention_layers=[1], rope_scaling={"rope_type": "default", "rope_theta": 10000.0}),
        image_token_index=IMAGE_TOKEN,
    )


def _internvl_config() -> Any:
    vision = _vision(image_size=[IMAGE, IMAGE], patch_size=[PATCH, PATCH])
    return tf.InternVLConfig(
        vision_config=vision,
        text_config=tf.Qwen2Config(**_text()),
        image_token_id=IMAGE_TOKEN,
        image_seq_length=PATCHES // 4,
        downsample_ratio=0.5,
    )


def _dual_text() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def _clip_config() -> Any:
    return tf.CLIPConfig(text_config=_dual_text(), vision_config=_vision(projection_dim=24), projection_dim=24)


def _siglip_config() -> Any:
    return tf.SiglipConfig(text_config=_dual_text(), vision_config=_vision())


def _opt_config() -> Any:
    return tf.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=24,
        ffn_dim=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=64,
        do_layer_norm_before=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


GENERATION = "ForConditionalGeneration"

TINY = {
    "instructblip": Tiny(f"InstructBlip{GENERATION}", _instructblip_config, _instructblip),
    "llava": Tiny(f"Llava{GENERATION}", _llava_config, _llava),
    "pixtral": Tiny(f"Llava{GENERATION}", _pixtral_config, _pixtral),
    "llava_next": Tiny(f"LlavaNext{GENERATION}", _next_config, _anyres),
    "llava_onevision": Tiny(f"LlavaOnevision{GENERATION}", _onevision_config, _anyres),
    "qwen2_vl": Tiny(f"Qwen2VL{GENERATION}", _qwen2_config, _qwen),
    "qwen2_5_vl": Tiny(f"Qwen2_5_VL{GENERATION}", _qwen2_5_config, _qwen2_5),
    "qwen3_vl": Tiny(f"Qwen3VL{GENERATION}", _qwen3_config, _qwen),
    "idefics3": Tiny(f"Idefics3{GENERATION}", lambda: _idefics_config("Idefics3"), _idefics),
    "smolvlm": Tiny(f"SmolVLM{GENERATION}", lambda: _idefics_config("SmolVLM"), _idefics),
    "paligemma": Tiny(f"PaliGemma{GENERATION}", _paligemma_config, _gemma),
    "gemma3": Tiny(f"Gemma3{GENERATION}", _gemma3_config, _gemma3),
    "mllama": Tiny(f"Mllama{GENERATION}", _mllama_config, _mllama),
    "internvl": Tiny(f"InternVL{GENERATION}", _internvl_config, _internvl),
    "clip": Tiny("CLIPModel", _clip_config, _dual),
    "siglip": Tiny("SiglipModel", _siglip_config, _dual),
    "llama": Tiny("LlamaForCausalLM", lambda: tf.LlamaConfig(**_text()), _language),
    "opt": Tiny("OPTForCausalLM", _opt_config, _language),
    "vit": Tiny("ViTForImageClassification", lambda: tf.ViTConfig(**_vision()), _image),
}
