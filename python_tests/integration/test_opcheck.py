"""`torch.library.opcheck` of every op over what its arguments can be, and fakes against what really comes out."""

import pytest
import torch
from packed import EPILOGUES, GROUP, K, N, gemm_arguments, layer
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

from mmq_kernels import ops
from mmq_kernels.spec import QuantSpec

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

XS = {
    "matrix": lambda: torch.randn(3, K),
    "vector": lambda: torch.randn(K),
    "leading": lambda: torch.randn(2, 3, 1, K),
    "empty": lambda: torch.randn(0, K),
    "empty inside": lambda: torch.randn(2, 0, K),
    "transposed": lambda: torch.randn(K, 3).t(),
    "swapped": lambda: torch.randn(3, 2, K).transpose(0, 1),
    "columns of more": lambda: torch.randn(3, 2 * K)[:, 7 : 7 + K],
    "every other": lambda: torch.randn(3, 2 * K)[:, ::2],
    "expanded": lambda: torch.randn(1, K).expand(4, K),
}

LAYERS = {
    "asymmetric": {},
    "symmetric": {"spec": QuantSpec(3, GROUP, True)},
    "per channel": {"spec": QuantSpec(8)},
    "no bias": {"bias": False},
    "ordered": {"ordered": True},
    "scaled": {"scaled": True},
    "all": {"spec": QuantSpec(5, 8, True), "ordered": True, "scaled": True},
}


def described(found: Tensor | tuple[Tensor, ...]) -> list[tuple[object, ...]]:
    """What a fake has to get right; the stride of a dimension of length one, or of nothing at all, means nothing."""
    several = found if isinstance(found, tuple) else (found,)
    return [
        (t.shape, t.dtype, t.device, [s for s, length in zip(t.stride(), t.shape, strict=True) if length > 1])
        if t.numel()
        else (t.shape, t.dtype, t.device)
        for t in several
    ]


def agrees(op: torch._ops.OpOverload, arguments: list[object]) -> None:
    real = op(*arguments)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]
        assert described(op(*fakes)) == described(real)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_gemm_of_every_kind_of_weight(kind, activation, device) -> None:
    q = layer(**LAYERS[kind], activation=activation).to(device)
    if q.bias is not None:
        q.bias.requires_grad_(True)
    x = torch.randn(2, 3, K, device=device, requires_grad=True)
    opcheck(torch.ops.mmq.gemm.default, gemm_arguments(x, q))


@pytest.mark.parametrize("activation", EPILOGUES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_gemm_of_every_epilogue_and_dtype(activation, dtype, device) -> None:
    q = layer(activation=activation, dtype=dtype).to(device)
    x = torch.randn(3, K, device=device, dtype=dtype, requires_grad=True)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if dtype == torch.float32:  # gradients of rounded products differ in the last bits of the dtype
        checks.append("test_aot_dispatch_dynamic")
    opcheck(torch.ops.mmq.gemm.default, gemm_arguments(x, q), test_utils=checks)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", XS)
def test_gemm_of_every_x(kind, grad, device) -> None:
    x = XS[kind]().to(device).requires_grad_(grad)
    opcheck(torch.ops.mmq.gemm.default, gemm_arguments(x, layer(activation="relu").to(device)))


@pytest.mark.parametrize("kind", LAYERS)
def test_gemm_transposed(kind, device) -> None:
    q = layer(**LAYERS[kind]).to(device)
    _, weight, scale, zero, perm, input_scale, _, *numbers, _ = gemm_arguments(torch.empty(0), q)
    for grad in (torch.randn(2, 3, N), torch.randn(0, N), torch.randn(1, N).expand(3, N), torch.randn(N, 3).t()):
        grad = grad.to(device).requires_grad_(True)
        arguments = [grad, weight, scale, zero, perm, input_scale, *numbers]
        opcheck(torch.ops.mmq.gemm_transposed.default, arguments)
        agrees(torch.ops.mmq.gemm_transposed.default, arguments)


@pytest.mark.parametrize("kind", LAYERS)
def test_dequantize(kind, device) -> None:
    q = layer(**LAYERS[kind]).to(device)
    _, weight, scale, zero, perm, _, _, *numbers, _ = gemm_arguments(torch.empty(0), q)
    for dtype in FLOATS:
        opcheck(torch.ops.mmq.dequantize.default, [weight, scale, zero, perm, *numbers, dtype])
        agrees(torch.ops.mmq.dequantize.default, [weight, scale, zero, perm, *numbers, dtype])


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("shape", [(5, 33), (1, 1), (0, 8)])
def test_pack_and_unpack(bits, shape, device) -> None:
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8, device=device)
    words = ops.pack(codes, bits)
    for op, arguments in (
        (torch.ops.mmq.pack.default, [codes, bits]),
        (torch.ops.mmq.pack.default, [codes.t().contiguous().t(), bits]),
        (torch.ops.mmq.unpack.default, [words, bits, shape[1]]),
        (torch.ops.mmq.unpack.default, [words.t().contiguous().t(), bits, shape[1]]),
    ):
        opcheck(op, arguments)
        agrees(op, arguments)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_quantize_rtn(symmetric, dtype, device) -> None:
    weight = torch.randn(N, K, device=device).to(dtype)
    for w in (weight, weight.t().contiguous().t(), weight[:, ::2], weight[::2]):
        for scale_dtype in (torch.float16, torch.float32):
            arguments = [w, 4, GROUP, symmetric, scale_dtype]
            opcheck(torch.ops.mmq.quantize_rtn.default, arguments)
            agrees(torch.ops.mmq.quantize_rtn.default, arguments)


@pytest.mark.parametrize("backend", ["chosen", "reference"])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("layers", [(), (2,)])
def test_gptq_block(backend, given, layers, device, monkeypatch) -> None:
    if backend != "chosen":
        monkeypatch.setenv("MMQ_BACKEND", backend)
    weight = torch.randn(*layers, N, K, device=device)
    hinv = (torch.rand(*layers, K, K, device=device) * 0.1).triu() + torch.eye(K, device=device)
    grid = (None, None)
    if given:
        spec = QuantSpec(4, GROUP)
        found = [ops.quantize_rtn(w, spec)[1:] for w in weight.reshape(-1, N, K)]
        grid = tuple(torch.stack(parts).view(*layers, N, -1) for parts in zip(*found, strict=True))
    for w in (weight, weight.transpose(-1, -2).contiguous().transpose(-1, -2)):
        # A given grid may be a view of something else as well.
        for s, z in (grid, tuple(g if g is None else g.transpose(-1, -2).contiguous().transpose(-1, -2) for g in grid)):
            arguments = [w, hinv, s, z, 4, GROUP, False, torch.float16]
            opcheck(torch.ops.mmq.gptq_block.default, arguments)
            agrees(torch.ops.mmq.gptq_block.default, arguments)


@pytest.mark.parametrize("kind", XS)
@pytest.mark.parametrize("backend", ["chosen", "reference"])
def test_the_fake_product_has_the_real_strides(kind, backend, device, monkeypatch) -> None:
    if backend != "chosen":
        monkeypatch.setenv("MMQ_BACKEND", backend)
    for settings in LAYERS.values():
        q = layer(**settings).to(device)
        x = XS[kind]().to(device)
        agrees(torch.ops.mmq.gemm.default, gemm_arguments(x, q))
        assert q(x).is_contiguous()
