"""`mmq data check` tells what is there, what is missing, and what is broken, split by split."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_blip2 import write_coco, write_flickr, write_gqa, write_image, write_json, write_vqa

from mmq_kernels.cli.app import run
from mmq_kernels.demo.world import WorldSize, write_world
from mmq_kernels.eval import DataError
from mmq_kernels.eval.check import OPENED, SplitReport, check_folder


def _by_split(folder: Path, **options: Any) -> dict[tuple[str, str], SplitReport]:
    return {(split.task, split.split): split for split in check_folder(folder, **options).splits}


def test_a_world_serves_every_task_twice(tmp_path: Path) -> None:
    world = write_world(tmp_path / "world", size=WorldSize(train=5, images=4, questions=5, gallery=6))
    report = check_folder(world)
    assert report.tasks("evaluation") == report.tasks("calibration") == ["caption", "vqa", "gqa", "retrieval"]
    rows = {(split.task, split.split): split for split in report.splits}
    assert (rows["caption", "val"].samples, rows["caption", "val"].images_opened) == (4, 4)
    assert rows["vqa", "val"].samples == 20 and rows["vqa", "val"].images == 4
    assert rows["retrieval", "test"].images == 6 and not rows["retrieval", "val"].here
    assert rows["gqa", "train"].use == "calibration" and rows["gqa", "testdev"].use == "evaluation"
    assert not any(split.problems for split in report.splits)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    write_vqa(tmp_path)
    rows = _by_split(tmp_path, tasks=["vqa", "gqa"])
    assert rows["vqa", "val"].usable and not rows["vqa", "train"].here
    assert rows["vqa", "train"].files[0].endswith("questions/v2_OpenEnded_mscoco_train2014_questions.json")
    assert rows["gqa", "testdev"].files[0].endswith("questions/testdev_balanced_questions.json")
    (tmp_path / "annotations" / "v2_mscoco_val2014_annotations.json").unlink()
    broken = _by_split(tmp_path, tasks=["vqa"])["vqa", "val"]
    assert not broken.usable and "missing" in broken.problems[0] and "v2_mscoco_val2014" in broken.problems[0]


def test_missing_and_damaged_images_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    write_coco(tmp_path, images=8)
    images = tmp_path / "val2017"
    (images / "000000000003.jpg").unlink()
    whole = (images / "000000000005.jpg").read_bytes()
    (images / "000000000005.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "000000000006.jpg").write_text("no image at all")
    row = _by_split(tmp_path, tasks=["caption"])["caption", "val"]
    assert (row.images, row.images_missing, row.images_opened, row.images_damaged) == (8, 1, 7, 2)
    assert row.problems[0].endswith("000000000003.jpg (sample 3; 1 of 8 images are so)")
    assert "000000000005.jpg is a damaged image" in row.problems[1]
    assert "(sample 5; 2 of 7 images are so)" in row.problems[1]


def test_images_are_drawn_or_all_opened(tmp_path: Path) -> None:
    count = OPENED + 6
    for i in range(count):
        write_image(tmp_path / "flickr30k-images" / f"{i}.jpg", seed=0)
    rows = [{"image": f"flickr30k-images/{i}.jpg", "caption": ["a star"]} for i in range(count)]
    write_json(tmp_path / "annotations" / "flickr30k_test.json", rows)
    few, every = (_by_split(tmp_path, tasks=["retrieval"], all_images=all_) for all_ in (False, True))
    assert few["retrieval", "test"].images_opened == OPENED
    assert every["retrieval", "test"].images_opened == count


def test_doubled_ids_are_named(tmp_path: Path) -> None:
    questions, _ = write_vqa(tmp_path)
    content = json.loads(questions.read_text())
    content["questions"].append(content["questions"][4])
    questions.write_text(json.dumps(content))
    assert "question_id 11 occurs twice" in _by_split(tmp_path)["vqa", "val"].problems[0]


def test_images_of_an_evaluated_split_are_set_aside(tmp_path: Path) -> None:
    write_coco(tmp_path, images=6, split="train")
    listed = [
        {
            "filepath": "val2014",
            "filename": f"COCO_val2014_{i:012d}.jpg",
            "cocoid": i,
            "split": "test",
            "sentences": [{"raw": "a star"}],
        }
        for i in (1, 4)
    ]
    write_json(tmp_path / "dataset_coco.json", {"images": listed})
    rows = _by_split(tmp_path, tasks=["caption"])
    assert rows["caption", "train"].set_aside == 2 and rows["caption", "train"].usable
    assert rows["caption", "test"].usable, "by the 2017 folder, where the file's own is not there"


def test_unknown_places_and_tasks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data folder"):
        check_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="task must be one of caption, vqa, gqa, retrieval, got 'okvqa'"):
        check_folder(tmp_path, ["okvqa"])


@pytest.fixture
def checked(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: object) -> tuple[int, str, str]:
        code = run(["data", "check", *map(str, arguments)])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


def test_the_command_says_what_a_task_lacks(tmp_path: Path, checked: Callable[..., tuple[int, str, str]]) -> None:
    write_gqa(tmp_path / "gqa")
    write_flickr(tmp_path / "flickr30k", split="train")
    code, out, _ = checked(tmp_path, "--json")
    report = json.loads(out)
    assert code == 0 and report["evaluation"] == ["gqa"] and report["calibration"] == ["retrieval"]
    assert checked(tmp_path / "gqa", "--task", "gqa")[0] == 0
    code, out, err = checked(tmp_path, "--task", "gqa", "--task", "retrieval")
    assert code == 2 and "evaluation: gqa" in out
    assert "task retrieval cannot be evaluated from" in err and "flickr30k_test.json" in err and err.count("\n") == 1


def test_the_command_fails_on_what_is_broken_or_empty(
    tmp_path: Path, checked: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, err = checked(tmp_path)
    assert code == 2 and "holds no data set in a publisher's layout" in err
    write_coco(tmp_path)
    (tmp_path / "val2017" / "000000000002.jpg").write_bytes(b"")
    code, out, err = checked(tmp_path, "--images")
    assert code == 2 and "000000000002.jpg" in err and "wrong: " in out and "broken" in out
    assert checked(tmp_path / "nowhere")[0] == 2
