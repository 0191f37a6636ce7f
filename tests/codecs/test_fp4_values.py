# SPDX-License-Identifier: Apache-2.0
"""The values that MXFP4 and NVFP4 codecs decode are those of the libraries that own the formats,
bit for bit, for any rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from encoding import Tensors, as_stored, bits, folder_of
from fourfold.errors import SourceError
from fourfold.sources.decoded import open_decoded

ROWS, WIDTH = 37, 96
NAME = "model.layers.0.mlp.down_proj"


def random_bytes(*shape: int, low: int = 0, high: int = 256, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)


def scheme(strategy: str, group_size: int) -> QuantizationScheme:
    args = QuantizationArgs(
        num_bits=4, type="float", strategy=strategy, group_size=group_size, symmetric=True
    )
    return QuantizationScheme(targets=["Linear"], weights=args)


def mxfp4_tensors(seed: int = 0) -> Tensors:
    """Every code, and exponents from those that BF16 holds."""
    return {
        "weight_packed": random_bytes(ROWS, WIDTH // 2, seed=seed),
        "weight_scale": random_bytes(ROWS, WIDTH // 32, low=1, high=250, seed=seed + 1),
    }


def nvfp4_tensors(seed: int = 0, divisor: float = 913.7) -> Tensors:
    scales = random_bytes(ROWS, WIDTH // 16, low=1, high=127, seed=seed + 1)
    return {
        "weight_packed": random_bytes(ROWS, WIDTH // 2, seed=seed),
        "weight_scale": scales.view(torch.float8_e4m3fn),
        "weight_global_scale": torch.tensor([divisor]),
    }


def named(tensors: Tensors) -> Tensors:
    return {f"{NAME}.{name}": value for name, value in tensors.items()}


@pytest.mark.parametrize("seed", range(3))
def test_mxfp4_is_compressed_tensors(seed: int, tmp_path: Path) -> None:
    tensors = mxfp4_tensors(10 * seed)
    wanted = MXFP4PackedCompressor.decompress(tensors, scheme("group", 32))["weight"]
    source = open_decoded(folder_of(tmp_path / "model", named(tensors)))
    decoded = source.read(f"{NAME}.weight")
    assert decoded.dtype == wanted.dtype == torch.bfloat16
    assert torch.equal(bits(decoded), bits(wanted))
    source.close()


@pytest.mark.parametrize("divisor", [1.0, 913.7, 2688.0, 3.1e-5, 1.7e6])
def test_nvfp4_is_compressed_tensors(divisor: float, tmp_path: Path) -> None:
    tensors = nvfp4_tensors(3, divisor)
    wanted = NVFP4PackedCompressor.decompress(tensors, scheme("tensor_group", 16))["weight"]
    source = open_decoded(folder_of(tmp_path / "model", named(tensors)))
    assert torch.equal(bits(source.read(f"{NAME}.weight")), bits(wanted))
    source.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gpt_oss_is_transformers(dtype: str, tmp_path: Path) -> None:
    experts, outputs, inputs = 3, 70, 96
    blocks = random_bytes(experts, outputs, inputs // 32, 16)
    scales = random_bytes(experts, outputs, inputs // 32, low=100, high=140, seed=1)
    key = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {f"{key}_blocks": blocks, f"{key}_scales": scales}
    folder = folder_of(tmp_path / "model", tensors, {"dtype": dtype})
    wanted = convert_moe_packed_tensors(blocks, scales, dtype=getattr(torch, dtype))
    source = open_decoded(folder)
    assert source.tensors[key].shape == (experts, inputs, outputs)
    assert torch.equal(bits(source.read(key)), bits(wanted))
    for expert in range(experts):
        assert torch.equal(source.slab(key, expert, expert + 1), wanted[expert : expert + 1])
    source.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gpt_oss_with_every_code_and_exponent(dtype: torch.dtype, tmp_path: Path) -> None:
    """Rows and columns that fill no tile; the largest exponents overflow, as in BF16."""
    experts, outputs, inputs = 2, 255, 320
    blocks = random_bytes(experts, outputs, inputs // 32, 16)
    scales = torch.arange(255).to(torch.uint8).view(1, -1, 1).repeat(experts, 1, inputs // 32)
    key = "model.layers.0.mlp.experts.down_proj"
    tensors = {f"{key}_blocks": blocks, f"{key}_scales": scales}
    source = open_decoded(folder_of(tmp_path / "model", tensors), dtype=dtype)
    wanted = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16).to(dtype)
    assert torch.equal(bits(as_stored(source, key)), bits(wanted))
    source.close()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("fp4")
    return [
        folder_of(folder / "mxfp4", named(mxfp4_tensors())),
        folder_of(folder / "nvfp4", named(nvfp4_tensors())),
    ]


@settings(deadline=None, max_examples=40)
@given(kind=st.integers(0, 1), start=st.integers(0, ROWS - 1), data=st.data())
def test_any_rows(both: list[Path], kind: int, start: int, data: st.DataObject) -> None:
    stop = data.draw(st.integers(start + 1, ROWS))
    source = open_decoded(both[kind])
    key = f"{NAME}.weight"
    assert torch.equal(source.slab(key, start, stop), source.read(key)[start:stop])
    source.close()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_round_the_exact_value(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = mxfp4_tensors()
    tensors["weight_scale"] = random_bytes(ROWS, WIDTH // 32, low=105, high=135)
    exact = MXFP4PackedCompressor.decompress(tensors, scheme("group", 32))["weight"].float()
    source = open_decoded(folder_of(tmp_path / "model", named(tensors)), dtype=dtype)
    assert torch.equal(bits(source.read(f"{NAME}.weight")), bits(exact.to(dtype)))
    source.close()


def test_names_of_other_tools(tmp_path: Path) -> None:
    """The same bytes as `weight`, U8 or I8, with exponents of another dtype or name."""
    tensors = mxfp4_tensors()
    wanted = MXFP4PackedCompressor.decompress(tensors, scheme("group", 32))["weight"]
    codes, exponents = tensors["weight_packed"], tensors["weight_scale"]
    for number, (dtype, name, stored) in enumerate(
        (
            (torch.uint8, "weight_scale", exponents),
            (torch.uint8, "weight_scale", exponents.view(torch.float8_e8m0fnu)),
            (torch.int8, "scale", exponents.view(torch.float8_e8m0fnu)),
        )
    ):
        parts = {f"{NAME}.weight": codes.view(dtype), f"{NAME}.{name}": stored}
        source = open_decoded(folder_of(tmp_path / str(number), parts))
        assert torch.equal(bits(source.read(f"{NAME}.weight")), bits(wanted))
        source.close()


def without(tensors: Tensors, name: str) -> Tensors:
    return {key: value for key, value in tensors.items() if key != name}


BROKEN = [
    (without(mxfp4_tensors(), "weight_scale"), r"weight_packed in .*: U8"),
    (without(mxfp4_tensors(), "weight_packed"), r"weight_scale in .*: U8"),
    (
        mxfp4_tensors() | {"weight_scale": random_bytes(ROWS, 6)},
        r"weight_scale: U8 \[37, 6\] does not fit the codes U8 \[37, 48\]",
    ),
    (
        {"weight_packed": random_bytes(ROWS, 40), "weight_scale": random_bytes(ROWS, 2)},
        r"weight_scale: U8 \[37, 2\] does not fit the codes U8 \[37, 40\]",
    ),
    (without(nvfp4_tensors(), "weight_global_scale"), r"weight_global_scale: missing"),
    (without(nvfp4_tensors(), "weight_scale"), r"weight_scale: missing"),
    (without(nvfp4_tensors(), "weight_packed"), r"weight_packed: missing"),
    (
        nvfp4_tensors() | {"weight_global_scale": torch.ones(2)},
        r"down_proj: codes .* global scale F32 \[2\]: not NVFP4",
    ),
]


@pytest.mark.parametrize(("tensors", "message"), BROKEN)
def test_what_does_not_fit_is_named(tensors: Tensors, message: str, tmp_path: Path) -> None:
    """Another, whole weight lies beside it."""
    whole = {f"model.layers.1.mlp.down_proj.{name}": x for name, x in mxfp4_tensors().items()}
    folder = folder_of(tmp_path / "model", {**named(tensors), **whole})
    with pytest.raises(SourceError, match=message):
        open_decoded(folder)


def test_gpt_oss_without_its_scales(tmp_path: Path) -> None:
    key = "model.layers.0.mlp.experts.gate_up_proj"
    blocks = random_bytes(2, 32, 2, 16)
    with pytest.raises(SourceError, match=rf"{key}_scales: missing beside {key}_blocks"):
        open_decoded(folder_of(tmp_path / "missing", {f"{key}_blocks": blocks}))
    tensors = {f"{key}_blocks": blocks, f"{key}_scales": random_bytes(2, 32, 3)}
    with pytest.raises(SourceError, match=r"_scales: U8 \[2, 32, 3\] does not fit"):
        open_decoded(folder_of(tmp_path / "other", tensors))


@pytest.mark.parametrize(
    ("divisor", "message"),
    [
        (0.0, r"0\.0; a scale must be positive"),
        (1e-40, r"9\.99995e-41; its reciprocal is infinite"),
    ],
)
def test_a_divisor_that_is_none(divisor: float, message: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", named(nvfp4_tensors(divisor=divisor)))
    with pytest.raises(SourceError, match=rf"weight_global_scale: {message}"):
        open_decoded(folder).read(f"{NAME}.weight")


def test_a_weight_that_was_scaled_for_its_inputs(tmp_path: Path) -> None:
    tensors = nvfp4_tensors() | {"pre_quant_scale": torch.ones(WIDTH)}
    message = rf"^{NAME}\.pre_quant_scale in .*: the weight beside it was scaled for inputs"
    with pytest.raises(SourceError, match=message):
        open_decoded(folder_of(tmp_path / "model", named(tensors)))


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.ones(2), r"F32 \[2\], where NVFP4 has one float"),
        (torch.ones(1, dtype=torch.int32), r"I32 \[1\], where NVFP4 has one float"),
    ],
)
def test_a_scale_of_inputs_that_is_none(scale: Tensor, message: str, tmp_path: Path) -> None:
    tensors = nvfp4_tensors() | {"input_global_scale": scale}
    with pytest.raises(SourceError, match=rf"^{NAME}\.input_global_scale: {message}"):
        open_decoded(folder_of(tmp_path / "model", named(tensors)))
