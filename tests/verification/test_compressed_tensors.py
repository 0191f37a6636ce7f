# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in the compressed-tensors layout, made by the library's own code: each mistake is
found, by its rule and no other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.quant_scheme import NVFP4, NVFP4A16

from fourfold.verification import UnreadableError, verify

from .build import ROUTERS, Draft, draft, write_source

Edit = Callable[[Draft], object]

L0 = "model.layers.0"
E0 = f"{L0}.mlp.experts.0"
Q, O = f"{L0}.self_attn.q_proj", f"{L0}.self_attn.o_proj"  # noqa: E741
FORMAT = "nvfp4-pack-quantized"
KV = QuantizationArgs(num_bits=8, type="float", strategy="tensor", symmetric=True, dynamic=False)
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


def group(targets: list[str], arguments: dict[str, Any]) -> QuantizationScheme:
    return QuantizationScheme(**arguments, targets=targets, format=FORMAT)


def stated(groups: list[QuantizationScheme], kv: QuantizationArgs | None) -> dict[str, Any]:
    config = QuantizationConfig(
        config_groups={f"group_{number}": scheme for number, scheme in enumerate(groups)},
        ignore=["lm_head", *ROUTERS],
        kv_cache_scheme=kv,
        format=FORMAT,
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


def test_other_formats_are_not_read(tmp_path: Path) -> None:
    made = packed()
    made.quant["config_groups"]["group_0"]["weights"].update(num_bits=8, strategy="channel")
    made.quant["config_groups"]["group_0"]["format"] = "float-quantized"
    made.write(tmp_path / "out")
    with pytest.raises(UnreadableError, match="group_0 of config_groups is not in NVFP4"):
        verify(tmp_path / "out")
    made.quant["config_groups"] = {}
    made.write(tmp_path / "none")
    with pytest.raises(UnreadableError, match="has no config_groups"):
        verify(tmp_path / "none")
