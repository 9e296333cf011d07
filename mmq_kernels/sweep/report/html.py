"""A report as one HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import plotly.graph_objects as go

from mmq_kernels.page import Table, copied, figure, picture, render, table
from mmq_kernels.sweep.report.contents import Block, Note, Section, ToCopy
from mmq_kernels.sweep.report.samples import Example, Said


def to_html(title: str, about: str, sections: Sequence[Section]) -> str:
    """The page; links at its top lead to the sections.

    Args:
        title, about: plain text: the heading, and the paragraph under it.
    """
    links = "".join(
        f'<a href="#part-{index}">{escape(section.title)}</a>'
        for index, section in enumerate(sections)
        if section.level == 2
    )
    body = [f"<p class=note>{escape(about)}</p><nav>{links}</nav>"]
    for index, section in enumerate(sections):
        body.append(f'<h{section.level} id="part-{index}">{escape(section.title)}</h{section.level}>')
        body += [_block(block) for block in section.blocks]
    return render(title, body)


def _block(block: Block) -> str:
    if isinstance(block, str):
        return f"<p><b>{escape(block)}</b></p>"
    if isinstance(block, Note):
        return f"<p class=note>{escape(block.text)}</p>"
    if isinstance(block, list):
        return f"<ul class=summary>{''.join(f'<li>{escape(each)}</li>' for each in block)}</ul>"
    if isinstance(block, Table):
        return table(block)
    if isinstance(block, go.Figure):
        return figure(block)
    if isinstance(block, ToCopy):
        return f"<p class=note>{escape(block.about)}</p>{copied(block.command)}"
    return _example(block)


def _example(example: Example) -> str:
    shown = '<div class="nothing">the image is not known</div>'
    if example.image is not None:
        shown = picture(example.image, example.name)
    question = f"<b>{escape(example.question)}</b> " if example.question else ""
    truth = f"<i>{escape(example.truth)}</i>" if example.truth else escape(example.name)
    rows = "".join(_said(each) for each in example.said)
    return (
        f'<div class="sample">{shown}<div>{question}{truth}<table><thead><tr><th class="text">configuration</th>'
        f'<th>bpw</th><th class="text">said</th><th>score</th></tr></thead><tbody>{rows}</tbody></table></div></div>'
    )


def _said(said: Said) -> str:
    tone = {True: " right", False: " wrong", None: ""}[said.right]
    bpw = "" if said.bpw is None else f"{said.bpw:.2f}"
    score = "" if said.score is None else f"{said.score:.2f}"
    return (
        f'<tr><td class="text">{escape(said.configuration)}</td><td>{bpw}</td>'
        f'<td class="text{tone}">{escape(said.text)}</td><td>{score}</td></tr>'
    )
