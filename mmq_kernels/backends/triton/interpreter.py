"""Triton's interpreter (``TRITON_INTERPRET=1``) keeps bf16 as bits and computes with the bits: mended here.

It runs kernels in NumPy, which has no bf16: sums, products and casts of bf16 would be those of unsigned integers, and
casts to bf16 cut off. With this, kernels are interpreted as they are written, which is what tests want to see.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def mend() -> None:
    """Replace three methods of the interpreter, and add one that Triton before 3.9 lacks, once."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    if hasattr(InterpreterBuilder, "mmq_plain"):
        return
    plain = {name: getattr(InterpreterBuilder, name) for name in ("binary_op", "cast_impl", "create_dot")}

    def is_bf16(handle: Any) -> bool:
        return handle.dtype.scalar == tl.bfloat16

    def widened(handle: Any) -> Any:
        bits = handle.data.astype(np.uint32) << np.uint32(16)
        return TensorHandle(bits.view(np.float32), tl.float32)

    def rounded(handle: Any) -> Any:
        value = np.ascontiguousarray(handle.data, dtype=np.float32)
        bits = value.view(np.uint32).astype(np.uint64)
        nearest = bits + np.uint64(0x7FFF) + ((bits >> np.uint64(16)) & np.uint64(1))
        kept = np.where(np.isnan(value), bits | np.uint64(0x400000), nearest)
        return TensorHandle((kept >> np.uint64(16)).astype(np.uint16).reshape(handle.data.shape), tl.bfloat16)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if not is_bf16(lhs):
            return plain["binary_op"](self, lhs, rhs, op)
        result = plain["binary_op"](self, widened(lhs), widened(rhs), op)
        return rounded(result) if result.data.dtype == np.float32 else result

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        target = dst_type.scalar
        if is_bf16(src) and target != tl.bfloat16:
            src = widened(src)
        if target == tl.bfloat16 and not is_bf16(src):
            return rounded(TensorHandle(src.data.astype(np.float32), tl.float32))
        return plain["cast_impl"](self, src, dst_type)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (widened(part) if is_bf16(part) else part for part in (a, b))
        return plain["create_dot"](self, a, b, *rest)

    def get_bf16(self: Any, value: float) -> Any:
        return rounded(self.get_fp32(value))

    InterpreterBuilder.mmq_plain = plain
    InterpreterBuilder.get_bf16 = get_bf16
    InterpreterBuilder.binary_op = binary_op
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot
