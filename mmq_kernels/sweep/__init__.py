"""Results of many configurations: where they are kept, and what follows from them."""

from mmq_kernels.sweep.analysis import Analysis, analyze
from mmq_kernels.sweep.findings import Findings, find
from mmq_kernels.sweep.fronts import keeping, pareto
from mmq_kernels.sweep.grid import Configuration, Grid, Setting
from mmq_kernels.sweep.published import read_published
from mmq_kernels.sweep.run import Summary, Sweep
from mmq_kernels.sweep.store import Result, Store, StoreError, fingerprint
from mmq_kernels.sweep.workbench import Machine

__all__ = [
    "Analysis",
    "Configuration",
    "Findings",
    "Grid",
    "Machine",
    "Result",
    "Setting",
    "Store",
    "StoreError",
    "Summary",
    "Sweep",
    "analyze",
    "find",
    "fingerprint",
    "keeping",
    "pareto",
    "read_published",
]
