"""GPTQ of this package beside llm-compressor's, on the same weights and Hessians of the demo's models.

    python -m pip install llmcompressor
    python benchmarks/against_llmcompressor.py [--out FILE]

Both get the float model's inputs on half of the calibration samples as a Hessian, damping 0.01, blocks of 128 columns,
and bits, group and symmetry alike; llm-compressor orders columns by activation ("static": grids from the weight as
given) and takes its grids from its own observers, the default one and "mse". Its scales stay fp32, ours are fp16.
Errors are ``tr(D H D^T)`` with the Hessian of that half and of the other; a line has, for each way, the ratio of the
sums over all layers to that of llm-compressor with its default observer, and the median of the layers' ratios. Then one
line of seconds for a layer of SIZE x SIZE, all ways in turns. Lines are appended.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from gptq_error import SPECS, TASKS, Layer, layers
from recorded import RESULTS
from torch import Tensor

from mmq_kernels.bench.record import Row, append, provenance
from mmq_kernels.quantize import GptqSettings, gptq
from mmq_kernels.quantize.hessian import factorize
from mmq_kernels.spec import PER_CHANNEL, QuantSpec

try:
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
    from llmcompressor.observers import Observer
except ImportError as missing:
    sys.exit(f"this needs llm-compressor: python -m pip install llmcompressor ({missing})")

Way = Callable[[Tensor, Tensor, QuantSpec], Tensor]
"""Weight and Hessian -> the weight dequantized."""

DAMPING = 0.01
SIZE = 2560
BASE = "llm-compressor"


def theirs(observer: str | None) -> Way:
    def quantize(weight: Tensor, hessian: Tensor, spec: QuantSpec) -> Tensor:
        whole = spec.group_length(weight.shape[1]) == weight.shape[1]
        group = {"strategy": "channel"} if whole else {"strategy": "group", "group_size": spec.group_size}
        chosen = {} if observer is None else {"observer": observer}
        args = QuantizationArgs(
            num_bits=spec.bits, type="int", symmetric=spec.symmetric, actorder="static", **group, **chosen
        )
        watch = Observer.load_from_registry(args.observer or "memoryless_minmax", base_name="weight", args=args)
        watch(weight)
        grid = watch.get_qparams()
        back, _, gave_up = quantize_weight(
            weights=weight.clone()[None],
            hessians=hessian.clone()[None],
            scale=grid["scale"][None],
            zero_point=grid["zero_point"][None],
            global_scale=None,
            quant_args=args,
            blocksize=GptqSettings().block_size,
            percdamp=DAMPING,
        )
        if bool(gave_up.any()):
            raise RuntimeError("llm-compressor fell back to round to nearest")
        return back[0]

    return quantize


def ours(settings: GptqSettings) -> Way:
    def quantize(weight: Tensor, hessian: Tensor, spec: QuantSpec) -> Tensor:
        return gptq(weight, factorize(hessian, settings, "layer"), spec, settings).dequantize(spec)

    return quantize


WAYS: dict[str, Way] = {
    BASE: theirs(None),
    "llm-compressor, mse": theirs("memoryless_mse"),
    "gptq": ours(GptqSettings(DAMPING)),
    "ordered": ours(GptqSettings(DAMPING, order="activation")),
    "static": ours(GptqSettings(DAMPING, order="static")),
    "gptq+": ours(GptqSettings(DAMPING).beyond()),
}


def lost(weight: Tensor, back: Tensor, hessian: Tensor) -> float:
    difference, hessian = (back - weight).double(), hessian.double()
    return float(((difference @ hessian) * difference).sum())


def fits(weight: Tensor, spec: QuantSpec) -> bool:
    """Whether llm-compressor takes such a layer: whole groups only."""
    k = weight.shape[1]
    return spec.group_size == PER_CHANNEL or k <= spec.group_size or k % spec.group_size == 0


def measure_errors(spec: QuantSpec, found: dict[str, Layer]) -> Row:
    errors: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for weight, calibrated, held_out in found.values():
        if fits(weight, spec):
            for way, quantize in WAYS.items():
                back = quantize(weight, calibrated, spec)
                errors[way].append((lost(weight, back, calibrated), lost(weight, back, held_out)))
    base = torch.tensor(errors[BASE], dtype=torch.float64)
    row: Row = {**_about("error", spec), "layers": len(base), "models": list(TASKS)}
    for way, values in errors.items():
        each = torch.tensor(values, dtype=torch.float64)
        of_sums, of_layers = (each.sum(0) / base.sum(0)).tolist(), (each / base).median(0).values.tolist()
        for i, what in enumerate(("error", "held-out error")):
            row |= {f"{way}: {what}, sums": of_sums[i], f"{way}: {what}, median": of_layers[i]}
    return row


def measure_time(spec: QuantSpec, rounds: int = 5) -> Row:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * SIZE, SIZE, generator=generator) * 10 ** torch.randn(SIZE, generator=generator).mul(0.3)
    weight, hessian = torch.randn(SIZE, SIZE, generator=generator) * 0.02, x.t() @ x / SIZE
    seconds: dict[str, list[float]] = {way: [] for way in WAYS if way != "llm-compressor, mse"}
    for turn in range(rounds + 1):
        for way, taken in seconds.items():
            begin = time.perf_counter()
            WAYS[way](weight, hessian, spec)
            if turn:
                taken.append(time.perf_counter() - begin)
    return {**_about("time", spec), "n": SIZE, "k": SIZE} | {f"{w}: seconds": median(t) for w, t in seconds.items()}


def _about(what: str, spec: QuantSpec) -> Row:
    about = {"bits": spec.bits, "group": spec.group_size, "symmetric": spec.symmetric}
    return {"bench": f"against_llmcompressor/{what}", **about}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "against_llmcompressor.jsonl", help="file to append to")
    options = parser.parse_args()
    about = provenance() | {name: version(name) for name in ("llmcompressor", "compressed-tensors")}
    found = {f"{model}: {name}": layer for model in TASKS for name, layer in layers(model).items()}
    for spec in SPECS:
        for row in (measure_errors(spec, found), measure_time(spec)):
            append(options.out, [row | about])
            print(*(f"{key}: {value}" for key, value in row.items()), sep="\n  ")


if __name__ == "__main__":
    with torch.no_grad():
        main()
