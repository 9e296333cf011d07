"""The typer application, and the one place where errors become a line and an exit code."""

from __future__ import annotations

import sys
import warnings

import typer
from transformers.utils import logging

from mmq_kernels.cli import allocate, analyze, bench, data, demo, evaluate, exchange, info, quantize, report, sweep

ERROR = 2
"""Exit code of every failed command."""

INTERRUPTED = 130

app = typer.Typer(
    name="mmq",
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Shrink vision-language models to 2..8 bits per weight, run them, and measure what it cost.",
)
app.command("info")(info.info)
app.command("quantize")(quantize.quantize)
app.command("export")(exchange.export)
app.command("import")(exchange.import_)
app.command("eval")(evaluate.evaluate)
app.command("score")(evaluate.score)
app.command("allocate")(allocate.allocate)
app.command("sweep")(sweep.sweep)
app.add_typer(data.data, name="data")
app.command("analyze")(analyze.analyze)
app.command("report")(report.report)
app.command("demo")(demo.demo)
app.command("bench")(bench.bench)


def run(arguments: list[str]) -> int:
    """One invocation of `mmq`; returns its exit code.

    ``--debug`` anywhere on the line lets an error's traceback through.
    """
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not debug:
        warnings.filterwarnings("ignore", category=FutureWarning)
        logging.set_verbosity_error()
    try:
        code = app(arguments or ["--help"], standalone_mode=False)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        if debug:
            raise
        print(f"mmq: {one_line(error)}", file=sys.stderr)
        return ERROR
    if code == INTERRUPTED:
        print("mmq: interrupted; finished work is kept, see --resume", file=sys.stderr)
    return code or 0


def one_line(error: Exception) -> str:
    """What went wrong, on one line; errors that name no cause of their own say their type."""
    if hasattr(error, "format_message"):  # of the command line itself
        return f"{' '.join(error.format_message().split())} (see mmq --help)"
    text = " ".join(str(error).split())
    expected = (ValueError, RuntimeError, OSError, ImportError)
    if text and isinstance(error, expected):
        return text
    return f"{type(error).__name__}: {text or 'no message'} (run again with --debug for the traceback)"
