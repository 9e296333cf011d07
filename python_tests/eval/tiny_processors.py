"""Stock processors of the families in `tiny_families`, over one tokenizer of words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as tf
from tiny_blip2 import WORDS
from tiny_families import IMAGE, IMAGE_TOKEN, PATCH, VIDEO_TOKEN, VISION_END, VISION_START, VOCABULARY
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} answer :{% endif %}"
)


def tokenizer(image: str = "<image>", video: str = "<video>", **more: Any) -> tf.PreTrainedTokenizerFast:
    """Words; images and videos stand where the models expect them; pads on the right unless told otherwise."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *WORDS, "user", "single", "word"]
    words += [f"<{i}>" for i in range(len(words), IMAGE_TOKEN)]
    words += [image, video, "<|vision_start|>", "<|vision_end|>"]
    assert [words.index(w) for w in words[-4:]] == [IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END]
    assert len(words) == VOCABULARY
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=words[-4:],
        padding_side="right",
        **more,
    )


def _llava() -> Any:
    images = tf.CLIPImageProcessor(size={"height": IMAGE, "width": IMAGE}, do_center_crop=False)
    return tf.LlavaProcessor(
        images,
        tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _llava_next() -> Any:
    images = tf.LlavaNextImageProcessor(
        size={"shortest_edge": IMAGE},
        crop_size={"height": IMAGE, "width": IMAGE},
        image_grid_pinpoints=[[2 * IMAGE, IMAGE]],
    )
    return tf.LlavaNextProcessor(
        images,
        tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )


class _Qwen2VLProcessor(tf.Qwen2VLProcessor):
    """Its video processor needs torchvision, its tokenizer a class of its own; neither matters here."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return type(argument)


def _qwen2_vl() -> Any:
    side = {"shortest_edge": IMAGE * IMAGE, "longest_edge": IMAGE * IMAGE}
    images = tf.Qwen2VLImageProcessor(size=side, patch_size=PATCH, merge_size=2)
    return _Qwen2VLProcessor(
        images,
        tokenizer("<|image_pad|>", "<|video_pad|>"),
        video_processor=None,
        chat_template=TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )


def _instructblip() -> Any:
    images = tf.BlipImageProcessor(size={"height": IMAGE, "width": IMAGE})
    return tf.InstructBlipProcessor(images, tokenizer(), qformer_tokenizer=tokenizer(), num_query_tokens=3)


def _clip() -> Any:
    images = tf.CLIPImageProcessor(size={"height": IMAGE, "width": IMAGE}, do_center_crop=False)
    return tf.CLIPProcessor(images, tokenizer())


def _siglip() -> Any:
    images = tf.SiglipImageProcessor(size={"height": IMAGE, "width": IMAGE})
    return tf.SiglipProcessor(images, tokenizer())


PROCESSORS: dict[str, Callable[[], Any]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "qwen2_vl": _qwen2_vl,
    "instructblip": _instructblip,
    "clip": _clip,
    "siglip": _siglip,
}
