"""Something to import as soon as another module is: importing this package costs nothing that is not used."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def when_imported(module: str, then: str) -> None:
    """Import `then` after `module`: now where that is imported already, else when it is."""
    if module in sys.modules:
        import_module(then)
    else:
        sys.meta_path.insert(0, _Watch(module, then))


class _Watch(MetaPathFinder):
    def __init__(self, module: str, then: str) -> None:
        self.module, self.then = module, then

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        loader: Any = spec and spec.loader
        if loader is not None:
            execute = loader.exec_module

            def execute_both(module: ModuleType) -> None:
                execute(module)
                import_module(self.then)

            loader.exec_module = execute_both
        return spec
