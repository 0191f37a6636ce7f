"""Rules on what is there at all, judged by likeness: experts by experts, layers by layers.

No engine checks that every expert was loaded (vLLM counts per fused parameter), so a projection
that is missing from the files is a part of the model made of whatever the memory held.

With a source, none of this is asked: then it is known what must be there (`match`).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Container, Iterator, Mapping
from itertools import islice
from typing import Any

from fourfold.verification.checkpoint import EXPERT, Checkpoint
from fourfold.verification.rules import Finding, finding
from fourfold.verification.structure import LEFTOVER

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What configurations call the number of routed experts."""

_LAYER = re.compile(
    r"^(?P<stack>(?:.*?\.)?(?:\w*layers|\w*blocks|h))\.(?P<number>\d{1,9})\.(?P<rest>.+)$"
)
_SCALES = re.compile(r"\.(weight_scale|weight_scale_2|input_scale|k_scale|v_scale)$")

MOST_GAPS = 1000
"""How many missing layers, or experts of a layer, are listed."""

Module = dict[int, set[str]]
"""Expert number → its projections."""


def check_experts(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Experts count from 0 to n-1, and all have the same projections."""
    modules = _experts(checkpoint)
    if not modules:
        return
    stated = _expert_count(checkpoint.config)
    largest = max(max(module) + 1 for module in modules.values())
    for name, module in sorted(modules.items()):
        wanted = set().union(*module.values())
        count = stated if stated and stated >= largest else max(module) + 1
        for number in _gaps(module, count):
            text = f"missing: {len(module)} of {count} experts are there"
            yield finding("expert-missing", f"{name}.{number}", text)
        for number in sorted(module):
            for projection in sorted(wanted - module[number]):
                text = f"missing, while expert {number} has {', '.join(sorted(module[number]))}"
                yield finding("projection-missing", f"{name}.{number}.{projection}", text)


def _gaps(numbers: Container[int], count: int) -> Iterator[int]:
    """What `numbers` lacks of 0 … count-1; the first `MOST_GAPS`, for `count` may be any number."""
    missing = (number for number in range(count) if number not in numbers)
    return islice(missing, MOST_GAPS)


def _experts(checkpoint: Checkpoint) -> Mapping[str, Module]:
    modules: dict[str, Module] = defaultdict(lambda: defaultdict(set))
    for name in [*checkpoint.linears, *checkpoint.fp8, *checkpoint.kept]:
        if expert := EXPERT.match(name):
            modules[expert["module"]][int(expert["number"])].add(expert["projection"])
    return modules


def _expert_count(config: Mapping[str, Any]) -> int | None:
    stated = [part[name] for part in _configs(config) for name in EXPERT_COUNTS if name in part]
    return next((number for number in stated if isinstance(number, int)), None)


def _configs(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The text model's configuration, if it has one of its own, and the whole."""
    text = config.get("text_config")
    return [text, config] if isinstance(text, dict) else [config]


def check_layers(checkpoint: Checkpoint) -> Iterator[Finding]:
    """No layer is missing between the first and the last, nor the last ones."""
    stacks: dict[str, set[int]] = defaultdict(set)
    for name in checkpoint.tensors:
        if layer := _LAYER.match(name):
            stacks[layer["stack"]].add(int(layer["number"]))
    if not stacks:
        return
    stated = _configs(checkpoint.config)[0].get("num_hidden_layers")
    main = max(sorted(stacks), key=lambda stack: len(stacks[stack]))
    for stack, numbers in sorted(stacks.items()):
        count = max(numbers) + 1
        if stack == main and isinstance(stated, int):
            count = max(count, stated)
        for number in _gaps(numbers, count):
            text = f"missing: {len(numbers)} of {count} layers are there"
            yield finding("layer-missing", f"{stack}.{number}", text)


def check_siblings(checkpoint: Checkpoint) -> Iterator[Finding]:
    """No layer stands alone in lacking what a layer otherwise like it has.

    Layers of several makes (dense and sparse, attention of two kinds) are common, so a layer is
    suspicious only if no other holds just what it holds, and one holds all of that and more.
    """
    stacks: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in _layer_tensors(checkpoint):
        if layer := _LAYER.match(name):
            rest = EXPERT.sub(r"\g<module>", layer["rest"])
            stacks[layer["stack"]][int(layer["number"])].add(rest)
    for stack, layers in sorted(stacks.items()):
        makes = Counter(map(frozenset, layers.values()))
        for number, own in sorted(layers.items()):
            held = frozenset(own)
            larger = [make for make in makes if held < make] if makes[held] == 1 else []
            usual = min(larger, key=lambda make: (len(make), sorted(make)), default=frozenset())
            for rest in sorted(usual - held):
                text = f"missing; layers otherwise like this one that have it: {makes[usual]}"
                yield finding("sibling-missing", f"{stack}.{number}.{rest}", text)


def _layer_tensors(checkpoint: Checkpoint) -> Iterator[str]:
    """Every tensor but scales; a quantized linear counts by its weight, missing or not."""
    for name in checkpoint.tensors:
        stem, _, leaf = name.rpartition(".")
        of_linear = stem in checkpoint.linears and leaf != "bias"
        if not of_linear and not _SCALES.search(name) and not LEFTOVER.search(name):
            yield name
    yield from (f"{name}.weight" for name in checkpoint.linears)


CHECKS = (check_experts, check_layers, check_siblings)
