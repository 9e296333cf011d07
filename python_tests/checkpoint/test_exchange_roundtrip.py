"""Ours -> another format -> ours -> that format: every bit of either comes back."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exchange_cases import assert_same_tensors, linears, quantized_folder, settings_of
from sanitizer import SANITIZED
from tiny_vlms import assert_same_outputs, make

from mmq_kernels import QuantLinear, QuantSpec, _native
from mmq_kernels.checkpoint import disk_bytes, export_folder, import_folder, load, save
from mmq_kernels.checkpoint.format import parse
from mmq_kernels.nn import parameters_on_meta

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def specs(kind: str, bits: tuple[int, ...], groups: tuple[int, ...], *, ragged: bool, words: bool):
    """One spec for each linear of the model, all combinations in turn, where the format's rules admit them."""
    combinations = itertools.cycle(itertools.product((False, True), groups, bits))
    chosen = {}
    for name, linear in linears(make(kind)).items():
        n, k = linear.out_features, linear.in_features
        for symmetric, group, width in itertools.islice(combinations, 1000):
            if (words and (n * width % 32 or k * width % 32)) or (not ragged and group > 0 and k % group):
                continue
            chosen[name] = QuantSpec(width, group, symmetric)
            break
    assert len(chosen) > 20
    assert {spec.bits for spec in chosen.values()} == set(bits)
    assert {spec.group_size for spec in chosen.values()} == set(groups)
    assert {spec.symmetric for spec in chosen.values()} == {False, True}
    return chosen


def assert_every_bit_comes_back(source: Path, format: str, tmp_path: Path) -> None:
    export_folder(source, tmp_path / "there", format)
    import_folder(tmp_path / "there", tmp_path / "back")
    assert_same_tensors(source, tmp_path / "back")
    before, after = (parse(settings_of(folder), "") for folder in (source, tmp_path / "back"))
    assert before.layers == after.layers
    export_folder(tmp_path / "back", tmp_path / "again", format)
    assert_same_tensors(tmp_path / "there", tmp_path / "again")
    assert settings_of(tmp_path / "there") == settings_of(tmp_path / "again")
    assert_same_outputs(load(source), load(tmp_path / "back"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_compressed_tensors(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    chosen = specs(kind, (2, 3, 4, 5, 6, 7, 8), (8, 16, -1), ragged=False, words=False)
    assert_every_bit_comes_back(quantized_folder(tmp_path / "q", kind, dtype, chosen), "compressed-tensors", tmp_path)


@pytest.mark.parametrize("format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_gptq_with_ragged_groups_and_column_order(kind: str, dtype: torch.dtype, format: str, tmp_path: Path) -> None:
    chosen = specs(kind, (2, 3, 4, 8), (8, 24, -1), ragged=True, words=True)
    ordered = frozenset(name for i, name in enumerate(chosen) if i % 3 and chosen[name].group_size > 0)
    assert any(chosen[name].symmetric for name in ordered) and any(not chosen[name].symmetric for name in ordered)
    lowest = 1 if format == "gptq" else 0
    source = quantized_folder(tmp_path / "q", kind, dtype, chosen, ordered, lowest_zero=lowest)
    assert_every_bit_comes_back(source, format, tmp_path)


@pytest.mark.parametrize("group", [8, 16, -1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_awq(kind: str, dtype: torch.dtype, group: int, tmp_path: Path) -> None:
    chosen = specs(kind, (4,), (group,), ragged=False, words=False)
    assert_every_bit_comes_back(quantized_folder(tmp_path / "q", kind, dtype, chosen), "awq", tmp_path)


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "gptq_v2", "awq"])
def test_shards_and_the_files_that_are_no_weights(format: str, tmp_path: Path) -> None:
    chosen = dict.fromkeys(list(linears(make("opt")))[:9], QuantSpec(4, 8))
    source = quantized_folder(tmp_path / "q", "opt", torch.float32, chosen, lowest_zero=1)
    (source / "preprocessor_config.json").write_text('{"size": 16}')
    (source / "notes.txt").write_text("not a part of the model")
    told: list[tuple[int, int, str]] = []
    report = export_folder(
        source, tmp_path / "there", format, max_shard_bytes=20_000, progress=lambda *a: told.append(a)
    )
    assert report["layers"] == len(chosen) == len(told) == told[-1][0] == told[-1][1]
    assert {name for _, _, name in told} == set(chosen)
    assert len(list((tmp_path / "there").glob("model-*-of-*.safetensors"))) > 2
    import_folder(tmp_path / "there", tmp_path / "back")
    assert_same_tensors(source, tmp_path / "back")
    for folder in ("there", "back"):
        assert (tmp_path / folder / "preprocessor_config.json").read_text() == '{"size": 16}'
        assert (tmp_path / folder / "generation_config.json").read_bytes() == (
            source / "generation_config.json"
        ).read_bytes()
        assert not (tmp_path / folder / "notes.txt").exists()
    side = tmp_path / "there" / "quantize_config.json"
    assert side.exists() == format.startswith("gptq")
    if side.exists():
        assert json.loads(side.read_text()) == settings_of(tmp_path / "there")


_PEAK = """
import sys
from pathlib import Path
import torch
from mmq_kernels.checkpoint import export_folder, import_folder

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

torch.set_num_threads(1)
folder = Path(sys.argv[1])
for size in ("small", "large"):  # the small one warms up
    before = resident("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    export_folder(folder / size, folder / f"{size}-gptq", "gptq_v2", max_shard_bytes=2_000_000)
    import_folder(folder / f"{size}-gptq", folder / f"{size}-back", max_shard_bytes=2_000_000)
print(resident("VmHWM:") - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no /proc/self/clear_refs to measure with")
@pytest.mark.skipif(not _native.available(), reason="plain torch works in memory of its own")
@pytest.mark.skipif(SANITIZED, reason="a sanitizer keeps memory of its own")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    model = make("opt")
    for size, blocks, width in (("small", 2, 64), ("large", 24, 32 * 1024)):
        config = model.config
        config.text_config.num_hidden_layers, config.text_config.ffn_dim = blocks, width
        with parameters_on_meta():
            model = type(model)(config)
        for name, linear in linears(model).items():
            if name.endswith((".fc1", ".fc2")) and "language" in name:
                n, k = linear.out_features, linear.in_features
                layer = QuantLinear(k, n, QuantSpec(8, 16, True))
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, layer)
        filled = {n: torch.full(t.shape, 0.5) for n, t in model.state_dict().items() if t.is_meta}
        model.load_state_dict(filled, assign=True, strict=False)
        save(model, tmp_path / size)
    held = disk_bytes(tmp_path / "large")
    assert held > 50_000_000
    done = subprocess.run([sys.executable, "-c", _PEAK, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 0.5 * held
    assert_same_tensors(tmp_path / "large", tmp_path / "large-back")
