# SPDX-License-Identifier: Apache-2.0
"""The values that INT4 and INT8 codecs decode are those of the libraries that own the formats, bit
for bit, for any rows; and what does not fit is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from encoding import Tensors, as_stored, bits, folder_of
from fourfold.errors import SourceError
from fourfold.sources.decoded import open_decoded
from integers import (
    awq,
    compressed,
    decompressed,
    dequantized_awq,
    dequantized_gptq,
    gptq,
    packed,
    random_codes,
    random_scales,
    scheme,
    signed,
)

NAME = "model.layers.0.mlp.down_proj"
KEY = f"{NAME}.weight"
ROWS, WIDTH = 40, 192


def named(tensors: Tensors, name: str = NAME) -> Tensors:
    return {f"{name}.{part}": value for part, value in tensors.items()}


def decoded(folder: Path, dtype: torch.dtype | None = None) -> Tensor:
    source = open_decoded(folder, dtype=dtype)
    try:
        return as_stored(source, KEY)
    finally:
        source.close()


def of_scheme(bits: int, group: int | None, symmetric: bool) -> dict[str, Any]:
    return {"quantization_config": compressed(scheme(bits, group, symmetric))}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 48, None])
@pytest.mark.parametrize("width", [4, 8])
def test_pack_quantized_is_compressed_tensors(
    width: int, group: int | None, symmetric: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = packed(37, WIDTH, bits=width, group=group, symmetric=symmetric, dtype=dtype)
    wanted = decompressed(tensors, scheme(width, group, symmetric))
    assert wanted.dtype == dtype
    folder = folder_of(tmp_path / "model", named(tensors), of_scheme(width, group, symmetric))
    for presented in (torch.bfloat16, torch.float16, torch.float32):
        value = decoded(folder, presented)
        assert torch.equal(bits(value), bits(wanted.to(presented))), presented


def test_every_code_times_every_kind_of_bf16_scale(tmp_path: Path) -> None:
    """Subnormal, large and negative scales: some tools store the latter."""
    scales = torch.tensor([1.0, 1.0078125, -0.3, 2.0**-130, 3e38, -1e-38, 0.0]).bfloat16()
    codes = torch.arange(16, dtype=torch.int32).repeat(len(scales), 2)
    tensors = packed(len(scales), 32)
    tensors["weight_packed"] = torch.stack([pack_row(row) for row in codes])
    tensors["weight_scale"] = scales.view(-1, 1)
    wanted = decompressed(tensors, scheme(4, 32, True))
    folder = folder_of(tmp_path / "model", named(tensors), of_scheme(4, 32, True))
    assert torch.equal(bits(decoded(folder)), bits(wanted))


def pack_row(codes: Tensor) -> Tensor:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    return pack_to_int32(signed(codes.view(1, -1), 4), 4)[0]


def test_rounding_to_fp16_is_pytorchs(tmp_path: Path) -> None:
    """Scales that are subnormal in fp16, or whose products are or overflow."""
    generator = torch.Generator().manual_seed(0)
    powers = torch.rand(500, 1, generator=generator) * 40 - 24
    tensors = packed(500, 32, dtype=torch.float16)
    tensors["weight_scale"] = powers.exp2().half()
    wanted = decompressed(tensors, scheme(4, 32, True))
    folder = folder_of(tmp_path / "model", named(tensors), of_scheme(4, 32, True))
    for presented in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(bits(decoded(folder, presented)), bits(wanted.to(presented)))


def test_columns_ordered_by_their_activations(tmp_path: Path) -> None:
    """What versions of compressed-tensors did that stored `weight_g_idx`: the columns sorted by
    their group, decompressed, and put back."""
    tensors = packed(ROWS, WIDTH, symmetric=False)
    generator = torch.Generator().manual_seed(7)
    index = (torch.arange(WIDTH) // 32)[torch.randperm(WIDTH, generator=generator)]
    order = torch.argsort(index)
    codes = signed(random_codes(ROWS, WIDTH, 4), 4)[:, order]
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    in_order = tensors | {"weight_packed": pack_to_int32(codes, 4)}
    wanted = decompressed(in_order, scheme(4, 32, False))[:, torch.argsort(order)]
    tensors["weight_g_idx"] = index.int()
    config = of_scheme(4, 32, False)
    folder = folder_of(tmp_path / "ordered", named(tensors), config)
    assert torch.equal(bits(decoded(folder)), bits(wanted))
    plain = packed(ROWS, WIDTH, symmetric=False)
    unset = plain | {"weight_g_idx": torch.full((WIDTH,), -1, dtype=torch.int32)}
    value = decoded(folder_of(tmp_path / "unset", named(unset), config))
    assert torch.equal(bits(value), bits(decompressed(plain, scheme(4, 32, False))))


def test_what_other_versions_store(tmp_path: Path) -> None:
    """Zero points as they are, shapes in I32, no configuration, and one scale for all."""
    tensors = packed(ROWS, WIDTH, symmetric=False)
    wanted = decompressed(tensors, scheme(4, 32, False))
    plain = tensors | {
        "weight_zero_point": signed(random_codes(ROWS, WIDTH // 32, 4, 2), 4),
        "weight_shape": tensors["weight_shape"].int(),
    }
    folder = folder_of(tmp_path / "plain", named(plain), of_scheme(4, 32, False))
    assert torch.equal(bits(decoded(folder)), bits(wanted))
    folder = folder_of(tmp_path / "unstated", named(tensors))
    assert torch.equal(bits(decoded(folder)), bits(wanted))
    one = packed(ROWS, WIDTH, group=None)
    one["weight_scale"] = one["weight_scale"][:1]
    wanted = decompressed(one, scheme(4, None, True))
    for number, shape in enumerate([(1, 1), (1,)]):
        one["weight_scale"] = one["weight_scale"].view(shape)
        folder = folder_of(tmp_path / f"one {number}", named(one), of_scheme(4, None, True))
        assert torch.equal(bits(decoded(folder)), bits(wanted))


def test_shapes_say_which_scheme_a_weight_has(tmp_path: Path) -> None:
    """Of the two schemes of rows that have one scale, the one that names the module is meant."""
    other = "model.layers.0.self_attn.o_proj"
    forms = {NAME: (8, None), other: (4, None), f"{other}2": (4, 32), f"{NAME}2": (8, 64)}
    groups = {
        str(number): compressed(scheme(*form, True))["config_groups"]["group_0"]  # type: ignore[index]
        for number, form in enumerate(forms.values())
    }
    groups["1"]["targets"] = ["re:.*self_attn.*"]
    tensors = {
        key: value
        for name, (width, group) in forms.items()
        for key, value in named(packed(ROWS, WIDTH, bits=width, group=group), name).items()
    }
    config = {"quantization_config": {"config_groups": groups}}
    source = open_decoded(folder_of(tmp_path / "model", tensors, config))
    for name, form in forms.items():
        weight = packed(ROWS, WIDTH, bits=form[0], group=form[1])
        wanted = decompressed(weight, scheme(*form, True))
        assert torch.equal(bits(source.read(f"{name}.weight")), bits(wanted)), name
    source.close()


def test_a_row_that_does_not_fill_its_last_word(tmp_path: Path) -> None:
    tensors = packed(ROWS, 60, group=20)
    wanted = decompressed(tensors, scheme(4, 20, True))
    folder = folder_of(tmp_path / "model", named(tensors), of_scheme(4, 20, True))
    assert torch.equal(bits(decoded(folder)), bits(wanted))
    tensors = packed(ROWS, 60, group=None)
    folder = folder_of(tmp_path / "channel", named(tensors), of_scheme(4, None, True))
    with pytest.raises(SourceError, match=r"weight_shape: \[40, 60\], but the codes beside it"):
        decoded(folder)


# ------------------------------------------------------------------------------ AWQ and GPTQ


def parts(seed: int, *, width: int = 4, group: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [in, out], zeros and scales [groups, out]."""
    groups = WIDTH // group
    return (
        random_codes(WIDTH, ROWS, width, seed),
        random_codes(groups, ROWS, width, seed + 1),
        random_scales(groups, ROWS, torch.float16, seed + 2),
    )


@pytest.mark.parametrize("group", [32, 64, WIDTH])
def test_awq_is_autoawq(group: int, tmp_path: Path) -> None:
    tensors = awq(*parts(0, group=group))
    wanted = dequantized_awq(tensors).T
    assert wanted.dtype == torch.float16
    config = {"quantization_config": {"quant_method": "awq", "version": "gemm", "bits": 4}}
    folder = folder_of(tmp_path / "model", named(tensors), config)
    for presented in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(bits(decoded(folder, presented)), bits(wanted.to(presented)))


def test_awq_is_what_compressed_tensors_converts_it_to(tmp_path: Path) -> None:
    tensors = named(awq(*parts(3)))
    value = decoded(folder_of(tmp_path / "model", tensors), torch.float16)
    made = AutoAWQConverter(group_size=32).process(dict(tensors))
    made = {key.removeprefix(f"{NAME}."): tensor for key, tensor in made.items()}
    assert torch.equal(bits(value), bits(decompressed(made, scheme(4, 32, False))))


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize(
    ("stated", "less"),
    [
        ({"quant_method": "gptq", "checkpoint_format": "gptq"}, 1),
        ({"quant_method": "gptq"}, 1),
        ({"quant_method": "gptq", "checkpoint_format": "gptq_v2"}, 0),
        ({"quant_method": "gptq", "format": "gptq_v2"}, 0),
        ({"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}, 1),
        ({"quant_method": "intel/auto-round", "packing_format": "auto_round:gptqmodel"}, 0),
    ],
)
@pytest.mark.parametrize("width", [4, 8])
def test_gptq_is_gptqmodel(
    width: int, stated: dict[str, str], less: int, ordered: bool, tmp_path: Path
) -> None:
    index = torch.arange(WIDTH) // 32
    if not ordered:
        index = index[torch.randperm(WIDTH, generator=torch.Generator().manual_seed(1))]
    tensors = gptq(*parts(5, width=width), index, bits=width, less=less)
    wanted = dequantized_gptq(tensors, bits=width, more=less).T
    assert wanted.dtype == torch.float16
    folder = folder_of(tmp_path / "model", named(tensors), {"quantization_config": stated})
    for presented in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(bits(decoded(folder, presented)), bits(wanted.to(presented)))
    if ordered:
        del tensors["g_idx"]
        plain = folder_of(tmp_path / "plain", named(tensors), {"quantization_config": stated})
        assert torch.equal(decoded(plain, torch.float16), wanted)


def test_zeros_of_gptq_are_those_that_were_meant(tmp_path: Path) -> None:
    """All of them, with 0 among them, which borrows from its neighbour in a word."""
    codes, _, scales = parts(9)
    zeros = torch.arange(ROWS, dtype=torch.int32).repeat(WIDTH // 32, 1) % 16
    tensors = gptq(codes, zeros, scales, torch.arange(WIDTH) // 32, bits=4, less=1)
    wanted = (codes - zeros.repeat_interleave(32, 0)) * scales.repeat_interleave(32, 0)
    folder = folder_of(tmp_path / "model", named(tensors))
    assert torch.equal(decoded(folder, torch.float16), wanted.T)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Weights of more codes than are read at a time lie beside those of a few rows."""
    folder, index = tmp_path_factory.mktemp("int4"), torch.arange(WIDTH) // 32
    return [
        folder_of(folder / "packed", named(packed(ROWS, WIDTH, symmetric=False))),
        folder_of(folder / "awq", named(awq(*parts(0)))),
        folder_of(
            folder / "gptq", named(gptq(*parts(0), index[torch.randperm(WIDTH)], bits=4, less=1))
        ),
    ]


@settings(deadline=None, max_examples=60)
@given(kind=st.integers(0, 2), start=st.integers(0, ROWS - 1), data=st.data())
def test_any_rows(folders: list[Path], kind: int, start: int, data: st.DataObject) -> None:
    stop = data.draw(st.integers(start + 1, ROWS))
    source = open_decoded(folders[kind])
    assert torch.equal(source.slab(KEY, start, stop), source.read(KEY)[start:stop])
    source.close()


@pytest.mark.parametrize("form", ["packed", "awq", "gptq"])
def test_a_weight_larger_than_what_is_read_at_a_time(form: str, tmp_path: Path) -> None:
    outputs, inputs = 1064, 2048
    codes, zeros = random_codes(inputs, outputs, 4), random_codes(16, outputs, 4, 1)
    scales = random_scales(16, outputs, torch.float16)
    if form == "packed":
        tensors = packed(outputs, inputs, group=128, symmetric=False)
        wanted = decompressed(tensors, scheme(4, 128, False))
    elif form == "awq":
        tensors = awq(codes, zeros, scales)
        wanted = dequantized_awq(tensors).T
    else:
        tensors = gptq(codes, zeros, scales, torch.arange(inputs) // 128, bits=4, less=1)
        wanted = dequantized_gptq(tensors, bits=4, more=1).T
    folder = folder_of(tmp_path / "model", named(tensors))
    assert torch.equal(decoded(folder), wanted.bfloat16())


# -------------------------------------------------------------------------------- what is wrong


def without(tensors: Tensors, name: str) -> Tensors:
    return {key: value for key, value in tensors.items() if key != name}


def awq_parts() -> Tensors:
    return awq(*parts(0))


def gptq_parts() -> Tensors:
    return gptq(*parts(0), torch.arange(WIDTH) // 32, bits=4, less=1)


BROKEN: list[tuple[Tensors, str]] = [
    (without(packed(ROWS, WIDTH), "weight_scale"), r"weight_scale: missing beside .*packed"),
    (without(packed(ROWS, WIDTH), "weight_packed"), r"weight_scale in .*: BF16, of a weight"),
    (packed(ROWS, WIDTH), r"weight_zero_point: missing, but the configuration says"),
    (
        packed(ROWS, WIDTH, group=48, symmetric=False),
        r"weight_scale: BF16 \[40, 4\] does not fit .* \[40, 24\] of 4 bits in groups of 32",
    ),
    (
        packed(ROWS, WIDTH, symmetric=False)
        | {"weight_scale": random_scales(ROWS, 6, torch.float64)},
        r"weight_scale: F64 \[40, 6\] does not fit",
    ),
    (
        packed(ROWS, WIDTH, symmetric=False)
        | {"weight_zero_point": torch.zeros(6, 6, dtype=torch.int32)},
        r"weight_zero_point: I32 \[6, 6\] does not fit a weight \[40, 192\] with 6 scales",
    ),
    (
        packed(ROWS, WIDTH, symmetric=False) | {"weight_g_idx": torch.zeros(8).int()},
        r"weight_g_idx: I32 \[8\] does not fit",
    ),
    (
        without(packed(ROWS, WIDTH, symmetric=False), "weight_shape"),
        r"weight_shape: missing beside",
    ),
    (without(awq_parts(), "scales"), r"scales: missing beside .*qweight"),
    (without(gptq_parts(), "scales"), r"scales: missing beside .*qweight"),
    (without(awq_parts(), "qzeros"), r"qzeros: missing beside .*qweight"),
    (without(gptq_parts(), "qzeros"), r"qzeros: missing beside .*qweight"),
    (without(gptq_parts(), "qweight"), r"qzeros in .*: I32"),
    (
        awq_parts() | {"scales": random_scales(7, ROWS, torch.float16)},
        r"scales: F16 \[7, 40\] does not fit|qzeros: I32 \[6, 5\] does not fit",
    ),
    (gptq_parts() | {"g_idx": torch.zeros(8).int()}, r"g_idx: I32 \[8\] does not fit"),
]


@pytest.mark.parametrize(("tensors", "message"), BROKEN)
def test_what_does_not_fit_is_named(tensors: Tensors, message: str, tmp_path: Path) -> None:
    """Another, whole weight lies beside it."""
    whole = named(packed(ROWS, WIDTH, symmetric=False), "model.layers.1.mlp.down_proj")
    config = of_scheme(4, 32, symmetric=False) if "weight_packed" in tensors else {}
    folder = folder_of(tmp_path / "model", {**named(tensors), **whole}, config)
    with pytest.raises(SourceError, match=message) as raised:
        open_decoded(folder)
    assert "\n" not in str(raised.value)


SPOILED: list[tuple[Tensors, str, Callable[[Tensor], object], str]] = [
    (packed(ROWS, WIDTH), "weight_scale", lambda x: x[3, 1].fill_(torch.nan), "weight_scale: nan"),
    (awq_parts(), "scales", lambda x: x[3, 1].fill_(torch.inf), "scales: inf; a scale must"),
    (gptq_parts(), "g_idx", lambda x: x[5].fill_(6), "g_idx: names groups beyond the 6"),
    (gptq_parts(), "g_idx", lambda x: x[5].fill_(-1), "g_idx: names groups beyond the 6"),
]


@pytest.mark.parametrize(("tensors", "part", "spoil", "message"), SPOILED)
def test_values_that_cannot_be(
    tensors: Tensors, part: str, spoil: Callable[[Tensor], object], message: str, tmp_path: Path
) -> None:
    spoiled = {key: value.clone() for key, value in tensors.items()}
    spoil(spoiled[part])
    with pytest.raises(SourceError, match=message):
        decoded(folder_of(tmp_path / "model", named(spoiled)))


def stated_twice(targets: object) -> dict[str, Any]:
    """Two groups that only their targets tell apart: of 4 bits and 64 columns, and of 8 and 32."""
    config = compressed(scheme(4, 64, True))
    other = compressed(scheme(8, 32, True))["config_groups"]["group_0"]
    config["config_groups"]["group_1"] = other | {"targets": targets}
    return {"quantization_config": config}


def test_targets_say_which_scheme_a_weight_has(tmp_path: Path) -> None:
    """Where the shapes fit several; what is no list of targets says nothing."""
    tensors = packed(ROWS, WIDTH, bits=8, group=32)
    wide = packed(ROWS, 2 * WIDTH, bits=4, group=64)
    assert tensors["weight_packed"].shape == wide["weight_packed"].shape
    assert tensors["weight_scale"].shape == wide["weight_scale"].shape
    for number, targets in enumerate((["re:.*down_proj"], [NAME])):
        folder = folder_of(tmp_path / str(number), named(tensors), stated_twice(targets))
        assert torch.equal(decoded(folder), decompressed(tensors, scheme(8, 32, True)))
    folder = folder_of(tmp_path / "5", named(wide), stated_twice(5))
    assert torch.equal(decoded(folder), decompressed(wide, scheme(4, 64, True)))
    folder = folder_of(tmp_path / "(", named(tensors), stated_twice(["re:("]))
    with pytest.raises(SourceError, match=r"^config\.json: re:\( in quantization_config is no reg"):
        open_decoded(folder)


@pytest.mark.parametrize(
    ("tensors", "stated"),
    [
        (awq_parts(), {"quant_method": "awq", "version": "gemv"}),
        (awq_parts(), {"quant_method": "paroquant", "format": "paroquant"}),
        (gptq_parts(), {"quant_method": "gptq", "checkpoint_format": "marlin"}),
        (gptq_parts(), {"quant_method": "gptq", "format": "gptq_p"}),
        (gptq_parts(), {"quant_method": "other"}),
        (gptq_parts(), {"quant_method": "auto-round", "packing_format": "auto_round:exllamav2"}),
        (packed(ROWS, WIDTH, bits=3, group=None), compressed(scheme(3, None, True))),
    ],
)
@pytest.mark.parametrize("is_nested", [False, True])
def test_forms_that_are_not_known(
    tensors: Tensors, stated: dict[str, Any], is_nested: bool, tmp_path: Path
) -> None:
    config: dict[str, Any] = {"quantization_config": stated}
    config = {"text_config": config} if is_nested else config
    folder = folder_of(tmp_path / "model", named(tensors), config)
    with pytest.raises(SourceError, match="holds no quantized weights that can be decoded"):
        open_decoded(folder)


@pytest.mark.parametrize("name", ["checkpoint_format", "format"])
@pytest.mark.parametrize("is_nested", [False, True])
def test_the_form_of_zeros_is_found(name: str, is_nested: bool, tmp_path: Path) -> None:
    """Zeros of `gptq_v2` are stored as they are, which no shape shows."""
    tensors = gptq(*parts(0), torch.arange(WIDTH) // 32, bits=4, less=0)
    config: dict[str, Any] = {"quantization_config": {"quant_method": "gptq", name: "gptq_v2"}}
    config = {"text_config": config} if is_nested else config
    wanted = dequantized_gptq(tensors, bits=4, more=0).T.bfloat16()
    assert torch.equal(decoded(folder_of(tmp_path / "model", named(tensors), config)), wanted)
