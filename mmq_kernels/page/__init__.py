"""Pages of results that open offline: one HTML file with its plots, tables and pictures, closed to scripts in data."""

from mmq_kernels.page.frame import render, write_page
from mmq_kernels.page.parts import Column, Table, copied, figure, picture, plain, table

__all__ = ["Column", "Table", "copied", "figure", "picture", "plain", "render", "table", "write_page"]
