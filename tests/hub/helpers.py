# SPDX-License-Identifier: Apache-2.0
"""What tests of hub models share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fourfold.errors import FourfoldError
from jobs import files_of

NAME = "somebody/model"

HEADER = 100_000
"""Bytes of a shard that a plan asks for."""


def tensors_of(out: Path) -> dict[str, bytes]:
    """The files of tensors in a finished OUT: weights, and statistics."""
    return {name: data for name, data in files_of(out).items() if name.endswith(".safetensors")}


def sizes_of(folder: Path) -> dict[str, int]:
    """The bytes of a checkpoint's shards."""
    return {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}


def shards_in(out: Path) -> set[str]:
    """The source's shards that lie in OUT now, whole or in part."""
    paths = out.glob(".fourfold/source/*/*.safetensors*")
    return {path.name.removesuffix(".part") for path in paths if path.suffix != ".lock"}


def message_of(call: Callable[[], object], kind: type[FourfoldError] = FourfoldError) -> str:
    """The error of a call, which is one line."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message
