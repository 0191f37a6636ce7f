# SPDX-License-Identifier: Apache-2.0
"""Proves which windows of a text `fourfold eval` reads: all tokens in their order, documents apart,
and each window as a text of its own where the tokenizer begins texts with a token."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from calibration.test_data import BOS, EOS, ID, WORDS, save_words
from fourfold import EvaluationConfig
from fourfold.calibration.encoding import Encoder
from fourfold.embedded import heldout_text, model_dir
from fourfold.errors import CalibrationError, UsageError
from fourfold.evaluation.windows import Windows, read_windows

HELDOUT = Path(model_dir()).parent / "heldout.txt"


def windows_of(
    text: Path, folder: Path | None = None, limit: int | None = None, **options: Any
) -> Windows:
    encoder = Encoder(model_dir(), 320) if folder is None else Encoder(folder, len(WORDS))
    return read_windows(EvaluationConfig(text, **options), encoder, limit)


def flat(windows: Windows) -> list[int]:
    return windows.ids_NW.flatten().tolist()


def test_a_text_file_is_one_document() -> None:
    found = windows_of(HELDOUT, length=512, windows=64)
    assert bytes(flat(found)) == heldout_text().encode()[: 64 * 512]
    assert found.origin == "heldout.txt"
    every = windows_of(HELDOUT, length=512, windows=165)
    assert bytes(flat(every)) == heldout_text().encode()[: 165 * 512]
    assert every.digest != found.digest


def test_tokens_are_rounded_down_to_windows() -> None:
    assert windows_of(HELDOUT, length=512, tokens=2000).ids_NW.shape == (3, 512)


def test_defaults() -> None:
    assert windows_of(HELDOUT, length=100).ids_NW.shape == (32, 100)
    assert windows_of(HELDOUT).ids_NW.shape == (32, 2048)
    assert windows_of(HELDOUT, limit=300).ids_NW.shape == (32, 300)
    assert windows_of(HELDOUT, length=20_000).ids_NW.shape == (4, 20_000)


def test_documents_are_joined_in_their_order(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    lines = [{"text": "ab"}, {"text": "cd"}, {"input_ids": [1, 2, 3]}, {"text": "ef"}]
    file.write_text("\n".join(map(json.dumps, lines)))
    found = flat(windows_of(file, length=6, windows=2))
    assert found == [*b"ab", 256, *b"cd", 256, 1, 2, 3, *b"ef", 256]


def test_every_window_begins_like_a_text(tmp_path: Path) -> None:
    folder, file = save_words(tmp_path / "words"), tmp_path / "text.txt"
    file.write_text("w1 w2 w3 w4 w5 w6 w7 w8")
    found = windows_of(file, folder, length=4, windows=3).ids_NW.tolist()
    ids = [ID[f"w{number}"] for number in range(1, 9)]
    assert found == [[BOS, *ids[:3]], [BOS, *ids[3:6]], [BOS, *ids[6:], EOS]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 4}, "`length=4`: the model takes at most 3 tokens"),
        ({"length": 3, "tokens": 2}, "`tokens=2`: fill no window of 3. Give more"),
        ({"length": 3, "windows": 4}, "fill 3 windows of 3; 4 are needed. Give a longer text, or"),
        ({"length": 3, "tokens": 12}, "or `windows=3`."),
        ({"windows": 0}, "`windows=0`: give a whole number of at least 1"),
        ({"length": 1}, "`length=1`: give a whole number of at least 2"),
        ({"top": 4}, "`top=4`: give a whole number of at least 5"),
        ({"windows": 1, "tokens": 512}, "give `windows` or `tokens`, not both."),
    ],
)
def test_sizes_that_do_not_fit(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("ten bytes.")
    with pytest.raises(UsageError, match=re.escape(message)):
        windows_of(file, limit=3, **options)


def test_texts_that_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("short")
    wanted = "has 6 tokens, which fill 0 windows of 64; 1 are needed. Give a longer text, or"
    with pytest.raises(CalibrationError, match=re.escape(wanted)):
        windows_of(file, length=64)
    file.write_text(" \n")
    with pytest.raises(CalibrationError, match="has 0 tokens"):
        windows_of(file, length=64)
    with pytest.raises(CalibrationError, match=r"nowhere\.txt: no such file"):
        windows_of(tmp_path / "nowhere.txt")
    with pytest.raises(UsageError, match=r"^`text` is empty"):
        EvaluationConfig("")
    file.write_text("words")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/config.json").write_bytes((model_dir() / "config.json").read_bytes())
    with pytest.raises(CalibrationError, match=r"has no tokenizer\. Put the tokenizer's files"):
        windows_of(file, tmp_path / "bare")
