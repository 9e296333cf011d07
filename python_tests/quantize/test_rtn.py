import pytest
import torch

from mmq_kernels.quantize import quantize_weight
from mmq_kernels.quantize.rtn import choose_scale_dtype
from mmq_kernels.spec import BITS, QuantSpec


@pytest.mark.parametrize("bits", BITS)
def test_uniform_is_the_min_max_formula_of_the_whole_tensor(bits) -> None:
    weight = torch.randn(7, 30) + 0.3
    spec = QuantSpec(bits)
    got = quantize_weight(weight, spec, per_tensor=True)
    low, high = weight.min().item(), weight.max().item()
    step = torch.tensor((high - low) / (2**bits - 1)).half().item()
    zero = min(max(round(-low / step), 0), 2**bits - 1)
    codes = (torch.round(weight / step) + zero).clamp(0, 2**bits - 1)
    assert torch.equal(got.codes, codes.to(torch.uint8))
    assert set(got.scale.flatten().tolist()) == {step}
    assert set(got.zero.flatten().tolist()) == {zero}
    assert got.scale.shape == (7, 1)


def test_uniform_slices_rows_without_a_seam() -> None:
    weight = torch.randn(2500, 8)
    whole = quantize_weight(weight, QuantSpec(4), per_tensor=True)
    assert (whole.dequantize(QuantSpec(4)) - weight).abs().max() <= whole.scale.float().max() * 0.51


@pytest.mark.parametrize("value", [0.0, 2.5, -2.5])
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_constant_tensors_are_kept(value, per_tensor, symmetric) -> None:
    spec = QuantSpec(8, symmetric=symmetric)
    weight = torch.full((3, 20), value)
    back = quantize_weight(weight, spec, per_tensor=per_tensor).dequantize(spec)
    torch.testing.assert_close(back, weight, rtol=0.01, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(bad) -> None:
    weight = torch.randn(3, 20)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match="weight must be finite, got 1 values that are NaN or infinite"):
        quantize_weight(weight, QuantSpec(4))


@pytest.mark.parametrize(
    ("size", "dtype", "expected"),
    [
        (1.0, torch.float32, torch.float16),
        (1.0, torch.bfloat16, torch.bfloat16),
        (1.0, torch.float16, torch.float16),
        (1e-6, torch.float32, torch.float32),
        (1e7, torch.float32, torch.float32),
        (0.0, torch.float32, torch.float16),
    ],
)
@pytest.mark.parametrize("seed", range(10))
def test_scales_are_stored_in_a_dtype_that_holds_them(size, dtype, expected, seed) -> None:
    torch.manual_seed(seed)
    weight = (torch.randn(4, 8) * size).to(dtype)
    spec = QuantSpec(4)
    assert choose_scale_dtype(weight, spec) == expected
    quantized = quantize_weight(weight, spec)
    assert quantized.scale.dtype == expected
    error = (quantized.dequantize(spec) - weight.float()).abs().amax(1)
    # Half a step; and a scale rounded down to its dtype leaves the largest value outside of the largest code.
    steps = 0.501 + spec.max_code * torch.finfo(expected).eps / 2
    assert torch.all(error <= steps * quantized.scale.float()[:, 0])
