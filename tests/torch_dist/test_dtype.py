# SPDX-License-Identifier: Apache-2.0
"""`dtype="bfloat16"`: a checkpoint saved in FP32 gives the bytes of one saved in BF16, and no
option leaves FP32 beside BF16 without a word."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import fourfold
from conftest import Written
from fourfold.cli.app import app
from fourfold.errors import UsageError

from .test_source import W4A16, digests


def widen(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        tensors[name] = tensor.float()


def jitter(tensors: dict[str, torch.Tensor]) -> None:
    """Digits that BF16 does not have."""
    for name, tensor in tensors.items():
        tensors[name] = tensor.float() * (1 + 2**-12)


def bf16_config(folder: Path, to: Path) -> Path:
    """The Hugging Face folder without weights, and with a dtype of BF16."""
    to.mkdir()
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    (to / "config.json").write_text(json.dumps(config))
    return to


def test_it_is_measured_as_it_is_read(
    made: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    """In FP32 it is another model, whose predictions are not those that were kept."""
    wide, folder = made("qwen3_moe", jitter)
    hf, data = bf16_config(folder, tmp_path / "hf"), tmp_path / "ids.jsonl"
    data.write_text(json.dumps({"input_ids": [*range(3, 67)]}))
    fourfold.quantize(wide, tmp_path / "out", W4A16, hf_config=hf, dtype="bfloat16")
    options = fourfold.EvaluationConfig(data, length=32, cache=tmp_path / "cache")
    found, exact = (
        fourfold.evaluate(wide, tmp_path / "out", options, hf_config=hf, dtype=dtype)
        for dtype in ("bfloat16", None)
    )
    assert not exact.from_cache
    assert found.models[0].kl != exact.models[0].kl
    assert found.perplexity != exact.perplexity


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "qwen3_5_moe_text"])
def test_fp32_weights_are_read_as_bf16(
    name: str, made: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    narrow, folder = made(name)
    hf = bf16_config(folder, tmp_path / "hf")
    fourfold.quantize(narrow, tmp_path / "narrow", W4A16, hf_config=hf)
    shutil.rmtree(narrow)
    wide, _ = made(name, widen)
    result = fourfold.quantize(wide, tmp_path / "wide", W4A16, hf_config=hf, dtype="bfloat16")
    assert result.clean
    assert fourfold.verify(tmp_path / "wide", source=wide, hf_config=hf, dtype="bfloat16").clean
    ours, theirs = digests(tmp_path / "wide"), digests(tmp_path / "narrow")
    if name == "qwen3_moe":
        assert ours == theirs
    # The embeddings are rounded; what engines keep in FP32 is not.
    tensors = {}
    for file in (tmp_path / "wide").glob("*.safetensors"):
        tensors |= load_file(file)
    kept = ("e_score_correction_bias", "A_log", "dt_bias", "weight_scale_2")
    dtypes = {key: x.dtype for key, x in tensors.items() if x.dtype == torch.float32}
    assert all(key.endswith(kept) for key in dtypes), dtypes
    converted = fourfold.convert(wide, tmp_path / "bf16", hf_config=hf, dtype="bfloat16")
    again = fourfold.quantize(converted.out, tmp_path / "again", W4A16)
    assert again.clean
    assert digests(tmp_path / "again") == ours


def test_without_it_a_note_says_so(made: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    wide, folder = made("qwen3_moe", widen)
    hf = bf16_config(folder, tmp_path / "hf")
    plan = fourfold.plan(wide, W4A16, hf_config=hf)
    (note,) = [note for note in plan.notes if "stay FP32" in note]
    assert "beside dtype bfloat16 in config.json; `dtype=bfloat16`" in note
    rounded = fourfold.plan(wide, W4A16, hf_config=hf, dtype="bfloat16")
    assert not [note for note in rounded.notes if "stay FP32" in note]
    assert any("FP32 tensors are read as BF16" in note for note in rounded.notes)
    done = CliRunner().invoke(app, ["plan", str(wide), "--hf-config", str(hf)])
    assert "--dtype bfloat16 reads" in " ".join(done.output.split())


def test_any_checkpoint_on_disk(written: Written, tmp_path: Path) -> None:
    folder, _ = written("mixtral")
    model = bf16_config(folder, tmp_path / "model")
    tensors = {key: value.float() for key, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    result = fourfold.quantize(model, tmp_path / "out", W4A16, dtype="bfloat16")
    assert result.clean
    out = next((tmp_path / "out").glob("model-00001*"))
    assert torch.float32 not in {
        x.dtype for key, x in load_file(out).items() if not key.endswith("scale_2")
    }


def test_what_it_is_not_for(written: Written, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="`dtype=float8`: give bfloat16"):
        fourfold.plan(written("mixtral")[0], W4A16, dtype="float8")
    with pytest.raises(UsageError, match="only for a checkpoint on disk"):
        fourfold.plan(torch.nn.Linear(2, 2), W4A16, dtype="bfloat16")
