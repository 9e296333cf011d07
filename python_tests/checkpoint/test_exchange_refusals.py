"""What cannot be carried or understood is refused before anything is written, in one line that names it."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exchange_cases import edit_config, edit_tensors, quantized_folder, settings_of, tensors_of
from tiny_vlms import make
from torch import Tensor

from mmq_kernels import QuantSpec
from mmq_kernels.checkpoint import CheckpointError, export_folder, import_folder, save
from mmq_kernels.checkpoint.exchange.awq import Awq
from mmq_kernels.checkpoint.exchange.layers import Layer
from mmq_kernels.checkpoint.exchange.names import patterns, stems
from mmq_kernels.checkpoint.format import Stored
from mmq_kernels.checkpoint.shards import Folder

FC2 = "language_model.model.decoder.layers.0.fc2"
"""[32, 64]."""
VISION_FC1 = "vision_model.encoder.layers.0.mlp.fc1"
"""[48, 32]."""
QFORMER = "qformer.encoder.layer.0.output.dense"
"""[32, 40]."""
CT = "compressed-tensors"
ALL = (CT, "gptq", "gptq_v2", "awq")


def refused(call: Callable[[], Any], tmp_path: Path, *parts: str) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(CheckpointError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    assert sorted(path.name for path in tmp_path.iterdir()) == before


# --- export ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "spec", "options", "reasons", "able"),
    [
        (
            FC2,
            QuantSpec(5, 8),
            {},
            dict.fromkeys(("gptq", "gptq_v2", "awq"), "it has 5 bits"),
            "compressed-tensors can",
        ),
        (FC2, QuantSpec(3, 8), {}, {"awq": "it has 3 bits"}, "compressed-tensors, gptq, gptq_v2 can"),
        (FC2, QuantSpec(4, 8), {"order": True}, dict.fromkeys(("compressed-tensors", "awq"), "order"), "gptq_v2 can"),
        (FC2, QuantSpec(4, 24), {}, dict.fromkeys(("compressed-tensors", "awq"), "is shorter"), "gptq, gptq_v2 can"),
        (
            FC2,
            QuantSpec(4, 8),
            {"lowest_zero": 0},
            {"gptq": "zero points of 0"},
            "compressed-tensors, gptq_v2, awq can",
        ),
        (VISION_FC1, QuantSpec(3, 8), {}, {"gptq": "48 at 3", "gptq_v2": "48", "awq": "3"}, "compressed-tensors can"),
        (QFORMER, QuantSpec(2, 8), {}, {"gptq": "40 at 2", "gptq_v2": "40", "awq": "2"}, "compressed-tensors can"),
        (FC2, QuantSpec(4, 8), {"input_scale": True}, dict.fromkeys(ALL, "(weight_input_scale)"), "no other format"),
        (FC2, QuantSpec(5, 8), {"order": True}, dict.fromkeys(ALL, ""), "no other format here can either"),
    ],
)
def test_a_layer_that_a_format_cannot_carry(
    name: str, spec: QuantSpec, options: dict[str, Any], reasons: dict[str, str], able: str, tmp_path: Path
) -> None:
    ordered = frozenset({name} if options.get("order") else ())
    more = {"lowest_zero": 1, **{key: value for key, value in options.items() if key != "order"}}
    quantized_folder(tmp_path / "q", "opt", torch.float32, {name: spec}, ordered, **more)
    for format in ALL:
        if format in reasons:
            refused(
                lambda f=format: export_folder(tmp_path / "q", tmp_path / f, f), tmp_path, name, reasons[format], able
            )
        else:
            assert export_folder(tmp_path / "q", tmp_path / format, format)["layers"] == 1


@pytest.mark.parametrize("format", ["gptq", "gptq_v2", "awq"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_scales_that_fp16_cannot_hold(dtype: torch.dtype, format: str, tmp_path: Path) -> None:
    quantized_folder(tmp_path / "q", "opt", torch.bfloat16, {FC2: QuantSpec(4, 8)}, lowest_zero=1)
    export_folder(tmp_path / "q", tmp_path / "fits", format)

    def change(tensors: dict[str, Tensor]) -> None:
        scale = tensors[f"{FC2}.weight_scale"].to(dtype)
        scale[3, 1] = 1e-9
        tensors[f"{FC2}.weight_scale"] = scale

    edit_tensors(tmp_path / "q", change)
    out = tmp_path / "out"
    refused(
        lambda: export_folder(tmp_path / "q", out, format), tmp_path, FC2, "fp16 cannot hold", "compressed-tensors can"
    )


def test_many_layers_are_counted_and_each_reason_is_given_once(tmp_path: Path) -> None:
    three = {f"vision_model.encoder.layers.{i}.mlp.fc{j}": QuantSpec(3, 16) for i in (0, 1) for j in (1, 2)}
    quantized_folder(tmp_path / "q", "opt", torch.float32, {**three, FC2: QuantSpec(4, 24)})
    names = list(three)
    refused(
        lambda: export_folder(tmp_path / "q", tmp_path / "out", "awq"),
        tmp_path,
        f"{names[0]}, {names[1]}, {names[2]} and 1 more: it has 3 bits",
        f"{FC2}: its last group is shorter (64 columns in groups of 24)",
    )


def test_awq_has_one_group_size(tmp_path: Path) -> None:
    quantized_folder(tmp_path / "q", "opt", torch.float32, {FC2: QuantSpec(4, 8), VISION_FC1: QuantSpec(4, 16)})
    refused(
        lambda: export_folder(tmp_path / "q", tmp_path / "out", "awq"),
        tmp_path,
        "one group size for all layers, and these have 8, 16",
        "compressed-tensors, gptq_v2 can",
    )


def test_awq_leaves_alone_whatever_contains_a_name(tmp_path: Path) -> None:
    source = quantized_folder(tmp_path / "q", "opt", torch.float32, {FC2: QuantSpec(4, 8)})
    layers = [Layer("a.fc1", Stored(QuantSpec(4, 8), torch.float32), 32, 64, Folder(source))]
    assert "a.fc is left alone, and AWQ's readers would leave a.fc1 alone too" in Awq().why_not_together(
        layers, ["a.fc"]
    )
    assert Awq().why_not_together(layers, ["b.fc"]) == ""


def test_sources_and_targets_of_an_export(tmp_path: Path) -> None:
    plain = save(make("opt"), tmp_path / "plain")
    source = quantized_folder(tmp_path / "q", "opt", torch.float32, {FC2: QuantSpec(4, 8)}, lowest_zero=1)
    export_folder(source, tmp_path / "gptq", "gptq")
    out = tmp_path / "out"
    refused(lambda: export_folder(plain, out, "gptq"), tmp_path, "is not quantized", "mmq quantize")
    refused(lambda: export_folder(tmp_path / "gptq", out, "awq"), tmp_path, "quant_method", "'gptq'")
    refused(lambda: export_folder(tmp_path / "nowhere", out, "awq"), tmp_path, "is no model")
    refused(lambda: export_folder(source, plain, "awq"), tmp_path, "is not empty")
    with pytest.raises(ValueError, match="format must be one of compressed-tensors, gptq, gptq_v2, awq, got 'gguf'"):
        export_folder(source, out, "gguf")
    edit_tensors(source, lambda tensors: tensors.pop(f"{FC2}.weight_scale"))
    refused(lambda: export_folder(source, out, "gptq"), tmp_path, f"lacks tensor {FC2}.weight_scale")


def test_a_damaged_layer_is_found_while_writing_and_leaves_nothing(tmp_path: Path) -> None:
    source = quantized_folder(tmp_path / "q", "opt", torch.float32, {FC2: QuantSpec(4, 8)})
    edit_tensors(source, lambda tensors: tensors.update({f"{FC2}.weight_packed": torch.zeros(32, 3).int()}))
    out = tmp_path / "out"
    for format in ALL[::2]:
        refused(lambda f=format: export_folder(source, out, f), tmp_path, FC2, "weight_packed must have shape [32, 8]")


# --- import ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer in each format."""
    folder = tmp_path_factory.mktemp("sources")
    quantized_folder(folder / "q", "opt", torch.float32, {FC2: QuantSpec(4, 8)}, lowest_zero=1)
    for format in ALL:
        export_folder(folder / "q", folder / format, format)
    return folder


def copied(sources: Path, format: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sources / format, tmp_path / format))


def group(**values: Any) -> Callable[[dict[str, Any]], None]:
    """Changes a config group of compressed-tensors."""
    return lambda settings: settings["config_groups"]["group_0"].update(values)


def weights(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda settings: settings["config_groups"]["group_0"]["weights"].update(values)


@pytest.mark.parametrize(
    ("format", "change", "said"),
    [
        ("gptq", {"quant_method": "bitsandbytes"}, "quant_method must be one of awq, compressed-tensors, gptq"),
        ("gptq", {"quant_method": "mmq"}, "is in this package's own format already"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format must be gptq or gptq_v2"),
        ("gptq", {"pack_dtype": "int16"}, "pack_dtype must be int32, got 'int16'"),
        ("gptq", {"bits": 5}, f"layer {FC2}: bits must be 2, 3, 4 or 8, got 5"),
        ("gptq", {"group_size": 12}, f"layer {FC2}: group_size must be -1 or a positive multiple of 8, got 12"),
        ("gptq", {"group_size": 16}, f"tensor {FC2}.qzeros must have shape [4, 4], got [8, 4]"),
        ("gptq", {"bits": 8}, f"tensor {FC2}.qweight must have shape [16, 32], got [8, 32]"),
        ("gptq", {"dynamic": {"+:(": {"bits": 8}}}, "'(' is no regular expression"),
        ("gptq", {"dynamic": ["-:.*"]}, "dynamic must be an object of objects"),
        (CT, group(targets=["re:*"]), "'*' is no regular expression"),
        ("awq", {"version": "gemv"}, "version must be gemm to be imported, got 'gemv'"),
        ("awq", {"bits": 8}, "bits must be 4, got 8"),
        ("awq", {"group_size": None}, f"layer {FC2}: group_size must be"),
        ("awq", {"group_size": 24}, f"tensor {FC2}.qweight must have a multiple of 24 rows, got 64"),
        ("awq", {"group_size": 16}, f"tensor {FC2}.qzeros must have shape [4, 4], got [8, 4]"),
        (CT, {"version": "soon"}, "version must be like"),
        (CT, {"config_groups": None}, "config_groups must be an object of objects, got None"),
        (CT, {"config_groups": {"a": {"targets": []}}}, "a must have weights and a list of targets"),
        (CT, {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme must be empty"),
        (CT, group(targets=["re:vision.*"]), f"no target of config_groups reaches layer {FC2}"),
        (CT, group(format="float-quantized"), "group_0.format must be 'pack-quantized'"),
        (CT, group(input_activations={}), "group_0.input_activations must be None"),
        (CT, weights(type="float"), "group_0.weights.type must be 'int'"),
        (CT, weights(strategy="tensor"), "group_0.weights.strategy must be 'group' or 'channel'"),
        (CT, weights(num_bits=9), f"layer {FC2}: bits must be an integer from 2 to 8, got 9"),
        (CT, weights(num_bits=3), f"tensor {FC2}.weight_packed must have shape [32, 6], got [32, 8]"),
    ],
)
def test_settings_that_are_not_understood(format: str, change: Any, said: str, sources: Path, tmp_path: Path) -> None:
    source = copied(sources, format, tmp_path)
    settings = settings_of(source)
    if callable(change):
        change(settings)
    else:
        settings |= change
    edit_config(source, lambda content: content.update(quantization_config=settings))
    refused(lambda: import_folder(source, tmp_path / "out"), tmp_path, str(tmp_path / format), said)


@pytest.mark.parametrize(
    ("format", "changed", "said"),
    [
        ("gptq", {"scales": None}, f"lacks tensor {FC2}.scales"),
        ("gptq", {"qzeros": torch.zeros(8, 4)}, f"tensor {FC2}.qzeros must be torch.int32, got torch.float32"),
        ("gptq", {"scales": torch.zeros(8, 32).int()}, f"tensor {FC2}.scales must be torch.float16"),
        ("gptq", {"scales": torch.full((8, 32), torch.inf)}, f"layer {FC2}: weight_scale must be finite"),
        ("gptq", {"g_idx": torch.full((64,), 8).int()}, f"layer {FC2}: weight_g_idx must be between 0 and 7, got 8"),
        ("gptq", {"g_idx": torch.arange(64).int() % 7}, "weight_g_idx must name group 0 8 times, got 10"),
        ("gptq", {"qweight": torch.zeros(()).int()}, f"tensor {FC2}.qweight must have shape"),
        ("awq", {"qweight": torch.zeros(64).int()}, f"tensor {FC2}.qweight must have shape"),
        ("awq", {"qzeros": None}, f"lacks tensor {FC2}.qzeros"),
        (CT, {"weight_scale": None}, f"lacks tensor {FC2}.weight_scale"),
        (CT, {"weight_shape": torch.tensor([0, 64])}, "must hold two positive sizes, got [0, 64]"),
        (CT, {"weight_zero_point": torch.zeros(3, 8).int()}, "weight_zero_point must have shape [4, 8]"),
        (CT, {"weight_g_idx": torch.zeros(3).int()}, "weight_g_idx must have shape [64], got [3]"),
    ],
)
def test_tensors_that_are_not_what_they_must_be(
    format: str, changed: dict[str, Tensor | None], said: str, sources: Path, tmp_path: Path
) -> None:
    source = copied(sources, format, tmp_path)

    def change(tensors: dict[str, Tensor]) -> None:
        for own, tensor in changed.items():
            tensors.pop(f"{FC2}.{own}", None)
            if tensor is not None:
                tensors[f"{FC2}.{own}"] = tensor

    edit_tensors(source, change)
    refused(lambda: import_folder(source, tmp_path / "out"), tmp_path, str(source), said)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ghost.fc2", "holds a quantized layer ghost.fc2, which the model lacks"),
        ("language_model.model.decoder.layers.0", "must be a linear, got a OPTDecoderLayer"),
        (VISION_FC1, f"layer {VISION_FC1} must have the shape [48, 32], got [32, 64]"),
    ],
)
def test_layers_that_the_model_has_not(name: str, said: str, sources: Path, tmp_path: Path) -> None:
    source = copied(sources, "gptq", tmp_path)

    def change(tensors: dict[str, Tensor]) -> None:
        for own in ("qweight", "qzeros", "scales", "g_idx"):
            tensors[f"{name}.{own}"] = tensors.pop(f"{FC2}.{own}")

    edit_tensors(source, change)
    refused(lambda: import_folder(source, tmp_path / "out"), tmp_path, said)


def test_other_sources_of_an_import(sources: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plain = save(make("opt"), tmp_path / "plain")
    refused(lambda: import_folder(plain, out), tmp_path, "is not quantized")
    source = copied(sources, "gptq", tmp_path)
    edit_tensors(source, lambda tensors: tensors.update({"ghost.bias": torch.zeros(3)}))
    refused(lambda: import_folder(source, out), tmp_path, "holds tensor ghost.bias, which the model has no place for")
    edit_tensors(
        source, lambda tensors: [tensors.pop(name) for name in list(tensors) if FC2 in name or "ghost" in name]
    )
    refused(lambda: import_folder(source, out), tmp_path, "holds no layer of gptq")
    edit_config(source, lambda content: content.pop("quantization_config"))
    (source / "quantize_config.json").write_text("[1]")
    refused(lambda: import_folder(source, out), tmp_path, "quantize_config.json is no JSON object")
    edit_config(source, lambda content: content.update(quantization_config="gptq"))
    refused(lambda: import_folder(source, out), tmp_path, "must be an object, got str")


def test_zero_biases_that_the_model_lacks_are_left_out_and_others_refused(tmp_path: Path) -> None:
    name = "language_model.encoder.block.0.layer.1.DenseReluDense.wo"
    quantized_folder(tmp_path / "q", "t5", torch.float32, {name: QuantSpec(4, 8)}, lowest_zero=1)
    export_folder(tmp_path / "q", tmp_path / "gptq", "gptq")
    edit_tensors(tmp_path / "gptq", lambda tensors: tensors.update({f"{name}.bias": torch.zeros(32)}))
    import_folder(tmp_path / "gptq", tmp_path / "back")
    assert tensors_of(tmp_path / "back").keys() == tensors_of(tmp_path / "q").keys()
    edit_tensors(tmp_path / "gptq", lambda tensors: tensors.update({f"{name}.bias": torch.ones(32)}))
    refused(
        lambda: import_folder(tmp_path / "gptq", tmp_path / "out"), tmp_path, f"tensor {name}.bias", "has no place for"
    )


# --- names ----------------------------------------------------------------------------------------------------------


def test_patterns_reach_what_they_are_for_and_nothing_else() -> None:
    blocks = [f"model.layers.{i}.mlp.{part}" for i in range(12) for part in ("up", "down")]
    names, others = blocks[:-1], [blocks[-1], "model.layers.0.mlp.up_proj", "modelXlayers.0.mlp.up", "lm_head"]
    found = patterns(names, others)
    assert len(found) == 1 + 11  # one for "up", and each "down" by itself
    for expression in found:
        assert any(re.match(expression, name) for name in names)
        assert not any(re.match(expression, other) for other in others)
    assert all(any(re.match(expression, name) for expression in found) for name in names)
    assert patterns(["0.fc", "1.fc"], []) == [r"\d+\.fc$"]


def test_stems_are_the_highest_modules_without_a_quantized_layer() -> None:
    quantized = ["model.language.layers.0.up", "model.vision.layers.1.fc"]
    left = [
        "model.vision.layers.0.fc",
        "model.vision.layers.1.fc_out",
        "model.projector.a",
        "model.projector.b",
        "head",
    ]
    assert stems(left, quantized) == [
        "model.vision.layers.0",
        "model.vision.layers.1.fc_out",
        "model.projector",
        "head",
    ]
