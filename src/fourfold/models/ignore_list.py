# SPDX-License-Identifier: Apache-2.0
"""An ignore list, indexed for the lookups of the engines' rules.

A checkpoint of 60 layers asks some hundred thousand questions of a list of thousands of entries.
With the index, a question costs a few lookups and not a walk over the list.
"""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations

_MAGIC = re.compile(r"[*?\[]")
_PLAIN = re.compile(r"[\w.\-]+")
_STARS = re.compile(r"\*+")
_STARRED = re.compile(r"[\w.\-*]+")
_QUOTED = re.compile(r"(?:[\w.\-]|\[\w\])*\[\w\](?:[\w.\-]|\[\w\])*")

SGLANG_MLA = frozenset({"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"})
"""SGLang applies an entry that ends in one of these to every layer."""

Matcher = Callable[[str], object]


def quote(name: str) -> str:
    """Return a pattern that matches `name` only, and that is not itself a name."""
    return f"{name[:-1]}[{name[-1]}]"


def _unquote(entry: str) -> str:
    return entry.replace("[", "").replace("]", "")


class IgnoreList:
    """The entries of an ignore list, and indexes over them."""

    def __init__(self, entries: Iterable[str]) -> None:
        """Index `entries`."""
        ordered = list(dict.fromkeys(entries))
        self.entries = frozenset(ordered)
        self.paths = frozenset(entry.rstrip(".") for entry in ordered)
        """The entries as SGLang's paths: without trailing dots."""
        self.quoted: dict[str, str] = {}
        """The name that a quoted entry stands for → the entry."""
        self.globs: list[tuple[str, Matcher]] = []
        self.regexes: list[tuple[str, Matcher]] = []
        """Entries that SGLang has to match as regular expressions."""
        self.broken: str | None = None
        """An entry that SGLang cannot compile."""
        self.mla: dict[str, str] = {}
        """Last name of an MLA projection → the first entry that ends in it."""
        self.short: list[str] = []
        """Entries of at most two dotted parts; `by_inner` has the longer ones."""
        self.by_inner: defaultdict[str, list[str]] = defaultdict(list)
        """An entry without its first and last dotted part → the entries.

        An entry can be a substring of a name only if these inner parts are a run of whole parts of
        that name, whereas the first and the last part may be cut anywhere.
        """
        self.with_experts = [entry for entry in ordered if "experts" in entry]
        self.experts_text = "\n".join(self.with_experts)
        for entry in ordered:
            self._add(entry)

    def _add(self, entry: str) -> None:
        if (tail := entry.rpartition(".")[2]) in SGLANG_MLA:
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
        if not _PLAIN.fullmatch(entry):
            self._add_regex(entry)

    def _add_regex(self, entry: str) -> None:
        try:
            self.regexes.append((entry, _sglang_regex(entry).fullmatch))
        except (re.error, RecursionError, OverflowError):
            self.broken = self.broken or entry

    def inside(self, name: str) -> str | None:
        """Return an entry that is a proper substring of `name`, or None."""
        for inner in subpaths(name):
            for entry in self.by_inner.get(inner, ()):
                if entry in name and entry != name:
                    return entry
        return next((entry for entry in self.short if entry in name and entry != name), None)

    def expert_entry(self, name: str) -> str | None:
        """Return an entry that contains both `name` and the word "experts", or None."""
        if name not in self.experts_text:
            return None
        return next((entry for entry in self.with_experts if name in entry), None)

    def matching(self, name: str) -> str | None:
        """Return an entry that equals `name` or matches it under fnmatch, or None."""
        if name in self.entries:
            return name
        return self.quoted.get(name) or _first(self.globs, name)

    def matching_regex(self, text: str) -> str | None:
        """Return an entry that equals `text` or matches it as SGLang's regex, or None."""
        if text in self.entries:
            return text
        return self.quoted.get(text) or _first(self.regexes, text)


def _sglang_regex(entry: str) -> re.Pattern[str]:
    """Compile an entry as SGLang reads it.

    An entry in which only `*` is special becomes a pattern that does not backtrack: a name such as
    `*a*a*a*b`, which a checkpoint from the hub may hold, would otherwise never finish.
    """
    entry = _STARS.sub("*", entry)
    if _STARRED.fullmatch(entry):
        return re.compile(fnmatch.translate(entry))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about sets within sets: not our pattern
        return re.compile(entry.replace(".", r"\.").replace("*", ".*"))


def _first(matchers: Sequence[tuple[str, Matcher]], name: str) -> str | None:
    return next((entry for entry, match in matchers if match(name)), None)


def subpaths(name: str) -> Iterator[str]:
    """Yield every run of whole dotted parts of `name`: a.b.c → a, a.b, a.b.c, b, b.c, c."""
    cuts = [-1, *(i for i, char in enumerate(name) if char == "."), len(name)]
    return (name[start + 1 : stop] for start, stop in combinations(cuts, 2))
