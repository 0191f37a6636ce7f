# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in the compressed-tensors layout, made by the library's own code: each mistake is
found, by its rule and no other."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.quant_scheme import (
    FP8,
    FP8_BLOCK,
    FP8_DYNAMIC,
    MXFP8,
    NVFP4,
    NVFP4A16,
)

from fourfold.verification import UnreadableError, verify

from .build import ROUTERS, Draft, draft, write_source
from .test_hostile import damaged

Edit = Callable[[Draft], object]

L0 = "model.layers.0"
E0 = f"{L0}.mlp.experts.0"
Q, O = f"{L0}.self_attn.q_proj", f"{L0}.self_attn.o_proj"  # noqa: E741
FORMAT = "nvfp4-pack-quantized"
KV = QuantizationArgs(num_bits=8, type="float", strategy="tensor", symmetric=True, dynamic=False)
FP8_FORMAT, MX_FORMAT, MIXED_FORMAT = "float-quantized", "mxfp8-quantized", "mixed-precision"
RESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "FP8": (FP8_FORMAT, FP8),
    "FP8_PER_CHANNEL_PER_TOKEN": (FP8_FORMAT, FP8_DYNAMIC),
    "FP8_PB_WO": (FP8_FORMAT, FP8_BLOCK),
    "MXFP8": (MX_FORMAT, MXFP8),
}
"""The library's names for FP8 algorithms."""
CHANNELS, BLOCKS = "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO"
OF_EXPERTS, OF_ATTENTION = [r"re:.*\.mlp\.experts\."], [r"re:.*\.self_attn\."]
RENAMED = {
    "weight": "weight_packed",
    "weight_scale_2": "weight_global_scale",
    "input_scale": "input_global_scale",
}


def packed(algo: str = "NVFP4", *, kv: bool = False) -> Draft:
    """The checkpoint of `draft`, in the other layout; the library writes its configuration."""
    made = draft(algo, kv=kv)
    tensors = {}
    for name, tensor in made.tensors.items():
        stem, _, leaf = name.rpartition(".")
        if leaf in ("k_scale", "v_scale"):
            tensors[f"{stem.rpartition('.')[0]}.{leaf}"] = tensor.reshape(1)
        elif leaf in ("weight_scale_2", "input_scale"):
            tensors[f"{stem}.{RENAMED[leaf]}"] = (1 / tensor).reshape(1)
        else:
            is_codes = tensor.dtype == torch.uint8
            tensors[f"{stem}.{RENAMED[leaf]}" if is_codes else name] = tensor
    made.tensors, made.hf_config = tensors, None
    arguments = NVFP4 if algo == "NVFP4" else NVFP4A16
    made.config["quantization_config"] = stated([group(["Linear"], arguments)], KV if kv else None)
    return made


def mixed(rest: str) -> Draft:
    """Experts in W4A16 beside attention in FP8, in a group of its own."""
    made = draft("MIXED_PRECISION", rest=rest)
    tensors = {}
    for name, tensor in made.tensors.items():
        stem, _, leaf = name.rpartition(".")
        if ".self_attn." in name and tensor.dtype == torch.float32:
            shapes = {"FP8": (1,), CHANNELS: (-1, 1), BLOCKS: tensor.shape[::2]}
            tensors[name] = tensor.reshape(shapes[rest])
        elif leaf == "weight_scale_2":
            tensors[f"{stem}.{RENAMED[leaf]}"] = (1 / tensor).reshape(1)
        else:
            is_codes = tensor.dtype == torch.uint8 and leaf == "weight"
            tensors[f"{stem}.{RENAMED[leaf]}" if is_codes else name] = tensor
    made.tensors, made.hf_config = tensors, None
    form, arguments = RESTS[rest]
    groups = [group(OF_EXPERTS, NVFP4A16), group(OF_ATTENTION, arguments, form)]
    made.config["quantization_config"] = stated(groups, None, MIXED_FORMAT)
    return made


def group(targets: list[str], arguments: dict[str, Any], form: str = FORMAT) -> QuantizationScheme:
    return QuantizationScheme(**arguments, targets=targets, format=form)


def stated(
    groups: list[QuantizationScheme], kv: QuantizationArgs | None, form: str = FORMAT
) -> dict[str, Any]:
    config = QuantizationConfig(
        config_groups={f"group_{number}": scheme for number, scheme in enumerate(groups)},
        ignore=["lm_head", *ROUTERS],
        kv_cache_scheme=kv,
        format=form,
        quantization_status="compressed",
    )
    return json.loads(config.model_dump_json())


def ids_of(made: Draft, folder: Path, *, with_source: bool = False) -> set[str]:
    made.write(folder / "out")
    source = write_source(folder / "source", made.source) if with_source else None
    return {finding.id for finding in verify(folder / "out", source=source).findings}


@pytest.mark.parametrize("kv", [False, True])
@pytest.mark.parametrize("algo", ["NVFP4", "W4A16_NVFP4"])
def test_a_right_one_has_no_finding(algo: str, kv: bool, tmp_path: Path) -> None:
    made = packed(algo, kv=kv)
    made.write(tmp_path / "out")
    report = verify(tmp_path / "out", source=write_source(tmp_path / "source"))
    assert not report.findings, str(report)
    assert report.quant_algo == algo
    assert report.counts.compared_linears == report.counts.quantized_linears == 32
    assert report.counts.kv_scales == 4 * kv
    assert max(error.relative_error for error in report.relative_errors) < 0.12


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    return lambda d: d.tensors.__setitem__(name, change(d.tensors[name].clone()))


def number(name: str, value: float) -> Edit:
    return put(name, lambda t: torch.full_like(t, value))


def drop(name: str) -> Edit:
    return lambda d: d.tensors.pop(name)


def add(name: str, tensor: torch.Tensor) -> Edit:
    return lambda d: d.tensors.__setitem__(name, tensor)


def quant(**values: object) -> Edit:
    return lambda d: d.quant.update(values)


def in_group(part: str, **values: object) -> Edit:
    return lambda d: d.quant["config_groups"]["group_0"][part].update(values)


def group_0(**values: object) -> Edit:
    return lambda d: d.quant["config_groups"]["group_0"].update(values)


def ignored(*names: str) -> Edit:
    return lambda d: d.quant["ignore"].extend(names)


def together(*edits: Edit) -> Edit:
    return lambda d: [edit(d) for edit in edits]


def two_groups(targets: list[str], others: list[str]) -> Edit:
    """A second group, with the same arguments."""

    def change(d: Draft) -> None:
        groups = [group(targets, NVFP4), group(others, NVFP4)]
        d.config["quantization_config"] = stated(groups, None)

    return change


def as_modelopt(d: Draft) -> None:
    """The global scales as multipliers, as the other layout has them."""
    for name, tensor in d.tensors.items():
        if name.endswith("weight_global_scale"):
            d.tensors[name] = 1 / tensor


def flipped(t: torch.Tensor) -> torch.Tensor:
    return t >> 4 | t << 4


CASES: list[tuple[str, str, Edit]] = [
    ("quant-method", "none", quant(quant_method=None)),
    ("config-status", "frozen", quant(quantization_status="frozen")),
    ("config-format", "packed integers", together(quant(format="pack-quantized"),
                                                  group_0(format="pack-quantized"))),
    ("config-groups", "five bits", in_group("weights", num_bits=5)),
    ("config-groups", "group", in_group("weights", strategy="group")),
    ("config-groups", "asymmetric", in_group("weights", symmetric=False)),
    ("config-groups", "dynamic inputs", in_group("input_activations", dynamic=True)),
    ("config-groups", "outputs", group_0(output_activations={"num_bits": 8})),
    ("group-size", "32", in_group("weights", group_size=32)),
    ("weight-missing", "", drop(f"{O}.weight_packed")),
    ("block-scale-missing", "", drop(f"{O}.weight_scale")),
    ("global-scale-missing", "", drop(f"{O}.weight_global_scale")),
    ("input-scale-missing", "", drop(f"{O}.input_global_scale")),
    ("input-scale-unexpected", "", group_0(input_activations=None)),
    ("weight-dtype", "", put(f"{O}.weight_packed", lambda t: t.view(torch.int8))),
    ("global-scale-dtype", "", put(f"{O}.weight_global_scale", lambda t: t.half())),
    ("global-scale-shape", "", put(f"{O}.weight_global_scale", lambda t: t.repeat(2))),
    ("block-scale-shape", "", put(f"{O}.weight_scale", lambda t: t.t().contiguous())),
    ("scale-not-scalar", "", put(f"{O}.weight_global_scale", lambda t: t.reshape(()))),
    ("global-scale-zero", "", number(f"{O}.weight_global_scale", 0.0)),
    ("global-scale-negative", "", number(f"{O}.weight_global_scale", -9.0)),
    ("global-scale-nan", "infinite", number(f"{O}.weight_global_scale", float("inf"))),
    ("global-scale-nan", "its reciprocal", number(f"{O}.weight_global_scale", 1e-42)),
    ("input-scale-zero", "", number(f"{O}.input_global_scale", 0.0)),
    ("group-scale-differs", "", put(f"{Q}.weight_global_scale", lambda t: t * 2)),
    ("group-input-scale-differs", "", put(f"{Q}.input_global_scale", lambda t: t * 2)),
    ("tensor-unexpected", "the other layout", add(f"{O}.weight_scale_2", torch.ones(()))),
    ("tensor-unexpected", "a plain weight", add(f"{O}.weight", torch.ones(4, 4).bfloat16())),
    ("tensor-unexpected", "a zero point", add(f"{O}.weight_zero_point", torch.ones(()))),
    ("ignore-lacks-unquantized", "", lambda d: d.quant["ignore"].remove(ROUTERS[0])),
    ("ignore-excludes-quantized", "a name", ignored(O)),
    ("ignore-excludes-quantized", "the end of it", ignored("self_attn.o_proj")),
    ("ignore-excludes-quantized", "an expression", ignored(r"re:.*layers\.1\.mlp\.experts")),
    ("ignore-refused", "no expression", ignored("re:(")),
    ("config-targets", "part of a module", two_groups(["Linear"], [Q, f"{L0}.self_attn.k_proj",
                                                                  f"{L0}.self_attn.v_proj"])),
    ("kv-cache-scheme", "", quant(kv_cache_scheme={**KV.model_dump(mode="json"),
                                                   "strategy": "channel"})),
]  # fmt: skip

WITH_SOURCE: list[tuple[str, str, Edit]] = [
    ("weight-error", "multipliers", as_modelopt),
    ("weight-error", "nibbles swapped", put(f"{O}.weight_packed", flipped)),
    ("copied-bits-differ", "", put("model.norm.weight", lambda t: t * 2)),
    ("tensor-lost", "", drop("model.norm.weight")),
]


@pytest.mark.parametrize(("rule", "label", "edit"), CASES, ids=[f"{c[0]} {c[1]}" for c in CASES])
def test_a_mistake_is_found(rule: str, label: str, edit: Edit, tmp_path: Path) -> None:
    made = packed()
    edit(made)
    assert ids_of(made, tmp_path) == {rule}


@pytest.mark.parametrize(("rule", "label", "edit"), WITH_SOURCE)
def test_a_mistake_is_found_beside_the_source(
    rule: str, label: str, edit: Edit, tmp_path: Path
) -> None:
    made = packed("W4A16_NVFP4")
    edit(made)
    assert rule in ids_of(made, tmp_path, with_source=True)


def test_a_stale_file_of_the_other_layout(tmp_path: Path) -> None:
    made = packed()
    made.hf_config = {"quantization": {"quant_algo": "NVFP4"}}
    assert ids_of(made, tmp_path) == {"config-disagrees"}


def test_a_list_with_a_part_of_a_module(tmp_path: Path) -> None:
    """The engines refuse it, and transformers leaves that part unquantized."""
    made = packed()
    made.quant["ignore"].append(Q)
    assert ids_of(made, tmp_path) == {"ignore-refused", "ignore-excludes-quantized"}


def test_scales_of_a_kv_cache_as_llm_compressor_stores_them(tmp_path: Path) -> None:
    made = packed(kv=True)
    name = f"{L0}.self_attn.k_scale"
    made.tensors[name] = made.tensors[name].bfloat16()
    assert ids_of(made, tmp_path / "bf16") == set()
    made.tensors[name] = torch.tensor([0.0])
    assert ids_of(made, tmp_path / "zero") == {"kv-scale-value"}
    del made.tensors[name]
    assert ids_of(made, tmp_path / "none") == {"kv-scale-missing"}


def test_several_groups(tmp_path: Path) -> None:
    """W4A16 experts beside W4A4 attention: each linear is judged by its own group."""
    made = packed()
    for name in [name for name in made.tensors if ".experts." in name]:
        if name.endswith("input_global_scale"):
            del made.tensors[name]
    experts = [rf"re:.*layers\.{layer}\.mlp\.experts\..*" for layer in (0, 1)]
    groups = [group(experts, NVFP4A16), group(["re:.*self_attn.*"], NVFP4)]
    made.config["quantization_config"] = stated(groups, None)
    assert ids_of(made, tmp_path / "out") == set()
    del made.tensors[f"{O}.input_global_scale"]
    assert ids_of(made, tmp_path / "broken") == {"input-scale-missing"}


def test_a_linear_in_no_group(tmp_path: Path) -> None:
    """vLLM builds it unquantized, SGLang refuses it."""
    made = packed()
    targets = [r"re:.*\.mlp\.experts\.", r"re:.*\.[qkv]_proj", r"re:.*\.1\.self_attn\.o_proj"]
    made.config["quantization_config"] = stated([group(targets, NVFP4)], None)
    made.write(tmp_path / "out")
    findings = verify(tmp_path / "out").findings
    assert {finding.id for finding in findings} == {"ignore-excludes-quantized", "ignore-refused"}
    assert {finding.tensor for finding in findings} == {O}
    assert any("SGLang: an error at" in finding.found for finding in findings)


@pytest.mark.parametrize("rest", RESTS)
def test_fp8_beside_nvfp4(rest: str, tmp_path: Path) -> None:
    made = mixed(rest)
    made.write(tmp_path / "out")
    report = verify(tmp_path / "out", source=write_source(tmp_path / "source"))
    assert not report.findings, str(report)
    assert report.quant_algo == "MIXED_PRECISION"
    assert report.counts.compared_linears == report.counts.quantized_linears == 32
    assert report.counts.input_scales == (8 if rest == "FP8" else 0)
    assert not verify(tmp_path / "out").findings
    errors = {error.role: error.relative_error for error in report.roles}
    assert 0.02 < errors["attention"] < 0.035


def in_fp8(part: str, **values: object) -> Edit:
    return lambda d: d.quant["config_groups"]["group_1"][part].update(values)


def group_1(**values: object) -> Edit:
    return lambda d: d.quant["config_groups"]["group_1"].update(values)


def with_nan(t: torch.Tensor) -> torch.Tensor:
    t.view(torch.uint8)[3, 5] = 0xFF
    return t


def targets(number: int, *names: str) -> Edit:
    return lambda d: d.quant["config_groups"][f"group_{number}"].update(targets=[*names])


def in_no_group(d: Draft) -> None:
    """Every attention layer but one is named."""
    names = [f"re:.*\\.{last}_proj" for last in "qkv"]
    targets(1, *names, r"re:.*\.1\.self_attn\.o_proj")(d)


def as_it_was(d: Draft) -> None:
    """A layer of the FP8 group that is not quantized."""
    for leaf in ("weight_scale", "input_scale"):
        del d.tensors[f"{O}.{leaf}"]
    d.tensors[f"{O}.weight"] = d.source[f"{O}.weight"]


MIXED: list[tuple[str, str, str, Edit]] = [
    ("config-format", "FP8", "of the whole", quant(format=FP8_FORMAT)),
    ("config-format", "FP8", "of a group", group_1(format="naive-quantized")),
    ("config-format", "FP8", "no group's", group_1(format=None)),
    ("config-format", "MXFP8", "of MXFP8", group_1(format=FP8_FORMAT)),
    ("config-groups", "FP8", "four bits", in_fp8("weights", num_bits=4)),
    ("config-groups", "FP8", "integers", in_fp8("weights", type="int")),
    ("config-groups", "FP8", "a scale for each channel", in_fp8("weights", strategy="channel")),
    ("config-groups", "FP8", "asymmetric", in_fp8("weights", symmetric=False)),
    ("config-groups", "FP8", "dynamic inputs", in_fp8("input_activations", dynamic=True)),
    ("config-groups", "FP8", "no inputs", group_1(input_activations=None)),
    ("config-groups", "FP8", "outputs", group_1(output_activations={"num_bits": 8})),
    ("config-groups", CHANNELS, "static inputs", in_fp8("input_activations", dynamic=False)),
    ("config-groups", CHANNELS, "whole inputs", in_fp8("input_activations", strategy="tensor")),
    ("config-groups", BLOCKS, "other blocks", in_fp8("weights", block_structure=[64, 128])),
    ("config-groups", "FP8", "FP8 inputs of NVFP4", lambda d: d.quant["config_groups"][
        "group_0"].update(input_activations=d.quant["config_groups"]["group_1"]["weights"])),
    ("config-groups", "MXFP8", "scales", in_fp8("weights", scale_dtype="torch.float8_e4m3fn")),
    ("group-size", "MXFP8", "of weights", in_fp8("weights", group_size=16)),
    ("group-size", BLOCKS, "of inputs", in_fp8("input_activations", group_size=64)),
    ("fp8-tensors", "FP8", "no scale", drop(f"{O}.weight_scale")),
    ("fp8-tensors", "FP8", "two scales", put(f"{O}.weight_scale", lambda t: t.repeat(2))),
    ("fp8-tensors", "FP8", "E5M2", put(f"{O}.weight", lambda t: t.view(torch.float8_e5m2))),
    ("fp8-tensors", CHANNELS, "ModelOpt's", put(f"{O}.weight_scale", lambda t: t.reshape(-1))),
    ("fp8-tensors", CHANNELS, "exponents", put(f"{O}.weight_scale", lambda t: t.byte())),
    ("fp8-tensors", CHANNELS, "an input scale", add(f"{O}.input_scale", torch.ones(1))),
    ("fp8-tensors", BLOCKS, "ModelOpt's", put(f"{O}.weight_scale", lambda t: t[:, None, :, None])),
    ("fp8-tensors", "MXFP8", "floats", put(f"{O}.weight_scale", lambda t: t.float())),
    ("fp8-tensors", "FP8", "in the other group", together(
        targets(0, *OF_EXPERTS, *OF_ATTENTION), targets(1, "none"))),
    ("fp8-scale-value", "FP8", "zero", number(f"{O}.weight_scale", 0.0)),
    ("fp8-scale-value", BLOCKS, "negative", number(f"{O}.weight_scale", -1.0)),
    ("fp8-nan", CHANNELS, "", put(f"{O}.weight", with_nan)),
    ("fp8-group-scale-differs", "FP8", "", put(f"{Q}.weight_scale", lambda t: t * 2)),
    ("group-input-scale-differs", "FP8", "", put(f"{Q}.input_scale", lambda t: t * 2)),
    ("input-scale-missing", "FP8", "", drop(f"{O}.input_scale")),
    ("input-scale-shape", "FP8", "", put(f"{O}.input_scale", lambda t: t.repeat(2))),
    ("input-scale-nan", "FP8", "", number(f"{O}.input_scale", float("nan"))),
    ("tensor-unexpected", "FP8", "a global scale", add(f"{O}.weight_global_scale", torch.ones(1))),
    ("tensor-unexpected", "FP8", "NVFP4's inputs", add(f"{O}.input_global_scale", torch.ones(1))),
    ("tensor-unexpected", "MXFP8", "a zero point", add(f"{O}.weight_zero_point", torch.ones(1))),
    ("tensor-unexpected", "FP8", "an expert's", add(f"{E0}.up_proj.input_scale", torch.ones(1))),
    ("config-targets", "FP8", "experts in the other group", together(
        targets(1, *OF_EXPERTS, *OF_ATTENTION), targets(0, "none"))),
    ("ignore-excludes-quantized", "FP8", "a name", ignored(O)),
    ("ignore-lacks-unquantized", "FP8", "a layer of a group", as_it_was),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "rest", "label", "edit"), MIXED, ids=[" ".join(case[:3]) for case in MIXED]
)
def test_a_mistake_in_fp8_is_found(
    rule: str, rest: str, label: str, edit: Edit, tmp_path: Path
) -> None:
    made = mixed(rest)
    edit(made)
    assert ids_of(made, tmp_path) == {rule}


def test_an_fp8_linear_in_no_group(tmp_path: Path) -> None:
    """vLLM builds it unquantized, SGLang refuses it."""
    made = mixed("FP8")
    in_no_group(made)
    assert ids_of(made, tmp_path) == {
        "fp8-tensors", "ignore-excludes-quantized", "ignore-refused",
    }  # fmt: skip


@pytest.mark.parametrize("rest", ["FP8", BLOCKS])
def test_a_damaged_configuration_is_judged_or_refused(rest: str, tmp_path: Path) -> None:
    made = mixed(rest)
    made.write(tmp_path / "out")
    chance = random.Random(0)
    for _ in range(60):
        broken = {**made.config, "quantization_config": damaged(made.quant, chance)}
        (tmp_path / "out/config.json").write_text(json.dumps(broken))
        with suppress(UnreadableError):
            report = verify(tmp_path / "out")
            assert json.loads(report.to_json())["clean"] == report.clean


def rolled(t: torch.Tensor) -> torch.Tensor:
    return t.view(torch.uint8).roll(1, 0).view(t.dtype)


@pytest.mark.parametrize(
    ("rest", "edit"),
    [
        ("FP8", put(f"{O}.weight_scale", lambda t: 1 / t)),
        (CHANNELS, put(f"{O}.weight", rolled)),
        (BLOCKS, put(f"{O}.weight_scale", lambda t: t * 1.5)),
        ("MXFP8", put(f"{O}.weight_scale", lambda t: t + 1)),
    ],
)
def test_wrong_values_in_fp8_are_found_beside_the_source(
    rest: str, edit: Edit, tmp_path: Path
) -> None:
    made = mixed(rest)
    edit(made)
    assert ids_of(made, tmp_path, with_source=True) == {"weight-error"}


def test_other_formats_are_not_read(tmp_path: Path) -> None:
    made = packed()
    made.quant["config_groups"]["group_0"]["weights"].update(
        num_bits=4, type="int", strategy="group"
    )
    made.quant["config_groups"]["group_0"]["format"] = "pack-quantized"
    made.write(tmp_path / "out")
    with pytest.raises(UnreadableError, match="group_0 of config_groups is neither in NVFP4 nor"):
        verify(tmp_path / "out")
    made.quant["config_groups"] = {}
    made.write(tmp_path / "none")
    with pytest.raises(UnreadableError, match=r"not an NVFP4 checkpoint .* say nothing"):
        verify(tmp_path / "none")
    made = mixed("MXFP8")
    del made.quant["config_groups"]["group_0"]
    made.write(tmp_path / "fp8")
    with pytest.raises(UnreadableError, match=r"not an NVFP4 checkpoint .* say MXFP8"):
        verify(tmp_path / "fp8")
