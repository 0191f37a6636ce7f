# SPDX-License-Identifier: Apache-2.0
"""The rules by which readers of the compressed-tensors layout decide which layers are quantized.

A checkpoint in this layout has `config_groups`, each with `targets`, and a list `ignore`. An entry
of either is a module's name, or `re:` and a regular expression that must match from the beginning
of a name (`re.match`). A layer that `ignore` names is left alone; any other one is in the group
whose targets name it, or else name its class.

                            vLLM                    SGLang                  compressed-tensors
    a name, in `ignore`     that module             and any whose dotted    that module
                                                    name ends in it
    the target Linear       all linear layers, and  the same                all linear layers
                            experts; no head
    a fused module          its own name, or all    all parts, unless its   has none: each part
                            of its parts; some is   own name is listed; by itself
                            an error                some is an error
    experts of a layer      expert 0's projections  expert 0's gate_proj,   each expert's linear
                            by the family's names,  up_proj, down_proj,     layers by their names
                            `None` without a gate   whatever the names are
    no group                unquantized             an error                unquantized
    order of targets        name, parts, class      name, class, parts      name, pattern, class

The last column is the library, by which transformers and llm-compressor go. Both engines rename the
names in these lists as they rename tensors (`model.language_model.` → `language_model.model.`), but
not what follows `re:`. So `write_ignore` lists full names, the parts and the own name of a fused
module; for experts, whose names in the engines need not be those of the checkpoint, it writes one
expression for a layer's experts that leaves the beginning of the name open.

Read from vLLM 0.33.0 (compressed_tensors.py, compressed_tensors_moe.py, config_utils.py), SGLang
0.5.23 (compressed_tensors.py and its utils.py) and compressed-tensors 0.20.1 (utils/match.py).
TensorRT-LLM and ModelOpt's loaders do not read this layout.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fourfold.errors import PlanError
from fourfold.models.engines import Mismatch, Module, Ruling, Verdict, modules_of
from fourfold.models.families import Engine, ExpertNames
from fourfold.models.names import EXPERT_LINEAR
from fourfold.models.peculiarities import NONE, Peculiarities

LIBRARY = "compressed-tensors"
"""The reader that is no engine: the library itself, in transformers."""

LINEAR = "Linear"
"""The target that means every linear layer."""

READERS: tuple[Engine, ...] = (Engine.VLLM, Engine.SGLANG)
"""The engines that read this layout."""

HEAD = "lm_head"
"""The last name of a head, which the engines' target Linear does not cover."""

_HEADS = re.compile(rf"(^|\.){HEAD}$|^output$")
"""Heads, by their names in checkpoints: Mistral's `output` is renamed."""

_PREFIX = "re:"
_USUAL = ExpertNames("gate_proj", "up_proj", "down_proj")
_WRAPPER = r"((model|language_model|text_model|thinker|backbone|transformer)\.)"
"""Names of modules around a decoder, which engines exchange for others."""
_ANYTHING = r"(.*\.)?"


class Entries:
    """The entries of `ignore` or of a group's targets, for lookups of names."""

    def __init__(self, entries: Iterable[str]) -> None:
        """Compile the entries that are expressions."""
        ordered = list(dict.fromkeys(entries))
        self.names = frozenset(entry for entry in ordered if not entry.startswith(_PREFIX))
        self.patterns: list[tuple[str, Callable[[str], object]]] = []
        self.broken: str | None = None
        """An entry that no reader can compile."""
        for entry in ordered:
            if entry.startswith(_PREFIX):
                self._compile(entry)

    def _compile(self, entry: str) -> None:
        try:
            self.patterns.append((entry, re.compile(entry.removeprefix(_PREFIX)).match))
        except (re.error, RecursionError, OverflowError):
            self.broken = self.broken or entry

    def naming(self, name: str) -> str | None:
        """Return an entry that is `name` or matches it, or None."""
        if name in self.names:
            return name
        return next((entry for entry, match in self.patterns if match(name)), None)

    def naming_end(self, name: str) -> str | None:
        """Return an entry that is `name` or the end of it, or matches it, as SGLang reads it."""
        tail = name
        while tail:
            if tail in self.names:
                return tail
            tail = tail.partition(".")[2]
        return next((entry for entry, match in self.patterns if match(name)), None)


@dataclass(frozen=True)
class Groups:
    """What a checkpoint's configuration says: its groups' targets, and `ignore`."""

    targets: Mapping[str, Entries]
    """By the names of the groups, in their order."""
    ignore: Entries

    @classmethod
    def of(cls, targets: Mapping[str, Iterable[str]], ignore: Iterable[str]) -> Groups:
        """Return the groups of a configuration."""
        return cls({name: Entries(own) for name, own in targets.items()}, Entries(ignore))

    def naming(self, name: str) -> str | None:
        """Return the first group with a target that is `name` or matches it, or None."""
        groups = (group for group, entries in self.targets.items() if entries.naming(name))
        return next(groups, None)

    def of_class(self, name: str, *, has_head: bool = True) -> str | None:
        """Return the first group of all linear layers; None for a head, unless it is one."""
        if not has_head and name.rpartition(".")[2] == HEAD:
            return None
        groups = (group for group, entries in self.targets.items() if LINEAR in entries.names)
        return next(groups, None)

    @property
    def broken(self) -> str | None:
        """An entry that no reader can compile."""
        lists = (self.ignore, *self.targets.values())
        return next((entries.broken for entries in lists if entries.broken), None)


@dataclass(frozen=True)
class Stated:
    """The groups' targets and `ignore`, as a configuration states them."""

    targets: Mapping[str, Sequence[str]]
    ignore: Sequence[str]

    @property
    def groups(self) -> Groups:
        """The groups, as nothing rewrites them."""
        return Groups.of(self.targets, self.ignore)

    def as_read(self, peculiar: Peculiarities) -> dict[str, Groups]:
        """Return the groups as each reader has them when it looks its modules up."""
        own = self.groups
        return {LIBRARY: own} | {
            engine: self._rewritten(engine, peculiar) if engine in peculiar.rewritten else own
            for engine in READERS
        }

    def _rewritten(self, engine: Engine, peculiar: Peculiarities) -> Groups:
        targets = {
            group: [peculiar.entry_in(engine, entry) for entry in entries]
            for group, entries in self.targets.items()
        }
        return Groups.of(targets, [peculiar.entry_in(engine, entry) for entry in self.ignore])


# --------------------------------------------------------------------------------------- rules


@dataclass(frozen=True, slots=True)
class Reading:
    """A reader's decision on one module: the group that it takes it to, or None and the entry."""

    group: str | None
    entry: str | None = None
    is_error: bool = False


def _vllm(name: str, parts: Sequence[str], groups: Groups) -> Reading:
    if entry := groups.ignore.naming(name):
        return Reading(None, entry)
    if (hit := _all_or_none(parts, groups.ignore.naming)) is not None:
        return hit
    own = groups.naming(name) or _common(map(groups.naming, parts))
    return Reading(own or groups.of_class(name, has_head=False))


def _sglang(name: str, parts: Sequence[str], groups: Groups) -> Reading:
    if not parts or name in groups.ignore.names:
        if entry := groups.ignore.naming_end(name):
            return Reading(None, entry)
    elif (hit := _all_or_none(parts, groups.ignore.naming_end)) is not None:
        return hit
    own = groups.naming(name) or groups.of_class(name, has_head=False)
    own = own or _common(map(groups.naming, parts))
    is_head = name.rpartition(".")[2] == HEAD
    return Reading(own, is_error=own is None and not is_head)


def _all_or_none(parts: Sequence[str], naming: Callable[[str], str | None]) -> Reading | None:
    """The decision by the parts of a fused module; None if no part is listed."""
    hits = [hit for part in parts if (hit := naming(part))]
    if not hits:
        return None
    return Reading(None, hits[0], is_error=len(hits) < len(parts))


def _common(groups: Iterable[str | None]) -> str | None:
    """The first group, if every part has one."""
    of_parts = list(groups)
    return of_parts[0] if of_parts and all(of_parts) else None


_RULES: Mapping[Engine, Callable[[str, Sequence[str], Groups], Reading]] = {
    Engine.VLLM: _vllm,
    Engine.SGLANG: _sglang,
}


def _readings(engine: Engine, module: Module, groups: Groups) -> Iterator[tuple[str, Reading]]:
    """The decisions of an engine on a module, by the names that it may look it up under."""
    rule = _RULES[engine]
    for name in module.called(engine):
        if not _is_experts(module):
            yield name, rule(name, module.parts_of(engine, name), groups)
            continue
        asked = [rule(f"{name}.0.{last}", (), groups) for last in _asked(engine, module)]
        first = next((reading for reading in asked if reading.group is None), asked[0])
        differ = len({reading.group for reading in asked}) > 1
        is_error = differ or any(reading.is_error for reading in asked)
        yield name, Reading(first.group, first.entry, is_error)


def _is_experts(module: Module) -> bool:
    return module.fused is None and module.members != (module.name,)


def _asked(engine: Engine, module: Module) -> Sequence[str | None]:
    """The last names of expert 0's projections that an engine looks up."""
    matches = (EXPERT_LINEAR.match(name) for name in module.members)
    own = {match["projection"] for match in matches if match}
    if engine is Engine.SGLANG or not own:
        return _USUAL
    if "w1" in own and "w3" in own:
        return "w1", "w3", "w2"
    return _USUAL if "gate_proj" in own else ("up_proj", None, "down_proj")


# ----------------------------------------------------------------------------- check and write


def check(
    stated: Stated,
    quantized: Mapping[str, str],
    unquantized: Iterable[str],
    peculiar: Peculiarities = NONE,
) -> list[Mismatch]:
    """Find the modules that a reader would not treat as the checkpoint's tensors need.

    `quantized` has the group of every quantized linear layer, `unquantized` the names of all
    others, of single experts and stacks of experts alike; `peculiar` is what engines do in the
    family. Each reader and module has one mismatch at most; they are sorted by module.
    """
    kept = frozenset(unquantized)
    readers = stated.as_read(peculiar)
    mismatches = [
        mismatch
        for module in modules_of([*quantized, *kept], peculiar)
        for mismatch in _judge(module, quantized, kept, readers)
    ]
    return sorted(mismatches, key=lambda mismatch: (mismatch.module, mismatch.engine))


def _judge(
    module: Module,
    quantized: Mapping[str, str],
    kept: Collection[str],
    readers: Mapping[str, Groups],
) -> Iterator[Mismatch]:
    own = {quantized.get(name) for name in module.members}
    group = next((group for group in own if group), None)
    if group is None:
        expected = Verdict.EXCLUDED
    elif len(own) > 1:
        expected = Verdict.MIXED
    else:
        expected = Verdict.QUANTIZED
    for engine in READERS:
        for name, reading in _readings(engine, module, readers[engine]):
            verdict = _verdict(reading, group, readers[engine])
            if verdict.verdict is not expected:
                yield Mismatch(engine, name, expected, *verdict)
                break
    if expected is Verdict.MIXED:
        return
    for name in module.members:
        entry = readers[LIBRARY].ignore.naming(name)
        if (name in quantized) is (entry is None):
            continue
        if name in kept and _is_experts(module):
            continue  # transformers has no linear layers for experts
        actual = Verdict.EXCLUDED if entry else Verdict.QUANTIZED
        yield Mismatch(LIBRARY, name, expected, actual, entry)
        return


def _verdict(reading: Reading, group: str | None, groups: Groups) -> Ruling:
    if groups.broken is not None:
        return Ruling(Verdict.REFUSED, groups.broken)
    if reading.is_error:
        return Ruling(Verdict.REFUSED, reading.entry)
    if reading.group is None:
        return Ruling(Verdict.EXCLUDED, reading.entry)
    is_other = group is not None and reading.group != group
    return Ruling(Verdict.OTHERWISE if is_other else Verdict.QUANTIZED, reading.entry)


def write_ignore(
    quantized: Iterable[str], unquantized: Iterable[str], peculiar: Peculiarities = NONE
) -> list[str]:
    """Return the ignore list under which every reader quantizes `quantized` only.

    `peculiar` is what engines do in the family.

    Raises:
        PlanError: if no list does that, for example because a fused module is partly quantized.
    """
    packed, kept = dict.fromkeys(quantized, "group_0"), list(unquantized)
    targets = {"group_0": [LINEAR, *head_targets(packed)]}
    modules = modules_of(kept, peculiar)
    entries = {name: entry for module in modules for name, entry in _entries(module).items()}
    while wide := _too_wide(
        mismatches := check(Stated(targets, list(entries.values())), packed, kept, peculiar)
    ):
        narrow = {name: _narrow(name, entry) for name, entry in entries.items() if entry in wide}
        if narrow.items() <= entries.items():
            break
        entries |= narrow
    if mismatches:
        more = f" (and {len(mismatches) - 1} more)" if len(mismatches) > 1 else ""
        raise PlanError(
            f"no ignore list is right for all readers of the {LIBRARY} layout. "
            f"{mismatches[0]}{more}. Quantize all parts of a module, or none of them."
        )
    return sorted(entries.values())


def write_targets(
    linears: Collection[str], others: Iterable[str], peculiar: Peculiarities = NONE
) -> list[str]:
    """Return the targets of one of several groups, by the names of its linear layers.

    `others` are the linear layers of the other groups.
    """
    strangers = [_first_name(module) for module in modules_of(others, peculiar)]
    modules = modules_of(linears, peculiar)
    entries = {name: entry for module in modules for name, entry in _entries(module).items()}
    targets = {_closed(name, entry, strangers) for name, entry in entries.items()}
    heads = head_targets(linears)
    return sorted(entry for entry in targets if entry.rpartition(".")[2] != HEAD) + heads


def _first_name(module: Module) -> str:
    """A name in a module that an expression for it matches."""
    return module.members[0] if _is_experts(module) else module.name


def _closed(name: str, entry: str, strangers: Iterable[str]) -> str:
    """An entry, or the widest one after it that names none of the strangers."""
    narrower = _narrow(name, entry)
    if narrower == entry or not any(map(Entries([entry]).naming, strangers)):
        return entry
    return _closed(name, narrower, strangers)


def head_targets(linears: Collection[str]) -> list[str]:
    """Return the targets of the heads among linear layers, whatever an engine calls the wrapper."""
    return [f"{_PREFIX}{_ANYTHING}{HEAD}$"] if any(map(_HEADS.search, linears)) else []


def _entries(module: Module) -> dict[str, str]:
    """The entries that name a module, by the names that they stand for."""
    names = dict.fromkeys(name for engine in READERS for name in module.called(engine))
    if _is_experts(module):
        return {name: rf"{_open(name)}\." for name in names}
    parts = (
        own for part in module.parts for e in READERS for own in module.peculiar.names_in(e, part)
    )
    own = dict.fromkeys((*module.members, *parts, *names))
    entries = {name: name for name in own}
    if any(module.peculiar.more_entries(name) for name in own):
        entries |= {f"{name}$": f"{_open(name)}$" for name in own}
    return entries


def _open(name: str) -> str:
    """An expression for a name whose beginning engines exchange."""
    return _PREFIX + _ANYTHING + re.escape(re.sub(f"^{_WRAPPER}+", "", name))


def _narrow(name: str, entry: str) -> str:
    """The next entry for a module: behind known names only, and then by its whole name."""
    if entry.startswith(_PREFIX + _ANYTHING):
        return entry.replace(_ANYTHING, f"{_WRAPPER}*", 1)
    name = name.removesuffix("$")
    end = r"\." if entry.endswith(r"\.") else "$"
    return f"{_PREFIX}{re.escape(name)}{end}"


def _too_wide(mismatches: Iterable[Mismatch]) -> set[str]:
    """The entries that would leave a quantized module unquantized."""
    return {m.pattern for m in mismatches if m.expected is Verdict.QUANTIZED and m.pattern}
