"""Hostile recipes and configuration files of the study: one clear line each, soon, and nothing in them is run."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
import tiny_families
from mutations import HOSTILE_NUMBERS, HOSTILE_TEXTS, _changed

from mmq_kernels.models import make_plan
from mmq_kernels.quantize import Recipe, read_study_config

RECIPE = [{"target": "vision", "method": "rtn", "bits": 4, "group_size": 16}, {"target": "re:.*fc1", "bits": 16}]
STUDY = [
    [{"model_part": "VIT", "layer_group": "FIRST", "layer_type": "MLP", "num_bits": 4}],
    {"vit_layers": {"bits": 4, "group_size": 64}},
]
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
WHOLE = [
    BOMB,
    "!!python/object/apply:os.system ['touch MARKER']",
    "!!python/name:os.system",
    "[" * 20_000,
    "{a: " * 20_000,
    "- " * 20_000,
    "rules: &x [*x]",
    "\0\0\0",
    "{",
    "",
    "null",
    "7",
    json.dumps({"rules": "x" * 900_000}),
    "x" * 2_000_000,
    "bits: " + "9" * 10_000,
    "%YAML 9.9\n---\n1",
]
CATASTROPHES = [
    r"(a+)+$",
    r"(.*)*x",
    r"(\w+\s?)+y",
    r"(a|a)*b",
    r"(a|aa)+$",
    r".*.*.*.*.*x",
    r"((.+)+.)+",
    r"(?:(?:x*)*)*",
    r"(.*?){50}z",
    r"(a{1,90}){1,90}b",
    "(" * 5000 + ")" * 5000,
    "(",
    r"(?P<n>a)(?P<n>b)",
    "a{99999999999}",
]


def one_line(read) -> None:
    """Reads, or says in one line why not; within seconds."""
    start = time.perf_counter()
    try:
        read()
    except ValueError as error:
        message = str(error)
        assert message.strip() and "\n" not in message and len(message) < 2000, message
    assert time.perf_counter() - start < 10, "for ever"


@pytest.mark.parametrize("chunk", range(4))
def test_changed_files(chunk: int, tmp_path: Path) -> None:
    for case in range(75):
        draw = random.Random(f"{chunk} {case}")
        path = tmp_path / f"recipe.{draw.choice(('json', 'yaml'))}"
        source = draw.choice((RECIPE, *STUDY))
        text = json.dumps(_changed(draw, json.loads(json.dumps(source))))
        if draw.random() < 0.3:
            at = draw.randrange(len(text))
            text = text[:at] + draw.choice("{}[]\"',:\\&*!\0\t\x80") + text[at + 1 :]
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        one_line(lambda path=path: Recipe.parse(path))
        one_line(lambda path=path: read_study_config(path))


@pytest.mark.parametrize("text", WHOLE, ids=range(len(WHOLE)))
def test_hostile_files(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for suffix in ("json", "yaml"):
        path = tmp_path / f"recipe.{suffix}"
        path.write_text(text)
        for read in (Recipe.parse, read_study_config):
            with pytest.raises(ValueError, match=r"\S"):
                read(path)
            one_line(lambda read=read, path=path: read(path))
    assert not list(tmp_path.glob("MARKER"))


@pytest.mark.parametrize("pattern", CATASTROPHES, ids=range(len(CATASTROPHES)))
def test_expressions_that_never_end_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"regular expression|repeats"):
        Recipe.parse([{"target": f"re:{pattern}", "method": "rtn", "bits": 4}])


def test_expressions_of_every_day_are_not() -> None:
    model = tiny_families.TINY["llama"].make()
    for pattern in (r".*\.layers\.\d+\..*_proj", r"model\.layers\.(0|1)\.mlp\.(up|down)_proj", r".*(q|k|v)_proj"):
        plan = make_plan(model, Recipe.parse([{"target": f"re:{pattern}", "method": "rtn", "bits": 4}]))
        assert plan.layers


@pytest.mark.parametrize("value", [*HOSTILE_NUMBERS, *HOSTILE_TEXTS], ids=str)
def test_hostile_lines(value: object) -> None:
    model, text = tiny_families.TINY["vit"].make(), str(value)[:200]
    for line in (f"all=rtn:{text}", f"all=rtn:4:g{text}", f"{text}=rtn:4", f"skip={text}", f"re:{text}=rtn:4"):
        one_line(lambda line=line: make_plan(model, Recipe.parse(line)))
