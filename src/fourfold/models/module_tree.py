# SPDX-License-Identifier: Apache-2.0
"""The architecture's module tree: linear layers, experts modules, routers, decoder layers.

All of it is read off transformers' classes; nothing here depends on a family's name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fourfold.models.experts import UNDECORATED, ExpertsModule, Part, decorated_parts
from fourfold.models.internals import (
    Conversion,
    build_model,
    conversion_of,
    embedding_shape,
    output_embeddings,
    plain_class,
    tied_parameters,
    ties_between,
    unsplit_classes,
)
from fourfold.models.norms import Gain, gains_of
from fourfold.models.roles import EXPERTS_CLASS, Role, role_of_linear


@dataclass(frozen=True, slots=True)
class LinearModule:
    """An `nn.Linear` of the tree."""

    path: str
    out_features: int
    in_features: int
    role: Role


@dataclass(frozen=True)
class ModuleTree:
    """The modules of an architecture; every path is a module path in memory."""

    model_types: tuple[str, ...]
    """`model_type` of the whole, then of its text model."""
    architecture: str
    linears: Mapping[str, LinearModule]
    experts: Mapping[str, ExpertsModule]
    unknown_experts: Mapping[str, str]
    """Experts modules whose layout is not known: path → class name."""
    embeddings: frozenset[str]
    routers: frozenset[str]
    """Routers with a bare weight, which are not `nn.Linear` in transformers."""
    parameters: Mapping[str, tuple[int, ...]]
    buffers: frozenset[str]
    """Persistent buffers, which a checkpoint holds (such as a router's correction bias)."""
    tied: frozenset[str]
    """Parameters that share another one's storage and need no key of their own."""
    ties: Mapping[str, str]
    """The parameter that each of these computes with, and each that a configuration could tie."""
    layers: tuple[str, ...]
    """Paths of the decoder layers, in order."""
    norms: Mapping[str, Gain]
    """How the weight of each norm scales its outputs."""
    num_hidden_layers: int
    vocab_size: int
    """Rows of the text model's embedding; 0 if neither it nor the config states them."""
    hidden_size: int
    """Columns of that embedding."""
    max_positions: int | None
    """The longest input in tokens, as the config states it."""
    experts_per_token: int
    """The number of routed experts that read a token; 0 if the config does not say."""
    conversion: Conversion

    @property
    def heads(self) -> tuple[str, ...]:
        """Paths of the layers that compute logits."""
        return tuple(x.path for x in self.linears.values() if x.role is Role.LM_HEAD)


def build_tree(folder: Path, *, trust_remote_code: bool = False) -> ModuleTree:
    """Return the module tree of the checkpoint in `folder`, from its config.json alone.

    Raises:
        ModelError: if transformers does not know the architecture or cannot build it.
    """
    return describe(build_model(folder, trust_remote_code=trust_remote_code))


def class_name(module: Any) -> str:
    """Return the name of a module's class, without the subclass that FSDP2 makes of it."""
    return plain_class(module).__name__


def describe(model: Any) -> ModuleTree:
    """Return the module tree of a transformers model, whatever device its parameters are on."""
    modules = dict(model.named_modules())
    experts, unknown = _experts(modules)
    text_config = model.config.get_text_config()
    rows, columns = embedding_shape(model)
    return ModuleTree(
        model_types=tuple(dict.fromkeys((model.config.model_type, text_config.model_type))),
        architecture=class_name(model),
        linears=_linears(model, modules),
        experts=experts,
        unknown_experts=unknown,
        embeddings=frozenset(
            path for path, module in modules.items() if isinstance(module, nn.Embedding)
        ),
        routers=frozenset(
            path
            for path, module in modules.items()
            if not isinstance(module, nn.Linear)
            and getattr(module, "weight", None) is not None
            and role_of_linear(path, [class_name(module)]) is Role.ROUTER
        ),
        parameters={name: tuple(value.shape) for name, value in model.named_parameters()},
        buffers=frozenset(model.state_dict()) - {name for name, _ in model.named_parameters()},
        tied=tied_parameters(model),
        ties=ties_between(model),
        layers=_layers(model, modules),
        norms=gains_of(modules),
        num_hidden_layers=int(getattr(text_config, "num_hidden_layers", 0)),
        vocab_size=rows or int(getattr(text_config, "vocab_size", 0) or 0),
        hidden_size=columns or int(getattr(text_config, "hidden_size", 0) or 0),
        max_positions=getattr(text_config, "max_position_embeddings", None),
        experts_per_token=_experts_per_token(text_config),
        conversion=conversion_of(model),
    )


_EXPERTS_PER_TOKEN = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts",
    "moe_k",
)  # fmt: skip
"""Names of a configuration for the number of routed experts that read a token."""


def _experts_per_token(text_config: Any) -> int:
    for name in _EXPERTS_PER_TOKEN:
        count = getattr(text_config, name, None)
        if isinstance(count, int):
            return count
    return 0


def _linears(model: Any, modules: Mapping[str, Any]) -> dict[str, LinearModule]:
    head = output_embeddings(model)
    linears = {}
    for path, module in modules.items():
        if isinstance(module, nn.Linear):
            is_head = module is head or path.rpartition(".")[2] == "lm_head"
            own = [] if type(module) is nn.Linear else [class_name(module)]
            classes = own + _enclosing(path, modules)
            role = Role.LM_HEAD if is_head else role_of_linear(path, classes)
            linears[path] = LinearModule(path, module.out_features, module.in_features, role)
    return linears


def _enclosing(path: str, modules: Mapping[str, Any]) -> list[str]:
    """Class names of the modules around `path`, innermost first, without the model itself."""
    names = []
    while "." in path:
        path = path.rpartition(".")[0]
        names.append(class_name(modules[path]))
    return names


def _experts(modules: Mapping[str, Any]) -> tuple[dict[str, ExpertsModule], dict[str, str]]:
    known: dict[str, ExpertsModule] = {}
    unknown: dict[str, str] = {}
    for path, module in modules.items():
        name = class_name(module)
        own = [value for value in module.parameters(recurse=False) if value.ndim >= 2]
        if not EXPERTS_CLASS.search(name) or not own or isinstance(module, nn.Linear):
            continue
        if hasattr(module, "is_transposed"):
            parts = decorated_parts(
                has_gate=module.has_gate,
                has_bias=module.has_bias,
                is_transposed=module.is_transposed,
                is_concatenated=module.is_concatenated,
            )
        else:
            parts = UNDECORATED.get(name, ())
        parameters = [getattr(module, part.parameter, None) for part in parts]
        if parts and all(isinstance(parameter, nn.Parameter) for parameter in parameters):
            known[path] = ExpertsModule(path, name, _num_experts(module, parts), parts)
        else:
            unknown[path] = name
    return known, unknown


def _num_experts(module: Any, parts: Sequence[Part]) -> int:
    """The number of experts with weights. LongCat's zero experts have none in some tensors."""
    values = [getattr(module, part.parameter) for part in parts if not part.is_bias]
    counts = [value.shape[0] for value in values if value.ndim == 3]
    return int(min(counts)) if counts else int(module.moe_num_experts)


def _layers(model: Any, modules: Mapping[str, Any]) -> tuple[str, ...]:
    """Decoder layers: elements of module lists whose class transformers never splits."""
    classes = unsplit_classes(model)
    layers: list[str] = []
    for path, module in modules.items():
        if isinstance(module, nn.ModuleList) and role_of_linear(path, []) is not Role.VISION:
            names = _enclosing(f"{path}.0", modules)
            if any(re.search(r"Vision|Audio", name) for name in names):
                continue
            layers += [
                f"{path}.{index}" for index, layer in enumerate(module)
                if class_name(layer) in classes
            ]  # fmt: skip
    return tuple(layers)
