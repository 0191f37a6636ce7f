"""Which layers an engine leaves alone: vLLM's, SGLang's and TensorRT-LLM's rules, as functions.

A checkpoint's ignore list (`ignore`, `exclude_modules`) is read by three engines in three ways.
An engine asks about its own modules, not about ours: q, k and v are one `qkv_proj`, all experts
of a layer are one `...experts`. So the rules work on **engine modules** (`modules_of`), and a
module's parts must all be quantized or all be left.

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

The last row is how `write_ignore` **quotes** a name that an engine would take too far: it means
the same to all three, it is no substring of anything, and unlike a leading `*` it keeps its
prefix, which vLLM and SGLang rename for multimodal models (`model.language_model.` →
`language_model.model.`). A fused module is listed by all its parts, those that a layer lacks
included, and by its own name, since not every model class tells the engine what it is made of.

Names are compared as the checkpoint has them. What an engine renames inside a layer (SGLang puts
Gemma 4's experts under `moe`) is not followed. From vLLM 0.33.0 (modelopt.py, quant_utils.py),
SGLang 0.5.23 (modelopt_quant.py, quantization/utils.py), TensorRT-LLM (modeling_utils.py).
"""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import combinations
from typing import NamedTuple

from fourfold.errors import PlanError
from fourfold.models.families import FAMILIES, FUSED_MODULES, Engine, FusedModule, Stack, fuse

__all__ = [
    "Engine",
    "Mismatch",
    "Module",
    "Ruling",
    "Verdict",
    "check",
    "experts_module",
    "modules_of",
    "sglang_excludes",
    "trtllm_excludes",
    "vllm_excludes",
    "write_ignore",
]


class Verdict(StrEnum):
    """What an engine does with a module, or what it should do."""

    QUANTIZED = "quantized"
    EXCLUDED = "unquantized"
    REFUSED = "an error"
    MIXED = "partly quantized"


class Ruling(NamedTuple):
    """An engine's decision on one module, and the entry that made it."""

    verdict: Verdict
    pattern: str | None = None


_QUANTIZED = Ruling(Verdict.QUANTIZED)


@dataclass(frozen=True, slots=True)
class Module:
    """A module as an engine builds it, made of one or more raw linears."""

    name: str
    members: tuple[str, ...]
    """The raw names in it (of experts: of all experts of the layer)."""
    fused: FusedModule | None = None
    is_experts: bool = False

    def called(self, engine: Engine) -> tuple[str, ...]:
        """The names under which `engine` may ask about it."""
        if self.fused is None:
            return (self.name,)
        return tuple(_sibling(self.name, last) for last in self.fused.called(engine))

    @property
    def parts(self) -> tuple[str, ...]:
        """The full names of all parts that the engine knows, absent ones included."""
        return tuple(_sibling(self.name, last) for last in self.fused.parts) if self.fused else ()


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A module with which an engine would not do what the checkpoint needs."""

    engine: Engine
    module: str
    expected: Verdict
    found: Verdict
    pattern: str | None

    def __str__(self) -> str:
        why = f"by {self.pattern!r} in the ignore list" if self.pattern else "no entry names it"
        return f"{self.engine}: {self.module} is {self.expected}, read as {self.found} ({why})"


# ------------------------------------------------------------------------------ engine modules

_ONE_EXPERT = re.compile(r"^((?:.*\.)?(?:local_)?experts)\.(?:expert_)?\d+\.")


def _stacks_by_last_name() -> Mapping[str, list[Stack]]:
    """The families' stacks, by the last name of the raw key without `.weight`."""
    stacks = dict.fromkeys(stack for family in FAMILIES.values() for stack in family.stacks)
    by_last = defaultdict(list)
    for stack in stacks:
        key = stack.key.removesuffix("$").removesuffix(r"\.weight")
        by_last[key.rpartition(r"\.")[2]].append(stack)
    return by_last


_STACKS = _stacks_by_last_name()


def experts_module(name: str) -> str | None:
    """The experts module that `name` is a part of: one expert's linear, or a stack; or None."""
    if found := _ONE_EXPERT.match(name):
        return found[1]
    for stack in _STACKS.get(name.rpartition(".")[2], ()):
        for key in (name, f"{name}.weight"):
            if found := re.match(stack.key, key):
                return stack.experts.format(stem=found["stem"])
    return None


def is_stack(name: str) -> bool:
    """Whether `name`, without `.weight`, is that of all experts of a layer in one tensor."""
    if _ONE_EXPERT.match(name) or name.endswith("bias"):
        return False
    return experts_module(name) is not None


def modules_of(names: Iterable[str]) -> list[Module]:
    """The engine modules that the raw linears `names` end up in, in order of appearance."""
    experts: defaultdict[str, list[str]] = defaultdict(list)
    siblings: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        if (module := experts_module(name)) is not None:
            experts[module].append(name)
        else:
            parent, _, last = name.rpartition(".")
            siblings[parent][last] = name
    found = [Module(name, tuple(members), is_experts=True) for name, members in experts.items()]
    return found + [module for group in siblings.values() for module in _fuse(group)]


def _fuse(group: Mapping[str, str]) -> Iterator[Module]:
    """Modules made of the linears of one parent, given as last name → full name."""
    left = dict(group)
    for fused, parts in fuse(group):
        members = tuple(left.pop(part) for part in parts)
        yield Module(_sibling(members[0], fused.names[0]), members, fused)
    yield from (Module(name, (name,)) for name in left.values())


def _sibling(name: str, last: str) -> str:
    parent, dot, _ = name.rpartition(".")
    return parent + dot + last


# -------------------------------------------------------------------------------- ignore lists

_MAGIC = re.compile(r"[*?\[]")
_REGULAR = re.compile(r"[\w.\-]+")
_STARS = re.compile(r"\*+")
_STARRED = re.compile(r"[\w.\-*]+")
_QUOTED = re.compile(r"(?:[\w.\-]|\[\w\])*\[\w\](?:[\w.\-]|\[\w\])*")


def quote(name: str) -> str:
    """A pattern that matches `name` and nothing else, and is no name itself."""
    return f"{name[:-1]}[{name[-1]}]"


def _unquote(entry: str) -> str:
    return entry.replace("[", "").replace("]", "")


Matcher = Callable[[str], object]


@dataclass(slots=True)
class IgnoreList:
    """An ignore list, indexed: a question costs some lookups, not a walk over the list."""

    entries: frozenset[str]
    paths: frozenset[str] = frozenset()
    """The entries as SGLang's paths: without dots at the end."""
    quoted: dict[str, str] = field(default_factory=dict)
    """What a quoted entry means → the entry."""
    globs: list[tuple[str, Matcher]] = field(default_factory=list)
    regexes: list[tuple[str, Matcher]] = field(default_factory=list)
    """Entries that SGLang has to match as regular expressions."""
    broken: str | None = None
    """An entry that SGLang cannot compile."""
    mla: dict[str, str] = field(default_factory=dict)
    short: list[str] = field(default_factory=list)
    by_inner: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    with_experts: list[str] = field(default_factory=list)
    experts_text: str = ""

    @classmethod
    def of(cls, entries: Iterable[str]) -> IgnoreList:
        """Index `entries`."""
        ordered = list(dict.fromkeys(entries))
        ignore = cls(frozenset(ordered), frozenset(entry.rstrip(".") for entry in ordered))
        for entry in ordered:
            ignore._add(entry)
        ignore.with_experts = [entry for entry in ordered if "experts" in entry]
        ignore.experts_text = "\n".join(ignore.with_experts)
        return ignore

    def _add(self, entry: str) -> None:
        if (tail := entry.rpartition(".")[2]) in _SGLANG_MLA:
            self.mla.setdefault(tail, entry)
        if _QUOTED.fullmatch(entry):
            self.quoted.setdefault(_unquote(entry), entry)
            return
        if not _MAGIC.search(entry):
            _, _, inner = entry.partition(".")
            inner = inner.rpartition(".")[0]
            (self.by_inner[inner] if inner else self.short).append(entry)
        else:
            self.globs.append((entry, re.compile(fnmatch.translate(entry)).match))
        if not _REGULAR.fullmatch(entry):
            self._add_regex(entry)

    def _add_regex(self, entry: str) -> None:
        try:
            self.regexes.append((entry, _sglang_regex(entry).fullmatch))
        except (re.error, RecursionError, OverflowError):
            self.broken = self.broken or entry

    def inside(self, name: str) -> str | None:
        """An entry that occurs in `name` as a substring, and is not `name`; or None."""
        for inner in _subpaths(name):
            for entry in self.by_inner.get(inner, ()):
                if entry in name and entry != name:
                    return entry
        return next((entry for entry in self.short if entry in name and entry != name), None)

    def expert_entry(self, name: str) -> str | None:
        """An entry that speaks of experts and contains `name`; or None."""
        if name not in self.experts_text:
            return None
        return next((entry for entry in self.with_experts if name in entry), None)

    def matching(self, name: str) -> str | None:
        """An entry that fnmatch takes for `name`, equality included; or None."""
        if name in self.entries:
            return name
        return self.quoted.get(name) or _first(self.globs, name)


def _sglang_regex(entry: str) -> re.Pattern[str]:
    """SGLang's reading of an entry; where `*` is all that is special, one that does not backtrack,
    which would take for ever on `*a*a*a*a*b`."""
    entry = _STARS.sub("*", entry)
    if _STARRED.fullmatch(entry):
        return re.compile(fnmatch.translate(entry))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # on sets in sets: it is not our pattern
        return re.compile(entry.replace(".", r"\.").replace("*", ".*"))


def _first(matchers: Sequence[tuple[str, Matcher]], name: str) -> str | None:
    return next((entry for entry, match in matchers if match(name)), None)


def _subpaths(name: str) -> Iterator[str]:
    """Every run of whole dotted parts in `name`: a.b.c → a, a.b, a.b.c, b, b.c, c."""
    cuts = [-1, *(i for i, char in enumerate(name) if char == "."), len(name)]
    return (name[start + 1 : stop] for start, stop in combinations(cuts, 2))


# --------------------------------------------------------------------------------------- rules

_VLLM_NEVER = ("vision_tower", "vision_model", "vit_large_projector")
"""vLLM builds whatever has these in its name unquantized."""
_SGLANG_MLA = frozenset({"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"})
"""SGLang applies an entry that ends in one of these to every layer."""
_SGLANG_WRAPPER = "language_model."


def _vllm(name: str, parts: Sequence[str], is_experts: bool, ignore: IgnoreList) -> Ruling:
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


def _sglang(name: str, parts: Sequence[str], is_experts: bool, ignore: IgnoreList) -> Ruling:
    if ignore.broken is not None:
        return Ruling(Verdict.REFUSED, ignore.broken)
    if not is_experts and (ruling := _sglang_linear(name, parts, ignore)) is not None:
        return ruling
    found = _sglang_pattern(name, ignore)
    return Ruling(Verdict.EXCLUDED, found) if found else _QUANTIZED


def _sglang_linear(name: str, parts: Sequence[str], ignore: IgnoreList) -> Ruling | None:
    """What SGLang asks of linear layers first: is the path, or one above it, listed?"""

    def listed(path: str) -> str | None:
        return next((sub for sub in _subpaths(path) if sub in ignore.paths), None)

    hits = [hit for part in (parts or (name,)) if (hit := listed(part))]
    if hits:
        verdict = Verdict.EXCLUDED if len(hits) == len(parts or (name,)) else Verdict.REFUSED
        return Ruling(verdict, hits[0])
    if "experts" in name and not parts and (entry := ignore.expert_entry(name)):
        return Ruling(Verdict.EXCLUDED, entry)
    return None


def _sglang_pattern(name: str, ignore: IgnoreList) -> str | None:
    """The entry that matches the whole name or one dotted part of it; or None."""
    parts = name.split(".")
    for text in (name, name.removeprefix(_SGLANG_WRAPPER), *parts):
        if text in ignore.entries:
            return text
        if found := ignore.quoted.get(text) or _first(ignore.regexes, text):
            return found
    return next((entry for tail, entry in ignore.mla.items() if tail in parts[-1]), None)


def _trtllm(name: str, parts: Sequence[str], is_experts: bool, ignore: IgnoreList) -> Ruling:
    for candidate in (name, *parts):
        if found := ignore.matching(candidate):
            return Ruling(Verdict.EXCLUDED, found)
    return _QUANTIZED


Rule = Callable[[str, Sequence[str], bool, IgnoreList], Ruling]
RULES: Mapping[Engine, Rule] = {
    Engine.VLLM: _vllm,
    Engine.SGLANG: _sglang,
    Engine.TRTLLM: _trtllm,
}


def _parts_of(name: str, engine: Engine) -> tuple[str, ...]:
    last = name.rpartition(".")[2]
    for fused in FUSED_MODULES:
        if last in fused.called(engine):
            return tuple(_sibling(name, part) for part in fused.parts)
    return ()


def _ask(engine: Engine, module: str, ignore: Iterable[str]) -> Ruling:
    is_experts = module.rpartition(".")[2] in ("experts", "local_experts")
    rule = RULES[engine]
    return rule(module, _parts_of(module, engine), is_experts, IgnoreList.of(ignore))


def vllm_excludes(module: str, ignore: Sequence[str]) -> Ruling:
    """What vLLM does with its module `module` (`...qkv_proj`, `...experts`) under `ignore`."""
    return _ask(Engine.VLLM, module, ignore)


def sglang_excludes(module: str, ignore: Sequence[str]) -> Ruling:
    """What SGLang does with its module `module` under `ignore`."""
    return _ask(Engine.SGLANG, module, ignore)


def trtllm_excludes(module: str, ignore: Sequence[str]) -> Ruling:
    """What TensorRT-LLM does with its module `module` under `ignore`."""
    return _ask(Engine.TRTLLM, module, ignore)


# ----------------------------------------------------------------------------- check and write


def check(
    ignore: Sequence[str], quantized: Iterable[str], unquantized: Iterable[str]
) -> list[Mismatch]:
    """Every module with which an engine would not do what the checkpoint's tensors need.

    `quantized` and `unquantized` are raw names of linear layers, without `.weight`; single
    experts and stacks of experts alike. Sorted by module.
    """
    kept = frozenset(unquantized)
    packed = frozenset(quantized)
    modules = modules_of([*packed, *kept])
    index = IgnoreList.of(ignore)
    found = (_judge(module, _expected(module, packed, kept), index) for module in modules)
    return sorted((m for rulings in found for m in rulings), key=lambda m: (m.module, m.engine))


def _expected(module: Module, quantized: frozenset[str], unquantized: frozenset[str]) -> Verdict:
    packed = any(name in quantized for name in module.members)
    kept = any(name in unquantized for name in module.members)
    if packed and kept:
        return Verdict.MIXED
    return Verdict.QUANTIZED if packed else Verdict.EXCLUDED


def _judge(module: Module, expected: Verdict, ignore: IgnoreList) -> Iterator[Mismatch]:
    for engine, rule in RULES.items():
        for name in module.called(engine):
            verdict, pattern = rule(name, module.parts, module.is_experts, ignore)
            if verdict is not expected:
                yield Mismatch(engine, name, expected, verdict, pattern)


def write_ignore(quantized: Iterable[str], unquantized: Iterable[str]) -> list[str]:
    """The ignore list under which all three engines quantize `quantized` and nothing else.

    Sorted full module names: of unquantized experts the experts module, of a fused module its
    parts and its own name. A name that an engine would take too far is quoted.

    Raises:
        PlanError: no list does that, say because a fused module is partly quantized.
    """
    packed, kept = list(quantized), list(unquantized)
    modules = list(_plain_modules(kept))
    entries = {name: name for module in modules for name in module}
    while too_far := _taken_too_far(mismatches := check(list(entries.values()), packed, kept)):
        again = {n: quote(n) for m in modules if not too_far.isdisjoint(m) for n in m}
        if again.items() <= entries.items():
            break
        entries |= again
    if mismatches:
        more = f" (and {len(mismatches) - 1} more)" if len(mismatches) > 1 else ""
        raise PlanError(
            f"no ignore list is right for all engines. {mismatches[0]}{more}. Quantize the parts "
            "of a module together, or keep them together."
        )
    return sorted(entries.values())


def _taken_too_far(mismatches: Iterable[Mismatch]) -> set[str]:
    """The entries that turned off what is quantized."""
    return {m.pattern for m in mismatches if m.expected is Verdict.QUANTIZED and m.pattern}


def _plain_modules(unquantized: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """The names to list for each engine module."""
    for module in modules_of(unquantized):
        names = (name for engine in Engine for name in module.called(engine))
        yield tuple(dict.fromkeys((*module.parts, *names)))
