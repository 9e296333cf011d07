"""Stock BLIP-2 classes with random weights, small enough for a test, and data in the publishers' layouts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessor,
    OPTConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

WORDS = (
    *(
        "question",
        "short",
        "answer",
        ":",
        "?",
        ".",
        "a",
        "an",
        "the",
        "of",
        "and",
        "or",
        "is",
        "there",
        "on",
        "in",
    ),
    *("red", "green", "blue", "white", "black", "circle", "square", "star", "big", "small", "what", "color"),
    *("shape", "where", "left", "right", "one", "two", "three", "four", "yes", "no", "how", "many", "things"),
)
QUERIES = 3
SIZE = 16


def tokenizer(start: bool) -> PreTrainedTokenizerFast:
    """Words; `<image>` is known; `start` puts </s> in front of every text, as OPT's tokenizer does."""
    vocabulary = ["<pad>", "</s>", "<unk>", "<image>", *WORDS]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if start:
        core.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )


def processor(start: bool = True) -> Blip2Processor:
    images = BlipImageProcessor(size={"height": SIZE, "width": SIZE})
    return Blip2Processor(images, tokenizer(start), num_query_tokens=QUERIES)


def _config(text_config: OPTConfig | T5Config) -> Blip2Config:
    vision = Blip2VisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=8,
        initializer_range=0.2,
    )
    qformer = Blip2QFormerConfig(
        vocab_size=len(WORDS) + 4,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        encoder_hidden_size=32,
        cross_attention_frequency=2,
        use_qformer_text_input=True,
        initializer_range=0.2,
        pad_token_id=0,
    )
    config = Blip2Config(
        vision_config=vision.to_dict(),
        qformer_config=qformer.to_dict(),
        text_config=text_config.to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=3,
        image_text_hidden_size=16,
    )
    config.initializer_range = 0.2
    return config


def _randomized(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(0.3 * noise)
            else:
                parameter.add_(0.03 * noise)
    return model.eval()


def blip2_opt() -> Blip2ForConditionalGeneration:
    text = OPTConfig(
        vocab_size=len(WORDS) + 4,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=96,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return _randomized(Blip2ForConditionalGeneration(_config(text)))


def blip2_t5() -> Blip2ForConditionalGeneration:
    text = T5Config(
        vocab_size=len(WORDS) + 4,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return _randomized(Blip2ForConditionalGeneration(_config(text)))


def blip2_itm() -> Blip2ForImageTextRetrieval:
    return _randomized(Blip2ForImageTextRetrieval(_config(OPTConfig(hidden_size=32, num_hidden_layers=1))))


def write_image(path: Path, seed: int) -> Path:
    """Noise of a color that depends on `seed`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, 3) * 0.7 + generator.integers(0, 64, (20, 24, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def write_json(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_coco(folder: Path, images: int = 6, split: str = "val") -> Path:
    """COCO captions, two references an image; returns the annotation file."""
    year = f"{split}2017"
    for i in range(images):
        write_image(folder / year / f"{i:012d}.jpg", seed=i)
    shapes, colors = ("circle", "square", "star"), ("red", "green", "blue")
    return write_json(
        folder / "annotations" / f"captions_{year}.json",
        {
            "images": [{"id": i, "file_name": f"{i:012d}.jpg"} for i in range(images)],
            "annotations": [
                {
                    "id": 2 * i + j,
                    "image_id": i,
                    "caption": f"A {('big', 'small')[j]} {colors[i % 3]} {shapes[i // 3 % 3]}.",
                }
                for i in range(images)
                for j in range(2)
            ],
        },
    )


def write_vqa(folder: Path, images: int = 4, split: str = "val") -> tuple[Path, Path]:
    """VQAv2, three questions of different lengths an image; returns questions and annotations."""
    year = f"{split}2014"
    for i in range(images):
        write_image(folder / year / f"COCO_{year}_{i:012d}.jpg", seed=100 + i)
    texts = (
        "what color is the big circle?",
        "how many?",
        "is there a small red star on the left of the square?",
    )
    answers = (["red"] * 8 + ["blue"] * 2, ["2"] * 10, ["yes"] * 6 + ["no"] * 4)
    kinds = ("other", "number", "yes/no")
    questions = [
        {"image_id": i, "question_id": 10 * i + q, "question": texts[q]} for i in range(images) for q in range(3)
    ]
    annotations = [
        {
            "image_id": i,
            "question_id": 10 * i + q,
            "answer_type": kinds[q],
            "question_type": texts[q].split()[0],
            "multiple_choice_answer": answers[q][0],
            "answers": [
                {"answer": a, "answer_id": n + 1, "answer_confidence": "yes"} for n, a in enumerate(answers[q])
            ],
        }
        for i in range(images)
        for q in range(3)
    ]
    return (
        write_json(folder / "questions" / f"v2_OpenEnded_mscoco_{year}_questions.json", {"questions": questions}),
        write_json(folder / "annotations" / f"v2_mscoco_{year}_annotations.json", {"annotations": annotations}),
    )


def write_flickr(folder: Path, images: int = 6, split: str = "test") -> Path:
    """Flickr30k as a list, two captions an image; returns the annotation file."""
    colors, shapes = ("red", "green", "blue", "white", "black"), ("star", "circle", "square")
    kind = "" if split == "test" else split
    names = [f"flickr30k-images/{kind}{i}.jpg" for i in range(images)]
    for i, name in enumerate(names):
        write_image(folder / name, seed=200 + i)
    content = [
        {
            "image": name,
            "caption": [
                f"A {colors[i % 5]} {shapes[i % 3]}.",
                f"a big {shapes[i % 3]} and {colors[i % 5]} left, right",
            ],
        }
        for i, name in enumerate(names)
    ]
    return write_json(folder / "annotations" / f"flickr30k_{split}.json", content)


def write_gqa(folder: Path, images: int = 4, split: str = "testdev") -> Path:
    """GQA, three questions of different kinds an image; returns the question file."""
    kind = "n" if split == "testdev" else split
    kinds = (("query", "attr"), ("verify", "obj"), ("choose", "rel"))
    asked = (
        ("What color is the circle?", "red"),
        ("Is there a star?", "yes"),
        ("Is the star left or right?", "left"),
    )
    content = {}
    for i in range(images):
        write_image(folder / "images" / f"{kind}{i}.jpg", seed=300 + i)
        for q, ((question, answer), (structural, semantic)) in enumerate(zip(asked, kinds, strict=True)):
            content[f"{i:03d}{q}"] = {
                "question": question,
                "answer": answer,
                "imageId": f"{kind}{i}",
                "isBalanced": True,
                "types": {"structural": structural, "semantic": semantic, "detailed": "any"},
                "fullAnswer": f"It is {answer}.",
                "annotations": {"question": {}, "answer": {}},
            }
    return write_json(folder / "questions" / f"{split}_balanced_questions.json", content)
