"""The one file on transformers' internals: build a model, place raw keys, load, watch experts.

transformers builds the model with parameters on the meta device (`build_model`). Its conversion
rules say which raw keys become which parameter (`Conversion.place`); its conversion operations,
run on small integer tensors, say where each part lies (`Conversion.convert`), and, run on the
real ones, fill the parameters of one layer at a time (`load_tensors`). Its experts interface lets
a function of ours run in place of an experts module's forward (`experts_function`). At the end:
what a model that is live in memory is asked.

Internals used: `PreTrainedModel._from_config`, `_no_split_modules`, `_tied_weights_keys`,
`_get_dtype_plan`, `config._experts_implementation_internal`, `ALL_EXPERTS_FUNCTIONS`,
`get_model_conversion_mapping`, `rename_source_key`, `WeightConverter.convert`,
`convert_and_load_state_dict_in_model`, `revert_weight_conversion` and `_weight_conversions`,
accelerate's `module._hf_hook.weights_map`. `tests/test_internals.py` fails first where one changes.
"""

from __future__ import annotations

import itertools
import json
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


def runnable(model: Any) -> Any:
    """What to call with a text: the model, or a part that has a forward (Qwen3-Omni's thinker)."""
    if type(model).forward is not nn.Module.forward:
        return model
    parts = [part for part in model.children() if hasattr(part, "get_input_embeddings")]
    if not parts:
        raise ModelError(f"{type(model).__name__}: has no forward, and no part that has one.")
    return parts[0]


def embedding_shape(model: Any) -> tuple[int, int]:
    """How many token ids the model knows, and how wide they are; zeros where it does not tell."""
    try:
        rows, columns = runnable(model).get_input_embeddings().weight.shape
    except (AttributeError, NotImplementedError, ModelError, ValueError):
        return 0, 0
    return int(rows), int(columns)


def output_embeddings(model: Any) -> nn.Module | None:
    """The layer that makes logits; None where a model has none, or does not tell."""
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return head if isinstance(head, nn.Module) else None


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


_NUMBERS = itertools.count()


@contextmanager
def experts_function(
    modules: Iterable[nn.Module], make: Callable[[ExpertsFunction, str], ExpertsFunction]
) -> Iterator[None]:
    """Within, `make(default, kind)` runs in place of each module's forward.

    `default` is what ran before, and `kind` its name (`experts_kind`). modules: those that have a
    kind. Everything is as before afterwards.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    configs: dict[int, Any] = {id(module.config): module.config for module in modules}
    before = {key: config._experts_implementation_internal for key, config in configs.items()}
    names = {kind: f"fourfold:{_origin(kind)}:{next(_NUMBERS)}" for kind in before.values()}
    try:
        for kind, name in names.items():
            ALL_EXPERTS_FUNCTIONS[name] = make(ALL_EXPERTS_FUNCTIONS[kind], _origin(kind))
        for key, config in configs.items():
            config._experts_implementation_internal = names[before[key]]
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation_internal = before[key]
        for name in names.values():
            if name in ALL_EXPERTS_FUNCTIONS:
                del ALL_EXPERTS_FUNCTIONS[name]


ROW_KINDS = ("grouped_mm", "batched_mm")
"""Implementations whose rows are known: sorted by expert, or as they are routed."""


def experts_kind(module: Any) -> str | None:
    """Which registered implementation runs as this experts module's forward.

    None for classes that transformers does not decorate, and for models that only know `eager`.
    """
    if not hasattr(module, "is_transposed"):
        return None
    kind = _origin(str(getattr(module.config, "_experts_implementation", None)))
    return kind if kind in ROW_KINDS else None


def _origin(kind: str) -> str:
    """What a function of ours stands in for; two may stand one behind the other."""
    return kind.split(":")[1] if kind.startswith("fourfold:") else kind


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


# A model that is live in memory: its blueprint, its raw names, what accelerate put elsewhere.


def plain_class(module: Any) -> type:
    """A module's class, without the subclass that FSDP2 makes of it on the fly."""
    return next(each for each in type(module).__mro__ if not each.__name__.startswith("FSDP"))


def blueprint_of(model: Any) -> Any:
    """The architecture of a live model once more, on the meta device, from its configuration."""
    from accelerate import init_empty_weights

    model_class: Any = plain_class(model)
    try:
        with quiet(), _LargeOnMeta(), init_empty_weights(include_buffers=False):
            return model_class._from_config(deepcopy(model.config)).eval()
    except Exception as error:
        raise ModelError(
            f"{model_class.__name__}: its configuration does not build it again: "
            f"{_first_line(error)}"
        ) from error


def raw_tensors(model: Any, blueprint: Any, *, fused: bool) -> Iterator[dict[str, torch.Tensor]]:
    """A live model's tensors on meta, as transformers thinks they lie on disk; guesses, best first.

    What `from_pretrained` saw on disk comes first. For a model that was not loaded from disk,
    `fused` says that the family's checkpoints do not hold one tensor per expert.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    seen = getattr(model, "_weight_conversions", None)
    if seen is not None:
        yield _reversed(model, blueprint, seen)
    known = get_model_conversion_mapping(blueprint, add_legacy=False)
    yield _reversed(
        model,
        blueprint,
        [
            rule
            for rule in known
            if not isinstance(rule, PrefixChange) and not (fused and _merges_experts(rule))
        ],
    )


def _reversed(model: Any, blueprint: Any, rules: Sequence[Any]) -> dict[str, torch.Tensor]:
    """The tensors on disk that `rules` made a model of; nothing where there is no way back."""
    from transformers.core_model_loading import revert_weight_conversion

    tied = getattr(model, "all_tied_weights_keys", None) or {}
    empty = {
        name: torch.empty(value.shape, dtype=value.dtype, device="meta")
        for name, value in model.state_dict().items()
        if name not in tied
    }
    blueprint._weight_conversions = list(rules)
    try:
        with quiet():
            return dict(revert_weight_conversion(blueprint, empty))
    except Exception:  # whatever an operation of transformers, or of a quantizer's, may raise
        return {}


def _merges_experts(rule: Any) -> bool:
    return any(re.search(r"experts\.\*\.", pattern) for pattern in rule.source_patterns)


def offloaded_value(model: Any, name: str) -> torch.Tensor | None:
    """The value of a parameter that accelerate offloaded (to disk); None where no hook has it."""
    path = name
    while path:
        path = path.rpartition(".")[0]
        hook = getattr(model.get_submodule(path), "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            values = getattr(each, "weights_map", None) or {}
            try:  # `in` would read the value
                value: torch.Tensor = values[name.removeprefix(f"{path}.")]
            except KeyError:
                continue
            return value
    return None


def saved_config(model: Any) -> dict[str, Any]:
    """What config.json says of a live model: as transformers saves it, with upstream's names, too.

    transformers 5 renamed fields (`num_experts` → `num_local_experts`, `rope_theta` and
    `rope_scaling` → `rope_parameters`); a reader of either kind finds what it looks for.
    """
    config = deepcopy(model.config)
    config.architectures = [plain_class(model).__name__]
    config.dtype = model.dtype
    saved: dict[str, Any] = json.loads(config.to_json_string())
    _add_older_names(saved, config)
    return saved


def _add_older_names(saved: dict[str, Any], config: Any) -> None:
    for name in config.sub_configs:
        if isinstance(saved.get(name), dict):
            _add_older_names(saved[name], getattr(config, name))
    for older, name in config.attribute_map.items():
        if name in saved:
            saved.setdefault(older, saved[name])
    rope = saved.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        saved.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
            saved.setdefault("rope_scaling", scaling)
