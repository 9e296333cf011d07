"""Datasets in their publishers' layouts, batched predictions, official metrics, and what a model weighs."""

from mmq_kernels.eval.bootstrap import CorpusSamples, Interval, MetricSamples, interval, paired_interval, ratio_interval
from mmq_kernels.eval.datasets import (
    SPLITS,
    TASKS,
    CaptionSample,
    GqaSample,
    RetrievalGallery,
    VqaSample,
    calibration_samples,
    load,
)
from mmq_kernels.eval.errors import DataError, ModelMismatch
from mmq_kernels.eval.images import PixelStore
from mmq_kernels.eval.predictions import PredictionsError
from mmq_kernels.eval.prepared import Prepared, prepare
from mmq_kernels.eval.result import EvalResult, compare, metric_samples, write_predictions
from mmq_kernels.eval.runner import EvalOptions, evaluate, evaluate_prepared
from mmq_kernels.eval.scoring import score_predictions
from mmq_kernels.eval.size import ModelSize, model_size

__all__ = [
    "SPLITS",
    "TASKS",
    "CaptionSample",
    "CorpusSamples",
    "DataError",
    "EvalOptions",
    "EvalResult",
    "GqaSample",
    "Interval",
    "MetricSamples",
    "ModelMismatch",
    "ModelSize",
    "PixelStore",
    "PredictionsError",
    "Prepared",
    "RetrievalGallery",
    "VqaSample",
    "calibration_samples",
    "compare",
    "evaluate",
    "evaluate_prepared",
    "interval",
    "load",
    "metric_samples",
    "model_size",
    "paired_interval",
    "prepare",
    "ratio_interval",
    "score_predictions",
    "write_predictions",
]
