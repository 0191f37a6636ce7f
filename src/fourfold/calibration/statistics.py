"""What calibration found: the largest inputs of every site, tokens of every expert, keys, values.

Stored beside a checkpoint as `calibration.safetensors`, and read back to make it again:

    <experts module>.tokens          I64  [E]  tokens that were routed to each expert
    <experts module>.gate_up.amax    F32  [E]  largest input of gate and up, by expert
    <experts module>.down.amax       F32  [E]  largest input of down, by expert
    <linear module>.amax             F32  []   largest input of a linear layer
    <linear module>.rows             I64  []   how many rows it saw
    <layer>.kv.amax                  F32  [2]  largest key (after rotary embedding) and value

All names are module paths in memory. The file's metadata say what data it was, by digest.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from fourfold.calibration.data import CalibrationData
from fourfold.errors import CalibrationError
from fourfold.storage.output import STATISTICS

FORMAT = "fourfold calibration 1"


@dataclass(frozen=True)
class DataSummary:
    """Which data the statistics were taken from."""

    origin: str
    digest: str
    samples: int
    seq: int
    tokens: int
    all_experts: bool = False


@dataclass(frozen=True)
class ModelSummary:
    """Which model the statistics were taken of."""

    architecture: str = ""
    digest: str = ""
    """`Inventory.digest`: of the names and shapes of its linear weights."""


@dataclass(frozen=True)
class ExpertsStatistics:
    """Of one experts module, for each of its E experts."""

    tokens: torch.Tensor
    gate_up_amax: torch.Tensor
    down_amax: torch.Tensor

    @property
    def unreached(self) -> list[int]:
        """Experts that no token was routed to."""
        return [int(number) for number in (self.tokens == 0).nonzero().flatten()]


@dataclass(frozen=True)
class LinearStatistics:
    """Of one linear layer's input."""

    amax: float
    rows: int


@dataclass
class Statistics:
    """Everything that calibration found; it grows while layers pass."""

    data: DataSummary
    experts: dict[str, ExpertsStatistics] = field(default_factory=dict)
    linears: dict[str, LinearStatistics] = field(default_factory=dict)
    kv: dict[str, tuple[float, float]] = field(default_factory=dict)
    """By decoder layer's path: the largest key and the largest value."""
    model: ModelSummary = ModelSummary()

    def add(self, other: Statistics) -> None:
        """Take in what another rank, or another layer, has found: maxima, and sums of counts."""
        for path, experts in other.experts.items():
            self.experts[path] = _both(self.experts.get(path), experts)
        for path, linear in other.linears.items():
            before = self.linears.get(path, LinearStatistics(0.0, 0))
            amax = max(before.amax, linear.amax)
            self.linears[path] = LinearStatistics(amax, before.rows + linear.rows)
        for path, (key, value) in other.kv.items():
            old_key, old_value = self.kv.get(path, (0.0, 0.0))
            self.kv[path] = max(old_key, key), max(old_value, value)

    def save(self, file: Path) -> None:
        """Write the statistics; the same statistics give the same bytes."""
        file.write_bytes(self.to_bytes())

    def to_bytes(self) -> bytes:
        """The contents of `calibration.safetensors`."""
        from safetensors.torch import save

        tensors: dict[str, torch.Tensor] = {}
        for path, experts in sorted(self.experts.items()):
            tensors[f"{path}.tokens"] = experts.tokens
            tensors[f"{path}.gate_up.amax"] = experts.gate_up_amax
            tensors[f"{path}.down.amax"] = experts.down_amax
        for path, linear in sorted(self.linears.items()):
            tensors[f"{path}.amax"] = torch.tensor(linear.amax, dtype=torch.float32)
            tensors[f"{path}.rows"] = torch.tensor(linear.rows)
        for path, pair in sorted(self.kv.items()):
            tensors[f"{path}.kv.amax"] = torch.tensor(pair, dtype=torch.float32)
        summaries = {"data": asdict(self.data), "model": asdict(self.model)}
        head = json.dumps(summaries, ensure_ascii=False, sort_keys=True)
        return bytes(save(tensors, metadata={FORMAT: head}))  # one key: their order is random

    def to_text(self) -> str:
        """`to_bytes` as text, for what travels or is kept as JSON."""
        return base64.b64encode(self.to_bytes()).decode()

    @classmethod
    def from_text(cls, text: str) -> Statistics:
        """What `to_text` gave."""
        return cls.from_bytes(base64.b64decode(text))

    @classmethod
    def load(cls, file: Path) -> Statistics:
        """Read what `save` wrote. Raises `CalibrationError` for anything else."""
        if file.exists() and not file.is_file():  # a pipe would be waited for
            raise CalibrationError(f"{file}: is no file. Give the {STATISTICS} of an earlier run.")
        try:
            return cls.from_bytes(file.read_bytes())
        except FileNotFoundError:
            raise CalibrationError(f"{file}: no such file.") from None
        except OSError as error:
            raise CalibrationError(f"{file}: cannot be read: {error.strerror}.") from error
        except Exception as error:  # whatever safetensors raises for bytes that are none
            raise CalibrationError(
                f"{file}: not the statistics of a calibration: {error}. "
                f"Give the {STATISTICS} of an earlier run."
            ) from None

    @classmethod
    def from_bytes(cls, data: bytes) -> Statistics:
        """What `to_bytes` gave. Raises many kinds of errors for anything else."""
        from safetensors.torch import load

        tensors = load(data)
        size = int.from_bytes(data[:8], "little")
        head = json.loads(data[8 : 8 + size]).get("__metadata__", {}).get(FORMAT)
        if head is None:
            raise ValueError(f"it is no {FORMAT!r}")
        summaries = json.loads(head)
        found = Statistics(
            DataSummary(**summaries["data"]), model=ModelSummary(**summaries["model"])
        )
        _parse(found, tensors)
        return found


def _parse(found: Statistics, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        if leaf == "tokens":
            amaxes = _amaxes(tensors, f"{path}.gate_up"), _amaxes(tensors, f"{path}.down")
            if tensor.ndim != 1 or any(each.shape != tensor.shape for each in amaxes):
                raise ValueError(f"{path}: counts and amaxes of several shapes")
            found.experts[path] = ExpertsStatistics(tensor, *amaxes)
        elif leaf == "rows":
            found.linears[path] = LinearStatistics(float(_amaxes(tensors, path)), int(tensor))
        elif name.endswith(".kv.amax"):
            key, value = _amaxes(tensors, f"{path}").tolist()
            found.kv[path.removesuffix(".kv")] = (key, value)


def _amaxes(tensors: Mapping[str, torch.Tensor], path: str) -> torch.Tensor:
    amax = tensors[f"{path}.amax"]
    if not bool(((amax >= 0) & (amax < math.inf)).all()):
        raise ValueError(f"{path}.amax holds {amax.flatten()[:4].tolist()}")
    return amax


def data_summary(data: CalibrationData, *, all_experts: bool) -> DataSummary:
    """The summary of a `CalibrationData`."""
    return DataSummary(data.origin, data.digest, data.samples, data.seq, data.tokens, all_experts)


def merged(parts: Sequence[Statistics]) -> Statistics:
    """Statistics of all the data that several ranks saw: amaxes by maximum, counts by sum.

    Parts of the same data, which the ranks have shared out among them, are still of that.
    """
    data = {part.data: part.data for part in parts}
    found = Statistics(_merged_data(list(data)), model=parts[0].model)
    for part in parts:
        found.add(part)
    return found


def _both(first: ExpertsStatistics | None, second: ExpertsStatistics) -> ExpertsStatistics:
    if first is None:
        return second
    return ExpertsStatistics(
        first.tokens + second.tokens,
        torch.maximum(first.gate_up_amax, second.gate_up_amax),
        torch.maximum(first.down_amax, second.down_amax),
    )


def _merged_data(parts: Sequence[DataSummary]) -> DataSummary:
    digest = hashlib.sha256("".join(part.digest for part in parts).encode()).hexdigest()
    return DataSummary(
        parts[0].origin,
        digest if len(parts) > 1 else parts[0].digest,
        sum(part.samples for part in parts),
        max(part.seq for part in parts),
        sum(part.tokens for part in parts),
        parts[0].all_experts,
    )
