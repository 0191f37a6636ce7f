# SPDX-License-Identifier: Apache-2.0
"""Which experts classes transformers decorates, read from its sources."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import transformers

DECORATOR = "use_experts_implementation"


@cache
def decorated_classes() -> dict[str, str]:
    """Decorated experts class -> its folder in `transformers/models`."""
    models = Path(transformers.__file__).parent / "models"
    return {
        node.name: path.parent.name
        for path in sorted(models.glob("*/modeling_*.py"))
        if DECORATOR in (source := path.read_text(encoding="utf-8"))
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef) and any(map(_is_decorator, node.decorator_list))
    }


def list_decorated() -> set[str]:
    """The folders in `transformers/models` that hold a decorated experts class."""
    return set(decorated_classes().values())


def _is_decorator(node: ast.expr) -> bool:
    target = node.func if isinstance(node, ast.Call) else node
    return isinstance(target, ast.Name) and target.id == DECORATOR
