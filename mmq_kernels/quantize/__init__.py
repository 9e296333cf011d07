"""Quantizers: what to do to which layer, round to nearest, GPTQ, and the walk through a model block by block."""

from mmq_kernels.quantize.gptq import gptq
from mmq_kernels.quantize.hessian import Hessian, QuantizationError
from mmq_kernels.quantize.recipe import Recipe, Rule
from mmq_kernels.quantize.rtn import Quantized, quantize_weight
from mmq_kernels.quantize.sequential import LayerReport, quantize_stages
from mmq_kernels.quantize.settings import GptqSettings
from mmq_kernels.quantize.study import read_study_config
from mmq_kernels.quantize.walk import Job, Stage

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
    "read_study_config",
]
