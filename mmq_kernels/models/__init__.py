"""Where each VLM keeps its vision, connector and language parts, and what a recipe means for a given model."""

from mmq_kernels.models.families import component_prefixes, family_of
from mmq_kernels.models.plan import LayerPlan, Plan, make_plan
from mmq_kernels.models.quantization import QuantizationReport, quantize_model

__all__ = [
    "LayerPlan",
    "Plan",
    "QuantizationReport",
    "component_prefixes",
    "family_of",
    "make_plan",
    "quantize_model",
]
