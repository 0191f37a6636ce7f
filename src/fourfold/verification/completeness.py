# SPDX-License-Identifier: Apache-2.0
"""Rules on completeness, judged by comparing experts with experts and layers with layers.

No engine checks that every expert was loaded (vLLM counts per fused parameter), so a projection
that is missing from the files becomes whatever the memory held.

These rules are not used with a source, which says exactly what must be there (`match`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Container, Iterator, Mapping
from itertools import islice

from fourfold.models.names import EXPERT_LINEAR, LAYER_TENSOR
from fourfold.verification.checkpoint import Checkpoint
from fourfold.verification.readers.base import KV_SCALES
from fourfold.verification.rules import Finding, finding

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""The fields of configurations that state the number of routed experts."""

MOST_GAPS = 1000
"""At most this many missing layers, or experts of a layer, are listed."""

Module = dict[int, set[str]]
"""Expert number → its projections."""


def check_experts(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Experts count from 0 to n-1, and all have the same projections."""
    modules = _experts(checkpoint)
    if not modules:
        return
    counts = [part[name] for part in checkpoint.configs for name in EXPERT_COUNTS if name in part]
    stated = next((number for number in counts if isinstance(number, int)), None)
    largest = max(max(module) + 1 for module in modules.values())
    for name, module in sorted(modules.items()):
        projections = set().union(*module.values())
        count = stated if stated and stated >= largest else max(module) + 1
        for number in _gaps(module, count):
            text = f"missing: {len(module)} of {count} experts are there"
            yield finding("expert-missing", f"{name}.{number}", text)
        for number in sorted(module):
            for projection in sorted(projections - module[number]):
                text = f"missing, while expert {number} has {', '.join(sorted(module[number]))}"
                yield finding("projection-missing", f"{name}.{number}.{projection}", text)


def _gaps(numbers: Container[int], count: int) -> Iterator[int]:
    """The first numbers in 0 … count-1 that are missing. `count` may come from a config file."""
    missing = (number for number in range(count) if number not in numbers)
    return islice(missing, MOST_GAPS)


def _experts(checkpoint: Checkpoint) -> Mapping[str, Module]:
    modules: dict[str, Module] = defaultdict(lambda: defaultdict(set))
    for name in [*checkpoint.linears, *checkpoint.fp8, *checkpoint.kept]:
        if expert := EXPERT_LINEAR.match(name):
            modules[expert["module"]][int(expert["number"])].add(expert["projection"])
    return modules


def check_layers(checkpoint: Checkpoint) -> Iterator[Finding]:
    """No layer is missing up to the number of layers in the config."""
    stacks: dict[str, set[int]] = defaultdict(set)
    for name in checkpoint.tensors:
        if layer := LAYER_TENSOR.match(name):
            stacks[layer["stack"]].add(int(layer["number"]))
    if not stacks:
        return
    stated = checkpoint.num_hidden_layers
    main = max(sorted(stacks), key=lambda stack: len(stacks[stack]))
    for stack, numbers in sorted(stacks.items()):
        count = max(numbers) + 1
        if stack == main and stated is not None:
            count = max(count, stated)
        for number in _gaps(numbers, count):
            text = f"missing: {len(numbers)} of {count} layers are there"
            yield finding("layer-missing", f"{stack}.{number}", text)


def check_siblings(checkpoint: Checkpoint) -> Iterator[Finding]:
    """No layer alone lacks a tensor that a layer otherwise like it has.

    Layers of several kinds (dense and sparse, attention of two kinds) are common. So a layer is
    suspicious only if no other has exactly its tensors, and another has all of them and more.
    """
    stacks: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in _layer_tensors(checkpoint):
        if layer := LAYER_TENSOR.match(name):
            rest = EXPERT_LINEAR.sub(r"\g<module>", layer["rest"])
            stacks[layer["stack"]][int(layer["number"])].add(rest)
    for stack, layers in sorted(stacks.items()):
        kinds = Counter(map(frozenset, layers.values()))
        for number, names in sorted(layers.items()):
            own = frozenset(names)
            larger = [kind for kind in kinds if own < kind] if kinds[own] == 1 else []
            usual = min(larger, key=lambda kind: (len(kind), sorted(kind)), default=frozenset())
            for rest in sorted(usual - own):
                text = f"missing; layers otherwise like this one that have it: {kinds[usual]}"
                yield finding("sibling-missing", f"{stack}.{number}.{rest}", text)


def _layer_tensors(checkpoint: Checkpoint) -> Iterator[str]:
    """Every tensor except scales. A quantized linear counts by its weight, even if missing."""
    reader = checkpoint.reader
    scales = {*reader.scales, *KV_SCALES}
    for name in checkpoint.tensors:
        stem, _, leaf = name.rpartition(".")
        of_linear = stem in checkpoint.linears and leaf != "bias"
        if not of_linear and leaf not in scales and not reader.leftover.search(name):
            yield name
    yield from (f"{name}.weight" for name in checkpoint.linears)


CHECKS = (check_experts, check_layers, check_siblings)
