"""The shipped miniatures: good enough to measure on, hard enough that bits matter, better under GPTQ than rounded."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from mmq_kernels import checkpoint
from mmq_kernels import eval as evaluation
from mmq_kernels.demo import check_llava, weights_folder
from mmq_kernels.demo.architecture import vocabulary
from mmq_kernels.demo.check import HELD_OUT_SEED, PARTS, measure, rounded
from mmq_kernels.demo.scenes import make_scene
from mmq_kernels.demo.world import WorldSize, write_world
from mmq_kernels.eval.calibration import CalibrationSource
from mmq_kernels.models import quantize_model
from mmq_kernels.nn import QuantLinear
from mmq_kernels.spec import QuantSpec

NAMES = ("blip2", "blip2-itm")
SIZE = WorldSize(train=64, images=150, questions=6, gallery=250)


@cache
def model(name: str) -> Any:
    return checkpoint.load(weights_folder(name), dtype=torch.float32)


@cache
def processor(name: str) -> Any:
    return checkpoint.load_processor(weights_folder(name))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("weights") / "world", seed=7, size=SIZE)


@pytest.fixture(scope="module")
def scores(world: Path) -> Any:
    """Metrics of a model under a recipe, each measured once."""
    data = {"blip2": {"caption": "coco", "vqa": "vqav2"}, "blip2-itm": {"retrieval": "flickr30k"}}
    prepared = {
        name: {
            task: evaluation.prepare(
                task, world / folder, processor(name), captions_per_image=1 if task == "retrieval" else None
            )
            for task, folder in tasks.items()
        }
        for name, tasks in data.items()
    }
    batches = {
        name: CalibrationSource.parse([f"{task}:{world / folder}" for task, folder in tasks.items()], 64).batches(
            model(name), processor(name)
        )
        for name, tasks in data.items()
    }
    options = evaluation.EvalOptions(batch_size=60, meteor=False, top_k=4)

    @cache
    def measured(name: str, recipe: str) -> tuple[dict[str, Any], Any]:
        quantized = copy.deepcopy(model(name))
        report = quantize_model(quantized, recipe, batches[name]) if recipe else None
        results = {}
        for task, samples in prepared[name].items():
            result = evaluation.evaluate_prepared(quantized, samples, options=options)
            results |= {f"{task} {metric}": value for metric, value in result.metrics.items()}
        return results, report

    return measured


@pytest.mark.parametrize("name", NAMES)
def test_they_are_small_half_precision_and_complete(name: str) -> None:
    folder = weights_folder(name)
    weights = folder / "model.safetensors"
    assert weights.stat().st_size <= 16 * 2**20
    entries = checkpoint.shards.Folder(folder).entries
    assert {entry.dtype for entry in entries.values()} == {torch.float16}
    words = vocabulary(retrieval=name == "blip2-itm")
    assert processor(name).tokenizer.get_vocab() == {word: i for i, word in enumerate(words)}
    assert (folder / "README.md").is_file()


def test_groups_are_exercised() -> None:
    widths = {m.in_features for name in NAMES for m in model(name).modules() if isinstance(m, torch.nn.Linear)}
    assert all(width % 64 == 0 for width in widths)
    assert any(width % 128 for width in widths)


def test_the_writer_sees_counts_reads_and_places() -> None:
    scenes = [make_scene(HELD_OUT_SEED + i) for i in range(100)]
    found = measure(model("blip2"), processor("blip2"), scenes, 6)
    assert found["vqa"] >= 0.9
    assert min(found["kinds"].values()) >= 0.9, found
    assert found["exact"] >= 0.85


def test_every_part_feels_two_bits() -> None:
    scenes = [make_scene(HELD_OUT_SEED + 1000 + i) for i in range(100)]
    base = measure(model("blip2"), processor("blip2"), scenes, 6)
    low = {}
    for part, prefixes in PARTS.items():
        with rounded(model("blip2"), prefixes, QuantSpec(2, 64)) as changed:
            low[part] = measure(changed, processor("blip2"), scenes, 6)
    for part in ("vision", "language"):
        drops = [base[metric] - low[part][metric] for metric in ("vqa", "exact")]
        assert max(drops) >= 0.05, (part, drops)
    ratios = [low["connector"][nll] / base[nll] for nll in ("caption_nll", "answer_nll")]
    assert max(ratios) >= 1.05


def test_the_matcher_finds_pictures_and_texts(scores: Any) -> None:
    found, _ = scores("blip2-itm", "")
    assert found["retrieval text_r1"] >= 0.7
    assert found["retrieval image_r1"] >= 0.7


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rule", ["4:g64", "3:channel", "2:g64"])
def test_gptq_is_below_rounding_on_every_layer(name: str, rule: str, scores: Any) -> None:
    _, report = scores(name, f"all=gptq:{rule}")
    for layer in report.layers:
        assert layer.used == "gptq", layer
        assert layer.error < layer.rtn_error, layer


def test_four_bits_keep_98_percent(scores: Any) -> None:
    for name in NAMES:
        base, low = scores(name, "")[0], scores(name, "all=gptq:4:g64")[0]
        for metric, value in base.items():
            if value is None:
                continue
            if "nll" in metric:
                assert low[metric] <= value + 0.01, (metric, value, low[metric])
            else:
                assert low[metric] >= 0.98 * value, (metric, value, low[metric])


METRICS = {
    "blip2": ("caption nll", "caption cider", "vqa nll", "vqa accuracy"),
    "blip2-itm": ("retrieval text_r1", "retrieval image_r1", "retrieval text_r1_contrastive"),
}


@pytest.mark.parametrize("rule", ["3:channel", "2:g64"])
def test_gptq_beats_rounding_on_every_task(rule: str, scores: Any) -> None:
    """Never behind, and ahead where there is room: at 3 bits the likelihood alone has to tell them apart."""
    for name, metrics in METRICS.items():
        rtn, gptq = (scores(name, f"all={method}:{rule}")[0] for method in ("rtn", "gptq"))
        ahead = {m: (rtn[m] - gptq[m]) if "nll" in m else (gptq[m] - rtn[m]) / max(rtn[m], 1) for m in metrics}
        assert min(ahead.values()) >= 0, (ahead, rtn, gptq)
        clear = ahead if rule == "2:g64" else {m: value for m, value in ahead.items() if "nll" in m}
        assert all(value > 0 for value in clear.values()), (ahead, rtn, gptq)


def test_uniform_falls(scores: Any) -> None:
    four, three, two = (scores("blip2", f"all=uniform:{bits}")[0] for bits in (4, 3, 2))
    for metric in ("caption cider", "vqa accuracy"):
        assert four[metric] > three[metric] > two[metric]
    assert two["vqa accuracy"] < 0.6 * four["vqa accuracy"]
    assert two["caption cider"] < 0.3 * four["caption cider"]


def test_what_was_optimized_is_what_runs() -> None:
    packed = copy.deepcopy(model("blip2"))
    quantize_model(packed, "vision=rtn:4:g64 connector=rtn:3 language=rtn:2:g64:sym")
    plain = copy.deepcopy(model("blip2"))
    for name, module in packed.named_modules():
        if isinstance(module, QuantLinear):
            plain.get_submodule(name).weight.data = module.dequantize()
    pixels = torch.randn(4, 3, 64, 64)
    words = torch.cat([torch.full((4, 8), 4), torch.randint(5, 60, (4, 9))], 1)
    with torch.no_grad():
        got, wanted = (m(pixel_values=pixels, input_ids=words).logits for m in (packed, plain))
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_llava_describes_and_answers_through_its_own_template() -> None:
    """The miniature LLaVA, called as any LLaVA is; two bits for its tower cost it most of that."""
    scenes = [make_scene(HELD_OUT_SEED + 1000 + i) for i in range(50)]
    whole = check_llava.measure(model("llava"), processor("llava"), scenes, 3)
    assert whole["vqa"] > 0.8 and whole["exact"] > 0.45
    with rounded(model("llava"), check_llava.PARTS["vision"], QuantSpec(2, 64)) as coarse:
        low = check_llava.measure(coarse, processor("llava"), scenes, 3)
    assert low["vqa"] < whole["vqa"] - 0.1 and low["caption_nll"] > 2 * whole["caption_nll"]
