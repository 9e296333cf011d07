"""Quantizers: what to do to which layer, round to nearest, GPTQ, and the walk through a model block by block."""

from mmq_kernels.quantize.gptq import GptqSettings, Hessian, QuantizationError, gptq
from mmq_kernels.quantize.recipe import Recipe, Rule
from mmq_kernels.quantize.rtn import Quantized, quantize_weight
from mmq_kernels.quantize.sequential import Job, LayerReport, Stage, quantize_stages

__all__ = [
    "GptqSettings",
    "Hessian",
    "Job",
    "LayerReport",
    "QuantizationError",
    "Quantized",
    "Recipe",
    "Rule",
    "Stage",
    "gptq",
    "quantize_stages",
    "quantize_weight",
]
