"""Quantizing from folder to folder gives the very files that quantizing in memory gives, in little memory."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sanitizer import SANITIZED
from tiny_vlms import KINDS, assert_same_outputs, make

from mmq_kernels import QuantLinear, _native
from mmq_kernels.checkpoint import CheckpointError, disk_bytes, load, quantize_folder, save
from mmq_kernels.checkpoint.skeleton import parameters_on_meta
from mmq_kernels.models import quantize_model

RECIPE = "vision=rtn:4:g16 connector=uniform:8 all/mlp=rtn:3:g8:sym"
HEAD = "language_model.lm_head"
EMBEDDING = "language_model.model.decoder.embed_tokens"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_files_are_those_of_quantizing_in_memory(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make(kind, dtype)
    save(model, tmp_path / "source")
    told: list[tuple[int, int, str]] = []
    report = quantize_folder(tmp_path / "source", tmp_path / "streamed", RECIPE, progress=lambda *a: told.append(a))
    expected = quantize_model(model, RECIPE)
    save(model, tmp_path / "memory", recipe=expected.recipe)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("streamed", "memory"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("streamed", "memory")]
    assert configs[0] == configs[1]
    assert [layer["name"] for layer in report["layers"]] == [layer.name for layer in expected.layers]
    assert report["left_alone"] == expected.left_alone
    assert report["disk_bytes"] == disk_bytes(tmp_path / "streamed")
    assert told[-1][0] == told[-1][1] > 0
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)


def test_shards_in_and_out(tmp_path: Path) -> None:
    save(make("opt"), tmp_path / "source", max_shard_bytes=25_000)
    quantize_folder(tmp_path / "source", tmp_path / "whole", RECIPE)
    quantize_folder(tmp_path / "source", tmp_path / "parts", RECIPE, max_shard_bytes=9_000)
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 3
    assert_same_outputs(load(tmp_path / "whole"), load(tmp_path / "parts"))


def test_a_tied_head_that_is_asked_for_is_quantized_from_the_embedding(tmp_path: Path) -> None:
    model = make("opt")
    save(model, tmp_path / "source")
    report = quantize_folder(tmp_path / "source", tmp_path / "out", f"{HEAD}=rtn:8:g16")
    quantize_model(model, f"{HEAD}=rtn:8:g16")
    back = load(tmp_path / "out")
    assert isinstance(back.get_submodule(HEAD), QuantLinear)
    assert_same_outputs(back, model)
    assert [layer["note"] for layer in report["layers"]] == ["untied from the embedding, which keeps its weights"]


@pytest.mark.parametrize("same", [True, False])
def test_a_source_that_holds_both_names_of_a_tied_tensor(same: bool, tmp_path: Path) -> None:
    save(make("opt"), tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{HEAD}.weight"] = tensors[f"{EMBEDDING}.weight"] * (1 if same else 2)
    save_file(tensors, file)
    quantize_folder(tmp_path / "source", tmp_path / "out", RECIPE)
    back = load(tmp_path / "out")
    head, embedding = back.get_submodule(HEAD).weight, back.get_submodule(EMBEDDING).weight
    assert (head is embedding) == same
    assert torch.equal(head, tensors[f"{HEAD}.weight"])
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert (f"{HEAD}.weight" in written) != same


def test_processor_files_travel_along_and_weights_do_not(tmp_path: Path) -> None:
    save(make("opt"), tmp_path / "source")
    for name in ("tokenizer.json", "preprocessor_config.json", "chat_template.jinja", "pytorch_model.bin", "notes.md"):
        (tmp_path / "source" / name).write_text("{}")
    quantize_folder(tmp_path / "source", tmp_path / "out", RECIPE)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    expected = {"config.json", "generation_config.json", "model.safetensors", "chat_template.jinja"}
    assert names == expected | {"tokenizer.json", "preprocessor_config.json"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.update(ghost=torch.zeros(1)), "holds tensor ghost, which the model has no place for"),
        (lambda t: t.pop("query_tokens"), "lacks tensor query_tokens"),
        (lambda t: t.update(query_tokens=torch.zeros(1, 2)), "tensor query_tokens must have shape"),
        (
            lambda t: t["vision_model.encoder.layers.1.mlp.fc2.weight"].fill_(torch.nan),
            "layer vision_model.encoder.layers.1.mlp.fc2: weight must be finite",
        ),
    ],
)
def test_a_bad_source_is_named_and_leaves_nothing_behind(change: object, said: str, tmp_path: Path) -> None:
    save(make("opt"), tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as caught:
        quantize_folder(tmp_path / "source", tmp_path / "out", RECIPE)
    assert said in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_cannot_be_streamed_is_refused_before_any_work(tmp_path: Path) -> None:
    save(make("opt"), tmp_path / "source")
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"method must be rtn or uniform.*got 'gptq'"):
        quantize_folder(tmp_path / "source", out, "all=gptq:4")
    with pytest.raises(ValueError, match="matches no layer"):
        quantize_folder(tmp_path / "source", out, "nothing*=rtn:4")
    quantize_folder(tmp_path / "source", out, RECIPE)
    with pytest.raises(CheckpointError, match="is not empty"):
        quantize_folder(tmp_path / "source", out, RECIPE)
    with pytest.raises(CheckpointError, match="is quantized already"):
        quantize_folder(out, tmp_path / "again", RECIPE)
    shutil.rmtree(out)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


_PEAK = """
import sys
from pathlib import Path
import torch
from mmq_kernels.checkpoint import quantize_folder

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

torch.set_num_threads(1)
source, small, out = map(Path, sys.argv[1:])
quantize_folder(small, out.with_name("warm"), "all=rtn:4:g64")
before = resident("VmRSS:")
try:
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
except OSError:
    pass
quantize_folder(source, out, "all=rtn:4:g64", max_shard_bytes=2_000_000)
print(resident("VmHWM:") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc to measure resident memory")
@pytest.mark.skipif(not _native.available(), reason="packing in plain torch works in memory of its own")
@pytest.mark.skipif(SANITIZED, reason="a sanitizer keeps memory of its own")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    model = make("opt")
    save(model, tmp_path / "small")
    config = model.config
    config.text_config.num_hidden_layers, shard = 24, 20_000_000
    config.text_config.ffn_dim = 16 * 1024
    with parameters_on_meta():
        model = type(model)(config)
    model.load_state_dict({n: torch.full(t.shape, 0.5) for n, t in model.state_dict().items()}, assign=True)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert size > 100_000_000
    save(model, tmp_path / "large", max_shard_bytes=shard)
    del model
    arguments = [str(tmp_path / name) for name in ("large", "small", "out")]
    done = subprocess.run([sys.executable, "-c", _PEAK, *arguments], capture_output=True, text=True, check=True)
    # Four times a block, and the shard that is mapped: pages of it count once they were read.
    assert int(done.stdout) < 4 * size / 24 + shard < 0.4 * size
