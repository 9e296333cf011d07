"""The publishers' layouts are read as published, and every way a folder can be wrong is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_blip2 import write_coco, write_flickr, write_gqa, write_image, write_json, write_vqa

from mmq_kernels.eval import DataError, RetrievalGallery, calibration_samples, load
from mmq_kernels.eval.datasets import default_split


def _edit(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_coco_captions(tmp_path: Path) -> None:
    write_coco(tmp_path)
    samples = load("caption", tmp_path)
    assert len(samples) == 6
    assert samples[4].image_id == 4
    assert samples[4].image == tmp_path / "val2017" / "000000000004.jpg"
    assert samples[4].references == ("A big green square.", "A small green square.")


def test_vqav2(tmp_path: Path) -> None:
    write_vqa(tmp_path)
    samples = load("vqa", tmp_path, "val")
    assert len(samples) == 12
    sample = samples[3]
    assert (sample.question_id, sample.question) == (10, "what color is the big circle?")
    assert sample.image == tmp_path / "val2014" / "COCO_val2014_000000000001.jpg"
    assert (sample.answers, sample.answer_type, sample.question_type) == (
        ("red",) * 8 + ("blue",) * 2,
        "other",
        "what",
    )
    assert sample.common_answer == "red"


def test_flickr30k_as_a_list(tmp_path: Path) -> None:
    write_flickr(tmp_path)
    gallery = load("retrieval", tmp_path)
    assert isinstance(gallery, RetrievalGallery)
    assert len(gallery.images) == 6 and len(gallery.captions) == 12
    assert gallery.image_of[:4] == (0, 0, 1, 1)
    assert gallery.images[1] == tmp_path / "flickr30k-images" / "1.jpg"
    assert gallery.captions[2] == "A green circle."


def test_flickr30k_train_has_one_caption_an_entry(tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "1.jpg", seed=1)
    entries = [{"image": "1.jpg", "caption": f"text {i}", "image_id": "flickr30k_1"} for i in range(5)]
    write_json(tmp_path / "annotations" / "flickr30k_train.json", entries)
    gallery = load("retrieval", tmp_path, "train")
    assert gallery.captions == tuple(f"text {i}" for i in range(5))
    assert gallery.images == (tmp_path / "images" / "1.jpg",)


@pytest.mark.parametrize("folder", ["", "flickr30k-images", "flickr30k_images", "images"])
def test_flickr30k_by_karpathy(tmp_path: Path, folder: str) -> None:
    for i in range(3):
        write_image(tmp_path / folder / f"{i}.jpg", seed=i)
    images = [
        {
            "filename": f"{i}.jpg",
            "split": "test" if i else "train",
            "sentences": [{"raw": f"text {i}"}, {"raw": "more"}],
        }
        for i in range(3)
    ]
    write_json(tmp_path / "dataset_flickr30k.json", {"images": images})
    gallery = load("retrieval", tmp_path)
    assert gallery.captions == ("text 1", "more", "text 2", "more")
    assert gallery.images[0] == tmp_path / folder / "1.jpg"
    assert load("retrieval", tmp_path, "train").image_ids == ("0.jpg",)


def test_limit_is_seeded_and_keeps_the_order_of_the_file(tmp_path: Path) -> None:
    write_coco(tmp_path, images=30)
    ids = [sample.image_id for sample in load("caption", tmp_path, limit=8, seed=1)]
    assert ids == sorted(ids) and len(set(ids)) == 8
    assert ids == [sample.image_id for sample in load("caption", tmp_path, limit=8, seed=1)]
    assert ids != [sample.image_id for sample in load("caption", tmp_path, limit=8, seed=2)]
    assert len(load("caption", tmp_path, limit=99)) == 30


def test_limit_of_a_gallery_counts_images(tmp_path: Path) -> None:
    write_flickr(tmp_path)
    gallery = load("retrieval", tmp_path, limit=4)
    assert len(gallery.images) == 4 and len(gallery.captions) == 8


def test_a_gallery_may_take_the_first_captions_only(tmp_path: Path) -> None:
    write_flickr(tmp_path)
    gallery = load("retrieval", tmp_path, captions_per_image=1)
    assert gallery.captions[:2] == ("A red star.", "A green circle.") and gallery.image_of == tuple(range(6))
    with pytest.raises(ValueError, match=r"captions_per_image must be at least 1 .* got 0 for task retrieval"):
        load("retrieval", tmp_path, captions_per_image=0)
    with pytest.raises(ValueError, match="belongs to task retrieval, got 1 for task caption"):
        load("caption", tmp_path, captions_per_image=1)


def test_only_chosen_images_need_to_be_there(tmp_path: Path) -> None:
    write_coco(tmp_path, images=10)
    chosen = {sample.image for sample in load("caption", tmp_path, limit=3)}
    for path in (tmp_path / "val2017").iterdir():
        if path not in chosen:
            path.unlink()
    assert len(load("caption", tmp_path, limit=3)) == 3
    with pytest.raises(DataError, match=r"no image .*\.jpg"):
        load("caption", tmp_path)


@pytest.mark.parametrize("task", ["caption", "vqa", "retrieval"])
def test_calibration_draws_from_train_only(tmp_path: Path, task: str) -> None:
    write = {"caption": write_coco, "vqa": write_vqa, "retrieval": write_flickr}[task]
    evaluated = {"retrieval": "test"}.get(task, "val")
    write(tmp_path, images=5, split=evaluated)
    with pytest.raises(DataError, match=r"missing .*train.*calibration draws from the train split only"):
        calibration_samples(task, tmp_path, 2)
    write(tmp_path, images=9, split="train")
    samples = calibration_samples(task, tmp_path, 5, seed=3)
    assert len(samples) == 5
    assert samples == calibration_samples(task, tmp_path, 5, seed=3)
    assert samples != calibration_samples(task, tmp_path, 5, seed=4)


def test_calibration_smaller_than_asked_is_refused(tmp_path: Path) -> None:
    write_coco(tmp_path, images=5, split="train")
    with pytest.raises(DataError, match=r"calibration needs 128 samples, .* has 5 in its train split"):
        calibration_samples("caption", tmp_path, 128)
    assert len(calibration_samples("caption", tmp_path, 5)) == 5


def test_unknown_task_split_and_limit_are_refused(tmp_path: Path) -> None:
    write_coco(tmp_path)
    with pytest.raises(ValueError, match="task must be one of caption, vqa, gqa, retrieval, got 'okvqa'"):
        load("okvqa", tmp_path)
    with pytest.raises(ValueError, match="split of task caption must be one of val, test, train, got 'dev'"):
        load("caption", tmp_path, "dev")
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        load("caption", tmp_path, limit=0)


def test_missing_folder_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data folder .*nowhere"):
        load("caption", tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"missing .*annotations/captions_val2017\.json"):
        load("caption", tmp_path)
    with pytest.raises(DataError, match=r"missing .*v2_OpenEnded_mscoco_val2014_questions\.json"):
        load("vqa", tmp_path)
    with pytest.raises(DataError, match=r"missing .*flickr30k_test\.json \(or Karpathy's .*dataset_flickr30k\.json\)"):
        load("retrieval", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], 'expected an object with "images", got a list'),
        ({"images": []}, 'missing key "annotations"'),
        ({"images": {}, "annotations": []}, 'expected "images" to be a list of objects, got a object'),
        ({"images": [3], "annotations": []}, 'expected "images" to be a list of objects'),
        ({"images": [{"file_name": "a.jpg"}], "annotations": []}, 'an entry lacks key "id"'),
        ({"images": [{"id": 1}], "annotations": []}, 'an entry lacks key "file_name"'),
        ({"images": [{"id": 1, "file_name": None}], "annotations": []}, '"file_name" holds a null'),
        ({"images": [], "annotations": []}, "the val split of .* has no samples for task caption"),
    ],
)
def test_captions_of_another_layout(tmp_path: Path, content: object, message: str) -> None:
    write_json(tmp_path / "annotations" / "captions_val2017.json", content)
    with pytest.raises(DataError, match=message) as caught:
        load("caption", tmp_path)
    assert "\n" not in str(caught.value)


def test_no_json(tmp_path: Path) -> None:
    path = tmp_path / "annotations" / "captions_val2017.json"
    path.parent.mkdir()
    path.write_text('{"images": [')
    with pytest.raises(DataError, match=r"captions_val2017\.json is no JSON file"):
        load("caption", tmp_path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"captions_val2017\.json is no JSON file"):
        load("caption", tmp_path)


def test_duplicate_ids_are_named(tmp_path: Path) -> None:
    path = write_coco(tmp_path)
    _edit(path, lambda content: content["images"].append(content["images"][2]))
    with pytest.raises(DataError, match=r"captions_val2017\.json: id 2 occurs twice"):
        load("caption", tmp_path)
    questions, _ = write_vqa(tmp_path)
    _edit(questions, lambda content: content["questions"].append(content["questions"][4]))
    with pytest.raises(DataError, match="question_id 11 occurs twice"):
        load("vqa", tmp_path)
    path = write_flickr(tmp_path)
    _edit(path, lambda content: content.append(content[0]))
    with pytest.raises(DataError, match=r"image flickr30k-images/0\.jpg is listed twice"):
        load("retrieval", tmp_path)


def test_caption_of_an_unknown_image(tmp_path: Path) -> None:
    path = write_coco(tmp_path)
    _edit(path, lambda content: content["images"].pop())
    with pytest.raises(DataError, match="a caption belongs to image 5, which the file does not list"):
        load("caption", tmp_path)


def test_vqa_answers_missing_or_too_few(tmp_path: Path) -> None:
    _, annotations = write_vqa(tmp_path)
    _edit(annotations, lambda content: content["annotations"][5]["answers"].pop())
    with pytest.raises(DataError, match="question 12 needs 10 answers, has 9"):
        load("vqa", tmp_path)
    _edit(annotations, lambda content: content["annotations"].pop(5))
    with pytest.raises(DataError, match="no answers for question 12"):
        load("vqa", tmp_path)


def test_flickr_captions_of_another_kind(tmp_path: Path) -> None:
    path = write_flickr(tmp_path)
    _edit(path, lambda content: content[1].update(caption=[1, 2]))
    with pytest.raises(DataError, match=r"caption of image flickr30k-images/1\.jpg must be a list of strings"):
        load("retrieval", tmp_path)
    path.write_text(json.dumps({"images": json.loads(path.read_text())}))
    with pytest.raises(DataError, match="expected a list of objects, got a object"):
        load("retrieval", tmp_path)


# --- Karpathy's COCO --------------------------------------------------------------------------------------------------


def _karpathy(folder: Path, splits: dict[int, str], *, images: str | None = "val2014") -> Path:
    """COCO's images 0.. with their splits, in the 2014 folders or (None) not at all."""
    listed = []
    for number, split in splits.items():
        name = f"COCO_val2014_{number:012d}.jpg"
        if images:
            write_image(folder / images / name, seed=number)
        said = [{"raw": f"A star {number}."}, {"raw": "Another."}]
        listed.append({"filepath": "val2014", "filename": name, "cocoid": number, "split": split, "sentences": said})
    return write_json(folder / "dataset_coco.json", {"images": listed, "dataset": "coco"})


def test_coco_by_karpathy(tmp_path: Path) -> None:
    _karpathy(tmp_path, {0: "test", 1: "val", 2: "train", 3: "restval", 4: "test"})
    samples = load("caption", tmp_path)  # no val2017: his test split is what is evaluated
    assert [sample.image_id for sample in samples] == [0, 4]
    assert samples[1].image == tmp_path / "val2014" / "COCO_val2014_000000000004.jpg"
    assert samples[1].references == ("A star 4.", "Another.")
    assert [sample.image_id for sample in load("caption", tmp_path, "val")] == [1]
    assert [sample.image_id for sample in load("caption", tmp_path, "train")] == [2, 3]
    assert default_split("caption", tmp_path) == "test"
    write_coco(tmp_path, images=3)
    assert default_split("caption", tmp_path) == "val" and len(load("caption", tmp_path)) == 3


def test_karpathy_s_images_may_stand_in_the_2017_folders(tmp_path: Path) -> None:
    _karpathy(tmp_path, {7: "test", 8: "test"}, images=None)
    with pytest.raises(DataError, match=r"no image .*val2014/COCO_val2014_000000000007\.jpg \(sample 7; 2 of 2 images"):
        load("caption", tmp_path, "test")
    places = [write_image(tmp_path / f"{year}2017" / f"{i:012d}.jpg", seed=i) for i, year in ((7, "val"), (8, "train"))]
    assert [sample.image for sample in load("caption", tmp_path, "test")] == places


def test_calibration_leaves_out_images_that_are_evaluated(tmp_path: Path) -> None:
    """COCO's train2017 holds most of Karpathy's test and val; his train holds COCO's val2017."""
    write_coco(tmp_path, images=8, split="train")
    _karpathy(tmp_path, {0: "test", 1: "val", 2: "train", 5: "test"}, images=None)
    drawn = calibration_samples("caption", tmp_path, 5)
    assert [sample.image_id for sample in drawn] == [2, 3, 4, 6, 7]
    with pytest.raises(DataError, match=r"needs 6 samples, .* has 5 in its train split, and 3 more about images of an"):
        calibration_samples("caption", tmp_path, 6)
    other = tmp_path / "other"
    _karpathy(other, {i: "train" for i in range(6)})
    write_coco(other, images=4)
    assert [sample.image_id for sample in calibration_samples("caption", other, 2)] == [4, 5]


def test_an_image_in_both_of_flickr_s_lists_is_not_drawn(tmp_path: Path) -> None:
    write_flickr(tmp_path, images=4, split="train")
    shared = json.loads((tmp_path / "annotations" / "flickr30k_train.json").read_text())[1:3]
    write_json(tmp_path / "annotations" / "flickr30k_test.json", shared)
    assert [sample.image.name for sample in calibration_samples("retrieval", tmp_path, 2)] == [
        "train0.jpg",
        "train3.jpg",
    ]


# --- GQA --------------------------------------------------------------------------------------------------------------


def test_gqa(tmp_path: Path) -> None:
    write_gqa(tmp_path)
    samples = load("gqa", tmp_path)
    assert len(samples) == 12
    sample = samples[4]
    assert (sample.question_id, sample.question) == ("0011", "Is there a star?")
    assert sample.image == tmp_path / "images" / "n1.jpg"
    assert (sample.answers, sample.common_answer) == (("yes",), "yes")
    assert sample.kinds == {"answer_type": "binary", "structural_type": "verify", "semantic_type": "obj"}
    assert samples[3].kinds["answer_type"] == "open"
    with pytest.raises(DataError, match=r"missing .*val_balanced_questions\.json"):
        load("gqa", tmp_path, "val")


def test_gqa_is_calibrated_on_its_training_split(tmp_path: Path) -> None:
    write_gqa(tmp_path)
    with pytest.raises(DataError, match=r"missing .*train_balanced_questions.*draws from the train split only"):
        calibration_samples("gqa", tmp_path, 2)
    path = write_gqa(tmp_path, split="train", images=3)
    drawn = calibration_samples("gqa", tmp_path, 5, seed=1)
    assert drawn == calibration_samples("gqa", tmp_path, 5, seed=1) != calibration_samples("gqa", tmp_path, 5, seed=2)
    assert {sample.image.name[:5] for sample in drawn} == {"train"}
    _edit(path, lambda content: content["0000"].update(imageId="n0"))
    with pytest.raises(DataError, match="has 8 in its train split, and 1 more about images of an evaluated split"):
        calibration_samples("gqa", tmp_path, 9)


def test_gqa_unbalanced_questions_do_not_count(tmp_path: Path) -> None:
    path = write_gqa(tmp_path)
    _edit(path, lambda content: content["0000"].update(isBalanced=False))
    assert len(load("gqa", tmp_path)) == 11


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["0001"].pop("answer"), r'an entry lacks key "answer" \(of 0001\)'),
        (lambda c: c["0001"].update(imageId=5), r'"imageId" holds a number \(of 0001\)'),
        (lambda c: c["0001"].update(answer=" "), "question 0001 has an empty answer"),
        (lambda c: c.update({"0001": []}), 'expected an object under "0001", got a list'),
        (lambda c: c["0001"].update(imageId="gone"), r"no image .*gone\.jpg \(sample 0001; 1 of 5 images are so\)"),
    ],
)
def test_gqa_entries_that_are_wrong_are_named(tmp_path: Path, change: Callable[[Any], object], message: str) -> None:
    _edit(write_gqa(tmp_path), change)
    with pytest.raises(DataError, match=message):
        load("gqa", tmp_path)


def test_gqa_ids_that_occur_twice_are_named(tmp_path: Path) -> None:
    path = write_gqa(tmp_path)
    text = path.read_text()
    path.write_text(text[:-1] + ", " + text[text.index('"0010"') : text.index('"0011"')].rstrip(", ") + "}")
    with pytest.raises(DataError, match=r"testdev_balanced_questions\.json: id 0010 occurs twice"):
        load("gqa", tmp_path)
    path.write_text("[]")
    with pytest.raises(DataError, match="expected an object of objects, got a list"):
        load("gqa", tmp_path)


# --- before hours are spent -------------------------------------------------------------------------------------------


def test_damaged_images_are_found_before_anything_is_evaluated(tmp_path: Path) -> None:
    write_vqa(tmp_path)
    image = tmp_path / "val2014" / "COCO_val2014_000000000002.jpg"
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"000000000002\.jpg is a damaged image: .* \(sample 20; 1 of 4 images"):
        load("vqa", tmp_path)
    image.write_text("text")
    with pytest.raises(DataError, match=r"000000000002\.jpg is no image \(sample 20"):
        load("vqa", tmp_path)


def test_an_image_id_that_does_not_exist(tmp_path: Path) -> None:
    questions, annotations = write_vqa(tmp_path)
    _edit(questions, lambda content: content["questions"][7].update(image_id=99))
    with pytest.raises(DataError, match=r"question 21 is about image 2, in .*questions\.json about image 99"):
        load("vqa", tmp_path)
    _edit(annotations, lambda content: content["annotations"][7].update(image_id=99))
    with pytest.raises(DataError, match=r"no image .*COCO_val2014_000000000099\.jpg \(sample 21; 1 of 5 images"):
        load("vqa", tmp_path)
