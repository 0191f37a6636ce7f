# SPDX-License-Identifier: Apache-2.0
"""Tiny random checkpoints of every family that transformers can build, as upstream ships them.

    for family in FAMILIES.values():
        truth = write_checkpoint(family, folder)

`truth` says, independently of fourfold, which matrix `[out, in]` each logical linear weight is,
and which tensors lie on disk. `FAMILIES` is data: see `table.py` for the layouts, `configs.py`
for the sizes.
"""

from .checkpoint import build_model, difference, quiet, read_back, write_checkpoint
from .decorated import decorated_classes, list_decorated
from .table import FAMILIES, LAYOUTS, Family, mostly_slow
from .truth import Expert, Truth

__all__ = [
    "FAMILIES",
    "LAYOUTS",
    "Expert",
    "Family",
    "Truth",
    "build_model",
    "decorated_classes",
    "difference",
    "list_decorated",
    "mostly_slow",
    "quiet",
    "read_back",
    "write_checkpoint",
]
