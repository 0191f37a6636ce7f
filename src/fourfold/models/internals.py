"""The one file on transformers' internals: build a model, place raw keys, load, watch experts.

transformers builds the model with parameters on the meta device (`build_model`). Its conversion
rules say which raw keys become which parameter (`Conversion.place`); its conversion operations,
run on small integer tensors, say where each part lies (`Conversion.convert`), and, run on the
real ones, fill the parameters of one layer at a time (`load_tensors`). Its experts interface lets
a function of ours run in place of an experts module's forward (`experts_function`).

Internals used: `PreTrainedModel._from_config`, `_no_split_modules`, `_tied_weights_keys`,
`_get_dtype_plan`, `config._experts_implementation_internal`, `ALL_EXPERTS_FUNCTIONS`,
`get_model_conversion_mapping`, `rename_source_key`, `WeightConverter.convert`,
`convert_and_load_state_dict_in_model`. `tests/test_internals.py` fails first where one changes.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

EXPERT_NUMBER = re.compile(r"(?<=\.experts\.)[0-9]{1,9}(?=\.)")


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


def build_model(
    folder: Path, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> Any:
    """The model of the checkpoint in `folder`, from its config.json; no weight is read.

    Its parameters are on the meta device, its buffers are real, and it is in evaluation mode.
    dtype: of the parameters; the config's own by default. Raises `ModelError` where transformers
    does not know the architecture or cannot build it.
    """
    with quiet():
        config = _load_config(folder, trust_remote_code)
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
        if dtype is not None:
            config.dtype = dtype
        return _build(folder, config, trust_remote_code).eval()


def conversion_of(model: Any) -> Conversion:
    """transformers' rules from raw keys to the parameters of `model`."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return Conversion(model, get_model_conversion_mapping(model))


def unsplit_classes(model: Any) -> frozenset[str]:
    """Names of the classes that transformers never splits over devices: the decoder layers'."""
    return frozenset(model._no_split_modules or ())


def tied_parameters(model: Any) -> frozenset[str]:
    """Parameters that share another one's storage and need no key of their own."""
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False) and not getattr(
        model.config, "tie_word_embeddings", False
    ):
        return frozenset()
    return frozenset(getattr(model, "_tied_weights_keys", None) or {})


def load_tensors(
    conversion: Conversion,
    tensors: Mapping[str, LazyTensor],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Fill the parameters that the raw `tensors` become, through transformers' own conversion.

    The tensors of a parameter must come together; other parameters stay as they are, so a model
    can be filled part by part. Raises `ModelError`, naming a key, where one does not fit.
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
        f"{key}: shape {tuple(found)}, the architecture says {tuple(wanted)}"
        for key, found, wanted in report.mismatched_keys
    ]
    problems += [f"{key}: the model has no place for it" for key in report.unexpected_keys]
    if problems:
        raise ModelError(f"{_first_line(Exception(min(problems)))} ({len(problems)} such)")


class LazyTensor:
    """Stands in a state dict for a tensor that is read when transformers asks for it."""

    def __init__(self, read: Callable[[], torch.Tensor]) -> None:
        self._read = read

    def __getitem__(self, _: Any) -> torch.Tensor:
        return self._read()


ExpertsFunction = Callable[..., torch.Tensor]
"""An experts module's forward: (module, hidden [T, H], top_k_index, top_k_weights) → [T, H]."""


@contextmanager
def experts_function(
    modules: Iterable[nn.Module], make: Callable[[ExpertsFunction], ExpertsFunction]
) -> Iterator[None]:
    """Within, `make(default)` runs in place of each module's forward; `default` is what ran before.

    modules: those for which `has_experts_interface` holds. Everything is as before afterwards.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    configs: dict[int, Any] = {id(module.config): module.config for module in modules}
    before = {key: config._experts_implementation_internal for key, config in configs.items()}
    names = {kind: f"fourfold:{kind}" for kind in set(before.values())}
    try:
        for kind, name in names.items():
            ALL_EXPERTS_FUNCTIONS[name] = make(ALL_EXPERTS_FUNCTIONS[kind])
        for key, config in configs.items():
            config._experts_implementation_internal = names[before[key]]
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation_internal = before[key]
        for name in names.values():
            if name in ALL_EXPERTS_FUNCTIONS:
                del ALL_EXPERTS_FUNCTIONS[name]


def has_experts_interface(module: Any) -> bool:
    """Whether a function can run in place of this experts module's forward.

    So it is for classes that transformers decorates, where the implementation is a registered one
    (the default is `grouped_mm`); models that only know `eager` have none.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    config = getattr(module, "config", None)
    return (
        hasattr(module, "is_transposed")
        and getattr(config, "_experts_implementation", None) in ALL_EXPERTS_FUNCTIONS
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' log lines, progress bars and warnings: what matters is raised."""
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
