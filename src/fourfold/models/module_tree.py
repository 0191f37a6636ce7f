"""The architecture's own module tree, without memory. The one file on transformers' internals.

transformers builds the model with parameters on the meta device: its classes say what is a
linear layer and what is an experts module. Its conversion rules say which raw keys become which
parameter (`Conversion.place`), and its conversion operations, run on small integer tensors, say
where each part lies (`Conversion.convert`). Internals used: `PreTrainedModel._from_config`,
`_no_split_modules`, `_tied_weights_keys`, `get_model_conversion_mapping`, `rename_source_key`,
`WeightConverter.convert`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fourfold.errors import ModelError
from fourfold.models.experts import UNDECORATED, ExpertsModule, Part, decorated_parts
from fourfold.models.roles import EXPERTS_CLASS, Role, role_of_linear

EXPERT_NUMBER = re.compile(r"(?<=\.experts\.)[0-9]{1,9}(?=\.)")


@dataclass(frozen=True, slots=True)
class LinearModule:
    """An `nn.Linear` of the tree."""

    path: str
    out_features: int
    in_features: int
    role: Role


@dataclass(frozen=True)
class ModuleTree:
    """What the architecture is made of; every path is a module path in memory."""

    model_types: tuple[str, ...]
    """`model_type` of the whole, then of its text model."""
    architecture: str
    linears: Mapping[str, LinearModule]
    experts: Mapping[str, ExpertsModule]
    unknown_experts: Mapping[str, str]
    """Experts modules whose layout is not known: path → class name."""
    embeddings: frozenset[str]
    routers: frozenset[str]
    """Modules with a bare weight that choose experts (not `nn.Linear` in transformers)."""
    parameters: Mapping[str, tuple[int, ...]]
    buffers: frozenset[str]
    """Persistent buffers: a checkpoint holds them (a router's correction bias)."""
    tied: frozenset[str]
    """Parameters that share another one's storage and need no key of their own."""
    layers: tuple[str, ...]
    """Paths of the decoder layers, in order."""
    num_hidden_layers: int
    conversion: Conversion


@dataclass(frozen=True, slots=True)
class Place:
    """Where a raw key goes: a parameter or buffer in memory, or nowhere."""

    key: str
    target: str | None
    pattern: str | None = None
    """The conversion's source pattern that the key matched; None for a plain rename."""


@dataclass(frozen=True)
class Conversion:
    """transformers' rules from raw keys to memory, of one model."""

    model: Any
    rules: Sequence[Any]
    _cache: dict[str, tuple[str | None, str | None]] = field(default_factory=dict)

    @cached_property
    def _state(self) -> dict[str, Any]:
        return dict(self.model.state_dict())

    @cached_property
    def _renamings(self) -> list[Any]:
        from transformers.core_model_loading import WeightRenaming

        return [rule for rule in self.rules if isinstance(rule, WeightRenaming)]

    @cached_property
    def _converters(self) -> list[Any]:
        from transformers.core_model_loading import WeightConverter

        return [rule for rule in self.rules if isinstance(rule, WeightConverter)]

    @cached_property
    def _by_pattern(self) -> dict[str, Any]:
        return {pattern: rule for rule in self._converters for pattern in rule.source_patterns}

    def place(self, key: str) -> Place:
        """Where `key` goes. Experts' numbers do not matter for that, so one expert decides."""
        probe = EXPERT_NUMBER.sub("0", key)
        if probe not in self._cache:
            self._cache[probe] = self._place(probe)
        target, pattern = self._cache[probe]
        if target is not None and pattern is None and probe != key:
            target = _with_numbers_of(target, key)
        return Place(key, target, pattern)

    def _place(self, key: str) -> tuple[str | None, str | None]:
        from transformers.core_model_loading import rename_source_key

        prefix = self.model.base_model_prefix
        target, pattern = rename_source_key(
            key, self._renamings, self._converters, prefix, self._state
        )
        if target not in self._state and key in self._state:
            target, pattern = rename_source_key(key, [], [], prefix, self._state)
        return (target, pattern) if target in self._state else (None, None)

    def targets(self, place: Place) -> list[str]:
        """Every parameter that this key's conversion produces."""
        if place.target is None:
            return []
        if place.pattern is None:
            return [place.target]
        patterns = self._by_pattern[place.pattern].target_patterns
        names = [place.target.replace(patterns[0], pattern) for pattern in patterns]
        return [name for name in names if name in self._state] or [place.target]

    def is_ambiguous(self, pattern: str, shape: Sequence[int]) -> bool:
        """Whether an operation tells two layouts apart by a shape that is the same in both."""
        operations = self._by_pattern[pattern].operations
        return any(
            getattr(operation, "check_dims", False)
            and shape[operation.dim0] == shape[operation.dim1]
            for operation in operations
        )

    def convert(
        self,
        target: str,
        pattern: str,
        tensors: Mapping[str, list[torch.Tensor]],
        shapes: Mapping[str, Sequence[int]],
    ) -> dict[str, torch.Tensor]:
        """Run the conversion that `pattern` belongs to on stand-ins for the raw tensors.

        `tensors` are lists by source pattern; `shapes` are what the parameters in memory would
        have at that scale. Returns the parameters by name.
        """
        rule = deepcopy(self._by_pattern[pattern])
        for source_pattern, group in tensors.items():
            rule.collected_tensors[source_pattern] = list(group)
        try:
            result = rule.convert(target, model=_StandIn(shapes), config=self.model.config)
        except Exception as error:  # whatever an operation of transformers may raise
            raise ModelError(f"{target}: its conversion {rule} fails: {error}") from error
        return {
            name: value[0] if isinstance(value, list) else value for name, value in result.items()
        }


@dataclass(frozen=True)
class _StandIn:
    """Answers `get_parameter(name).shape` at the scale of the stand-in tensors."""

    shapes: Mapping[str, Sequence[int]]

    def get_parameter(self, name: str) -> torch.Tensor:
        return torch.empty(tuple(self.shapes[name]), device="meta")


def _with_numbers_of(target: str, key: str) -> str:
    numbers = iter(EXPERT_NUMBER.findall(key))
    return EXPERT_NUMBER.sub(lambda found: next(numbers, found.group()), target)


def build_tree(folder: Path, *, trust_remote_code: bool = False) -> ModuleTree:
    """The module tree of the checkpoint in `folder`, from its config.json; no weight is read.

    Raises `ModelError` where transformers does not know the architecture or cannot build it.
    """
    with _quiet():
        config = _load_config(folder, trust_remote_code)
        model = _build(folder, config, trust_remote_code)
    return _describe(model)


@contextmanager
def _quiet() -> Iterator[None]:
    import warnings

    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


class _LargeOnMeta(TorchFunctionMode):
    """Tensors too large for a buffer are never allocated, not even for a moment.

    `init_empty_weights` moves a parameter to meta after it was made, and one layer's experts can
    be larger than the memory.
    """

    FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.full)
    LARGE = 1 << 24
    """Elements; what is smaller may be a buffer, whose values a model computes with."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func in self.FACTORIES and options.get("device") is None:
            size = options.get("size", args[0] if args and _is_shape(args[0]) else args)
            if _is_shape(size) and math.prod(size) > self.LARGE:
                options["device"] = "meta"
        if func is torch.arange and _is_shape(args) and max(args, default=0) > self.LARGE:
            options["device"] = "meta"
        return func(*args, **options)


def _is_shape(value: object) -> bool:
    return isinstance(value, tuple | list) and all(isinstance(size, int) for size in value)


def _load_config(folder: Path, trust_remote_code: bool) -> Any:
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        cause = _first_line(error)
        if "trust_remote_code" in str(error):
            cause = "it needs the checkpoint's own code; pass --trust-remote-code if you trust it"
        raise ModelError(
            f"{folder / 'config.json'}: transformers {transformers.__version__} cannot read it: "
            f"{cause}"
        ) from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:240]


def _build(folder: Path, config: Any, trust_remote_code: bool) -> Any:
    import transformers
    from accelerate import init_empty_weights

    name, factory = _factory(config, trust_remote_code)
    try:
        with _LargeOnMeta(), init_empty_weights(include_buffers=False):
            return factory(config)
    except Exception as error:
        raise ModelError(
            f"{folder / 'config.json'}: transformers {transformers.__version__} cannot build "
            f"{name}: {_first_line(error)}"
        ) from error


def _factory(config: Any, trust_remote_code: bool) -> tuple[str, Any]:
    """What builds the model: the class that the config names, or the Auto class that fits."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    names = [name for name in _as_list(config.architectures) if isinstance(name, str)]
    for name in names:
        model_class: Any = getattr(transformers, name, None)
        if _is_model_class(model_class):
            return name, model_class._from_config
    candidates = (
        (auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, auto.AutoModelForImageTextToText),
        (auto.MODEL_FOR_CAUSAL_LM_MAPPING, auto.AutoModelForCausalLM),
        (auto.MODEL_MAPPING, auto.AutoModel),
    )
    for mapping, auto_class in candidates:
        if type(config) in mapping:
            return auto_class.__name__, auto_class.from_config
    name = ", ".join(names) or str(config.model_type)
    if trust_remote_code:
        return name, partial(auto.AutoModelForCausalLM.from_config, trust_remote_code=True)
    raise ModelError(
        f"{name}: transformers {transformers.__version__} has no such model. If the checkpoint "
        "brings its own code and you trust it, pass --trust-remote-code."
    )


def _is_model_class(value: object) -> bool:
    from transformers import PreTrainedModel

    return isinstance(value, type) and issubclass(value, PreTrainedModel)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _describe(model: Any) -> ModuleTree:
    from transformers.conversion_mapping import get_model_conversion_mapping

    modules = dict(model.named_modules())
    experts, unknown = _experts(modules)
    text_config = model.config.get_text_config()
    return ModuleTree(
        model_types=tuple(dict.fromkeys((model.config.model_type, text_config.model_type))),
        architecture=type(model).__name__,
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
            and role_of_linear(path, [type(module).__name__]) is Role.ROUTER
        ),
        parameters={name: tuple(value.shape) for name, value in model.named_parameters()},
        buffers=frozenset(model.state_dict()) - {name for name, _ in model.named_parameters()},
        tied=_tied(model),
        layers=_layers(model, modules),
        num_hidden_layers=int(getattr(text_config, "num_hidden_layers", 0)),
        conversion=Conversion(model, get_model_conversion_mapping(model)),
    )


def _linears(model: Any, modules: Mapping[str, Any]) -> dict[str, LinearModule]:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = {}
    for path, module in modules.items():
        if isinstance(module, nn.Linear):
            is_head = module is head or path.rpartition(".")[2] == "lm_head"
            own = [] if type(module) is nn.Linear else [type(module).__name__]
            classes = own + _enclosing(path, modules)
            role = Role.LM_HEAD if is_head else role_of_linear(path, classes)
            found[path] = LinearModule(path, module.out_features, module.in_features, role)
    return found


def _enclosing(path: str, modules: Mapping[str, Any]) -> list[str]:
    """Class names of the modules around `path`, from the inside out, the model itself left out."""
    names = []
    while "." in path:
        path = path.rpartition(".")[0]
        names.append(type(modules[path]).__name__)
    return names


def _experts(modules: Mapping[str, Any]) -> tuple[dict[str, ExpertsModule], dict[str, str]]:
    known: dict[str, ExpertsModule] = {}
    unknown: dict[str, str] = {}
    for path, module in modules.items():
        name = type(module).__name__
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
        elif name in UNDECORATED:
            parts = UNDECORATED[name]
        else:
            unknown[path] = name
            continue
        if all(isinstance(getattr(module, part.parameter, None), nn.Parameter) for part in parts):
            known[path] = ExpertsModule(path, name, _num_experts(module, parts), parts)
        else:
            unknown[path] = name
    return known, unknown


def _num_experts(module: Any, parts: Sequence[Part]) -> int:
    """How many experts have weights (LongCat's zero experts have none, but rows in one tensor)."""
    values = [getattr(module, part.parameter) for part in parts if not part.is_bias]
    counts = [value.shape[0] for value in values if value.ndim == 3]
    return int(min(counts)) if counts else int(module.moe_num_experts)


def _tied(model: Any) -> frozenset[str]:
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False) and not getattr(
        model.config, "tie_word_embeddings", False
    ):
        return frozenset()
    keys = getattr(model, "_tied_weights_keys", None) or {}
    return frozenset(keys)


def _layers(model: Any, modules: Mapping[str, Any]) -> tuple[str, ...]:
    """Decoder layers: elements of module lists whose class transformers never splits."""
    classes = set(model._no_split_modules or ())
    found = []
    for path, module in modules.items():
        if isinstance(module, nn.ModuleList) and role_of_linear(path, []) is not Role.VISION:
            names = _enclosing(f"{path}.0", modules)
            if any(re.search(r"Vision|Audio", name) for name in names):
                continue
            found += [
                f"{path}.{index}" for index, layer in enumerate(module)
                if type(layer).__name__ in classes
            ]  # fmt: skip
    return tuple(found)
