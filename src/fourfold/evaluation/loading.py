"""The model of an NVFP4 checkpoint in transformers, dequantized: `fourfold.load`.

For previews, evaluation and tests, where no engine is at hand. It computes with ordinary weights
and is as large as the source; what it predicts is what the checkpoint predicts, up to the order
in which an engine adds.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fourfold.calibration.streaming import StreamedModel
from fourfold.distributed.machine import memory_available
from fourfold.errors import ModelError, ResourceError, SourceError
from fourfold.evaluation.simulation import Simulation, Sites, find_sites
from fourfold.models.internals import quiet
from fourfold.models.inventory import Inventory
from fourfold.models.inventory_builder import take_inventory
from fourfold.models.roles import Role
from fourfold.sources.decoded import DecodedSource, open_decoded
from fourfold.storage.source import Source
from fourfold.storage.units import size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GENERATION_CONFIG = "generation_config.json"

PARAMETER = re.compile(r"\.(weight|bias)$")
"""What is computed with. Old checkpoints hold buffers, too, that nobody needs."""


def load(
    out: str | Path,
    *,
    simulate_activations: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The transformers model of the NVFP4 checkpoint `out`, its weights dequantized.

    simulate_activations: also round what quantized linear layers read, as W4A4 engines do; off
        again with `model.fourfold_simulation.remove()`.
    dtype: of the parameters; the source's by default. float32 gives the weights' values unrounded.
    device: where the parameters are put.

    In evaluation mode, with the checkpoint's generation settings. Raises SourceError or ModelError
    where checkpoint and architecture do not fit, naming a key; UsageError for a W4A16 checkpoint
    whose activations should be simulated; ResourceError where the memory is too small.
    """
    checkpoint = open_decoded(out, dtype=dtype, trust_remote_code=trust_remote_code)
    try:
        opened = OpenedModel(checkpoint, dtype=dtype, device=device)
        sites = opened.sites(checkpoint) if simulate_activations else None
        model: Any = opened.load()
        if sites is not None:
            model.fourfold_simulation = Simulation(model, opened.streamed.tree, sites)
        return model
    finally:
        checkpoint.close()


class OpenedModel:
    """A checkpoint's model on the meta device, checked: to be loaded whole, or to be streamed."""

    def __init__(
        self,
        source: Source,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Raises ModelError for a key without a place in the model, SourceError the other way."""
        self.source = source
        self.inventory: Inventory = take_inventory(source)
        _check_known(source, self.inventory)
        self.streamed = StreamedModel(source, device=device, dtype=dtype, towers=True)
        self.model = self.streamed.model
        _take_generation_config(self.model, source.folder)

    @property
    def nbytes(self) -> int:
        """Memory that the whole model takes while it is loaded, about: one layer is there twice."""
        units = [
            self.streamed.unit_bytes(unit) for unit in (None, *range(len(self.streamed.layers)))
        ]
        return sum(units) + max(units)

    def sites(self, checkpoint: DecodedSource) -> Sites:
        """Where activations are to be rounded, by the input scales of `checkpoint`."""
        return find_sites(checkpoint, self.inventory, self.streamed.tree)

    def load(self) -> PreTrainedModel:
        """The model, whole. Raises ResourceError where the memory is too small."""
        available = memory_available()
        if self.streamed.device.type == "cpu" and self.nbytes > available:
            raise ResourceError(
                f"{self.source.folder}: {size(self.nbytes)} of memory are needed for the whole "
                f"model, {size(available)} are available. `fourfold generate` does with one layer."
            )
        model: PreTrainedModel = self.streamed.load_all()
        left = [name for name, value in model.named_parameters() if value.is_meta]
        if left:
            raise SourceError(f"{self.source.folder}: {left[0]}: no tensor became it")
        return model


def _check_known(source: Source, inventory: Inventory) -> None:
    """Nothing is left out in silence but MTP layers, which transformers does not build."""
    left = [
        key
        for key in inventory.unknown
        if inventory.tensors[key].role is not Role.MTP and PARAMETER.search(key)
    ]
    if left:
        raise ModelError(
            f"{source.folder}: {left[0]}: the checkpoint holds it, the model has no place for it "
            f"({len(left)} such). Does config.json belong to this checkpoint?"
        )


def _take_generation_config(model: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    if not (folder / GENERATION_CONFIG).is_file():
        return
    try:
        with quiet():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    except Exception as error:  # whatever transformers finds wrong with it
        raise SourceError(f"{folder / GENERATION_CONFIG}: cannot be read: {error}") from error
