"""QuantLinear as a citizen of torch: state_dict, moves, copies, processes, autocast, compile."""

import copy
import gc
import multiprocessing
import pickle

import pytest
import torch
from torch import nn

from mmq_kernels import ops
from mmq_kernels.nn import QuantLinear
from mmq_kernels.spec import BITS, QuantSpec


def make(spec=None, n=24, k=72, **kwargs) -> QuantLinear:
    spec = spec or QuantSpec(4, 32)
    codes, scale, zero = ops.quantize_rtn(torch.randn(n, k), spec)
    kwargs.setdefault("bias", torch.randn(n))
    return QuantLinear.from_codes(codes, scale, zero, spec, **kwargs)


def ordered(n=16, k=72, group_size=32) -> tuple[QuantLinear, torch.Tensor]:
    """A layer with activation order and input scale, and the dense weight it stands for."""
    spec = QuantSpec(5, group_size)
    perm = torch.randperm(k)
    g_idx = torch.empty(k, dtype=torch.int32)
    g_idx[perm] = (torch.arange(k) // group_size).int()
    weight = torch.randn(n, k)
    # Columns of a group are quantized together whatever their place in the row.
    stored = torch.argsort(g_idx, stable=True)
    codes, scale, zero = ops.quantize_rtn(weight[:, stored].contiguous(), spec)
    codes = torch.empty_like(codes).index_copy_(1, stored, codes)
    dense = (codes.float() - zero.float()[:, g_idx.long()]) * scale.float()[:, g_idx.long()]
    layer = QuantLinear.from_codes(codes, scale, zero, spec, g_idx=g_idx, input_scale=torch.rand(k) + 0.5)
    return layer, dense


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [-1, 8, 32])
def test_forward_is_the_dequantized_linear(bits, symmetric, group_size) -> None:
    layer = make(QuantSpec(bits, group_size, symmetric))
    x = torch.randn(3, 5, 72)
    expected = nn.functional.linear(x.double(), layer.dequantize().double(), layer.bias.double())
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_state_dict_is_the_on_disk_layout() -> None:
    state = make(QuantSpec(3, 32)).state_dict()
    described = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    assert described == {
        "bias": (torch.float32, (24,)),
        "weight_packed": (torch.int32, (24, 7)),
        "weight_scale": (torch.float16, (24, 3)),
        "weight_zero_point": (torch.int32, (3, 3)),
        "weight_shape": (torch.int64, (2,)),
    }
    assert state["weight_shape"].tolist() == [24, 72]
    assert "weight_zero_point" not in make(QuantSpec(3, 32, True)).state_dict()


def test_codes_on_disk_are_the_codes_given() -> None:
    spec = QuantSpec(6, 16)
    codes, scale, zero = ops.quantize_rtn(torch.randn(9, 40), spec)
    state = QuantLinear.from_codes(codes, scale, zero, spec).state_dict()
    assert torch.equal(ops.unpack(state["weight_packed"], 6, 40), codes)
    assert torch.equal(ops.unpack(state["weight_zero_point"].t().contiguous(), 6, 9).t(), zero)
    assert torch.equal(state["weight_scale"], scale)


def test_activation_order_and_input_scale() -> None:
    layer, dense = ordered()
    assert torch.equal(layer.dequantize(), dense)
    x = torch.randn(4, 72)
    expected = (x / layer.weight_input_scale) @ dense.t()
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    fresh = QuantLinear(72, 16, layer.spec, bias=False, activation_order=True, input_scale=True)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))
    assert torch.equal(fresh.state_dict()["weight_g_idx"], layer.state_dict()["weight_g_idx"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.fill_(7), "weight_g_idx must be between 0 and 2, got 7"),
        (lambda g: g.sub_(1), "weight_g_idx must be between 0 and 2, got -1"),
        (lambda g: g.copy_(g.clamp(max=1)), "weight_g_idx must name group 1 32 times, got 40"),
    ],
)
def test_group_index_is_checked(change, message) -> None:
    layer, _ = ordered()
    state = layer.state_dict()
    change(state["weight_g_idx"])
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight_packed", torch.zeros(24, 8, dtype=torch.int32), r"weight_packed must have shape \[24, 9\]"),
        ("weight_packed", torch.zeros(24, 9), "weight_packed must be torch.int32, got torch.float32"),
        ("weight_scale", torch.full((24, 3), torch.nan), "weight_scale must be finite"),
        ("weight_shape", torch.tensor([24, 71]), r"weight_shape must be \[24, 72\], got \[24, 71\]"),
    ],
)
def test_malformed_tensors_are_named(name, value, message) -> None:
    layer = make()
    state = layer.state_dict() | {name: value}
    before = layer.dequantize()
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)
    assert torch.equal(layer.dequantize(), before)


def test_missing_and_unexpected_keys_are_reported() -> None:
    layer = make()
    state = layer.state_dict()
    del state["weight_packed"]
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_packed"):
        layer.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*nonsense"):
        layer.load_state_dict(layer.state_dict() | {"nonsense": torch.zeros(1)})


def test_inside_a_model_state_dict_round_trips() -> None:
    model = nn.Sequential(make(), nn.Tanh(), make(QuantSpec(2, -1, True), n=5, k=24))
    other = nn.Sequential(QuantLinear(72, 24, QuantSpec(4, 32)), nn.Tanh(), QuantLinear(24, 5, QuantSpec(2, -1, True)))
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 72)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_equal_and_independent(copier) -> None:
    layer, _ = ordered()
    x = torch.randn(4, 72)
    twin = copier(layer)
    assert torch.equal(twin(x), layer(x))
    twin.scale_runtime.zero_()
    assert not torch.equal(twin(x), layer(x))


def _forward(layer: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    torch.set_num_threads(1)
    return layer(x)


def test_a_layer_travels_to_another_process() -> None:
    layer = make()
    x = torch.randn(4, 72)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        torch.testing.assert_close(pool.apply(_forward, (layer, x)), layer(x), rtol=0, atol=0)


def test_a_change_of_dtype_leaves_the_weight_alone() -> None:
    layer = make()
    before = layer.dequantize()
    layer.to(torch.bfloat16)
    assert (layer.dtype, layer.bias.dtype, layer.scale_runtime.dtype) == (
        torch.bfloat16,
        torch.bfloat16,
        torch.float16,
    )
    assert layer.weight.dtype == torch.bfloat16
    assert layer(torch.randn(2, 72, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert torch.equal(layer.float().dequantize(), before)


def test_meta_and_back_is_filled_by_a_state_dict() -> None:
    layer = make()
    empty = copy.deepcopy(layer).to("meta")
    assert {t.device.type for t in (*empty.parameters(), *empty.buffers())} == {"meta"}
    empty.to_empty(device="cpu").load_state_dict(layer.state_dict())
    x = torch.randn(2, 72)
    assert torch.equal(empty(x), layer(x))


def test_weight_tells_shape_and_dtype_only() -> None:
    layer = make()
    assert layer.weight.shape == (24, 72)
    assert layer.weight.is_meta


def test_autocast_decides_the_dtype() -> None:
    layer = make()
    x = torch.randn(2, 72)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, layer(x.bfloat16()), rtol=0, atol=0)


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_compiles_whole(activation) -> None:
    model = nn.Sequential(make(activation=activation), nn.LayerNorm(24), make(n=7, k=24))
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for m in (2, 3, 9):
        x = torch.randn(m, 72)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_compiled_layer_passes_gradients() -> None:
    layer = make(activation="silu")
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(4, 72, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    (got,) = torch.autograd.grad(compiled(x).square().sum(), x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_prepack_changes_layout_not_weight() -> None:
    layer, dense = ordered()
    x = torch.randn(3, 72)
    before = layer(x)
    layer.prepack("reference")
    assert (layer.layout, layer.backend) == ("planes", "reference")
    assert torch.equal(layer.dequantize(), dense)
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.prepack().dequantize(), dense)


@pytest.mark.parametrize("bits", BITS)
def test_held_bytes_are_the_packed_bytes(bits) -> None:
    n, k = 256, 1024
    spec = QuantSpec(bits, 64)
    codes, scale, zero = ops.quantize_rtn(torch.randn(n, k), spec)
    layer = QuantLinear.from_codes(codes, scale, zero, spec)
    allowed = n * k * bits / 8 + scale.numel() * 2 + scale.numel() * bits / 8
    assert layer.packed_bytes <= allowed * 1.01
    held = sum(t.numel() * t.element_size() for t in (*layer.parameters(), *layer.buffers()))
    assert held == layer.packed_bytes


def test_no_dense_copy_is_alive() -> None:
    n, k = 96, 1000
    layer = make(n=n, k=k)
    layer(torch.randn(3, k))
    gc.collect()
    alive = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]
    assert not [tuple(t.shape) for t in alive if t.is_floating_point() and t.numel() >= n * k and not t.is_meta]


def test_repr_says_bits_and_group() -> None:
    assert "bits=4, group_size=32, symmetric=False" in repr(make())


def test_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"activation must be one of none, .*, got 'mish'"):
        QuantLinear(8, 8, QuantSpec(4), activation="mish")


def test_a_layer_without_data_is_copied_and_shown_without_touching_memory() -> None:
    """Kernels that convert layouts must not be handed the address of nothing."""
    empty = ordered()[0].to("meta")
    for twin in (copy.deepcopy(empty), copy.deepcopy(empty).prepack("reference")):
        state = twin.state_dict()
        assert {name: tensor.shape for name, tensor in state.items()} == {
            name: tensor.shape for name, tensor in ordered()[0].state_dict().items()
        }
        assert all(tensor.is_meta for name, tensor in state.items() if name != "weight_shape")
