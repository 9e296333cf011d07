"""The shipped miniatures: stock transformers classes built from small configs, with tokenizer and processor."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    OPTConfig,
    PreTrainedTokenizerFast,
)

from mmq_kernels.demo.scenes import NUMBERS, SIDE, captions, make_scene, questions

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
PROMPT = "Question: {} Short answer:"
DESCRIBE, ASK = "Describe the image in one sentence.", "{} Answer in a word or two."
"""What LLaVA is asked."""
QUERIES = 8
PATCH = 8
PATCHES = (SIDE // PATCH) ** 2
ITM_TEXT_LENGTH = 35
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
PAD, BOS, EOS, UNK, IMAGE = range(len(SPECIAL))

VISION_WIDTH = 128
QFORMER_WIDTH = 192
_TEXT_WIDTH = 128
_INIT_STD = 0.07
"""Wide initial weights stay wide: it is what makes the trained parts feel low bits (see the model card)."""


def vocabulary(*, retrieval: bool) -> list[str]:
    """Special tokens, then every word of captions, questions, answers and the prompt.

    Those of questions that are taught alone (see `scenes.questions`) are not for the matching model.
    """
    split = pre_tokenizers.Whitespace()
    words = {*NUMBERS, "yes", "no", "question", "short", "answer", ":"}
    rng = random.Random(0)
    for seed in range(4000):
        scene = make_scene(seed)
        texts = [*captions(scene), *(f"{q.text} {q.answer}" for q in questions(scene, 6, rng, taught=not retrieval))]
        words |= {word for text in texts for word, _ in split.pre_tokenize_str(text)}
    return [*SPECIAL, *sorted(words)]


def make_tokenizer(*, retrieval: bool, more: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """One word, one token; lower case; `<s>` in front and, for the matching model, `</s>` behind."""
    words = vocabulary(retrieval=retrieval)
    words += sorted(set(more) - set(words))
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " ")])
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if retrieval else "<s> $A", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        cls_token="<s>",
        sep_token="</s>",
        additional_special_tokens=["<image>"],
        padding_side="right" if retrieval else "left",
        model_max_length=96,
        clean_up_tokenization_spaces=True,
    )


def make_processor(*, retrieval: bool) -> Blip2Processor:
    """The processor of the generation model, or of the image-text-matching one."""
    images = BlipImageProcessor(
        size={"height": SIDE, "width": SIDE}, image_mean=list(IMAGE_MEAN), image_std=list(IMAGE_STD)
    )
    return Blip2Processor(images, make_tokenizer(retrieval=retrieval), num_query_tokens=QUERIES)


def _config(*, retrieval: bool) -> Blip2Config:
    words = len(vocabulary(retrieval=retrieval))
    vision = Blip2VisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=4 * VISION_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=8,
        initializer_range=_INIT_STD,  # the class' default is 1e-10
    )
    qformer = Blip2QFormerConfig(
        vocab_size=words,
        hidden_size=QFORMER_WIDTH,
        intermediate_size=2 * QFORMER_WIDTH,
        num_hidden_layers=4 if retrieval else 3,
        num_attention_heads=4,
        cross_attention_frequency=1,
        encoder_hidden_size=VISION_WIDTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=64,
        pad_token_id=PAD,
        initializer_range=_INIT_STD,
        use_qformer_text_input=retrieval,
    )
    text = OPTConfig(
        vocab_size=words,
        hidden_size=_TEXT_WIDTH,
        word_embed_proj_dim=_TEXT_WIDTH,
        ffn_dim=4 * _TEXT_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
        dropout=0.0,
        attention_dropout=0.0,
        layerdrop=0.0,
        init_std=_INIT_STD,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return Blip2Config(
        vision_config=vision.to_dict(),
        qformer_config=qformer.to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=QUERIES,
        image_text_hidden_size=64,
        image_token_index=IMAGE,
        initializer_range=_INIT_STD,
    )


_LLAVA_WORDS = (
    "describe",
    "the",
    "image",
    "in",
    "one",
    "sentence",
    "answer",
    "a",
    "word",
    "or",
    "two",
    "assistant",
    ".",
)
_CHAT = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %} ASSISTANT: {% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def make_llava_processor() -> LlavaProcessor:
    """The processor of the miniature LLaVA; one `<image>` becomes as many as there are patches."""
    tokenizer = make_tokenizer(retrieval=False, more=_LLAVA_WORDS)
    tokenizer.model_max_length = 192
    images = CLIPImageProcessor(
        size={"height": SIDE, "width": SIDE},
        do_center_crop=False,
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=_CHAT,
    )


def make_llava() -> LlavaForConditionalGeneration:
    """An untrained LLaVA with a CLIP tower and a Llama; weights drawn from torch's global generator."""
    vision = CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=4 * VISION_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        initializer_factor=_INIT_STD / 0.02,
    )
    text = LlamaConfig(
        vocab_size=len(make_llava_processor().tokenizer),
        hidden_size=_TEXT_WIDTH,
        intermediate_size=5 * _TEXT_WIDTH // 2,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=_INIT_STD,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        image_seq_length=PATCHES,
        initializer_range=_INIT_STD,  # type: ignore[call-arg]
        tie_word_embeddings=False,
    )
    asked = {"caption": DESCRIBE, "vqa": ASK, "gqa": ASK}  # what it is trained on, for whoever evaluates it
    config.task_specific_params = {task: {"prompt": prompt} for task, prompt in asked.items()}
    return LlavaForConditionalGeneration(config)


def make_blip2() -> Blip2ForConditionalGeneration:
    """An untrained BLIP-2 with an OPT decoder; weights drawn from torch's global generator."""
    return _with_queries(Blip2ForConditionalGeneration(_config(retrieval=False)))


def make_retrieval() -> Blip2ForImageTextRetrieval:
    """An untrained BLIP-2 for image-text matching; weights drawn from torch's global generator."""
    return _with_queries(Blip2ForImageTextRetrieval(_config(retrieval=True)))


def _with_queries(model):
    model.query_tokens.data.normal_(0, 1)  # the class starts them at zero, all alike
    return model
