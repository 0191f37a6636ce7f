# SPDX-License-Identifier: Apache-2.0
"""Clean checkpoints are clean, whoever wrote them; what cannot be read is told as such."""

from __future__ import annotations

import json
import os
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fourfold.cli.tables import report_text
from fourfold.errors import SourceError
from fourfold.sources.safetensors import open_source
from fourfold.verification import Report, UnreadableError, verify

from .build import LAYERS, ROUTERS, draft, pack, source_tensors, write_source

INDEX = "model.safetensors.index.json"


def checked(tmp_path: Path, made=None, *, compare: bool = True) -> Report:
    d = made or draft()
    d.write(tmp_path / "out")
    source = write_source(tmp_path / "source", d.source) if compare else None
    return verify(tmp_path / "out", source=source)


@pytest.mark.parametrize("kv", [False, True])
@pytest.mark.parametrize("algo", ["NVFP4", "W4A16_NVFP4", "MIXED_PRECISION"])
def test_a_clean_checkpoint_has_no_finding(algo: str, kv: bool, tmp_path: Path) -> None:
    report = checked(tmp_path, draft(algo, kv=kv))
    assert report.findings == ()
    assert report.clean


FP8_ALGOS = ["FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "MXFP8"]


@pytest.mark.parametrize("rest", FP8_ALGOS)
def test_fp8_beside_nvfp4_is_compared_with_the_source(rest: str, tmp_path: Path) -> None:
    report = checked(tmp_path, draft("MIXED_PRECISION", rest=rest))
    assert report.findings == ()
    assert report.counts.compared_linears == LAYERS * (4 + 4 * 3)
    by_role = {role.role: role for role in report.roles}
    assert 0.02 < by_role["attention"].relative_error < 0.035
    assert 0.08 < by_role["experts"].relative_error < 0.11


def test_counts_and_errors(tmp_path: Path) -> None:
    report = checked(tmp_path, draft(kv=True))
    counts = report.counts
    assert counts.quantized_linears == counts.compared_linears == LAYERS * (4 + 4 * 3)
    assert counts.quantized_weights == 16 * counts.block_scales
    assert counts.input_scales == counts.quantized_linears
    assert counts.kv_scales == 2 * LAYERS
    assert counts.unquantized_linears == LAYERS + 1
    assert counts.copied_tensors == 3 + 5 * LAYERS
    assert counts.bytes_read > 2 * counts.quantized_weights
    assert {role.role for role in report.roles} == {"attention", "experts"}
    assert len(report.worst) == 10
    for error in report.relative_errors:
        assert 0.08 < error.relative_error < 0.11
        assert 19 < error.sqnr_db < 22


def test_errors_are_those_of_a_plain_computation(tmp_path: Path) -> None:
    from .build import quantize

    d = draft()
    report = checked(tmp_path, d)
    stem = "model.layers.1.mlp.experts.2.down_proj"
    weight = d.source[f"{stem}.weight"].double()
    scale = float(d.tensors[f"{stem}.weight_scale_2"])
    codes, blocks = quantize(d.source[f"{stem}.weight"], scale)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    nibbles = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).long()
    made = values[nibbles & 7] * torch.where(nibbles > 7, -1.0, 1.0)
    made = made * (blocks.double() * scale).repeat_interleave(16, dim=-1)
    expected = float((weight - made).norm() / weight.norm())
    found = next(error for error in report.relative_errors if error.name == stem)
    assert found.relative_error == pytest.approx(expected, rel=1e-5)


def test_any_subset_may_be_quantized(tmp_path: Path) -> None:
    d = draft("W4A16_NVFP4")
    attention = []
    for name in [name for name in d.source if ".self_attn." in name and "norm" not in name]:
        stem = name.removesuffix(".weight")
        for part in ("weight", "weight_scale", "weight_scale_2"):
            d.tensors.pop(f"{stem}.{part}")
        d.tensors[name] = d.source[name]
        attention.append(stem)
    d.set_ignore(["lm_head", *ROUTERS, *attention])
    report = checked(tmp_path, d)
    assert report.findings == ()
    assert {error.role for error in report.relative_errors} == {"experts"}


def test_an_open_source_may_be_given(tmp_path: Path) -> None:
    d = draft()
    d.write(tmp_path / "out")
    source = open_source(write_source(tmp_path / "source", d.source))
    assert verify(tmp_path / "out", source=source).clean
    assert source.slab("model.norm.weight", 0, 1).numel() == 1  # still open


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    calls: list[Any] = []
    d = draft()
    d.write(tmp_path / "out")
    source = write_source(tmp_path / "source", d.source)
    verify(tmp_path / "out", source=source, on_event=calls.append)
    done = [event.bytes_done for event in calls]
    assert done == sorted(done)
    assert {event.bytes_total for event in calls} == {done[-1]}


# ------------------------------------------------------------------------- legal, but unusual


def test_heavy_tails_are_legal(tmp_path: Path) -> None:
    source = source_tensors()
    generator = torch.Generator().manual_seed(3)
    for name in source:
        if ".experts." in name:
            student = torch.distributions.StudentT(2.0)
            torch.manual_seed(int(torch.randint(1 << 30, (1,), generator=generator)))
            source[name] = (student.sample(source[name].shape) * 0.02).bfloat16()
    assert checked(tmp_path, draft(source=source)).clean


def test_an_expert_far_below_its_group_is_legal(tmp_path: Path) -> None:
    """Up is 2⁻²⁰ of gate, so most of its block scales end at 2⁻⁹ and it loses all its digits."""
    source = source_tensors()
    name = "model.layers.0.mlp.experts.1.up_proj"
    source[f"{name}.weight"] = source[f"{name}.weight"] * 2.0**-20
    report = checked(tmp_path, draft(source=source))
    assert report.clean
    ruined = [found.tensor for found in report.findings if found.id == "weight-ruined"]
    assert ruined == [name]
    assert {found.id for found in report.findings} == {"block-scale-subnormal", "weight-ruined"}
    worst = report.worst[0]
    assert worst.name == name
    assert worst.relative_error > 0.35


def test_an_all_zero_weight_is_legal(tmp_path: Path) -> None:
    source = source_tensors()
    name = "model.layers.0.mlp.experts.1.down_proj"
    source[f"{name}.weight"] = torch.zeros_like(source[f"{name}.weight"])
    d = draft(source=source)
    shape = source[f"{name}.weight"].shape
    d.tensors[f"{name}.weight"] = torch.zeros(shape[0], shape[1] // 2, dtype=torch.uint8)
    d.tensors[f"{name}.weight_scale"] = torch.ones(shape[0], shape[1] // 16).to(torch.float8_e4m3fn)
    d.tensors[f"{name}.weight_scale_2"] = torch.tensor(1.0)
    report = checked(tmp_path, d)
    assert report.findings == ()
    error = next(error for error in report.relative_errors if error.name == name)
    assert error.relative_error == 0
    assert json.loads(report.to_json())["worst"]


def test_a_larger_global_scale_is_legal(tmp_path: Path) -> None:
    """Algorithms that leave room above the largest block divide by 6·256."""
    d = draft()
    for name in [name for name in d.source if f"{name}_scale_2" in d.tensors]:
        stem = name.removesuffix(".weight")
        scale = float(d.tensors[f"{stem}.weight_scale_2"]) * 448 / 256
        from .build import quantize

        codes, blocks = quantize(d.source[name], scale)
        d.tensors[f"{stem}.weight"], d.tensors[f"{stem}.weight_scale"] = codes, blocks
        d.tensors[f"{stem}.weight_scale_2"] = torch.tensor(scale)
    assert checked(tmp_path, d).findings == ()


def test_an_older_export_without_groups_and_with_shape_1_is_clean(tmp_path: Path) -> None:
    d = draft()
    del d.quant["config_groups"]
    for name in list(d.tensors):
        if name.endswith(("weight_scale_2", "input_scale")):
            d.tensors[name] = d.tensors[name].reshape(1)
    report = checked(tmp_path, d)
    assert report.clean
    assert {finding.id for finding in report.findings} == {"scale-not-scalar"}


# ------------------------------------------------------------------------------- not readable


def refused(out: Path, match: str, source: Path | None = None) -> None:
    with pytest.raises(UnreadableError, match=match) as caught:
        verify(out, source=source)
    assert caught.value.exit_code == 2
    assert isinstance(caught.value, SourceError)


def test_no_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "no such folder")


def test_no_config(tmp_path: Path) -> None:
    d = draft()
    d.write(tmp_path / "out")
    (tmp_path / "out" / "config.json").unlink()
    refused(tmp_path / "out", r"no config\.json")


def test_a_bf16_checkpoint(tmp_path: Path) -> None:
    refused(write_source(tmp_path / "out"), "not an NVFP4 checkpoint")


def test_an_fp8_checkpoint(tmp_path: Path) -> None:
    d = draft()
    d.quant["quant_algo"] = "FP8"
    d.hf_config = None
    d.write(tmp_path / "out")
    refused(tmp_path / "out", "not an NVFP4 checkpoint .*says FP8")


def test_the_other_layout(tmp_path: Path) -> None:
    d = draft()
    d.quant["quant_method"] = "compressed-tensors"
    d.write(tmp_path / "out")
    refused(tmp_path / "out", "compressed-tensors layout")


@pytest.mark.parametrize("keep", [5, 100, -7])
def test_a_truncated_shard(keep: int, tmp_path: Path) -> None:
    draft().write(tmp_path / "out")
    shard = tmp_path / "out" / "model-00002-of-00002.safetensors"
    os.truncate(shard, keep % shard.stat().st_size)
    refused(tmp_path / "out", "truncated")


def test_a_missing_shard(tmp_path: Path) -> None:
    draft().write(tmp_path / "out")
    (tmp_path / "out" / "model-00002-of-00002.safetensors").unlink()
    refused(tmp_path / "out", "shard is missing")


def test_an_index_that_points_outside(tmp_path: Path) -> None:
    d = draft()
    d.write(tmp_path / "out")
    d.edit_index(tmp_path / "out", lambda i: i["weight_map"].update(x="../other.safetensors"))
    refused(tmp_path / "out", "outside the folder")


@pytest.mark.parametrize("text", ["{", "[]", '{"quantization_config": {"ignore": 3}}'])
def test_a_broken_config(text: str, tmp_path: Path) -> None:
    draft().write(tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(text)
    refused(tmp_path / "out", "config.json")


def test_a_broken_source(tmp_path: Path) -> None:
    draft().write(tmp_path / "out")
    refused(tmp_path / "out", "no such folder", tmp_path / "nothing")
    folder = write_source(tmp_path / "source")
    (folder / INDEX).write_text("{}")
    refused(tmp_path / "out", "no weight_map", folder)


# ------------------------------------------------------------------------------------ printing


def test_the_report_prints_for_people(tmp_path: Path) -> None:
    d = draft()
    d.tensors.pop("model.layers.0.mlp.experts.1.up_proj.input_scale")
    report = checked(tmp_path, d)
    text = str(report)
    assert "error input-scale-missing" in text
    assert "model.layers.0.mlp.experts.1.up_proj.input_scale: missing" in text
    assert "the 10 largest" in text
    assert text.endswith("not clean: 1 error")
    console = Console(width=500, record=True, file=StringIO(), force_terminal=True)
    console.print(report_text(report))
    assert console.export_text(clear=False).rstrip() == text
    assert "\x1b[1;31mnot clean" in console.export_text(styles=True)


def test_many_findings_of_a_rule_are_cut_in_print_and_whole_in_json(tmp_path: Path) -> None:
    d = draft()
    missing = [name for name in d.tensors if name.endswith("input_scale")]
    for name in missing:
        d.tensors.pop(name)
    report = checked(tmp_path, d, compare=False)
    assert f"and {len(missing) - 20} more" in str(report)
    assert len(json.loads(report.to_json())["findings"]) == len(missing)


def test_json_is_plain(tmp_path: Path) -> None:
    d = draft()
    d.tensors["model.layers.0.mlp.experts.1.down_proj.weight_scale_2"] = torch.tensor(float("nan"))
    document = json.loads(checked(tmp_path, d).to_json())
    assert document["clean"] is False
    assert document["counts"]["nan_block_scales"] == 0
    (error,) = [e for e in document["relative_errors"] if e["relative_error"] is None]
    assert error["name"] == "model.layers.0.mlp.experts.1.down_proj"


def test_pack_is_what_the_tests_think(tmp_path: Path) -> None:
    """The layout of the test's own writer: low nibble first, sign in bit 3."""
    weight = torch.tensor([[6.0, -3.0] + [0.0] * 14])
    tensors = pack("x.o_proj", {"x.o_proj.weight": weight})
    assert tensors["x.o_proj.weight"][0, 0] == 0x7 | (0x8 | 0x5) << 4
