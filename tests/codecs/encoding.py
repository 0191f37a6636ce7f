# SPDX-License-Identifier: Apache-2.0
"""How tests make quantized checkpoints: encode one in BF16, and let its own values be the decoded
ones, so that whatever is done to both must give the same bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fourfold
from fourfold.sources.decoded import DecodedSource
from jobs import ids_file
from nvfp4_folders import tensors_of

Tensors = dict[str, Tensor]

Encoder = Callable[[str, Tensor], tuple[Tensors, Tensor] | None]
"""From a weight's key and its value to the tensors that store it, and the value that they mean;
None for a tensor that stays as it is."""

W4A16 = "w4a16_nvfp4_experts_only_mse"
W4A4 = "nvfp4_experts_only"

SHARD = "model.safetensors"


def encode(folder: Path, out: Path, quantization: Mapping[str, Any], encoder: Encoder) -> None:
    """Write `folder`, a checkpoint of one file, in another form into `out`, with
    `quantization_config` and in it the modules that stay as they are, and replace its own values by
    those that the form could hold."""
    shutil.copytree(folder, out)
    tensors = load_file(folder / SHARD)
    stored: Tensors = {}
    kept = []
    for key, value in tensors.items():
        form = encoder(key, value)
        if form is None:
            kept.append(key.removesuffix(".weight"))
        parts, tensors[key] = ({key: value}, value) if form is None else form
        stored |= {name: part.contiguous() for name, part in parts.items()}
    assert stored.keys() != tensors.keys()
    change_config(out, quantization_config={"modules_to_not_convert": kept, **quantization})
    save_file(stored, out / SHARD, metadata={"format": "pt"})
    save_file(tensors, folder / SHARD, metadata={"format": "pt"})


def is_linear(key: str, value: Tensor) -> bool:
    """True for the weights that publishers quantize: no embeddings, routers, biases or norms."""
    kept = (
        "embed",
        "lm_head",
        "head.weight",
        "mlp.gate.weight",
        "router",
        "norm",
        "conv",
        "bias",
        "scale",
    )
    is_kept = any(part in key for part in (*kept, "visual", "vision"))
    return value.ndim in (2, 3) and value.dtype == torch.bfloat16 and not is_kept


def change_config(folder: Path, **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


def change_tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / SHARD)
    change(tensors)
    save_file(tensors, folder / SHARD, metadata={"format": "pt"})


def folder_of(folder: Path, tensors: Tensors, config: Mapping[str, Any] | None = None) -> Path:
    """A checkpoint of these tensors alone."""
    folder.mkdir(parents=True)
    save_file(tensors, folder / SHARD, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16"} | dict(config or {})))
    return folder


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, as which NaN and the sign of zero count, too."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def as_stored(
    source: DecodedSource, key: str, start: int = 0, stop: int | None = None
) -> torch.Tensor:
    """What a codec makes of some rows, with the NaN and Inf that a source refuses."""
    info, codec = source.tensors[key], source.codec_of(key)
    stop = info.rows if stop is None else stop
    out = torch.empty((stop - start, *info.shape[1:]), dtype=info.torch_dtype)
    assert codec is not None
    codec.decode(source.weights[key], start, stop, source.source.slab, out)
    return out


def quantize_both(folder: Path, encoded: Path, out: Path, recipe: str) -> fourfold.Result:
    """Quantize both checkpoints, check that the outputs are alike, byte for byte, and verify the
    one of `encoded` against its source; returns that run's result."""
    out.mkdir()
    wanted, made, calibration = out / "wanted", out / "made", None
    if recipe == W4A4:
        calibration = fourfold.CalibrationConfig(ids_file(out), calib_size=8, calib_seq=24)
    reference = fourfold.quantize(folder, wanted, recipe, calibration=calibration)
    result = fourfold.quantize(encoded, made, recipe, calibration=calibration)
    assert result.clean, str(result.report)
    assert len(result.linears) == len(reference.linears) > 0
    tensors, expected = tensors_of(made), tensors_of(wanted)
    assert tensors.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(bits(tensors[key]), bits(tensor)), key
    configs = [json.loads((path / "config.json").read_text()) for path in (made, wanted)]
    assert configs[0] == configs[1]
    report = fourfold.verify(made, source=encoded)
    assert report.clean, str(report)
    return result
