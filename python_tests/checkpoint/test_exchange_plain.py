"""What we export loads in plain transformers with compressed-tensors, in a process without this package."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from exchange_cases import linears, quantized_folder, settings_of
from safetensors.torch import load_file
from tiny_families import TINY, logits
from tiny_vlms import make

from mmq_kernels import QuantLinear, QuantSpec
from mmq_kernels.checkpoint import export_folder, load, save
from mmq_kernels.models import quantize_model

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed (pip install -e .[dev])")

RECIPES = {
    "4": "all=rtn:4:g8:sym",
    "8": "all=rtn:8:g8:sym",
    "asymmetric": "all=rtn:4:g8",
    "mixed": "vision=rtn:4:g8:sym connector=rtn:8:sym language=rtn:3:g16:sym language/last=rtn:8:sym",
}
ASYMMETRIC = "asymmetric"
CASES = [("llava", recipe) for recipe in RECIPES]
CASES += [(family, "mixed") for family in ("instructblip", "qwen2_vl", "idefics3")]
if transformers.__version__.startswith("4."):  # mistakes the shape of zero points, whatever it is asked for
    CASES.remove(("llava", ASYMMETRIC))
DTYPES = ("float32", "bfloat16")

_PLAIN = """
import json, sys
import torch, transformers
from safetensors.torch import save_file
from tiny_families import TINY, logits

found = {}
for folder, family, dtype, dequantize in json.loads(sys.argv[1]):
    more = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    architecture = json.load(open(folder + "/config.json"))["architectures"][0]
    dtype = getattr(torch, dtype)
    model = getattr(transformers, architecture).from_pretrained(folder, dtype=dtype, **more).eval()
    with torch.no_grad():
        found[folder] = logits(model(**TINY[family].calls(1, dtype)[0])).contiguous()
assert not [name for name in sys.modules if name.startswith("mmq_kernels")]
save_file(found, sys.argv[2])
"""


def answers(folder: Path, family: str, dtype: torch.dtype) -> torch.Tensor:
    """What our own model says, computed in `dtype`."""
    model = load(folder, dtype=dtype)
    with torch.no_grad():
        return logits(model(**TINY[family].calls(1, dtype)[0])).float()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], tuple[Path, torch.Tensor]]:
    """Our folder, and the logits of plain transformers on its export, by family, recipe and dtype."""
    folder = tmp_path_factory.mktemp("plain")
    asked, ours = [], {}
    for (family, name), dtype in itertools.product(CASES, DTYPES):
        key = (family, name, dtype)
        ours[key], theirs = folder / "-".join(key), folder / f"ct-{'-'.join(key)}"
        model = TINY[family].make(getattr(torch, dtype))
        quantize_model(model, RECIPES[name])
        save(model, ours[key])
        report = export_folder(ours[key], theirs, "compressed-tensors")
        assert bool(report["caution"]) == (name == ASYMMETRIC)
        asked.append((str(theirs), family, dtype, name == ASYMMETRIC))
    tests = str(Path(__file__).parent.parent)
    subprocess.run(
        [sys.executable, "-c", _PLAIN, json.dumps(asked), str(folder / "logits")],
        check=True,
        timeout=240,
        env={"PYTHONPATH": tests, "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"},
        cwd=folder,
    )
    found = load_file(folder / "logits")
    return {key: (ours[key], found[path].float()) for key, (path, *_) in zip(ours, asked, strict=True)}


@pytest.mark.parametrize(("family", "recipe"), CASES)
def test_plain_transformers_gives_our_logits(family: str, recipe: str, exported) -> None:
    """In fp32 to a few roundings (of fp16, where they dequantize to the dtype of the scales first); in bf16 no further
    from the answer in fp32 than twice as far as ours is.
    """
    folder, theirs = exported[family, recipe, "float32"]
    ours = answers(folder, family, torch.float32)
    roundings = 4e-3 if recipe == ASYMMETRIC else 2e-5
    assert (theirs - ours).abs().max() <= roundings * ours.abs().max()
    folder, theirs = exported[family, recipe, "bfloat16"]
    exact, ours = answers(folder, family, torch.float32), answers(folder, family, torch.bfloat16)
    assert (theirs - exact).abs().max() <= 2 * (ours - exact).abs().max()
    assert (theirs - ours).norm() <= 0.05 * ours.norm()


def test_mixed_layers_share_one_file(exported) -> None:
    folder, _ = exported["llava", "mixed", "float32"]
    specs = {m.spec for m in load(folder).modules() if isinstance(m, QuantLinear)}
    assert {spec.bits for spec in specs} == {3, 4, 8}
    groups = settings_of(folder.with_name(f"ct-{folder.name}"))["config_groups"].values()
    assert {group["weights"]["num_bits"] for group in groups} == {3, 4, 8}


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_compressed_tensors_own_code_reads_every_layer(kind: str, tmp_path: Path) -> None:
    """Schemes found by its matching, weights decompressed by its compressor: our weights, to the last bit."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import is_match, match_targets

    widths = [QuantSpec(bits, group, sym) for bits in range(2, 9) for group in (8, -1) for sym in (False, True)]
    model = make(kind)
    chosen = dict(zip(linears(model), widths, strict=False))
    folder = quantized_folder(tmp_path / "q", kind, torch.float32, chosen)
    export_folder(folder, tmp_path / "ct", "compressed-tensors")
    config = QuantizationConfig.model_validate(settings_of(tmp_path / "ct"))
    assert config.quantization_status == "compressed"
    schemes = {target: scheme for scheme in config.config_groups.values() for target in scheme.targets}
    tensors = load_file(tmp_path / "ct" / "model.safetensors")
    ours = load(folder)
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        ignored, found = is_match(name, module, config.ignore), match_targets(name, module, schemes)
        assert ignored == (name not in chosen) and bool(found) == (name in chosen), name
        if name in chosen:
            scheme, spec = schemes[found[0]], chosen[name]
            assert {schemes[target].weights.num_bits for target in found} == {spec.bits}
            own = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.weight_")}
            dense = BaseCompressor.get_value_from_registry(config.format).decompress(own, scheme)["weight"]
            assert torch.equal(dense, ours.get_submodule(name).dequantize(torch.float16)), name
