# SPDX-License-Identifier: Apache-2.0
"""The packed bytes are those of the published formulas, computed here in plain NumPy.

An independent implementation: float32 and float64 NumPy, all 126 scales in a loop, a table of E4M3
values built from the format's definition. For a Qwen3-MoE (experts one by one) and a multimodal
Qwen3.5-MoE (fused on disk, MTP, vision tower).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import fourfold
from families import Truth
from fourfold.config import OutputConfig, Runtime
from nvfp4_folders import tensors_of

F32 = np.float32
GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=F32)
E4M3 = np.array(
    [
        2.0**-9 * mantissa if not exponent else 2.0 ** (exponent - 7) * (1 + mantissa / 8)
        for exponent in range(16)
        for mantissa in range(8)
    ][:127],
    dtype=F32,
)
"""Value of the bytes 0x00 to 0x7E."""


def round_e2m1(x: np.ndarray) -> np.ndarray:
    """Codes 0 to 7 of non-negative float32: nearest, ties to the even code."""
    middles = (GRID[1:] + GRID[:-1]) / 2
    codes = np.searchsorted(middles, x, side="left")
    tie = (codes < 7) & (x == middles[np.minimum(codes, 6)])
    return np.where(tie & (codes % 2 == 1), codes + 1, codes).astype(np.uint8)


def round_e4m3(x: F32) -> int:
    """The byte of the nearest E4M3 value in [2^-9, 448], ties to even."""
    below = int(np.searchsorted(E4M3, min(max(float(x), 2.0**-9), 448.0), side="right")) - 1
    if below >= 126:
        return 126
    low, high = float(E4M3[below]), float(E4M3[below + 1])
    middle = (low + high) / 2
    value = min(max(float(x), 2.0**-9), 448.0)
    up = value > middle or (value == middle and below % 2 == 1)
    return below + int(up)


def block_codes(w: np.ndarray, byte: int, s: F32) -> np.ndarray:
    m = F32(E4M3[byte] * s)
    return round_e2m1((np.abs(w) / m).astype(F32))


def loss(w: np.ndarray, byte: int, s: F32) -> float:
    m = F32(E4M3[byte] * s)
    q = GRID[block_codes(w, byte, s)].astype(np.float64)
    total = 0.0
    for difference in np.abs(w).astype(np.float64) - q * float(m):
        total += difference * difference
    return total


def max_byte(w: np.ndarray, s: F32) -> int:
    largest = F32(np.abs(w).max())
    if largest == 0:
        return 0x38
    return round_e4m3(F32(largest / F32(F32(6) * s)))


def mse_byte(w: np.ndarray, s: F32) -> int:
    losses = [loss(w, byte, s) for byte in range(1, 127)]
    return 1 + int(np.argmin(losses))  # the first of equals is the smallest scale


def pack(w_OI: np.ndarray, s: F32, choose) -> tuple[np.ndarray, np.ndarray]:
    rows, cols = w_OI.shape
    scales = np.zeros((rows, cols // 16), dtype=np.uint8)
    codes = np.zeros((rows, cols), dtype=np.uint8)
    for row in range(rows):
        for block in range(cols // 16):
            part = slice(16 * block, 16 * block + 16)
            w = w_OI[row, part]
            scales[row, block] = byte = choose(w, s)
            codes[row, part] = block_codes(w, byte, s) | (np.signbit(w).astype(np.uint8) << 3)
    return codes[:, 0::2] | (codes[:, 1::2] << 4), scales


def expert_name(family: str, module: str, expert: int, projection: str) -> str:
    assert family in {"qwen3_moe", "qwen3_5_moe_vl"}
    return f"{module}.{expert}.{projection}_proj"


def check(family: str, truth: Truth, out: Path, choose) -> None:
    """The first and the last expert of every layer."""
    tensors = tensors_of(out)
    for module, expert, projection in truth.experts:
        if expert not in (0, 3):
            continue
        group = ("gate", "up") if projection != "down" else ("down",)
        weights = [truth.experts[module, expert, each].float().numpy() for each in group]
        s = F32(F32(max(np.abs(w).max() for w in weights)) / F32(2688))
        weight = truth.experts[module, expert, projection].float().numpy()
        name = expert_name(family, module, expert, projection)
        codes, scales = pack(weight, s, choose)
        assert F32(tensors[f"{name}.weight_scale_2"].item()) == s
        assert np.array_equal(tensors[f"{name}.weight_scale"].view(torch.uint8), scales)
        assert np.array_equal(tensors[f"{name}.weight"].numpy(), codes)


@pytest.mark.parametrize(
    "family", ["qwen3_moe", pytest.param("qwen3_5_moe_vl", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    ("recipe", "choose"),
    [("w4a16_nvfp4_experts_only", max_byte), ("w4a16_nvfp4_experts_only_mse", mse_byte)],
)
def test_bytes_are_those_of_the_formulas(family, recipe, choose, written, tmp_path: Path) -> None:
    folder, truth = written(family)
    fourfold.quantize(folder, tmp_path / "out", recipe, output=OutputConfig(verify=False))
    check(family, truth, tmp_path / "out", choose)


def test_bytes_do_not_depend_on_threads(written, tmp_path: Path) -> None:
    folder, _ = written("qwen3_5_moe_vl")
    for threads in (1, 3):
        fourfold.quantize(
            folder,
            tmp_path / str(threads),
            "w4a16_nvfp4_default_mse",
            runtime=Runtime(threads=threads),
        )
    files = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "3").iterdir())
    for file in files:
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "3" / file).read_bytes(), file
