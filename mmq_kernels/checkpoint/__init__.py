"""Folders of models: save, load, and quantization that streams from one folder to another."""

from mmq_kernels.checkpoint.errors import CheckpointError
from mmq_kernels.checkpoint.exchange import export_folder, import_folder
from mmq_kernels.checkpoint.folder import check_target, disk_bytes
from mmq_kernels.checkpoint.loading import load, load_processor, local_folder
from mmq_kernels.checkpoint.quantization import quantize_checkpoint, quantize_model
from mmq_kernels.checkpoint.saving import save
from mmq_kernels.checkpoint.streaming import quantize_folder

__all__ = [
    "CheckpointError",
    "check_target",
    "disk_bytes",
    "export_folder",
    "import_folder",
    "load",
    "load_processor",
    "local_folder",
    "quantize_checkpoint",
    "quantize_folder",
    "quantize_model",
    "save",
]
