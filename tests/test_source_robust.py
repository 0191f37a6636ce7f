# SPDX-License-Identifier: Apache-2.0
"""Whatever a checkpoint folder holds: it is quantized as it should be, or refused in one line or
two that name the object, the cause and the remedy; and the source stays as it was."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fourfold
from families import Truth
from fourfold.config import Runtime
from fourfold.errors import FourfoldError, SourceError
from fourfold.sources.safetensors import open_source
from fourfold.storage import fingerprints as stamps_module
from fourfold.storage import open_files
from fourfold.storage import source as source_module
from fourfold.storage.names import INDEX
from fourfold.storage.safetensors_header import read_header
from many import write_many

Written = Callable[[str], tuple[Path, Truth]]
Plan = Callable[[Path], str]
RECIPE = "w4a16_nvfp4_experts_only"
ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.fixture
def model(written: Written, tmp_path: Path) -> Path:
    """A tiny model's folder that a test may change."""
    return Path(shutil.copytree(written("qwen3_moe")[0], tmp_path / "model"))


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Plan:
    """`fourfold plan` on a folder that it refuses: the message, a short one without a traceback."""
    from fourfold.cli.app import main

    def plan(folder: Path) -> str:
        monkeypatch.setattr(sys, "argv", ["fourfold", "plan", str(folder), "--recipe", RECIPE])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        assert caught.value.code == 1
        assert out == ""
        assert err.startswith("error: ")
        assert "defect" not in err
        assert "Traceback" not in err
        assert len(err.splitlines()) <= 2
        assert len(err) <= 2100
        return err

    return plan


def message_of(call: Callable[[], object]) -> str:
    with pytest.raises(SourceError) as caught:
        call()
    assert caught.value.exit_code == 1
    assert len(str(caught.value).splitlines()) <= 2
    assert len(str(caught.value)) <= 1000
    return str(caught.value)


def with_header(file: Path, header: object, data: bytes = b"\0" * 8) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Everything below a folder, with size, time and mode; links as links."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        status = path.lstat()
        found[str(path)] = (status.st_size, status.st_mtime_ns, status.st_mode)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, but for the report, card and record, which name folders and times."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in files]
    left_out = {"quant_summary.json", "report.html", "README.md"}
    return {name: (folder / name).read_bytes() for name in names if name not in left_out}


def quantized(folder: Path, out: Path) -> dict[str, bytes]:
    """Quantize and verify; nothing may be written but `out`."""
    before = snapshot(folder)
    result = fourfold.quantize(folder, out, RECIPE, runtime=Runtime(threads=1))
    assert result.clean, str(result.report)
    assert fourfold.verify(out, source=folder).clean
    assert snapshot(folder) == before
    return contents(out)


def header(**changes: object) -> dict[str, object]:
    return {"a": ENTRY | changes}


HUGE = 1 << 62
LIES = {
    "shape that overflows": header(shape=[HUGE, HUGE]),
    "shape that overflows beside a 0": header(shape=[0, HUGE, HUGE], data_offsets=[0, 0]),
    "size beyond 64 bits": header(shape=[1 << 63]),
    "number of many digits": b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b"]}}",
    "many dimensions": header(shape=[1] * 100_000),
    "shape of the wrong length": header(shape=[3]),
    "shape of null": header(shape=None),
    "shape of booleans": header(shape=[True, 2]),
    "negative offset": header(data_offsets=[-8, 0]),
    "begin beyond end": header(data_offsets=[8, 0]),
    "offsets beyond the file": header(data_offsets=[80, 88]),
    "offset beyond 64 bits": header(data_offsets=[1 << 64, (1 << 64) + 8]),
    "three offsets": header(data_offsets=[0, 8, 8]),
    "overlap": {"a": ENTRY, "b": ENTRY},
    "gap": header(shape=[1], data_offsets=[4, 8]),
    "bytes that belong to nothing": header(shape=[1], data_offsets=[0, 4]),
    "dtype that is unknown": header(dtype="F7"),
    "dtype that is no string": header(dtype=[]),
    "metadata of the wrong type": {"__metadata__": 3, "a": ENTRY},
    "metadata of numbers": {"__metadata__": {"format": 3}, "a": ENTRY},
    "name twice": b'{"a": %s, "a": %s}' % ((json.dumps(ENTRY).encode(),) * 2),
    "not UTF-8": b'{"\xff": 3}',
    "UTF-16": json.dumps({"a": ENTRY}).encode("utf-16"),
    "not JSON": b"{]",
    "an array": b"[]",
    "a string": b'"a"',
    "nested deeply": b'{"a":' * 200_000,
    "arrays nested deeply": b"[" * 1_000_000,
    "long name that is wrong": {"n" * 100_000: 3},
    "nothing": b"",
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie(lie: str, tmp_path: Path) -> None:
    file = with_header(tmp_path / "x.safetensors", LIES[lie])
    message = message_of(lambda: read_header(file))
    assert message.startswith(f"{file}: truncated or not safetensors (")
    assert message.endswith("Download the file again.")


@pytest.mark.parametrize("length", [9, 90_000_000, 100_000_001, 1 << 40, (1 << 64) - 1])
def test_a_header_longer_than_its_file(length: int, tmp_path: Path) -> None:
    """Nothing is allocated for what cannot be there."""
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", length) + b"{}      ")
    assert f"header of {length:,} bytes" in message_of(lambda: read_header(file))


def test_a_header_of_the_longest_length(tmp_path: Path) -> None:
    """100 MB, the reference implementation's limit, are read; one byte more is refused."""
    file, limit = tmp_path / "x.safetensors", 100_000_000
    for length, is_read in ((limit, True), (limit + 1, False)):
        file.write_bytes(struct.pack("<Q", length) + b"{}" + b" " * (length - 2))
        if is_read:
            assert read_header(file) == {}
        else:
            assert f"header of {length:,} bytes" in message_of(lambda: read_header(file))


def test_a_lie_ends_the_command(model: Path, refused: Plan) -> None:
    with_header(model / "model.safetensors", header(shape=[HUGE, HUGE]))
    before = snapshot(model)
    assert "model.safetensors: truncated or not safetensors" in refused(model)
    assert snapshot(model) == before


def _make_pipe(path: Path) -> None:
    os.mkfifo(path)


def _make_folder(path: Path) -> None:
    path.mkdir()


def _make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _make_loop(path: Path) -> None:
    path.symlink_to(path.name)


def _make_dangling(path: Path) -> None:
    path.symlink_to("../../blobs/0123")


def _make_empty(path: Path) -> None:
    path.write_bytes(b"")


ODD_FILES = {
    _make_pipe: "is not a regular file. Download",
    _make_folder: "is not a regular file. Download",
    _make_device: "is not a regular file. Download",
    _make_loop: "cannot be read: Too many levels of symbolic links",
    _make_dangling: "missing. Download",
    _make_empty: "Download",
}


@pytest.mark.parametrize("make", ODD_FILES, ids=lambda make: make.__name__.strip("_"))
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", INDEX])
def test_what_is_no_file(name: str, make: Callable[[Path], None], model: Path) -> None:
    """Nothing waits for a pipe, nothing reads a device without an end."""
    (model / name).unlink(missing_ok=True)
    make(model / name)
    message = message_of(lambda: open_source(model))
    assert message.startswith(f"{model / name}: ")
    assert ODD_FILES[make] in message


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_files_that_may_not_be_read(
    name: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = os.open

    def open_(path: Any, *arguments: Any, **options: Any) -> int:
        if Path(path).name == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return really(path, *arguments, **options)

    monkeypatch.setattr(stamps_module.os, "open", open_)
    message = message_of(lambda: open_source(model))
    assert message.startswith(f"{model / name}: cannot be read: Permission denied. Change")


def test_a_folder_that_may_not_be_listed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> Iterator[Path]:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(source_module.Path, "iterdir", refuse)
    message = message_of(lambda: open_source(model))
    assert message.startswith(f"{model}: cannot be read: Permission denied")


def test_no_more_files_may_be_open(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(model)

    def open_(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(stamps_module.os, "open", open_)
    key = next(iter(source.tensors))
    message = message_of(lambda: source.slab(key, 0, 1))
    assert f"model.safetensors: {key} cannot be read: Too many open files. Raise" in message


def test_few_of_many_shards_are_open_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And every tensor is read right, by many threads, while files are closed and opened again."""
    monkeypatch.setattr(open_files, "MOST_OPEN", 3)
    write_many(tmp_path, layers=12, experts=2, per_shard=1)
    expected = {k: v for file in tmp_path.glob("*.safetensors") for k, v in load_file(file).items()}
    before = len(os.listdir("/proc/self/fd"))
    source = open_source(tmp_path)
    keys = list(expected) * 4
    Random(0).shuffle(keys)

    def is_right(key: str) -> bool:
        source.will_need(key, 0, 1)
        return torch.equal(source.slab(key, 0, len(expected[key])), expected[key])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(is_right, keys))
    assert len(os.listdir("/proc/self/fd")) <= before + 4
    source.close()
    assert len(os.listdir("/proc/self/fd")) == before


INDEXES: dict[str, tuple[object, str]] = {
    "absolute": ({"a": "/etc/passwd"}, "outside the checkpoint's folder. Do not use"),
    "up": ({"a": "x/../../model.safetensors"}, "outside the checkpoint's folder"),
    "backslash": ({"a": "..\\model.safetensors"}, "outside the checkpoint's folder"),
    "NUL": ({"a": "model\0.safetensors"}, "outside the checkpoint's folder"),
    "folder": ({"a": "."}, "is not a regular file"),
    "folder below": ({"a": "folder"}, "is not a regular file"),
    "no safetensors": ({"a": "config.json"}, "not safetensors"),
    "too long": ({"a": "n" * 5000}, "File name too long"),
    "missing": ({"a": "other.safetensors"}, "other.safetensors: shard is missing. Download"),
    "empty": ({"a": ""}, "no shard name but ''"),
    "null": ({"a": None}, "no shard name but None"),
    "list": ({"a": ["model.safetensors"]}, "no shard name but ["),
    "long key": ({"n" * 100_000: 3}, "no shard name but 3"),
    "key with a line break": ({"a\nb": 3}, "no shard name but 3"),
    "key that is not there": ({"a\nb": "model.safetensors"}, "but it is not there"),
    "no map": ([], "has no weight_map. Download the index again"),
    "empty map": ({}, "has no weight_map"),
    "text": ("model.safetensors", "has no weight_map"),
}


@pytest.mark.parametrize("kind", INDEXES)
def test_indexes(kind: str, model: Path, refused: Plan) -> None:
    (model / "folder").mkdir()
    weight_map, words = INDEXES[kind]
    (model / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    before = snapshot(model)
    assert words in refused(model)
    assert snapshot(model) == before


WRONG = ["8", [], {}, None, True, -1, 0, 1e400, float("nan"), 2.5, 10**30, [[1]], "x\ny"]
FIELDS = [
    "architectures",
    "model_type",
    "dtype",
    "hidden_act",
    "hidden_size",
    "num_attention_heads",
    "num_experts",
    "num_hidden_layers",
    "rope_parameters",
    "vocab_size",
    "quantization_config",
]


def refusal(model: Path) -> str | None:
    try:
        fourfold.plan(model, RECIPE)
    except FourfoldError as error:
        return str(error)
    return None


@pytest.mark.parametrize("field", FIELDS)
def test_config_fields_of_the_wrong_type(field: str, model: Path) -> None:
    """Planned, where the field does not matter or means that; refused, but never a traceback."""
    config = json.loads((model / "config.json").read_text())
    refusals = 0
    for value in WRONG:
        (model / "config.json").write_text(json.dumps(config | {field: value}))
        message = refusal(model)
        refusals += message is not None
        assert len((message or "").splitlines()) <= 2
    assert refusals > 0 or field in {"architectures", "dtype", "quantization_config"}


@pytest.mark.parametrize("value", [[], {}, [None], 3], ids=str)
def test_a_nested_model_type_that_is_no_name(
    value: object, written: Written, tmp_path: Path, refused: Plan
) -> None:
    model = Path(shutil.copytree(written("qwen3_5_moe_vl")[0], tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["model_type"] = value
    (model / "config.json").write_text(json.dumps(config))
    assert f"{model / 'config.json'}: model_type is {value!r}, not a name." in refused(model)


CONFIGS = [
    "[]", '"text"', "3", "null", "NaN", "", "{", "{" * 500_000, "[" * 500_000,
    '{"a": "\\ud800"}',
]  # fmt: skip


@pytest.mark.parametrize("text", CONFIGS, ids=lambda text: repr(text[:20]))
def test_config_of_the_wrong_kind(text: str, model: Path, refused: Plan) -> None:
    (model / "config.json").write_text(text)
    message = refused(model)
    assert f"{model / 'config.json'}: " in message
    assert "Download it again" in message


def test_a_config_with_infinity(model: Path, tmp_path: Path) -> None:
    """Mamba's configurations have `time_step_limit: [0.0, Infinity]`: it is kept."""
    config = json.loads((model / "config.json").read_text())
    config["time_step_limit"] = [0.0, float("inf")]
    (model / "config.json").write_text(json.dumps(config))
    quantized(model, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["time_step_limit"] == [0.0, float("inf")]


@pytest.mark.parametrize(
    "name",
    [
        "two words",
        "Modell-Größe-模型-🦙",
        "line\nbreak",
        "[0-9]*?{a,b}",
        "100%d %s",
        "-dash",
        "a'b\"c",
        "$HOME ~",
        "back\\slash",
        "[bold]x[red]",
        os.fsdecode(b"not-utf-8-\xff"),
    ],
)
def test_folders_with_odd_names(name: str, model: Path, tmp_path: Path) -> None:
    """Source and output; the same bytes as under a plain name."""
    expected = quantized(model, tmp_path / "plain")
    odd = tmp_path / "odd" / name
    odd.parent.mkdir()
    model.rename(odd)
    assert quantized(odd, tmp_path / f"out {name}") == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["odd", "plain", f"out {name}"]
    )


@pytest.mark.parametrize("name", ["-dash", "line\nbreak"])
def test_odd_names_on_the_command_line(
    name: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from fourfold.cli.app import main

    monkeypatch.chdir(tmp_path)
    model.rename(tmp_path / name)
    for arguments in (
        ["plan", "--recipe", RECIPE, "--json", "--", name],
        ["quantize", "--recipe", RECIPE, "--json", "--", name, f"{name} out"],
        ["verify", "--source", name, "--json", "--", f"{name} out"],
        ["inspect", "--json", "--", f"{name} out"],
    ):
        monkeypatch.setattr(sys, "argv", ["fourfold", *arguments])
        with suppress(SystemExit):
            main()
        out, err = capsys.readouterr()
        assert err == ""
        assert json.loads(out)


ODD_TENSORS = [
    "モデル.重み", "two words", "a/b", "../up", "/root", "..", ".",
    "🦙.🧑‍🤝‍🧑.weight", "", "n" * 10_000,
    "*", "[a-z]", "re:.*", "model.layers.0.mlp.experts.*", "quote\"'", "back\\slash", "-1", "a..b",
    "model.layers.99999999999.weight", "model.layers.-1.mlp.weight", "%s{}", "é", "e\u0301", "ﬁ",
    "a\nb", "line\u2028separator", "\x1b[31m", "\0", "tab\t.weight", "\u202eright to left",
    "\ufeff",
]  # fmt: skip


def with_tensors(model: Path, extra: dict[str, torch.Tensor]) -> None:
    file = model / "model.safetensors"
    save_file({**load_file(file), **extra}, file, metadata={"format": "pt"})


def copies(out: Path, names: list[str]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in out.glob("model*.safetensors"):
        found |= load_file(file)
    return {name: found[name] for name in names}


@pytest.mark.parametrize("shape", [(2,), (2, 16)], ids=str)
def test_tensors_with_odd_names(shape: tuple[int, ...], model: Path, tmp_path: Path) -> None:
    """What the model does not know is copied, whatever it is called."""
    extra = {
        name: torch.full(shape, number, dtype=torch.bfloat16)
        for number, name in enumerate(ODD_TENSORS)
    }
    with_tensors(model, extra)
    quantized(model, tmp_path / "out")
    for name, value in copies(tmp_path / "out", ODD_TENSORS).items():
        assert torch.equal(value, extra[name]), name


HOSTILE = {
    "stars": "*" * 10_000,
    "stars and letters": "*a" * 5_000 + "b",
    "dots": "a." * 5_000 + "b",
    "digits": "9" * 10_000,
    "layers": "layers.0." * 1_000 + "b",
    "experts": "model.layers.0.mlp." + "experts.0." * 1_000 + "b",
    "parentheses": "(" * 10_000,
    "brackets": "[" * 10_000,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_matrices_with_hostile_names(kind: str, model: Path, tmp_path: Path) -> None:
    """Engines match such names as patterns: copied, or refused where one could not; at once."""
    name = f"{HOSTILE[kind]}.weight"
    with_tensors(model, {name: torch.ones(16, 16, dtype=torch.bfloat16)})
    if kind in {"parentheses", "brackets"}:
        assert "no ignore list is right for all engines. SGLang" in str(refusal(model))
    else:
        quantized(model, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.bool])
def test_empty_tensors_and_scalars(dtype: torch.dtype, model: Path, tmp_path: Path) -> None:
    extra = {
        "empty.rows": torch.zeros(0, 3, dtype=dtype),
        "empty.columns": torch.zeros(3, 0, dtype=dtype),
        "empty.vector": torch.zeros(0, dtype=dtype),
        "scalar": torch.ones((), dtype=dtype),
        "one": torch.ones(1, dtype=dtype),
    }
    with_tensors(model, extra)
    source = open_source(model)
    for name, value in extra.items():
        slab = source.slab(name, 0, value.shape[0] if value.ndim else 1)
        assert (slab.dtype, slab.shape) == (value.dtype, value.shape)
        assert torch.equal(slab, value)
    source.close()
    quantized(model, tmp_path / "out")
    for name, value in copies(tmp_path / "out", list(extra)).items():
        assert torch.equal(value, extra[name])


def test_a_hub_cache_is_a_folder_like_any_other(model: Path, tmp_path: Path) -> None:
    """Links into the cache's blobs: the same bytes as from plain files."""
    (model / "tokenizer.json").write_text("{}")
    expected = quantized(model, tmp_path / "plain")
    cache = tmp_path / "models--org--name"
    snapshot_folder = cache / "snapshots" / "0123456789abcdef"
    (cache / "blobs").mkdir(parents=True)
    snapshot_folder.mkdir(parents=True)
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.copyfile(file, cache / "blobs" / f"{number:040x}")
        (snapshot_folder / file.name).symlink_to(f"../../blobs/{number:040x}")
    assert quantized(snapshot_folder, tmp_path / "out") == expected
    assert all(not path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_shards_behind_a_users_own_links(model: Path, tmp_path: Path) -> None:
    """The files of a mirror, which may lie on another disk, are copied as files."""
    (model / "tokenizer.json").write_text("{}")
    expected = quantized(model, tmp_path / "plain")
    (tmp_path / "disk").mkdir()
    for name in ("model.safetensors", "tokenizer.json"):
        (model / name).rename(tmp_path / "disk" / name)
        (model / name).symlink_to(tmp_path / "disk" / name)
    assert quantized(model, tmp_path / "out") == expected
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()


@pytest.mark.parametrize("time", [0, 4_000_000_000], ids=["epoch", "future"])
def test_a_read_only_source_from_another_time(time: int, model: Path, tmp_path: Path) -> None:
    expected = quantized(model, tmp_path / "plain")
    for path in [*model.iterdir(), model]:
        os.utime(path, (time, time))
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert quantized(model, tmp_path / "out") == expected
    model.chmod(0o755)


@pytest.mark.parametrize(
    "name", ["a" * 5000, "~nobody-of-this-name/x", "a\0b", "\n", "x/../../" * 600]
)
def test_folders_that_cannot_be(name: str) -> None:
    message = message_of(lambda: open_source(name))
    assert "ive a checkpoint's folder" in message


@pytest.mark.slow
def test_a_few_thousand_tensors(tmp_path: Path) -> None:
    count = write_many(tmp_path / "model", layers=3, experts=300)
    assert count > 2700
    quantized(tmp_path / "model", tmp_path / "out")


@pytest.mark.slow
def test_a_hundred_thousand_tensors(tmp_path: Path) -> None:
    """No step is quadratic in tensors, experts or layers."""
    count = write_many(tmp_path / "model", layers=64, experts=544)
    assert count > 100_000
    result = fourfold.quantize(tmp_path / "model", tmp_path / "out", RECIPE)
    assert result.clean
    assert len(result.linears) == 64 * 544 * 3
