"""Rules on files: the index, the shards, and the two configurations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fourfold.storage.names import INDEX
from fourfold.verification.checkpoint import Checkpoint
from fourfold.verification.quant_config import (
    CONFIG,
    HF_CONFIG,
    KNOWN_ALGOS,
    MIXED,
    W4A4,
    W4A16,
    QuantConfig,
)
from fourfold.verification.rules import Finding, finding

BLOCK_SIZE = 16


def check_index(checkpoint: Checkpoint) -> Iterator[Finding]:
    """The index and the shards hold the same names."""
    files, tensors = checkpoint.files, checkpoint.tensors
    if files.weight_map is None:
        if len(files.shards) > 1:
            yield finding("index-missing", INDEX, f"{len(files.shards)} files, no index")
        return
    for name in sorted(tensors.keys() - files.weight_map.keys()):
        yield finding("index-entry-missing", name, f"lies in {tensors[name].file.name}, not listed")
    for name, shard in sorted(files.weight_map.items()):
        if name not in tensors:
            yield finding("index-entry-wrong", name, f"listed in {shard}, in no shard")
        elif tensors[name].file != checkpoint.folder / shard:
            found = f"listed in {shard}, lies in {tensors[name].file.name}"
            yield finding("index-entry-wrong", name, found)


def check_total_size(checkpoint: Checkpoint) -> Iterator[Finding]:
    """The index's total_size is the sum of the tensors."""
    stated = checkpoint.files.total_size
    actual = sum(info.nbytes for info in checkpoint.tensors.values())
    if stated is not None and stated != actual:
        yield finding("index-total-size", INDEX, f"{stated:,} bytes stated, {actual:,} found")


def check_shards(checkpoint: Checkpoint) -> Iterator[Finding]:
    """No shard beside the index, no tensor twice."""
    for name in checkpoint.files.unlisted:
        yield finding("shard-unlisted", name, f"{INDEX} does not name it; it was not verified")
    for name, first, second in checkpoint.files.twice:
        yield finding("tensor-twice", name, f"lies in {first} and in {second}")


def check_presence(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Both files speak of the quantization."""
    if checkpoint.flat is None:
        algo = checkpoint.quant.algo
        rule = "config-nested-w4a16" if algo == W4A16 else "config-only-nested"
        yield finding(rule, CONFIG, f"no quantization_config; {HF_CONFIG} says {algo}")
    elif checkpoint.flat.nested and checkpoint.flat.algo == W4A16:
        yield finding("config-nested-w4a16", CONFIG, "quantization_config has the nested form")
    if checkpoint.nested is None:
        yield finding("hf-quant-config-missing", HF_CONFIG, "no such file")


def check_agreement(checkpoint: Checkpoint) -> Iterator[Finding]:
    """config.json and hf_quant_config.json say the same."""
    flat, nested = checkpoint.flat, checkpoint.nested
    if flat is None or nested is None:
        return
    fields: dict[str, tuple[object, object]] = {
        "quant_algo": (flat.algo, nested.algo),
        "kv_cache": (flat.kv_cache, nested.kv_cache),
        "quantized_layers": (dict(flat.layers), dict(nested.layers)),
    }
    if flat.group_size is not None and nested.group_size is not None:
        fields["group_size"] = (flat.group_size, nested.group_size)
    for name, (ours, theirs) in fields.items():
        if ours != theirs:
            text = f"{name}: {_short(ours)} here, {_short(theirs)} in {HF_CONFIG}"
            yield finding("config-disagrees", CONFIG, text)
    only_flat = sorted(set(flat.ignore) - set(nested.ignore))
    only_nested = sorted(set(nested.ignore) - set(flat.ignore))
    for names, where in ((only_flat, CONFIG), (only_nested, HF_CONFIG)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            text = f"ignore: {names[0]}{more} in {where} only"
            yield finding("config-disagrees", CONFIG, text)


def _short(value: object) -> str:
    text = "nothing" if value in (None, {}) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def check_quantization(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Method, algorithm, group size and groups of each file."""
    for quant in (checkpoint.flat, checkpoint.nested):
        if quant is None:
            continue
        if quant.algo not in KNOWN_ALGOS:
            yield finding("quant-algo", quant.file, f"quant_algo {quant.algo}")
        yield from _group_sizes(quant)
    flat = checkpoint.flat
    if flat is not None:
        if not (flat.method or "").startswith("modelopt"):
            yield finding("quant-method", CONFIG, f"quant_method {flat.method}")
        if flat.algo in (W4A4, W4A16):
            yield from _groups(flat)


def _group_sizes(quant: QuantConfig) -> Iterator[Finding]:
    if quant.group_size not in (None, BLOCK_SIZE):
        yield finding("group-size", quant.file, f"group_size {quant.group_size}")
    for layer, size in sorted(quant.layer_group_sizes.items()):
        if "NVFP4" in quant.layers[layer] and size != BLOCK_SIZE:
            yield finding("group-size", layer, f"group_size {size} in {quant.file}")


def _groups(quant: QuantConfig) -> Iterator[Finding]:
    for name, group in sorted(quant.groups.items()):
        weights, inputs = group.get("weights"), group.get("input_activations")
        if not _is_nvfp4(weights):
            yield finding("config-groups", CONFIG, f"{name}.weights: {_short(weights)}")
        fits = _is_nvfp4(inputs) if quant.algo == W4A4 else not inputs
        if not fits:
            text = f"{name}.input_activations: {_short(inputs)}, while quant_algo is {quant.algo}"
            yield finding("config-groups", CONFIG, text)


def _is_nvfp4(scheme: Mapping[str, Any] | None) -> bool:
    return isinstance(scheme, dict) and (
        scheme.get("num_bits"),
        scheme.get("type"),
        scheme.get("group_size"),
    ) == (4, "float", BLOCK_SIZE)


def check_quantized_layers(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Under MIXED_PRECISION, the names in the configuration are those of the tensors."""
    quant = checkpoint.quant
    if quant.algo != MIXED:
        return
    for name, linear in checkpoint.linears.items():
        if linear.algo is None or "NVFP4" not in linear.algo:
            text = f"packed like NVFP4, quantized_layers says {linear.algo or 'nothing'}"
            yield finding("quantized-layers", name, text)
    packed = checkpoint.linears.keys() | checkpoint.fp8
    around = {prefix for name in packed for prefix in _prefixes(name)}
    for layer in sorted(quant.layers.keys() - around):
        text = f"quantized_layers says {quant.layers[layer]}, no tensor of it is quantized"
        yield finding("quantized-layers", layer, text)


def _prefixes(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]


CHECKS = (
    check_index,
    check_total_size,
    check_shards,
    check_presence,
    check_agreement,
    check_quantization,
    check_quantized_layers,
)
