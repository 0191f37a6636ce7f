# SPDX-License-Identifier: Apache-2.0
"""`fourfold.load`: a quantized checkpoint as an ordinary transformers model.

For previews, evaluation and tests without an engine. The model computes with dequantized weights
and needs the memory of the source. It predicts what the checkpoint predicts, up to the order in
which an engine adds.
"""

from __future__ import annotations

import re
import warnings
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from fourfold.calibration.kv_cache import why_exact
from fourfold.calibration.streaming import StreamedModel
from fourfold.config import check_type
from fourfold.distributed.machine import choose_device, memory_available
from fourfold.errors import ModelError, ResourceError, SourceError, UsageError
from fourfold.evaluation.simulated_activations import Simulation, find_sites
from fourfold.models.agreement import agreement_notes
from fourfold.models.internals import quiet
from fourfold.models.inventory import Inventory
from fourfold.models.inventory_builder import take_inventory
from fourfold.sources.decoded import DecodedSource, open_decoded
from fourfold.storage.source import Source
from fourfold.storage.units import size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GENERATION_CONFIG = "generation_config.json"

PARAMETER = re.compile(r"\.(weight|bias)$")
"""Tensors that a model computes with. Old checkpoints hold buffers that no model needs."""


def load(
    out: str | Path,
    *,
    simulate_activations: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a quantized checkpoint as a transformers model with dequantized weights.

    The model is in evaluation mode and has the checkpoint's generation settings.

    Args:
        out: A checkpoint, whichever tool wrote it, in a layout or format that `quantize` reads.
        simulate_activations: Round the inputs of quantized linear layers as engines do, and
            keys and values if the checkpoint asks for a quantized KV cache.
            `model.fourfold_simulation.remove()` ends that.
        dtype: The dtype of the parameters; by default the source's. float32 gives the weights'
            values unrounded.
        device: The device of the parameters.
        trust_remote_code: Run the Python code that the checkpoint brings.

    Raises:
        SourceError, ModelError: If checkpoint and architecture do not fit; names a tensor.
        UsageError: If activations should be simulated, and engines keep 16 bits for all of them.
        ResourceError: If the model does not fit into memory.
    """
    check_type("out", out, str | Path, "a checkpoint's folder, or a name on the hub")
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise UsageError(f"`device={device!r:.60}`: give cpu, cuda or cuda:N.") from None
    device = choose_device(str(device)) if device.type == "cuda" else device
    with closing(open_decoded(out, dtype=dtype, trust_remote_code=trust_remote_code)) as checkpoint:
        opened = OpenedModel(checkpoint, dtype=dtype, device=device)
        simulation = opened.simulate_activations(checkpoint) if simulate_activations else None
        model: Any = opened.load()
    if simulation is not None:
        model.fourfold_simulation = simulation
    return cast("PreTrainedModel", model)


class OpenedModel:
    """A checkpoint's model on the meta device, to be loaded whole or streamed."""

    def __init__(
        self,
        source: Source,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        reads_text_once: bool = False,
    ) -> None:
        """Build the model; a tensor without a place in it is a `ModelError`.

        reads_text_once: True for calls that pass the layers once, with text alone: towers of vision
            and audio are left out, and the head is loaded with the last layer.
        """
        self.source = source
        self.inventory: Inventory = take_inventory(source)
        _check_known(source, self.inventory)
        for note in agreement_notes(source, self.inventory):
            warnings.warn(f"{source.folder}: {note}", stacklevel=2)
        self.streamed = StreamedModel(
            source,
            device=device,
            dtype=dtype,
            towers=not reads_text_once,
            late_head=reads_text_once,
        )
        self.model = self.streamed.model
        _take_generation_config(self.model, source.folder)

    @property
    def nbytes(self) -> int:
        """Approximate memory for loading the whole model; one layer is in memory twice."""
        units = [
            self.streamed.unit_bytes(unit) for unit in (None, *range(len(self.streamed.layers)))
        ]
        return sum(units) + max(units)

    def simulate_activations(self, checkpoint: DecodedSource) -> Simulation:
        """Round the model's activations from now on, by the scales of `checkpoint`.

        Warns of a KV cache that cannot be simulated and keeps its precision.
        """
        sites = find_sites(checkpoint, self.inventory, self.streamed.tree)
        reason = None
        if sites.kv_cache is not None:
            facts = self.inventory, self.source.config
            reason = why_exact(self.model, sites.kv_cache, *facts)
        if reason is not None:
            warnings.warn(f"{checkpoint.folder}: {reason}, and keeps its precision.", stacklevel=3)
            sites = replace(sites, kv_cache=None)
        return Simulation(self.model, self.streamed.tree, sites)

    def load(self) -> PreTrainedModel:
        """Return the whole model. Raises ResourceError if it does not fit into memory."""
        available = memory_available()
        if self.streamed.device.type == "cpu" and self.nbytes > available:
            raise ResourceError(
                f"{self.source.folder}: {size(self.nbytes)} of memory are needed for the whole "
                f"model, {size(available)} are available. `fourfold generate` needs one layer only."
            )
        model: PreTrainedModel = self.streamed.load_all()
        left = [name for name, value in model.named_parameters() if value.is_meta]
        if left:
            raise SourceError(f"{self.source.folder}: {left[0]}: has no tensor.")
        return model


def _check_known(source: Source, inventory: Inventory) -> None:
    left = [key for key in inventory.unplaced if PARAMETER.search(key)]
    if left:
        raise ModelError(
            f"{source.folder}: {left[0]}: the model has no place for this tensor ({len(left)} in "
            "all). Does config.json belong to this checkpoint?"
        )


def _take_generation_config(model: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    if not (folder / GENERATION_CONFIG).is_file():
        return
    try:
        with quiet():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises many kinds
        raise SourceError(f"{folder / GENERATION_CONFIG}: cannot be read: {error}") from error
