# SPDX-License-Identifier: Apache-2.0
"""Scales that are all 0 beside codes that are not belong to a damaged file, and are refused;
weights of zeros are not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from encoding import Tensors, folder_of
from fourfold.errors import DamagedError
from fourfold.sources.decoded import open_decoded
from integers import awq, packed, random_codes, random_scales

ROWS, WIDTH = 40, 192
NAME = "model.layers.0.mlp.down_proj"
E4M3 = torch.float8_e4m3fn


def some_bytes(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 120, shape, dtype=torch.uint8, generator=generator)


def nvfp4() -> Tensors:
    return {
        "weight_packed": some_bytes(ROWS, WIDTH // 2),
        "weight_scale": some_bytes(ROWS, WIDTH // 16).view(E4M3),
        "weight_global_scale": torch.tensor([900.0]),
    }


FORMS: dict[str, tuple[Tensors, str]] = {
    "nvfp4": (nvfp4(), "weight_scale"),
    "fp8": (
        {"weight": some_bytes(ROWS, WIDTH).view(E4M3), "weight_scale": torch.tensor(0.5)},
        "weight_scale",
    ),
    "int4": (packed(ROWS, WIDTH), "weight_scale"),
    "awq": (
        awq(
            random_codes(WIDTH, ROWS, 4),
            random_codes(6, ROWS, 4, seed=1),
            random_scales(6, ROWS, torch.float16),
        ),
        "scales",
    ),
}


def read(folder: Path, tensors: Tensors, start: int = 0, stop: int = ROWS) -> Tensor:
    source = open_decoded(folder_of(folder, {f"{NAME}.{x}": tensors[x] for x in tensors}))
    try:
        return source.slab(f"{NAME}.weight", start, stop)
    finally:
        source.close()


@pytest.mark.parametrize("form", FORMS)
def test_scales_that_are_all_zero(form: str, tmp_path: Path) -> None:
    tensors, part = FORMS[form]
    zeros = torch.zeros(tensors[part].shape).to(tensors[part].dtype)
    with pytest.raises(DamagedError, match=rf"^{NAME}\.{part}: nothing but zeros, while the codes"):
        read(tmp_path / "zeros", tensors | {part: zeros}, 8, 16)
    assert read(tmp_path / "whole", tensors).any()


def test_zeros_that_are_meant(tmp_path: Path) -> None:
    """A weight of zeros, of both signs, and rows whose block scales are too small for E4M3."""
    codes = torch.zeros(ROWS, WIDTH // 2, dtype=torch.uint8)
    codes[::2] = 0x88
    zeros = torch.zeros(ROWS, WIDTH // 16).to(E4M3)
    assert not read(
        tmp_path / "zeros", nvfp4() | {"weight_packed": codes, "weight_scale": zeros}
    ).any()
    scales = nvfp4()["weight_scale"].float()
    scales[8:16] = 0
    small = nvfp4() | {"weight_scale": scales.to(E4M3)}
    assert not read(tmp_path / "rows", small, 8, 16).any()


def test_one_expert_of_a_fused_tensor(tmp_path: Path) -> None:
    key = "model.layers.0.mlp.experts.down_proj"
    scales = torch.ones(3)
    scales[1] = 0
    tensors = {key: some_bytes(3, 32, 64).view(E4M3), f"{key}_scale": scales}
    source = open_decoded(folder_of(tmp_path / "model", tensors))
    assert source.slab(key, 0, 1).any()
    with pytest.raises(DamagedError, match=rf"^{key}_scale: nothing but zeros"):
        source.slab(key, 1, 2)
    source.close()
