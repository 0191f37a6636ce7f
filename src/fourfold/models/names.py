# SPDX-License-Identifier: Apache-2.0
"""Patterns of the names that checkpoints give to layers and experts.

Every module that reads a layer's or an expert's number off a name takes the pattern from here.
Megatron names its tensors differently; `sources/megatron` has patterns of its own.
"""

from __future__ import annotations

import re

LAYER = re.compile(r"(?:^|.*?\.)(?:layers|h|blocks)\.(?P<number>[0-9]{1,9})\.")
"""The beginning of a name, up to the number of its (first) layer."""

EXPERT_LINEAR = re.compile(
    r"^(?P<module>(?:.*\.)?(?:local_)?experts)\.(?:expert_)?(?P<number>[0-9]{1,9})"
    r"\.(?P<projection>.+)$"
)
"""The name of one expert's linear layer."""

LAYER_TENSOR = re.compile(
    r"^(?P<stack>(?:.*?\.)?(?:\w*layers|\w*blocks|h))\.(?P<number>[0-9]{1,9})\.(?P<rest>.+)$"
)
"""The name of anything in a layer of any list of layers, such as an encoder's."""

EXPERT_NUMBER = re.compile(r"(?<=\.experts\.)[0-9]{1,9}(?=\.)")
"""The number of an expert inside a name."""

SINGLE_EXPERT = re.compile(r"(?<=\.experts\.)(?:expert_)?(?P<number>[0-9]{1,9})(?=\.)")
"""One expert inside a name. NLLB calls its experts `expert_0`, `expert_1`, …"""

_RUN = re.compile(r"[0-9]+|[^0-9]+")


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return a sort key that orders numbers by value: layer 2 before layer 10."""
    return tuple(
        (0, len(run.lstrip("0")), run.lstrip("0")) if run.isdecimal() else (1, 0, run)
        for run in _RUN.findall(name)
    )
