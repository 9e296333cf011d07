"""The tables of what `bench_cpu.py` measured."""

from __future__ import annotations

from typing import Any

from recorded import Row, newest, read, source, table

ISAS = ("scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16")


def gemm_at_best() -> str:
    """Packed products over dense ones at the best instruction set that was measured, x in bf16 if it was."""
    return "\n".join(_gemm(rows) for rows in _runs()[:1])


def gemm_otherwise() -> str:
    """The same of all others: x in other dtypes, and other instruction sets."""
    return "\n".join(_gemm(rows) for rows in _runs()[1:])


def _runs() -> list[list[Row]]:
    """The newest run for each instruction set and dtype of x, rounded x beside it; the best instruction set first."""
    rows = [row for row in read("cpu") if row["bench"] == "gemm" and "a8_us" in row]
    lasts = {(row["isa"], row["dtype"]): row for row in rows}
    order = sorted(lasts, key=lambda run: (-ISAS.index(run[0]), run[1]))
    return [newest([row for row in rows if _one_run(row) == _one_run(lasts[run])], "bits", "m") for run in order]


def _gemm(rows: list[Row]) -> str:
    last = rows[-1]
    dtype, tokens = last["dtype"], sorted({row["m"] for row in rows})
    dense = f"torch_{dtype}_us"
    text = (
        f"**CPU ({last['isa']}), {last['n']} x {last['k']}, group {last['group']}, x in {dtype}**: speed of "
        f"the packed linear over torch's {dtype} linear in the same run (ratio of medians), by tokens m.\n\n"
    )
    found = {(row["bits"], row["m"]): row for row in rows}
    body = [
        [f"{bits} bits", *(_times_faster(found.get((bits, m)), dense, "us") for m in tokens)]
        for bits in sorted({row["bits"] for row in rows})
    ]
    body += [
        [f"{bits} bits, x rounded to 8", *(_times_faster(found.get((bits, m)), dense, "a8_us") for m in tokens)]
        for bits in sorted({row["bits"] for row in rows})
    ]
    return text + table(["", *(f"m = {m}" for m in tokens)], body) + "\n" + source(last) + "\n"


def _one_run(row: Row) -> tuple[Any, ...]:
    """What lines have in common that were measured in pieces: all but the part of the command that says which piece."""
    return tuple(row.get(key) for key in ("commit", "cpu", "isa", "threads", "dtype", "n", "k", "group", "clock"))


def _times_faster(row: Row | None, slower: str, faster: str) -> str:
    return f"{row[slower] / row[faster]:.2f}x" if row and slower in row and faster in row else ""


PEERS = {
    "torch_bf16_us": "torch bf16",
    "torch_int4pack_us": "torch int4pack",
    "ort_float_us": "ONNX Runtime",
    "ort_a8_us": "ONNX Runtime, x rounded to 8",
}


def against() -> str:
    """The packed products of others, in milliseconds."""
    return "\n".join(_against(rows) for rows in _runs())


def _against(rows: list[Row]) -> str:
    last = rows[-1]
    columns = {"us": f"packed, x in {last['dtype']}", "a8_us": "packed, x rounded to 8", **PEERS}
    body = [
        [
            f"{row['bits']} bits, m = {row['m']}",
            *(f"{row[key] / 1e3:.3f}" if key in row else "" for key in columns),
            f"{row['share_of_limit']:.0%}",
        ]
        for row in rows
    ]
    by = " by FMA, though one token, and bf16, mostly go by integers" if last["isa"] == "avx2" else ""
    read = sorted(row.get("read_in_turns_gb_per_s", row["read_gb_per_s"]) for row in rows)
    text = (
        f"**Beside others on the CPU ({last['isa']})**, {last['n']} x {last['k']}, group {last['group']}, milliseconds "
        "(medians), weights rotated through 160 MiB. ONNX Runtime's `MatMulNBits` at accuracy levels 1 and 4, "
        f"symmetric; torch's int4 kernel with bf16 activations. The limit of x in {last['dtype']} is the longer of "
        "moving the bytes, at what torch's sum of 256 MiB read in the same turns "
        f"({read[0]:.0f} to {read[-1]:.0f} GB/s: the machine is shared), and multiplying at "
        f"{last['matmul_tflops']:.2f} TFLOP/s{by}; int8 peaks at {last['peak_int8_tops']:.2f} TOP/s.\n\n"
    )
    return text + table(["", *columns.values(), "of its limit"], body) + "\n" + source(last) + "\n"


def packing() -> str:
    """Seconds for a billion codes."""
    rows = newest([row for row in read("cpu") if row["bench"] == "packing"], "bits")
    if not rows:
        return ""
    steps = ("copy", "pack", "unpack", "prepack", "unprepack", "rtn")
    body = [[f"{row['bits']} bits", *(f"{row[f'{step}_seconds_per_1e9']:.2f}" for step in steps)] for row in rows]
    text = "**A billion codes on the CPU**, seconds; `copy` is what the codes alone take into fresh memory.\n\n"
    return text + table(["", *steps], body) + "\n" + source(rows[-1]) + "\n"


def captions() -> str:
    """The demo's BLIP-2 from end to end."""
    rows = newest([row for row in read("cpu") if row["bench"] == "captions"], "bits", "activation_bits")
    if not rows:
        return ""
    last = rows[-1]
    body = [
        [f"torch {name}", f"{last[f'torch_{name}_captions_per_second']:.0f}", _mb(last[f"torch_{name}_held_bytes"])]
        for name in ("fp32", "bf16")
    ]
    body += [
        [
            f"{row['bits']} bits" + (", x in 8" if row["activation_bits"] == 8 else ""),
            f"{row['captions_per_second']:.0f}",
            _mb(row["held_bytes"]),
        ]
        for row in rows
    ]
    text = (
        f"**The demo's BLIP-2 on the CPU**: {last['images']} images at a time, {last['new_tokens']} tokens each, group "
        f"{last['group']}. The model is tiny: its time is mostly Python's.\n\n"
    )
    return text + table(["", "captions/s", "MB held"], body) + "\n" + source(last) + "\n"


def _mb(count: float) -> str:
    return f"{count / 1e6:.2f}"


def alternating() -> str:
    """Whether torch's products and packed ones pay for each other."""
    rows = newest([row for row in read("cpu") if row["bench"] == "alternating"], "dtype")
    return "\n".join(
        f"**Torch's products and packed ones in turn**, {row['n']} x {row['k']}, m = {row['m']}, x in {row['dtype']}: "
        f"{row['us']:.0f} us, {row['overhead']:+.1%} beside the {row['torch_us']:.0f} us and {row['packed_us']:.0f} us "
        f"of each alone. {source(row)}\n"
        for row in rows
    )


def gptq() -> str:
    rows = newest([row for row in read("cpu") if row["bench"] == "gptq"], "n", "k")
    if not rows:
        return ""
    body = [
        [f"{r['n']} x {r['k']}", f"{r['seconds']:.2f} s", f"{r['torch_seconds']:.2f} s", f"{r['x_torch']:.1f}x"]
        for r in rows
    ]
    text = "**GPTQ of one layer on the CPU**, 4 bits, group 128, its Cholesky factor counted.\n\n"
    heading = ["layer", "`gptq_block`", "per-column torch loop", "ratio"]
    return text + table(heading, body) + "\n" + source(rows[-1]) + "\n"
