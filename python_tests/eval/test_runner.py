"""`evaluate` end to end on tiny random models, its records, files, comparisons and refusals."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_blip2 import blip2_itm, blip2_opt, processor, write_coco, write_flickr, write_gqa, write_vqa

from mmq_kernels.eval import (
    EvalOptions,
    EvalResult,
    ModelMismatch,
    compare,
    evaluate,
    evaluate_prepared,
    metric_samples,
    prepare,
    write_predictions,
)
from mmq_kernels.eval.answers import answer_accuracy
from mmq_kernels.eval.captions import CaptionScorer

FAST = EvalOptions(batch_size=4, num_beams=1, max_new_tokens=4, meteor=False, top_k=3)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_coco(tmp_path / "coco")
    write_vqa(tmp_path / "vqav2")
    write_flickr(tmp_path / "flickr30k")
    return tmp_path


def test_captioning(data: Path) -> None:
    result = evaluate(blip2_opt(), processor(), "caption", data / "coco", tokenizer="plain", options=FAST)
    assert result.samples == len(result.records) == 6
    record = result.records[4]
    assert record["image"] == "val2017/000000000004.jpg" and record["id"] == 4
    assert record["references"] == ["A big green square.", "A small green square."]
    assert record["caption"] not in record["references"], "predictions and references are two things"
    assert record["nll_tokens"] == 4
    scorer = CaptionScorer({r["id"]: r["references"] for r in result.records}, tokenizer="plain")
    expected = scorer.score({r["id"]: r["caption"] for r in result.records}, meteor=False)
    assert result.metrics["cider"] == expected.metrics["cider"]
    assert [r["cider"] for r in result.records] == [image["cider"] for image in expected.per_image]
    assert result.metrics["meteor"] is None and result.settings["tokenizer"] == "plain"
    assert result.settings["not_computed"] == {"meteor": "not asked for", "spice": "not asked for"}
    assert set(result.intervals) == {name for name, value in result.metrics.items() if value is not None}
    for name, around in result.intervals.items():
        assert around.value == pytest.approx(result.metrics[name]), name
    nll, tokens = (sum(r[name] for r in result.records) for name in ("nll", "nll_tokens"))
    assert result.metrics["nll"] == pytest.approx(nll / tokens)
    assert result.intervals["nll"].low < result.metrics["nll"] < result.intervals["nll"].high
    assert result.tokens_per_second > 0 and result.samples_per_second > 0


def test_all_references_can_be_asked_for(data: Path) -> None:
    options = replace(FAST, generate=False, nll_references="all")
    result = evaluate(blip2_opt(), processor(), "caption", data / "coco", tokenizer="plain", options=options)
    assert set(result.metrics) == {"nll"} and "caption" not in result.records[0]
    assert result.records[0]["nll_tokens"] == 8
    assert result.tokens_per_second is None and result.samples_per_second > 0


def test_question_answering(data: Path) -> None:
    result = evaluate(blip2_opt(), processor(), "vqa", data / "vqav2", options=replace(FAST, num_beams=None))
    assert result.samples == len(result.records) == 12
    assert result.settings["prompt"] == "Question: {} Short answer:"
    assert result.settings["decoding"]["num_beams"] == 5 and result.settings["decoding"]["max_new_tokens"] == 4
    for record in result.records:
        assert record["accuracy"] == answer_accuracy(record["prediction"], record["answers"])
        assert record["nll_tokens"] == 1
    assert set(result.breakdown["answer_type"]) == {"other", "number", "yes/no"}
    assert metric_samples(result.records)["accuracy"].clusters[:4] == (
        *["val2014/COCO_val2014_000000000000.jpg"] * 3,
        "val2014/COCO_val2014_000000000001.jpg",
    )


def test_gqa_is_scored_by_exact_match_and_type(data: Path) -> None:
    write_gqa(data / "gqa")
    result = evaluate(blip2_opt(), processor(), "gqa", data / "gqa", options=replace(FAST, num_beams=None))
    assert result.samples == 12 and result.settings["split"] == "testdev"
    assert result.settings["decoding"]["num_beams"] == 5
    assert set(result.breakdown) == {"answer_type", "structural_type", "semantic_type"}
    assert set(result.breakdown["answer_type"]) == {"open", "binary"}
    assert set(result.breakdown["structural_type"]) == {"query", "verify", "choose"}
    record = result.records[1]
    assert record["id"] == "0001" and record["image"] == "images/n0.jpg" and record["answers"] == ["yes"]
    assert all(r["accuracy"] == float(r["prediction"].lower() == r["answers"][0]) for r in result.records)
    assert result.intervals["accuracy"].value == pytest.approx(result.metrics["accuracy"])
    assert result.metrics["nll"] > 0


def test_retrieval(data: Path) -> None:
    result = evaluate(blip2_itm(), processor(), "retrieval", data / "flickr30k", options=FAST)
    assert result.samples == 6 and len(result.records) == 18
    assert result.settings["top_k"] == 3
    ranks = [r["text_rank"] for r in result.records if r["kind"] == "image"]
    assert result.metrics["text_r1"] == sum(rank < 1 for rank in ranks) / 6
    assert {"image_r10", "image_r10_contrastive"} <= result.metrics.keys()
    assert set(result.intervals) == set(result.metrics), "every recall has its interval"
    for name, around in result.intervals.items():
        assert around.low <= around.value <= around.high and around.value == pytest.approx(result.metrics[name])


def test_half_precision_with_a_q_former_left_in_single(data: Path) -> None:
    """What `from_pretrained(dtype=...)` gives: some transformers classes keep parts in float32."""
    generative, retrieving = blip2_opt(), blip2_itm()
    whole = evaluate(generative, processor(), "vqa", data / "vqav2", options=FAST).metrics["nll"]
    for model in (generative, retrieving):
        model.to(torch.bfloat16)
        model.qformer.float()
        model.query_tokens.data = model.query_tokens.data.float()
    half = evaluate(generative, processor(), "vqa", data / "vqav2", options=FAST).metrics["nll"]
    assert half == pytest.approx(whole, rel=0.02)
    scores = evaluate(retrieving, processor(), "retrieval", data / "flickr30k", options=FAST).metrics
    assert scores["text_r10"] is not None


def test_prepared_data_serves_many_models(data: Path) -> None:
    prepared = prepare("vqa", data / "vqav2", processor())
    first = evaluate_prepared(blip2_opt(), prepared, options=FAST)
    for image in (data / "vqav2" / "val2014").iterdir():
        image.unlink()  # pixel values are kept
    assert evaluate_prepared(blip2_opt(), prepared, options=FAST).records == first.records
    worse = blip2_opt()
    with torch.no_grad():
        for parameter in worse.language_model.parameters():
            parameter.mul_(0.7)
    second = evaluate_prepared(worse, prepared, options=FAST)
    difference = compare(second, first)
    assert difference["nll"].value == pytest.approx(second.metrics["nll"] - first.metrics["nll"])
    assert difference["nll"].low <= difference["nll"].value <= difference["nll"].high
    same = compare(first, first)
    assert (same["nll"].low, same["nll"].high) == (0.0, 0.0)


def test_different_samples_are_not_compared(data: Path) -> None:
    prepared = [prepare("vqa", data / "vqav2", processor(), limit=6, seed=seed) for seed in (0, 1)]
    one, other = (evaluate_prepared(blip2_opt(), part, options=FAST) for part in prepared)
    with pytest.raises(ValueError, match="needs the same samples"):
        compare(one, other)


def test_result_survives_json(data: Path) -> None:
    result = evaluate(blip2_opt(), processor(), "vqa", data / "vqav2", options=FAST)
    again = EvalResult.from_json(json.loads(json.dumps(result.to_json())))
    assert again == result
    assert "records" not in result.to_json(records=False)
    assert EvalResult.from_json(result.to_json(records=False)).records == []


def test_a_model_that_computes_no_numbers_is_reported_not_hidden(data: Path) -> None:
    broken = blip2_opt()
    with torch.no_grad():
        broken.language_projection.weight.fill_(float("nan"))
    result = evaluate(broken, processor(), "vqa", data / "vqav2", options=FAST)
    plain = result.to_json()
    assert plain["metrics"]["nll"] is None and plain["intervals"]["nll"]["value"] is None
    json.dumps(plain, allow_nan=False)


def test_predictions_are_written_whole_or_not_at_all(data: Path, tmp_path: Path) -> None:
    target = tmp_path / "predictions.jsonl"
    result = evaluate(blip2_opt(), processor(), "vqa", data / "vqav2", options=FAST, predictions=target, limit=5)
    lines = target.read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.to_json()["records"] and len(lines) == 5
    with pytest.raises(TypeError):
        write_predictions([{"id": 1}, {"id": object()}], target)
    assert target.read_text().splitlines() == lines
    assert sorted(path.name for path in tmp_path.glob("*predictions*")) == [target.name, f"{target.name}.run.json"]
    with pytest.raises(OSError):
        write_predictions([], tmp_path / "nowhere" / "predictions.jsonl")


def test_progress_reaches_its_end(data: Path) -> None:
    seen: list[tuple[int, int]] = []
    for task, folder, model in (("vqa", "vqav2", blip2_opt()), ("retrieval", "flickr30k", blip2_itm())):
        seen.clear()
        evaluate(model, processor(), task, data / folder, options=FAST, progress=lambda *at: seen.append(at))
        assert seen and seen[-1][0] == seen[-1][1] and seen == sorted(seen)


def test_a_model_without_the_needed_head_is_refused(data: Path) -> None:
    with pytest.raises(ModelMismatch, match="task retrieval needs an image-text-retrieval model"):
        evaluate(blip2_opt(), processor(), "retrieval", data / "flickr30k", options=FAST)
    with pytest.raises(ModelMismatch, match="needs a model with language_projection"):
        evaluate(blip2_itm(), processor(), "caption", data / "coco", options=FAST)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_beams": 0}, "num_beams must be at least 1, got 0"),
        ({"top_k": -2}, "top_k must be at least 0, got -2"),
        ({"nll_references": "some"}, "nll_references must be first or all, got 'some'"),
        ({"generate": False, "nll": False}, "generate or nll must be on"),
    ],
)
def test_impossible_options_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvalOptions(**wrong)  # type: ignore[arg-type]
