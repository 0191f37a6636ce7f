# SPDX-License-Identifier: Apache-2.0
"""Proves that FP8 weights decode to the values of the libraries that own the forms, bit for bit,
whichever rows are asked for; and that a form which is broken ends in one line with a remedy."""

from __future__ import annotations

import json
import math
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert.converters import FP8BlockDequantizer
from compressed_tensors.quantization import QuantizationScheme
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from encoding import Tensors, as_stored, bits, change_tensors, folder_of
from fourfold.errors import NonFiniteError, SourceError
from fourfold.sources.codecs import CODECS
from fourfold.sources.decoded import open_decoded
from fourfold.sources.safetensors import open_source

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
SCALE_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EXTREMES = torch.tensor([0.0, 2.0**-149, 2.0**-126, 1e-30, 2.0**-20, 1.0, 3.0e4, 1e30, 3e38])


def codes_of(*shape: int, seed: int = 0) -> Tensor:
    """Every E4M3 byte but the two NaN, in random order."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 254, shape, generator=generator, dtype=torch.uint8)
    return (codes + (codes >= 0x7F)).view(torch.float8_e4m3fn)


def scales_of(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    """Random scales of all sizes, some of them extreme; all are finite in `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.rand(shape, generator=generator) * 24 - 18
    scales = torch.rand(shape, generator=generator).add(1) * exponents.exp2()
    is_extreme = torch.rand(shape, generator=generator) < 0.2
    choice = torch.randint(0, len(EXTREMES), shape, generator=generator)
    scales = torch.where(is_extreme, EXTREMES[choice], scales)
    return scales.clamp(max=torch.finfo(dtype).max / 2).to(dtype)


def exponents_of(*shape: int, seed: int = 1) -> Tensor:
    """Every byte of E8M0 but the NaN, in random order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 255, shape, generator=generator, dtype=torch.uint8)


numbers = count()


def decoded(
    tmp_path: Path,
    tensors: Tensors,
    config: dict[str, Any] | None = None,
    *,
    key: str = "linear.weight",
    dtype: torch.dtype = torch.bfloat16,
    rows: slice = slice(None),
) -> Tensor:
    folder = folder_of(tmp_path / str(next(numbers)), tensors, config)
    source = open_decoded(folder, dtype=dtype)
    try:
        start, stop, _ = rows.indices(source.tensors[key].rows)
        return as_stored(source, key, start, stop)
    finally:
        source.close()


def by_transformers(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What `Fp8Dequantize` gives for a parameter of this dtype."""
    model = torch.nn.ParameterDict({"weight": torch.empty(0, dtype=dtype)})
    parts = {"weight": [codes], "weight_scale_inv": [scales]}
    return Fp8Dequantize(None).convert(parts, full_layer_name="weight", model=model)["weight"]


def by_compressed_tensors(
    codes: Tensor, scales: Tensor, dtype: torch.dtype, form: str = "float-quantized", **args: Any
) -> Tensor:
    """What transformers' loading with compressed-tensors gives for a parameter of this dtype."""
    weights = {"num_bits": 8, "type": "float", "symmetric": True, **args}
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    compressor = BaseCompressor.get_value_from_registry(form)
    state = compressor.decompress({"weight": codes, "weight_scale": scales}, scheme)
    return state["weight"].to(dtype)


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(bits(one), bits(other))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("name", ["weight_scale_inv", "scale", "qscale_weight"])
def test_blocks_are_those_of_transformers(
    name: str, scale_dtype: torch.dtype, dtype: torch.dtype, tmp_path: Path
) -> None:
    codes, scales = codes_of(256, 384), scales_of(2, 3, dtype=scale_dtype)
    made = decoded(tmp_path, {"linear.weight": codes, f"linear.{name}": scales}, dtype=dtype)
    assert same(made, by_transformers(codes, scales, dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("as_bytes", [False, True])
def test_powers_of_two_are_those_of_transformers(
    as_bytes: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    codes, exponents = codes_of(256, 384), exponents_of(2, 3)
    scales = exponents if as_bytes else exponents.view(torch.float8_e8m0fnu)
    tensors = {"linear.weight": codes, "linear.weight_scale_inv": scales}
    made = decoded(tmp_path, tensors, dtype=dtype)
    assert same(made, by_transformers(codes, scales, dtype))


@pytest.mark.parametrize("size", [(128, 128), (32, 64), (1, 128), (48, 80)])
def test_partial_blocks_are_those_of_compressed_tensors_converter(
    size: tuple[int, int], tmp_path: Path
) -> None:
    codes = codes_of(300, 200)
    scales = scales_of(math.ceil(300 / size[0]), math.ceil(200 / size[1]))
    tensors = {"linear.weight": codes, "linear.weight_scale_inv": scales}
    made = decoded(tmp_path, tensors, {"quantization_config": {"weight_block_size": list(size)}})
    converter = FP8BlockDequantizer(targets=["re:.*"], weight_block_size=size)
    assert same(made, converter.process(tensors.copy())["linear.weight"])


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        ([32, 64], (8, 4)),
        ("32x64", (8, 4)),
        (None, (2, 2)),  # 128×128, as for whatever is no size
        (128, (2, 2)),
        ([], (2, 2)),
        (["a", "b"], (2, 2)),
    ],
)
def test_the_block_size_of_a_nested_configuration_counts(
    size: Any, shape: tuple[int, int], tmp_path: Path
) -> None:
    codes, scales = codes_of(256, 256), scales_of(*shape)
    tensors = {"linear.weight": codes, "linear.weight_scale_inv": scales}
    config = {"text_config": {"quantization_config": {"weight_block_size": size}}}
    assert same(decoded(tmp_path, tensors, config), by_transformers(codes, scales, torch.bfloat16))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize(
    ("strategy", "shape"),
    [("tensor", ()), ("tensor", (1,)), ("tensor", (1, 1)), ("channel", (90, 1)), ("group", (90, 4)),
     ("block", (2, 3))],
)  # fmt: skip
def test_scales_are_those_of_compressed_tensors(
    strategy: str,
    shape: tuple[int, ...],
    scale_dtype: torch.dtype,
    dtype: torch.dtype,
    tmp_path: Path,
) -> None:
    codes, scales = codes_of(90, 128), scales_of(*shape, dtype=scale_dtype)
    more = {"block": {"block_structure": [64, 48]}, "group": {"group_size": 32}}
    args = {"strategy": strategy, **more.get(strategy, {})}
    weights = {"num_bits": 8, "type": "float", **args}
    config = {"quantization_config": {"config_groups": {"group_0": {"weights": weights}}}}
    tensors = {"linear.weight": codes, "linear.weight_scale": scales}
    made = decoded(tmp_path, tensors, config, dtype=dtype)
    assert same(made, by_compressed_tensors(codes, scales, dtype, **args))


@pytest.mark.parametrize("dtype", FLOATS)
def test_mxfp8_is_that_of_compressed_tensors_and_transformers(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    codes, scales = codes_of(90, 128), exponents_of(90, 4)
    made = decoded(tmp_path, {"linear.weight": codes, "linear.weight_scale": scales}, dtype=dtype)
    assert same(made, by_transformers(codes, scales, dtype))
    args = {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
    theirs = by_compressed_tensors(codes, scales, dtype, "mxfp8-quantized", **args)
    if dtype == torch.float32:  # theirs went through bf16, which cannot hold the smallest products
        made = made.bfloat16().float()
    assert same(made, theirs)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("shape", "spread"),
    [
        ((), (1, 1)),
        ((1,), (1, 1)),
        ((3,), (1, 1)),
        ((3, 1), (1, 1)),
        ((3, 1, 1), (1, 1)),
        ((3, 160), (160, 1)),
        ((3, 192), (1, 192)),
        ((3, 160, 1), (160, 1)),
        ((3, 1, 192), (1, 192)),
        ((3, 2, 1), (2, 1)),
        ((3, 2, 2), (2, 2)),
        ((3, 2, 1, 2, 1), (2, 2)),
    ],
    ids=str,
)
def test_fused_experts(
    shape: tuple[int, ...], spread: tuple[int, int], dtype: torch.dtype, tmp_path: Path
) -> None:
    codes, scales = codes_of(3, 160, 192), scales_of(*shape)
    tensors = {"experts.gate_up_proj": codes, "experts.gate_up_proj_scale_inv": scales}
    config = {"quantization_config": {"weight_block_size": [80, 96]}}
    made = decoded(tmp_path, tensors, config, key="experts.gate_up_proj", dtype=dtype)
    grids = scales.reshape(-1, *spread).expand(3, -1, -1)
    for expert in range(3):
        wanted = by_transformers(codes[expert], grids[expert].contiguous(), dtype)
        assert same(made[expert], wanted)


def test_fused_experts_in_mxfp8(tmp_path: Path) -> None:
    codes, scales = codes_of(3, 160, 192), exponents_of(3, 160, 6)
    tensors = {"experts.w13_weight": codes, "experts.w13_weight_scale": scales}
    made = decoded(tmp_path, tensors, key="experts.w13_weight")
    wanted = torch.stack(
        [by_transformers(*pair, torch.bfloat16) for pair in zip(codes, scales, strict=True)]
    )
    assert same(made, wanted)


@pytest.mark.parametrize("form", ["blocks", "channel", "tensor", "mx"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_rows_of_any_range(
    form: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows = data.draw(st.integers(1, 300))
    columns = data.draw(st.integers(1, 9)) * 32
    height, width = {"blocks": (64, 48), "channel": (1, columns), "mx": (1, 32)}.get(
        form, (rows, columns)
    )
    shape = (math.ceil(rows / height), math.ceil(columns / width))
    scales = exponents_of(*shape) if form == "mx" else scales_of(*shape)
    tensors = {"linear.weight": codes_of(rows, columns), "linear.weight_scale": scales}
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    config = {"quantization_config": {"weight_block_size": [64, 48]}}
    tmp_path = tmp_path_factory.mktemp("rows")
    made = decoded(tmp_path, tensors, config, rows=slice(start, stop))
    factors = scales.view(torch.float8_e8m0fnu) if form == "mx" else scales
    factors = factors.float().repeat_interleave(height, 0).repeat_interleave(width, 1)
    wanted = tensors["linear.weight"].float() * factors[:rows, :columns]
    assert same(made, wanted.bfloat16()[start:stop])


def test_only_the_rows_that_are_needed_are_read(tmp_path: Path) -> None:
    tensors = {"linear.weight": codes_of(512, 64), "linear.weight_scale_inv": scales_of(4, 1)}
    source = open_source(folder_of(tmp_path / "folder", tensors))
    codec = CODECS["fp8_blocks"]
    weight = codec.claim(source.config, source.tensors)["linear.weight"]
    rows = []

    def read(name: str, start: int, stop: int) -> Tensor:
        rows.append((name, start, stop))
        return tensors[name][start:stop]

    codec.decode(weight, 200, 260, read, torch.empty(60, 64, dtype=torch.bfloat16))
    assert rows == [("linear.weight", 200, 260), ("linear.weight_scale_inv", 1, 3)]
    source.close()


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    """The rows of the whole tensor are named, and what FP16 cannot hold has a remedy."""
    codes = codes_of(20, 32).view(torch.uint8)
    codes[11, 3] = 0x7F
    folder = folder_of(
        tmp_path / "nan",
        {
            "linear.weight": codes.view(torch.float8_e4m3fn),
            "linear.weight_scale": torch.tensor(1000.0),
        },
    )
    source = open_decoded(folder)
    with pytest.raises(NonFiniteError, match=r"^linear\.weight in .*: 1 NaN or Inf in row 11, "):
        source.slab("linear.weight", 10, 20)
    assert source.slab("linear.weight", 12, 20).isfinite().all()
    source.close()
    source = open_decoded(folder, dtype=torch.float16)
    remedy = r"decoded to F16 from .*\. If they are too large for it, set dtype in config\.json to"
    with pytest.raises(NonFiniteError, match=remedy):
        source.slab("linear.weight", 12, 20)
    source.close()


def test_nan_codes_decode_to_nan(tmp_path: Path) -> None:
    codes = torch.tensor([[0x7F, 0xFF, 0x38, 0xB8]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    tensors = {"linear.weight": codes, "linear.weight_scale": torch.tensor(2.0)}
    for dtype in FLOATS:
        made = decoded(tmp_path, tensors, dtype=dtype)
        assert made.isnan().tolist() == [[True, True, False, False]]
        assert made[0, 2:].tolist() == [2, -2]


def test_scales_of_activations_and_caches_are_left_out(tmp_path: Path) -> None:
    extra = [
        "linear.input_scale", "linear.activation_scale", "linear.input_global_scale",
        "experts.down_proj_input_scale", "experts.down_proj_activation_scale", "linear.qscale_act",
        "linear.act_scale",
        "self_attn.k_scale", "self_attn.v_scale", "self_attn.kv_scale", "attn.k_proj.output_scale",
    ]  # fmt: skip
    tensors = {"linear.weight": codes_of(8, 32), "linear.weight_scale": torch.tensor(2.0)}
    tensors |= {"experts.down_proj": codes_of(2, 8, 32), "experts.down_proj_scale": torch.ones(2)}
    tensors |= {"norm.weight": torch.ones(8), **dict.fromkeys(extra, torch.tensor(1.0))}
    tensors = {key: value.clone() for key, value in tensors.items()}
    source = open_decoded(folder_of(tmp_path / "folder", tensors))
    assert source.tensors.keys() == {"linear.weight", "experts.down_proj", "norm.weight"}
    assert source.notes[0].endswith("; 11 static scales of activations and KV caches are left out")
    assert not source.input_scales  # they are FP8's, not those of a 4-bit format
    source.close()


BLOCKS = {"a.weight": codes_of(256, 256), "a.weight_scale_inv": scales_of(2, 2)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("a.weight_scale_inv"),
            r"^a\.weight: FP8 without weight_scale_inv or weight_scale\. Download the checkpoint "
            r"again, or give the BF16 one\.$",
        ),
        (
            lambda t: t.update({"a.weight_scale_inv": scales_of(2, 3)}),
            r"^a\.weight_scale_inv: F32 \[2, 3\] does not fit weight \[256, 256\], neither per "
            r"tensor or channel nor in blocks of 128×128\. If .* state it as weight_block_size",
        ),
        (
            lambda t: t.update({"a.weight_scale_inv": torch.ones(2, 2, dtype=torch.int32)}),
            r"^a\.weight_scale_inv: I32 \[2, 2\] does not fit weight \[256, 256\]",
        ),
        (
            lambda t: t.update({"a.weight": codes_of(2, 2, 2, 2)}),
            r"^a\.weight_scale_inv: F32 \[2, 2\] does not fit weight \[2, 2, 2, 2\]",
        ),
        (
            lambda t: t.update(
                {"a.weight": codes_of(2, 2, 2, 2), "a.weight_scale_inv": scales_of(1)}
            ),
            r"^a\.weight_scale_inv: F32 \[1\] does not fit weight \[2, 2, 2, 2\]",
        ),
        (  # rows or columns?
            lambda t: t.update(
                {"a.weight": codes_of(2, 8, 8), "a.weight_scale_inv": scales_of(2, 8)}
            ),
            r"^a\.weight_scale_inv: F32 \[2, 8\] does not fit weight \[2, 8, 8\]",
        ),
    ],
)
def test_a_scale_that_is_missing_or_does_not_fit(change: Any, message: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "folder", BLOCKS)
    change_tensors(folder, change)
    with pytest.raises(SourceError, match=message):
        open_decoded(folder)


def test_a_block_size_that_does_not_fit_is_named(tmp_path: Path) -> None:
    config = {"quantization_config": {"weight_block_size": [64, 64]}}
    with pytest.raises(SourceError, match=r"blocks of 64×64\. If its blocks are of another size"):
        open_decoded(folder_of(tmp_path / "folder", BLOCKS, config))


@pytest.mark.parametrize("size", ["9" * 5000, "٣", -128, 1.5, None])
def test_a_block_size_that_is_none(size: object, tmp_path: Path) -> None:
    """It is passed over, as if nothing were stated."""
    config = {"quantization_config": {"weight_block_size": [size, size]}}
    plain = decoded(tmp_path, BLOCKS, key="a.weight")
    assert same(decoded(tmp_path, BLOCKS, config, key="a.weight"), plain)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_a_scale_that_is_no_scale(value: float, tmp_path: Path) -> None:
    broken = BLOCKS | {"a.weight_scale_inv": torch.tensor([[1.0, 1.0], [1.0, value]])}
    message = rf"^a\.weight_scale_inv: {value}; a scale must be finite and not negative\. Download"
    with pytest.raises(SourceError, match=message):
        decoded(tmp_path, broken, key="a.weight")
    assert decoded(tmp_path, broken, key="a.weight", rows=slice(0, 128)).isfinite().all()


FP8_GROUP = {"weights": {"num_bits": 8, "type": "float"}}


@pytest.mark.parametrize(
    ("scale", "more", "expected"),
    [
        (("weight_scale", torch.tensor(2.0)), {"input_scale": torch.tensor(0.5)}, ("fp8", 0.5)),
        (("weight_scale", torch.ones(256, 1)), {}, ("fp8_channel", None)),
        (("weight_scale_inv", torch.ones(2, 2)), {}, ("fp8_block", None)),
        (("weight_scale", torch.ones(2, 1, 2, 1)), {}, ("fp8_block", None)),
        (("weight_scale", torch.ones(256, 4)), {}, None),
        (("weight_scale", torch.full((256, 8), 127).byte()), {}, ("mxfp8", None)),
    ],
)
def test_how_engines_round_inputs(
    scale: tuple[str, Tensor],
    more: dict[str, Tensor],
    expected: tuple[str, Any] | None,
    tmp_path: Path,
) -> None:
    tensors = {"a.weight": codes_of(256, 256), f"a.{scale[0]}": scale[1]}
    tensors |= {f"a.{name}": value for name, value in more.items()}
    for inputs, rounding in (({"num_bits": 8}, expected), (None, None)):
        groups = {"group_0": FP8_GROUP | {"input_activations": inputs}}
        folder = folder_of(tmp_path / str(inputs), dict(tensors))
        config = {"quantization_config": {"config_groups": groups}}
        (folder / "config.json").write_text(json.dumps(config))
        source = open_decoded(folder)
        assert source.input_roundings.get("a") == rounding
        source.close()


@pytest.mark.parametrize("name", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("is_nested", [False, True])
def test_a_decoded_configuration_states_no_quantization(
    name: str, is_nested: bool, tmp_path: Path
) -> None:
    stated = {name: {"config_groups": {"group_0": FP8_GROUP}}}
    config = {"hidden_size": 256, "text_config": {"layers": 1}}
    config |= {"text_config": {"layers": 1, **stated}} if is_nested else stated
    tensors = {"a.weight": codes_of(256, 256), "a.weight_scale": torch.tensor(0.5)}
    source = open_decoded(folder_of(tmp_path / "model", tensors, config))
    as_trained = {"hidden_size": 256, "text_config": {"layers": 1}, "dtype": "bfloat16"}
    assert source.config == as_trained
    source.close()
