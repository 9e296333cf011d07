"""Each function of csrc/cuda/ptx.cuh alone against arithmetic in numpy, on the emulation and on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

RANDOM = np.random.default_rng(0)
U32 = np.uint32


def probe(machine, instruction: str, words: np.ndarray) -> np.ndarray:
    """uint32 [32, 8] -> [32, 4]; what an instruction leaves alone is zero."""
    source = torch.from_numpy(words.astype(U32).view(np.int32).copy()).to(machine.device)
    target = torch.zeros(32, 4, dtype=torch.int32, device=machine.device)
    machine.backend._native().probe(
        instruction, source.data_ptr(), target.data_ptr(), *machine.backend._target(source.device)
    )
    return target.cpu().numpy().view(U32)


def random_words() -> np.ndarray:
    return RANDOM.integers(0, 2**32, (32, 8), dtype=np.uint64).astype(U32)


def bfloat(values: np.ndarray) -> np.ndarray:
    """fp32 -> bits of bf16, ties to even, as torch rounds."""
    return torch.from_numpy(values.astype(np.float32)).bfloat16().view(torch.int16).numpy().view(np.uint16)


def from_bfloat(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(U32) << 16).view(np.float32)


def halves(dtype: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Random small values: their bits, and themselves in fp64."""
    values = RANDOM.normal(size=shape).astype(np.float32)
    if dtype == "half":
        return values.astype(np.float16).view(np.uint16), values.astype(np.float16).astype(np.float64)
    bits = bfloat(values)
    return bits, from_bfloat(bits).astype(np.float64)


def pairs(bits: np.ndarray) -> np.ndarray:
    """uint16 [..., 2] -> uint32 [...], the low half first."""
    return bits[..., 0].astype(U32) | bits[..., 1].astype(U32) << U32(16)


CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


@check
def half_to_float(machine) -> None:
    for first in range(0, 2**16, 2**16 // 8):  # every exponent, subnormals and infinities among them
        words = random_words()
        words[:, 0] = first + RANDOM.integers(0, 2**13, 32)
        expected = words[:, 0].astype(np.uint16).view(np.float16).astype(np.float32)
        assert np.array_equal(probe(machine, "half_to_float", words)[:, 0].view(np.float32), expected, equal_nan=True)


@check
def bfloat_to_float(machine) -> None:
    words = random_words()
    words[:, 0] &= 0x7F7F
    expected = from_bfloat(words[:, 0].astype(np.uint16))
    assert np.array_equal(probe(machine, "bfloat_to_float", words)[:, 0].view(np.float32), expected)


def floats_near_ties() -> np.ndarray:
    values = RANDOM.normal(size=32).astype(np.float32) * np.float32(10.0) ** RANDOM.integers(-8, 5, 32).astype(
        np.float32
    )
    values[:8] = [65504, 65520, 65519.9, 2**-24, 2**-25, 1.5 * 2**-25, 1 + 2**-11, 1 + 3 * 2**-11]
    values[8:12] = [1 + 2**-8, 1 + 3 * 2**-8, -0.0, np.inf]
    return values


@check
def float_to_half(machine) -> None:
    words, values = random_words(), floats_near_ties()
    words[:, 0] = values.view(U32)
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16).view(np.uint16)
    assert np.array_equal(probe(machine, "float_to_half", words)[:, 0], expected)


@check
def float_to_bfloat(machine) -> None:
    words, values = random_words(), floats_near_ties()
    words[:, 0] = values.view(U32)
    assert np.array_equal(probe(machine, "float_to_bfloat", words)[:, 0], bfloat(values))


@check
def and_or(machine) -> None:
    words = random_words()
    assert np.array_equal(probe(machine, "and_or", words)[:, 0], (words[:, 0] & words[:, 1]) | words[:, 2])


@check
def funnel_right(machine) -> None:
    words = random_words()
    words[:, 2] = np.arange(32)
    both = words[:, 1].astype(np.uint64) << np.uint64(32) | words[:, 0].astype(np.uint64)
    assert np.array_equal(
        probe(machine, "funnel_right", words)[:, 0], (both >> words[:, 2].astype(np.uint64)).astype(U32)
    )


@check
def pick_bytes(machine) -> None:
    words = random_words()
    expected = []
    for low, high, selector in words[:, :3].tolist():
        eight = low.to_bytes(4, "little") + high.to_bytes(4, "little")
        expected.append(int.from_bytes(bytes(eight[selector >> 4 * i & 7] for i in range(4)), "little"))
    assert np.array_equal(probe(machine, "pick_bytes", words)[:, 0], np.array(expected, U32))


def fma(machine, dtype: str, instruction: str) -> None:
    words = random_words()
    bits, values = halves(dtype, (32, 3, 2))
    words[:, :3] = pairs(bits)
    exact = values[:, 0] * values[:, 1] + values[:, 2]
    if dtype == "half":
        expected = exact.astype(np.float16).view(np.uint16)
    else:
        expected = torch.from_numpy(exact).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(probe(machine, instruction, words)[:, 0], pairs(expected))


@check
def fma_half(machine) -> None:
    fma(machine, "half", "fma_half")


@check
def fma_bfloat(machine) -> None:
    fma(machine, "bfloat", "fma_bfloat")


@check
def copy_16(machine) -> None:
    words = random_words()
    expected = np.where(words[:, 3:4] % 2 == 0, words[:, :4], 0)
    assert np.array_equal(probe(machine, "copy_16", words), expected)


@check
def copy_16_once(machine) -> None:
    words = random_words()
    assert np.array_equal(probe(machine, "copy_16_once", words), words[:, :4])


@check
def store_16(machine) -> None:
    words = random_words()
    assert np.array_equal(probe(machine, "store_16", words), words[:, :4])


@check
def load_16(machine) -> None:
    words = random_words()
    assert np.array_equal(probe(machine, "load_16", words), words[:, :4])


@check
def copy_8(machine) -> None:
    words = random_words()
    assert np.array_equal(probe(machine, "copy_8", words)[:, :2], words[:, :2])


@check
def copies_in_flight(machine) -> None:
    words = random_words()
    assert np.array_equal(probe(machine, "copies_in_flight", words), words[:, :4])


@check
def load_matrices(machine) -> None:
    words = random_words()
    expected = np.array([[words[8 * i + lane // 4, lane % 4] for i in range(4)] for lane in range(32)])
    assert np.array_equal(probe(machine, "load_matrices", words), expected)


def multiply(machine, dtype: str, instruction: str) -> None:
    words = random_words()
    a_bits, a_values = halves(dtype, (16, 16))
    b_bits, b_values = halves(dtype, (16, 8))
    c = RANDOM.normal(size=(32, 2)).astype(np.float32)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for i in range(4):
            words[lane, i] = pairs(a_bits[g + 8 * (i & 1), 2 * t + 8 * (i >> 1) :][:2])
        for i in range(2):
            words[lane, 4 + i] = pairs(b_bits[2 * t + 8 * i :, g][:2])
    words[:, 6:] = c.view(U32)
    product = a_values @ b_values
    got = probe(machine, instruction, words).view(np.float32)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for i in range(4):
            exact = product[g + 8 * (i >> 1), 2 * t + (i & 1)] + c[lane, i & 1]
            # Tensor cores may cut off low bits of terms far below the largest; 2^-18 of the terms' sizes bounds it.
            size = np.abs(a_values[g + 8 * (i >> 1)]) @ np.abs(b_values[:, 2 * t + (i & 1)]) + abs(c[lane, i & 1])
            assert abs(got[lane, i] - exact) <= 2.0**-18 * size


@check
def multiply_half(machine) -> None:
    multiply(machine, "half", "multiply_half")


@check
def multiply_bfloat(machine) -> None:
    multiply(machine, "bfloat", "multiply_bfloat")


@check
def shuffle(machine) -> None:
    words = random_words()
    words[:, 0] = RANDOM.normal(size=32).astype(np.float32).view(U32)
    words[:, 1] = RANDOM.permutation(32)
    assert np.array_equal(probe(machine, "shuffle", words)[:, 0], words[words[:, 1], 0])


@check
def add_to_counter(machine) -> None:
    words = random_words()
    words[:, 0] = 3
    got = probe(machine, "add_to_counter", words)
    assert got[0, 0] == 96 and sorted(got[:, 1].tolist()) == list(range(0, 96, 3))


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_instruction(name, machine) -> None:
    CHECKS[name](machine)


def test_every_instruction_is_checked(machine) -> None:
    assert set(machine.backend._native().probe_names()) == set(CHECKS)
