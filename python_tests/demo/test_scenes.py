"""Scenes, what is said about them, and the data sets written from them."""

import hashlib
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mmq_kernels.demo import scenes
from mmq_kernels.demo import world as demo_world
from mmq_kernels.demo.samples import TRAIN_SEEDS, as_jpeg
from mmq_kernels.demo.scenes import COLORS, SHAPES, captions, make_scene, questions, render
from mmq_kernels.demo.world import WorldSize, write_world
from mmq_kernels.eval import datasets

SMALL = WorldSize(train=6, images=5, questions=4, gallery=12)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("demo") / "world", seed=0, size=SMALL)


def _digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_seed_gives_one_scene_and_one_picture() -> None:
    for seed in range(20):
        first, again = make_scene(seed), make_scene(seed)
        assert first == again
        assert render(first).tobytes() == render(again).tobytes()
    assert len({make_scene(seed).identity for seed in range(200)}) > 150


def test_objects_do_not_touch_and_stand_from_left_to_right() -> None:
    for seed in range(300):
        scene = make_scene(seed)
        xs = [thing.x for thing in scene.objects]
        assert xs == sorted(xs)
        assert len({thing.name for thing in scene.objects}) == len(scene.objects)
        for i, one in enumerate(scene.objects):
            for other in scene.objects[i + 1 :]:
                assert np.hypot(one.x - other.x, one.y - other.y) > one.radius + other.radius


def test_an_object_has_its_colour_where_it_is() -> None:
    for seed in range(60):
        scene = make_scene(seed)
        picture = np.asarray(render(scene)).astype(int)
        for thing in scene.objects:
            shown = picture[round(thing.y), round(thing.x)]
            assert np.abs(shown - COLORS[thing.color]).max() <= 4 * scene.noise + 2


def test_captions_name_everything_in_order() -> None:
    scene = next(s for s in map(make_scene, range(100)) if len(s.objects) == 3)
    for caption in captions(scene):
        places = [caption.index(thing.name) for thing in scene.objects]
        assert places == sorted(places)
        assert scene.background in caption
    assert len(set(captions(scene))) == scenes.CAPTIONS


def _answer(scene: scenes.Scene, question: scenes.Question) -> str | None:
    """The answer to kinds of question that can be read off the scene without parsing much."""
    words = question.text.rstrip("?").split()
    if question.kind == "background":
        return scene.background
    if question.kind == "place":
        return getattr(scene.objects[0 if "leftmost" in words else -1], words[1])
    if question.kind == "exists":
        color, shape = words[-2:]
        return "yes" if any((o.color, o.shape) == (color, shape) for o in scene.objects) else "no"
    if question.kind == "count":
        value = words[2] if words[2] != "objects" else None
        matching = [o for o in scene.objects if value is None or value in (o.color, o.shape, o.size)]
        return scenes.NUMBERS[len(matching)]
    return None


def test_answers_are_right() -> None:
    checked: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for seed in range(400):
        scene = make_scene(seed)
        for question in questions(scene, 8, random.Random(seed)):
            kinds[question.kind] += 1
            wanted = _answer(scene, question)
            if wanted is not None:
                assert question.answer == wanted, (scene, question)
                checked[question.kind] += 1
    assert set(checked) == {"background", "place", "exists", "count"}
    assert set(kinds) == {*checked, "color", "shape", "size", "two-step"}
    assert min(kinds.values()) > 100


def test_a_questions_answer_does_not_follow_from_its_kind() -> None:
    answers: dict[tuple[str, ...], Counter[str]] = {}
    for seed in range(800):
        for question in questions(make_scene(seed), 6, random.Random(seed)):
            kind = (question.kind, *question.text.split()[:2])
            answers.setdefault(kind, Counter())[question.answer] += 1
    for kind, counts in answers.items():
        assert counts.most_common(1)[0][1] / counts.total() < 0.75, (kind, counts)


def test_the_same_world_is_written_twice(world: Path, tmp_path: Path) -> None:
    again = write_world(tmp_path / "world", seed=0, size=SMALL)
    assert _digest(world) == _digest(again)
    before = (world / "world.json").stat().st_mtime_ns
    assert write_world(world, seed=0, size=SMALL) == world
    assert (world / "world.json").stat().st_mtime_ns == before


def test_another_seed_shares_no_picture(world: Path, tmp_path: Path) -> None:
    other = write_world(tmp_path / "world", seed=1, size=SMALL)
    pictures = [{d for name, d in _digest(folder).items() if name.endswith(".jpg")} for folder in (world, other)]
    assert not pictures[0] & pictures[1]


def test_what_is_in_the_way_is_kept(world: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds something else"):
        write_world(tmp_path, size=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(FileExistsError):
        write_world(world, seed=2, size=SMALL)
    with pytest.raises(ValueError, match="seed of a world must be between 0 and 9, got 10"):
        write_world(tmp_path / "world", seed=10, size=SMALL)


def test_splits_are_apart_and_unseen_in_training(world: Path) -> None:
    digests = _digest(world)
    train = {digest for name, digest in digests.items() if "/train20" in name}
    held_out = {digest for name, digest in digests.items() if "/val20" in name}
    karpathy = json.loads((world / "flickr30k" / "dataset_flickr30k.json").read_text())["images"]
    gallery = {digests[f"flickr30k/flickr30k-images/{i['filename']}"] for i in karpathy if i["split"] == "test"}
    calibration = {digests[f"flickr30k/flickr30k-images/{i['filename']}"] for i in karpathy if i["split"] == "train"}
    gqa_val = {digest for name, digest in digests.items() if name.startswith("gqa/images/9")}
    groups = [train, held_out, gallery, calibration, gqa_val]
    assert all(groups)
    assert all(not a & b for i, a in enumerate(groups) for b in groups[i + 1 :])
    assert 9 * demo_world._WORLD_SEEDS + 5 * demo_world._SPLIT_SEEDS < TRAIN_SEEDS


def test_the_gallery_can_be_told_apart(world: Path) -> None:
    rows = json.loads((world / "flickr30k" / "annotations" / "flickr30k_test.json").read_text())
    assert len(rows) == SMALL.gallery
    said = [caption for row in rows for caption in row["caption"]]
    assert len(set(said)) == len(said)


def test_the_package_reads_what_it_writes(world: Path) -> None:
    captioned = datasets.load("caption", world / "coco")
    assert len(captioned) == SMALL.images
    assert all(len(sample.references) == scenes.CAPTIONS for sample in captioned)
    asked = datasets.load("vqa", world / "vqav2")
    assert len(asked) == SMALL.images * SMALL.questions
    assert all(len(sample.answers) == 10 for sample in asked)
    by_karpathy = datasets.load("caption", world / "coco", "test")
    assert [(s.image, s.references) for s in by_karpathy] == [(s.image, s.references) for s in captioned]
    for split, scenes_asked in (("testdev", SMALL.images), ("val", 1)):
        asked = datasets.load("gqa", world / "gqa", split)
        assert len({sample.image for sample in asked}) == scenes_asked
        kinds = {(sample.structural_type, sample.semantic_type) for sample in asked}
        assert kinds <= set(demo_world._GQA_TYPES.values())
    assert len(datasets.calibration_samples("gqa", world / "gqa", 8)) == 8
    gallery = datasets.load("retrieval", world / "flickr30k")
    assert len(gallery.images) == SMALL.gallery
    assert len(gallery.captions) == SMALL.gallery * scenes.CAPTIONS


def test_pictures_in_training_are_those_of_the_files(world: Path) -> None:
    from PIL import Image

    written = np.asarray(Image.open(world / "coco" / "train2017" / "000000000001.jpg"))
    assert np.array_equal(written, np.asarray(as_jpeg(render(make_scene(0)))))


def test_every_colour_and_shape_is_used() -> None:
    things = [thing for seed in range(200) for thing in make_scene(seed).objects]
    assert {thing.color for thing in things} == set(COLORS)
    assert {thing.shape for thing in things} == set(SHAPES)


def test_what_is_only_taught_is_right_and_never_asked() -> None:
    found: Counter[str] = Counter()
    for seed in range(300):
        scene = make_scene(seed)
        for question in questions(scene, 8, random.Random(seed), taught=True):
            found[question.kind] += 1
            if question.kind == "same":
                attribute = question.text.rstrip("?").split()[-1]
                values = {getattr(thing, attribute) for thing in scene.objects}
                assert question.answer == "yes" or len(values) > 1
            if question.kind == "relation" and len(scene.objects) == 2:
                first = question.text.removeprefix("is the ").split(" of the ")[0]
                side = first.split()[-1]
                left = scene.objects[0]
                named = [word for word in first.split()[:-1] if word != "object"]
                is_left = all(word in left.name.split() for word in named)
                assert question.answer == ("yes" if is_left == (side == "left") else "no"), (scene, question)
    assert found["same"] > 50
    assert found["relation"] > 100
