# SPDX-License-Identifier: Apache-2.0
"""Proves that a run can show what source and output write: after a prompt, or after the beginning
of a calibration sample; and that what cannot be shown stops no run that has finished."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import fourfold
from families import FAMILIES, Truth, read_back
from fourfold import generate
from fourfold.config import CalibrationConfig, OutputConfig
from fourfold.embedded import model_dir
from fourfold.errors import SourceError, UsageError
from fourfold.evaluation import generation
from fourfold.events import Event

Written = Callable[[str], tuple[Path, Truth]]
PROMPT = "import os"
WEIGHTS_ONLY, CALIBRATED = "w4a16_nvfp4_experts_only", "nvfp4_experts_only"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture
def source(written: Written, tmp_path: Path) -> Path:
    """A small model with the embedded byte tokenizer."""
    folder = tmp_path / "source"
    shutil.copytree(written("qwen3_moe")[0], folder)
    for file in TOKENIZER_FILES:
        shutil.copy(model_dir() / file, folder)
    return folder


def ids_file(folder: Path) -> Path:
    """Token ids of bytes that the small model has."""
    path = folder / "ids.jsonl"
    rows = [list(b"0123456789 " * 8)] * 4
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return path


def quantize(source: Any, out: Path, recipe: str, preview: bool | str, **options: Any) -> Any:
    output = OutputConfig(verify=False, preview=preview)
    return fourfold.quantize(source, out, recipe, output=output, **options)


def test_both_continue_a_prompt(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = quantize(source, out, WEIGHTS_ONLY, PROMPT)
    expected = generate(out, PROMPT, source=source)
    assert result.preview.prompt == PROMPT
    assert result.preview.source.tokens == expected.source.tokens
    assert result.preview.quantized.tokens == expected.quantized.tokens
    assert not result.preview.simulated
    shown = json.loads(json.dumps(result.to_dict()))["preview"]
    assert shown["quantized"]["tokens"] == list(expected.quantized.tokens)
    assert shown["same_tokens"] == expected.same_tokens


def test_none_is_made_unless_it_is_asked_for(source: Path, tmp_path: Path) -> None:
    result = fourfold.quantize(source, tmp_path / "out", WEIGHTS_ONLY)
    assert result.preview is None
    assert result.to_dict()["preview"] is None


def test_a_calibration_sample_is_decoded(source: Path, tmp_path: Path) -> None:
    calibration = CalibrationConfig(ids_file(tmp_path), calib_size=2, calib_seq=80)
    result = quantize(source, tmp_path / "out", CALIBRATED, True, calibration=calibration)
    assert result.preview.prompt == ("0123456789 " * 8)[:64]
    assert result.preview.simulated
    assert len(result.preview.source.tokens) == len(result.preview.quantized.tokens) == 64


def test_without_a_tokenizer_ids_are_shown(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a model that does not fit into memory is streamed."""
    for file in TOKENIZER_FILES:
        (source / file).unlink()
    monkeypatch.setattr(generation, "memory_available", lambda: 1000)
    calibration = CalibrationConfig(ids_file(tmp_path), calib_size=2, calib_seq=8)
    result = quantize(source, tmp_path / "out", CALIBRATED, True, calibration=calibration)
    assert result.preview.prompt == " ".join(str(byte) for byte in b"01234567")
    assert result.preview.source.text == " ".join(map(str, result.preview.source.tokens))
    assert len(result.preview.source.tokens) == 8
    assert result.preview.source.streamed
    assert result.preview.quantized.streamed


def test_without_calibration_the_embedded_text_serves(tmp_path: Path) -> None:
    result = quantize(model_dir(), tmp_path / "out", WEIGHTS_ONLY, True)
    assert len(result.preview.prompt) > 50
    assert result.preview.source.text != ""


def test_a_model_in_memory_writes_itself(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no more than the output, should that be streamed."""
    expected = quantize(source, tmp_path / "one", WEIGHTS_ONLY, PROMPT).preview
    model, _ = read_back(FAMILIES["qwen3_moe"], source)
    model.train()
    tokenizer = AutoTokenizer.from_pretrained(model_dir())
    shown = quantize(model, tmp_path / "two", WEIGHTS_ONLY, PROMPT, tokenizer=tokenizer).preview
    assert model.training
    assert shown.source.tokens == expected.source.tokens
    assert shown.quantized.tokens == expected.quantized.tokens
    monkeypatch.setattr(generation, "memory_available", lambda: 1000)
    shown = quantize(model, tmp_path / "three", WEIGHTS_ONLY, PROMPT, tokenizer=tokenizer).preview
    assert (shown.source.streamed, shown.quantized.streamed) == (False, True)
    assert shown.source.tokens == expected.source.tokens[:8]
    assert shown.quantized.tokens == expected.quantized.tokens[:8]


def test_a_prompt_needs_a_tokenizer_before_anything_is_done(source: Path, tmp_path: Path) -> None:
    for file in TOKENIZER_FILES:
        (source / file).unlink()
    events: list[Event] = []
    with pytest.raises(SourceError, match="tokenizer"):
        quantize(source, tmp_path / "out", WEIGHTS_ONLY, PROMPT, on_event=events.append)
    model, _ = read_back(FAMILIES["qwen3_moe"], source)
    with pytest.raises(SourceError, match="tokenizer"):
        quantize(model, tmp_path / "out", WEIGHTS_ONLY, PROMPT, on_event=events.append)
    with pytest.raises(UsageError, match=r"`preview`: the prompt is empty"):
        OutputConfig(preview=" ")
    assert events == []
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_shown_is_a_warning(written: Written, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    shutil.copytree(written("openai_privacy_filter")[0], folder)
    for file in TOKENIZER_FILES:
        shutil.copy(model_dir() / file, folder)
    with pytest.warns(fourfold.FourfoldWarning, match="no preview"):
        result = quantize(folder, tmp_path / "out", WEIGHTS_ONLY, PROMPT)
    assert result.preview is None
    assert any("no preview: " in text and "does not write text" in text for text in result.warnings)
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("prompt", [[], [PROMPT]])
def test_the_command(
    prompt: list[str],
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The prompt is optional: an option may follow."""
    from fourfold.cli.app import main

    arguments = [source, tmp_path / "out", "--preview", *prompt, "--recipe", CALIBRATED]
    arguments += ["--calib", ids_file(tmp_path), "--calib-size", 2, "--calib-seq", 16]
    monkeypatch.setattr("sys.argv", ["fourfold", "quantize", *map(str, arguments)])
    with suppress(SystemExit):
        main()
    shown = capsys.readouterr().out
    assert (prompt[0] if prompt else "0123456789 01234") in shown.splitlines()
    assert "quantized, activations rounded" in shown
    assert "tokens are the same" in shown
