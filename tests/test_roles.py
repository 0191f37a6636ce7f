"""The role of every linear layer of every family, pinned.

`roles.json` was read by people: a change there is a change of what recipes quantize. Write it
anew with `python tests/test_roles.py`, and look at the difference.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from families import FAMILIES, Truth
from fourfold.models.inventory_builder import take_inventory
from fourfold.sources.safetensors import open_source

Written = Callable[[str], tuple[Path, Truth]]
GOLDEN = Path(__file__).with_name("roles.json")


def roles_of(folder: Path) -> dict[str, list[str]]:
    """Role → names of its linear weights, numbers as `*`; experts' by their module alone."""
    found: dict[str, set[str]] = defaultdict(set)
    for linear in take_inventory(open_source(folder)).linears:
        found[linear.role.value].add(re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", linear.name))
    return {role: sorted(names) for role, names in sorted(found.items())}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_roles(name: str, written: Written) -> None:
    assert roles_of(written(name)[0]) == json.loads(GOLDEN.read_text())[name]


if __name__ == "__main__":
    import tempfile

    from families import write_checkpoint

    made = {}
    for name, family in sorted(FAMILIES.items()):
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(family, Path(folder))
            made[name] = roles_of(Path(folder))
    GOLDEN.write_text(json.dumps(made, indent=1) + "\n")
