"""Checkpoints in the formats of other tools: export to them, import from them, folder to folder, a layer at a time."""

from mmq_kernels.checkpoint.exchange.exporting import export_folder
from mmq_kernels.checkpoint.exchange.formats import FORMATS
from mmq_kernels.checkpoint.exchange.importing import import_folder

__all__ = ["FORMATS", "export_folder", "import_folder"]
