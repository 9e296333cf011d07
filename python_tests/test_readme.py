"""README keeps its word: its code runs, its paths and commands exist, its tables are those of the results."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def _fenced(language: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [content for name, content in blocks if name == language]


@pytest.mark.parametrize("code", _fenced("python"))
def test_python_runs(code: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_commands_and_their_options_exist(capsys: pytest.CaptureFixture[str]) -> None:
    from mmq_kernels.cli.app import app, run

    commands = "\n".join(_fenced("")).replace("\\\n", " ")
    used = re.findall(r"^mmq (\w+)(.*)$", commands, re.MULTILINE)
    groups = {group.name: group.typer_instance.registered_commands for group in app.registered_groups}
    assert {name for name, _ in used} == {command.name for command in app.registered_commands} | set(groups)
    for name, rest in used:
        inside = rest.split()[:1] if name in groups else []
        assert inside == [] or inside[0] in {command.name for command in groups[name]}
        assert run([name, *inside, "--help"]) == 0
        shown = capsys.readouterr().out
        for option in re.findall(r"(?<!\S)--?[a-z-]+", rest):
            assert option in shown, (name, option)
    targets = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make (\w+)", README):
        assert re.search(rf"^{target}:", targets, re.MULTILINE), target


def test_every_benchmark_is_listed() -> None:
    helpers = {"cpu_tables.py", "recorded.py", "tables.py"}
    listed = set(re.findall(r"`benchmarks/(\w+\.py)`", (ROOT / "benchmarks" / "README.md").read_text()))
    assert listed == {path.name for path in (ROOT / "benchmarks").glob("*.py")} - helpers


@pytest.mark.parametrize("page", ["README.md", "csrc/README.md", "benchmarks/README.md"])
def test_paths_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    named = re.findall(r"`(?:python )?((?:mmq_kernels|csrc|benchmarks|python_tests)/[\w./*-]+)", text)
    assert len(named) >= 2
    for path in named:
        assert list(ROOT.glob(path)), path
    for module in re.findall(r"python -m (mmq_kernels[\w.]*)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module


def test_recipes_parse() -> None:
    from mmq_kernels.quantize import Recipe

    recipes = re.findall(r'(?:--recipe |quantize_model\(model, )"([^"]+)"', README)
    assert len(recipes) >= 2
    for recipe in recipes:
        Recipe.parse(recipe)


def test_tables_are_those_of_the_results() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
