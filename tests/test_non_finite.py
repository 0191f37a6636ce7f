# SPDX-License-Identifier: Apache-2.0
"""NaN and Inf in copied tensors: found in the bytes, said at the end, in the files and by `verify`.

The judge of what is finite is PyTorch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fourfold
from families import Truth
from fourfold.config import OutputConfig
from fourfold.models.tokenizer import token_count
from fourfold.storage.non_finite import NonFinite, find_non_finite, merge

Written = Callable[[str], tuple[Path, Truth]]
EXPERTS = "w4a16_nvfp4_experts_only"
DTYPES = {
    "BF16": (torch.bfloat16, 2),
    "F16": (torch.float16, 2),
    "F8_E4M3": (torch.float8_e4m3fn, 1),
    "F8_E5M2": (torch.float8_e5m2, 1),
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_a_dtype(dtype: str) -> None:
    """One number a time, beside a finite one; so neither maximum can hide the other."""
    torch_dtype, size = DTYPES[dtype]
    numbers = np.arange(1 << (8 * size), dtype=f"u{size}")
    finite = torch.from_numpy(numbers.copy()).view(torch_dtype).float().isfinite()
    pairs = np.stack([np.zeros_like(numbers), numbers], axis=1)
    for pair, is_finite in zip(pairs, finite.tolist(), strict=True):
        found = find_non_finite("x", pair.view(np.uint8), dtype, size)
        assert found == (None if is_finite else NonFinite("x", 1, 1, 1, 1)), pair


@pytest.mark.parametrize(("dtype", "size"), [("F32", 4), ("F64", 8)])
def test_wide_numbers(dtype: str, size: int) -> None:
    for value in (np.inf, -np.inf, np.nan, -np.nan):
        data = np.array([[1, 2], [-3, value], [value, value]], dtype=f"f{size}")
        found = find_non_finite("x", data.reshape(-1).view(np.uint8), dtype, 2 * size)
        assert found == NonFinite("x", 3, 2, 1, 2)
    largest = np.finfo(f"f{size}")
    data = np.array([largest.max, largest.min, -0.0], dtype=f"f{size}")
    assert find_non_finite("x", data.view(np.uint8), dtype, size) is None


def test_pieces_of_one_row_count_it_once() -> None:
    data = np.full(8, np.nan, dtype=np.float32).view(np.uint8)
    parts = [find_non_finite("x", data[i : i + 4], "F32", 16, i) for i in range(0, 32, 4)]
    assert merge([part for part in parts if part]) == [NonFinite("x", 8, 2, 0, 1)]


@pytest.fixture
def damaged(written: Written, tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint with one number in the last row of a tensor that is copied."""

    def make(key: str, value: float = float("nan"), name: str = "qwen3_moe") -> Path:
        folder = Path(shutil.copytree(written(name)[0], tmp_path / "model"))
        tensors = load_file(folder / "model.safetensors")
        tensors[key].view(-1)[-1] = value
        save_file(tensors, folder / "model.safetensors")
        return folder

    return make


def give_tokenizer(folder: Path, tokens: int) -> None:
    from tokenizers import Tokenizer, models

    vocabulary = {f"t{number}": number for number in range(tokens)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="t0")).save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("key", ["model.norm.weight", "model.layers.1.self_attn.o_proj.weight"])
def test_it_is_said_everywhere(
    damaged: Callable[..., Path], tmp_path: Path, key: str, value: float
) -> None:
    model, out = damaged(key, value), tmp_path / "out"
    with pytest.warns(fourfold.FourfoldWarning, match=rf"{key}: 1 NaN or Inf in row"):
        result = fourfold.quantize(model, out, EXPERTS)
    assert "NaN or Inf in 1 copied tensor" in str(result)
    assert [entry["name"] for entry in result.to_dict()["non_finite"]] == [key]
    summary = json.loads((out / "quant_summary.json").read_text())
    assert [entry["name"] for entry in summary["non_finite"]] == [key]
    assert key in (out / "report.html").read_text()
    for source in (None, model):
        report = fourfold.verify(out, source=source)
        assert [(x.id, x.tensor) for x in report.findings if "finite" in x.id] == [
            ("kept-not-finite", key)
        ]
        assert report.clean


def test_it_is_an_error_of_a_strict_run(damaged: Callable[..., Path], tmp_path: Path) -> None:
    model = damaged("model.norm.weight")
    with pytest.raises(fourfold.NonFiniteError, match=r"model.norm.weight: 1 NaN or Inf"):
        fourfold.quantize(model, tmp_path / "out", EXPERTS, output=OutputConfig(strict=True))


@pytest.mark.parametrize(("fewer", "is_said"), [(1, False), (0, True)])
def test_embeddings_of_no_token(
    damaged: Callable[..., Path], tmp_path: Path, fewer: int, is_said: bool
) -> None:
    key = "model.embed_tokens.weight"
    model, out = damaged(key), tmp_path / "out"
    rows = len(load_file(model / "model.safetensors")[key])
    give_tokenizer(model, rows - fewer)
    if is_said:
        with pytest.warns(fourfold.FourfoldWarning, match=rf"in row {rows - 1}"):
            result = fourfold.quantize(model, out, EXPERTS)
    else:
        result = fourfold.quantize(model, out, EXPERTS)
    assert result.report is not None
    for report in (result.report, fourfold.verify(out)):
        assert any(x.id == "kept-not-finite" for x in report.findings) is is_said


def test_split_biases(damaged: Callable[..., Path], tmp_path: Path) -> None:
    model = damaged("model.layers.0.mlp.experts.down_proj_bias", name="gpt_oss")
    with pytest.warns(fourfold.FourfoldWarning, match=r"experts.3.down_proj.bias: 1 NaN"):
        fourfold.quantize(model, tmp_path / "out", EXPERTS)


def test_a_resumed_run_says_it_too(
    damaged: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = damaged("model.norm.weight"), tmp_path / "out"

    def fail(*_: object, **__: object) -> None:
        raise fourfold.ResourceError("full")

    with monkeypatch.context() as patch:
        patch.setattr("fourfold.api.write_own_files", fail)
        with pytest.raises(fourfold.ResourceError):
            fourfold.quantize(model, out, EXPERTS)
    with pytest.warns(fourfold.FourfoldWarning, match=r"model.norm.weight: 1 NaN"):
        fourfold.quantize(model, out, EXPERTS)


@pytest.mark.parametrize(
    ("contents", "count"),
    [
        ({"model": {"vocab": {"a": 0, "b": 7}}, "added_tokens": [{"id": 9}]}, 10),
        ({"model": {"vocab": [["a", 0.0], ["b", 0.0]]}, "added_tokens": None}, 2),
        ({"model": {"vocab": {"a": "x"}}, "added_tokens": [3]}, 0),
        ({"model": None}, None),
        (None, None),
    ],
)
def test_the_number_of_tokens(contents: object, count: int | None, tmp_path: Path) -> None:
    if contents is not None:
        (tmp_path / "tokenizer.json").write_text(json.dumps(contents))
    assert token_count(tmp_path) == count
