"""Pickles read without running what they name: every global is a harmless stand-in, or refused.

A `torch_dist` checkpoint keeps its metadata, its arguments and the head of each tensor as pickles,
which can name any function and have it called. Here a name is looked up in a table of our own:
what it gives only keeps what it is given. Nothing of PyTorch or Megatron is imported for it.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fourfold.errors import SourceError
from fourfold.storage.safetensors_header import shown

DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
"""PyTorch's dtypes by name → those of safetensors."""

STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL", "UntypedStorage": "U8",
    "Float8_e4m3fnStorage": "F8_E4M3", "Float8_e5m2Storage": "F8_E5M2",
}  # fmt: skip


class Stored:
    """An object of a pickle, as what it was made of: `args`, then `fields` or another state."""

    args: tuple[Any, ...]
    fields: dict[str, Any]
    state: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> Stored:
        made = super().__new__(cls)
        made.args, made.fields, made.state = args, dict(kwargs), None
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Pickles make objects without it."""

    def __repr__(self) -> str:
        """For messages: what it was, and of what."""
        return f"{type(self).__name__}({', '.join(map(repr, self.args))})"

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
            self.fields |= state[1]  # of a class with slots
        elif isinstance(state, dict):
            self.fields |= state
        self.state = state

    def append(self, item: Any) -> None:
        """A list's subclass is filled by this."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """A dictionary's subclass is filled by this."""

    def get(self, name: str) -> Any:
        """A field of the object; None where it has none of that name."""
        return self.fields.get(name)


def _tuple(*args: Any) -> tuple[Any, ...]:
    return tuple(args[0]) if args and isinstance(args[0], tuple | list) else ()


def _dict(*args: Any) -> dict[Any, Any]:
    return dict(args[0]) if args and isinstance(args[0], list | dict) else {}


def stand_in(name: str) -> type[Stored]:
    """A class whose objects keep what they are given."""
    return type(name if name.isidentifier() else "unnamed", (Stored,), {})


_METADATA = "torch.distributed.checkpoint.metadata"
_PLANNER = "torch.distributed.checkpoint.planner"
_FILES = "torch.distributed.checkpoint.filesystem"
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"

COMMON: Mapping[str, Any] = {
    "collections OrderedDict": _dict,
    "torch Size": _tuple,
    "torch.serialization _get_layout": stand_in("layout"),
    **{f"torch {name}": ours for name, ours in DTYPES.items()},
}

METADATA: Mapping[str, Any] = {
    **COMMON,
    **{
        f"{_METADATA} {name}": stand_in(name)
        for name in (
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
            "TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
        )
    },
    **{
        f"{_PLANNER} {name}": stand_in(name)
        for name in (
            "SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData",
        )
    },
    **{f"{_FILES} {name}": stand_in(name) for name in ("_StorageInfo", "_StoragePrefix")},
    **{f"{_MEGATRON} {name}": stand_in(name) for name in ("MCoreMetadata", "MCoreSavePlan")},
    **{
        f"{module} {name}": stand_in(name)
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "Path")
    },
}  # fmt: skip
"""What the metadata of a checkpoint may name, of PyTorch and of Megatron, new and old."""

TENSOR: Mapping[str, Any] = {
    **COMMON,
    "torch._utils _rebuild_tensor_v2": stand_in("tensor"),
    "torch._utils _rebuild_parameter": stand_in("parameter"),
    **{f"torch {name}": ours for name, ours in STORAGES.items()},
    **{f"torch.storage {name}": ours for name, ours in STORAGES.items()},
}
"""What a tensor that `torch.save` wrote may name."""


class _Reader(pickle.Unpickler):
    """An unpickler that knows only the names of `table`; others are given by `otherwise`."""

    def __init__(
        self, data: bytes, table: Mapping[str, Any], otherwise: Callable[[str], Any]
    ) -> None:
        super().__init__(io.BytesIO(data))
        self._table, self._otherwise = table, otherwise

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module} {name}"
        return self._table[full] if full in self._table else self._otherwise(full)

    def persistent_load(self, saved_id: Any) -> Any:
        return saved_id


def read_pickle(data: bytes, file: Path, table: Mapping[str, Any]) -> Any:
    """What a pickle holds. Raises `SourceError` where it names anything that `table` lacks."""

    def refuse(name: str) -> Any:
        raise SourceError(
            f"{file}: names {shown(name.replace(' ', '.'))}, which is no part of a checkpoint and "
            "might run code. Do not use this checkpoint."
        )

    return _read(data, file, table, refuse)


def read_lenient_pickle(data: bytes, file: Path) -> Any:
    """What a pickle of arguments holds: whatever class it names is a stand-in that does nothing."""
    classes: dict[str, type[Stored]] = {}

    def keep(name: str) -> Any:
        return classes.setdefault(name, stand_in(name.rpartition(" ")[2] or "unnamed"))

    return _read(data, file, COMMON, keep)


def _read(
    data: bytes, file: Path, table: Mapping[str, Any], otherwise: Callable[[str], Any]
) -> Any:
    try:
        return _Reader(data, table, otherwise).load()
    except SourceError:
        raise
    except Exception as error:  # a broken pickle raises whatever its bytes lead to
        cause = "".join(x if x.isprintable() else "?" for x in " ".join(str(error).split())[:120])
        cause = cause or type(error).__name__
        raise SourceError(
            f"{file}: damaged, its pickle cannot be read ({cause}). Copy the checkpoint again."
        ) from None
