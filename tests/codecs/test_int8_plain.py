# SPDX-License-Identifier: Apache-2.0
"""Integers that are not packed decode to the values of compressed-tensors, bit for bit, and are
quantized like the BF16 checkpoint of their values; what does not fit is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from torch import Tensor

from conftest import Written
from encoding import W4A16, Tensors, as_stored, bits, change_config, encode, folder_of, is_linear
from encoding import quantize_both as both
from fourfold.errors import SourceError
from fourfold.sources.decoded import open_decoded
from integers import compressed, random_codes, random_scales, scheme, signed

NAME = "model.layers.0.mlp.down_proj"
ROWS, WIDTH = 40, 192
FORM = "int-quantized"


def plain(
    group: int | None = None, *, symmetric: bool = True, dtype: torch.dtype = torch.bfloat16
) -> Tensors:
    groups = 1 if group is None else WIDTH // group
    tensors = {
        "weight": signed(random_codes(ROWS, WIDTH, 8), 8),
        "weight_scale": random_scales(ROWS, groups, dtype),
    }
    if not symmetric:
        tensors["weight_zero_point"] = signed(random_codes(ROWS, groups, 8, seed=2), 8)
    return tensors


def decompressed(tensors: Tensors, group: int | None, *, symmetric: bool = True) -> Tensor:
    library = BaseCompressor.get_value_from_registry(FORM)
    return library.decompress(tensors, scheme(8, group, symmetric))["weight"]


def named(tensors: Tensors) -> Tensors:
    return {f"{NAME}.{part}": value for part, value in tensors.items()}


def stated(group: int | None, symmetric: bool, form: str = FORM) -> dict[str, object]:
    return {"quantization_config": compressed(scheme(8, group, symmetric), form)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 32, 48])
def test_values_are_those_of_compressed_tensors(
    group: int | None, symmetric: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = plain(group, symmetric=symmetric, dtype=dtype)
    wanted = decompressed(tensors, group, symmetric=symmetric)
    assert wanted.dtype == dtype
    folder = folder_of(tmp_path / "model", named(tensors), stated(group, symmetric))
    for presented in (torch.bfloat16, torch.float16, torch.float32):
        source = open_decoded(folder, dtype=presented)
        value = as_stored(source, f"{NAME}.weight")
        assert torch.equal(bits(value), bits(wanted.to(presented))), presented
        rows = source.slab(f"{NAME}.weight", 7, 23)
        assert torch.equal(bits(rows), bits(value[7:23]))
        source.close()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (ROWS,)])
def test_scales_of_other_shapes(shape: tuple[int, ...], tmp_path: Path) -> None:
    """One for all, and one for each row without a dimension for its columns."""
    tensors = plain()
    if shape != (ROWS,):
        tensors["weight_scale"] = tensors["weight_scale"][:1]
    wanted = decompressed(tensors, None)
    tensors["weight_scale"] = tensors["weight_scale"].reshape(shape)
    extra = {"input_scale": torch.ones(1), "input_zero_point": torch.zeros(1, dtype=torch.int8)}
    source = open_decoded(folder_of(tmp_path / "model", named(tensors | extra)))
    assert list(source.tensors) == [f"{NAME}.weight"]
    assert torch.equal(bits(source.read(f"{NAME}.weight")), bits(wanted))
    source.close()


@pytest.mark.parametrize("recipe", [W4A16])
def test_it_is_quantized_like_the_bf16_checkpoint_of_its_values(
    recipe: str, written: Written, tmp_path: Path
) -> None:
    def encoder(key: str, value: Tensor) -> tuple[Tensors, Tensor] | None:
        if not is_linear(key, value):
            return None
        scales = value.float().abs().amax(1, keepdim=True).clamp(min=1e-5) / 127
        parts = {
            "weight": (value.float() / scales).round().to(torch.int8),
            "weight_scale": scales.bfloat16(),
        }
        stem = key.removesuffix(".weight")
        return {f"{stem}.{part}": x for part, x in parts.items()}, decompressed(parts, None)

    folder = Path(shutil.copytree(written("qwen3_moe")[0], tmp_path / "source"))
    change_config(folder, dtype="bfloat16")
    encode(folder, tmp_path / "encoded", compressed(scheme(8, None, True), FORM), encoder)
    result = both(folder, tmp_path / "encoded", tmp_path / "out", recipe)
    assert "weights from INT8 (compressed-tensors) (" in " ".join(result.plan.notes)


@pytest.mark.parametrize(
    ("change", "symmetric", "message"),
    [
        ({}, False, r"weight_zero_point: missing, but the configuration says"),
        ({"weight_scale": torch.ones(ROWS, 5)}, True, r"weight_scale: F32 \[40, 5\] does not fit"),
        ({"weight_scale": torch.ones(7, 1)}, True, r"weight_scale: F32 \[7, 1\] does not fit"),
        (
            {"weight_zero_point": torch.zeros(ROWS, 2, dtype=torch.int8)},
            False,
            r"weight_zero_point: I8 \[40, 2\] does not fit",
        ),
        ({"weight_g_idx": torch.zeros(WIDTH).int()}, True, r"in .*, of a weight that is not INT8"),
    ],
)
def test_what_does_not_fit_is_named(
    change: Tensors, symmetric: bool, message: str, tmp_path: Path
) -> None:
    """Another, whole weight lies beside it."""
    whole = {f"{NAME}2.{part}": value for part, value in plain(symmetric=False).items()}
    folder = folder_of(tmp_path / "model", named(plain() | change) | whole, stated(None, symmetric))
    with pytest.raises(SourceError, match=rf"^{NAME}.*{message}"):
        open_decoded(folder)
