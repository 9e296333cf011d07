"""Rows as people read them: shape | m | us | TFLOP/s | GB/s | x torch | share of limit."""

from __future__ import annotations

from mmq_kernels.bench.record import Row

HEADINGS = ("shape", "m", "us", "TFLOP/s", "GB/s", "x torch", "share of limit")


def cells(row: Row) -> list[str]:
    """One row under `HEADINGS`; what a benchmark does not measure stays empty."""
    return [
        _subject(row),
        _shown(row.get("m"), "d"),
        _microseconds(row),
        _three_digits(row.get("tflops")),
        _three_digits(row.get("gb_per_s")),
        _shown(_ratio(row), ".2f"),
        _shown(row.get("share_of_limit"), ".0%"),
    ]


def line(row: Row) -> str:
    """The same on one line of text."""
    subject, *numbers = cells(row)
    widths = (5, 26, 7, 6, 6, 5)
    return " | ".join([f"{subject:34}", *(f"{cell:>{width}}" for cell, width in zip(numbers, widths, strict=True))])


def _subject(row: Row) -> str:
    group = "channel" if row["group"] == -1 else f"g{row['group']}"
    stored = f"{row['bits']} bits {group}"
    if row["bench"] == "gemm":
        fused = "" if row["activation"] == "none" else f" bias+{row['activation']}"
        return f"{row['shape']} {stored}{fused}"
    if row["bench"] == "block":
        return f"{row['block']} block {stored}"
    if row["bench"] == "decode":
        return f"{row['new_tokens']} tokens {stored}"
    if row["bench"] == "captions":
        rate, held = row["captions_per_second"], row["held_bytes"] / 1e6
        return f"{stored}, x in {row['activation_bits']}: {rate:.1f} captions/s, {held:.2f} MB"
    if row["bench"] == "packing":
        steps = ("pack", "unpack", "prepack", "unprepack", "rtn")
        return f"{stored}, s per 1e9: " + ", ".join(f"{step} {row[f'{step}_seconds_per_1e9']:.2f}" for step in steps)
    if row["bench"] == "alternating":
        return f"torch and {stored} in turn: {row['overhead']:+.1%}"
    return f"{row['bench']} {row['n']}x{row['k']} {stored}"


def _microseconds(row: Row) -> str:
    if row["bench"] == "overhead":
        return f"host {row['host_us']:.1f}"
    if row["bench"] == "gptq":
        low, middle, high = (row[key] * 1e6 for key in ("seconds_q1", "seconds", "seconds_q3"))
    else:
        low, middle, high = row["us_q1"], row["us"], row["us_q3"]
    digits = 1 if middle < 1000 else 0
    return f"{middle:.{digits}f} ({low:.{digits}f}..{high:.{digits}f})"


def _ratio(row: Row) -> float | None:
    if row["bench"] == "gptq":
        return row["x_torch"]
    if row["bench"] == "overhead":
        return row["torch_host_us"] / row["host_us"]
    return row.get(f"x_torch_{row['dtype']}")


def _three_digits(value: float | None) -> str:
    return _shown(value, ".3g" if value is None or value < 100 else ".0f")


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
