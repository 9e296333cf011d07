"""Grids: what they expand to, and that an impossible one is named before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmq_kernels.cli.app import run
from mmq_kernels.demo import weights_folder
from mmq_kernels.quantize import Recipe
from mmq_kernels.sweep import Grid, Store, Sweep
from mmq_kernels.sweep.grid import shipped
from mmq_kernels.sweep.published import read_published


def of(content: dict[str, Any], **changes: Any) -> Grid:
    return Grid.of(content, **changes)


@pytest.mark.parametrize(
    ("name", "count"),
    [("gptq-captioning", 343), ("awq-captioning", 343), ("awq-retrieval", 49), ("uniform-captioning", 1423)],
)
def test_the_study_s_grids_are_shipped(name: str, count: int) -> None:
    for variant in (None, "study"):
        found = Grid.read(name, variant).configurations()
        assert len(found) == count == len({(each.method, *each.factors.items()) for each in found})
        for each in found[:: count // 20]:
            assert not each.recipe or str(Recipe.parse(each.recipe)) == each.recipe


def test_factors_are_those_of_the_published_tables(tmp_path: Path) -> None:
    """So that what is measured and what was published go through the same analysis."""
    header = "config,bit_size,type," + ",".join(f"{p}_{t}" for p in ("VIT", "QFORMER", "LLM")
                                                for t in ("FIRST", "MIDDLE", "LAST"))  # fmt: skip
    table = tmp_path / "uniform_captioning.csv"
    table.write_text(f"{header},CIDEr\n1,5,MLP,1,0,0,1,1,1,0,0,0,1.2\n")
    (published,) = read_published(table)
    ours = [dict(each.factors) for each in Grid.read("uniform-captioning").configurations()]
    assert dict(published.factors) in ours


def test_methods_of_a_grid_have_the_same_settings_unless_it_says_otherwise(content: dict[str, Any]) -> None:
    both = of(content, methods=["gptq", "awq", "uniform"], bits=[3], symmetric=True)
    assert [each.recipe for each in both.configurations()] == [
        " ".join(f"{part}={how}" for part in ("vision", "connector", "language"))
        for how in ("gptq:3:g64:sym", "awq:3:g64:sym", "uniform:3:tensor:sym")
    ]
    own = of(content, methods=["gptq", "awq"], bits=3, by_method={"awq": {"group_size": 128, "symmetric": False}})
    assert [each.recipe.split(":", 2)[2].split()[0] for each in own.configurations()] == ["g64:asym", "g128:asym"]
    study = Grid.read("gptq-captioning", "study").configurations()[0].recipe
    assert study.startswith("vision/attention=gptq:2:channel:sym vision/mlp=gptq:2:channel:sym connector/attention=")


def test_parts_layers_and_groups(content: dict[str, Any]) -> None:
    grid = of(content, bits={"vision.last": [2, 16], "language": 4}, layers=["both", "mlp"], group_size=[32, "channel"])
    found = {each.recipe: dict(each.factors) for each in grid.configurations()}
    assert len(found) == 8
    assert found["vision/last/mlp=gptq:2:g32:asym language/mlp=gptq:4:g32:asym"] == {
        "vision.last": 2,
        "language": 4,
        "layers": "mlp",
        "group": 32,
    }
    together = of(content, bits=[2, 3], together=[["vision", "connector"], ["language"]])
    assert [list(each.factors.values()) for each in together.configurations()] == [
        [2, 2, 16],
        [16, 16, 2],
        [3, 3, 16],
        [16, 16, 3],
    ]
    given = of(content, methods=[], bits=[], recipes=["language=rtn:4:g64", "*.fc1=rtn:4:g64 language=gptq:3"])
    assert [(each.method, list(each.factors)) for each in given.configurations()] == [
        ("rtn", ["vision", "connector", "language"]),
        ("gptq+rtn", ["recipe"]),
    ]


IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"bits": [3, 9]}, r"bits must be integers from 2 to 8, or 16, got 9"),
    ({"bits": {"vision": "4"}}, r"bits of vision must be integers from 2 to 8, or 16, got '4'"),
    ({"parts": ["vision", "eyes"]}, r"part must be one of vision, connector, language or such as .*, got 'eyes'"),
    ({"bits": {"vision": 3, "vision.last": 4}}, r"part vision.last is in vision, which is varied too"),
    ({"methods": ["gptq", "magic"]}, r"method must be one of uniform, rtn, gptq, gptq\+, awq, got 'magic'"),
    ({"group_size": 12}, r"group_size must be -1 or a positive multiple of 8, got 12 \(vision=gptq"),
    ({"group_size": "tensor"}, r"granularity of gptq must be channel or gN, got 'tensor'"),
    ({"layers": ["norms"]}, r"layers.0: input should be 'both', 'attention' or 'mlp', got 'norms'"),
    ({"tasks": {"poetry": "data"}}, r"task must be one of caption, vqa, .*, got 'poetry'"),
    ({"tasks": {}}, r"tasks must be an object of folders by task, got \{\}"),
    ({"tasks": {"vqa": {"data": "x", "split": "test"}}}, r"split of task vqa must be one of .*, got 'test'"),
    ({"calibration": {"data": ["coco"]}}, r"calibrate must be TASK:DIR with TASK one of .*, got 'coco'"),
    ({"recipes": ["language=rtn:1"]}, r"bits must be an integer from 2 to 8, or 16, got '1' \(language=rtn:1\)"),
    ({"methods": [], "recipes": []}, r"a grid must have methods and bits, or recipes"),
    ({"gptq": {"damping": 3.0}}, r"damping must be above 0 and at most 1, got 3.0"),
    ({"colour": "red"}, r"colour: extra inputs are not permitted, got 'red'"),
    ({"together": [["vision"]], "bits": {"vision": 3}}, r"bits must be a list where parts are varied together"),
]


@pytest.mark.parametrize(("changes", "message"), IMPOSSIBLE)
def test_impossible_entries_are_named(content: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        of(content, **changes)


def test_files_that_are_no_grids_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"grid must be a YAML or JSON file or one of awq-captioning, .*, got 'gptq'"):
        Grid.read("gptq")
    with pytest.raises(ValueError, match=r"grid file .*none.yaml does not exist"):
        Grid.read(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"list.yaml: a grid must be an object, got \[1, 2\]"):
        Grid.read(tmp_path / "list.yaml")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"grid file .*broken.json is no valid json"):
        Grid.read(tmp_path / "broken.json")
    with pytest.raises(ValueError, match=r"variant must be one of study, got 'mine'"):
        Grid.read("gptq-captioning", "mine")


def test_what_does_not_fit_model_or_data_is_named_before_anything_runs(
    content: dict[str, Any], world: Path, tmp_path: Path
) -> None:
    def refused(message: str, **changes: Any) -> None:
        grid = of(content, **changes)
        with pytest.raises((ValueError, RuntimeError), match=message):
            Sweep(grid, grid.configurations())

    matcher, flickr = str(weights_folder("blip2-itm")), {"retrieval": str(world / "flickr30k")}
    refused("the model has no component 'language' .*, in configuration gptq vision=2 ", model=matcher, tasks=flickr)
    refused("needs an image-text-retrieval model", tasks=flickr)
    refused(r"no data folder .*nowhere", tasks={"caption": str(tmp_path / "nowhere")})
    refused("calibration needs 999 samples, .* has 16 in its train split", calibration=dict(
        data=[f"caption:{world / 'coco'}"], samples=999))  # fmt: skip
    refused("gptq needs calibration data, the grid has none, in configuration gptq", calibration={"data": []})
    refused("is calibrated on task caption, .* got 'retrieval'", calibration=dict(
        data=[f"retrieval:{world / 'flickr30k'}"], samples=2))  # fmt: skip
    refused("matches no layer", recipes=["*.fc9=rtn:4"])
    refused("does not exist", model=str(tmp_path / "model"))


def test_a_damaged_image_is_named_first(content: dict[str, Any], world: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(world / "coco", tmp_path / "coco")
    image = sorted((tmp_path / "coco" / "val2017").iterdir())[3]
    image.write_bytes(image.read_bytes()[:400])
    grid = of(content, tasks={"caption": str(tmp_path / "coco")})
    with pytest.raises(ValueError, match=f"{image.name} is (a damaged|no) image"):
        Sweep(grid, grid.configurations()).check_images()


def test_a_dry_run_says_what_would_run_and_what_is_shared(
    content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "grid.json"
    path.write_text(json.dumps(content | {"bits": [2, 3, 4]}))
    assert run(["sweep", str(path), "-o", str(tmp_path / "results.db"), "--dry-run", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["rows"], said["there"], len(said["missing"])) == (54, 0, 54)
    assert {name: (count["shared"], count["alone"]) for name, count in said["quantizations"].items()} == {
        "vision": (3, 27),
        "connector": (9, 27),
        "language": (27, 27),
    }
    assert said["image_features"] == {"shared": 9, "alone": 27}
    assert not (tmp_path / "results.db").exists()
    assert run(["sweep", "--list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == shipped().keys()
    assert run(["sweep", str(path), "--dry-run", "--engine", "slurm"]) == 2
    assert "engine must be one of local, ray, got 'slurm'" in capsys.readouterr().err
    assert run(["sweep", str(path)]) == 2
    assert "a grid and --out must be given" in capsys.readouterr().err


def test_fingerprints_follow_what_numbers_depend_on(content: dict[str, Any], tmp_path: Path) -> None:
    def keys(**changes: Any) -> set[str]:
        grid = of(content, bits=4, **changes)
        return {row.fingerprint for row in Sweep(grid, grid.configurations()).rows}

    assert keys() == keys()
    others = [keys(seed=1), keys(gptq={"damping": 0.1}), keys(evaluation={"batch_size": 4}), keys(methods=["rtn"])]
    others.append(keys(calibration={**content["calibration"], "samples": 4}))
    assert not keys() & set().union(*others)
    assert sum(len(each) for each in others) == len(set().union(*others))
    store = Store(tmp_path / "results.db")
    assert store.missing(keys()) == keys()
