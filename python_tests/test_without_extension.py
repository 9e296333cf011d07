"""A pure-Python install: everything works on the reference backend, and `mmq info` says what is missing."""

import json
import subprocess
import sys

SCRIPT = """
import sys
sys.modules["mmq_kernels._C"] = None  # as if it had never been built
import torch
import mmq_kernels
from mmq_kernels import ops
from mmq_kernels.cli.app import run
from mmq_kernels.nn import QuantLinear
from mmq_kernels.spec import QuantSpec

weight = torch.randn(9, 70, generator=torch.Generator().manual_seed(0))
x = torch.randn(4, 70, generator=torch.Generator().manual_seed(1))
spec = QuantSpec(3, 32)
codes, scale, zero = ops.quantize_rtn(weight, spec)
layer = QuantLinear.from_codes(codes, scale, zero, spec)
assert torch.equal(ops.unpack(ops.pack(codes, 3), 3, 70), codes)
assert (layer(x) - x @ layer.dequantize().T).abs().max() < 1e-4
assert mmq_kernels.explain(layer).startswith("reference: cuda: the compiled extension")
sys.exit(run(["info", "--json"]))
"""


def test_import_ops_and_info_without_the_extension() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["extension"]["available"] is False
    assert "MMQ_BUILD=none" in facts["backends"]["cpu"]["why_not"]
    assert facts["backends"]["reference"]["available"]


def test_a_forced_backend_that_is_missing_raises() -> None:
    script = SCRIPT.split("weight = ")[0] + (
        "weight = torch.randn(4, 64)\n"
        "try:\n    ops.quantize_rtn(weight, QuantSpec(4, 32))\n"
        "except RuntimeError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": "", "MMQ_BACKEND": "cpu"},
    )
    assert "backend 'cpu' was asked for but cannot serve mmq.quantize_rtn on cpu" in done.stdout, done.stderr
