"""Imports of a checkout whose dependencies are not here: what is not read of it is a stand-in."""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Collection
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar
from unittest.mock import MagicMock


class _Stub(ModuleType):
    """A module whose attributes are stand-ins."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, found)
        return found


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds stand-ins for all modules of some packages but those that are read."""

    def __init__(self, packages: Collection[str], read: Collection[str]):
        self.packages, self.read = packages, read

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.partition(".")[0] not in self.packages or self._is_read(fullname):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def _is_read(self, name: str) -> bool:
        return any(name == each or each.startswith(f"{name}.") or name.startswith(f"{each}.") for each in self.read)

    def create_module(self, spec: Any) -> ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def use(checkout: Path, *folders: str, stubbed: Collection[str], read: Collection[str] = ()) -> None:
    """Makes the modules of a checkout importable.

    Args:
        checkout: Its folder.
        folders: The folders in it from which it imports; the checkout itself where there are none.
        stubbed: The packages of which nothing is run.
        read: The modules and packages of them that are.
    """
    sys.meta_path.insert(0, _Finder(stubbed, read))
    sys.path[:0] = [str(checkout / folder) for folder in folders or ("",)]


def module_at(file: Path) -> Any:
    """The module of a file, whose package is not imported."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def classes_of(file: Path) -> dict[str, type]:
    """The classes of a file by name, without their bodies, with those of their bases that are in the file, too."""
    found: dict[str, type] = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            bases = tuple(found[base.id] for base in node.bases if isinstance(base, ast.Name) and base.id in found)
            found[node.name] = type(node.name, bases, {})
    return found
