# SPDX-License-Identifier: Apache-2.0
"""A store of statistics: one safetensors file for each layer.

An unfinished run keeps its statistics here, so that a run that resumes does not observe a layer
again. Large statistics are not stored, since they may take more room than the model: a layer whose
algorithms read them is observed again unless it is written.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fourfold.calibration.statistics import Sites, Statistics
from fourfold.statistics import KEPT, statistic_of
from fourfold.storage.atomic import partial_of, sync

NON_LAYER = "non-layer"
"""The file name of the statistics of modules outside the decoder layers."""

SUMMARY = "summary"
SEPARATOR = ":"


class StatisticsStore:
    """Statistics by decoder layer; None stands for the modules outside the layers."""

    def __init__(self, folder: Path) -> None:
        """Use `folder`, which `save` creates if it does not exist."""
        self.folder = folder

    def save(self, layer: int | None, statistics: Statistics) -> None:
        """Store a layer's statistics, of those that are kept.

        After a crash the file is there and complete, or absent.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{site}{SEPARATOR}{name}": tensor.contiguous()
            for site, state in statistics.sites.items()
            for name, tensor in state.items()
            if statistic_of(name).name in KEPT
        }
        file = self.folder / f"{NON_LAYER if layer is None else f'layer-{layer:05d}'}.safetensors"
        partial = partial_of(file)
        save_file(tensors, partial, metadata={SUMMARY: json.dumps(statistics.summaries)})
        sync(partial)
        partial.replace(file)
        sync(self.folder)

    def load(self) -> dict[int | None, Statistics]:
        """Read every layer that was stored. A damaged file counts as absent."""
        statistics: dict[int | None, Statistics] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            with suppress(SafetensorError, KeyError):
                name = file.stem.removeprefix("layer-")
                statistics[None if name == NON_LAYER else int(name)] = _read(file)
        return statistics


def _read(file: Path) -> Statistics:
    sites: Sites = {}
    with safe_open(file, framework="pt") as opened:
        summaries = json.loads(opened.metadata()[SUMMARY])
        for key in opened.keys():  # noqa: SIM118 (not a mapping)
            site, _, name = key.rpartition(SEPARATOR)
            sites.setdefault(site, {})[name] = opened.get_tensor(key)
    return Statistics.of(summaries, sites)
