# SPDX-License-Identifier: Apache-2.0
"""A quantized source goes through everything that a BF16 source does: calibration, a kill and the
same command again, two ranks, verification, and text of both models."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM

import fourfold
import integers
import test_fp4_checkpoints as fp4
import test_fp8_checkpoints as fp8
from conftest import Written
from encoding import W4A4, Tensors, encode
from fourfold.evaluation.continuation import Sampling
from fourfold.evaluation.generation import generate
from jobs import assert_same, flat, ids_file, start
from test_ranks import on_ranks

SCHEME = integers.scheme(4, 16, symmetric=True)


def int4(key: str, value: Tensor) -> tuple[Tensors, Tensor] | None:
    """Routed experts alone, of random codes, as in Kimi-K2."""
    if ".experts." not in key or not key.endswith("_proj.weight"):
        return None
    stem, (rows, columns) = key.removesuffix(".weight"), value.shape
    parts = integers.packed(rows, columns, group=16, seed=len(key) + rows)
    stored = {f"{stem}.{name}": part for name, part in parts.items()}
    return stored, integers.decompressed(parts, SCHEME)


FORMS = {
    "deepseek_v3_mtp in FP8 blocks": ("deepseek_v3_mtp", *fp8.FORMS["transformers"]),
    "qwen3_moe in FP8 channels": ("qwen3_moe", *fp8.FORMS["compressed-tensors channels"]),
    "deepseek_v3_mtp in INT4": ("deepseek_v3_mtp", integers.compressed(SCHEME), int4),
    "gpt_oss in MXFP4": ("gpt_oss", fp4.GPT_OSS, fp4.gpt_oss(fp4.flat)),
    "qwen3_moe in NVFP4": ("qwen3_moe", fp4.NVFP4, fp4.nvfp4_packed),
}


@pytest.fixture(scope="module")
def tiny_gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its dimensions are multiples of 32."""
    folder = tmp_path_factory.mktemp("gpt_oss") / "source"
    torch.manual_seed(0)
    config = GptOssConfig(**fp4.TINY)
    GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def source(
    request: pytest.FixtureRequest, written: Written, tiny_gpt_oss: Path, tmp_path: Path
) -> Path:
    family, quantization, encoder = FORMS[request.param]
    folder = tiny_gpt_oss if family == "gpt_oss" else written(family)[0]
    shutil.copytree(folder, tmp_path / "bf16")
    encode(tmp_path / "bf16", tmp_path / "source", quantization, encoder)
    return tmp_path / "source"


@pytest.mark.parametrize("source", FORMS, indirect=True)
def test_a_whole_run(source: Path, tmp_path: Path) -> None:
    ids = ids_file(tmp_path)
    options = {"calib": ids, "calib_size": 8, "calib_seq": 24, "shards": 2, "threads": 1}
    whole = tmp_path / "whole"
    result = fourfold.quantize(source, whole, W4A4, **flat(**options))
    assert result.clean, str(result.report)
    assert fourfold.verify(whole, source=source).clean
    check_killed(source, whole, tmp_path / "killed", options)
    line = ["--calib", ids, "--calib-size", 8, "--calib-seq", 24, "--shards", 2, "--threads", 1]
    for code, _, err in on_ranks(["quantize", source, tmp_path / "ranks", "-r", W4A4, *line]):
        assert code == 0, err
    assert_same(tmp_path / "ranks", whole)
    tokens = generate(whole, [3, 5, 7], Sampling(max_new_tokens=4), source=source)
    assert tokens.source is not None
    assert len(tokens.source.tokens) == len(tokens.quantized.tokens) == 4


def check_killed(source: Path, whole: Path, out: Path, options: dict[str, object]) -> None:
    """Killed between changes of the disk, and gone on with, it leaves the same bytes."""
    for kill_at in (60, 30, 0):
        process = start(source, out, W4A4, kill_at=kill_at, **options)
        process.join(120)
        assert process.exitcode in ((-9,) if kill_at == 60 else (-9, 0))
        if process.exitcode == 0:
            break
    assert_same(out, whole)
