# SPDX-License-Identifier: Apache-2.0
"""Proves that pads in token ids without a mask are no text: neither in files nor in calls.

Where the end-of-text token serves as pad, runs of it at the beginning and the end of a row are
left out, and a single one, which ends or begins a text, is not.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fourfold.calibration.data import load_calibration
from fourfold.calibration.padding import pad_ids, text_mask
from fourfold.config import CalibrationConfig
from fourfold.embedded import model_dir

E = 9
MASKS = {
    "no pads": ([1, 2, 3], [1, 1, 1]),
    "on the right": ([1, 2, E, E, E], [1, 1, 0, 0, 0]),
    "on the left": ([E, E, 1, 2], [0, 0, 1, 1]),
    "on both sides": ([E, E, 1, E, 2, E, E], [0, 0, 1, 1, 1, 0, 0]),
    "an end of text": ([1, 2, E], [1, 1, 1]),
    "a beginning of text": ([E, 1, 2], [1, 1, 1]),
    "within the text": ([1, E, E, 2], [1, 1, 1, 1]),
    "another end before the pads": ([1, 2, 8, E, E], [1, 1, 1, 0, 0]),
    "nothing else": ([E, E, E], [0, 0, 0]),
    "one token, as in generation": ([E], [1]),
    "repeated words": ([1, 1, 2, 2], [1, 1, 1, 1]),
}


@pytest.mark.parametrize("what", MASKS)
def test_runs_at_the_beginning_and_the_end_are_pads(what: str) -> None:
    ids, mask = MASKS[what]
    assert text_mask(torch.tensor([ids]), frozenset({8, E})).tolist() == [mask]


def test_rows_are_judged_by_themselves() -> None:
    ids = torch.tensor([[1, E, E], [E, E, 1], [1, 2, E]])
    assert text_mask(ids, frozenset({E})).tolist() == [[1, 0, 0], [0, 0, 1], [1, 1, 1]]
    assert text_mask(ids, frozenset()).all()


def test_pads_are_named_by_any_configuration() -> None:
    text = {"text_config": {"eos_token_id": [1, 2]}, "pad_token_id": None}
    assert pad_ids(text, {"pad_token_id": 3}, {"eos_token_id": 0}) == {0, 1, 2, 3}


def load(folder: Path, *records: dict[str, list[int]], pads: frozenset[int]) -> list[list[int]]:
    path = folder / "ids.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = CalibrationConfig(path, packing="padded", batch_size=1)
    data = load_calibration(folder, config, vocab_size=320, pads=pads)
    return sorted(batch.input_ids[0].tolist() for batch in data.batches)


def test_padded_ids_in_a_file_lose_their_pads(tmp_path: Path) -> None:
    padded = {"input_ids": [E, E, 1, 2, E, E]}
    assert load(tmp_path, padded, pads=frozenset({E})) == [[1, 2]]
    masked = padded | {"attention_mask": [0, 1, 1, 1, 1, 0]}
    assert load(tmp_path, masked, pads=frozenset({E})) == [[E, 1, 2, E]]  # the mask decides
    assert load(tmp_path, padded, pads=frozenset()) == [[E, E, 1, 2, E, E]]


def test_the_tokenizer_names_pads_and_decodes_ids(tmp_path: Path) -> None:
    """Also where no record needs it."""
    path = tmp_path / "ids.jsonl"
    path.write_text(json.dumps({"input_ids": [256, 256, *b"some text", 256, 256]}))
    config = CalibrationConfig(path, packing="padded")
    data = load_calibration(model_dir(), config, vocab_size=320)
    assert data.tokens == len("some text")
    assert data.beginning == "some text"
