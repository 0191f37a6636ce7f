# SPDX-License-Identifier: Apache-2.0
"""Whether vLLM loaded a checkpoint exactly: poisoned parameters, compared after loading.

Every parameter is filled with NaN before its weights are loaded. Afterwards each is dequantized and
compared with the checkpoint row by row, by content alone: every row of an engine's matrix must be a
row of the checkpoint, and every row of a quantized linear of the checkpoint must have a place in
the engine, in the same layer and expert. So nothing must be known of how an engine names or fuses
its layers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
FP8 = torch.float8_e4m3fn
NOT_STORED = re.compile(r"(^|[._])(k|v|q|prob)_scale$")
"""Scales that vLLM sets itself where the checkpoint has none."""

Tensors = dict[str, Tensor]


# --- matrices ------------------------------------------------------------------------------------


def dequantize(weight: Tensor, scale: Tensor, scale_2: Tensor | None) -> Tensor:
    """Return the values of a packed or FP8 matrix [out, in], in float32."""
    rows, columns = weight.shape
    if weight.dtype == torch.uint8:
        codes = torch.stack((weight & 15, weight >> 4), -1).flatten(-2).long()
        assert scale_2 is not None
        return E2M1[codes] * (scale.float() * scale_2).repeat_interleave(16, -1)
    values = weight.float()
    if scale.dtype == torch.uint8:  # MXFP8
        return values * torch.exp2(scale.float() - 127).repeat_interleave(32, -1)
    if scale.numel() in (1, rows):
        return values * scale.reshape(-1, 1)
    blocks = scale.reshape(-(-rows // 128), -(-columns // 128))
    return values * blocks.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]


def read_checkpoint(folder: Path) -> tuple[Tensors, Tensors, set[str], set[float]]:
    """Return a checkpoint's quantized linears and other matrices, the names of its vectors as
    `_tail` has them, and its input scales."""
    tensors: Tensors = {}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for name in sorted(set(index["weight_map"].values())):
        with safe_open(folder / name, "pt") as shard:
            tensors |= {key: shard.get_tensor(key) for key in shard.keys()}  # noqa: SIM118
    quantized, others = {}, {}
    for key, tensor in tensors.items():
        stem = key.removesuffix(".weight")
        if f"{stem}.weight_scale" in tensors:
            if stem != key:
                scale, scale_2 = (
                    tensors[f"{stem}.weight_scale"],
                    tensors.get(f"{stem}.weight_scale_2"),
                )
                quantized[stem] = dequantize(tensor, scale, scale_2)
        elif tensor.ndim > 1 and tensor.is_floating_point() and "scale" not in key:
            others[key] = tensor.float()
        if key.endswith("A_log"):  # which vLLM keeps as a column, or as A
            others[f"{key}, a column"] = tensor.float().reshape(-1, 1)
            others[f"-exp({key})"] = -tensor.float().exp().reshape(-1, tensor.shape[-1])
    vectors = {_tail(key) for key, tensor in tensors.items() if tensor.ndim < 2}
    inputs = {float(x) for key, x in tensors.items() if key.endswith(".input_scale")}
    return quantized, others, vectors, inputs


def engine_matrices(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield name, values [out, in] and whether quantized, of every matrix; experts one by one."""
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        for name, value in own.items():
            value, prefix = value.data, name.removesuffix("weight")
            scale, scale_2 = own.get(f"{name}_scale"), own.get(f"{name}_scale_2")
            if scale is None:
                if value.ndim > 1 and value.is_floating_point() and "scale" not in name:
                    yield f"{path}.{name}", value.float(), False
            elif value.ndim == 3:  # experts
                for expert in range(len(value)):
                    of_expert = None if scale_2 is None else scale_2.data[expert]
                    rows = _by_row(of_expert, value.shape[1], None)
                    matrix = dequantize(value[expert], scale.data[expert], rows)
                    yield f"{path}.{expert}.{prefix}", matrix, True
            else:
                widths = getattr(module, "logical_widths", None)
                scales = scale.data
                if scales.ndim == 1 and widths and len(scales) == len(widths):
                    scales = _by_row(scales, len(value), widths)
                rows = _by_row(None if scale_2 is None else scale_2.data, len(value), widths)
                yield f"{path}.{name}", dequantize(value, scales, rows), True


def _by_row(scale: Tensor | None, rows: int, widths: list[int] | None) -> Tensor | None:
    """Return a scale for each row, [rows, 1], from one for each part of a fused matrix."""
    if scale is None:
        return None
    scale = scale.reshape(-1)
    repeats = torch.tensor(widths) if widths and len(widths) == len(scale) else rows // len(scale)
    return scale.repeat_interleave(repeats).reshape(-1, 1)


# --- poison and proof ----------------------------------------------------------------------------


def poison(model: nn.Module) -> Tensors:
    """Fill every floating-point parameter with NaN; return what was there."""
    before = {}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not NOT_STORED.search(name):
            before[name] = parameter.data.clone()
            parameter.data.copy_(torch.full_like(parameter.data.float(), torch.nan))
    return before


def faults(model: nn.Module, folder: Path, before: Tensors) -> tuple[list[str], list[str]]:
    """Compare the loaded model with the checkpoint.

    Return what is wrong, and the vectors that are not in the checkpoint, which get back what they
    had before.
    """
    quantized, others, vectors, inputs = read_checkpoint(folder)
    found, kept = _unloaded(model, before, vectors, unread=_unread_scales(model, folder))
    return [*found, *_misplaced(model, quantized, others), *_strange_scales(model, inputs)], kept


def _misplaced(model: nn.Module, quantized: Tensors, others: Tensors) -> list[str]:
    """Return what is wrong with the matrices."""
    known = _rows_of({**others, **quantized})
    found: list[str] = []
    placed: set[tuple[str, bytes]] = set()
    seen: set[bytes] = set()
    for name, matrix, is_quantized in engine_matrices(model):
        rows = [] if matrix.isnan().any() else _fingerprints(matrix)
        seen |= set(rows)
        strange = sum(row not in known for row in rows)
        if strange:
            found.append(f"{name}: {strange} of {len(rows)} rows are not in the checkpoint")
        elif is_quantized:
            homes = [[n for n in known[row] if _numbers(n) == _numbers(name)] for row in rows]
            placed |= {(n, row) for row, names in zip(rows, homes, strict=True) for n in names}
            if not all(homes):
                found.append(f"{name}: has rows of another layer or expert")
    for name, matrix in {**quantized, **others}.items():
        rows = _fingerprints(matrix)
        if name in quantized:
            missing = sum((name, row) not in placed for row in rows)
        else:  # the engine may have no module for it
            missing = sum(row not in seen for row in rows) % len(rows)
        if missing:
            found.append(f"{name}: {missing} of {len(rows)} rows have no place in the engine")
    return found


def _strange_scales(model: nn.Module, inputs: set[float]) -> list[str]:
    return [
        f"{name}: input scales that are not in the checkpoint"
        for name, parameter in model.named_parameters()
        if name.endswith("input_scale")
        and not inputs.issuperset(x for x in parameter.data.flatten().tolist() if x == x)
    ]


def _unloaded(
    model: nn.Module, before: Tensors, vectors: set[str], unread: set[str]
) -> tuple[list[str], list[str]]:
    """Return the parameters that hold NaN, and the vectors that did and were given back."""
    found, kept = [], []
    for name, parameter in model.named_parameters():
        nan = parameter.data.float().isnan()
        if name not in before or name in unread or not nan.any():
            continue
        is_vector = parameter.ndim < 2 and "scale" not in name
        if is_vector and nan.all() and _tail(name) not in vectors:
            parameter.data.copy_(before[name])
            kept.append(name)
        else:
            found.append(f"{name}: not loaded")
    return found, kept


def _unread_scales(model: nn.Module, folder: Path) -> set[str]:
    """Return the input scales of W4A16 layers, for which a checkpoint has none."""
    if "W4A16_NVFP4" not in (folder / "config.json").read_text():
        return set()
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if any(x.dtype == torch.uint8 for x in module.parameters(recurse=False))
        for name, _ in module.named_parameters(recurse=False)
        if name.endswith("input_scale")
    }


def _tail(name: str) -> str:
    """What a vector is called in its layer, by whatever modules it lies in."""
    parts = name.split(".")
    count = 2 if parts[-1] in ("weight", "bias") else 1
    return ".".join([*_numbers(name), *parts[-count:]])


def _numbers(name: str) -> list[str]:
    return re.findall(r"(?<=\.)\d+(?=\.)", f".{name}.")


def _fingerprint(row: Tensor) -> bytes:
    return (row + 0.0).numpy().tobytes()  # -0.0 and 0.0 are one value


def _fingerprints(matrix: Tensor) -> list[bytes]:
    return [_fingerprint(row) for row in matrix.detach().cpu().reshape(-1, matrix.shape[-1])]


def _rows_of(matrices: Tensors) -> dict[bytes, list[str]]:
    rows: dict[bytes, list[str]] = {}
    for name, matrix in matrices.items():
        for row in _fingerprints(matrix):
            rows.setdefault(row, []).append(name)
    return rows
