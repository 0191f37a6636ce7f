# SPDX-License-Identifier: Apache-2.0
"""Rules on linears that belong together: fused modules, input sites, ignore lists."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from fourfold.models.engines import Mismatch, Verdict, modules_of
from fourfold.models.fusion import KEEP_ALWAYS, fuse
from fourfold.models.names import EXPERT_LINEAR
from fourfold.models.peculiarities import Peculiarities
from fourfold.verification.checkpoint import DOWN, Checkpoint
from fourfold.verification.readers.base import GLOBAL_SCALE, INPUT_SCALE
from fourfold.verification.rules import Finding, finding

Group = tuple[str, ...]


def fused_groups(names: Iterable[str], peculiar: Peculiarities) -> list[Group]:
    """Return the groups of linears among `names` that engines load into one parameter.

    Members of a group are siblings: gate and up of one expert are a group, two experts are not.
    """
    siblings: dict[str, set[str]] = defaultdict(set)
    for name in names:
        parent, _, last = name.rpartition(".")
        siblings[parent].add(last)
    return [
        tuple(f"{parent}.{last}" for last in group)
        for parent, lasts in sorted(siblings.items())
        for _, group in fuse(lasts, peculiar.fused)
        if len(group) > 1
    ]


def input_site(linear: str) -> str | None:
    """Return the name of the experts' input site of `linear`; None outside of experts."""
    expert = EXPERT_LINEAR.match(linear)
    if expert is None:
        return None
    half = expert["projection"] if expert["projection"] in DOWN else "gate and up"
    return f"{expert['module']}.*.{half}"


def check_scale_groups(checkpoint: Checkpoint) -> Iterator[Finding]:
    """A fused module has one weight_scale_2 and one input_scale."""
    rules = {GLOBAL_SCALE: "group-scale-differs", INPUT_SCALE: "group-input-scale-differs"}
    for group in fused_groups(checkpoint.linears.keys() | checkpoint.kept, checkpoint.peculiar):
        for part, rule in rules.items():
            values = dict(_values(checkpoint, group, part))
            if len(set(values.values())) > 1:
                texts = (f"{name.rpartition('.')[2]} {x:.9g}" for name, x in values.items())
                tensor = checkpoint.tensor_name(next(iter(values)), part)
                yield finding(rule, tensor, ", ".join(texts))


def _values(checkpoint: Checkpoint, names: Iterable[str], part: str) -> Iterator[tuple[str, float]]:
    """The valid scales. Those that are NaN, zero or missing have findings of their own."""
    for name in names:
        linear = checkpoint.linears.get(name)
        info = linear.parts.get(part) if linear else None
        if linear and info and info.numel == 1 and info.dtype == "F32":
            value = checkpoint.scale(linear, part)
            if 0 < value < float("inf"):
                yield name, value


def check_input_sites(checkpoint: Checkpoint) -> Iterator[Finding]:
    """All experts that read the same activation have one input_scale."""
    sites: dict[str, list[str]] = defaultdict(list)
    for name in checkpoint.linears:
        site = input_site(name)
        if site is not None:
            sites[site].append(name)
    for site, names in sorted(sites.items()):
        values = [value for _, value in _values(checkpoint, names, INPUT_SCALE)]
        if len(set(values)) > _distinct_in_groups(checkpoint, names):
            text = f"{len(set(values))} values from {min(values):.6g} to {max(values):.6g}"
            yield finding("site-input-scale-differs", site, text)


def _distinct_in_groups(checkpoint: Checkpoint, names: Sequence[str]) -> int:
    """The number of values a site may have: 2 if a fused group in it differs, which is a finding
    of its own, else 1."""
    for group in fused_groups(names, checkpoint.peculiar):
        if len({value for _, value in _values(checkpoint, group, INPUT_SCALE)}) > 1:
            return 2
    return 1


def check_partial(checkpoint: Checkpoint) -> Iterator[Finding]:
    """All parts of a fused module, and all experts of a layer, are quantized, or none."""
    quantized = checkpoint.quantized
    for module in modules_of(sorted(quantized | checkpoint.kept), checkpoint.peculiar):
        packed = [name for name in module.members if name in quantized]
        if 0 < len(packed) < len(module.members):
            kept = min(set(module.members) - set(packed))
            text = f"{len(packed)} of {len(module.members)} parts are quantized; {kept} is not"
            yield finding("group-partial", module.name, text)


_RULES = {
    Verdict.QUANTIZED: "ignore-lacks-unquantized",
    Verdict.EXCLUDED: "ignore-excludes-quantized",
    Verdict.REFUSED: "ignore-refused",
    Verdict.OTHERWISE: "config-targets",
}
"""An engine's wrong verdict on a module → the rule."""


def check_ignore(checkpoint: Checkpoint, embeddings: frozenset[str] = frozenset()) -> list[Finding]:
    """Judge the ignore list under the matching of each engine.

    Linears that engines build unquantized whatever the checkpoint says need no entry. Nor do
    `embeddings`, whose names may not show what they are.
    """
    always = re.compile("|".join(KEEP_ALWAYS))
    kept = {name for name in checkpoint.kept - embeddings if not always.search(name)}
    quantized = checkpoint.quantized
    mismatches = checkpoint.reader.mismatches(sorted(quantized), sorted(kept), checkpoint.peculiar)
    by_place: dict[tuple[str, str], list[Mismatch]] = defaultdict(list)
    for mismatch in mismatches:
        rule = _RULES[mismatch.found]
        if mismatch.expected is Verdict.MIXED:
            continue  # `check_partial` has a finding for it
        is_refused = rule == "ignore-refused" and mismatch.pattern is not None
        place = mismatch.pattern if is_refused else mismatch.module
        by_place[rule, str(place)].append(mismatch)
    return [finding(rule, place, _by_engine(group)) for (rule, place), group in by_place.items()]


def _by_engine(mismatches: Sequence[Mismatch]) -> str:
    """The engines' verdicts on one module, or the modules on which one entry makes them fail."""
    if mismatches[0].found is Verdict.REFUSED:
        modules = sorted({mismatch.module for mismatch in mismatches})
        engines = sorted({str(mismatch.engine) for mismatch in mismatches})
        more = f" and {len(modules) - 1:,} more modules" if len(modules) > 1 else ""
        return f"{', '.join(engines)}: an error at {modules[0]}{more}"
    texts: dict[str, list[str]] = defaultdict(list)
    for mismatch in mismatches:
        why = f"by {mismatch.pattern!r}" if mismatch.pattern else "no entry names it"
        text = f"{mismatch.expected}, read as {mismatch.found} ({why})"
        if mismatch.engine not in texts[text]:
            texts[text].append(mismatch.engine)
    return "; ".join(f"{', '.join(engines)}: {text}" for text, engines in texts.items())


CHECKS = (check_scale_groups, check_input_sites, check_partial)
