"""Calibration batches: which samples, in what form, and that the model can be called with them."""

from pathlib import Path

import pytest
import tiny_blip2
import torch

from mmq_kernels.demo.world import WorldSize, write_world
from mmq_kernels.eval.calibration import BATCH, CalibrationData, CalibrationSource
from mmq_kernels.eval.datasets import load
from mmq_kernels.eval.errors import DataError, ModelMismatch


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    size = WorldSize(train=20, images=4, questions=3, gallery=4)
    return write_world(tmp_path_factory.mktemp("calibration") / "world", size=size)


def _source(world: Path, *tasks: str, samples: int = 12, seed: int = 0) -> CalibrationSource:
    folders = {"caption": "coco", "vqa": "vqav2", "retrieval": "flickr30k"}
    parsed = CalibrationSource.parse([f"{task}:{world / folders[task]}" for task in tasks], samples, seed)
    assert parsed is not None
    return parsed


def test_entries_share_the_samples(world: Path) -> None:
    parsed = _source(world, "caption", "vqa", samples=13)
    assert [(data.task, data.samples) for data in parsed.data] == [("caption", 7), ("vqa", 6)]
    assert CalibrationSource.parse([]) is None
    for entries, message in (
        (["coco"], "TASK:DIR"),
        (["caption:"], "TASK:DIR"),
        (["singing:coco"], "TASK:DIR"),
        (["caption:a", "vqa:b"], "samples must be at least 2, one a data set, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            CalibrationSource.parse(entries, 1)


def test_draws_are_seeded_and_from_the_training_split(world: Path) -> None:
    drawn, again, other = (CalibrationData("caption", world / "coco", 8, seed).drawn() for seed in (0, 0, 1))
    assert drawn == again
    assert drawn != other
    assert {sample.image.parent.name for sample in drawn} == {"train2017"}
    evaluated = {sample.image for sample in load("caption", world / "coco")}
    assert not evaluated & {sample.image for sample in drawn}


def test_fingerprints_tell_draws_apart(world: Path) -> None:
    same = _source(world, "caption").fingerprint()
    assert same == _source(world, "caption").fingerprint()
    others = [
        _source(world, "caption", seed=1),
        _source(world, "caption", samples=11),
        _source(world, "vqa"),
        _source(world, "caption", "vqa"),
    ]
    assert len({same, *(source.fingerprint() for source in others)}) == 5


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_generative_batches_run_and_hold_the_references(kind: str, world: Path) -> None:
    model = tiny_blip2.blip2_opt() if kind == "opt" else tiny_blip2.blip2_t5()
    processor = tiny_blip2.processor(start=kind == "opt")
    batches = _source(world, "caption", "vqa", samples=2 * BATCH + 4).batches(model, processor)
    assert sum(len(batch["pixel_values"]) for batch in batches) == 2 * BATCH + 4
    assert max(len(batch["pixel_values"]) for batch in batches) <= BATCH
    for batch in batches:
        with torch.no_grad():
            assert model(**batch).logits.isfinite().all()
        images = (batch["input_ids"] == model.config.image_token_index).sum(1)
        assert images.tolist() == [model.config.num_query_tokens] * len(images)
        assert ("labels" in batch) == (kind == "t5")


def test_matching_batches_go_both_ways(world: Path) -> None:
    model, processor = tiny_blip2.blip2_itm(), tiny_blip2.processor()
    batches = _source(world, "retrieval").batches(model, processor)
    assert [batch["use_image_text_matching_head"] for batch in batches[:2]] == [False, True]
    for batch in batches:
        with torch.no_grad():
            assert model(**batch).logits_per_image.isfinite().all()


def test_mistakes_are_named(world: Path, tmp_path: Path) -> None:
    model, processor = tiny_blip2.blip2_opt(), tiny_blip2.processor()
    with pytest.raises(DataError, match=r"calibration needs 21 samples, .* has 20 in its train split"):
        _source(world, "caption", samples=21).batches(model, processor)
    with pytest.raises(ModelMismatch, match="calibrated on task caption, vqa or gqa, got 'retrieval'"):
        _source(world, "retrieval").batches(model, processor)
    with pytest.raises(DataError, match="no data folder"):
        CalibrationSource((CalibrationData("caption", tmp_path / "nowhere"),)).batches(model, processor)


# --- models with processors of their own ------------------------------------------------------------------------------


def _others() -> dict[str, tuple[object, object, str]]:
    """Model, processor and task: a dual encoder, a language model alone, a vision model alone."""
    import transformers as tf
    from tiny_families import TINY

    from mmq_kernels.demo.architecture import make_tokenizer

    tokenizer = make_tokenizer(retrieval=False)
    tokenizer.model_max_length = 16
    size = {"height": 32, "width": 32}
    images = tf.CLIPImageProcessor(size=size, do_center_crop=False)
    clip, llama, vit = (TINY[name].make() for name in ("clip", "llama", "vit"))
    llama.resize_token_embeddings(len(tokenizer))
    clip.text_model.resize_token_embeddings(len(tokenizer))
    return {
        "clip": (clip, tf.CLIPProcessor(images, tokenizer), "retrieval"),
        "llama": (llama, tokenizer, "caption"),
        "vit": (vit, tf.ViTImageProcessor(size=size), "caption"),
    }


@pytest.mark.parametrize("name", ["clip", "llama", "vit"])
def test_every_model_is_called_as_its_processor_says(name: str, world: Path) -> None:
    model, processor, task = _others()[name]
    batches = _source(world, task).batches(model, processor)
    assert len(batches) == 2
    for batch in batches:
        with torch.no_grad():
            model(**batch)
    assert ("pixel_values" in batches[0]) == (name != "llama")
    assert ("input_ids" in batches[0]) == (name != "vit")
    with pytest.raises(ModelMismatch, match="is calibrated on task"):
        _source(world, "retrieval" if task != "retrieval" else "vqa").batches(model, processor)


def test_llava_reads_references_behind_its_own_template(world: Path, tmp_path: Path) -> None:
    """The shipped LLaVA: an image's tokens, the question, the answer; and from there to a checkpoint that runs."""
    import mmq_kernels
    from mmq_kernels.demo import weights_folder

    folder = weights_folder("llava")
    model, processor = mmq_kernels.load(folder, dtype=torch.float32), mmq_kernels.load_processor(folder)
    source = _source(world, "caption", "vqa")
    batches = source.batches(model, processor)
    texts = processor.batch_decode(torch.cat([b["input_ids"][:1] for b in batches[-1:]]))
    assert texts[0].count("<image>") == 64 and "assistant :" in texts[0] and "<unk>" not in texts[0]
    report = mmq_kernels.quantize_checkpoint(folder, "all=gptq:3:g64", tmp_path / "out", calibration=source)
    assert {layer["used"] for layer in report["layers"]} == {"gptq"}
    quantized = mmq_kernels.load(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        before, after = (m(**batches[0]).logits for m in (model, quantized))
    assert 0 < (after - before).square().mean() < 0.1 * before.square().mean()
