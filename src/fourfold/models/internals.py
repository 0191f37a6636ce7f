# SPDX-License-Identifier: Apache-2.0
"""transformers' internals: build a model, place raw keys, load tensors, replace experts' forward.

transformers builds the model with parameters on the meta device (`build_model`). Its conversion
rules say which raw keys become which parameter (`Conversion.place`). Its conversion operations,
run on small integer tensors, say where each part lies (`Conversion.convert`); run on the real
tensors, they fill the parameters of one layer at a time (`load_tensors`). Its experts interface
lets a function of ours run in place of an experts module's forward (`experts_function`).

Internals used: `PreTrainedModel._from_config`, `_no_split_modules`, `_tied_weights_keys`,
`get_expanded_tied_weights_keys`, `CONFIG_MAPPING`,
`_get_dtype_plan`, `config._experts_implementation_internal`, `ALL_EXPERTS_FUNCTIONS`,
`get_model_conversion_mapping`, `rename_source_key`, `WeightConverter.convert`,
`convert_and_load_state_dict_in_model`. Those that models in memory need are in `live_internals`.
`tests/test_internals.py` pins them all, so that it fails first when one changes.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fourfold.errors import ModelError
from fourfold.models.names import EXPERT_NUMBER
from fourfold.storage.json_files import read_config


@dataclass(frozen=True, slots=True)
class Place:
    """The parameter or buffer in memory that a raw key becomes; `target` is None if none."""

    key: str
    target: str | None
    pattern: str | None = None
    """The conversion's source pattern that the key matched; None for a plain rename."""


@dataclass(frozen=True)
class Conversion:
    """transformers' rules that map raw keys to the parameters of one model."""

    model: Any
    rules: Sequence[Any]
    _cache: dict[str, tuple[str | None, str | None]] = field(default_factory=dict)

    @cached_property
    def _state(self) -> dict[str, Any]:
        return dict(self.model.state_dict())

    @cached_property
    def _by_kind(self) -> tuple[list[Any], list[Any]]:
        """The rules that only rename a key, and those that convert its tensor."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        renamings = [rule for rule in self.rules if isinstance(rule, WeightRenaming)]
        return renamings, [rule for rule in self.rules if isinstance(rule, WeightConverter)]

    @cached_property
    def _by_pattern(self) -> dict[str, Any]:
        return {pattern: rule for rule in self._by_kind[1] for pattern in rule.source_patterns}

    def place(self, key: str) -> Place:
        """Return the place of a raw key. It is found once for all experts of a layer."""
        probe = EXPERT_NUMBER.sub("0", key)
        if probe not in self._cache:
            self._cache[probe] = self._place(probe)
        target, pattern = self._cache[probe]
        if target is not None and pattern is None and probe != key:
            numbers = iter(EXPERT_NUMBER.findall(key))
            target = EXPERT_NUMBER.sub(lambda number: next(numbers, number.group()), target)
        return Place(key, target, pattern)

    def _place(self, key: str) -> tuple[str | None, str | None]:
        from transformers.core_model_loading import rename_source_key

        prefix = self.model.base_model_prefix
        target, pattern = rename_source_key(key, *self._by_kind, prefix, self._state)
        if target not in self._state and key in self._state:
            target, pattern = rename_source_key(key, [], [], prefix, self._state)
        return (target, pattern) if target in self._state else (None, None)

    def targets(self, place: Place) -> list[str]:
        """Return every parameter that this key's conversion produces."""
        if place.target is None:
            return []
        if place.pattern is None:
            return [place.target]
        patterns = self._by_pattern[place.pattern].target_patterns
        names = [place.target.replace(patterns[0], pattern) for pattern in patterns]
        return [name for name in names if name in self._state] or [place.target]

    def rule_of(self, place: Place) -> object:
        """Return the rule that converts the tensor at a place; None for a plain rename."""
        return None if place.pattern is None else self._by_pattern[place.pattern]

    def is_ambiguous(self, pattern: str, shape: Sequence[int]) -> bool:
        """True if an operation tells two layouts apart by a shape that both of them have."""
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
        """Run a conversion on stand-ins for the raw tensors; return the parameters by name.

        Args:
            target: a parameter that the conversion produces.
            pattern: a source pattern of the conversion.
            tensors: the stand-ins, in lists by source pattern.
            shapes: the shapes of the parameters in memory, at the scale of the stand-ins.

        Raises:
            ModelError: if the conversion fails on these tensors.
        """
        rule = deepcopy(self._by_pattern[pattern])
        for source_pattern, group in tensors.items():
            rule.collected_tensors[source_pattern] = list(group)
        stand_in = SimpleNamespace(
            get_parameter=lambda name: torch.empty(tuple(shapes[name]), device="meta")
        )
        try:
            result = rule.convert(target, model=stand_in, config=self.model.config)
        except Exception as error:  # whatever an operation of transformers may raise
            raise ModelError(f"{target}: its conversion {rule} fails: {error}") from error
        return {
            name: value[0] if isinstance(value, list) else value for name, value in result.items()
        }


def build_model(
    folder: Path, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> Any:
    """Build the model of the checkpoint in `folder` from its config.json; no weight is read.

    Returns:
        The model in evaluation mode: its parameters on the meta device, in `dtype` or in that of
        the configuration, its buffers real.

    Raises:
        ModelError: if transformers does not know the architecture or cannot build it.
    """
    import transformers
    from accelerate import init_empty_weights

    with quiet():
        config = _load_config(folder, trust_remote_code)
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
        if dtype is not None:
            config.dtype = dtype
        name, factory = _factory(config, trust_remote_code)
        try:
            with LargeOnMeta(), init_empty_weights(include_buffers=False):
                return factory(config).eval()
        except Exception as error:
            raise ModelError(
                f"{folder / 'config.json'}: transformers {transformers.__version__} cannot build "
                f"{name}: {one_line(error)}"
            ) from error


def conversion_of(model: Any) -> Conversion:
    """Return transformers' rules that map raw keys to the parameters of `model`."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return Conversion(model, get_model_conversion_mapping(model))


def unsplit_classes(model: Any) -> frozenset[str]:
    """Return the class names that transformers never splits over devices: decoder layers."""
    return frozenset(model._no_split_modules or ())


def runnable(model: Any) -> Any:
    """Return the module to call with a text: the model, or its first part with a forward.

    Qwen3-Omni as a whole has none; its thinker has.
    """
    if type(model).forward is not nn.Module.forward:
        return model
    parts = [part for part in model.children() if hasattr(part, "get_input_embeddings")]
    if not parts:
        raise ModelError(f"{type(model).__name__}: neither it nor any part of it has a forward.")
    return parts[0]


def embedding_shape(model: Any) -> tuple[int, int]:
    """Return the vocabulary size and hidden size, or zeros if the model has no embedding."""
    try:
        rows, columns = runnable(model).get_input_embeddings().weight.shape
    except (AttributeError, NotImplementedError, ModelError, ValueError):
        return 0, 0
    return int(rows), int(columns)


def output_embeddings(model: Any) -> nn.Module | None:
    """Return the layer that computes the logits, or None if the model does not say."""
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return head if isinstance(head, nn.Module) else None


def tied_parameters(model: Any) -> frozenset[str]:
    """Return the parameters that share another one's storage and need no key of their own."""
    configs = model.config.get_text_config(), model.config
    is_tied = any(getattr(config, "tie_word_embeddings", False) for config in configs)
    return frozenset(getattr(model, "_tied_weights_keys", None) or ()) if is_tied else frozenset()


def ties_between(model: Any) -> Mapping[str, str]:
    """Return the parameter that each tied one computes with, should the configuration tie any."""
    keys = getattr(model, "_tied_weights_keys", None)
    if not isinstance(keys, dict | None):
        return {}  # a list, in custom code for transformers 4
    return dict(model.get_expanded_tied_weights_keys(all_submodels=True) or keys or {})


def default_of(model_type: object, field: str) -> object:
    """Return the value of a field that a config.json of `model_type` lacks; None if unknown."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    return getattr(CONFIG_MAPPING[model_type], field, None) if known else None


def load_tensors(
    conversion: Conversion,
    tensors: Mapping[str, LazyTensor],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Fill the parameters that the raw `tensors` become, through transformers' own conversion.

    Parameters of other tensors keep their values, so a model can be filled part by part.

    Args:
        conversion: the model and its rules.
        tensors: raw tensors by key; all those of one parameter must come in one call.
        device: device of the parameters.
        dtype: dtype of the parameters, except for those that transformers keeps in float32.

    Raises:
        ModelError: if a tensor does not fit; the message names its key.
    """
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    model = conversion.model
    config = LoadStateDictConfig(
        weight_mapping=list(conversion.rules),
        device_map={"": device},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
    )
    with quiet():
        report, _ = convert_and_load_state_dict_in_model(model, dict(tensors), config)
    problems = [f"{key}: {text}" for key, text in report.conversion_errors.items()]
    problems += [
        f"{key}: shape {tuple(shape)}, the architecture says {tuple(expected)}"
        for key, shape, expected in report.mismatched_keys
    ]
    problems += [f"{key}: the model has no place for it" for key in report.unexpected_keys]
    if problems:
        raise ModelError(f"{one_line(Exception(min(problems)))} ({len(problems)} such)")


@dataclass(frozen=True)
class LazyTensor:
    """Stands in a state dict for a tensor that is read only when transformers indexes it."""

    read: Callable[[], torch.Tensor]

    def __getitem__(self, _: Any) -> torch.Tensor:
        return self.read()


ExpertsFunction = Callable[..., torch.Tensor]
"""An experts module's forward: (module, hidden [T, H], top_k_index, top_k_weights) → [T, H]."""


_NUMBERS = itertools.count()


@contextmanager
def experts_function(
    modules: Iterable[nn.Module], make: Callable[[ExpertsFunction, str], ExpertsFunction]
) -> Iterator[None]:
    """Run `make(default, kind)` in place of each module's forward inside the context.

    Args:
        modules: experts modules for which `experts_kind` is not None.
        make: called with the implementation that ran before and its name (`experts_kind`);
            returns the one to run.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    configs: Iterable[Any] = {id(module.config): module.config for module in modules}.values()
    before = [(config, config._experts_implementation_internal) for config in configs]
    names = {kind: f"fourfold:{_origin(kind)}:{next(_NUMBERS)}" for _, kind in before}
    for kind, name in names.items():
        ALL_EXPERTS_FUNCTIONS[name] = make(ALL_EXPERTS_FUNCTIONS[kind], _origin(kind))
    try:
        for config, kind in before:
            config._experts_implementation_internal = names[kind]
        yield
    finally:
        for config, kind in before:
            config._experts_implementation_internal = kind
        for name in names.values():
            del ALL_EXPERTS_FUNCTIONS[name]


ROW_KINDS = ("grouped_mm", "batched_mm")
"""Implementations whose order of rows is known: sorted by expert, or as routed."""


def experts_kind(module: Any) -> str | None:
    """Return which of `ROW_KINDS` runs as this experts module's forward.

    None for classes that transformers does not decorate, and for models that have the eager
    forward only.
    """
    if not hasattr(module, "is_transposed"):
        return None
    kind = _origin(str(getattr(module.config, "_experts_implementation", None)))
    return kind if kind in ROW_KINDS else None


def _origin(kind: str) -> str:
    """The kind that a function of ours replaced; one may have replaced another of ours."""
    return kind.split(":")[1] if kind.startswith("fourfold:") else kind


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' logging, progress bars and warnings inside the context."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


class LargeOnMeta(TorchFunctionMode):
    """Creates every tensor that is too large to be a buffer on the meta device.

    `init_empty_weights` moves a parameter to meta only after it was allocated, and the experts of
    one layer can be larger than the memory.
    """

    FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.full)
    LARGE = 1 << 24
    """Elements. A smaller tensor may be a buffer, whose values the model needs."""

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
        cause = one_line(error)
        if "trust_remote_code" in str(error):
            if (config := _config_of_architecture(folder)) is not None:
                return config
            cause = (
                "it needs the checkpoint's own code; pass `trust_remote_code=True` if you trust it"
            )
        raise ModelError(
            f"{folder / 'config.json'}: transformers {transformers.__version__} cannot read it: "
            f"{cause}"
        ) from error


def _config_of_architecture(folder: Path) -> Any:
    """The configuration of a model whose class transformers has under another model_type.

    Kimi K2, for instance, is a DeepseekV3ForCausalLM with a model_type and code of its own.
    """
    import transformers

    config = read_config(folder)
    names = [name for name in config.get("architectures") or () if isinstance(name, str)]
    model_class = getattr(transformers, names[0], None) if len(names) == 1 else None
    config_class = getattr(model_class, "config_class", None)
    if config_class is None:
        return None
    own = {name: value for name, value in config.items() if name not in {"model_type", "auto_map"}}
    return config_class.from_dict(own)


def one_line(error: BaseException) -> str:
    """Return an error's message on one line, for use in one of ours."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}…"


def _factory(config: Any, trust_remote_code: bool) -> tuple[str, Any]:
    """The class that the config names, or the Auto class that fits, and how it builds."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    stated = config.architectures if isinstance(config.architectures, list | tuple) else ()
    names = [name for name in stated if isinstance(name, str)]
    for name in names:
        model_class: Any = getattr(transformers, name, None)
        is_class = isinstance(model_class, type)
        if is_class and issubclass(model_class, transformers.PreTrainedModel):
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
        "brings its own code and you trust it, pass `trust_remote_code=True`."
    )


def plain_class(module: Any) -> type:
    """Return a module's class, without the subclass that FSDP2 makes of it at run time."""
    return next(base for base in type(module).__mro__ if not base.__name__.startswith("FSDP"))
