# SPDX-License-Identifier: Apache-2.0
"""Each rule is broken once, and `verify` finds that rule broken and no other."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fourfold.verification import RULES, UnreadableError, verify

from .build import EXPERTS, HIDDEN, ROUTERS, Draft, draft, pack, pack_fp8, write_source
from .test_compressed_tensors import CASES as PACKED

L0 = "model.layers.0"
E0 = f"{L0}.mlp.experts.0"
E1 = f"{L0}.mlp.experts.1"
Q = f"{L0}.self_attn.q_proj"
O = f"{L0}.self_attn.o_proj"  # noqa: E741
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")

Edit = Callable[[Draft], object]
After = Callable[[Path, Draft], object]


@dataclass(frozen=True)
class Case:
    """One way to break one rule. `edit` works on the draft, `after` on the folder."""

    rule: str
    edit: Edit = lambda draft: None
    after: After = lambda folder, draft: None
    algo: str = "NVFP4"
    kv: bool = False
    with_source: bool = False
    label: str = ""
    rest: str = ""


# -------------------------------------------------------------------------------------- tools


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    return lambda d: d.tensors.__setitem__(name, change(d.tensors[name].clone()))


def drop(*names: str) -> Edit:
    return lambda d: [d.tensors.pop(name) for name in names]


def scalar(name: str, value: float) -> Edit:
    return lambda d: d.tensors.__setitem__(name, torch.tensor(value))


def byte(name: str, value: int) -> Edit:
    """One block scale's byte."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(torch.uint8)[3, 2] = value
        return tensor

    return put(name, change)


def drop_linear(stem: str) -> Edit:
    return lambda d: [d.tensors.pop(key) for key in list(d.tensors) if key.startswith(f"{stem}.")]


def replace(name: str, tensor: torch.Tensor) -> Edit:
    return lambda d: d.tensors.__setitem__(name, tensor)


def called(pattern: str, replacement: str) -> Edit:
    """Rename the quantized experts' tensors."""

    def edit(d: Draft) -> None:
        for name in [name for name in d.tensors if ".experts." in name]:
            d.tensors[re.sub(pattern, replacement, name)] = d.tensors.pop(name)

    return edit


def together(*edits: Edit) -> Edit:
    return lambda d: [edit(d) for edit in edits]


def keep(stem: str) -> Edit:
    """Leave a linear as it is in the source, and list it."""

    def edit(d: Draft) -> None:
        drop_linear(stem)(d)
        d.tensors[f"{stem}.weight"] = d.source[f"{stem}.weight"]

    return edit


def quant(**values: object) -> Edit:
    return lambda d: d.quant.update(values)


def nested(**values: object) -> Edit:
    return lambda d: d.hf_config["quantization"].update(values)


def ignore(*names: str) -> Edit:
    return lambda d: d.set_ignore(list(names))


def index(change: Callable[[dict], object]) -> After:
    return lambda folder, d: d.edit_index(folder, change)


def no_quantization_config(d: Draft) -> None:
    del d.config["quantization_config"]


def no_hf_config(d: Draft) -> None:
    d.hf_config = None


def swap(first: str, second: str) -> Edit:
    """Exchange the tensors of two linears, but not their input scales."""

    def edit(d: Draft) -> None:
        for part in ("weight", "weight_scale", "weight_scale_2"):
            a, b = f"{first}.{part}", f"{second}.{part}"
            d.tensors[a], d.tensors[b] = d.tensors[b], d.tensors[a]

    return edit


def scale_group(stem: str, factor: float) -> Edit:
    """Other global scales for gate and up alike."""
    names = [f"{stem}.{last}.weight_scale_2" for last in ("gate_proj", "up_proj")]
    return together(*(put(name, lambda t: t * factor) for name in names))


def one_expert(count: int) -> Edit:
    """Make the input dimension of one layer's down projections `count`, and gate and up's rows."""

    def edit(d: Draft) -> None:
        generator = torch.Generator().manual_seed(1)
        for layer in range(2):
            for expert in range(EXPERTS):
                stem = f"model.layers.{layer}.mlp.experts.{expert}"
                shapes = {"gate_proj": (count, HIDDEN), "up_proj": (count, HIDDEN)}
                shapes["down_proj"] = (HIDDEN, count)
                for name, shape in shapes.items():
                    d.source[f"{stem}.{name}.weight"] = torch.randn(shape, generator=generator)
                for name in shapes:
                    d.tensors.update(pack(f"{stem}.{name}", d.source))

    return edit


def flip_bit(name: str) -> Edit:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(torch.uint8)[5] ^= 1
        return tensor

    return put(name, change)


def quantize_head(stem: str) -> Edit:
    def edit(d: Draft) -> None:
        d.tensors.update(pack(stem, d.source))

    return edit


def head_like(linear: str, d: Draft) -> dict[str, torch.Tensor]:
    """The tensors of a quantized linear, called as the head's."""
    own = {name: tensor for name, tensor in d.tensors.items() if name.startswith(linear)}
    return {name.replace(linear, "lm_head."): tensor.clone() for name, tensor in own.items()}


def similar_experts(d: Draft) -> None:
    """All experts of layer 0 nearly alike, as after upcycling; then two of them swapped."""
    generator = torch.Generator().manual_seed(2)
    for name in ("gate_proj", "up_proj", "down_proj"):
        base = d.source[f"{E0}.{name}.weight"].float()
        for expert in range(EXPERTS):
            noise = torch.randn(base.shape, generator=generator) * 0.02 * 0.2
            d.source[f"{L0}.mlp.experts.{expert}.{name}.weight"] = (base + noise).bfloat16()
    for expert in range(EXPERTS):
        for name in ("gate_proj", "up_proj", "down_proj"):
            d.tensors.update(pack(f"{L0}.mlp.experts.{expert}.{name}", d.source))
    swap(f"{E0}.down_proj", f"{E1}.down_proj")(d)


# -------------------------------------------------------------------------------------- cases

NORM = f"{L0}.input_layernorm.weight"
ONE_NAN = torch.tensor([*[1.0] * (HIDDEN - 1), float("nan")], dtype=torch.bfloat16)
DOWN = f"{E0}.down_proj"

FILES = [
    Case("index-missing", after=lambda folder, d: (folder / INDEX).unlink()),
    Case("index-entry-missing", after=index(lambda i: i["weight_map"].pop(NORM))),
    Case("index-entry-wrong", after=index(lambda i: i["weight_map"].update({"x.bias": SHARDS[0]}))),
    Case(
        "index-entry-wrong",
        after=index(lambda i: i["weight_map"].update({NORM: SHARDS[1]})),
        label="other shard",
    ),
    Case("index-total-size", after=index(lambda i: i["metadata"].update(total_size=7))),
    Case(
        "shard-unlisted",
        after=lambda folder, d: save_file({"old": torch.ones(2)}, folder / "old.safetensors"),
    ),
    Case(
        "shard-unlisted",
        after=lambda folder, d: save_file(
            {NORM: torch.ones(2)}, folder / "calibration.safetensors"
        ),
        label="no statistics",
    ),
    Case(
        "tensor-twice",
        after=lambda folder, d: save_file(
            load_file(folder / SHARDS[1]) | {NORM: d.tensors[NORM]}, folder / SHARDS[1]
        ),
    ),
]

CONFIG = [
    Case("config-only-nested", no_quantization_config),
    Case("config-nested-w4a16", no_quantization_config, algo="W4A16_NVFP4"),
    Case("hf-quant-config-missing", no_hf_config),
    Case("config-disagrees", nested(quant_algo="W4A16_NVFP4"), label="algo"),
    Case("config-disagrees", nested(kv_cache_quant_algo="FP8"), label="kv"),
    Case("config-disagrees", nested(exclude_modules=["lm_head"]), label="ignore"),
    Case("quant-method", quant(quant_method="nvfp4")),
    Case("quant-algo", together(quant(quant_algo="NVFP4_AWQ"), nested(quant_algo="NVFP4_AWQ"))),
    Case("group-size", together(quant(group_size=32), nested(group_size=32))),
    Case(
        "config-groups",
        lambda d: d.quant["config_groups"]["group_0"].pop("input_activations"),
        label="no activations",
    ),
    Case(
        "config-groups",
        lambda d: d.quant["config_groups"]["group_0"]["weights"].update(num_bits=8),
        label="8 bits",
    ),
    Case(
        "quantized-layers",
        lambda d: [c["quantized_layers"].pop(Q) for c in (d.quant, d.hf_config["quantization"])],
        algo="MIXED_PRECISION",
        label="not listed",
    ),
    Case(
        "quantized-layers",
        lambda d: [
            c["quantized_layers"].update({"lm_head": {"quant_algo": "FP8"}})
            for c in (d.quant, d.hf_config["quantization"])
        ],
        algo="MIXED_PRECISION",
        label="not there",
    ),
]

STRUCTURE = [
    Case("weight-missing", drop(f"{DOWN}.weight")),
    Case("block-scale-missing", drop(f"{DOWN}.weight_scale")),
    Case("global-scale-missing", drop(f"{DOWN}.weight_scale_2")),
    Case("input-scale-missing", drop(f"{DOWN}.input_scale")),
    Case("input-scale-unexpected", scalar(f"{DOWN}.input_scale", 1.0), algo="W4A16_NVFP4"),
    Case("weight-dtype", put(f"{DOWN}.weight", lambda t: t.view(torch.int8))),
    Case("block-scale-dtype", put(f"{DOWN}.weight_scale", lambda t: t.view(torch.float8_e5m2))),
    Case("global-scale-dtype", put(f"{DOWN}.weight_scale_2", lambda t: t.bfloat16())),
    Case("input-scale-dtype", put(f"{DOWN}.input_scale", lambda t: t.bfloat16())),
    Case("weight-shape", put(f"{DOWN}.weight", lambda t: t.reshape(2, -1, t.shape[1]))),
    Case("block-scale-shape", put(f"{DOWN}.weight_scale", lambda t: t.T.contiguous())),
    Case("global-scale-shape", put(f"{DOWN}.weight_scale_2", lambda t: t.repeat(2))),
    Case("input-scale-shape", put(f"{DOWN}.input_scale", lambda t: t.repeat(2))),
    Case("scale-not-scalar", put(f"{DOWN}.weight_scale_2", lambda t: t.reshape(1))),
    Case("input-alignment", put(f"{DOWN}.weight", lambda t: t[:, :-4])),
    Case("expert-name", called(r"experts\.(\d+)\.(\w+)", r"experts.\2.\1"), label="order"),
    Case("expert-name", called("gate_proj", "w1"), label="projection"),
    Case("expert-name", called(r"mlp\.experts", "moe.experts"), label="module"),
    Case("expert-missing", drop_linear(f"{L0}.mlp.experts.{EXPERTS - 1}"), label="last"),
    Case("expert-missing", drop_linear(E1), label="middle"),
    Case("projection-missing", drop_linear(f"{E1}.up_proj")),
    Case(
        "expert-shape",
        together(
            put(f"{DOWN}.weight", lambda t: t[:64]), put(f"{DOWN}.weight_scale", lambda t: t[:64])
        ),
    ),
    Case("layer-missing", drop_linear("model.layers.1"), label="last"),
    Case("layer-missing", drop_linear("model.layers.0"), label="first"),
    Case("sibling-missing", drop(f"{L0}.self_attn.q_norm.weight")),
    Case("tensor-unexpected", scalar(f"{Q}.weight_quantizer._amax", 1.0), label="quantizer"),
    Case("tensor-unexpected", scalar(f"{Q}.weight_global_scale", 1.0), label="other layout"),
    Case("kept-weight-dtype", put("lm_head.weight", lambda t: t.to(torch.float8_e4m3fn))),
]

VALUES = [
    Case("kept-not-finite", put("model.norm.weight", lambda t: t * float("inf"))),
    Case(
        "kept-not-finite",
        lambda d: [x.update({"model.norm.weight": ONE_NAN}) for x in (d.source, d.tensors)],
        with_source=True,
        label="in both",
    ),
    Case("block-scale-zero", byte(f"{DOWN}.weight_scale", 0x00), label="+0"),
    Case("block-scale-zero", byte(f"{DOWN}.weight_scale", 0x80), label="-0"),
    Case("block-scale-nan", byte(f"{DOWN}.weight_scale", 0x7F), label="7F"),
    Case("block-scale-nan", byte(f"{DOWN}.weight_scale", 0xFF), label="FF"),
    Case("block-scale-negative", byte(f"{DOWN}.weight_scale", 0xB8)),
    Case("block-scale-subnormal", byte(f"{DOWN}.weight_scale", 0x07)),
    Case("global-scale-zero", scalar(f"{DOWN}.weight_scale_2", 0.0)),
    Case("global-scale-nan", scalar(f"{DOWN}.weight_scale_2", float("nan")), label="NaN"),
    Case("global-scale-nan", scalar(f"{DOWN}.weight_scale_2", float("inf")), label="Inf"),
    Case("global-scale-negative", scalar(f"{DOWN}.weight_scale_2", -1e-4)),
    Case("scale-product-underflow", scalar(f"{DOWN}.weight_scale_2", 2.0**-140)),
    Case("scale-product-overflow", scalar(f"{DOWN}.weight_scale_2", 2.0**120)),
    Case("input-scale-zero", scalar(f"{DOWN}.input_scale", 0.0)),
    Case("input-scale-nan", scalar(f"{DOWN}.input_scale", float("nan"))),
    Case("input-scale-negative", scalar(f"{DOWN}.input_scale", -0.5)),
    Case("kv-scale-dtype", put(f"{L0}.self_attn.k_proj.k_scale", lambda t: t.half()), kv=True),
    Case("kv-scale-shape", put(f"{L0}.self_attn.k_proj.k_scale", lambda t: t.repeat(2)), kv=True),
    Case("kv-scale-value", scalar(f"{L0}.self_attn.v_proj.v_scale", 0.0), kv=True, label="zero"),
    Case(
        "kv-scale-value", scalar(f"{L0}.self_attn.v_proj.v_scale", float("nan")), kv=True, label="n"
    ),
    Case("kv-scale-missing", drop(f"{L0}.self_attn.v_proj.v_scale"), kv=True, label="one"),
    Case(
        "kv-scale-missing",
        drop(f"{L0}.self_attn.v_proj.v_scale", f"{L0}.self_attn.k_proj.k_scale"),
        kv=True,
        label="a layer's",
    ),
    Case(
        "kv-scale-unexpected",
        together(quant(kv_cache_scheme=None), nested(kv_cache_quant_algo=None)),
        kv=True,
    ),
    Case(
        "kv-cache-format",
        together(
            quant(kv_cache_scheme={"type": "int", "num_bits": 8}),
            nested(kv_cache_quant_algo="int 8"),
        ),
    ),
    Case(
        "kv-cache-latent",
        together(
            quant(kv_cache_scheme={"type": "float", "num_bits": 4}),
            nested(kv_cache_quant_algo="NVFP4"),
            lambda d: d.config.update(kv_lora_rank=512),
        ),
    ),
]

GROUPS = [
    Case("tied-head", lambda d: d.config.update(tie_word_embeddings=True)),
    Case(
        "tied-head",
        lambda d: [
            d.tensors.update(head_like(f"{Q}.", d)),
            ignore(*ROUTERS)(d),
            d.config.update(tie_word_embeddings=True),
        ],
        label="quantized",
    ),
    Case("group-scale-differs", put(f"{E0}.gate_proj.weight_scale_2", lambda t: t * 1.25)),
    Case(
        "group-scale-differs",
        put(f"{L0}.self_attn.k_proj.weight_scale_2", lambda t: torch.nextafter(t, t + 1)),
        label="last bit, qkv",
    ),
    Case("group-input-scale-differs", scalar(f"{E0}.gate_proj.input_scale", 0.5)),
    Case("group-input-scale-differs", scalar(f"{Q}.input_scale", 0.5), label="qkv"),
    Case("site-input-scale-differs", scalar(f"{DOWN}.input_scale", 0.5)),
    Case("group-partial", keep(f"{L0}.self_attn.k_proj"), label="qkv"),
    Case("group-partial", keep(f"{E0}.down_proj"), label="experts"),
    Case("ignore-lacks-unquantized", ignore("lm_head", ROUTERS[0])),
    Case("ignore-excludes-quantized", ignore("lm_head", *ROUTERS, O)),
    Case(
        "ignore-excludes-quantized",
        ignore("lm_head", *ROUTERS, "model.layers.1.self_attn*"),
        label="glob",
    ),
    Case("ignore-refused", ignore("lm_head", *ROUTERS, "*.broken(")),
]

SOURCE = [
    Case("config-changed", lambda d: d.config.update(rope_theta=1.0), with_source=True),
    Case("config-contradicts", lambda d: d.config.update(vocab_size=7), with_source=True),
    Case("side-file-missing", lambda d: setattr(d, "tokenizer", False), with_source=True),
    Case("tensor-lost", drop("model.norm.weight"), with_source=True),
    Case("tensor-extra", scalar("model.rotary.scaling", 1.0), with_source=True),
    Case(
        "tensor-unplaced",
        lambda d: [x.update({"v_head.bias": torch.ones(1)}) for x in (d.source, d.tensors)],
        with_source=True,
    ),
    Case("copied-dtype-differs", put("model.norm.weight", lambda t: t.float()), with_source=True),
    Case("copied-shape-differs", put("model.norm.weight", lambda t: t[:64]), with_source=True),
    Case("copied-bits-differ", flip_bit("model.norm.weight"), with_source=True),
    Case(
        "quantized-shape-differs",
        lambda d: [
            d.tensors.update(
                {
                    f"{stem}.{part}": d.tensors[f"{stem}.{part}"][:64]
                    for part in ("weight", "weight_scale")
                }
            )
            for stem in (f"model.layers.{layer}.self_attn.o_proj" for layer in range(2))
        ],
        with_source=True,
    ),
    Case("weight-error", swap(DOWN, f"{E1}.down_proj"), with_source=True, label="experts swapped"),
    Case(
        "weight-error",
        swap(f"{E0}.gate_proj", f"{E0}.up_proj"),
        with_source=True,
        label="gate and up swapped",
    ),
    Case(
        "weight-error",
        together(*(put(f"{DOWN}.{p}", lambda t: t.flip(0)) for p in ("weight", "weight_scale"))),
        with_source=True,
        label="rows shuffled",
    ),
    Case(
        "weight-error",
        put(f"{DOWN}.weight", lambda t: t >> 4 | t << 4),
        with_source=True,
        label="nibbles swapped",
    ),
    Case("weight-error", scale_group(E0, 2.0), with_source=True, label="global scale × 2"),
    Case("weight-error", scale_group(E0, 0.001), with_source=True, label="global scale / 1000"),
    Case("weight-error", scale_group(E0, 1e7), with_source=True, label="global scale × 1e7"),
    Case(
        "weight-error",
        put(f"{DOWN}.weight", lambda t: torch.zeros_like(t)),
        with_source=True,
        label="all zero",
    ),
    Case("weight-error-outlier", similar_experts, with_source=True),
    Case(
        "source-not-finite",
        lambda d: d.source[f"{DOWN}.weight"].view(-1)[7].fill_(float("inf")),
        with_source=True,
    ),
]

ALIGNMENT = [
    Case("cutlass-alignment", one_expert(96)),
    Case("marlin-alignment", one_expert(96)),
]

K, V = Q.replace("q_proj", "k_proj"), Q.replace("q_proj", "v_proj")


def mixed(rule: str, edit: Edit, rest: str = "FP8", label: str = "", **options: bool) -> Case:
    """A mistake in attention in FP8 beside experts in NVFP4."""
    text = f"{rest} {label}".strip()
    return Case(rule, edit, algo="MIXED_PRECISION", rest=rest, label=text, **options)


def relabelled(stem: str, algo: str) -> Edit:
    return lambda d: [
        c["quantized_layers"][stem].update(quant_algo=algo)
        for c in (d.quant, d.hf_config["quantization"])
    ]


def moved(one: str, other: str) -> Edit:
    """Exchange the codes of two weights of one shape."""

    def change(d: Draft) -> None:
        names = f"{one}.weight", f"{other}.weight"
        d.tensors |= dict(zip(names, [d.tensors[name] for name in names[::-1]], strict=True))

    return change


def packed_as(stem: str, algo: str) -> Edit:
    """Another algorithm for one linear, rightly listed."""

    def change(d: Draft) -> None:
        drop_linear(stem)(d)
        d.tensors |= pack_fp8(stem, d.source, algo)
        relabelled(stem, algo)(d)

    return change


def as_it_was(stem: str) -> Edit:
    """A linear that is not quantized, rightly left out of the list."""

    def change(d: Draft) -> None:
        drop_linear(stem)(d)
        d.tensors[f"{stem}.weight"] = d.source[f"{stem}.weight"]
        for config in (d.quant, d.hf_config["quantization"]):
            del config["quantized_layers"][stem]

    return change


def rolled(t: torch.Tensor) -> torch.Tensor:
    return t.view(torch.uint8).roll(1, 0).view(t.dtype)


def with_nan(t: torch.Tensor) -> torch.Tensor:
    t.view(torch.uint8)[3, 5] = 0xFF
    return t


MIXED = [
    mixed("fp8-tensors", drop(f"{O}.weight_scale"), label="no scale"),
    mixed("fp8-tensors", put(f"{O}.weight", lambda t: t.view(torch.float8_e5m2)), label="dtype"),
    mixed("fp8-tensors", put(f"{O}.weight_scale", lambda t: t.repeat(2)), label="two scales"),
    mixed("fp8-tensors", relabelled(O, "FP8_PB_WO"), "FP8_PER_CHANNEL_PER_TOKEN", "another"),
    mixed("fp8-tensors", relabelled(O, "FP8_NEW"), label="unknown"),
    mixed("fp8-tensors", put(f"{O}.weight_scale", lambda t: t[:, :-1]), "MXFP8", "a group less"),
    mixed("fp8-tensors", put(f"{O}.weight_scale", lambda t: t.repeat(2, 1, 1, 1)), "FP8_PB_WO"),
    mixed("fp8-scale-value", put(f"{O}.weight_scale", torch.zeros_like), label="zero"),
    mixed("fp8-scale-value", put(f"{O}.weight_scale", lambda t: -t), label="negative"),
    mixed("fp8-scale-value", put(f"{O}.weight_scale", lambda t: t * torch.nan),
          "FP8_PER_CHANNEL_PER_TOKEN", "NaN"),
    mixed("fp8-nan", put(f"{O}.weight", with_nan)),
    mixed("weight-error", put(f"{O}.weight", with_nan), with_source=True, label="NaN"),
    mixed("input-scale-missing", drop(f"{O}.input_scale")),
    mixed("fp8-tensors", scalar(f"{O}.input_scale", 1.0), "MXFP8", "an input scale"),
    mixed("tensor-unexpected", scalar(f"{O}.weight_scale_2", 1.0), label="a global scale"),
    mixed("input-scale-shape", put(f"{O}.input_scale", lambda t: t.repeat(2))),
    mixed("input-scale-nan", scalar(f"{O}.input_scale", float("nan"))),
    mixed("group-input-scale-differs", scalar(f"{Q}.input_scale", 0.5)),
    mixed("fp8-group-scale-differs", put(f"{Q}.weight_scale", lambda t: t * 2)),
    mixed("group-algo-differs", packed_as(Q, "MXFP8")),
    mixed("group-partial", as_it_was(Q)),
    mixed("weight-error", moved(Q, O), with_source=True, label="q and o exchanged"),
    mixed("weight-error", put(f"{O}.weight", rolled), "FP8_PER_CHANNEL_PER_TOKEN",
          "rows shifted", with_source=True),
    mixed("weight-error", put(f"{O}.weight_scale", lambda t: t.roll(1, 1) + 1), "MXFP8",
          "scales shifted", with_source=True),
    mixed("weight-error", put(f"{O}.weight_scale", lambda t: t * 1.5), "FP8_PB_WO", "a scale",
          with_source=True),
]  # fmt: skip

CASES = [*FILES, *CONFIG, *STRUCTURE, *VALUES, *GROUPS, *MIXED, *SOURCE]


def run(case: Case, tmp_path: Path) -> set[str]:
    d = draft(case.algo, kv=case.kv, rest=case.rest)
    case.edit(d)
    d.write(tmp_path / "out")
    case.after(tmp_path / "out", d)
    source = write_source(tmp_path / "source", d.source) if case.with_source else None
    return {finding.id for finding in verify(tmp_path / "out", source=source).findings}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.rule} {case.label}".strip())
def test_a_broken_rule_is_found_and_no_other(case: Case, tmp_path: Path) -> None:
    assert run(case, tmp_path) == {case.rule}


@pytest.mark.parametrize("case", ALIGNMENT, ids=lambda case: case.rule)
def test_alignment(case: Case, tmp_path: Path) -> None:
    assert run(case, tmp_path) == {"cutlass-alignment", "marlin-alignment"}


def test_every_rule_is_broken_by_a_case() -> None:
    # weight-ruined comes with block-scale-subnormal: test_an_expert_far_below_its_group_is_legal
    broken = {case.rule for case in [*CASES, *ALIGNMENT]} | {rule for rule, *_ in PACKED}
    # reference-differs needs a reference: tests/codecs/test_reference.py
    assert broken | {"weight-ruined", "reference-differs"} == set(RULES)


def test_the_documentation_has_the_same_table() -> None:
    text = (Path(__file__).parents[2] / "docs" / "verify.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `")]
    documented = [tuple(cell.strip().strip("`") for cell in row[1:5]) for row in rows]
    assert documented == [(r.id, str(r.severity), r.says, r.effect) for r in RULES.values()]


def test_a_finding_names_tensor_cause_and_effect(tmp_path: Path) -> None:
    d = draft()
    d.tensors.pop(f"{E1}.up_proj.input_scale")
    d.write(tmp_path / "out")
    (finding,) = verify(tmp_path / "out").findings
    assert finding.id == "input-scale-missing"
    assert finding.tensor == f"{E1}.up_proj.input_scale"
    assert finding.severity == "error"
    assert "uninitialized" in finding.effect


def test_the_router_missing_from_the_ignore_list_is_told_by_engine(tmp_path: Path) -> None:
    d = draft()
    d.set_ignore(["lm_head", ROUTERS[0]])
    d.write(tmp_path / "out")
    (finding,) = verify(tmp_path / "out").findings
    assert finding.tensor == ROUTERS[1]
    assert all(engine in finding.found for engine in ("vLLM", "SGLang", "TensorRT-LLM"))


def test_half_a_fused_module_in_the_ignore_list_is_told_by_engine(tmp_path: Path) -> None:
    d = draft()
    d.set_ignore(["lm_head", *ROUTERS, Q])
    d.write(tmp_path / "out")
    found = {finding.id: finding for finding in verify(tmp_path / "out").findings}
    assert "vLLM" in found["ignore-refused"].found
    assert found["ignore-refused"].tensor == Q
    assert "TensorRT-LLM" in found["ignore-excludes-quantized"].found


def test_a_damaged_checkpoint_gives_the_same_report_with_any_number_of_threads(
    tmp_path: Path,
) -> None:
    d = draft()
    for case in VALUES[:6]:
        case.edit(d)
    swap(DOWN, f"{E1}.down_proj")(d)
    d.write(tmp_path / "out")
    source = write_source(tmp_path / "source", d.source)
    reports = [verify(tmp_path / "out", source=source, threads=n) for n in (1, 2, 5)]
    assert len({report.to_json() for report in reports}) == 1
    assert not reports[0].clean
    assert json.loads(reports[0].to_json())["clean"] is False
    shutil.rmtree(tmp_path / "out")


def test_a_tied_head_that_is_the_embedding(tmp_path: Path) -> None:
    d = draft()
    d.config["tie_word_embeddings"] = True
    d.tensors["lm_head.weight"] = d.tensors["model.embed_tokens.weight"].clone()
    d.write(tmp_path / "out")
    assert not verify(tmp_path / "out").findings


@pytest.mark.parametrize(
    ("weight", "scale"),
    [
        ("gate_up_proj", "gate_up_proj_weight_scale"),
        ("gate_up_proj.weight", "gate_up_proj.weight_scale"),
        ("w13_weight", "w13_weight_scale"),
    ],
)
def test_experts_quantized_in_one_tensor_are_outside(
    tmp_path: Path, weight: str, scale: str
) -> None:
    d = draft()
    drop_linear(f"{L0}.mlp.experts")(d)
    codes, scales = torch.zeros(4, 32, 64).byte(), torch.ones(4, 4, 64).to(torch.float8_e4m3fn)
    d.tensors[f"{L0}.mlp.experts.{weight}"] = codes
    d.tensors[f"{L0}.mlp.experts.{scale}"] = scales
    d.write(tmp_path / "out")
    with pytest.raises(UnreadableError, match=r"stacked in one tensor .* outside of what verify"):
        verify(tmp_path / "out")
