# SPDX-License-Identifier: Apache-2.0
"""Proves the FP8 formats: the definition against numbers written down and against a search over all
E4M3 values, and the CPU kernels against the definition, byte for byte."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fourfold.errors import NonFiniteError
from fourfold.formats import fp8
from fourfold.formats.base import FORMATS
from fourfold.formats.fp8 import cpu, reference
from fourfold.formats.nvfp4.e4m3 import E4M3_POSITIVE

NAMES = ("fp8", "fp8_channel", "fp8_block", "mxfp8")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCKS = ((256, 256), (1, 256), (128, 128), (1, 32))
DIGESTS = {
    "fp8": "1b5b78462db7d708",
    "fp8_channel": "29fa25011507609f",
    "fp8_block": "e7c7341ee3977b20",
    "mxfp8": "acc421a05e9192f8",
}
MAGNITUDES = [0.0, *E4M3_POSITIVE.tolist()]


def e4m3(x: float) -> int:
    """The E4M3 byte of a float32 number, by a search: halves to even, beyond 448 it is 448."""
    magnitude = min(abs(x), 448.0)
    distances = [abs(magnitude - value) for value in MAGNITUDES]
    nearest = [byte for byte, distance in enumerate(distances) if distance == min(distances)]
    byte = next((byte for byte in nearest if byte % 2 == 0), nearest[0])
    return byte | (0x80 if math.copysign(1, x) < 0 else 0)


def buffers(name: str, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Buffers for the row parts, as a run has them."""
    sizes = {"F8_E4M3": 1, "U8": 1, "F32": 4}
    return {
        part: torch.full((spec[1][0], math.prod(spec[1][1:]) * sizes[spec[0]]), 0xAB).byte()
        for part, spec in FORMATS[name].row_parts(shape).items()
    }


def quantized(name: str, w_OI: torch.Tensor) -> tuple[dict[str, torch.Tensor], float | None]:
    fmt, parts = FORMATS[name], buffers(name, (w_OI.shape[0], w_OI.shape[1]))
    group_scale = fmt.group_scale(fmt.amax(w_OI, name="w"))
    fmt.quantize(w_OI, parts, scale="max", group_scale=group_scale, name="w")
    return parts, group_scale


def scales_by_hand(name: str, w_OI: torch.Tensor) -> np.ndarray:
    """The scale of every weight, from the definition, one weight at a time."""
    w, scales = w_OI.float().numpy(), np.zeros(w_OI.shape, np.float32)
    high, wide = {"fp8": w.shape, "fp8_channel": (1, w.shape[1]), "fp8_block": (128, 128)}.get(
        name, (1, 32)
    )
    for row in range(0, w.shape[0], high):
        for column in range(0, w.shape[1], wide):
            block = np.s_[row : row + high, column : column + wide]
            amax = np.abs(w[block]).max()
            if amax == 0:
                scales[block] = 1
            elif name == "mxfp8":
                e = next(e for e in range(-117, 120) if e == 119 or float(amax) <= 448 * 2.0**e)
                scales[block] = 2.0**e
            else:
                scales[block] = max(np.float32(amax) / np.float32(448), np.float32(2.0**-117))
    return scales


def wild(dtype: torch.dtype) -> st.SearchStrategy[torch.Tensor]:
    """Weights [out, in] with zeros, subnormals, outliers, and rows of any size."""
    limit = 65504.0 if dtype == torch.float16 else 2.0**127
    special = st.sampled_from([0.0, -0.0, 1e-45, -1e-40, 2.0**-126, 448.0, 464.0, 3e-5, limit])
    ordinary = st.floats(-limit, limit, width=32) | st.floats(-1, 1, width=32) | special
    shapes = st.tuples(st.sampled_from([1, 2, 5, 130]), st.sampled_from([128, 256]))
    return shapes.flatmap(
        lambda shape: hnp.arrays(np.float32, shape, elements=ordinary, fill=special)
    ).map(lambda array: torch.from_numpy(array).clamp(-limit, limit).to(dtype))


def test_what_a_code_is() -> None:
    values = [448.0, 1.0, -0.0, 2.0**-9, 2.0**-10, 2.0**-10 * 1.5, 464.0, -1e9, 1.0625, 1.1875]
    w_OI = torch.tensor([values])
    codes = reference.quantize(w_OI, torch.ones(1, 1), (1, 10)).view(torch.uint8)
    expected = [0x7E, 0x38, 0x80, 0x01, 0x00, 0x01, 0x7E, 0xFE, 0x38, 0x3A]
    assert codes[0].tolist() == expected == [e4m3(value) for value in values]


def test_what_a_scale_is() -> None:
    amaxes = torch.tensor([448.0, 449.0, 0.0, 1e-40, 224.0, 1.0, 3.4e38])
    one_448th = float(np.float32(1) / np.float32(448))
    assert reference.scales_of(amaxes).tolist()[2:6] == [1.0, 2.0**-117, 0.5, one_448th]
    assert fp8.scale_of(449.0) == float(np.float32(449) / np.float32(448))
    assert reference.exponents_of(amaxes).tolist() == [127, 128, 127, 10, 126, 119, 246]
    above = torch.nextafter(torch.tensor([448.0]), torch.tensor([449.0]))
    assert reference.exponents_of(above).tolist() == [128]
    assert reference.powers(torch.tensor([127, 10, 246]).byte()).tolist() == [
        1,
        2.0**-117,
        2.0**119,
    ]


@pytest.mark.parametrize(
    ("strategy", "block"), [("tensor", (300, 256)), ("channel", (1, 256)), ("block", (128, 128))]
)
def test_bytes_are_those_of_compressed_tensors(strategy: str, block: tuple[int, int]) -> None:
    w_OI = torch.randn(300, 256, generator=torch.manual_seed(5)) / 40
    amaxes = reference.block_amaxes(w_OI, block)
    structure = list(block) if strategy == "block" else None
    arguments = QuantizationArgs(
        num_bits=8, type="float", strategy=strategy, block_structure=structure
    )
    scales, zeros = calculate_qparams(-amaxes, amaxes, arguments)
    assert torch.equal(scales.reshape(amaxes.shape), reference.scales_of(amaxes))
    if strategy == "tensor":
        scales, zeros = scales.reshape(1), zeros.reshape(1)
    theirs = quantize(w_OI, scales, zeros, arguments, dtype=torch.float8_e4m3fn)
    ours = reference.quantize(w_OI, reference.scales_of(amaxes), block)
    assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_do_not_change(name: str) -> None:
    """Pinned over weights of many sizes."""
    rng = np.random.default_rng(11)
    values = rng.standard_normal((320, 384)) * 2.0 ** rng.integers(-12, 4, (320, 384))
    parts, _ = quantized(name, torch.from_numpy(values.astype(np.float32)).bfloat16())
    joined = b"".join(parts[part].numpy().tobytes() for part in sorted(parts))
    assert hashlib.sha256(joined).hexdigest()[:16] == DIGESTS[name]


def test_every_finite_bf16_and_fp16_number_is_rounded_as_torch_does() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        w_OI = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype).view(256, 256)
        w_OI = torch.where(w_OI.isfinite(), w_OI, 0.0)
        codes = torch.empty(256, 256, dtype=torch.uint8)
        cpu.quantize(w_OI, codes, torch.ones(1, 1), (256, 256))
        by_torch = w_OI.float().clamp(-448, 448).to(torch.float8_e4m3fn)
        assert torch.equal(codes, by_torch.view(torch.uint8))
        assert not ((codes & 0x7F) == 0x7F).any()
        assert codes.flatten()[::97].tolist() == [e4m3(x) for x in w_OI.flatten()[::97].tolist()]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_kernels_give_the_bytes_of_the_reference(
    dtype: torch.dtype, block: tuple[int, int], data: st.DataObject
) -> None:
    w_OI = data.draw(wild(dtype))
    amaxes = fp8.block_amaxes(w_OI, block, "numba")
    assert torch.equal(amaxes, fp8.block_amaxes(w_OI, block, "reference"))
    scales_BC = reference.scales_of(amaxes)
    if block == (1, 32):
        scales_BC = reference.powers(reference.exponents_of(amaxes))
    codes, expected = (torch.empty(w_OI.shape, dtype=torch.uint8) for _ in "ab")
    sums = fp8.quantize_into(w_OI, codes, scales_BC, block, kernel="numba")
    wanted = fp8.quantize_into(w_OI, expected, scales_BC, block, kernel="reference")
    assert torch.equal(codes, expected)
    assert not ((codes & 0x7F) == 0x7F).any()
    assert sums == pytest.approx(wanted, rel=1e-9)
    assert fp8.error_energy(w_OI, codes, scales_BC, block, "numba") == pytest.approx(sums, rel=1e-9)
    for out in (torch.float32, torch.bfloat16):
        back, by_reference = (torch.empty(w_OI.shape, dtype=out) for _ in "ab")
        fp8.dequantize_into(codes, scales_BC, block, back, "numba")
        fp8.dequantize_into(codes, scales_BC, block, by_reference, "reference")
        assert torch.equal(back, by_reference)
        assert back.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_a_format_is_its_definition(name: str, data: st.DataObject) -> None:
    w_OI = data.draw(wild(data.draw(st.sampled_from(DTYPES))))
    parts, group_scale = quantized(name, w_OI)
    scales = scales_by_hand(name, w_OI)
    quotients = w_OI.float().numpy() / scales
    some = np.s_[::7, ::5]
    assert parts["codes"].numpy()[some].tolist() == [list(map(e4m3, r)) for r in quotients[some]]
    back = torch.empty(w_OI.shape)
    FORMATS[name].dequantize(parts, group_scale, back)
    values = parts["codes"].view(torch.float8_e4m3fn).float() * torch.from_numpy(scales)
    assert torch.equal(back, values)
    error, energy = FORMATS[name].error(w_OI, parts, group_scale)
    assert energy == pytest.approx(float(w_OI.double().square().sum()), rel=1e-9)
    exact = parts["codes"].view(torch.float8_e4m3fn).double() * torch.from_numpy(scales).double()
    difference = w_OI.double() - exact
    assert error == pytest.approx(float(difference.square().sum()), rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_parts_and_errors_of_ordinary_weights(name: str) -> None:
    fmt, w_OI = FORMATS[name], torch.randn(200, 256, generator=torch.manual_seed(1)) / 50
    parts, group_scale = quantized(name, w_OI.bfloat16())
    error, energy = fmt.error(w_OI.bfloat16(), parts, group_scale)
    assert 0.02 < math.sqrt(error / energy) < 0.03 < fmt.worst_error
    specs = fmt.parts((200, 256))
    assert specs["codes"] == ("F8_E4M3", (200, 256))
    expected = {
        "fp8": {"scale": ("F32", ())},
        "fp8_channel": {"scale": ("F32", (200,))},
        "fp8_block": {"scale": ("F32", (2, 2))},
        "mxfp8": {"exponents": ("U8", (200, 8))},
    }[name]
    assert {part: spec for part, spec in specs.items() if part != "codes"} == expected
    assert (fmt.group_part, list(fmt.input_parts())) == (
        ("scale", ["input_scale"]) if name == "fp8" else (None, [])
    )
    assert fmt.rounds_activations


@pytest.mark.parametrize("name", NAMES)
def test_rows_in_pieces_are_the_rows_of_the_whole(name: str) -> None:
    fmt, generator = FORMATS[name], torch.manual_seed(2)
    w_OI = torch.randn(300, 256, generator=generator) * torch.rand(300, 1, generator=generator)
    whole, group_scale = quantized(name, w_OI)
    pieces = [buffers(name, (rows, 256)) for rows in (128, 172)]
    for rows, part in zip(w_OI.split([128, 172]), pieces, strict=True):
        fmt.quantize(rows, part, scale="max", group_scale=group_scale, name="w")
    for part, buffer in whole.items():
        assert torch.equal(torch.cat([piece[part] for piece in pieces]), buffer)


@pytest.mark.parametrize("name", NAMES)
def test_strides_make_no_difference(name: str) -> None:
    both = torch.randn(10, 2, 300, generator=torch.manual_seed(3)).bfloat16()
    w_OI = both[:, 1, 20:148]
    assert w_OI.stride() == (600, 1)
    parts, group_scale = quantized(name, w_OI)
    expected, _ = quantized(name, w_OI.contiguous())
    assert all(torch.equal(parts[part], expected[part]) for part in expected)
    fmt = FORMATS[name]
    error, energy = fmt.error(w_OI, parts, group_scale)
    assert (error, energy) == fmt.error(w_OI.contiguous(), expected, group_scale)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_is_named(name: str, value: float, dtype: torch.dtype) -> None:
    w_OI = torch.ones(4, 128, dtype=dtype)
    w_OI[2, 77] = value
    with pytest.raises(NonFiniteError, match=r"layer\.w: .* at \[2, 77\]"):
        FORMATS[name].amax(w_OI, name="layer.w")
    with pytest.raises(NonFiniteError, match=r"layer\.w: .* at \[2, 77\]"):
        FORMATS[name].quantize(
            w_OI, buffers(name, (4, 128)), scale="max", group_scale=1.0, name="layer.w"
        )


def test_a_weight_that_its_group_dwarfs_has_a_large_error() -> None:
    """So that a run repairs it or stops; see `repairs`."""
    fmt, w_OI = FORMATS["fp8"], torch.randn(16, 64, generator=torch.manual_seed(4))
    for factor, is_held in ((1.0, True), (2.0**-12, True), (2.0**-20, False)):
        parts = buffers("fp8", (16, 64))
        scale = fmt.group_scale(float(w_OI.abs().max()))
        error, energy = fmt.quantize(w_OI * factor, parts, scale="max", group_scale=scale, name="w")
        assert (math.sqrt(error / energy) <= fmt.worst_error) is is_held
