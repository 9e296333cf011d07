"""The command line, `mmq`: thin commands over the package's functions."""

from __future__ import annotations

import sys


def main() -> None:
    """Run `mmq`; errors leave by `sys.exit(2)` with one line on standard error."""
    from mmq_kernels.cli.app import run

    sys.exit(run(sys.argv[1:]))
