"""Quantizing whole models: what was optimized is what runs, nothing dense stays, ties are handled on purpose."""

import copy
import gc
import weakref

import pytest
import torch
from tiny_vlms import KINDS, batches, make, outputs
from torch import nn

from mmq_kernels.models import quantize_model
from mmq_kernels.nn import QuantLinear
from mmq_kernels.quantize import Hessian, walk
from mmq_kernels.quantize.gptq import weighted_error


def dequantized(model: nn.Module, original: nn.Module) -> nn.Module:
    """The float model that holds the weights of the packed one."""
    twin = copy.deepcopy(original)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight.data = module.dequantize()
            if module.bias is not None:
                linear.bias.data = module.bias.data
            twin.set_submodule(name, linear)
    return twin.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", ["all=uniform:4", "all=rtn:3:g8", "all=gptq:3:g16", "vision=gptq:4 connector=rtn:8"])
def test_what_was_optimized_is_what_runs(kind, recipe) -> None:
    original = make(kind)
    model = copy.deepcopy(original)
    report = quantize_model(model, recipe, batches(model))
    assert all(isinstance(model.get_submodule(layer.name), QuantLinear) for layer in report.layers)
    got, expected = outputs(model), outputs(dequantized(model, original))
    assert (got - expected).norm() <= 1e-5 * expected.norm()
    assert not torch.allclose(expected, outputs(original), rtol=1e-4)


@pytest.mark.parametrize("method", ["uniform", "gptq+"])
def test_biases_norms_and_embeddings_stay_as_they_are(method) -> None:
    original = make("opt")
    model = copy.deepcopy(original)
    report = quantize_model(model, f"all={method}:2", batches(model))
    weights = {f"{layer.name}.weight" for layer in report.layers}
    kept = {name: tensor for name, tensor in original.named_parameters() if name not in weights}
    assert any(name.endswith("fc1.bias") for name in kept) and any("embed" in name for name in kept)
    found = model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in kept.items())


@pytest.mark.parametrize("kind", KINDS)
def test_every_gptq_layer_saw_data_and_beat_rounding(kind) -> None:
    model = make(kind)
    report = quantize_model(model, "all=gptq:3:g16", batches(model, 6))
    for layer in report.layers:
        if layer.calibration_rows:
            assert layer.error is not None and layer.error <= layer.rtn_error
    unseen = [layer for layer in report.layers if not layer.calibration_rows]
    # Captioning never runs the text path of the Q-Former: rounded, and said so.
    assert all("layer." in layer.name and layer.name.startswith("qformer") for layer in unseen)
    assert all((layer.used, layer.note) == ("rtn", "no calibration data reached this layer") for layer in unseen)
    assert bool(unseen) == (kind != "itm")
    assert len(report.notes) >= len(unseen)


def test_later_blocks_see_the_quantized_ones_before_them() -> None:
    """The Hessian of a late layer is that of its inputs in the model quantized so far, not in the float model."""
    model = make("opt")
    data = batches(model)
    name = "language_model.model.decoder.layers.1.fc1"
    original = copy.deepcopy(model)
    report = quantize_model(model, "all=gptq:2:g16", data)
    prefix = copy.deepcopy(model)  # everything before the block quantized, the block itself as it was
    block = "language_model.model.decoder.layers.1"
    prefix.set_submodule(block, original.get_submodule(block))

    def error_in(twin: nn.Module) -> float:
        hessian = Hessian(32, torch.device("cpu"))
        handle = twin.get_submodule(name).register_forward_pre_hook(lambda module, args: hessian.add(args[0]))
        with torch.no_grad():
            for batch in data:
                twin(**batch)
        handle.remove()
        return weighted_error(
            original.get_submodule(name).weight.data, model.get_submodule(name).dequantize(), hessian.value()
        )

    (row,) = [layer for layer in report.layers if layer.name == name]
    assert row.error == pytest.approx(error_in(prefix), rel=1e-3)
    assert row.error != pytest.approx(error_in(original), rel=1e-3)


def test_the_text_path_of_an_itm_model_is_calibrated() -> None:
    model = make("itm")
    report = {layer.name: layer for layer in quantize_model(model, "connector=gptq:4:g8", batches(model)).layers}
    text = report["qformer.encoder.layer.0.intermediate.dense"]
    query = report["qformer.encoder.layer.0.intermediate_query.dense"]
    # 4 batches of 3: the texts alone and beside 3 queries; the queries twice.
    assert (text.used, text.calibration_rows) == ("gptq", 4 * 3 * (7 + 7))
    assert (query.used, query.calibration_rows) == ("gptq", 4 * 3 * (3 + 3))


def test_layers_that_share_an_input_share_its_hessian(monkeypatch) -> None:
    made = []
    original = walk.Hessian

    def counting(*args):
        made.append(args)
        return original(*args)

    monkeypatch.setattr(walk, "Hessian", counting)
    model = make("opt")
    quantize_model(model, "language=gptq:4:g8", batches(model))
    assert len(made) == 2 * 4  # per block: q = k = v, out, fc1, fc2


def test_the_same_run_twice_gives_the_same_bits() -> None:
    states = []
    for _ in range(2):
        model = make("opt")
        quantize_model(model, "all=gptq:3:g16", batches(model))
        states.append(model.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_gptq_without_data_is_an_error() -> None:
    model = make("opt")
    with pytest.raises(ValueError, match=r"gptq needs calibration batches, got none \(vision=gptq:4:channel:asym\)"):
        quantize_model(model, "vision=gptq:4")
    assert not any(isinstance(module, QuantLinear) for module in model.modules())


def test_a_broken_weight_is_named() -> None:
    model = make("opt")
    model.language_projection.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="language_projection: weight must be finite"):
        quantize_model(model, "all=rtn:4")


def test_a_tied_head_is_untied_on_purpose() -> None:
    model = make("opt")
    head, embedding = model.language_model.lm_head, model.language_model.get_input_embeddings()
    assert head.weight is embedding.weight
    before = embedding.weight.detach().clone()
    report = quantize_model(model, "language_model.lm_head=rtn:2:g8")
    assert isinstance(model.language_model.lm_head, QuantLinear)
    assert torch.equal(embedding.weight, before)
    assert not model.config.text_config.tie_word_embeddings
    assert report.notes == ["language_model.lm_head: untied from the embedding, which keeps its weights"]


def test_no_float_copy_of_a_quantized_weight_is_alive() -> None:
    model = make("opt")
    weights = {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n}
    alive = {n: [weakref.ref(w), weakref.ref(w.untyped_storage())] for n, w in weights.items()}
    del weights
    quantize_model(model, "all=gptq:4:g16", batches(model))
    gc.collect()
    assert not [n for n, references in alive.items() if any(reference() is not None for reference in references)]
    linears = [m for n, m in model.named_modules() if type(m) is nn.Linear]
    assert len(linears) == 1  # the head


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_packed_components_hold_what_their_bits_say(bits) -> None:
    model = make("opt")
    quantize_model(model, f"all=rtn:{bits}:g8")
    for module in model.modules():
        if isinstance(module, QuantLinear):
            weights = module.in_features * module.out_features
            groups = module.spec.groups(module.in_features) * module.out_features
            padded = -(-module.in_features // 32) * bits
            tile = 16 * 4 * padded + 16 * 3 * groups // module.out_features
            allowed = weights * bits / 8 + groups * (2 + bits / 8)
            assert module.packed_bytes <= 1.01 * allowed + tile


def test_quantized_models_still_train_adapters() -> None:
    """Gradients flow through packed layers: tensors made while quantizing are ordinary ones."""
    model = make("opt")
    quantize_model(model, "all=gptq:4:g16", batches(model))
    prompt = model.query_tokens.requires_grad_(True)
    model(**batches(model)[0]).logits.square().mean().backward()
    assert prompt.grad is not None and prompt.grad.abs().sum() > 0
