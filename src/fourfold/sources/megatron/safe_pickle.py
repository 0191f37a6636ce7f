# SPDX-License-Identifier: Apache-2.0
"""Reads pickles without running the code that they name.

A `torch_dist` checkpoint keeps its metadata, the training arguments and each tensor's header as
pickles. A pickle may name any function and have it called. This unpickler looks every name up in a
table instead: a name stands for a plain value or for a subclass of `Stored`, whose objects only
record what they were built from. Nothing is imported for it.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fourfold.errors import SourceError
from fourfold.storage.safetensors_header import TORCH_DTYPES, shown


class Stored:
    """An object of a pickle, as the arguments and the state that it was built from."""

    args: tuple[Any, ...]
    fields: dict[str, Any]
    state: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> Stored:
        stored = super().__new__(cls)
        stored.args, stored.fields, stored.state = args, dict(kwargs), None
        return stored

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Accept any arguments; `__new__` has stored them."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.args))})"

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
            self.fields |= state[1]  # the state of a class with slots
        elif isinstance(state, dict):
            self.fields |= state
        self.state = state

    def append(self, item: Any) -> None:
        """Ignore the items of a subclass of list."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Ignore the items of a subclass of dict."""


class Member(Stored):
    """A member of an enumeration. Some releases of Python 3.11 pickle it as a call of `getattr`;
    this records class and name, and looks nothing up."""

    def __repr__(self) -> str:
        match self.args:
            case (type() as owner, name):
                return f"{owner.__name__}.{name}"
        return super().__repr__()  # of a damaged pickle


def _stand_in(name: str) -> type[Stored]:
    return type(name, (Stored,), {})


def _stand_ins(module: str, names: str) -> dict[str, Any]:
    return {f"{module} {name}": _stand_in(name) for name in names.split()}


_CHECKPOINT = "torch.distributed.checkpoint"
_PATHS = "PosixPath WindowsPath PurePosixPath Path"

COMMON: Mapping[str, Any] = {
    "collections OrderedDict": dict,
    "builtins getattr": Member,
    "__builtin__ getattr": Member,
    "torch Size": tuple,
    "torch.serialization _get_layout": _stand_in("layout"),
    **{str(dtype).replace(".", " "): name for name, dtype in TORCH_DTYPES.items()},
}
"""Names that any of these pickles may hold: "module name" → what it stands for. A dtype stands for
the name that safetensors has for it."""

METADATA: Mapping[str, Any] = {
    **COMMON,
    **_stand_ins(
        f"{_CHECKPOINT}.metadata",
        "Metadata TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata "
        "TensorProperties MetadataIndex StorageMeta _MEM_FORMAT_ENCODING",
    ),
    **_stand_ins(
        f"{_CHECKPOINT}.planner",
        "SavePlan WriteItem WriteItemType TensorWriteData BytesIOWriteData",
    ),
    **_stand_ins(f"{_CHECKPOINT}.filesystem", "_StorageInfo _StoragePrefix"),
    **_stand_ins(
        "megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata MCoreSavePlan"
    ),
    **_stand_ins("pathlib", _PATHS),
    **_stand_ins("pathlib._local", _PATHS),
}
"""Names in `.metadata`, by old and new versions of PyTorch and Megatron."""

_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL", "UntypedStorage": "U8",
    "Float8_e4m3fnStorage": "F8_E4M3", "Float8_e5m2Storage": "F8_E5M2",
}  # fmt: skip

TENSOR: Mapping[str, Any] = {
    **COMMON,
    "torch._utils _rebuild_tensor_v2": _stand_in("tensor"),
    "torch._utils _rebuild_parameter": _stand_in("parameter"),
    **{f"torch {name}": dtype for name, dtype in _STORAGES.items()},
    **{f"torch.storage {name}": dtype for name, dtype in _STORAGES.items()},
}
"""Names in the header of a tensor that `torch.save` wrote."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, file: Path, table: Mapping[str, Any], lenient: bool) -> None:
        super().__init__(io.BytesIO(data))
        self._file, self._table, self._lenient = file, table, lenient

    def find_class(self, module: str, name: str) -> Any:
        value = self._table.get(f"{module} {name}")
        if value is not None:
            return value
        if self._lenient:
            return _stand_in(name)
        raise SourceError(
            f"{self._file}: names {shown(f'{module}.{name}')}, which is no part of a checkpoint "
            "and might run code. Do not use this checkpoint."
        )

    def persistent_load(self, saved_id: Any) -> Any:
        return saved_id


def read_pickle(
    data: bytes, file: Path, table: Mapping[str, Any] = COMMON, *, lenient: bool = False
) -> Any:
    """Return what a pickle holds, with a `Stored` object for every object of a class.

    Args:
        data: The pickle.
        file: The file that it is part of, for messages.
        table: The names that it may hold.
        lenient: True to accept every other name, too: each then stands for a class of `Stored`.

    Raises:
        SourceError: The pickle is damaged, or it holds another name and `lenient` is false.
    """
    try:
        return _Unpickler(data, file, table, lenient).load()
    except SourceError:
        raise
    except Exception as error:  # damaged pickles raise errors of almost any class
        raise damaged(file, "its pickle", error) from None


def damaged(file: Path, what: str, cause: object) -> SourceError:
    """Return the error for a part of a file that is not what the rest of the checkpoint says."""
    text = cause if isinstance(cause, str) else f"{type(cause).__name__}: {shown(str(cause))}"
    return SourceError(f"{file}: {what} is damaged ({text}). Copy the checkpoint again.")
