# SPDX-License-Identifier: Apache-2.0
"""The families' tiny models as checkpoints in Megatron's format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Written

from .inverse import to_megatron
from .writing import halves, write_torch_dist

FAMILY = "qwen3_moe"


@pytest.fixture
def made(written: Written, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """A function that writes a changed checkpoint; returns it and the Hugging Face folder."""

    def make(
        name: str = FAMILY,
        change: Callable[[dict[str, torch.Tensor]], None] | None = None,
        **options: Any,
    ) -> tuple[Path, Path]:
        folder, truth = written(name)
        tensors = to_megatron(truth.raw, dialect=options.pop("dialect", "auto"))
        if change is not None:
            change(tensors)
        checkpoint = tmp_path / "megatron"
        write_torch_dist(checkpoint, tensors, options.pop("cut", halves(-2)), **options)
        return checkpoint, folder

    return make
