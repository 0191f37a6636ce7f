# SPDX-License-Identifier: Apache-2.0
"""The rules of readers of the compressed-tensors layout, against a plain second version of each.

The plain versions ask as an engine asks: about one module by its name, with the table of fused
modules of its model class and the names of its class's expert projections.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.errors import PlanError
from fourfold.models.config_groups import (
    LIBRARY,
    Groups,
    Stated,
    check,
    write_ignore,
    write_targets,
)
from fourfold.models.engines import Verdict
from fourfold.models.families import Engine
from fourfold.models.peculiarities import peculiarities_of

PACKED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}
LINEAR_CLASS = "MergedColumnParallelLinear"


# ------------------------------------------------------------------------------ plain versions


def matches(name: str, entry: str) -> bool:
    if entry.startswith("re:"):
        return re.match(entry[3:], name) is not None
    return entry == name


def vllm_ignores(name: str, ignore: Sequence[str]) -> bool | None:
    """True, False, or None for an error."""
    if any(matches(name, entry) for entry in ignore):
        return True
    last = name.split(".")[-1]
    if last not in PACKED:
        return False
    parts = [name.replace(last, part) for part in PACKED[last]]
    hits = {any(matches(part, entry) for entry in ignore) for part in parts}
    return None if len(hits) == 2 else hits == {True}


def sglang_ignores(name: str, ignore: Sequence[str]) -> bool | None:
    def hit(asked: str) -> bool:
        return any(
            matches(asked, entry) or (entry[:3] != "re:" and asked.endswith("." + entry))
            for entry in ignore
        )

    last = name.split(".")[-1]
    if last not in PACKED or name in ignore:
        return hit(name)
    hits = {hit(name.replace(last, part)) for part in PACKED[last]}
    return None if len(hits) == 2 else hits == {True}


def target_of(name: str, targets: Sequence[str], order: str) -> str | None:
    last = name.split(".")[-1]

    def by_name() -> str | None:
        return next((target for target in targets if matches(name, target)), None)

    def by_class() -> str | None:
        kind = "ParallelLMHead" if last == "lm_head" else LINEAR_CLASS
        plain = (target for target in targets if not target.startswith("re:"))
        return next((target for target in plain if target.lower() in kind.lower()), None)

    def by_parts() -> str | None:
        parts = [name.replace(last, part) for part in PACKED.get(last, ())]
        found = [next((t for t in targets if matches(part, t)), None) for part in parts]
        return found[0] if found and all(found) else None

    steps = {"name": by_name, "class": by_class, "parts": by_parts}
    return next((found for step in order.split() if (found := steps[step]())), None)


def vllm(name: str, groups: dict[str, list[str]], ignore: Sequence[str]) -> str | None:
    """The group; None if it is left alone; "error"."""
    ignored = vllm_ignores(name, ignore)
    if ignored is not False:
        return "error" if ignored is None else None
    return group_of(target_of(name, flat(groups), "name parts class"), groups)


def sglang(name: str, groups: dict[str, list[str]], ignore: Sequence[str]) -> str | None:
    ignored = sglang_ignores(name, ignore)
    if ignored is not False:
        return "error" if ignored is None else None
    group = group_of(target_of(name, flat(groups), "name class parts"), groups)
    return "error" if group is None and not name.endswith("lm_head") else group


def flat(groups: dict[str, list[str]]) -> list[str]:
    return [target for targets in groups.values() for target in targets]


def group_of(target: str | None, groups: dict[str, list[str]]) -> str | None:
    return next((name for name, targets in groups.items() if target in targets), None)


def experts_of(engine: Engine, module: str) -> list[str]:
    """The names that an engine asks for of a layer's experts."""
    usual = ["gate_proj", "up_proj", "down_proj"]
    if engine is Engine.VLLM and "block_sparse_moe" in module:
        usual = ["w1", "w2", "w3"]
    if engine is Engine.VLLM and "mixer" in module:
        usual = ["up_proj", "None", "down_proj"]
    return [f"{module}.0.{last}" for last in usual]


PLAIN = {Engine.VLLM: vllm, Engine.SGLANG: sglang}


def plain_group(
    engine: Engine, module: str, groups: dict[str, list[str]], ignore: Sequence[str]
) -> str | None:
    if not module.endswith(".experts"):
        return PLAIN[engine](module, groups, ignore)
    found = {PLAIN[engine](name, groups, ignore) for name in experts_of(engine, module)}
    return found.pop() if len(found) == 1 else "error"


# ------------------------------------------------------------------------------------- a model

EXPERTS = {
    "model.layers.1.mlp.experts": ["gate_proj", "up_proj", "down_proj"],
    "model.layers.1.block_sparse_moe.experts": ["w1", "w3", "w2"],
    "model.layers.1.mixer.experts": ["up_proj", "down_proj"],
    "model.layers.11.mlp.experts": ["gate_proj", "up_proj", "down_proj"],
    "mtp.layers.1.mlp.experts": ["gate_proj", "up_proj", "down_proj"],
}
MODULES: dict[str, list[str]] = {
    "model.layers.1.self_attn.qkv_proj": [
        f"model.layers.1.self_attn.{last}" for last in PACKED["qkv_proj"]
    ],
    "model.layers.1.self_attn.o_proj": ["model.layers.1.self_attn.o_proj"],
    "layers.1.self_attn.o_proj": ["layers.1.self_attn.o_proj"],
    "model.layers.1.mlp.gate": ["model.layers.1.mlp.gate"],
    "model.layers.1.mlp.shared.gate_up_proj": [
        f"model.layers.1.mlp.shared.{last}" for last in PACKED["gate_up_proj"]
    ],
    "lm_head": ["lm_head"],
    **{
        module: [f"{module}.{number}.{last}" for number in (0, 1) for last in names]
        for module, names in EXPERTS.items()
    },
}
NAMES = sorted(name for members in MODULES.values() for name in members)
ENTRIES = [
    *NAMES,
    *MODULES,
    "o_proj",
    "self_attn.o_proj",
    "Linear",
    "re:.*",
    r"re:.*experts\.",
    r"re:.*self_attn.*",
    r"re:(.*\.)?layers\.1\.mlp\.experts\.",
    r"re:model\.layers\.1\.mlp",
    "re:.*proj$",
    r"re:.*\.q_proj",
    r"re:(.*\.)?lm_head$",
    "re:mlp",
]


@settings(max_examples=300, deadline=None)
@given(
    one=st.lists(st.sampled_from(ENTRIES), max_size=6),
    other=st.lists(st.sampled_from(ENTRIES), max_size=3),
    ignore=st.lists(st.sampled_from(ENTRIES), max_size=8),
    groups=st.lists(
        st.sampled_from(["one", "other", None]), min_size=len(MODULES), max_size=len(MODULES)
    ),
)
def test_check_finds_what_the_plain_versions_find(
    one: list[str], other: list[str], ignore: list[str], groups: list[str | None]
) -> None:
    targets = {"one": one, "other": [entry for entry in other if entry not in one]}
    wanted = dict(zip(MODULES, groups, strict=True))
    quantized = {
        name: group for module, group in wanted.items() if group for name in MODULES[module]
    }
    kept = [name for name in NAMES if name not in quantized]
    mismatches = check(Stated(targets, ignore), quantized, kept)
    found = {(x.engine, x.module): x.found for x in mismatches if x.engine != LIBRARY}
    for module, group in wanted.items():
        for engine in PLAIN:
            read = plain_group(engine, module, targets, ignore)
            assert ((engine, module) in found) == (read != group), (engine, module, read)
            if read != group:
                verdicts = {"error": Verdict.REFUSED, None: Verdict.EXCLUDED}
                is_other = group is not None
                default = Verdict.OTHERWISE if is_other else Verdict.QUANTIZED
                assert found[engine, module] is verdicts.get(read, default)


@settings(max_examples=150, deadline=None)
@given(choice=st.lists(st.booleans(), min_size=len(MODULES), max_size=len(MODULES)))
def test_a_list_that_is_written_is_read_as_it_is_meant(choice: list[bool]) -> None:
    is_quantized = dict(zip(MODULES, choice, strict=True))
    quantized = [name for module in MODULES if is_quantized[module] for name in MODULES[module]]
    kept = [name for name in NAMES if name not in quantized]
    ignore = write_ignore(quantized, kept)
    head = [r"re:(.*\.)?lm_head$"] if is_quantized["lm_head"] else []
    groups = {"group_0": ["Linear", *head]}
    for module, quantizes in is_quantized.items():
        for engine in PLAIN:
            read = plain_group(engine, module, groups, ignore)
            assert read == ("group_0" if quantizes else None), (engine, module)
    for name in kept:
        if "experts" not in name:
            assert any(matches(name, entry) for entry in ignore)
    assert not any(matches(name, entry) for name in quantized for entry in ignore)


def test_targets_of_several_groups() -> None:
    """Each group names its modules by their parts and their own names, experts by an expression."""
    halves: dict[str, list[str]] = {"one": [], "other": []}
    for number, module in enumerate(MODULES):
        is_other = number % 2 or module.startswith("mtp")
        halves["other" if is_other else "one"].append(module)
    assert "model.layers.1.mlp.experts" in halves["one"]
    linears = {group: [x for m in own for x in MODULES[m]] for group, own in halves.items()}
    targets = {
        "one": write_targets(linears["one"], linears["other"]),
        "other": write_targets(linears["other"], linears["one"]),
    }
    for group, own in halves.items():
        for module in own:
            for engine in PLAIN:
                assert plain_group(engine, module, targets, []) == group, (engine, module)


def test_a_module_that_is_quantized_in_part_has_no_list() -> None:
    with pytest.raises(PlanError, match="no ignore list is right for all readers"):
        write_ignore(["a.q_proj"], ["a.k_proj", "a.v_proj"])


def test_names_that_an_engine_rewrites_are_expressions_too() -> None:
    """SGLang's mapper of Qwen3-VL turns `attn.qkv_proj` into a name that no layer has."""
    peculiar = peculiarities_of("qwen3_vl_moe")
    prefix = "model.language_model.layers.0.self_attn"
    kept = [f"{prefix}.{last}" for last in PACKED["qkv_proj"]]
    ignore = write_ignore([f"{prefix}.o_proj"], kept, peculiar)
    assert r"re:(.*\.)?layers\.0\.self_attn\.qkv_proj$" in ignore
    groups = Stated({"group_0": ["Linear"]}, ignore).as_read(peculiar)[Engine.SGLANG]
    assert groups.ignore.naming("model.layers.0.self_attn.qkv_proj")


def test_an_expression_that_nothing_compiles_is_an_error_everywhere() -> None:
    mismatches = check(Stated({"group_0": ["Linear"]}, ["re:("]), {"a.b": "group_0"}, [])
    assert {x.engine for x in mismatches} == {Engine.VLLM, Engine.SGLANG}
    assert all(x.found is Verdict.REFUSED for x in mismatches)
    assert Groups.of({}, ["re:("]).broken == "re:("
