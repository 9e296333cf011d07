"""The packed products of others, on a CPU: torch's int4 kernel and ONNX Runtime's `MatMulNBits` at two accuracy levels.

Both take 32, 64, 128 or 256 columns a group, none left over. Torch has 4 bits and bf16 activations; ONNX Runtime 2, 4
and 8 bits, with fp32 activations as they are (level 1) or rounded to 8 bits a group (level 4).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mmq_kernels.bench.setting import Setting
from mmq_kernels.bench.timing import Rotation

Calls = Callable[[Tensor], Rotation]
"""From x ``[m, k]``, fp32, to calls on copies of one weight."""

GROUPS = (32, 64, 128, 256)
ORT_BITS = (2, 4, 8)
_POOL_SETTLES = 0.05
"""Seconds after which the threads of ONNX Runtime's pool, which is not torch's, have gone to sleep."""
ORT_LEVELS = {"ort_float": 1, "ort_a8": 4}


def peers(setting: Setting, n: int, k: int, bits: int, group: int) -> dict[str, Calls]:
    """What can be compared with a weight ``[n, k]``, by name; weights are random and rotate as ours do."""
    found: dict[str, Calls] = {}
    if group not in GROUPS or k % group:
        return found
    if bits == 4 and n % 64 == 0:
        found["torch_int4pack"] = int4pack(setting, n, k, group)
    if bits in ORT_BITS and why_no_ort() is None:
        found |= {name: ort(setting, n, k, bits, group, level) for name, level in ORT_LEVELS.items()}
    return found


def int4pack(setting: Setting, n: int, k: int, group: int) -> Calls:
    """`torch.ops.aten._weight_int4pack_mm_for_cpu`, what torchao runs on a CPU."""
    codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
    first = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    grid = torch.rand(k // group, n, 2).bfloat16()
    weights = [first] + [first.clone() for _ in range(setting.copies(first.nbytes) - 1)]

    def calls(x: Tensor) -> Rotation:
        half, run = x.bfloat16(), torch.ops.aten._weight_int4pack_mm_for_cpu
        return Rotation([lambda weight=weight: run(half, weight, group, grid) for weight in weights])  # type: ignore[misc]

    return calls


@cache
def why_no_ort() -> str | None:
    """Why ONNX Runtime cannot be compared with, or None. Its threads are as many as torch's, one pool for all."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
    except ImportError as error:
        return f"{error}: pip install 'mmq_kernels[bench]'"
    onnxruntime.set_global_thread_pool_sizes(torch.get_num_threads(), 1)
    return None


def ort(setting: Setting, n: int, k: int, bits: int, group: int, level: int) -> Calls:
    """Sessions of one node each."""
    size = n * k * bits // 8
    sessions = [_session(n, k, bits, group, level) for _ in range(setting.copies(size))]

    def calls(x: Tensor) -> Rotation:
        given = {"x": x.float().numpy()}
        each = [lambda session=session: session.run(None, given) for session in sessions]  # type: ignore[misc]
        return Rotation(each, _POOL_SETTLES)

    return calls


def _session(n: int, k: int, bits: int, group: int, level: int) -> Any:
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    groups = k // group
    tensors = {
        "words": torch.randint(0, 256, (n, groups, group * bits // 8), dtype=torch.uint8),
        "scale": torch.rand(n * groups) * 0.01,
    }
    node = helper.make_node(
        "MatMulNBits",
        ["x", *tensors],
        ["y"],
        domain="com.microsoft",
        K=k,
        N=n,
        bits=bits,
        block_size=group,
        accuracy_level=level,
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", n])],
        [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model, full_check=False)
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
