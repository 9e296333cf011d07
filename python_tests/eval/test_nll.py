"""The likelihood of references equals one computed by hand, token by token."""

from pathlib import Path

import pytest
import torch
from tiny_blip2 import blip2_opt, blip2_t5, processor, write_image

from mmq_kernels.eval import DataError, PixelStore
from mmq_kernels.eval.generative import Query, run_queries
from mmq_kernels.eval.nll import reference_nll
from mmq_kernels.eval.prompted import PromptedModel
from mmq_kernels.eval.started import start

pytestmark = pytest.mark.filterwarnings("error:.*past_key_values:FutureWarning")  # the cache by its name

PROMPTS = (
    "Question: how many? Short answer:",
    "Question: is there a small red star on the left? Short answer:",
    None,
)
ANSWERS = ("two", "yes there is a star", "a red circle and a square")
FAMILIES = [pytest.param(blip2_opt, True, id="opt"), pytest.param(blip2_t5, False, id="t5")]


def _by_hand(model: PromptedModel, prompt: list[int], answer: list[int], pixels: torch.Tensor) -> float:
    """One sample through stock `forward`, one token at a time, no padding, no cache."""
    total = 0.0
    for t, token in enumerate(answer):
        if model.encoder_decoder:
            decoder = torch.tensor([[0, *answer[:t]]])
            inputs = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": decoder}
        else:
            inputs = {"input_ids": torch.tensor([prompt + answer[:t]])}
        logits = model.model(pixel_values=pixels, **inputs).logits[0, -1]
        total -= float(logits.double().log_softmax(-1)[token])
    return total


@pytest.mark.parametrize(("make", "bos"), FAMILIES)
def test_nll_equals_a_computation_by_hand(make, bos: bool, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    owner = processor(bos)
    model = PromptedModel(make(), owner)
    pixels = PixelStore(owner)([write_image(tmp_path / f"{i}.png", seed=i) for i in range(3)])
    prompts = [model.encode(text) for text in PROMPTS]
    answers = [
        model.encode_answer(text, after_prompt=prompt is not None)
        for text, prompt in zip(ANSWERS, PROMPTS, strict=True)
    ]
    assert [len(answer) for answer in answers] == [1, 5, 6]
    with torch.no_grad():
        expected = [_by_hand(model, prompts[i], answers[i], pixels[i : i + 1]) for i in range(3)]
    features = model.image_features(pixels)
    started = start(model, prompts, features)
    together = reference_nll(started, answers)
    assert reference_nll(started, answers[::-1]) != pytest.approx(together)
    assert reference_nll(started, answers) == pytest.approx(together), "reading one reference must leave no trace"
    alone = [
        reference_nll(start(model, prompts[i : i + 1], features[i : i + 1]), answers[i : i + 1])[0] for i in range(3)
    ]
    assert together == pytest.approx(expected, rel=1e-4)
    assert alone == pytest.approx(expected, rel=1e-4)


def test_references_of_a_query_are_summed(tmp_path: Path) -> None:
    owner = processor()
    model, store = PromptedModel(blip2_opt(), owner), PixelStore(owner)
    image = write_image(tmp_path / "a.png", seed=1)
    run = {"decoding": None, "batch_size": 2}
    each = run_queries(model, [Query(image, None, (text,)) for text in ANSWERS], store, **run)[0]
    unequal = [Query(image, None, ANSWERS[:1]), Query(image, None, ANSWERS), Query(image, None, ())]
    (one, both, none), effort = run_queries(model, unequal, store, **run)
    assert (one.nll_tokens, none.nll) == (1, None)
    assert both.text is None and effort.tokens == 0
    assert both.nll_tokens == sum(reply.nll_tokens for reply in each) == 12
    assert both.nll == pytest.approx(sum(reply.nll for reply in each), rel=1e-5)


def test_the_image_matters(tmp_path: Path) -> None:
    owner = processor()
    model = PromptedModel(blip2_opt(), owner)
    features = model.image_features(PixelStore(owner)([write_image(tmp_path / f"{i}.png", seed=i) for i in range(2)]))
    one, other = reference_nll(start(model, [model.encode(None)] * 2, features), [[9, 10]] * 2)
    assert abs(one - other) > 1e-3


def test_answers_begin_with_a_space_after_a_prompt_as_generated_text_does() -> None:
    model = PromptedModel(blip2_opt(), processor())
    seen: list[str] = []

    class Recording:
        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            seen.append(text)
            return {"input_ids": [5]}

    model.tokenizer = Recording()
    model.encode_answer("red", after_prompt=True)
    model.encode_answer("red", after_prompt=False)
    assert seen == [" red", "red"]


def test_an_empty_reference_is_refused(tmp_path: Path) -> None:
    owner = processor()
    model = PromptedModel(blip2_opt(), owner)
    image = write_image(tmp_path / "a.png", seed=1)
    with pytest.raises(DataError, match="a reference text has no tokens"):
        run_queries(model, [Query(image, None, ("",))], PixelStore(owner), decoding=None, batch_size=1)
