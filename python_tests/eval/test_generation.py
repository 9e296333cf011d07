"""Generation at the model's seams equals stock `generate`; prompts, decoding, batching, echoes."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_blip2 import QUERIES, blip2_itm, blip2_opt, blip2_t5, processor, write_image

from mmq_kernels.eval import ModelMismatch, PixelStore
from mmq_kernels.eval.generation import generate
from mmq_kernels.eval.generative import Query, run_queries
from mmq_kernels.eval.prompted import PromptedModel
from mmq_kernels.eval.protocol import Decoding, clean_caption, protocol_for
from mmq_kernels.eval.started import start

pytestmark = pytest.mark.filterwarnings("error:.*past_key_values:FutureWarning")  # the cache by its name

QUESTIONS = (
    "Question: what color is the big circle? Short answer:",
    "Question: how many? Short answer:",
    "Question: is there a small red star on the left of the square? Short answer:",
)
FAMILIES = [pytest.param(blip2_opt, True, id="opt"), pytest.param(blip2_t5, False, id="t5")]


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return [write_image(tmp_path / f"{i}.png", seed=i) for i in range(3)]


@pytest.mark.parametrize(("make", "bos"), FAMILIES)
@pytest.mark.parametrize("beams", [1, 5])
def test_answers_equal_stock_generate(make, bos: bool, beams: int, images: list[Path]) -> None:  # type: ignore[no-untyped-def]
    stock, owner = make(), processor(bos)
    model, pixels = PromptedModel(stock, owner), PixelStore(owner)(images)
    decoding = Decoding(6, beams, min_new_tokens=1, length_penalty=-1.0)
    started = start(model, [model.encode(text) for text in QUESTIONS], model.image_features(pixels))
    texts, tokens = generate(model, started, decoding)
    assert 0 < tokens <= 6 * len(texts)
    for i, text in enumerate(QUESTIONS):
        inputs = owner(images=None, text=text, return_tensors="pt")
        inputs = {name: values for name, values in inputs.items() if name in ("input_ids", "attention_mask")}
        image_part = torch.full((1, QUERIES), 3)
        inputs["input_ids"] = torch.cat([image_part, inputs["input_ids"]], 1)
        inputs["attention_mask"] = torch.cat([torch.ones_like(image_part), inputs["attention_mask"]], 1)
        output = stock.generate(pixel_values=pixels[i : i + 1], **inputs, **decoding.arguments())
        whole = owner.tokenizer.batch_decode(output, skip_special_tokens=True)[0].strip()
        echo = owner.tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True) if bos else ""
        assert whole.removeprefix(echo).strip() == texts[i]


def test_encoding_equals_the_processor(images: list[Path]) -> None:
    owner = processor()
    model = PromptedModel(blip2_opt(), owner)
    for text in QUESTIONS:
        both = owner(images=Image.open(images[0]), text=text)
        assert model.encode(text) == list(both["input_ids"][0])


def test_captioning_equals_stock_generate_without_text(images: list[Path]) -> None:
    stock, owner = blip2_opt(), processor()
    model, pixels = PromptedModel(stock, owner), PixelStore(owner)(images)
    decoding = protocol_for(stock, "caption").decoding
    texts, _ = generate(model, start(model, [model.encode(None)] * 3, model.image_features(pixels)), decoding)
    stock_output = stock.generate(pixel_values=pixels, max_new_tokens=30, do_sample=False)
    expected = owner.tokenizer.batch_decode(stock_output, skip_special_tokens=True)
    assert texts == [text.strip() for text in expected]
    assert len(set(texts)) > 1, "the image must matter"


@pytest.mark.parametrize(("make", "bos"), FAMILIES)
@pytest.mark.parametrize("beams", [1, 3])
def test_answers_do_not_depend_on_the_batch(make, bos: bool, beams: int, images: list[Path]) -> None:  # type: ignore[no-untyped-def]
    owner = processor(bos)
    model, store = PromptedModel(make(), owner), PixelStore(owner)
    queries = [Query(image, text, ()) for text in QUESTIONS for image in images]
    runs = [
        [reply.text for reply in run_queries(model, queries, store, decoding=Decoding(5, beams), batch_size=size)[0]]
        for size in (1, 2, 4, 64)
    ]
    assert all(run == runs[0] for run in runs)
    assert len(set(runs[0])) > 1


def test_echoed_prompt_is_cut_in_either_version(images: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    owner = processor()
    model = PromptedModel(blip2_opt(), owner)
    features = model.image_features(PixelStore(owner)(images))
    prompts = [model.encode(text) for text in QUESTIONS]
    decoding = Decoding(4)
    expected, _ = generate(model, start(model, prompts, features), decoding)
    assert all("question" not in text for text in expected)
    stock = model.language.generate

    def other_version(**inputs):  # type: ignore[no-untyped-def]
        output, width = stock(**inputs), inputs["input_ids"].shape[1]
        echoed = torch.equal(output[:, :width], inputs["input_ids"])
        return output[:, width:] if echoed else torch.cat([inputs["input_ids"], output], 1)

    monkeypatch.setattr(model.language, "generate", other_version)
    assert generate(model, start(model, prompts, features), decoding)[0] == expected


def test_an_image_is_encoded_once_for_all_its_questions(images: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    owner = processor()
    model = PromptedModel(blip2_opt(), owner)
    seen = []
    original = model.image_features
    monkeypatch.setattr(model, "image_features", lambda pixels: seen.append(len(pixels)) or original(pixels))
    queries = [Query(image, text, ("red",)) for text in QUESTIONS for image in images]
    progress: list[tuple[int, int]] = []
    run_queries(
        model,
        queries,
        PixelStore(owner),
        decoding=Decoding(2),
        batch_size=2,
        progress=lambda done, total: progress.append((done, total)),
    )
    assert seen == [2, 1]
    assert progress == [(6, 9), (9, 9)]


def test_tokens_after_the_end_do_not_count(images: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    owner = processor()
    model = PromptedModel(blip2_opt(), owner)
    features = model.image_features(PixelStore(owner)(images[:2]))
    answers = torch.tensor([[9, 1, 0, 0], [9, 10, 11, 1]])
    monkeypatch.setattr(model.language, "generate", lambda **inputs: torch.cat([inputs["input_ids"], answers], dim=1))
    started = start(model, [model.encode(text) for text in QUESTIONS[:2]], features)
    texts, tokens = generate(model, started, Decoding(4))
    assert tokens == 2 + 4
    assert texts == [owner.tokenizer.decode([9]), owner.tokenizer.decode([9, 10, 11])]


def test_a_prompt_without_image_tokens_is_refused(images: list[Path]) -> None:
    owner = processor()
    model = PromptedModel(blip2_opt(), owner)
    features = model.image_features(PixelStore(owner)(images[:1]))
    with pytest.raises(ModelMismatch, match="holds 0 image tokens where the model expects 3"):
        start(model, [[1, 5, 6]], features)


def test_model_and_processor_must_agree_about_the_image() -> None:
    owner = processor()
    owner.num_query_tokens = 32
    with pytest.raises(ModelMismatch, match="the processor writes 32 image tokens, the model expects 3"):
        PromptedModel(blip2_opt(), owner)
    model = blip2_opt()
    model.config.image_token_index = 5
    with pytest.raises(ModelMismatch, match="the image token is 3 in the tokenizer, 5 in the model's config"):
        PromptedModel(model, processor())
    model.config.image_token_index = None
    with pytest.raises(ModelMismatch, match="no image_token_index"):
        PromptedModel(model, processor())


def test_a_prompt_without_anything_to_begin_with_is_refused() -> None:
    stock = blip2_opt()
    stock.config.text_config.bos_token_id = None
    with pytest.raises(ModelMismatch, match="no start token to begin a text with"):
        PromptedModel(stock, processor()).encode(None)


def test_likelihoods_leave_the_answers_alone(images: list[Path]) -> None:
    owner = processor()
    model, store = PromptedModel(blip2_opt(), owner), PixelStore(owner)
    runs = [
        run_queries(
            model, [Query(image, text, references) for text in QUESTIONS for image in images], store,
            decoding=Decoding(5, 3), batch_size=4,
        )[0]
        for references in ((), ("red",), ("a big red star and a circle", "two", "no"))
    ]  # fmt: skip
    assert [reply.text for reply in runs[0]] == [reply.text for reply in runs[1]]
    assert [reply.text for reply in runs[0]] == [reply.text for reply in runs[2]]
    assert runs[0][0].nll is None and runs[1][0].nll_tokens == 1 and runs[2][0].nll_tokens == 9


def test_a_retrieval_model_does_not_generate() -> None:
    with pytest.raises(ModelMismatch, match="needs a model with language_projection, Blip2ForImageTextRetrieval"):
        PromptedModel(blip2_itm(), processor())


def test_protocol_is_the_study_s() -> None:
    opt, t5 = blip2_opt(), blip2_t5()
    vqa = protocol_for(opt, "vqa")
    assert vqa.text("how many?") == "Question: how many? Short answer:"
    assert vqa.decoding == Decoding(10, 5, min_new_tokens=1, length_penalty=0.0)
    assert protocol_for(t5, "vqa").decoding.length_penalty == -1.0
    caption = protocol_for(opt, "caption")
    assert caption.text() is None and caption.decoding.num_beams == 1
    assert vqa.decoding.arguments() == {
        "do_sample": False,
        "num_beams": 5,
        "max_new_tokens": 10,
        "min_new_tokens": 1,
        "length_penalty": 0.0,
    }
    opt.config.text_config.model_type = "novel"
    with pytest.raises(ModelMismatch, match=r"no prompt for task vqa with blip-2 over novel; known: .*blip-2 with opt"):
        protocol_for(opt, "vqa")


def test_captions_are_cleaned_as_blip2_was_trained() -> None:
    assert clean_caption("A man: riding (a wave).  \nTwo!") == "a man riding a wave two!".removesuffix("!")
    assert clean_caption(" ".join(["word"] * 80)).count("word") == 50
