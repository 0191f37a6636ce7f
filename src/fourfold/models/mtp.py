# SPDX-License-Identifier: Apache-2.0
"""Linear weights of multi-token-prediction (MTP) layers, which transformers does not build.

An MTP layer is a copy of a decoder layer with extra inputs: a tensor of it that is named and
shaped like one of the first decoder layers' is cut in the same way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from fourfold.models.inventory import LinearWeight
from fourfold.models.names import EXPERT_NUMBER, LAYER
from fourfold.models.roles import MTP_KEY, Role
from fourfold.storage.safetensors_header import TensorInfo

_DECODER_ROLES = {
    Role.EXPERTS, Role.SHARED_EXPERTS, Role.MLP, Role.ATTENTION, Role.LINEAR_ATTENTION,
}  # fmt: skip


def is_mtp(key: str, stacks: Collection[str], num_hidden_layers: int) -> bool:
    """True if a raw key without a place in the module tree is an MTP layer's.

    Args:
        key: The raw key.
        stacks: What the raw keys of decoder layers begin with, up to the number: `model.layers.`.
        num_hidden_layers: The number of decoder layers. Those that follow in a stack are MTP.
    """
    layer = LAYER.match(key)
    if layer is not None and stack_of(key) in stacks:
        return int(layer["number"]) >= num_hidden_layers
    return MTP_KEY.search(key) is not None


def stack_of(key: str) -> str:
    """Return `model.layers.` of `model.layers.3.mlp.gate.weight`; empty without a layer."""
    layer = LAYER.match(key)
    return key[: layer.start("number")] if layer else ""


def mtp_linears(
    keys: Iterable[str], linears: Sequence[LinearWeight], infos: Mapping[str, TensorInfo]
) -> Iterator[LinearWeight]:
    """Yield the linear weights in MTP tensors, cut like the `linears` of decoder layers."""
    templates = _first_by_suffix(linears)
    for key in keys:
        for template in templates.get(_suffix(key), ()):
            same_shape = infos[key].shape == infos[template.region.key].shape
            if template.role in _DECODER_ROLES and same_shape:
                yield _cut_like(key, template, infos[key].dtype)


def _cut_like(key: str, template: LinearWeight, dtype: str) -> LinearWeight:
    prefix, expert = _prefix(key), template.expert
    name = prefix + template.name.removeprefix(_prefix(template.region.key))
    if (number := EXPERT_NUMBER.search(key)) is not None:
        expert = int(number.group())
        name = EXPERT_NUMBER.sub(number.group(), name)
    module = prefix + template.module
    half = template.input_site.rpartition(".")[2]
    is_routed = template.expert is not None
    return replace(
        template,
        name=name,
        role=Role.MTP,
        region=replace(template.region, key=key),
        dtype=dtype,
        layer=None,
        module=module,
        scale_group=f"{module}.{expert}.{half}" if is_routed else name,
        input_site=f"{module}.{half}" if is_routed else name,
        expert=expert,
    )


def _prefix(key: str) -> str:
    """`model.layers.3.` of `model.layers.3.mlp.gate.weight`; empty without a layer."""
    layer = LAYER.match(key)
    return layer.group() if layer else ""


def _suffix(key: str) -> str:
    return EXPERT_NUMBER.sub("#", key.removeprefix(_prefix(key)))


def _first_by_suffix(linears: Sequence[LinearWeight]) -> dict[str, list[LinearWeight]]:
    """For each key's name inside its layer, the weights in the first such key."""
    first: dict[str, str] = {}
    templates: dict[str, list[LinearWeight]] = defaultdict(list)
    for linear in linears:
        key = linear.region.key
        if linear.layer is not None and first.setdefault(_suffix(key), key) == key:
            templates[_suffix(key)].append(linear)
    return templates
