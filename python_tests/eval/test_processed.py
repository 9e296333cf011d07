"""Models asked through their own processors: answers are stock `generate`'s, likelihoods those of a forward pass."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_blip2 import write_coco, write_flickr, write_image, write_vqa
from tiny_families import TINY
from tiny_processors import PROCESSORS, tokenizer

from mmq_kernels import checkpoint
from mmq_kernels.demo import check_llava, weights_folder
from mmq_kernels.demo.world import WorldSize, write_world
from mmq_kernels.eval import DataError, EvalOptions, ModelMismatch, evaluate, load
from mmq_kernels.eval.generative import Query
from mmq_kernels.eval.processed import ProcessedModel, run_processed
from mmq_kernels.eval.protocol import Decoding, Protocol, lay_out, protocol_for

GENERATIVE = [name for name, tiny in TINY.items() if tiny.model_class.endswith("ForConditionalGeneration")]
WITH_PROCESSOR = [name for name in PROCESSORS if name not in ("clip", "siglip")]
QUESTIONS = ("what color is the big circle?", "how many?", "is there a small red star on the left of the square?")


class _Named:
    """Stands for a processor where inputs are made by hand."""

    image_processor = object()
    tokenizer = tokenizer()


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return [write_image(tmp_path / f"{i}.png", seed=i) for i in range(3)]


def _asked(name: str) -> tuple[Any, Any, ProcessedModel]:
    model, owner = TINY[name].make(), PROCESSORS[name]()
    return model, owner, ProcessedModel(model, owner, protocol_for(model, "vqa"))


def _continued(inputs: dict[str, Any], row: int, tokens: list[int]) -> dict[str, Any]:
    """The inputs of one of two prompts with `tokens` behind it, for one forward pass."""
    half = {name: value.shape[0] // 2 for name, value in inputs.items()}
    one = {name: value[row * half[name] : (row + 1) * half[name]] for name, value in inputs.items()}
    more = {
        "input_ids": torch.tensor([tokens]),
        "attention_mask": torch.ones(1, len(tokens), dtype=torch.long),
        "token_type_ids": torch.zeros(1, len(tokens), dtype=torch.long),
        "mm_token_type_ids": torch.zeros(1, len(tokens), dtype=torch.int),
    }
    if "cross_attention_mask" in one:
        more["cross_attention_mask"] = one["cross_attention_mask"][:, -1:].expand(-1, len(tokens), -1, -1)
    return {name: torch.cat([value, more[name]], 1) if name in more else value for name, value in one.items()}


@pytest.mark.parametrize("name", GENERATIVE)
def test_likelihoods_are_those_of_a_forward_pass(name: str) -> None:
    """But for PaliGemma, which reads all of its input both ways: there a forward pass sees what it should predict."""
    tiny = TINY[name]
    model = tiny.make()
    asked = ProcessedModel(model, _Named(), protocol_for(model, "vqa"))
    inputs = {key: value for key, value in tiny.calls(1)[0].items() if key in asked._taken}
    references = [[5, 9, 7], [11]]
    found = asked.reference_nll(inputs, references)
    expected = []
    for row, tokens in enumerate(references):
        with torch.no_grad():
            scores = model(**_continued(inputs, row, tokens)).logits[0].double().log_softmax(-1)
        start = inputs["input_ids"].shape[1] - 1
        expected.append(-sum(float(scores[start + i, token]) for i, token in enumerate(tokens)))
    if name == "paligemma":
        assert found != pytest.approx(expected, rel=1e-3)
        said = model.generate(**inputs, do_sample=False, max_new_tokens=3)[:, -3:].tolist()
        likely, other = (asked.reference_nll(inputs, rows) for rows in (said, [[row[0], 9, 7] for row in said]))
        assert all(mine < theirs for mine, theirs in zip(likely, other, strict=True))
    else:
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", WITH_PROCESSOR)
def test_answers_are_those_of_one_stock_call_each(name: str, images: list[Path]) -> None:
    model, owner, asked = _asked(name)
    queries = [
        Query(image, protocol_for(model, "vqa").text(text), ("red", "two")) for text in QUESTIONS for image in images
    ]
    runs = [run_processed(asked, queries, decoding=Decoding(6), batch_size=size)[0] for size in (1, 4)]
    assert [reply.text for reply in runs[0]] == [reply.text for reply in runs[1]]
    assert [reply.nll for reply in runs[0]] == pytest.approx([reply.nll for reply in runs[1]], rel=1e-4)
    assert {reply.nll_tokens for reply in runs[0]} == {2}
    assert len({reply.text for reply in runs[0]}) > 3, "image and question must matter"
    for query, reply in list(zip(queries, runs[1], strict=True))[::4]:
        text = asked.lay_out(query.prompt or "")
        inputs = owner(images=Image.open(query.image), text=text, return_tensors="pt")
        output = model.generate(**{k: v for k, v in inputs.items() if k != "token_type_ids"}, max_new_tokens=6)
        assert reply.text in owner.tokenizer.decode(output[0], skip_special_tokens=True)
        new = output[0, inputs["input_ids"].shape[1] :] if output.shape[1] > 6 else output[0]
        assert reply.text == owner.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert owner.tokenizer.padding_side == "right", "as it was"


def test_the_image_is_normalized_once_and_the_question_is_read(images: list[Path]) -> None:
    _, owner, asked = _asked("llava")
    prompts = [asked.lay_out(text) for text in QUESTIONS]
    inputs = asked.inputs(images, prompts)
    alone = owner.image_processor(images=[Image.open(path).convert("RGB") for path in images], return_tensors="pt")
    torch.testing.assert_close(inputs["pixel_values"], alone["pixel_values"])
    for text, row in zip(QUESTIONS, inputs["input_ids"], strict=True):
        assert text.rstrip("?") in owner.tokenizer.decode(row)
        assert int((row == asked.model.config.image_token_index).sum()) == 16
    assert (inputs["attention_mask"][:, -1] == 1).all() and (inputs["attention_mask"][1, 0] == 0)


def test_an_echoed_prompt_is_cut_and_an_answer_alone_is_not(images: list[Path], monkeypatch: Any) -> None:
    model, owner, asked = _asked("llava")
    inputs = asked.inputs(images, [asked.lay_out(text) for text in QUESTIONS])
    expected, tokens = asked.generate(inputs, Decoding(4))
    assert 0 < tokens <= 12
    stock = model.generate
    monkeypatch.setattr(model, "generate", lambda **given: stock(**given)[:, inputs["input_ids"].shape[1] :])
    assert asked.generate(inputs, Decoding(4)) == (expected, tokens)
    monkeypatch.setattr(model, "generate", lambda **given: torch.tensor([[9, 2, 0, 0], [9, 10, 11, 2], [2, 0, 0, 0]]))
    texts, tokens = asked.generate(inputs, Decoding(4))
    assert tokens == 2 + 4 + 1, "what follows the end does not count"
    assert texts == [owner.tokenizer.decode([9]), owner.tokenizer.decode([9, 10, 11]), ""]


def test_references_are_tokenized_where_they_stand() -> None:
    _, owner, asked = _asked("llava")
    prompt = asked.lay_out(QUESTIONS[0])
    assert owner.tokenizer.convert_ids_to_tokens(asked.encode_answer(prompt, "red star")) == ["red", "star"]
    assert asked.encode_answer(prompt + "\n", "red") == asked.encode_answer(prompt, "red")


def test_layouts() -> None:
    model, owner, asked = _asked("llava")
    text = protocol_for(model, "gqa").text("how many?")
    short = "how many?\nAnswer the question using a single word or phrase."
    assert text == short and asked.lay_out(short) == f"USER: <image>\n{short} ASSISTANT:"
    own = PROCESSORS["llava_next"]()
    assert lay_out(own, protocol_for(model, "vqa"), "how many?") == "user : <image> how many? answer :"
    assert "red" in lay_out(own, protocol_for(model, "vqa"), "how many?", "red")
    assert lay_out(owner, Protocol("p", Decoding(1), "{image}{text}"), "{image} odd") == "<image>{image} odd"
    model.config.task_specific_params = {"vqa": {"prompt": "{} Answer:"}, "caption": {"prompt": "Say."}}
    assert protocol_for(model, "vqa").text("a {} b?") == "a {} b? Answer:"
    assert protocol_for(model, "caption").text() == "Say."
    assert protocol_for(model, "gqa").text("q") == "q\nAnswer the question using a single word or phrase."
    model.config.task_specific_params = {"vqa": {"prompt": "Answer."}}
    with pytest.raises(ModelMismatch, match=r"task_specific_params must be a text with one \{\} .* got 'Answer\.'"):
        protocol_for(model, "vqa")


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_dual_encoders_rank_as_their_forward_does(name: str, tmp_path: Path) -> None:
    write_flickr(tmp_path)
    model, owner = TINY[name].make(), PROCESSORS[name]()
    result = evaluate(model, owner, "retrieval", tmp_path, options=EvalOptions(batch_size=4))
    assert result.settings["top_k"] == 0 and result.settings["matched_pairs"] == 0
    gallery = load("retrieval", tmp_path)
    padding: Any = "max_length" if name == "siglip" else True
    how = {"padding": padding, "truncation": True, "max_length": 16, "return_tensors": "pt"}
    inputs = owner(images=[Image.open(path) for path in gallery.images], text=list(gallery.captions), **how)
    taken = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask", "pixel_values")}
    if name == "siglip":
        taken.pop("attention_mask", None)
    with torch.no_grad():
        scores = model(**taken).logits_per_image
    for i, record in enumerate(record for record in result.records if record["kind"] == "image"):
        right = torch.tensor([image == i for image in gallery.image_of])
        assert record["text_rank"] == int((scores[i] >= scores[i][right].max())[~right].sum())


def test_what_a_model_cannot_do_is_refused(tmp_path: Path) -> None:
    write_vqa(tmp_path)
    write_flickr(tmp_path)
    with pytest.raises(ModelMismatch, match="needs a model that generates text, CLIPModel does not"):
        evaluate(TINY["clip"].make(), PROCESSORS["clip"](), "vqa", tmp_path)
    with pytest.raises(ModelMismatch, match="task retrieval needs an image-text-retrieval model"):
        evaluate(TINY["llava"].make(), PROCESSORS["llava"](), "retrieval", tmp_path)
    with pytest.raises(ModelMismatch, match=r"needs a processor with image_processor, .* has none"):
        ProcessedModel(TINY["llava"].make(), tokenizer(), protocol_for(TINY["llava"].make(), "vqa"))


def test_a_reference_without_tokens_is_refused(images: list[Path]) -> None:
    _, _, asked = _asked("llava")
    with pytest.raises(DataError, match="a reference text has no tokens"):
        run_processed(asked, [Query(images[0], "how many?", ("",))], decoding=None, batch_size=1)


def test_random_models_go_through_every_generative_task(tmp_path: Path) -> None:
    write_coco(tmp_path)
    seen: list[tuple[int, int]] = []
    result = evaluate(
        TINY["llava_next"].make(),
        PROCESSORS["llava_next"](),
        "caption",
        tmp_path,
        tokenizer="plain",
        options=EvalOptions(batch_size=4, max_new_tokens=5, meteor=False, nll_references="all"),
        progress=lambda *at: seen.append(at),
    )
    assert result.metrics["nll"] > 0 and result.samples_per_second > 0 and result.tokens_per_second > 0
    assert seen == [(4, 6), (6, 6)]
    assert result.records[0]["nll_tokens"] > 6


def test_the_shipped_llava_is_scored_at_its_own_level(tmp_path: Path) -> None:
    """87% of answers right by `mmq_kernels.demo.check_llava`, whose words `evaluate` must find too."""
    world = write_world(tmp_path / "world", seed=7, size=WorldSize(train=2, images=24, questions=4, gallery=2))
    folder = weights_folder("llava")
    model, processor = checkpoint.load(folder, dtype=torch.float32), checkpoint.load_processor(folder)
    answered = evaluate(model, processor, "vqa", world / "vqav2", options=EvalOptions(batch_size=32))
    assert answered.settings["prompt"] == "{} Answer in a word or two."
    assert answered.metrics["accuracy"] > 0.8 and answered.metrics["nll"] < 0.5
    said = [f"{record['question']} Answer in a word or two." for record in answered.records]
    prompts = [check_llava.prompt(processor, text) for text in said]
    opened = [Image.open(world / "vqav2" / record["image"]) for record in answered.records]
    inputs = processor(images=opened, text=prompts, padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)  # of transformers 4's tokenizer, unknown to the model
    output = model.generate(**inputs, max_new_tokens=10, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    stock = [text.strip() for text in processor.batch_decode(output, skip_special_tokens=True)]
    assert [record["prediction"] for record in answered.records] == stock
    captioned = evaluate(
        model, processor, "caption", world / "coco", tokenizer="plain", options=EvalOptions(meteor=False)
    )
    assert captioned.metrics["cider"] > 5 and captioned.metrics["nll"] < 0.2
