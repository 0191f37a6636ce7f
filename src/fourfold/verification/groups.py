"""Rules on linears that belong together: fused modules, input sites, ignore lists."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from fourfold.models.engines import Mismatch, Module, Verdict, check, modules_of
from fourfold.models.fusion import KEEP_ALWAYS, fuse
from fourfold.verification.checkpoint import DOWN, EXPERT, GLOBAL_SCALE, INPUT_SCALE, Checkpoint
from fourfold.verification.quant_config import MIXED
from fourfold.verification.rules import Finding, finding

Group = tuple[str, ...]


def fused_groups(names: Iterable[str]) -> list[Group]:
    """The linears that engines load into one parameter, of each group the members present.

    Siblings only: gate and up of one expert are a group, two experts are not.
    """
    siblings: dict[str, set[str]] = defaultdict(set)
    for name in names:
        parent, _, last = name.rpartition(".")
        siblings[parent].add(last)
    return [
        tuple(f"{parent}.{last}" for last in group)
        for parent, lasts in sorted(siblings.items())
        for _, group in fuse(lasts)
        if len(group) > 1
    ]


def input_site(linear: str) -> str | None:
    """The name of the experts' input site that `linear` belongs to; None outside of experts."""
    expert = EXPERT.match(linear)
    if expert is None:
        return None
    half = expert["projection"] if expert["projection"] in DOWN else "gate and up"
    return f"{expert['module']}.*.{half}"


def check_scale_groups(checkpoint: Checkpoint) -> Iterator[Finding]:
    """One weight_scale_2 and one input_scale in a fused module."""
    names = checkpoint.linears.keys() | checkpoint.kept
    for group in fused_groups(names):
        for part, rule in (
            (GLOBAL_SCALE, "group-scale-differs"),
            (INPUT_SCALE, "group-input-scale-differs"),
        ):
            yield from _differences(checkpoint, group, part, rule)


def _differences(checkpoint: Checkpoint, group: Group, part: str, rule: str) -> Iterator[Finding]:
    values = dict(_values(checkpoint, group, part))
    if len(set(values.values())) > 1:
        text = ", ".join(f"{name.rpartition('.')[2]} {value:.9g}" for name, value in values.items())
        yield finding(rule, f"{next(iter(values))}.{part}", text)


def _values(checkpoint: Checkpoint, names: Iterable[str], part: str) -> Iterator[tuple[str, float]]:
    """Valid scales only: what is NaN, zero or missing has a finding of its own."""
    for name in names:
        linear = checkpoint.linears.get(name)
        info = linear.parts.get(part) if linear else None
        if info is not None and info.numel == 1 and info.dtype == "F32":
            value = checkpoint.scalar(f"{name}.{part}")
            if 0 < value < float("inf"):
                yield name, value


def check_input_sites(checkpoint: Checkpoint) -> Iterator[Finding]:
    """One input_scale for all experts that read the same activation."""
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
    """How many values the site may have: more than 1 only where a fused group differs in itself,
    which is a finding already."""
    for group in fused_groups(names):
        if len({value for _, value in _values(checkpoint, group, INPUT_SCALE)}) > 1:
            return 2
    return 1


def check_partial(checkpoint: Checkpoint) -> Iterator[Finding]:
    """A fused module, and a layer's experts, are quantized wholly or not at all."""
    quantized = checkpoint.linears.keys() | checkpoint.fp8
    for module in modules_of(sorted(quantized | checkpoint.kept)):
        packed = [name for name in module.members if name in quantized]
        if 0 < len(packed) < len(module.members):
            yield finding("group-partial", module.name, _partial(module, packed))


def _partial(module: Module, packed: Sequence[str]) -> str:
    kept = sorted(set(module.members) - set(packed))
    return f"{len(packed)} of {len(module.members)} parts are quantized; {kept[0]} is not"


_RULES = {
    Verdict.QUANTIZED: "ignore-lacks-unquantized",
    Verdict.EXCLUDED: "ignore-excludes-quantized",
    Verdict.REFUSED: "ignore-refused",
}
"""What an engine takes a module for, wrongly → the rule."""


def check_ignore(checkpoint: Checkpoint, embeddings: frozenset[str] = frozenset()) -> list[Finding]:
    """The ignore list under the three engines' matching.

    Linears that engines build unquantized whatever the checkpoint says need not be listed; nor
    does anything under MIXED_PRECISION, where `quantized_layers` names what is quantized.
    """
    always = re.compile("|".join(rule.pattern for rule in KEEP_ALWAYS))
    kept = {name for name in checkpoint.kept - embeddings if not always.search(name)}
    quantized = checkpoint.linears.keys() | checkpoint.fp8
    mismatches = check(checkpoint.quant.ignore, sorted(quantized), sorted(kept))
    found = [
        (_RULES[mismatch.found], mismatch)
        for mismatch in mismatches
        if mismatch.expected is not Verdict.MIXED
    ]
    if checkpoint.quant.algo == MIXED:
        found = [pair for pair in found if pair[0] != "ignore-lacks-unquantized"]
    by_place: dict[tuple[str, str], list[Mismatch]] = defaultdict(list)
    for rule, mismatch in found:
        place = mismatch.pattern if rule == "ignore-refused" else mismatch.module
        by_place[rule, str(place)].append(mismatch)
    return [finding(rule, place, _by_engine(group)) for (rule, place), group in by_place.items()]


def _by_engine(mismatches: Sequence[Mismatch]) -> str:
    """What the engines do with one module; or on which modules they fail with one entry."""
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
