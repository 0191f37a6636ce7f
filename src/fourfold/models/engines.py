# SPDX-License-Identifier: Apache-2.0
"""The rules by which vLLM, SGLang and TensorRT-LLM decide which layers stay unquantized.

A checkpoint's ignore list (`ignore`, `exclude_modules`) is read by three engines in three ways.
An engine asks about its own modules, not about ours: q, k and v are one `qkv_proj`, all experts
of a layer are one `...experts`. So the rules work on **engine modules** (`modules_of`), and the
parts of a module must all be quantized or all be left unquantized.

    entry of the list        vLLM                    SGLang                     TensorRT-LLM
    a.b.gate                 a.b.gate, and all that  a.b.gate, and all below    a.b.gate
                             contain it: a.b.gate_up
    a.b.q_proj, not k_proj   error                   error                      qkv_proj is left
    a.b.experts.0.up_proj    a.b.experts is left     nothing                    nothing
    a.b.q_b_proj (MLA)       a.b.q_b_proj            every q_b_proj of all      a.b.q_b_proj
                                                     layers
    *.gate                   fnmatch                 `*` → `.*`, the whole      fnmatch
                                                     name or one dotted part
    a.b.gat[e]               a.b.gate                a.b.gate                   a.b.gate

The last row is how `write_ignore` **quotes** a name that an engine would apply to other modules as
well. A quoted name means the same to all three engines and is a substring of no other name. Unlike
a leading `*`, it keeps the prefix, which vLLM and SGLang rename for multimodal models
(`model.language_model.` → `language_model.model.`). A fused module is listed by all its parts,
including those that a layer lacks, and by its own name, because not every model class tells the
engine which parts it has.

Names are compared as the checkpoint has them, and as `peculiarities` says that an engine calls them
in some families. Other modules that an engine renames inside a layer (SGLang puts Gemma 4's experts
under `moe`) are not followed. From vLLM 0.33.0 (modelopt.py,
quant_utils.py), SGLang 0.5.23 (modelopt_quant.py, quantization/utils.py), TensorRT-LLM
(modeling_utils.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from fourfold.errors import PlanError
from fourfold.models.families import Engine, experts_module
from fourfold.models.fusion import FUSED_MODULES, FusedModule, fuse
from fourfold.models.ignore_list import IgnoreList, quote, subpaths
from fourfold.models.peculiarities import NONE, Peculiarities, substitute


class Verdict(StrEnum):
    """The treatment of a module: the one that it gets from an engine, or the one that it needs."""

    QUANTIZED = "quantized"
    EXCLUDED = "unquantized"
    REFUSED = "an error"
    MIXED = "partly quantized"
    OTHERWISE = "quantized in another way"


class Ruling(NamedTuple):
    """An engine's decision on one module, and the entry that caused it."""

    verdict: Verdict
    pattern: str | None = None


_QUANTIZED = Ruling(Verdict.QUANTIZED)


@dataclass(frozen=True, slots=True)
class Module:
    """A module as an engine builds it, made of one or more raw linears."""

    name: str
    members: tuple[str, ...]
    """Raw names of its linears (for experts: of all experts of the layer)."""
    fused: FusedModule | None = None

    peculiar: Peculiarities = NONE

    def called(self, engine: Engine) -> tuple[str, ...]:
        """Return the names under which `engine` may look this module up."""
        names = self._raw_names(engine)
        return tuple(own for name in names for own in self.peculiar.names_in(engine, name))

    def _raw_names(self, engine: Engine) -> tuple[str, ...]:
        """The names as far as the engine keeps the checkpoint's names."""
        if self.fused is None:
            return (self.name,)
        return tuple(_sibling(self.name, last) for last in self.fused.called(engine))

    @property
    def parts(self) -> tuple[str, ...]:
        """The full names of all parts that the engine knows, including absent ones."""
        return tuple(_sibling(self.name, last) for last in self.fused.parts) if self.fused else ()

    def parts_of(self, engine: Engine, name: str) -> tuple[str, ...]:
        """Return the parts of the module that `engine` calls `name`."""
        for renaming in self.peculiar.renamings(engine) if self.fused else ():
            if any(substitute(renaming, raw) == name for raw in self._raw_names(engine)):
                return tuple(substitute(renaming, part) for part in self.parts)
        return ()


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A module that an engine would not treat as the checkpoint needs."""

    engine: str
    module: str
    expected: Verdict
    found: Verdict
    pattern: str | None

    def __str__(self) -> str:
        why = f"by {self.pattern!r} in the ignore list" if self.pattern else "no entry names it"
        return f"{self.engine}: {self.module} is {self.expected}, read as {self.found} ({why})"


# ------------------------------------------------------------------------------ engine modules


def modules_of(names: Iterable[str], peculiar: Peculiarities = NONE) -> list[Module]:
    """Return the engine modules that the raw linears `names` end up in, experts first."""
    experts: defaultdict[str, list[str]] = defaultdict(list)
    siblings: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        if (module := experts_module(name)) is not None:
            experts[module].append(name)
        else:
            parent, _, last = name.rpartition(".")
            siblings[parent][last] = name
    modules = [Module(name, tuple(members), None, peculiar) for name, members in experts.items()]
    return modules + [module for group in siblings.values() for module in _fuse(group, peculiar)]


def _fuse(siblings: Mapping[str, str], peculiar: Peculiarities) -> Iterator[Module]:
    """Modules made of the linears of one parent, given as last name → full name."""
    left = dict(siblings)
    for fused, parts in fuse(siblings, peculiar.fused):
        members = tuple(left.pop(part) for part in parts)
        yield Module(_sibling(members[0], fused.names[0]), members, fused, peculiar)
    yield from (Module(name, (name,), None, peculiar) for name in left.values())


def _sibling(name: str, last: str) -> str:
    parent, dot, _ = name.rpartition(".")
    return parent + dot + last


# --------------------------------------------------------------------------------------- rules

_VLLM_NEVER = ("vision_tower", "vision_model", "vit_large_projector")
"""vLLM builds every module with one of these in its name unquantized."""
_SGLANG_WRAPPER = "language_model."


def _vllm(name: str, parts: Sequence[str], ignore: IgnoreList) -> Ruling:
    listed = [part for part in parts if part in ignore.entries]
    if name in ignore.entries:
        return Ruling(Verdict.EXCLUDED, name)
    if listed:
        verdict = Verdict.EXCLUDED if len(listed) == len(parts) else Verdict.REFUSED
        return Ruling(verdict, listed[0])
    if "experts" in name and not parts and (entry := ignore.expert_entry(name)):
        return Ruling(Verdict.EXCLUDED, entry)
    if (entry := ignore.inside(name)) is not None or (entry := ignore.matching(name)):
        return Ruling(Verdict.EXCLUDED, entry)
    never = next((word for word in _VLLM_NEVER if word in name), None)
    return Ruling(Verdict.EXCLUDED, never) if never else _QUANTIZED


def _sglang(name: str, parts: Sequence[str], ignore: IgnoreList) -> Ruling:
    if ignore.broken is not None:
        return Ruling(Verdict.REFUSED, ignore.broken)
    is_experts = name.rpartition(".")[2] in ("experts", "local_experts")
    if not is_experts and (ruling := _sglang_linear(name, parts, ignore)) is not None:
        return ruling
    entry = _sglang_pattern(name, ignore)
    return Ruling(Verdict.EXCLUDED, entry) if entry else _QUANTIZED


def _sglang_linear(name: str, parts: Sequence[str], ignore: IgnoreList) -> Ruling | None:
    """SGLang's first question about a linear layer: is its path, or one above it, listed?"""

    def listed(path: str) -> str | None:
        return next((sub for sub in subpaths(path) if sub in ignore.paths), None)

    hits = [hit for part in (parts or (name,)) if (hit := listed(part))]
    if hits:
        verdict = Verdict.EXCLUDED if len(hits) == len(parts or (name,)) else Verdict.REFUSED
        return Ruling(verdict, hits[0])
    if "experts" in name and not parts and (entry := ignore.expert_entry(name)):
        return Ruling(Verdict.EXCLUDED, entry)
    return None


def _sglang_pattern(name: str, ignore: IgnoreList) -> str | None:
    """The entry that matches the whole name or one dotted part of it, or None."""
    parts = name.split(".")
    for text in (name, name.removeprefix(_SGLANG_WRAPPER), *parts):
        if entry := ignore.matching_regex(text):
            return entry
    return next((entry for tail, entry in ignore.mla.items() if tail in parts[-1]), None)


def _trtllm(name: str, parts: Sequence[str], ignore: IgnoreList) -> Ruling:
    for candidate in (name, *parts):
        if entry := ignore.matching(candidate):
            return Ruling(Verdict.EXCLUDED, entry)
    return _QUANTIZED


Rule = Callable[[str, Sequence[str], IgnoreList], Ruling]
RULES: Mapping[Engine, Rule] = {
    Engine.VLLM: _vllm,
    Engine.SGLANG: _sglang,
    Engine.TRTLLM: _trtllm,
}


def excludes(
    engine: Engine, module: str, ignore: Sequence[str], peculiar: Peculiarities = NONE
) -> Ruling:
    """Return how `engine` treats its module `module` (`...qkv_proj`, `...experts`) by a list."""
    last, known = module.rpartition(".")[2], (*FUSED_MODULES, *peculiar.fused)
    fused = next((fused for fused in known if last in fused.called(engine)), None)
    parts = () if fused is None else tuple(_sibling(module, part) for part in fused.parts)
    return RULES[engine](module, parts, _as_read(ignore, peculiar)[engine])


# ----------------------------------------------------------------------------- check and write


def check(
    ignore: Sequence[str],
    quantized: Iterable[str],
    unquantized: Iterable[str],
    peculiar: Peculiarities = NONE,
) -> list[Mismatch]:
    """Find the modules that an engine would not treat as the checkpoint's tensors need.

    `quantized` and `unquantized` are raw names of linear layers, without `.weight`, of single
    experts and of stacks of experts alike; `peculiar` is what engines do in the family. Each engine
    and module has one mismatch at most; they are sorted by module.
    """
    kept = frozenset(unquantized)
    packed = frozenset(quantized)
    lists = _as_read(ignore, peculiar)
    mismatches = {
        mismatch
        for module in modules_of([*packed, *kept], peculiar)
        for mismatch in _judge(module, _expected(module, packed, kept), lists)
    }
    return sorted(mismatches, key=lambda mismatch: (mismatch.module, mismatch.engine))


def _as_read(ignore: Sequence[str], peculiar: Peculiarities) -> dict[Engine, IgnoreList]:
    """The ignore list as each engine has it when it looks its modules up."""
    written = IgnoreList(ignore)
    return {
        engine: IgnoreList(peculiar.entry_in(engine, entry) for entry in ignore)
        if engine in peculiar.rewritten
        else written
        for engine in Engine
    }


def _expected(module: Module, quantized: frozenset[str], unquantized: frozenset[str]) -> Verdict:
    packed = any(name in quantized for name in module.members)
    kept = any(name in unquantized for name in module.members)
    if packed and kept:
        return Verdict.MIXED
    return Verdict.QUANTIZED if packed else Verdict.EXCLUDED


def _judge(
    module: Module, expected: Verdict, lists: Mapping[Engine, IgnoreList]
) -> Iterator[Mismatch]:
    for engine, rule in RULES.items():
        for name in module.called(engine):
            verdict, pattern = rule(name, module.parts_of(engine, name), lists[engine])
            if verdict is not expected:
                yield Mismatch(engine, name, expected, verdict, pattern)


def write_ignore(
    quantized: Iterable[str], unquantized: Iterable[str], peculiar: Peculiarities = NONE
) -> list[str]:
    """Return the ignore list under which all three engines quantize `quantized` only.

    `peculiar` is what engines do in the family.

    Returns:
        Sorted full module names: the experts module of unquantized experts, the parts and the own
        name of a fused module. A name that an engine would apply too widely is quoted.

    Raises:
        PlanError: if no list does that, for example because a fused module is partly quantized.
    """
    packed, kept = list(quantized), list(unquantized)
    modules = list(_names_to_list(kept, peculiar))
    entries = {name: name for names in modules for name in names}
    while too_wide := _too_wide(
        mismatches := check(list(entries.values()), packed, kept, peculiar)
    ):
        quoted = {
            name: quote(name)
            for names in modules
            if not too_wide.isdisjoint(names)
            for name in names
        }
        if quoted.items() <= entries.items():
            break
        entries |= quoted
    if mismatches:
        more = f" (and {len(mismatches) - 1} more)" if len(mismatches) > 1 else ""
        raise PlanError(
            f"no ignore list is right for all engines. {mismatches[0]}{more}. Quantize all parts "
            "of a module, or none of them."
        )
    return sorted(entries.values())


def _too_wide(mismatches: Iterable[Mismatch]) -> set[str]:
    """The entries that would leave a quantized module unquantized."""
    return {m.pattern for m in mismatches if m.expected is Verdict.QUANTIZED and m.pattern}


def _names_to_list(
    unquantized: Iterable[str], peculiar: Peculiarities
) -> Iterator[tuple[str, ...]]:
    """The names to list for each engine module."""
    for module in modules_of(unquantized, peculiar):
        names = [name for engine in Engine for name in module.called(engine)]
        parts = (own for part in module.parts for e in Engine for own in peculiar.names_in(e, part))
        more = (entry for name in names for entry in peculiar.more_entries(name))
        yield tuple(dict.fromkeys((*parts, *names, *more)))
