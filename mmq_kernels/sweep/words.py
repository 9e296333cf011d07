"""Findings in words: what a cost, a configuration and a difference are called, and the sentences made of them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from mmq_kernels.quantize.recipe import BLOCK_GROUPS, COMPONENTS
from mmq_kernels.sweep.analysis import Analysis, place
from mmq_kernels.sweep.differences import Difference
from mmq_kernels.sweep.fronts import Point
from mmq_kernels.sweep.matched import UNRECORDED, Comparison

COST_NAMES = {"bpw": "bits per weight", "bytes": "size in GB", "latency": "milliseconds a sample"}
COST_UNITS = {"bpw": 1.0, "bytes": 1e9, "latency": 1e-3}
"""What costs are divided by before they are shown."""
METRIC_NAMES = {
    "cider": "CIDEr",
    "meteor": "METEOR",
    "rouge_l": "ROUGE-L",
    "accuracy": "accuracy",
    "nll": "NLL",
    **{f"bleu_{n}": f"BLEU-{n}" for n in range(1, 5)},
    **{f"{side}_r{k}": f"{side} R@{k}" for side in ("text", "image") for k in (1, 5, 10)},
}
METHOD_NAMES = {"uniform": "uniform", "rtn": "RTN", "gptq": "GPTQ", "gptq+": "GPTQ+", "awq": "AWQ"}
PREDICTED = 0.8
"""A forest with a lower R^2 on unseen configurations is to be doubted."""


def metric_name(metric: str) -> str:
    return METRIC_NAMES.get(metric, metric)


def method_name(method: str) -> str:
    return METHOD_NAMES.get(method, method)


def short_model(model: str) -> str:
    """The last part of a hub name or of a folder."""
    return model.rstrip("/").rsplit("/", 1)[-1] or model


def cost(value: float, name: str) -> str:
    """A cost in the unit that it is read in."""
    if name == "bytes":
        return f"{value / 1e9:.3f} GB"
    return f"{1e3 * value:.3g} ms" if name == "latency" else f"{value:.2f} {name}"


def configuration(factors: Mapping[str, float | str]) -> str:
    """Factors on one line, in order; the thirds of a component's blocks together, and once where they are alike."""
    shown: dict[str, str] = {}
    for name in sorted(factors, key=place):
        value = factors[name]
        part, _, third = name.partition(".")
        thirds = [factors.get(f"{part}.{each}") for each in BLOCK_GROUPS]
        if part in COMPONENTS and third in BLOCK_GROUPS and None not in thirds:
            shown[part] = "/".join(level(each) for each in (thirds[:1] if len(set(thirds)) == 1 else thirds))
        else:
            shown[name] = level(value)
    return " ".join(f"{name}={value}" for name, value in shown.items())


def level(value: float | str | None) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def chance(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def importance_sentence(found: Analysis) -> str:
    """Which part matters, by how much, and whether to believe it."""
    ranked = sorted(found.consensus.items(), key=lambda item: -item[1])
    shares = ", ".join(f"{name} {share:.0%}" for name, share in ranked[:4])
    more = f" and {len(ranked) - 4} more" if len(ranked) > 4 else ""
    agreed = f"all {len(found.importance)} measures put {ranked[0][0]} first"
    if not found.unanimous:
        firsts: dict[str, list[str]] = {}
        for measure, own in found.importance.items():
            firsts.setdefault(max(own, key=lambda name: own[name]), []).append(measure)
        agreed = "the measures disagree on the first: "
        agreed += ", ".join(f"{name} by {' and '.join(measures)}" for name, measures in firsts.items())
    doubt = "" if found.r2 >= PREDICTED else "; configurations that it has not seen it does not predict well"
    return (
        f"{method_name(found.method)}, {found.rows:,} results: what moves {metric_name(found.metric)} is "
        f"{shares}{more} ({agreed}; the forest's cross-validated R² is {found.r2:.2f}{doubt})."
    )


def keeping_sentence(found: Analysis, share: float = 0.95) -> str:
    """The least that keeps a share of the score, and whether it differs from everything left alone."""
    whole = f"{found.whole:.4g} {'at 16 bits' if found.measured_whole else 'of the best (16 bits were not measured)'}"
    if found.cost is None:
        return f"{method_name(found.method)}: no result says what it costs, so nothing is said of size."
    point = found.keeps.get(share)
    if point is None:
        return f"{method_name(found.method)}: nothing that was measured keeps {share:.0%} of {whole}."
    tested = next((each for each in found.differences if each.one == point.fingerprint), None)
    return (
        f"{method_name(found.method)}: the least that keeps {share:.0%} of {whole} is {cost(point.cost, found.cost)} "
        f"({configuration(point.factors)}), with {point.value:.4g}; {_tested(tested, found.measured_whole)}."
    )


def _tested(tested: Difference | None, measured: bool) -> str:
    if tested is None or tested.real is None or tested.adjusted is None:
        reason = "no predictions and no intervals were kept" if measured else "there is nothing to test against"
        return f"whether that differs from 16 bits is not tested: {reason}"
    said = "that differs from 16 bits" if tested.real else "no difference to 16 bits is shown"
    return (
        f"{said} ({tested.value:+.4g} [{tested.low:+.4g}, {tested.high:+.4g}], {chance(tested.adjusted)}, {tested.how})"
    )


def comparison_sentence(found: Comparison) -> str:
    """Which method is better, where, by how much, and whether that can be believed."""
    other = found.other if found.better == found.one else found.one
    wins, losses = (found.wins, found.losses) if found.better == found.one else (found.losses, found.wins)
    settings = f"{len(found.settings)} {'settings' if len(found.settings) > 1 else 'setting'}"
    where = f"the same bits in {settings}" if found.unlike else f"{settings} matched in all but the method"
    ends = "" if found.low is None or found.high is None else f" [{found.low:+.4g}, {found.high:+.4g}]"
    if found.adjusted is None:
        said = f"{method_name(found.better)} is ahead of {method_name(other)}, which is not tested"
    elif found.real:
        said = f"{method_name(found.better)} beats {method_name(other)} ({chance(found.adjusted)}, {found.how})"
    else:
        said = (
            f"no difference is shown between {method_name(found.better)} and {method_name(other)} "
            f"({chance(found.adjusted)}, {found.how})"
        )
    unlike = ""
    if found.unlike == [UNRECORDED]:
        unlike = " Whether all else was alike is not recorded."
    elif found.unlike:
        unlike = f" This is not like for like: {method_name(found.one)} / {method_name(found.other)} ran with "
        unlike += f"{', '.join(found.unlike)}."
    return (
        f"At {where} {said}: better in {wins}, worse in {losses}, mean {method_name(found.one)} - "
        f"{method_name(found.other)} {found.mean:+.4g}{ends} {metric_name(found.metric)}.{unlike}"
    )


def command(point: Point, model: str, task: str, data: str) -> str:
    """The command that makes a configuration; empty where no recipe is known or nothing is to be done."""
    if not point.recipe:
        return ""
    lines = [f"mmq quantize {shlex.quote(model)} --recipe {shlex.quote(point.recipe)}"]
    if any(f"={method}:" in point.recipe for method in ("gptq", "gptq+", "awq")):
        lines.append(f"    --calibrate {shlex.quote(f'{task}:{data}' if data else f'{task}:FOLDER')}")
    return " \\\n".join([*lines, "    -o OUT"])
