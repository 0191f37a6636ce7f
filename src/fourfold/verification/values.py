# SPDX-License-Identifier: Apache-2.0
"""Rules on the values of scales, all of which are read.

A block scale is one E4M3 byte, so a histogram of 256 bins describes a tensor of block scales
completely: zeros (0x00, 0x80), NaN (0x7F, 0xFF), signs, subnormals, the smallest and the largest.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from fourfold.formats.nvfp4.e4m3 import E4M3_MAX, E4M3_POSITIVE
from fourfold.models.names import LAYER_TENSOR
from fourfold.storage.names import CONFIG
from fourfold.storage.safetensors_header import TensorInfo
from fourfold.verification.checkpoint import Checkpoint, QuantizedLinear
from fourfold.verification.groups import fused_groups, input_site
from fourfold.verification.readers.base import (
    BLOCK_SCALE,
    GLOBAL_SCALE,
    INPUT_SCALE,
    KV_SCALES,
    WEIGHT,
)
from fourfold.verification.rules import Finding, finding
from fourfold.verification.streaming import CHUNK_BYTES, Workers

Histogram = npt.NDArray[np.int64]

_VALUES = np.array([0.0, *E4M3_POSITIVE.tolist()])
"""The values of bytes 0x00 to 0x7E."""
_NAN, _SIGN, _FIRST_NORMAL = 0x7F, 0x80, 8
_SMALLEST_NORMAL_E4M3 = 2.0**-6
_SMALLEST_NORMAL_FP32 = 2.0**-126
_BF16_MAX = float.fromhex("0x1.fep127")


def count(histogram: Histogram) -> dict[str, int]:
    """Count the kinds in a histogram of bytes, named as in `report.Counts`.

    NaN and 0 are neither negative nor subnormal.
    """
    magnitudes = histogram[:_SIGN] + histogram[_SIGN:]
    return {
        "block_scales": int(histogram.sum()),
        "zero_block_scales": int(magnitudes[0]),
        "nan_block_scales": int(magnitudes[_NAN]),
        "negative_block_scales": int(histogram[_SIGN + 1 : _SIGN + _NAN].sum()),
        "subnormal_block_scales": int(magnitudes[1:_FIRST_NORMAL].sum()),
    }


def check_block_scales(
    checkpoint: Checkpoint, workers: Workers
) -> tuple[dict[str, int], list[Finding]]:
    """Read every block scale of the sound linears; return counts and findings."""
    total = np.zeros(256, dtype=np.int64)
    groups: dict[str, Histogram] = defaultdict(lambda: np.zeros(256, dtype=np.int64))
    group_of = _groups(checkpoint)
    findings: list[Finding] = []

    def read(info: TensorInfo) -> Histogram:
        bins = np.zeros(256, dtype=np.int64)
        for start in range(0, info.nbytes, CHUNK_BYTES):
            size = min(CHUNK_BYTES, info.nbytes - start)
            data = workers.buffers.read("scales", checkpoint, info.key, start, size)
            bins += np.bincount(data, minlength=256)
        return bins

    work = workers.run(read, [linear.parts[BLOCK_SCALE] for linear in checkpoint.sound])
    for linear, (info, bins) in zip(checkpoint.sound, work, strict=True):
        total += bins
        groups[group_of.get(linear.name, linear.name)] += bins
        findings += _bad_bytes(info.key, bins)
        findings += _products(checkpoint, linear, bins)
    for name, bins in groups.items():
        findings += _flushed(name, bins)
    return count(total), findings


def _groups(checkpoint: Checkpoint) -> dict[str, str]:
    """Linear → the parameter that vLLM's Marlin path scales as a whole."""
    names = [linear.name for linear in checkpoint.sound]
    groups = fused_groups(names, checkpoint.peculiar)
    fused = {name: group[0] for group in groups for name in group}
    sites = ((name, input_site(name)) for name in names)
    return fused | {name: site for name, site in sites if site is not None}


def _bad_bytes(name: str, bins: Histogram) -> Iterator[Finding]:
    counts = count(bins)
    for kind in ("zero", "nan", "negative"):
        if bad := counts[f"{kind}_block_scales"]:
            text = f"{bad:,} of {counts['block_scales']:,} block scales"
            yield finding(f"block-scale-{kind}", name, text)


def _products(
    checkpoint: Checkpoint, linear: QuantizedLinear, bins: Histogram
) -> Iterator[Finding]:
    """Block scale × global scale stays in the range of floats."""
    scale = checkpoint.scale(linear, GLOBAL_SCALE)
    present = np.flatnonzero(bins[1:_NAN]) + 1
    if not 0 < scale < math.inf or not len(present):
        return
    smallest, largest = (float(_VALUES[byte]) for byte in (present[0], present[-1]))
    name = linear.parts[GLOBAL_SCALE].key
    if smallest * scale < _SMALLEST_NORMAL_FP32:
        yield finding("scale-product-underflow", name, f"{smallest:.3g} × {scale:.3g}")
    if 6 * largest * scale > _BF16_MAX:
        yield finding("scale-product-overflow", name, f"6 × {largest:.3g} × {scale:.3g}")


def _flushed(name: str, bins: Histogram) -> Iterator[Finding]:
    """No scale is below 2⁻⁶ after scaling up by the power of two that the largest leaves.

    vLLM's Marlin path multiplies a parameter's block scales by that power before it converts
    them to a format without subnormals.
    """
    present = np.flatnonzero(bins[1:_NAN]) + 1
    if not len(present):
        return
    largest = float(_VALUES[present[-1]])
    headroom = 2.0 ** math.floor(math.log2(E4M3_MAX / largest))
    flushed = int(bins[1:_NAN][_VALUES[1:_NAN] * headroom < _SMALLEST_NORMAL_E4M3].sum())
    if flushed:
        text = f"{flushed:,} of {int(bins.sum()):,} block scales, the largest is {largest:g}"
        yield finding("block-scale-subnormal", name, text)


def check_fp8_codes(checkpoint: Checkpoint, workers: Workers) -> Iterator[Finding]:
    """No code of an FP8 weight is NaN. A comparison with the source shows it, too."""

    def count_nan(info: TensorInfo) -> int:
        total = 0
        for start in range(0, info.nbytes, CHUNK_BYTES):
            size = min(CHUNK_BYTES, info.nbytes - start)
            codes = workers.buffers.read("codes", checkpoint, info.key, start, size)
            total += int(((codes & _NAN) == _NAN).sum())
        return total

    infos = [linear.parts[WEIGHT] for linear in checkpoint.fp8.values() if linear.is_sound]
    for info, total in workers.run(count_nan, infos):
        if total:
            yield finding("fp8-nan", info.key, f"{total:,} of {info.numel:,} codes")


def check_scalars(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Global and input scales are positive and finite."""
    for linear in checkpoint.linears.values():
        for part, rule in ((GLOBAL_SCALE, "global-scale"), (INPUT_SCALE, "input-scale")):
            info = linear.parts.get(part)
            if info is None or info.numel != 1 or info.dtype != "F32":
                continue
            value = checkpoint.scalar(info.key)
            if not 0 < value < math.inf:
                fault = "negative" if value else "zero"
                fault = fault if math.isfinite(value) else "nan"
                yield finding(f"{rule}-{fault}", info.key, f"{value:g}")
            elif not 0 < checkpoint.scale(linear, part) < math.inf:
                yield finding(f"{rule}-nan", info.key, f"{value:g}, whose reciprocal overflows")


_K_OR_V = re.compile(r"\.(k_proj|v_proj)$")


def check_kv_scales(checkpoint: Checkpoint) -> Iterator[Finding]:
    """k_scale and v_scale are one positive float32 each, come in pairs, and in all layers."""
    places: dict[str, set[str]] = defaultdict(set)
    for name, info in checkpoint.tensors.items():
        stem, _, leaf = name.rpartition(".")
        if leaf not in KV_SCALES:
            continue
        places[_K_OR_V.sub("", stem)].add(leaf)
        if info.dtype not in checkpoint.reader.kv_dtypes:
            yield finding("kv-scale-dtype", name, f"{info.dtype}, should be F32")
        if info.numel != 1:
            yield finding("kv-scale-shape", name, f"shape {list(info.shape)}, should be []")
        elif not 0 < checkpoint.scalar(name) < math.inf:
            yield finding("kv-scale-value", name, f"{checkpoint.scalar(name):g}")
    if not places:
        return
    if checkpoint.quant.kv_cache is None:
        text = f"{len(places)} layers have them, the config names no KV cache format"
        yield finding("kv-scale-unexpected", min(places), text)
    yield from _missing_kv(checkpoint, places)


def _missing_kv(checkpoint: Checkpoint, places: dict[str, set[str]]) -> Iterator[Finding]:
    kinds = {re.sub(r"\d+", "#", place) for place in places}
    linears = checkpoint.linears.keys() | checkpoint.kept
    attentions = {name.removesuffix(".k_proj") for name in linears if name.endswith(".k_proj")}
    alike = {
        place
        for place in attentions
        if re.sub(r"\d+", "#", place) in kinds and not _is_past_end(checkpoint, place)
    }
    for place in sorted(alike | places.keys()):
        for leaf in KV_SCALES:
            if leaf not in places.get(place, ()):
                text = f"missing, while {len(places)} layers have KV scales"
                yield finding("kv-scale-missing", f"{place}.{leaf}", text)


def _is_past_end(checkpoint: Checkpoint, place: str) -> bool:
    """True in an MTP layer that follows the decoder's: transformers cannot calibrate its cache."""
    layer, count = LAYER_TENSOR.match(f"{place}."), checkpoint.num_hidden_layers
    return layer is not None and count is not None and int(layer["number"]) >= count


def check_kv_cache(checkpoint: Checkpoint) -> Iterator[Finding]:
    """The KV cache has a format that engines know, and that attention of this kind can have."""
    kv_cache, config = checkpoint.quant.kv_cache, checkpoint.configs[0]
    if kv_cache is None:
        return
    if kv_cache.upper() not in ("FP8", "NVFP4"):
        yield finding("kv-cache-format", CONFIG, f"KV cache in {kv_cache}")
    if kv_cache.upper() == "NVFP4" and config.get("kv_lora_rank") is not None:
        yield finding("kv-cache-latent", CONFIG, f"kv_lora_rank {config['kv_lora_rank']}")


CHECKS = (check_scalars, check_kv_scales, check_kv_cache)
