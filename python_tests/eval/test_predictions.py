"""Files of predictions: killed runs go on to the same bits, damage is named, other runs refused, scores come back."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import numbers
from tiny_blip2 import blip2_itm, blip2_opt, processor, write_coco, write_flickr, write_vqa

from mmq_kernels.eval import (
    DataError,
    EvalOptions,
    EvalResult,
    PredictionsError,
    Prepared,
    evaluate_prepared,
    prepare,
    score_predictions,
)
from mmq_kernels.eval.work import same_bits

OPTIONS = EvalOptions(batch_size=2, num_beams=2, max_new_tokens=4, meteor=False, top_k=3)
ROOT = Path(__file__).resolve().parents[2]
TASKS = ("caption", "vqa", "retrieval")
KILLS = {"caption": 6, "vqa": 12, "retrieval": 8}


class Stop(Exception):
    """Ends a run in its middle."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("data")
    write_coco(root / "coco", images=7)
    write_vqa(root / "vqav2", images=5)
    write_flickr(root / "flickr30k", images=7)
    return {"caption": root / "coco", "vqa": root / "vqav2", "retrieval": root / "flickr30k"}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As in killed.py, which forks: torch's sums depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def undisturbed(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Any, Prepared, EvalResult, Path]]:
    """Of each task a model, its data, and what a run gives that nothing disturbs."""
    out, found = tmp_path_factory.mktemp("undisturbed"), {}
    for task, folder in folders.items():
        model = blip2_itm() if task == "retrieval" else blip2_opt()
        data = prepare(task, folder, processor(), tokenizer="plain")
        path = out / f"{task}.jsonl"
        found[task] = model, data, evaluate_prepared(model, data, options=OPTIONS, predictions=path), path
    return found


def interrupted(model: Any, data: Prepared, path: Path, after: int, **more: Any) -> None:
    """A run that ends when so many pieces of it are done."""

    def stop(done: int, _: int) -> None:
        if done >= after:
            raise Stop

    with pytest.raises(Stop):
        evaluate_prepared(model, data, options=OPTIONS, predictions=path, progress=stop, **more)


def same(path: Path, expected: Path) -> bool:
    return all(
        path.with_name(path.name + end).read_bytes() == expected.with_name(expected.name + end).read_bytes()
        for end in ("", ".run.json")
    )


@pytest.mark.parametrize("task", TASKS)
def test_an_interrupted_run_goes_on_where_it_was(task: str, undisturbed: Any, tmp_path: Path) -> None:
    model, data, expected, whole = undisturbed[task]
    path, seen = tmp_path / "p.jsonl", []  # type: ignore[var-annotated]
    interrupted(model, data, path, 25 if task == "retrieval" else 5)  # of 14 texts, 7 images, 7 images matched
    assert not path.exists(), "a file is there when all of it is"
    with pytest.raises(PredictionsError, match=r"p\.jsonl\.partial holds an unfinished run; go on with --resume"):
        evaluate_prepared(model, data, options=OPTIONS, predictions=path)
    again = evaluate_prepared(
        model, data, options=OPTIONS, predictions=path, resume=True, progress=lambda *at: seen.append(at)
    )
    assert numbers(again) == numbers(expected) and same(path, whole)
    assert seen[0][0] >= (23 if task == "retrieval" else 4) and seen[-1][0] == seen[-1][1] and seen == sorted(seen)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["p.jsonl", "p.jsonl.run.json"]


@pytest.mark.parametrize("task", TASKS)
def test_killed_at_random_moments(task: str, folders: dict[str, Path], undisturbed: Any, tmp_path: Path) -> None:
    """With SIGKILL, taken up each time; see killed.py."""
    _, _, expected, whole = undisturbed[task]
    path, seed, kills = tmp_path / "p.jsonl", TASKS.index(task), KILLS[task]
    done = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("killed.py")),
            task,
            str(folders[task]),
            str(path),
            str(kills),
            str(seed),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    killed, kept = map(int, done.stdout.split())
    assert killed == kills and kept >= kills // 4, "some were killed in the middle"
    assert same(path, whole)
    assert numbers(score_predictions(path))["metrics"] == numbers(expected)["metrics"]


@pytest.mark.parametrize("task", TASKS)
def test_scores_come_back_from_the_file_alone(task: str, undisturbed: Any, tmp_path: Path) -> None:
    _, _, expected, whole = undisturbed[task]
    found = score_predictions(whole)
    for name in ("task", "metrics", "intervals", "breakdown", "samples", "records", "settings", "versions"):
        assert getattr(found, name) == getattr(expected, name), name
    bare = shutil.copy(whole, tmp_path / "bare.jsonl")
    alone = score_predictions(bare, tokenizer="plain", meteor=False)
    assert (alone.task, alone.metrics, alone.intervals) == (expected.task, expected.metrics, expected.intervals)
    if task == "vqa":
        assert score_predictions(whole, seed=5).intervals != expected.intervals


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("cut", [1, 30, 600])
def test_a_cut_off_file_is_named_and_completed(task: str, cut: int, undisturbed: Any, tmp_path: Path) -> None:
    model, data, expected, whole = undisturbed[task]
    path = tmp_path / whole.name
    shutil.copy(whole.with_name(f"{whole.name}.run.json"), tmp_path)
    path.write_bytes(whole.read_bytes()[:-cut])
    if cut > 1:  # else it lacks the end of its last line alone, and every prediction is there
        with pytest.raises(PredictionsError, match=rf"{path.name}(, line \d+, its last, is cut off| holds \d+ of the)"):
            score_predictions(path)
    again = evaluate_prepared(model, data, options=OPTIONS, predictions=path, resume=True)
    assert numbers(again) == numbers(expected)
    assert same(path, whole) or cut == 1


def test_a_whole_file_is_scored_and_left_as_it_is(undisturbed: Any, tmp_path: Path) -> None:
    model, data, expected, whole = undisturbed["vqa"]
    before = whole.stat().st_mtime_ns
    found = evaluate_prepared(model, data, options=OPTIONS, predictions=whole, resume=True)
    assert numbers(found) == numbers(expected) and whole.stat().st_mtime_ns == before
    assert found.to_json()["samples_per_second"] is None


def damage_text(lines: list[bytes]) -> None:
    lines[2] = lines[2].replace(b'"caption": "', b'"caption": "x')


def damage_json(lines: list[bytes]) -> None:
    lines[2] = lines[2][:20]


def repeat(lines: list[bytes]) -> None:
    lines.insert(2, lines[1])


@pytest.mark.parametrize(
    ("hurt", "why"),
    [(damage_text, "not as it was written"), (damage_json, "line 3 is damaged"), (repeat, "there twice")],
)
def test_damage_elsewhere_is_named_and_what_is_left_kept(
    hurt: Callable[[list[bytes]], None], why: str, undisturbed: Any, tmp_path: Path
) -> None:
    model, data, _, whole = undisturbed["caption"]
    path = tmp_path / whole.name
    shutil.copy(whole.with_name(f"{whole.name}.run.json"), tmp_path)
    lines = whole.read_bytes().splitlines(keepends=True)
    hurt(lines)
    path.write_bytes(b"".join(lines))
    for go in (
        lambda: score_predictions(path),
        lambda: evaluate_prepared(model, data, options=OPTIONS, predictions=path, resume=True),
    ):
        with pytest.raises(
            PredictionsError, match=r"caption\.jsonl, line 3 is damaged \(.*\); delete that line"
        ) as error:
            go()
        assert why in str(error.value)
    path.write_bytes(b"".join(lines[:2] + lines[3:]))  # as it says
    evaluate_prepared(model, data, options=OPTIONS, predictions=path, resume=True)
    assert same(path, whole)


@pytest.mark.parametrize("task", ["vqa", "retrieval"])
def test_damage_of_an_unfinished_run(task: str, undisturbed: Any, tmp_path: Path) -> None:
    model, data, _, whole = undisturbed[task]
    path = tmp_path / "p.jsonl"
    interrupted(model, data, path, 18 if task == "retrieval" else 9)
    part = path.with_name("p.jsonl.partial") / "rank-0.jsonl"
    content = part.read_bytes()
    part.write_bytes(content.replace(b'"sample": 1', b'"sample": 2', 1))
    with pytest.raises(PredictionsError, match=r"rank-0\.jsonl, line \d is damaged \(it is not as it was written\)"):
        evaluate_prepared(model, data, options=OPTIONS, predictions=path, resume=True)
    part.write_bytes(content[:-7])
    evaluate_prepared(model, data, options=OPTIONS, predictions=path, resume=True)
    assert same(path, whole)


def test_predictions_of_another_run_are_refused(undisturbed: Any, tmp_path: Path) -> None:
    model, data, _, whole = undisturbed["vqa"]
    path = tmp_path / "p.jsonl"
    interrupted(model, data, path, 3)
    go = {"predictions": path, "resume": True}
    with pytest.raises(PredictionsError, match=r"p\.jsonl\.partial is of another run: batch_size is 2 there, 3 here"):
        evaluate_prepared(model, data, options=replace(OPTIONS, batch_size=3), **go)
    other = blip2_opt()
    with torch.no_grad():
        other.language_model.model.decoder.layers[0].fc1.weight[0, 0] += 1e-3
    with pytest.raises(
        PredictionsError, match=r"another run: model is Blip2\w+ [0-9a-f]+ there, Blip2\w+ [0-9a-f]+ here$"
    ):
        evaluate_prepared(other, data, options=OPTIONS, **go)
    with pytest.raises(
        PredictionsError, match=r"another run: data is .* there, .* here; limit is nothing there, 4 here"
    ):
        evaluate_prepared(model, prepare("vqa", data.folder, processor(), limit=4), options=OPTIONS, **go)
    with pytest.raises(PredictionsError, match=r"vqa\.jsonl is of another run: decoding is .*; generate is true there"):
        evaluate_prepared(
            model, data, options=replace(OPTIONS, generate=False, num_beams=1), predictions=whole, resume=True
        )
    bare = shutil.copy(whole, tmp_path / "bare.jsonl")
    with pytest.raises(
        PredictionsError, match=r"bare\.jsonl may be of another run: there is no bare\.jsonl\.run\.json"
    ):
        evaluate_prepared(model, data, options=OPTIONS, predictions=bare, resume=True)
    with pytest.raises(ValueError, match="resume needs predictions"):
        evaluate_prepared(model, data, options=OPTIONS, resume=True)


def test_a_run_in_progress_is_not_disturbed(undisturbed: Any, tmp_path: Path) -> None:
    model, data, _, whole = undisturbed["vqa"]
    path, refused = tmp_path / "p.jsonl", []  # type: ignore[var-annotated]

    def second(done: int, _: int) -> None:
        if done == 6:
            with pytest.raises(PredictionsError, match=r"p\.jsonl\.partial is in use by another process") as error:
                evaluate_prepared(model, data, options=OPTIONS, predictions=path, resume=True)
            refused.append(error)

    evaluate_prepared(model, data, options=OPTIONS, predictions=path, progress=second)
    assert refused and same(path, whole)


def test_files_that_hold_no_predictions(tmp_path: Path, undisturbed: Any) -> None:
    path = tmp_path / "p.jsonl"
    with pytest.raises(PredictionsError, match=r"no predictions .*p\.jsonl"):
        score_predictions(path)
    path.write_text("")
    with pytest.raises(DataError, match=r"p\.jsonl holds no predictions"):
        score_predictions(path)
    path.write_text('{"id": 1, "image": "a.jpg"}\n')
    with pytest.raises(DataError, match="a record with id, image is of no task that is known"):
        score_predictions(path)
    path.write_text('[1]\n{"id": 1, "image": "a.jpg"}\n')
    with pytest.raises(PredictionsError, match=r"line 1 is damaged .it is no record of a prediction"):
        score_predictions(path)
    with pytest.raises(DataError, match="holds records of task vqa, not of caption"):
        score_predictions(undisturbed["vqa"][3], task="caption")
    model, data, *_ = undisturbed["vqa"]
    with pytest.raises(PredictionsError, match=r"no folder .*nowhere for predictions"):
        evaluate_prepared(model, data, options=OPTIONS, predictions=tmp_path / "nowhere" / "p.jsonl")
    about = path.with_name("p.jsonl.run.json")
    for content, message in (
        ("{", "it does not say which run"),
        ('{"version": 9, "facts": {}, "scoring": {}}', "is of version 9"),
    ):
        about.write_text(content)
        with pytest.raises(PredictionsError, match=message):
            score_predictions(path)


def test_attention_does_not_depend_on_the_number_of_threads() -> None:
    """torch's fused attention does: it then gave other last bits on one thread than on two."""
    generator, threads, found = torch.Generator().manual_seed(0), torch.get_num_threads(), []
    inputs = [torch.randn(16, 4, length, 32, generator=generator) for length in (1, 21, 21)]
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with same_bits(torch.device("cpu")):
                found.append(torch.nn.functional.scaled_dot_product_attention(*inputs))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found)
