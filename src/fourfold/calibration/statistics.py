# SPDX-License-Identifier: Apache-2.0
"""The statistics that a calibration run has collected, and the file they are stored in.

The small ones (amaxes, token counts and histograms) are written beside a checkpoint as
`calibration.safetensors`, and can be read again to make the same checkpoint without running the
model:

    <experts module>.tokens          I64  [E]  tokens that were routed to each expert
    <experts module>.gate_up.amax    F32  [E]  largest input of gate and up, by expert
    <experts module>.down.amax       F32  [E]  largest input of down, by expert
    <linear module>.amax             F32  []   largest input of a linear layer
    <linear module>.rows             I64  []   number of rows it saw
    <layer>.kv.amax                  F32  [2]  largest key (after rotary embedding) and value
    <site>.block_amaxes              I64  [2048]  histogram, where a recipe asks for it: of a linear
                                               module, or of gate_up or down of an experts module

Names are module paths in transformers' model. The file's metadata describe data and model.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from fourfold.calibration.data import CalibrationData
from fourfold.distributed.ranks import Ranks
from fourfold.errors import CalibrationError
from fourfold.statistics import (
    BLOCK_AMAXES,
    KEPT,
    SMALL,
    STATISTICS,
    Reduction,
    Site,
    State,
    Statistic,
    statistic_of,
)
from fourfold.storage.names import STATISTICS as FILE

FORMAT = "fourfold calibration 1"

Sites = dict[str, State]
"""By site name, the tensors of all statistics there."""


@dataclass(frozen=True)
class DataSummary:
    """The data that statistics were collected from."""

    origin: str
    digest: str
    samples: int
    seq: int
    tokens: int
    all_experts: bool = False


@dataclass(frozen=True)
class ModelSummary:
    """The model that statistics were collected in."""

    architecture: str = ""
    digest: str = ""
    """`Inventory.digest`: of the names and shapes of its linear weights."""


@dataclass(frozen=True)
class ExpertsStatistics:
    """Amaxes and counts of one experts module, for each of its E experts."""

    tokens: Tensor
    gate_up_amax: Tensor
    down_amax: Tensor

    @property
    def unreached(self) -> list[int]:
        """Experts that no token was routed to."""
        return [int(number) for number in (self.tokens == 0).nonzero().flatten()]


@dataclass(frozen=True)
class LinearStatistics:
    """Amax and number of rows of one linear layer's input."""

    amax: float
    rows: int


@dataclass(repr=False)
class Statistics:
    """Everything that calibration has collected; it grows layer by layer."""

    data: DataSummary
    sites: Sites = field(default_factory=dict)
    model: ModelSummary = ModelSummary()

    def __repr__(self) -> str:
        origin, tokens = self.data.origin, self.data.tokens
        return f"<Statistics: {len(self.sites):,} sites, {tokens:,} tokens of {origin}>"

    @property
    def experts(self) -> dict[str, ExpertsStatistics]:
        """Amaxes and counts of the experts modules, by module path."""
        paths = (name.removesuffix(".gate_up") for name in self.sites if name.endswith(".gate_up"))
        return {path: experts for path in paths if (experts := self.experts_of(path)) is not None}

    @property
    def linears(self) -> dict[str, LinearStatistics]:
        """Amax and row count of the linear layers, by module path."""
        return {path: linear for path in self.sites if (linear := self.linear_of(path)) is not None}

    @property
    def kv(self) -> dict[str, tuple[float, float]]:
        """The largest key and the largest value, by path of the decoder layer."""
        layers = (
            name.removesuffix(".kv")
            for name, state in self.sites.items()
            if name.endswith(".kv") and "tokens" not in state
        )
        return {layer: self.kv_of(layer) for layer in layers}

    def experts_of(self, path: str) -> ExpertsStatistics | None:
        """Amaxes and counts of one experts module; None if they were not collected."""
        state = self.sites.get(f"{path}.gate_up", {})
        if not state.keys() >= SMALL or state["amax"].ndim == 0:
            return None
        down = self.sites.get(f"{path}.down", {}).get("amax", torch.zeros_like(state["amax"]))
        return ExpertsStatistics(state["tokens"], state["amax"], down)

    def linear_of(self, path: str) -> LinearStatistics | None:
        """Amax and row count of one linear layer; None if it saw nothing."""
        state = self.sites.get(path, {})
        if not state.keys() >= SMALL or state["amax"].ndim != 0:
            return None
        return LinearStatistics(float(state["amax"]), int(state["tokens"]))

    def kv_of(self, layer: str) -> tuple[float, float]:
        """The largest key and the largest value in one decoder layer; KeyError if none was seen."""
        key, value = self.sites[f"{layer}.kv"]["amax"].tolist()
        return key, value

    def add(self, other: Statistics) -> None:
        """Merge in the statistics of another layer, or of other data; sites may lack some."""
        for site, state in other.sites.items():
            mine = self.sites.setdefault(site, {})
            by_statistic: dict[Statistic, State] = defaultdict(dict)
            for name, tensor in state.items():
                by_statistic[statistic_of(name)][name] = tensor
            for statistic, tensors in by_statistic.items():
                seen = {name: mine[name] for name in tensors if name in mine}
                mine |= statistic.merge(seen, tensors) if seen else tensors

    @property
    def summaries(self) -> dict[str, Any]:
        """The summaries of data and model, as JSON can hold them."""
        return {"data": asdict(self.data), "model": asdict(self.model)}

    @classmethod
    def of(cls, summaries: Mapping[str, Any], sites: Sites) -> Statistics:
        """Return the statistics at some sites, given their `summaries`."""
        return cls(DataSummary(**summaries["data"]), sites, ModelSummary(**summaries["model"]))

    def drop_large(self, module: str = "") -> None:
        """Drop all statistics but those that are kept, of sites inside a module, or everywhere."""
        for site, state in self.sites.items():
            if not module or site.startswith(f"{module}."):
                self.sites[site] = {name: x for name, x in state.items() if is_kept(name)}

    def save(self, file: Path) -> None:
        """Write the statistics that are kept; the same statistics give the same bytes."""
        file.write_bytes(self.to_bytes())

    def to_bytes(self) -> bytes:
        """Return the contents of `calibration.safetensors`."""
        from safetensors.torch import save

        tensors = {
            _name_in_file(site, name, tensor): tensor
            for site, state in sorted(self.sites.items())
            for name, tensor in sorted(state.items())
            if is_kept(name)
        }
        head = json.dumps(self.summaries, ensure_ascii=False, sort_keys=True)
        # One key only: safetensors writes several in random order.
        return bytes(save(tensors, metadata={FORMAT: head}))

    @classmethod
    def load(cls, file: Path) -> Statistics:
        """Read a `calibration.safetensors`. Raises `CalibrationError` for any other file."""
        if file.exists() and not file.is_file():  # reading a pipe would block
            raise CalibrationError(
                f"{file}: is not a regular file. Give the {FILE} of an earlier run."
            )
        try:
            return cls.from_bytes(file.read_bytes())
        except FileNotFoundError:
            raise CalibrationError(f"{file}: no such file.") from None
        except OSError as error:
            raise CalibrationError(f"{file}: cannot be read: {error.strerror}.") from error
        except Exception as error:  # safetensors raises several kinds for a file of another format
            raise CalibrationError(
                f"{file}: not the statistics of a calibration: {error}. "
                f"Give the {FILE} of an earlier run."
            ) from None

    @classmethod
    def from_bytes(cls, data: bytes) -> Statistics:
        """Parse what `to_bytes` returned. Raises many kinds of errors for anything else."""
        from safetensors.torch import load

        tensors = load(data)
        size = int.from_bytes(data[:8], "little")
        head = json.loads(data[8 : 8 + size]).get("__metadata__", {}).get(FORMAT)
        if head is None:
            raise ValueError(f"it is no {FORMAT!r}")
        return cls.of(json.loads(head), _sites_in_file(tensors))


def is_kept(tensor: str) -> bool:
    """True if a tensor of a state belongs to a statistic that is kept, by the tensor's name."""
    return statistic_of(tensor).name in KEPT


def reduced(ranks: Ranks, sites: Sites) -> Sites:
    """Merge the states that all ranks have collected; each rank may have seen other sites."""
    result: Sites = {}
    for op in get_args(Reduction):
        tensors = {
            f"{site}:{name}": tensor
            for site, state in sites.items()
            for name, tensor in state.items()
            if statistic_of(name).reduction == op
        }
        for key, tensor in ranks.reduce(tensors, op).items():
            site, _, name = key.rpartition(":")
            result.setdefault(site, {})[name] = tensor
    return result


# --- calibration.safetensors --------------------------------------------------------------------


def _name_in_file(site: str, name: str, tensor: Tensor) -> str:
    if name == "tokens":
        return f"{site}.rows" if tensor.ndim == 0 else f"{site.removesuffix('.gate_up')}.tokens"
    return f"{site}.{name}"


def _sites_in_file(tensors: Mapping[str, Tensor]) -> Sites:
    sites: Sites = {}
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        if leaf == "tokens":
            amaxes = [_amax(tensors, f"{path}.{product}") for product in ("gate_up", "down")]
            if tensor.ndim != 1 or any(amax.shape != tensor.shape for amax in amaxes):
                raise ValueError(f"{path}: counts and amaxes of several shapes")
            sites[f"{path}.gate_up"] = {"amax": amaxes[0], "tokens": tensor}
            sites[f"{path}.down"] = {"amax": amaxes[1]}
        elif leaf == "rows":
            sites[path] = {"amax": _amax(tensors, path), "tokens": tensor.reshape(())}
        elif name.endswith(".kv.amax") and f"{path}.rows" not in tensors:
            sites[path] = {"amax": _amax(tensors, path)}
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        if leaf == BLOCK_AMAXES:
            sites.setdefault(path, {})[leaf] = _histogram(name, tensor)
    return sites


def _histogram(name: str, tensor: Tensor) -> Tensor:
    dtype, shape = STATISTICS[BLOCK_AMAXES].shapes(Site(name, 0))[BLOCK_AMAXES]
    if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape) or bool((tensor < 0).any()):
        raise ValueError(f"{name}: not counts of {shape[0]} bins")
    return tensor


def _amax(tensors: Mapping[str, Tensor], path: str) -> Tensor:
    amax = tensors[f"{path}.amax"]
    if not bool(((amax >= 0) & (amax < math.inf)).all()):
        raise ValueError(f"{path}.amax holds {amax.flatten()[:4].tolist()}")
    return amax


# --- several runs -------------------------------------------------------------------------------


def data_summary(data: CalibrationData, *, all_experts: bool) -> DataSummary:
    """Return the summary of a `CalibrationData`."""
    return DataSummary(data.origin, data.digest, data.samples, data.seq, data.tokens, all_experts)


def merged(parts: Sequence[Statistics]) -> Statistics:
    """Merge the statistics of several ranks, and the summaries of their data if they differ."""
    summaries, data = list(dict.fromkeys(part.data for part in parts)), parts[0].data
    if len(summaries) > 1:
        data = replace(
            data,
            digest=hashlib.sha256("".join(part.digest for part in summaries).encode()).hexdigest(),
            samples=sum(part.samples for part in summaries),
            seq=max(part.seq for part in summaries),
            tokens=sum(part.tokens for part in summaries),
        )
    statistics = Statistics(data, model=parts[0].model)
    for part in parts:
        statistics.add(part)
    return statistics
