# SPDX-License-Identifier: Apache-2.0
"""Broken checkpoints are refused with a message that names the object, the cause and the remedy."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fourfold.errors import SourceError
from fourfold.sources.cached import CachedTensors
from fourfold.sources.opening import opened
from fourfold.sources.safetensors import open_source
from fourfold.storage.names import INDEX
from fourfold.storage.safetensors_header import build_header, read_header


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards with an index."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file(
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}, tmp_path / "1.safetensors"
    )
    save_file({"c": torch.arange(8, dtype=torch.bfloat16)}, tmp_path / "2.safetensors")
    write_index(tmp_path, {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"})
    return tmp_path


def write_index(folder: Path, weight_map: dict[str, object]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(SourceError) as caught:
        open_source(folder)
    for word in words:
        assert word in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2


def test_slabs_are_what_safetensors_reads(folder: Path) -> None:
    source = open_source(folder)
    assert list(source.tensors) == ["a", "b", "c"] or set(source.tensors) == {"a", "b", "c"}
    whole = load_file(folder / "1.safetensors") | load_file(folder / "2.safetensors")
    for key, value in whole.items():
        assert torch.equal(source.slab(key, 0, value.shape[0]), value)
    assert torch.equal(source.slab("a", 1, 2), whole["a"][1:2])
    buffer = np.zeros(6, dtype=np.uint8)
    source.read_bytes("c", 2, buffer)
    assert bytes(buffer) == whole["c"][1:4].view(torch.uint8).numpy().tobytes()
    source.close()


def test_folder_without_anything(tmp_path: Path) -> None:
    refused(tmp_path, "no config.json", "it is empty")


def test_no_such_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "no such folder")


def test_a_file_is_no_folder(folder: Path) -> None:
    refused(folder / "config.json", "is a file")


def test_no_weights(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    refused(folder, "no safetensors file")


def test_pickled_weights_are_not_read(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    refused(folder, "pickled", "safetensors")


def test_missing_shard(folder: Path) -> None:
    (folder / "2.safetensors").unlink()
    refused(folder, "2.safetensors", "missing")


def test_truncated_shard(folder: Path) -> None:
    data = (folder / "1.safetensors").read_bytes()
    (folder / "1.safetensors").write_bytes(data[:-4])
    refused(folder, "1.safetensors", "truncated", "Download")


def test_key_that_its_shard_lacks(folder: Path) -> None:
    write_index(
        folder,
        {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors", "d": "2.safetensors"},
    )
    refused(folder, "d", "2.safetensors", "not there")


def test_key_in_another_shard(folder: Path) -> None:
    write_index(folder, {"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"})
    refused(folder, "b", "1.safetensors", "2.safetensors")


def test_key_that_the_index_lacks(folder: Path) -> None:
    write_index(folder, {"a": "1.safetensors", "c": "2.safetensors"})
    refused(folder, "b", "1.safetensors", "does not list")


def test_key_in_two_shards(folder: Path) -> None:
    save_file({"c": torch.zeros(8), "a": torch.zeros(1)}, folder / "2.safetensors")
    refused(folder, "a:", "1.safetensors", "2.safetensors")


def test_name_twice_in_the_index(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {"a": "1.safetensors", "a": "2.safetensors"}}')
    refused(folder, INDEX, "'a'", "twice")


@pytest.mark.parametrize(
    "name", ["../1.safetensors", "/etc/passwd", "x/../../1.safetensors", "..\\1"]
)
def test_index_that_leaves_the_folder(folder: Path, name: str) -> None:
    write_index(folder, {"a": name})
    refused(folder, "a points to", "outside")


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "null"]
)
def test_index_of_the_wrong_kind(folder: Path, content: str) -> None:
    (folder / INDEX).write_text(content)
    refused(folder, INDEX)


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1', "\xff"])
def test_config_of_the_wrong_kind(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content, encoding="latin-1")
    refused(folder, "config.json")


def header_file(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        b"\xff\xfe",
        [],
        {"a": 3},
        {"a": {"dtype": "F32", "shape": [2]}},
        ENTRY | {"a": ENTRY},
        {"a": ENTRY | {"dtype": "F99"}},
        {"a": ENTRY | {"shape": [3]}},
        {"a": ENTRY | {"shape": [-2]}},
        {"a": ENTRY | {"shape": [2.0]}},
        {"a": ENTRY | {"data_offsets": [0, 80]}},
        {"a": ENTRY | {"data_offsets": [8, 0]}},
        {"a": ENTRY, "b": ENTRY},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
    ],
)
def test_header_that_lies(tmp_path: Path, header: object) -> None:
    with pytest.raises(SourceError, match="truncated or not safetensors"):
        read_header(header_file(tmp_path / "x.safetensors", header, b"\0" * 8))


@pytest.mark.parametrize(
    "data", [b"", b"\1\2", struct.pack("<Q", 10**15), struct.pack("<Q", 200_000_000)]
)
def test_file_that_is_no_safetensors(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(SourceError, match="truncated or not safetensors"):
        read_header(tmp_path / "x")


DTYPES = st.sampled_from(["F32", "BF16", "U8", "F8_E4M3", "I64"])
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.text().filter(lambda name: name != "__metadata__"), st.tuples(DTYPES, SHAPES)
    )
)
def test_headers_come_back(tmp_path_factory: pytest.TempPathFactory, tensors) -> None:
    file = tmp_path_factory.mktemp("header") / "x.safetensors"
    header, begins = build_header(tensors, {"format": "pt"})
    assert len(header) % 8 == 0
    sizes = dict.fromkeys(tensors, 0)
    file.write_bytes(header)
    from fourfold.storage.safetensors_header import nbytes_of

    sizes = {name: nbytes_of(*spec) for name, spec in tensors.items()}
    with file.open("ab") as handle:
        handle.write(b"\0" * sum(sizes.values()))
    infos = read_header(file)
    assert {n: (i.dtype, i.shape) for n, i in infos.items()} == tensors
    assert {n: i.start for n, i in infos.items()} == begins
    if tensors:
        load_file(file)  # the reference implementation agrees


def test_a_pipe_is_no_shard(folder: Path) -> None:
    (folder / "2.safetensors").unlink()
    os.mkfifo(folder / "2.safetensors")
    refused(folder, "2.safetensors", "is not a regular file")


@pytest.mark.parametrize("name", ["\\ud800", "a\\udfff"])
def test_names_that_no_file_can_hold(folder: Path, name: str) -> None:
    (folder / INDEX).write_text(f'{{"weight_map": {{"{name}": "1.safetensors"}}}}')
    refused(folder, INDEX)
    (folder / INDEX).unlink()
    (folder / "2.safetensors").unlink()
    header_file(folder / "1.safetensors", f'{{"{name}": {json.dumps(ENTRY)}}}'.encode(), b"\0" * 8)
    refused(folder, "1.safetensors")


def test_a_long_header_with_a_name_twice(tmp_path: Path) -> None:
    names = [f"tensor.{number}" for number in range(100_000)]
    body = ",".join(f'"{name}": {{}}' for name in [*names, names[500]])
    header_file(tmp_path / "x.safetensors", f"{{{body}}}".encode())
    with pytest.raises(SourceError, match=r"tensor\.500"):
        read_header(tmp_path / "x.safetensors")


def digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def header_of(file: Path) -> bytes:
    data = file.read_bytes()
    return data[8 : 8 + struct.unpack("<Q", data[:8])[0]]


def test_stamps_tell_what_every_file_looked_like(folder: Path) -> None:
    """config, index, shards and the files to copy; sorted; digests of what was read of them."""
    (folder / "code").mkdir()
    (folder / "code" / "model.py").write_text("pass")
    (folder / "pytorch_model.bin").write_bytes(b"another copy of the weights")
    source = open_source(folder)
    stamps = source.stamps()
    names = ["1.safetensors", "2.safetensors", "code/model.py", "config.json", INDEX]
    assert list(stamps) == names
    for name, stamp in stamps.items():
        status = (folder / name).stat()
        assert (stamp.size, stamp.mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert stamps["code/model.py"].digest == ""
    assert stamps["config.json"].digest == digest((folder / "config.json").read_bytes())
    assert stamps[INDEX].digest == digest((folder / INDEX).read_bytes())
    assert stamps["1.safetensors"].digest == digest(header_of(folder / "1.safetensors"))
    assert CachedTensors(source).stamps() == stamps
    assert stamps == open_source(folder).stamps()
    source.check_unchanged()
    CachedTensors(source).check_unchanged()


def test_stamps_are_those_of_the_opening(folder: Path) -> None:
    """What is done to the folder later does not show in them."""
    (folder / "tokenizer.json").write_text("{}")
    source = open_source(folder)
    before = dict(source.stamps())
    (folder / "tokenizer.json").write_text("[1, 2]")
    (folder / "config.json").unlink()
    (folder / "new.txt").write_text("")
    assert source.stamps() == before
    assert [str(path) for path in source.side_files().copied] == ["tokenizer.json"]


def grown(file: Path) -> None:
    with file.open("ab") as handle:
        handle.write(b"12")


def touched(file: Path) -> None:
    """Touched, to an earlier time."""
    os.utime(file, ns=(0, file.stat().st_mtime_ns - 1))


def replaced(file: Path) -> None:
    """By another file of the same size."""
    copy = file.with_name(".copy")
    shutil.copyfile(file, copy)
    os.utime(copy, ns=(0, file.stat().st_mtime_ns + 1))
    copy.replace(file)


def removed(file: Path) -> None:
    file.unlink()


Change = Callable[[Path], None]
FILES = ["1.safetensors", "2.safetensors", "config.json", INDEX, "tokenizer.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("change", "what"),
    [
        (grown, r"changed while it was read \(size [\d,]+ → [\d,]+ bytes\)"),
        (touched, r"changed while it was read \(modified meanwhile\)"),
        (replaced, r"changed while it was read \(modified meanwhile\)"),
        (removed, "disappeared while it was read"),
    ],
)
def test_a_changed_file_is_seen(folder: Path, name: str, change: Change, what: str) -> None:
    (folder / "tokenizer.json").write_text("{}")
    source = open_source(folder)
    change(folder / name)
    expected = rf"/{name}: {what}\. Start again with a source that stays as it is\.$"
    with pytest.raises(SourceError, match=expected):
        source.check_unchanged()


@pytest.mark.parametrize("time", [0, 1, 4_000_000_000 * 10**9])
def test_times_count_by_equality_alone(folder: Path, time: int) -> None:
    """A source from the future, or from 1970, is one that has not changed."""
    for file in folder.iterdir():
        os.utime(file, ns=(time, time))
    source = open_source(folder)
    assert {stamp.mtime_ns for stamp in source.stamps().values()} == {time}
    source.check_unchanged()
    os.utime(folder / "1.safetensors", ns=(time + 1, time + 1))
    with pytest.raises(SourceError, match="modified meanwhile"):
        source.check_unchanged()


def test_links_are_followed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What a link points to counts; and where it points."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shard, target = folder / "1.safetensors", elsewhere / "blob"
    shutil.copyfile(shard, elsewhere / "other")
    os.utime(elsewhere / "other", ns=(0, 1))
    shard.rename(target)
    shard.symlink_to(target)
    source = open_source(folder)
    assert source.stamps()["1.safetensors"].size == target.stat().st_size
    source.check_unchanged()
    shard.unlink()
    shard.symlink_to(elsewhere / "other")
    with pytest.raises(SourceError, match="modified meanwhile"):
        source.check_unchanged()


@pytest.mark.parametrize("change", [grown, touched, replaced, removed])
def test_a_shard_that_changed_before_its_first_read(folder: Path, change: Change) -> None:
    """Files are opened when they are first read: another one than was seen is refused."""
    source = open_source(folder)
    change(folder / "1.safetensors")
    source.will_need("a", 0, 2)  # a hint: it does not fail
    with pytest.raises(SourceError, match=r"1\.safetensors: (changed|disappeared) while"):
        source.slab("a", 0, 2)
    assert source.slab("c", 0, 8).shape == (8,)


def test_a_shard_that_ends_early(folder: Path) -> None:
    source = open_source(folder)
    source.slab("b", 0, 1)
    os.truncate(folder / "1.safetensors", 20)
    with pytest.raises(SourceError, match=r"1\.safetensors: ended while a was read\. Start again"):
        source.slab("a", 0, 2)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_disk_that_fails(folder: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    source = open_source(folder)
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(SourceError) as caught:
        source.read_bytes("b", 0, np.empty(4, dtype=np.uint8))
    words = (
        str(folder / "1.safetensors"),
        "b cannot be read",
        os.strerror(number),
        "Check the disk",
    )
    assert all(word in str(caught.value) for word in words)


def test_an_open_source_is_trusted_for_the_length_of_a_call(folder: Path) -> None:
    with closing(open_source(folder)) as source:
        with opened(source, trust_remote_code=True) as same:
            assert same is source
            assert source.trust_remote_code
        assert not source.trust_remote_code
        assert source.read("a").numel()  # it was not closed
    with opened(source.folder, trust_remote_code=True) as trusted:
        assert trusted.trust_remote_code
        assert CachedTensors(trusted).trust_remote_code
