# SPDX-License-Identifier: Apache-2.0
"""The engines' ignore rules: each with its trap, against a plain reference, and round trips."""

from __future__ import annotations

import fnmatch
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.errors import PlanError
from fourfold.models.engines import (
    Mismatch,
    Verdict,
    check,
    excludes,
    modules_of,
    write_ignore,
)
from fourfold.models.families import FAMILIES, Engine, experts_module

QUANTIZED, EXCLUDED, REFUSED = Verdict.QUANTIZED, Verdict.EXCLUDED, Verdict.REFUSED
LAYER = "model.layers.0"


def experts(layer: str, count: int = 2) -> list[str]:
    """The raw names of a layer's experts."""
    projections = ("gate_proj", "up_proj", "down_proj")
    return [f"{layer}.mlp.experts.{e}.{p}" for e in range(count) for p in projections]


def attention(layer: str) -> list[str]:
    """The raw names of a layer's attention."""
    return [f"{layer}.self_attn.{p}_proj" for p in "qkvo"]


# --------------------------------------------------------------------------------- the traps


@pytest.mark.parametrize(
    ("module", "ignore", "vllm", "sglang", "trtllm"),
    [
        ("a.b.gate", ["a.b.gate"], EXCLUDED, EXCLUDED, EXCLUDED),
        ("a.b.gate", [], QUANTIZED, QUANTIZED, QUANTIZED),
        # vLLM looks for substrings: layer 1 takes layers 10 to 19 along, gate takes gate_up_proj.
        (f"{LAYER}.mlp.gate_up_proj", [f"{LAYER}.mlp.gate"], EXCLUDED, QUANTIZED, QUANTIZED),
        ("model.layers.10.mlp.experts", ["model.layers.1"], EXCLUDED, QUANTIZED, QUANTIZED),
        ("model.layers.10.mlp.experts", ["layers.1.mlp"], QUANTIZED, QUANTIZED, QUANTIZED),
        # A path above a linear layer: SGLang takes it for linear layers only.
        (f"{LAYER}.mlp.down_proj", [f"{LAYER}.mlp"], EXCLUDED, EXCLUDED, QUANTIZED),
        (f"{LAYER}.mlp.experts", [f"{LAYER}.mlp"], EXCLUDED, QUANTIZED, QUANTIZED),
        # A fused layer's parts: all or nothing.
        (
            f"{LAYER}.self_attn.qkv_proj",
            [f"{LAYER}.self_attn.{p}_proj" for p in "qkv"],
            EXCLUDED,
            EXCLUDED,
            EXCLUDED,
        ),
        (f"{LAYER}.self_attn.qkv_proj", [f"{LAYER}.self_attn.q_proj"], REFUSED, REFUSED, EXCLUDED),
        (f"{LAYER}.self_attn.qkv_proj", ["*self_attn.q_proj"], QUANTIZED, QUANTIZED, EXCLUDED),
        (f"{LAYER}.self_attn.qkv_proj", ["*.self_attn*"], EXCLUDED, EXCLUDED, EXCLUDED),
        (
            f"{LAYER}.self_attn.qkv_proj",
            [f"{LAYER}.self_attn.qkv_proj"],
            EXCLUDED,
            EXCLUDED,
            EXCLUDED,
        ),
        # One expert named: in vLLM the whole layer's experts are off.
        (
            f"{LAYER}.mlp.experts",
            [f"{LAYER}.mlp.experts.7.up_proj"],
            EXCLUDED,
            QUANTIZED,
            QUANTIZED,
        ),
        (f"{LAYER}.mlp.experts", [f"{LAYER}.mlp.experts"], EXCLUDED, EXCLUDED, EXCLUDED),
        ("model.layers.1.mlp.experts", ["model.layers.11.mlp.experts"], *[QUANTIZED] * 3),
        # SGLang: one dotted part is enough for a pattern.
        ("mtp_layers.0.mlp.down_proj", ["mtp*"], EXCLUDED, EXCLUDED, EXCLUDED),
        ("model.mtp_layers.0.mlp.down_proj", ["mtp*"], QUANTIZED, EXCLUDED, QUANTIZED),
        # SGLang: MLA's projections are named for all layers at once.
        (
            "model.layers.0.self_attn.q_b_proj",
            ["model.layers.61.self_attn.q_b_proj"],
            QUANTIZED,
            EXCLUDED,
            QUANTIZED,
        ),
        # `re:` is compressed-tensors' and understood by none of them.
        (f"{LAYER}.mlp.experts", ["re:.*experts"], QUANTIZED, QUANTIZED, QUANTIZED),
        ("vision_tower.blocks.0.fc1", [], EXCLUDED, QUANTIZED, QUANTIZED),
        # A quoted name means the same to all.
        (f"{LAYER}.mlp.gate", [f"{LAYER}.mlp.gat[e]"], EXCLUDED, EXCLUDED, EXCLUDED),
        (f"{LAYER}.mlp.gate_up_proj", [f"{LAYER}.mlp.gat[e]"], QUANTIZED, QUANTIZED, QUANTIZED),
        (f"{LAYER}.mlp.experts", [f"{LAYER}.mlp.expert[s]"], EXCLUDED, EXCLUDED, EXCLUDED),
    ],
)
def test_the_rules_differ(
    module: str, ignore: list[str], vllm: Verdict, sglang: Verdict, trtllm: Verdict
) -> None:
    assert excludes(Engine.VLLM, module, ignore).verdict is vllm
    assert excludes(Engine.SGLANG, module, ignore).verdict is sglang
    assert excludes(Engine.TRTLLM, module, ignore).verdict is trtllm


def test_an_entry_that_is_no_regular_expression_is_refused_by_sglang() -> None:
    assert excludes(Engine.SGLANG, "a.b", ["a.(b"]).verdict is REFUSED


# ---------------------------------------------------------------------------- engine modules


@pytest.mark.parametrize(
    ("name", "module"),
    [
        (f"{LAYER}.mlp.experts.12.gate_proj", f"{LAYER}.mlp.experts"),
        (f"{LAYER}.mlp.experts.gate_up_proj", f"{LAYER}.mlp.experts"),
        (f"{LAYER}.block_sparse_moe.input_linear", f"{LAYER}.block_sparse_moe.experts"),
        (f"{LAYER}.block_sparse_moe.experts.3.w1", f"{LAYER}.block_sparse_moe.experts"),
        (f"{LAYER}.moe.up_proj", f"{LAYER}.moe.experts"),
        ("model.llm.layers.2.mlp.experts.w13_weight", "model.llm.layers.2.mlp.experts"),
        ("transformer.blocks.0.ffn.experts.mlp.v1", "transformer.blocks.0.ffn.experts"),
        (f"{LAYER}.mlp.shared_experts.down_proj", None),
        (f"{LAYER}.shared_mlp.input_linear", None),
        (f"{LAYER}.mlp.down_proj", None),
    ],
)
def test_experts_are_one_module(name: str, module: str | None) -> None:
    assert experts_module(name) == module


def test_siblings_are_fused_as_engines_fuse_them() -> None:
    kda = [f"{LAYER}.self_attn.{p}_proj" for p in ("q", "k", "v", "b", "f_a", "o")]
    names = {m.name: len(m.members) for m in modules_of(kda)}
    assert names == {
        f"{LAYER}.self_attn.in_proj_qkvgfab": 5,
        f"{LAYER}.self_attn.o_proj": 1,
    }
    no_value = modules_of([f"{LAYER}.self_attn.q_proj", f"{LAYER}.self_attn.k_proj"])
    assert [m.name for m in no_value] == [f"{LAYER}.self_attn.qkv_proj"]


# ----------------------------------------------------------------------------- check and write


def test_check_names_engine_module_and_pattern() -> None:
    found = check(["model.layers.1"], experts("model.layers.10"), [])
    assert found == [
        Mismatch(Engine.VLLM, "model.layers.10.mlp.experts", QUANTIZED, EXCLUDED, "model.layers.1")
    ]
    assert "'model.layers.1' in the ignore list" in str(found[0])


def test_check_finds_a_module_that_nothing_names() -> None:
    found = check([], [], [f"{LAYER}.mlp.gate"])
    assert {m.engine for m in found} == set(Engine)
    assert {(m.expected, m.found) for m in found} == {(EXCLUDED, QUANTIZED)}


def test_check_finds_a_partly_quantized_module() -> None:
    q, k, v, _ = attention(LAYER)
    found = check([k, v], [q], [k, v])
    assert {m.expected for m in found} == {Verdict.MIXED}
    with pytest.raises(PlanError, match="qkv_proj is partly quantized"):
        write_ignore([q], [k, v])


def test_plain_names_where_they_serve() -> None:
    ignore = write_ignore(experts(LAYER), [f"{LAYER}.mlp.gate", "lm_head"])
    assert ignore == ["lm_head", f"{LAYER}.mlp.gate"]


def test_fused_modules_are_listed_by_parts_and_by_name() -> None:
    ignore = write_ignore(experts(LAYER), attention(LAYER))
    assert ignore == [f"{LAYER}.self_attn.{p}_proj" for p in ("k", "o", "q", "qkv", "v")]


def test_a_router_beside_a_quantized_mlp_is_quoted() -> None:
    mlp = [f"{LAYER}.mlp.gate_proj", f"{LAYER}.mlp.up_proj"]
    assert write_ignore(mlp, [f"{LAYER}.mlp.gate"]) == [f"{LAYER}.mlp.gat[e]"]


def test_unquantized_experts_are_listed_as_one_module() -> None:
    ignore = write_ignore(experts("model.layers.1"), experts("model.layers.11"))
    assert ignore == ["model.layers.11.mlp.experts"]
    stacked = [f"{LAYER}.mlp.experts.gate_up_proj", f"{LAYER}.mlp.experts.down_proj"]
    assert write_ignore([], stacked) == [f"{LAYER}.mlp.experts"]


def test_a_layer_without_a_value_projection_still_names_it() -> None:
    q, k, *_ = attention(LAYER)
    assert f"{LAYER}.self_attn.v_proj" in write_ignore([], [q, k])


def test_names_of_another_depth_do_not_leak() -> None:
    main, mtp = "model.layers.0.mlp.experts.0.up_proj", "layers.0.mlp.experts.0.up_proj"
    assert write_ignore([main], [mtp]) == ["layers.0.mlp.expert[s]"]
    assert write_ignore([mtp], [main]) == ["model.layers.0.mlp.expert[s]"]


def test_mla_kept_in_one_layer_only_is_quoted_for_sglang() -> None:
    mla = ("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj")
    main = [f"{LAYER}.self_attn.{p}" for p in mla]
    last = [f"model.layers.61.self_attn.{p}" for p in mla]
    ignore = write_ignore(main, last)
    assert "model.layers.61.self_attn.q_b_pro[j]" in ignore
    assert not any(entry in ignore for entry in last)


def test_what_no_list_can_say_is_refused() -> None:
    # SGLang takes a one-word entry for any dotted part.
    with pytest.raises(PlanError, match=r"SGLang: .*mlp\.gate .*'gat\[e\]'"):
        write_ignore([f"{LAYER}.mlp.gate"], ["gate"])


def calls_of_write_ignore(layers: int) -> int:
    """Function calls and generator steps for a checkpoint of that many layers."""
    packed = [n for layer in range(layers) for n in experts(f"model.layers.{layer}", 8)]
    dense = [f"model.layers.{layers + n}.mlp.down_proj" for n in range(5 * layers)]
    kept = [n for layer in range(layers) for n in attention(f"model.layers.{layer}")]
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += 1

    sys.setprofile(count)
    try:
        ignore = write_ignore([*packed, *dense], kept)
    finally:
        sys.setprofile(None)
    assert len(ignore) == 5 * layers  # q, k, v, qkv_proj and o
    return calls


def test_the_work_grows_with_the_checkpoint_and_not_with_its_square() -> None:
    assert calls_of_write_ignore(120) < 2.5 * calls_of_write_ignore(60)


# ----------------------------------------------------------------------------- the families


def test_every_stack_names_its_experts_module() -> None:
    for name, family in FAMILIES.items():
        for stack in family.stacks:
            assert "stem" in re.compile(stack.key).groupindex, name
            assert stack.experts.format(stem="a").startswith("a"), name


def test_the_support_page_shows_the_whole_table() -> None:
    page = Path(__file__).parents[1] / "docs" / "support.md"
    pattern = r"^\| ([\w-]+) \|.*\| (.+?) \| (?:ran|loaded|tried|read|assumed): .*$"
    rows = re.findall(pattern, page.read_text(), re.MULTILINE)
    short = {"vLLM": "vLLM", "SGLang": "SGLang", "TensorRT-LLM": "TRT-LLM"}
    assert rows
    for name, engines in rows:
        family = FAMILIES[name]
        assert engines == (", ".join(short[e] for e in family.readers) or "**none**"), name
    assert {id(FAMILIES[name]) for name, _ in rows} == {id(f) for f in FAMILIES.values()}


def test_the_support_page_claims_what_the_scripts_found() -> None:
    """A row says that vLLM ran or loaded a family only if docs/engines-vllm.md shows it."""
    docs = Path(__file__).parents[1] / "docs"
    claims = re.findall(
        r"^\| ([\w-]+) \|.*\| (.+?) \| (ran|loaded): vLLM 0\.32\.0",
        (docs / "support.md").read_text(),
        re.MULTILINE,
    )
    pattern = r"^\| (\w+) \| ([^`|]+) \|"
    results = dict(re.findall(pattern, (docs / "engines-vllm.md").read_text(), re.MULTILINE))
    assert len(claims) > 40
    for name, engines, claim in claims:
        reads = "vLLM" in engines and name != "laguna"
        assert results[name].startswith("exact") is reads, name
        assert ("," in results[name]) is (claim == "ran" and reads), name


# -------------------------------------------------------------------------------- properties

PARENTS = st.sampled_from(
    ["mlp", "self_attn", "mlp.shared_experts", "mlp.shared_expert", "linear_attn", "feed_forward"]
)
LASTS = st.sampled_from(
    [
        *("q_proj", "k_proj", "v_proj", "o_proj", "b_proj", "f_a_proj", "g_proj"),
        *("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "wkv", "wq_a", "wq_b"),
        *("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj"),
        *("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj", "shared_expert_gate"),
    ]
)
ROOTS = st.sampled_from(["model.layers", "layers", "model.language_model.layers", "mtp.layers"])
LAYERS = st.builds("{}.{}".format, ROOTS, st.sampled_from([0, 1, 2, 10, 11]))
LINEARS = st.builds("{}.{}.{}".format, LAYERS, PARENTS, LASTS)
EXPERTS = st.builds("{}.mlp.experts.{}.{}".format, LAYERS, st.integers(0, 2), LASTS)
NAMES = st.lists(LINEARS | EXPERTS, min_size=1, max_size=40, unique=True)


@settings(max_examples=300, deadline=None)
@given(NAMES, st.randoms(use_true_random=False))
def test_what_write_ignore_writes_is_right(names: list[str], random) -> None:
    quantized, unquantized = [], []
    for module in modules_of(names):
        random.choice([quantized, unquantized]).extend(module.members)
    ignore = write_ignore(quantized, unquantized)
    assert check(ignore, quantized, unquantized) == []
    assert ignore == sorted(set(ignore))


MODULES = st.builds(
    "{}.{}.{}".format,
    LAYERS,
    PARENTS,
    LASTS
    | st.sampled_from(["experts", "qkv_proj", "gate_up_proj", "in_proj_qkvz", "fused_qkv_a_proj"]),
)


def mutilate(name: str, how: int, a: int, b: int) -> str:
    """An entry that has to do with `name`: the name, a piece, a pattern, a quoted name."""
    start, stop = sorted((a % (len(name) + 1), b % (len(name) + 1)))
    parts = name.split(".")
    pieces = [
        name,
        name[start:stop],
        ".".join(parts[a % len(parts) :]),
        ".".join(parts[: 1 + a % len(parts)]),
        "*" + name[start:],
        name[:stop] + "*",
        name[:start] + "*" + name[stop:],
        f"{name[:-1]}[{name[-1]}]",
        name + ".0.up_proj",
        name + ".",
    ]
    return pieces[how % len(pieces)]


NUMBERS = st.integers(0, 1000)
EDITS = st.lists(st.tuples(st.none() | MODULES, NUMBERS, NUMBERS, NUMBERS), max_size=6)


@settings(max_examples=1000, deadline=None)
@given(MODULES, EDITS)
def test_the_index_agrees_with_the_plain_rules(
    module: str, edits: list[tuple[str | None, int, int, int]]
) -> None:
    ignore = [mutilate(name or module, how, a, b) for name, how, a, b in edits]
    assert excludes(Engine.VLLM, module, ignore).verdict is plain_vllm(module, ignore)
    assert excludes(Engine.SGLANG, module, ignore).verdict is plain_sglang(module, ignore)
    assert excludes(Engine.TRTLLM, module, ignore).verdict is plain_trtllm(module, ignore)


PARTS = {
    "in_proj_qkvz": ["in_proj_qkv", "in_proj_z"],
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}
MLA = ["q_a_proj", "kv_a_proj_with_mqa"]


def plain_parts(module: str, table: dict[str, list[str]]) -> list[str]:
    parent, _, last = module.rpartition(".")
    return [f"{parent}.{part}" for part in table.get(last, [])]


def all_or_nothing(hits: list[bool]) -> Verdict:
    return EXCLUDED if all(hits) else REFUSED if any(hits) else QUANTIZED


def plain_vllm(module: str, ignore: list[str]) -> Verdict:
    """vLLM's rule, word by word."""
    parts = plain_parts(module, PARTS | {"fused_qkv_a_proj": MLA})
    if module in ignore:
        return EXCLUDED
    if parts and (verdict := all_or_nothing([part in ignore for part in parts])) != QUANTIZED:
        return verdict
    if not parts and "experts" in module and any("experts" in e and module in e for e in ignore):
        return EXCLUDED
    if any(e in module or fnmatch.fnmatchcase(module, e) for e in ignore):
        return EXCLUDED
    return QUANTIZED


def plain_sglang(module: str, ignore: list[str]) -> Verdict:
    """SGLang's rule, word by word."""
    parts = plain_parts(module, PARTS | {"fused_qkv_a_proj_with_mqa": MLA})

    def on_path(name: str) -> bool:
        return any(f".{e.rstrip('.')}." in f".{name}." for e in ignore if e.rstrip("."))

    if not module.endswith(".experts"):
        verdict = all_or_nothing([on_path(part) for part in parts or [module]])
        if verdict != QUANTIZED:
            return verdict
        if (
            not parts
            and "experts" in module
            and any("experts" in e and module in e for e in ignore)
        ):
            return EXCLUDED
    names = [module, module.removeprefix("language_model."), *module.split(".")]
    regexes = [e.replace(".", r"\.").replace("*", ".*") for e in ignore]
    if any(re.fullmatch(regex, name) for regex in regexes for name in names):
        return EXCLUDED
    tails = {e.split(".")[-1] for e in ignore} & {*MLA, "q_b_proj", "kv_b_proj"}
    return EXCLUDED if any(tail in module.split(".")[-1] for tail in tails) else QUANTIZED


def plain_trtllm(module: str, ignore: list[str]) -> Verdict:
    """TensorRT-LLM's rule, word by word."""
    table = PARTS | {"kv_a_proj_with_mqa": MLA}
    names = [module, *plain_parts(module, table)]
    hit = any(fnmatch.fnmatchcase(name, e) for e in ignore for name in names)
    return EXCLUDED if hit else QUANTIZED
