# SPDX-License-Identifier: Apache-2.0
"""Proves that calibration data becomes the documented samples, and that errors name the cause.

Every kind of input gives the ids that a few simple lines compute. Packed samples are full, and
padded ones are masked. The order depends on the seed alone. Data that does not fit is an error that
says what there is and what is needed. No more of a corpus is read than is needed. The embedded text
is mixed.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fourfold.calibration import data as module
from fourfold.calibration import readers
from fourfold.calibration.data import (
    CalibrationData,
    load_calibration,
    pack,
)
from fourfold.calibration.readers import text_pieces
from fourfold.config import CalibrationConfig
from fourfold.embedded import calibration_records, heldout_text, model_dir
from fourfold.errors import CalibrationError, FourfoldError, UsageError

WORDS = ["<bos>", "<eos>", "<pad>", "<unk>", "<user>", "<assistant>", "<end>"]
WORDS += [f"w{n}" for n in range(60)]
ID = {word: number for number, word in enumerate(WORDS)}
BOS, EOS, PAD = ID["<bos>"], ID["<eos>"], ID["<pad>"]
BYTE_VOCABULARY, BYTE_END = 320, 256

TEMPLATE = (
    "<bos> {% for m in messages %}"
    "{% if m.role == 'judge' %}{{ raise_exception('no judges here') }}{% endif %}"
    "<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if tools %}{{ tools[0].name }}{% endif %}"
)


def save_words(
    folder: Path, template: str | None = TEMPLATE, bos: bool = True, around: str = "<bos> $A"
) -> Path:
    """A model folder whose tokenizer knows `WORDS`, one id a word, and begins texts with <bos>."""
    backend = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=around, special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>",
        bos_token="<bos>" if bos else None, extra_special_tokens=["<user>", "<assistant>", "<end>"],
    )  # fmt: skip
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_words(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a config and no tokenizer."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "config.json").write_bytes((model_dir() / "config.json").read_bytes())
    return folder


def load(
    folder: Path,
    *calib: Path | str,
    vocab_size: int = 0,
    size: int | None = None,
    seq: int | None = None,
    **changes: Any,
) -> CalibrationData:
    config = CalibrationConfig(calib, calib_size=size, calib_seq=seq, **changes)
    rows = vocab_size or (BYTE_VOCABULARY if folder == model_dir() else len(WORDS))
    return load_calibration(folder, config, vocab_size=rows)


def rows(data: CalibrationData) -> list[list[int]]:
    """Every sample without its pads."""
    return [
        ids[mask.bool()].tolist()
        for batch in data.batches
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def write_parquet(path: Path, records: list[dict[str, Any]]) -> Path:
    parquet.write_table(pa.Table.from_pylist(records), path)
    return path


def by_seed(documents: list[Any], seed: int) -> list[Any]:
    """The documented order: by SHA-256 of "seed:position"."""
    digests = [hashlib.sha256(f"{seed}:{n}".encode()).hexdigest() for n in range(len(documents))]
    return [document for _, document in sorted(zip(digests, documents, strict=True))]


def numbered(count: int, length: int = 5) -> list[dict[str, Any]]:
    """Records of `input_ids`, each of them different, which do not begin with special tokens."""
    heads = ([7 + n // 60 % 60, 7 + n % 60] for n in range(count))
    return [{"input_ids": [*head, *range(length - 2)]} for head in heads]


# --- every kind of input ------------------------------------------------------------------

CHAT = [
    [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}],
    [{"role": "user", "content": "w4"}, {"role": "assistant", "content": "w5 w6 nobody"}],
]
KINDS: dict[str, tuple[list[dict[str, Any]], list[list[str]]]] = {
    "text": (
        [{"text": "w1 w2 w3"}, {"text": "w9 nobody w8", "other": 1}],
        [["<bos>", "w1", "w2", "w3"], ["<bos>", "w9", "<unk>", "w8"]],
    ),
    "prompt and completion": (
        [{"prompt": "w1 w2 ", "completion": "w3"}, {"prompt": "w4", "completion": " w5"}],
        [["<bos>", "w1", "w2", "w3"], ["<bos>", "w4", "w5"]],
    ),
    "messages": (
        [{"messages": CHAT[0]}, {"messages": CHAT[1]}],
        [
            ["<bos>", "<user>", "w1", "w2", "<end>", "<assistant>", "w3", "<end>"],
            ["<bos>", "<user>", "w4", "<end>", "<assistant>", "w5", "w6", "<unk>", "<end>"],
        ],
    ),
    "input_ids": (
        [{"input_ids": [7, 8, 9]}, {"input_ids": [10, 11]}],
        [["w0", "w1", "w2"], ["w3", "w4"]],
    ),
    "masked input_ids": (
        [{"input_ids": [2, 2, 8], "attention_mask": [0, 0, 1]}],
        [["w1"]],
    ),
    "the first of several forms": (
        [{"input_ids": [7], "messages": CHAT[0], "text": "w9"}, {"messages": CHAT[0], "text": "w"}],
        [["w0"], ["<bos>", "<user>", "w1", "w2", "<end>", "<assistant>", "w3", "<end>"]],
    ),
    "tools": (
        [{"messages": CHAT[0][:1], "tools": [{"name": "w50"}]}],
        [["<bos>", "<user>", "w1", "w2", "<end>", "w50"]],
    ),
}


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_every_kind_gives_the_ids_of_the_plain_way(
    words: Path, tmp_path: Path, write: Any, kind: str, seed: int
) -> None:
    records, documents = KINDS[kind]
    path = write(tmp_path / f"corpus.{'parquet' if write is write_parquet else 'jsonl'}", records)
    expected = by_seed([[ID[word] for word in document] for document in documents], seed)
    assert rows(load(words, path, packing="padded", seed=seed)) == expected


def test_text_is_read_as_it_lies_in_the_file(tmp_path: Path) -> None:
    text = "Grüße, 世界!\n\nصباح الخير\n" * 30
    path = tmp_path / "corpus.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())  # a byte order mark is no text
    data = load(model_dir(), path, seq=2048, packing="padded")
    assert rows(data) == [list(text.encode())[:2048]]
    assert data.origin == "corpus.txt"
    assert not data.is_embedded


@given(
    st.lists(st.text(alphabet="ab \n", max_size=40), max_size=8).map("".join),
    st.integers(min_value=1, max_value=12),
)
def test_pieces_of_a_text_are_the_text_and_never_long(text: str, characters: int) -> None:
    pieces = list(text_pieces(io.StringIO(text), characters))
    assert "".join(pieces) == text
    assert all(len(piece) < 3 * characters for piece in pieces)
    assert all(len(piece) >= characters for piece in pieces[:-1])


def test_a_text_file_is_cut_at_paragraphs(tmp_path: Path) -> None:
    paragraphs = [f"{n} " + "x" * 50 + "\n\n" for n in range(40)]
    pieces = list(text_pieces(io.StringIO("".join(paragraphs)), 120))
    assert pieces[0] == "".join(paragraphs[:3])
    assert all(piece[0].isdigit() and piece.endswith("x\n\n") for piece in pieces)
    path = tmp_path / "corpus.md"
    path.write_text("".join(paragraphs))
    expected = by_seed([list(piece.encode())[:30] for piece in pieces], 0)[:3]
    assert rows(load(model_dir(), path, seq=30, packing="padded", size=3)) == expected


def test_dataset_is_streamed_by_its_name(words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    drawn: list[int] = []

    def load_dataset(path: str, name: str | None, **options: Any) -> Iterator[dict[str, Any]]:
        asked.append((path, name, options))
        for number in range(10_000):
            drawn.append(number)
            yield {"text": f"w{number % 60}", "url": "x"}

    stand_in = ModuleType("datasets")
    stand_in.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    for name, config, split in (
        ("org/name", None, "train"),
        ("org/name:test", None, "test"),
        ("org/name:small:test", "small", "test"),
    ):
        data = load(words, name, size=2, packing="padded")
        assert asked.pop() == ("org/name", config, {"split": split, "streaming": True})
        assert data.origin == name
        assert data.samples == 2
    assert len(drawn) == 3 * 2 * module.POOL


# --- packed and padded --------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_packed_is_all_documents_joined_by_the_end_of_text_and_cut(
    tmp_path: Path, seed: int
) -> None:
    texts = [f"document {n}: " + "é" * (n % 7) for n in range(50)]
    path = write_jsonl(tmp_path / "corpus.jsonl", [{"text": text} for text in texts])
    data = load(model_dir(), path, seq=32, seed=seed, batch_size=4)
    stream = b"".join(text.encode() + b"\xff" for text in by_seed(texts, seed))
    ids = [BYTE_END if byte == 0xFF else byte for byte in stream]
    assert rows(data) == [ids[n : n + 32] for n in range(0, len(ids) - 31, 32)]
    assert [len(batch.input_ids) for batch in data.batches[:-1]] == [4] * (len(data.batches) - 1)
    assert all(bool(batch.attention_mask.all()) for batch in data.batches)
    assert (data.samples, data.tokens) == (len(ids) // 32, len(ids) // 32 * 32)


def test_packed_samples_begin_as_the_tokenizer_begins_a_text(words: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "corpus.jsonl", [{"text": "w1 w2 w3 w4 w5 w6 w7"}] * 2)
    one = [BOS, *(ID[f"w{n}"] for n in range(1, 8)), EOS]
    assert rows(load(words, path, seq=5)) == [
        one[:5], [BOS, *one[5:9]], one[:5], [BOS, *one[5:9]],
    ]  # fmt: skip


def test_the_end_of_text_is_there_once(tmp_path: Path) -> None:
    folder = save_words(tmp_path / "model", around="$A <eos>")
    path = write_jsonl(tmp_path / "corpus.jsonl", [{"text": "w1"}] * 3)
    assert rows(load(folder, path, seq=6)) == [[ID["w1"], EOS] * 3]


def test_a_chat_closes_its_turns_itself(tmp_path: Path) -> None:
    folder = save_words(tmp_path / "model", bos=False)
    path = write_jsonl(tmp_path / "corpus.jsonl", [{"messages": CHAT[0][:1]}])
    expected = [ID[word] for word in ("<bos>", "<user>", "w1", "w2", "<end>")]
    assert rows(load(folder, path, seq=5)) == [expected]
    with pytest.raises(CalibrationError, match=r"5 tokens, which make 0 samples of 6"):
        load(folder, path, seq=6)


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=20), max_size=8),
    st.integers(min_value=2, max_value=9),
    st.sampled_from([[], [0]]),
)
def test_packing_loses_nothing_and_fills_every_sample(
    documents: list[list[int]], seq: int, first: list[int]
) -> None:
    stream = [token for document in documents for token in document]
    samples = pack(documents, seq, first)
    at = 0
    for sample in samples:
        assert len(sample) == seq
        assert sample[: len(first)] == first
        here = sample if stream[at : at + seq] == sample else sample[1:]
        assert stream[at : at + len(here)] == here
        at += len(here)
    assert len(stream) - at < seq


def test_padded_batches_are_as_long_as_their_longest_sample(words: Path, tmp_path: Path) -> None:
    lengths = [3, 1, 6, 2, 9, 4]
    texts = [" ".join(f"w{n}" for n in range(length)) for length in lengths]
    path = write_jsonl(tmp_path / "corpus.jsonl", [{"text": text} for text in texts])
    data = load(words, path, seq=8, packing="padded", batch_size=2)
    expected = by_seed([[BOS, *(ID[w] for w in text.split())] for text in texts], 0)
    assert rows(data) == [document[:8] for document in expected]
    for batch, start in zip(data.batches, range(0, 6, 2), strict=True):
        counts = [min(len(document), 8) for document in expected[start : start + 2]]
        assert batch.input_ids.shape == batch.attention_mask.shape == (2, max(counts))
        assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.int64
        for ids, mask, count in zip(batch.input_ids, batch.attention_mask, counts, strict=True):
            assert mask.tolist() == [1] * count + [0] * (max(counts) - count)  # pads on the right
            assert ids[count:].tolist() == [PAD] * (max(counts) - count)
    assert data.tokens == sum(min(length + 1, 8) for length in lengths)


def test_pads_are_ids_that_the_embedding_has(bare: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"input_ids": [5, 6]}, {"input_ids": [7]}])
    (batch,) = load(bare, path, packing="padded").batches  # no tokenizer, so no pad token
    assert sorted(batch.input_ids.tolist()) == [[5, 6], [7, 0]]
    text = write_jsonl(tmp_path / "b.jsonl", [{"text": "ab"}, {"text": "c"}])
    (batch,) = load(model_dir(), text, packing="padded", vocab_size=256).batches
    assert [99, 0] in batch.input_ids.tolist()  # the tokenizer's pad is 256


def test_sizes(words: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", numbered(1000, 6))
    data = load(words, path, size=7, seq=9, batch_size=3)
    assert [tuple(batch.input_ids.shape) for batch in data.batches] == [(3, 9), (3, 9), (1, 9)]
    assert (data.samples, data.seq, data.tokens) == (7, 9, 63)


def test_without_sizes_what_there_is_is_taken(words: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", numbered(300, 6))
    data = load(words, path)
    assert (data.samples, data.seq) == (300 * 6 // 512, 512)
    assert load(words, path, seq=7).samples == module.DEFAULT_SIZE
    assert load(words, path, packing="padded").samples == module.DEFAULT_SIZE
    few = write_jsonl(tmp_path / "b.jsonl", numbered(20))
    assert load(words, few, packing="padded").samples == 20


def test_the_model_bounds_the_length_of_a_sample(words: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", numbered(300))
    options = CalibrationConfig(path)
    assert load_calibration(words, options, vocab_size=67, max_positions=100).seq == 100
    options = CalibrationConfig(path, calib_seq=101)
    assert load_calibration(words, options, vocab_size=67, max_positions=101).seq == 101
    with pytest.raises(UsageError, match=r"`calib_seq=101`: the model takes at most 100 tokens"):
        load_calibration(words, options, vocab_size=67, max_positions=100)


# --- seeds and digests --------------------------------------------------------------------


def test_the_seed_decides_and_nothing_else(words: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", numbered(500))
    (tmp_path / "elsewhere").mkdir()
    same = write_jsonl(tmp_path / "elsewhere" / "b.jsonl", numbered(500))
    data = load(words, path, size=20, seq=16)
    again = load(words, same, size=20, seq=16)
    assert data.digest == again.digest
    assert rows(data) == rows(again)
    assert data.origin == "a.jsonl"
    digests = {load(words, path, size=20, seq=16, seed=seed).digest for seed in range(-1, 4)}
    assert len(digests) == 5


def test_the_digest_is_of_ids_masks_and_shapes(words: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"input_ids": [5, 6]}, {"input_ids": [7, 0]}])
    short = write_jsonl(tmp_path / "b.jsonl", [{"input_ids": [5, 6]}, {"input_ids": [7]}])
    longer, padded = load(words, path, packing="padded"), load(words, short, packing="padded")
    assert torch.equal(longer.batches[0].input_ids, padded.batches[0].input_ids)  # the pad is 0
    alone = load(words, path, packing="padded", batch_size=1)
    assert rows(alone) == rows(longer)
    assert len({longer.digest, padded.digest, alone.digest}) == 3
    digest = hashlib.sha256(b"(2, 2)")
    for tensor in (padded.batches[0].input_ids, padded.batches[0].attention_mask):
        for value in tensor.flatten().tolist():
            digest.update(value.to_bytes(8, "little"))
    assert padded.digest == digest.hexdigest()


def test_templates_that_print_the_date_give_the_same_on_every_day(tmp_path: Path) -> None:
    template = (
        "{% macro head() %}{{ strftime_now('w%d') }} {% endmacro %}"
        "{{ head() }}{% if strftime_now('%Y-%m-%d %B') == '2026-01-01 January' %}w7 {% endif %}"
        "{{ messages[0].content }}"
    )
    folder = save_words(tmp_path / "model", template)
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT[0][:1]}])
    expected = [[ID["<unk>"], ID["w7"], ID["w1"], ID["w2"]]]  # w01 is no word
    assert rows(load(folder, path, packing="padded")) == expected


# --- how much is read ---------------------------------------------------------------------


@pytest.mark.parametrize(("packing", "needed"), [("packed", 4 * 50 // 10), ("padded", 4)])
def test_a_huge_file_is_read_as_far_as_it_is_needed(
    packing: str, needed: int, words: Path, tmp_path: Path
) -> None:
    """A broken line behind the pool is not noticed; one within it is."""
    path = write_jsonl(tmp_path / "huge.jsonl", numbered(module.POOL * needed, 10))
    with path.open("a") as file:
        file.write("{broken")
    load(words, path, size=4, seq=50, packing=packing)
    with pytest.raises(CalibrationError, match=f"line {module.POOL * needed + 1}"):
        load(words, path, size=5, seq=50, packing=packing)


def test_files_are_read_in_turn(words: Path, tmp_path: Path) -> None:
    records = [[{"input_ids": [file]}] * 100 for file in (10, 20, 30)]
    records[1] = records[1][:2]
    paths = [write_jsonl(tmp_path / f"{n}.jsonl", part) for n, part in enumerate(records)]
    data = load(words, *paths, size=5, packing="padded")
    pool = [10, 20, 30, 10, 20, 30, *([10, 30] * 7)]  # until there are 4 × 5
    assert rows(data) == by_seed([[token] for token in pool], 0)[:5]
    assert data.origin == "0.jsonl, 1.jsonl, 2.jsonl"
    assert load(words, *paths, *paths, packing="padded").origin.endswith(" and 2 more")


def test_parquet_is_read_by_the_columns_that_matter(words: Path, tmp_path: Path) -> None:
    records = [{"text": f"w{n % 60}", "embedding": [0.5] * 4} for n in range(500)]
    path = write_parquet(tmp_path / "a.parquet", records)
    expected = by_seed([[BOS, ID[f"w{n % 60}"]] for n in range(module.POOL * 10)], 0)[:10]
    assert rows(load(words, path, size=10, packing="padded")) == expected


def test_importing_brings_no_heavy_library() -> None:
    code = (
        "import sys, fourfold.calibration.data, fourfold.embedded\n"
        "print([m for m in ('transformers', 'pyarrow', 'datasets') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr


def test_ids_need_no_tokenizer(bare: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"input_ids": [n, n + 1]} for n in range(8)])
    documents = by_seed([[n, n + 1] for n in range(8)], 0)
    stream = [token for document in documents for token in document]
    assert rows(load(bare, path, seq=4)) == [stream[n : n + 4] for n in range(0, 16, 4)]


# --- errors -------------------------------------------------------------------------------

BROKEN_RECORDS: dict[str, tuple[Any, str]] = {
    "broken JSON": (
        '{"text": ',
        r"a\.jsonl, line 2: is not JSON \(Expecting value at character 10\)\. Write one JSON obj",
    ),
    "a list": ('[["text"]]', r"item 1, line 2: contains a JSON list, not an object"),
    "a number": ("5", r"line 2: contains a JSON int, not an object"),
    "no known key": (
        {"instruction": "x", "output": "y"},
        r"line 2: has instruction, output\. Give text, prompt and completion, messages, or",
    ),
    "half a pair": ({"prompt": "w1"}, r"line 2: has prompt\. Give"),
    "null": ({"text": None, "id": 3}, r"line 2: has id, text \(null\)\. Give"),
    "nothing": ({}, r"line 2: has no key\. Give"),
    "text that is none": ({"text": 5}, r"line 2: text has the type int"),
    "a surrogate": ({"text": "w1 \ud800"}, r"line 2: its text is not Unicode .* at character 3"),
    "a surrogate in a chat": (
        {"messages": [{"role": "user", "content": "\ud800"}]}, r"line 2: its text is not Unicode",
    ),
    "nested ids": ({"input_ids": [[1, 2]]}, r"line 2: input_ids is not a list of integers"),
    "ids that are words": ({"input_ids": ["1"]}, r"line 2: input_ids is not a list of integers"),
    "ids that are true": ({"input_ids": [True]}, r"line 2: input_ids is not a list of integers"),
    "a short mask": (
        {"input_ids": [1, 2], "attention_mask": [1]},
        r"line 2: attention_mask does not have a 0 or 1 for each of 2 input_ids",
    ),
    "a nested mask": ({"input_ids": [1], "attention_mask": [[1]]}, r"line 2: attention_mask does"),
    "an id too large": (
        {"input_ids": [1, 67, 2]},
        r"line 2: token id 67 is outside the model's vocabulary \(0 to 66\)\. The ids are for",
    ),
    "a negative id": ({"input_ids": [-1]}, r"line 2: token id -1 is outside"),
    "messages that are text": ({"messages": "hello"}, r"line 2: messages is not a list of objects"),
    "another chat format": (
        {"messages": [{"speaker": "human", "text": "w1"}]},
        r"line 2: messages is not a list of objects with role and content",
    ),
    "tools that are text": (
        {"messages": CHAT[0], "tools": "none"}, r"line 2: tools is not a list of objects",
    ),
    "what the template refuses": (
        {"messages": [{"role": "judge", "content": "w1"}]},
        r"line 2: the model's chat template rejects the messages \(no judges here\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN_RECORDS)
def test_a_broken_record_is_named(words: Path, tmp_path: Path, what: str) -> None:
    record, message = BROKEN_RECORDS[what]
    line = record if isinstance(record, str) else json.dumps(record)
    path = tmp_path / "a.jsonl"
    path.write_text("\n" + line + "\n")  # a blank line is counted, too
    with pytest.raises(CalibrationError, match=message) as caught:
        load(words, path)
    assert caught.value.exit_code == 2
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_error(words: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "w1"}\n', "utf-8-sig")
    assert rows(load(words, path, packing="padded")) == [[BOS, ID["w1"]]]


def test_rows_of_parquet_are_named(words: Path, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"text": "w1"}, {"text": None}])
    with pytest.raises(CalibrationError, match=r"a\.parquet, row 2: has text \(null\)"):
        load(words, path)
    path = write_parquet(tmp_path / "b.parquet", [{"question": "w1", "answer": "w2"}])
    with pytest.raises(CalibrationError, match=r"b\.parquet, row 1: has answer, question"):
        load(words, path)
    path.write_bytes(b"PAR1 or so they say")
    with pytest.raises(CalibrationError, match=r"b\.parquet: cannot be read as Parquet \("):
        load(words, path)


FILES: dict[str, tuple[str, bytes | None, str]] = {
    "empty": ("a.txt", b"", r"a\.txt: contains no text"),
    "empty JSONL": ("a.jsonl", b"", r"a\.jsonl: contains no text"),
    "blank": ("a.txt", b" \n\n", r"a\.txt: contains no text"),
    "blank lines": ("a.jsonl", b"\n\n", r"a\.jsonl: contains no text"),
    "empty texts": ("a.jsonl", b'{"text": ""}\n{"messages": []}\n', r"a\.jsonl: contains no text"),
    "Latin-1": ("a.txt", "w1 é".encode("latin-1"), r"a\.txt: is not UTF-8 .*byte 0xe9"),
    "Latin-1 JSONL": ("a.jsonl", b'{"text": "w1"}\n{"text": "\xe9"}', r"line 2: is not UTF-8"),
    "UTF-16": ("a.txt", "w1".encode("utf-16"), r"a\.txt: is not UTF-8 .*byte 0xff"),
    "missing": ("a.txt", None, r"a\.txt: no such file"),
    "missing JSONL": ("data/a.jsonl", None, r"a\.jsonl: no such file"),
}


@pytest.mark.parametrize("what", FILES)
def test_a_file_that_does_not_serve_is_named(
    words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    name, content, message = FILES[what]
    if content is not None:
        Path(name).write_bytes(content)
    good = write_jsonl(tmp_path / "good.jsonl", numbered(500))
    for calib in ([name], [good, name], [name, good]):
        with pytest.raises(CalibrationError, match=message):
            load(words, *calib)


def test_folders_and_other_things_are_no_files(words: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"is a folder\. Give the files in it"):
        load(words, tmp_path)
    with pytest.raises(CalibrationError, match="/dev/null: is not a regular file"):
        load(words, "/dev/null")


def test_a_file_that_is_one_line_of_json(words: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"text": "' + b"w1 " * (readers.MAX_LINE_BYTES // 3) + b'"}]')
    with pytest.raises(CalibrationError, match="line 1: is longer than 64 MiB"):
        load(words, path)


def test_too_little_says_what_is_there_and_what_is_needed(words: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", numbered(20, 5))
    with pytest.raises(CalibrationError) as caught:
        load(words, path, size=12, seq=10)
    assert str(caught.value) == (
        "a.jsonl: has 100 tokens, which make 10 samples of 10; 12 samples need 120. "
        "Give more text, or `calib_size=10`."
    )
    with pytest.raises(CalibrationError, match=r"100 tokens, which make 0 samples of 512; 128 "):
        load(words, path)
    with pytest.raises(CalibrationError, match=r"or a smaller `calib_seq`\."):
        load(words, path, seq=101)
    with pytest.raises(CalibrationError, match=r"20 documents, and 21 padded .* or `calib_size=20"):
        load(words, path, size=21, packing="padded")
    assert load(words, path, size=20, packing="padded").samples == 20
    assert load(words, path, size=10, seq=10).samples == 10


def test_a_tokenizer_that_does_not_belong_to_the_model(words: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "w1 w50"}])
    message = r"a\.jsonl, line 1: token id 57 is outside .*\(0 to 49\)\. The tokenizer in .*words"
    with pytest.raises(CalibrationError, match=message):
        load(words, path, vocab_size=50)
    with pytest.raises(CalibrationError, match=r"the embedded mixed text, \S+: token id \d+ is"):
        load(model_dir(), vocab_size=64)


def test_messages_without_a_chat_template(tmp_path: Path) -> None:
    folder = save_words(tmp_path / "model", template=None)
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT[0]}])
    with pytest.raises(CalibrationError, match=r"line 1: has messages, but .*no chat template"):
        load(folder, path)
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT[0], "text": "w9"}])
    assert rows(load(folder, path, packing="padded")) == [[BOS, ID["w9"]]]


def test_text_without_a_tokenizer(bare: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "w1"}])
    for calib in ([path], []):
        with pytest.raises(CalibrationError, match=r"has no tokenizer.*JSONL with input_ids"):
            load(bare, *calib)


def test_a_tokenizer_that_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((model_dir() / "config.json").read_bytes())
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CalibrationError, match=r"its tokenizer cannot be loaded: .*JSONL with"):
        load(tmp_path)


def test_libraries_that_are_not_installed(
    words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"text": "w1"}])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(CalibrationError, match=r'a\.parquet.*pip install "fourfold\[data\]"'):
        load(words, path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match=r'no such file.*pip install "fourfold\[data\]"'):
        load(words, "org/name")


def test_a_dataset_that_the_hub_does_not_give(words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: Any, **options: Any) -> Any:
        raise ConnectionError("no route to host\nand much more")

    stand_in = ModuleType("datasets")
    stand_in.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    with pytest.raises(CalibrationError) as caught:
        load(words, "org/name")
    assert str(caught.value) == (
        "org/name: no such file, and the dataset cannot be read from the hub (no route to host "
        "and much more). Check the name and the network."
    )
    rows_without = iter([{"question": "w1"}])
    stand_in.load_dataset = lambda *a, **o: rows_without  # type: ignore[attr-defined]
    with pytest.raises(CalibrationError, match="org/name, record 1: has question"):
        load(words, "org/name")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calib_size": 0}, "`calib_size=0`: give a whole number of at least 1"),
        ({"calib_seq": 1}, "`calib_seq=1`: give a whole number of at least 2"),
        ({"batch_size": 0}, "`batch_size=0`: give a whole number of at least 1"),
        ({"calib_size": 1.5}, r"`calib_size=1\.5`"),
        ({"packing": "tight"}, "`packing=tight`: give 'packed' or 'padded'"),
    ],
)
def test_options_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CalibrationConfig(**changes)


def test_the_error_is_one_of_usage() -> None:
    assert issubclass(CalibrationError, UsageError)
    assert issubclass(CalibrationError, FourfoldError)
    assert CalibrationError.exit_code == 2


# --- preview ------------------------------------------------------------------------------


def test_preview_shows_text_without_pads_and_special_tokens(words: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(words)
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT[0]}, {"text": "w7 " * 30}])
    shown = {load(words, path, packing="padded", seed=s).preview(tokenizer) for s in range(8)}
    assert shown == {"w1 w2 w3", " ".join(["w7"] * 30)}
    ids = {"input_ids": [PAD, PAD, PAD, BOS, ID["w5"], EOS, PAD]}
    path = write_jsonl(tmp_path / "b.jsonl", [ids])
    assert load(words, path, packing="padded").preview(tokenizer) == "w5"
    tokenizer.pad_token = "w0"  # a word like any other, as far as decoding is concerned
    assert tokenizer.decode([ID["w0"]], skip_special_tokens=True) == "w0"
    path = write_jsonl(tmp_path / "c.jsonl", [{"input_ids": [ID["w0"], ID["w0"], ID["w5"]]}])
    assert load(words, path, packing="padded").preview(tokenizer) == "w5"
    path = write_jsonl(tmp_path / "d.jsonl", [{"input_ids": [9]}, {"input_ids": [7, 8]}])
    shown = {load(words, path, packing="padded", seed=s).preview(None) for s in range(8)}
    assert shown == {"9", "7 8"}


def test_preview_is_short_and_moves_no_cursor(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\x1b[2J\x9bred\r\tline\n می‌گفت " + "x" * 600)
    data = load(model_dir(), path)
    tokenizer = AutoTokenizer.from_pretrained(model_dir())
    text = data.preview(tokenizer, characters=40)
    assert text.startswith("\ufffd[2J\ufffdred\n\tline\n می‌گفت xxx")
    assert text.endswith("x…")
    assert len(text) == 41
    assert len(data.preview(tokenizer)) == 201
    assert data.preview(None, characters=10).startswith("27 91 50 7")


# --- the embedded text --------------------------------------------------------------------


def test_without_a_name_the_embedded_text_serves() -> None:
    data = load(model_dir())
    assert data.is_embedded
    assert data.origin == "the embedded mixed text"
    assert (data.samples, data.seq, data.tokens) == (128, 512, 128 * 512)
    texts = [record["text"] for record in calibration_records()]
    stream = "\0".join(by_seed(texts, 0)).encode() + b"\0"  # no document holds a zero
    expected = [BYTE_END if byte == 0 else byte for byte in stream[: 128 * 512]]
    assert [token for row in rows(data) for token in row] == expected
    assert data.digest == load(model_dir()).digest
    assert data.digest != load(model_dir(), seed=1).digest


def test_a_part_of_the_embedded_text_is_drawn_from_the_whole() -> None:
    texts = [record["text"].encode() for record in calibration_records()]
    for seed in range(3):
        (sample,) = rows(load(model_dir(), size=1, seq=8, seed=seed))
        assert bytes(sample) == by_seed(texts, seed)[0][:8]


def test_chats_of_the_embedded_text_go_through_the_chat_template(words: Path) -> None:
    chats = sum("messages" in record for record in calibration_records())
    data = load(words, size=144, seq=4000, packing="padded")
    assert sum(row[:2] == [BOS, ID["<user>"]] for row in rows(data)) == chats >= 10


def test_the_embedded_text_is_mixed() -> None:
    records = calibration_records()
    kinds: dict[str, int] = {}
    for record in records:
        kind = record["name"].partition("/")[0]
        kinds[kind] = kinds.get(kind, 0) + len(record["text"].encode())
    assert kinds.keys() == {
        "code", "data", "dialogues", "languages", "library", "maths", "prose", "tools",
    }  # fmt: skip
    assert min(kinds.values()) > 5_000
    assert max(kinds.values()) < sum(kinds.values()) / 2
    assert 250_000 < sum(kinds.values()) < 350_000
    text = "".join(record["text"] for record in records)
    scripts = [unicodedata.name(letter).split()[0] for letter in text if letter.isalpha()]
    for script in (
        "LATIN", "CJK", "HIRAGANA", "HANGUL", "CYRILLIC", "ARABIC", "DEVANAGARI", "GREEK",
        "HEBREW", "THAI", "BENGALI",
    ):  # fmt: skip
        assert scripts.count(script) > 100, script  # a paragraph at least
    assert len({record["name"] for record in records}) == len(records)
    assert all(record["text"].strip() for record in records)
    for record in records:
        roles = [turn["role"] for turn in record.get("messages", [])]
        assert roles == ["user", "assistant"] * (len(roles) // 2), record["name"]


def test_nothing_of_the_held_out_text_is_in_it() -> None:
    held_out, length = heldout_text(), 80
    for record in calibration_records():
        text = record["text"]
        shared = [n for n in range(0, len(text) - length, 10) if text[n : n + length] in held_out]
        assert not shared, (record["name"], text[shared[0] : shared[0] + length])
