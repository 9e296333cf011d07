"""DESIGN 3: imports run one way, downward through the layers of the package."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mmq_kernels"

# Highest first; layers in one tuple are equals and do not import each other.
LAYERS = [
    ("cli",),
    ("sweep", "demo", "bench"),
    ("page",),
    ("eval", "plugin"),
    ("checkpoint",),
    ("models",),
    ("quantize",),
    ("nn",),
    ("ops",),
    ("backends",),
    ("packing", "_native"),
    ("spec", "_when_imported"),
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def layer_of(module: str) -> str | None:
    """`mmq_kernels.ops.checks` -> `ops`; None for the package itself and for other packages."""
    parts = module.split(".")
    return parts[1] if parts[0] == "mmq_kernels" and len(parts) > 1 else None


def imported_layers(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {layer for module in modules if (layer := layer_of(module)) in RANK}
    return found


def sources() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE or path.stem != "__init__"]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downward(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    own = relative.parts[0].removesuffix(".py")
    if own == "__main__":
        own = "cli"
    assert own in RANK, f"{relative} belongs to no layer of DESIGN 3"
    for layer in imported_layers(path) - {own}:
        assert RANK[layer] > RANK[own], f"{relative} imports mmq_kernels.{layer}, which is not below {own}"


def test_every_layer_is_seen_by_the_test() -> None:
    assert imported_layers(PACKAGE / "nn" / "linear.py") == {"backends", "nn", "ops", "spec"}
