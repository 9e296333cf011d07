"""`python -m mmq_kernels` is `mmq`."""

from mmq_kernels.cli import main

main()
