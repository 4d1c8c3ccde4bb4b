"""Choices by name, which other packages add to by entry points, and which are loaded when they are used."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from dora_mm.registries.renamed import KINDS
from dora_mm.utils.messages import nearest

if TYPE_CHECKING:
    from collections.abc import Callable
    from importlib.metadata import EntryPoint

log = logging.getLogger(__name__)
GROUP = "dora_mm"  # of the entry points
NONE: Mapping[str, Any] = MappingProxyType({})
T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """The records of one kind by name: data of what may be chosen, which imports nothing large.

    A package adds one by an entry point of the group `dora_mm` whose name is `<kind>.<name>` and whose object is the
    record. Entry points are read only when a name is not found among the built-in ones, or all are listed.

    Args:
        kind: What its entry points begin with, such as `optimizers`.
        one: What one is called in messages.
        records: The built-in ones.
        import_paths: Those of built-in records that need large imports; `load` loads them when they are used.
    """

    def __init__(self, kind: str, one: str, records: Mapping[str, T] = NONE, import_paths: Mapping[str, str] = NONE):
        self.kind, self.one, self._records, self._import_paths = kind, one, records, import_paths
        self._loaded: dict[str, T] = {}

    @cached_property
    def _added(self) -> dict[str, EntryPoint]:
        """The entry points of other packages, by name."""
        from importlib.metadata import entry_points  # here, since it takes as long as all else that a command starts

        start = f"{self.kind}."
        points = entry_points(group=GROUP)
        for point in points:
            former, _, name = point.name.partition(".")
            if KINDS.get(former) == self.kind:
                log.warning("The entry point %s is not read: it is called %s.%s now.", point.name, self.kind, name)
        found = [point for point in points if point.name.startswith(start)]
        return {point.name.removeprefix(start): point for point in found}

    def __getitem__(self, name: str) -> T:
        """A record.

        Raises:
            KeyError: There is none of this name; `check` has a message for people.
            ValueError: The package that adds it cannot be imported.
        """
        if name in self._records:
            return self._records[name]
        if name not in self._loaded:
            self._loaded[name] = (
                load(self._import_paths[name]) if name in self._import_paths else self._load_added(name)
            )
        return self._loaded[name]

    def _load_added(self, name: str) -> T:
        point = self._added[name]
        try:
            return point.load()
        except (ImportError, AttributeError) as error:
            raise ValueError(f"{self.one} {name}: {point.value} cannot be imported: {error}") from error

    def __contains__(self, name: object) -> bool:
        return name in self._records or name in self._import_paths or name in self._added

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self._records, *self._import_paths, *self._added)))

    def __len__(self) -> int:
        return len(list(iter(self)))

    @property
    def built_in(self) -> Mapping[str, T]:
        """The records of this package; entry points are not read."""
        return self._records

    def first(self, fits: Callable[[T], bool]) -> str | None:
        """The name of the first record that fits, of the built-in ones before those of other packages."""
        for names in (list(self._records), self):
            if found := next((name for name in names if fits(self[name])), None):
                return found
        return None

    def check(self, name: str) -> str:
        """Returns a name, the value of some key.

        Raises:
            ValueError: There is no record of this name; the message has all names, and the nearest one.
        """
        if name not in self:
            *names, last = map(repr, self)
            choices = f"{', '.join(names)} or {last}" if names else last
            raise ValueError(f"must be {choices}, got {name!r}{nearest(name, self)}")
        return name


def load(import_path: str) -> Any:
    """Imports an object by its import path, `module:object`."""
    module, _, name = import_path.partition(":")
    return getattr(import_module(module), name)
