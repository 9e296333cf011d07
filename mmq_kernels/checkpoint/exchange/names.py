"""Names of layers as other tools' configs have them: regular expressions for many, prefixes for those left alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from mmq_kernels.checkpoint.errors import CheckpointError
from mmq_kernels.quantize.untrusted import expression


def patterns(names: Sequence[str], others: Iterable[str]) -> list[str]:
    r"""Regular expressions that match the whole of every one of `names`, and none of `others`.

    Layers that differ in nothing but the number of their block share one, unless it would reach one of the others.

    >>> patterns(["h.0.up", "h.1.up", "h.0.down"], ["h.1.down"])
    ['h\\.\\d+\\.up$', 'h\\.0\\.down$']
    """
    others = set(others)
    alike: dict[str, list[str]] = {}
    for name in names:
        general = re.sub(r"(^|\\\.)\d+(?=\\\.)", r"\1\\d+", re.escape(name)) + "$"
        alike.setdefault(general, []).append(name)
    found: list[str] = []
    for general, own in alike.items():
        compiled = re.compile(general)
        if len(own) > 1 and not any(compiled.match(other) for other in others):
            found.append(general)
        else:
            found += [f"{re.escape(name)}$" for name in own]
    return found


def matches(pattern: str, name: str, where: str) -> bool:
    """Whether a regular expression of a config matches a name from its start.

    Raises:
        CheckpointError: where it is none, naming the config.
    """
    try:
        return expression(pattern).match(name) is not None
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None


def under(stem: str, name: str) -> bool:
    """Whether `name` is the module `stem` or inside it."""
    return name == stem or name.startswith(f"{stem}.")


def stems(left: Iterable[str], quantized: Sequence[str], reaches: Callable[[str, str], bool] = under) -> list[str]:
    """The fewest, highest modules that hold all layers `left` alone and none of the `quantized` ones.

    Args:
        reaches: whether a stem stands for a name, as the reader of the config sees it.
    """
    found: dict[str, None] = {}
    for name in left:
        parts = name.split(".")
        above = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
        free = (stem for stem in above if not any(reaches(stem, other) for other in quantized))
        found[next(free, name)] = None
    return list(found)
