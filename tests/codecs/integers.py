# SPDX-License-Identifier: Apache-2.0
"""How tests make INT4 and INT8 weights: as compressed-tensors, AutoAWQ and GPTQModel store them,
and what AutoAWQ's and GPTQModel's own formulas make of the stored tensors."""

from __future__ import annotations

import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor

from encoding import Tensors

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
ONES = {4: 0x11111111, 8: 0x01010101}
AWQ_REVERSE_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]


def scheme(bits: int, group: int | None, symmetric: bool) -> QuantizationScheme:
    strategy = "channel" if group is None else "group"
    args = QuantizationArgs(
        num_bits=bits, type="int", strategy=strategy, group_size=group, symmetric=symmetric
    )
    return QuantizationScheme(targets=["Linear"], weights=args)


def compressed(
    scheme: QuantizationScheme, config_format: str = "pack-quantized"
) -> dict[str, object]:
    """The `quantization_config` of a scheme."""
    group = scheme.model_dump(exclude_none=True) | {"format": config_format}
    group["weights"] = {
        key: group["weights"][key]
        for key in ("num_bits", "type", "strategy", "group_size", "symmetric")
        if key in group["weights"]
    }
    return {
        "quant_method": "compressed-tensors",
        "format": config_format,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def random_codes(rows: int, columns: int, bits: int, seed: int = 0) -> Tensor:
    """Unsigned codes in I32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (rows, columns), dtype=torch.int32, generator=generator)


def random_scales(rows: int, groups: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(rows, groups, generator=generator) * 0.03 + 1e-4).to(dtype)


def signed(codes: Tensor, bits: int) -> Tensor:
    return (codes - (1 << (bits - 1))).to(torch.int8)


def packed(
    rows: int,
    columns: int,
    *,
    bits: int = 4,
    group: int | None = 32,
    symmetric: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Tensors:
    """A weight of random codes, scales and zeros in the form of compressed-tensors."""
    groups = 1 if group is None else columns // group
    tensors = {
        "weight_packed": pack_to_int32(signed(random_codes(rows, columns, bits, seed), bits), bits),
        "weight_scale": random_scales(rows, groups, dtype, seed + 1),
        "weight_shape": torch.tensor([rows, columns]),
    }
    if not symmetric:
        zeros = signed(random_codes(rows, groups, bits, seed + 2), bits)
        tensors["weight_zero_point"] = pack_to_int32(zeros, bits, packed_dim=0)
    return tensors


def decompressed(tensors: Tensors, scheme: QuantizationScheme) -> Tensor:
    return PackedQuantizationCompressor.decompress(tensors, scheme)["weight"]


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Words of I32 [rows, columns·bits/32], lowest bits first."""
    fields = codes.long().unflatten(-1, (-1, 32 // bits)) << torch.arange(0, 32, bits)
    return fields.sum(-1).to(torch.uint32).view(torch.int32)


def awq(codes_IO: Tensor, zeros_GO: Tensor, scales_GO: Tensor) -> Tensors:
    def words(values: Tensor) -> Tensor:
        return pack_words(values.unflatten(-1, (-1, 8))[..., AWQ_ORDER].flatten(-2), 4)

    return {"qweight": words(codes_IO), "qzeros": words(zeros_GO), "scales": scales_GO}


def gptq(
    codes_IO: Tensor, zeros_GO: Tensor, scales_GO: Tensor, index: Tensor, *, bits: int, less: int
) -> Tensors:
    """`less` is subtracted from each zero, as GPTQModel does it: from whole words."""
    stored = pack_words(zeros_GO, bits) - less * ONES[bits]
    return {
        "qweight": pack_words(codes_IO.T, bits).T.contiguous(),
        "qzeros": stored,
        "scales": scales_GO,
        "g_idx": index.int(),
    }


def unpack_words(words: Tensor, bits: int) -> Tensor:
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)


def dequantized_awq(tensors: Tensors) -> Tensor:
    """[in, out]: AutoAWQ's `dequantize_gemm`: unpack, put in order, (code − zero) · scale."""
    codes, zeros = (
        unpack_words(tensors[name], 4).unflatten(-1, (-1, 8))[..., AWQ_REVERSE_ORDER].flatten(-2)
        for name in ("qweight", "qzeros")
    )
    group = len(codes) // len(zeros)
    scales = tensors["scales"].repeat_interleave(group, 0)
    return (codes.to(torch.int8) - zeros.to(torch.int8).repeat_interleave(group, 0)) * scales


def dequantized_gptq(tensors: Tensors, *, bits: int, more: int) -> Tensor:
    """[in, out]: GPTQModel's formula, scale · (code − zero) by `g_idx`, after words of zeros of its
    first format were brought into the second."""
    codes = unpack_words(tensors["qweight"].T, bits).T
    zeros = unpack_words(tensors["qzeros"] + more * ONES[bits], bits)
    index = tensors["g_idx"].long()
    return tensors["scales"][index] * (codes - zeros[index])
