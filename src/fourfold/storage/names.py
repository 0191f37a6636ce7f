# SPDX-License-Identifier: Apache-2.0
"""Names of the files of a checkpoint."""

from __future__ import annotations

from pathlib import Path

CONFIG = "config.json"

INDEX = "model.safetensors.index.json"

SINGLE = "model.safetensors"

OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".tflite")

WEIGHT_SUFFIXES = frozenset({".safetensors", *OTHER_WEIGHTS})
"""Files that hold weights. Those that are not shards of the checkpoint are other copies of it."""

MEGATRON = (".metadata", "latest_checkpointed_iteration.txt")
"""Files of Megatron's checkpoints, which are another kind of source."""

SUMMARY = "quant_summary.json"
"""Lies in the folder of a finished run, and lists what the run wrote under `files`."""

STATISTICS = "calibration.safetensors"
"""The statistics of calibration. Engines ignore the file, as the index does not name it."""

FOLDS = "folds.fourfold"
"""The factors that were moved between a checkpoint's weights before they were quantized, in
safetensors' format. Engines take every `*.safetensors` for a shard, so it is not called so."""

REPORT = "report.html"

CARD = "README.md"
"""The model card. The output has its own, and keeps the source's as `SOURCE_CARD`."""

SOURCE_CARD = "SOURCE_README.md"

HF_QUANT_CONFIG = "hf_quant_config.json"
"""ModelOpt's description of a quantization, which TensorRT-LLM reads first."""

OWN_FILES = frozenset({CONFIG, INDEX, HF_QUANT_CONFIG, "quantize_config.json", "quant_config.json"})
"""Files that describe a checkpoint's weights: the output has its own."""


def hub_id(folder: Path) -> str | None:
    """Return the name on the hub of a folder in the hub's cache; None for any other folder."""
    snapshots = folder.absolute().parent
    cache = snapshots.parent.name
    if snapshots.name != "snapshots" or not cache.startswith("models--"):
        return None
    return cache.removeprefix("models--").replace("--", "/", 1)


def storable(name: str) -> str:
    """Return a file's name as text that UTF-8 can hold, with all other bytes escaped."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
