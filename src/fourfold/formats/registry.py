"""A registry: objects by name, of which those that come with fourfold are imported when needed.

A recipe names a format or an algorithm, and checking the name must not import PyTorch: so a
registry is created with the places of its members, and a member is imported when it is first
looked up. Other members are added as objects:

    ALGORITHMS["mine"] = MyAlgorithm()
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Generic, TypeVar, cast

T = TypeVar("T")


class Registry(MutableMapping[str, T], Generic[T]):
    """Objects by name."""

    def __init__(self, places: Mapping[str, str]) -> None:
        """Create a registry.

        Args:
            places: The members that come with fourfold, by name, each as `module:class`.
        """
        self._places = dict(places)
        self._members: dict[str, T] = {}

    def __getitem__(self, name: str) -> T:
        if name not in self._members and name in self._places:
            module, _, attribute = self._places[name].partition(":")
            self._members[name] = cast(T, getattr(importlib.import_module(module), attribute)())
        return self._members[name]

    def __setitem__(self, name: str, member: T) -> None:
        self._members[name] = member

    def __delitem__(self, name: str) -> None:
        del self._members[name]

    def __contains__(self, name: object) -> bool:
        return name in self._members or name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places | self._members)

    def __len__(self) -> int:
        return len(self._places | self._members)
