"""The engine that is always there: one configuration after the other, in this process."""

from __future__ import annotations

from mmq_kernels.sweep.grid import Setting
from mmq_kernels.sweep.run import Pending
from mmq_kernels.sweep.workbench import Machine, Workbench


class Local:
    """Measures in this process."""

    workers = 1

    def run(self, setting: Setting, pending: Pending, machine: Machine) -> None:
        """See `Engine`."""
        with Workbench(setting, machine) as bench:
            bench.expect(pending.recipes)
            for _, measured in bench.measure(pending.works(), pending.begun):
                pending.done(measured)
