# SPDX-License-Identifier: Apache-2.0
"""Mutations of files, each drawn from a seeded generator, and described in words."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
import yaml
from safetensors.torch import load_file, save_file

from fuzz.values import mutate_json, write_json

INDEX = "model.safetensors.index.json"
DTYPES = ("BF16", "F16", "F32", "F64", "I64", "I8", "U8", "BOOL", "F8_E4M3", "F4", "U16", "C64", "")
TORCH_DTYPES = (
    torch.float32, torch.float16, torch.float64, torch.bfloat16, torch.int8, torch.uint8,
    torch.bool, torch.int64, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip
NAMES = ("../x", "/etc/passwd", "", ".", "x\0", "é\n", "__metadata__", "a" * 300, "config.json")
SPECIAL = (
    float("nan"), float("inf"), float("-inf"), -0.0, 0.0, 1e-40, 1e-8, 3e38, -3e38, 7e4, 448.0,
)  # fmt: skip
STRAYS = (
    "quant_summary.json", "report.html", "calibration.safetensors", "hf_quant_config.json",
    ".fourfold.partial", "model-00001-of-00002.safetensors", "extra.safetensors", "a\nb.txt",
    "pytorch_model.bin", "a/b/c.txt", "\udcff.txt", "modeling_x.py", ".hidden", "x.index.json",
    "deep/config.json",
)  # fmt: skip
RECIPE_LINES = (
    "keep: ['*']", "keep: ['*a*a*a*a*a*a*b']", "keep: [no.such]", "keep: ['[']", "keep: ''",
    "quantize: []", "quantize: [lm_head]", "quantize: [router]", "quantize: [mtp]",
    "quantize: [experts, mlp]", "keep: ['*.0.*', '*.1.*']", "<<: {keep: []}",
    "a: &a [x, x]\nb: &b [*a, *a]\nkeep: *b", "x: !!python/object:os.system {}",
    "weights: {format: nvfp4, scale: max}\nweights: {scale: mse}",
    "kv_cache: {format: fp8, scale: calibrated}", "activations: {amax: {headroom: 6}}",
    "activations: {amax: constant}", "activations: {amax: histogram}", "kv_cache: {format: nvfp4}",
)  # fmt: skip


def mutate_file(file: Path, rng: Random) -> str:
    """Change one file according to what it holds; the description names it."""
    if not file.is_file() or rng.random() < 0.08:
        return f"{file.name}: {entry(file, rng)}"
    kinds: dict[str, tuple[Callable[[Path, Random], str], ...]] = {
        ".safetensors": (*[tensors] * 4, header, header, content),
        ".json": (document, document, document, content),
        ".jsonl": (line, line, line, content),
        ".yaml": (recipe, recipe, recipe, content),
    }
    changes = kinds.get(file.suffix, (content,))
    change = rng.choice((*changes, index, index) if file.name == INDEX else changes)
    try:
        return f"{file.name}: {change(file, rng)}"
    except Exception as error:  # an earlier mutation left nothing to understand
        return f"{file.name}: {content(file, rng)} ({type(error).__name__})"


def entry(file: Path, rng: Random) -> str:
    """Change what stands under a name: nothing, something else, a link, a pipe."""
    beside = sorted(path.name for path in file.parent.iterdir())
    data = file.read_bytes() if file.is_file() else b""
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    file.unlink(missing_ok=True)
    what = rng.choice(("removed", "empty", "a folder", "a pipe", "renamed", *["a link"] * 4))
    match what:
        case "empty":
            file.write_bytes(b"")
        case "a folder":
            file.mkdir()
        case "a pipe":
            os.mkfifo(file)
        case "renamed":
            file.with_name(f"other{file.suffix}").write_bytes(data)
        case "a link":
            away = ("nowhere", "/dev/null", "/dev/zero", "/", "..", "../victim", "../victim")
            file.symlink_to(rng.choice((*away, *beside)))
            return f"a link to {os.readlink(file)}"
    return what


def add_stray(folder: Path, rng: Random) -> str:
    """Put something in the folder that does not belong there."""
    file = folder / rng.choice(STRAYS)
    if not file.exists() and not file.parent.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(rng.choice((b"", b"{}", b"\0" * 100, b'{"files": ["../victim"]}')))
    return f"{file.name!r} put there"


def content(file: Path, rng: Random) -> str:
    """Change bytes, whatever they mean."""
    data = bytearray(file.read_bytes())
    at = rng.randrange(len(data) + 1)
    if rng.random() < 0.5:
        at = min(at, rng.choice((8, 64, 4000)))  # where the structure lies
    junk = rng.choice((b"\0", b"\xff", b'"', b"{", b"}", b"9", b"\n", b"\xef\xbb\xbf"))
    junk = rng.choice((junk, rng.randbytes(16)))
    what = rng.choice(("cut", "flip", "insert", "overwrite", "take out", "append", "turn"))
    match what:
        case "cut":
            del data[at:]
        case "flip" if at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        case "overwrite":
            data[at : at + len(junk)] = junk
        case "take out":
            del data[at : at + rng.choice((1, 2, 100))]
        case "append":
            data += junk
        case "turn":
            data = data[at:] + data[:at]
        case _:
            data[at:at] = junk
    file.write_bytes(data)
    return f"bytes, {what} at {at}"


def document(file: Path, rng: Random) -> str:
    """Change a JSON document."""
    value = json.loads(file.read_bytes())
    how = mutate_json(value, rng)
    file.write_bytes(write_json(value, rng))
    return how


def line(file: Path, rng: Random) -> str:
    """Change a line of JSON lines."""
    rows = file.read_bytes().splitlines()
    at = rng.randrange(len(rows))
    value = json.loads(rows[at])
    how = mutate_json(value, rng)
    rows[at] = write_json(value, rng)
    file.write_bytes(b"\n".join(rows) + b"\n")
    return f"line {at + 1}, {how}"


def recipe(file: Path, rng: Random) -> str:
    """Change a recipe."""
    if rng.random() < 0.4:
        more = rng.choice(RECIPE_LINES)
        file.write_text(f"{file.read_text()}\n{more}\n")
        return f"added {more!r}"
    value = yaml.safe_load(file.read_bytes())
    how = mutate_json(value, rng)
    file.write_bytes(write_json(value, rng))  # which YAML is a superset of
    return how


def index(file: Path, rng: Random) -> str:
    """Let the index point elsewhere."""
    value = json.loads(file.read_bytes())
    names = value["weight_map"]
    key, shards = rng.choice(sorted(names)), sorted(set(names.values()))
    target = rng.choice((*shards, *NAMES, f"../source/{shards[0]}", f"./{shards[0]}"))
    chosen = [key] if rng.random() < 0.5 else [k for k in names if names[k] == names[key]]
    names.update(dict.fromkeys(chosen, target))
    file.write_bytes(write_json(value, rng))
    return f"{len(chosen)} keys such as {key} → {target!r}"


def header(file: Path, rng: Random) -> str:
    """Change a safetensors header, and nothing behind it."""
    raw = file.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    if rng.random() < 0.1:
        length = rng.choice((0, 1, size - 1, size + 1, size ^ 1 << rng.randrange(64), 2**64 - 1))
        file.write_bytes(struct.pack("<Q", length) + raw[8:])
        return f"a header of {length} bytes, not {size}"
    head = json.loads(raw[8 : 8 + size])
    first, second = (rng.choice([name for name in head if name[0] != "_"]) for _ in range(2))
    one, two = head[first], head[second]
    what = rng.choice(("data_offsets", "shape", "dtype", "name", *["json"] * 3))
    match what:
        case "data_offsets" | "shape":
            one[what], two[what] = two[what], one[what]
            how = f"{what} of {first} and {second} swapped"
        case "dtype":
            one["dtype"] = rng.choice(DTYPES)
            how = f"{first} is {one['dtype']!r}"
        case "name":
            head[name := rng.choice(NAMES)] = head.pop(first)
            how = f"{first} is called {name!r}"
        case _:
            how = mutate_json(head, rng)
    body = write_json(head, rng)
    file.write_bytes(struct.pack("<Q", len(body)) + body + raw[8 + size :])
    return f"header, {how}"


def tensors(file: Path, rng: Random) -> str:
    """Change tensors of a safetensors file that is sound afterwards; mostly the index, too."""
    found = load_file(file)
    name = rng.choice(sorted(found))
    tensor, other = found[name], _other_name(name, rng)
    before = f"{name} {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
    how = rng.choice((*["values"] * 5, "gone", "named", "again", "dtype", "shape"))
    match how:
        case "values":
            found[name], how = _values(tensor, rng)
        case "gone":
            del found[name]
        case "named":
            found[other] = found.pop(name)
            how = f"named {other!r}"
        case "again":
            found[other] = tensor.clone()
            how = f"again as {other!r}"
        case "dtype":
            found[name] = tensor.float().to(rng.choice(TORCH_DTYPES))
            how = str(found[name].dtype)
        case _:
            found[name] = _reshaped(tensor, rng).clone()
            how = f"shape {list(found[name].shape)}"
    save_file({key: value.contiguous() for key, value in found.items()}, file, {"format": "pt"})
    path = file.with_name(INDEX)
    if path.is_file() and file.name.startswith("model") and rng.random() < 0.8:
        value = json.loads(path.read_bytes())
        kept = {key: held for key, held in value["weight_map"].items() if held != file.name}
        path.write_text(json.dumps(value | {"weight_map": kept | dict.fromkeys(found, file.name)}))
    return f"{before}: {how}"


def _values(before: torch.Tensor, rng: Random) -> tuple[torch.Tensor, str]:
    tensor = before.clone()
    flat = tensor.view(-1)
    start, count = rng.randrange(max(1, flat.numel())), rng.choice((1, 16, 64, flat.numel()))
    where = slice(start, start + count) if count < flat.numel() else slice(None)
    if rng.random() < 0.2:
        raw = flat[where].view(torch.uint8)
        raw[:] = torch.tensor(list(rng.randbytes(raw.numel())), dtype=torch.uint8)
        return tensor, f"{count} random values from {start}"
    value = rng.choice(SPECIAL) if tensor.is_floating_point() else rng.choice((0, 1, 127))
    flat[where] = torch.full((), value).to(tensor.dtype)
    return tensor, f"{count} values of {value} from {start}"


def _other_name(name: str, rng: Random) -> str:
    parts = name.split(".")
    numbers = [at for at, part in enumerate(parts) if part.isdecimal()] or [0]
    at = rng.choice((*numbers, *numbers, rng.randrange(len(parts))))
    parts[at] = rng.choice(("0", "1", "2", "5", "007", "1000000", "x", "gate", "weight", "é", "-1"))
    return rng.choice((*[".".join(parts)] * 4, rng.choice(NAMES[2:6]), f"x.{name}", name[2:]))


def _reshaped(tensor: torch.Tensor, rng: Random) -> torch.Tensor:
    flat = tensor.reshape(-1)
    rows = tensor if tensor.ndim > 1 and tensor.numel() else flat
    some = (
        flat, rows.T if rows.ndim == 2 else flat, rows[None], rows[: len(rows) // 2], rows[:0],
        rows[..., : rows.shape[-1] // 2], flat[:1].reshape(()) if len(flat) else flat,
        torch.cat((rows, rows)), flat.reshape(-1, 8) if len(flat) % 8 == 0 else flat[None],
    )  # fmt: skip
    return rng.choice(some)
