"""README's table of prompts, from what evaluation reads: ``python python_tests/eval/protocol_table.py``."""

from __future__ import annotations

import sys
from pathlib import Path

README = Path(__file__).parent.parent.parent / "README.md"
BEGIN, END = "<!-- protocols: begin -->", "<!-- protocols: end -->"

sys.path[:0] = [str(README.parent)]


def table() -> str:
    """A row for each prompt of each family, in markdown."""
    from mmq_kernels.eval.protocol import PROTOCOLS

    tasks: dict[tuple[str, str, str], list[str]] = {}
    for (family, language, task), protocol in PROTOCOLS.items():
        tasks.setdefault((_model(family, language), _prompt(protocol), _decoding(protocol)), []).append(task)
    lines = ["| model | task | prompt | decoding |", "|---|---|---|---|"]
    return "\n".join(
        [*lines, *(f"| {model} | {', '.join(own)} | {prompt} | {how} |" for (model, prompt, how), own in tasks.items())]
    )


def _model(family: str, language: str) -> str:
    if family == "*":
        return "LLaVA and all others"
    return family if language == "*" else f"{family} over {language}"


def _prompt(protocol) -> str:
    if protocol.prompt is None:
        return "none"
    text = protocol.prompt
    if protocol.layout is not None:
        text = protocol.layout.replace("{image}", "<image>").replace("{text}", text)
    return "`{}`".format(text.replace("\n", "\\n"))


def _decoding(protocol) -> str:
    how = protocol.decoding
    search = f"{how.num_beams} beams" if how.num_beams > 1 else "greedy"
    if how.num_beams > 1 and how.length_penalty != 1:
        search += f", length penalty {how.length_penalty:g}"
    length = f"{how.min_new_tokens} to {how.max_new_tokens}" if how.min_new_tokens else f"at most {how.max_new_tokens}"
    return f"{search}, {length} tokens"


def in_readme() -> str:
    text = README.read_text()
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()


if __name__ == "__main__":
    before, _, rest = README.read_text().partition(BEGIN)
    README.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}")
