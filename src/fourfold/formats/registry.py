# SPDX-License-Identifier: Apache-2.0
"""A registry: objects by name, of which those that come with fourfold are imported when needed.

A recipe names a format or an algorithm, and checking the name must not import PyTorch: so a
registry is created with the places of its members, and a member is imported when it is first
looked up. Other members are added as objects:

    ALGORITHMS["mine"] = MyAlgorithm()
"""

from __future__ import annotations

import importlib
from collections import UserDict
from collections.abc import Mapping
from typing import TypeVar, cast

T = TypeVar("T")


class Registry(UserDict[str, T]):
    """Objects by name."""

    def __init__(self, places: Mapping[str, str]) -> None:
        """Create a registry.

        Args:
            places: The members that come with fourfold, by name, each as `module:class`.
        """
        super().__init__()
        self._places = dict(places)
        self.data = cast(dict[str, T], self._places.copy())

    def __getitem__(self, name: str) -> T:
        if self.data[name] is self._places.get(name):
            module, _, attribute = self._places[name].partition(":")
            self.data[name] = getattr(importlib.import_module(module), attribute)()
        return self.data[name]
