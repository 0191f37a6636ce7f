# SPDX-License-Identifier: Apache-2.0
"""Tensors of the source that transformers does not build, and what that means.

transformers computes without them, also when it calibrates, and engines fail on most of them. MTP
layers are such tensors by design. Tensors that only a wrong configuration or an unmerged adapter
explains are refused; all others are copied, and named in a note.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from fourfold.errors import ModelError
from fourfold.models.families import family_of
from fourfold.models.inventory import Inventory
from fourfold.models.mtp import stack_of
from fourfold.models.names import LAYER
from fourfold.models.roles import Role
from fourfold.storage.source import Source

_ADAPTER = re.compile(r"(^|[._])lora_(A|B|embedding|magnitude)|\.modules_to_save\.")
_COUNTS_MTP = re.compile(r"nextn|mtp")


def placement_notes(source: Source, inventory: Inventory) -> Iterator[str]:
    """Yield notes on tensors that the architecture has no place for.

    Raises:
        ModelError: They are of an adapter, or biases of layers that have none.
    """
    adapter = [key for key in inventory.unplaced if _ADAPTER.search(key)]
    if adapter:
        raise ModelError(
            f"{_place(inventory, adapter)}: a part of an adapter (LoRA), which neither "
            "transformers nor an engine computes with. Merge it into the model (peft's "
            "merge_and_unload) and save that."
        )
    if inventory.denied:
        raise ModelError(
            f"{_place(inventory, inventory.denied)}: config.json says that this layer has no bias: "
            "transformers computes without it, vLLM and SGLang fail with a KeyError. Correct "
            "config.json (such as attention_bias), or take the biases out of the checkpoint."
        )
    if inventory.unplaced:
        yield (
            f"{_first_few(inventory.unplaced)}: no place in {inventory.architecture}, as "
            f"config.json describes it ({_count(inventory.unplaced)}). They are copied; "
            "transformers computes without them, also when it calibrates, vLLM and SGLang fail on "
            "names that they do not know, and fourfold's load and generate refuse them. Correct "
            "config.json, or take them out"
        )
    yield from _unmapped_experts(inventory)
    if inventory.unpublished:
        yield (
            f"{_first_few(inventory.unpublished)}: names in transformers' memory "
            f"({_count(inventory.unpublished)}), of what published checkpoints hold in several "
            "tensors: no engine's own loader is known to read them. Save the source again with "
            "save_pretrained, without save_original_format=False"
        )
    mtp = [key for key in inventory.unknown if inventory.tensors[key].role is Role.MTP]
    if mtp:
        yield (
            f"{_count(mtp)} of MTP layers, which transformers does not build, are kept unless the "
            f"recipe names mtp: {_first_few(mtp, 1)}"
        )
        yield from _uncounted_layers(source, inventory, mtp)


def _unmapped_experts(inventory: Inventory) -> Iterator[str]:
    """Experts whose names in the output are not those that their family's loaders map."""
    family = family_of(*inventory.model_types)
    names = [x.name for x in inventory.linears if x.role is Role.EXPERTS and x.expert is not None]
    unmapped = [name for name in names if not family.maps(name)]
    if unmapped and family.readers:
        yield (
            f"{unmapped[0]}: a name that no engine maps for {inventory.model_types[0]} "
            f"({_count(unmapped)}); engines' loaders know {family.pattern}"
        )


def _uncounted_layers(source: Source, inventory: Inventory, mtp: Sequence[str]) -> Iterator[str]:
    """Layers past the last one that have just what decoder layers have."""
    usual = {_inside(raw.info.key) for raw in inventory.tensors.values() if raw.layer is not None}
    past_end = [key for key in mtp if stack_of(key) and not _COUNTS_MTP.search(key)]
    if not past_end or _counts_mtp(source.config) or not usual.issuperset(map(_inside, past_end)):
        return
    yield (
        f"{_first_few(past_end, 1)}: of a layer like the decoder's, but config.json counts "
        f"{len(inventory.layer_paths)} (num_hidden_layers): transformers and engines compute "
        "without it, or fail on it. Does config.json belong to this checkpoint?"
    )


def _counts_mtp(config: object) -> bool:
    """True if a configuration states a number of MTP layers."""
    return isinstance(config, dict) and any(
        (_COUNTS_MTP.search(name) is not None and bool(value)) or _counts_mtp(value)
        for name, value in config.items()
    )


def _inside(key: str) -> str:
    """A tensor's name inside its layer, the same for all experts."""
    return re.sub(r"\.\d+\.", ".#.", LAYER.sub("", key))


def _place(inventory: Inventory, keys: Sequence[str]) -> str:
    more = f" ({_count(keys)})" if len(keys) > 1 else ""
    return f"{keys[0]} in {inventory.tensors[keys[0]].info.file.name}{more}"


def _count(keys: Sequence[str]) -> str:
    return f"{len(keys):,} tensor{'s' * (len(keys) != 1)}"


def _first_few(keys: Sequence[str], most: int = 3) -> str:
    return ", ".join(keys[:most]) + (", …" if len(keys) > most else "")
