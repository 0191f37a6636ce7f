# SPDX-License-Identifier: Apache-2.0
"""The contract with transformers: everything that `models/*internals.py` takes for granted.

Names, signatures and behaviours, one by one, each with a word on what it is used for. Where
transformers changes, these tests fail before anything else and say what did.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
from collections.abc import Callable, Iterable, MutableMapping
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Transpose,
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import LoadStateDictConfig

from families import FAMILIES, build_model, quiet
from families.configs import tiny_config
from fourfold.errors import ModelError
from fourfold.models import internals, live_internals
from fourfold.models.internals import LazyTensor, conversion_of, load_tensors

CPU = torch.device("cpu")

NAMES = {
    "transformers": [
        "AutoConfig",
        "PreTrainedModel",
    ],
    "transformers.conversion_mapping": ["get_model_conversion_mapping"],
    "transformers.core_model_loading": [
        "PrefixChange",
        "WeightConverter",
        "WeightRenaming",
        "convert_and_load_state_dict_in_model",
        "rename_source_key",
        "revert_weight_conversion",
    ],
    "transformers.integrations.moe": ["ALL_EXPERTS_FUNCTIONS"],
    "transformers.modeling_utils": ["LoadStateDictConfig"],
    "transformers.models.auto.configuration_auto": ["CONFIG_MAPPING"],
    "transformers.models.auto.modeling_auto": [
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForImageTextToText",
        "MODEL_FOR_CAUSAL_LM_MAPPING",
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
        "MODEL_MAPPING",
    ],
    "transformers.utils.logging": [
        "disable_progress_bar",
        "enable_progress_bar",
        "get_verbosity",
        "is_progress_bar_enabled",
        "set_verbosity",
        "set_verbosity_error",
    ],
    "accelerate": ["init_empty_weights"],
}


def meta_model(name: str = "qwen3_moe", dtype: torch.dtype = torch.bfloat16) -> Any:
    """A family's model with parameters on meta."""
    model_class = getattr(transformers, FAMILIES[name].model_class)
    with quiet(), accelerate.init_empty_weights(include_buffers=False):
        return model_class._from_config(FAMILIES[name].build_config(), dtype=dtype)


def parameters_of(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


# --- names and signatures ---------------------------------------------------------------------


@pytest.mark.parametrize(("module", "names"), NAMES.items(), ids=NAMES)
def test_names(module: str, names: Iterable[str]) -> None:
    found = importlib.import_module(module)
    missing = [name for name in names if not hasattr(found, name)]
    assert missing == [], f"{module} of transformers {transformers.__version__} lost them"


def test_every_import_is_in_this_contract() -> None:
    """Both files import nothing of transformers or accelerate that is not listed above."""
    listed = {f"{module}.{name}" for module, names in NAMES.items() for name in names}
    listed |= {f"{module}.{name}" for module in NAMES for name in ("modeling_auto", "logging")}
    listed |= {"transformers.models.auto.modeling_auto", "transformers.utils.logging"}
    files = [Path(str(module.__file__)) for module in (internals, live_internals)]
    imported = set()
    for line in "\n".join(file.read_text(encoding="utf-8") for file in files).splitlines():
        words = line.split()
        if words[:1] == ["from"] and words[1].startswith(("transformers", "accelerate")):
            imported |= {f"{words[1]}.{name.strip(',')}" for name in words[3:] if name != "as"}
    aliases = {"transformers.models.auto.auto"}
    assert imported - aliases <= listed, "new ones belong into the contract"


SIGNATURES: list[tuple[Callable[..., Any], list[str], str]] = [
    (PreTrainedModel._from_config, ["config", "kwargs"], "builds every model"),
    (PreTrainedModel._get_dtype_plan, ["self", "dtype"], "what stays float32"),
    (get_model_conversion_mapping, ["model", "key_mapping", "hf_quantizer", "add_legacy"], "rules"),
    (
        rename_source_key,
        [
            "source_key",
            "weight_renamings",
            "weight_converters",
            "base_model_prefix",
            "meta_state_dict",
            "reverse",
        ],
        "places raw keys",
    ),
    (
        convert_and_load_state_dict_in_model,
        ["model", "state_dict", "load_config", "disk_offload_index"],
        "fills the parameters of a layer",
    ),
    (revert_weight_conversion, ["model", "state_dict"], "raw names of a live model"),
    (accelerate.init_empty_weights, ["include_buffers"], "parameters on meta"),
]


@pytest.mark.parametrize(
    ("function", "names", "why"), SIGNATURES, ids=[each[0].__name__ for each in SIGNATURES]
)
def test_signatures(function: Callable[..., Any], names: list[str], why: str) -> None:
    assert parameters_of(function) == names, f"{function.__name__} ({why}) takes other arguments"


def test_fields_of_the_loader_settings() -> None:
    fields = {each.name for each in dataclasses.fields(LoadStateDictConfig)}
    assert {"weight_mapping", "device_map", "dtype", "dtype_plan"} <= fields


# --- models and configurations ------------------------------------------------------------------


def test_a_model_is_built_on_meta_with_real_buffers() -> None:
    model = meta_model()
    assert all(parameter.is_meta for parameter in model.parameters())
    buffers = dict(model.named_buffers())
    assert buffers
    assert not any(buffer.is_meta for buffer in buffers.values())


def test_what_a_model_tells_of_itself() -> None:
    model = meta_model()
    assert model._no_split_modules, "the classes of decoder layers"
    assert type(model.model.layers[0]).__name__ in model._no_split_modules
    assert model.base_model_prefix == "model"
    assert isinstance(model._tied_weights_keys, dict | list), "tied parameters, without a key"
    assert "lm_head.weight" in model._tied_weights_keys
    assert not model.get_expanded_tied_weights_keys(all_submodels=True), "the config ties nothing"
    assert model.get_output_embeddings() is model.lm_head
    assert model.get_input_embeddings() is model.model.embed_tokens
    assert model.config.get_text_config() is model.config


def test_tied_weights_are_tied_again_when_asked() -> None:
    model = build_model(FAMILIES["qwen3_tied"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.model.embed_tokens.weight = nn.Parameter(torch.ones(128, 64))
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert set(model.all_tied_weights_keys) == {"lm_head.weight"}


def test_what_ties_to_what() -> None:
    ties = meta_model("qwen3_moe_tied").get_expanded_tied_weights_keys(all_submodels=True)
    assert ties == {"lm_head.weight": "model.embed_tokens.weight"}
    assert internals.default_of("cohere2_moe", "tie_word_embeddings") is True
    assert internals.default_of("qwen3_moe", "tie_word_embeddings") is False
    assert internals.default_of("nothing of the kind", "tie_word_embeddings") is None


def test_a_configuration_leads_to_its_text_model() -> None:
    config = tiny_config("qwen3_vl_moe")
    assert config.get_text_config() is config.text_config
    assert set(config.sub_configs) == {"text_config", "vision_config"}
    assert isinstance(config.attribute_map, dict)


def test_what_stays_in_float32() -> None:
    """Routers' correction biases, by part of the name; without the plan they would be cast."""
    plan = meta_model("deepseek_v3")._get_dtype_plan(torch.bfloat16)
    assert plan == {"e_score_correction_bias": torch.float32}


def test_classes_are_found_by_their_name_and_by_their_configuration() -> None:
    from transformers.models.auto import modeling_auto as auto

    assert issubclass(transformers.Qwen3MoeForCausalLM, PreTrainedModel)
    for model_type, mapping in (
        ("qwen3_moe", auto.MODEL_FOR_CAUSAL_LM_MAPPING),
        ("qwen3_vl_moe", auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
        ("qwen3_moe", auto.MODEL_MAPPING),
    ):
        assert type(tiny_config(model_type)) in mapping
    assert type(tiny_config("qwen3_moe")) not in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    for auto_class in (auto.AutoModel, auto.AutoModelForCausalLM, auto.AutoModelForImageTextToText):
        assert callable(auto_class.from_config)


def test_a_model_without_a_forward_has_torchs() -> None:
    """So is Qwen3-Omni told from models that can be called."""
    omni = transformers.Qwen3OmniMoeForConditionalGeneration
    assert omni.forward is nn.Module.forward
    assert transformers.Qwen3MoeForCausalLM.forward is not nn.Module.forward


def test_quiet_puts_everything_back() -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with internals.quiet():
        assert logging.get_verbosity() == logging.ERROR
        assert not logging.is_progress_bar_enabled()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_a_configuration_as_json_can_be_read_again(tmp_path: Path) -> None:
    config = tiny_config("qwen3_moe")
    config.architectures = ["Qwen3MoeForCausalLM"]
    (tmp_path / "config.json").write_text(config.to_json_string())
    again = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (type(again), again.architectures) == (type(config), config.architectures)
    assert again.num_experts == config.num_experts
    assert json.loads(config.to_json_string())["model_type"] == "qwen3_moe"


# --- conversion rules -------------------------------------------------------------------------


def rules(name: str, kind: type) -> list[Any]:
    return [
        rule for rule in get_model_conversion_mapping(meta_model(name)) if isinstance(rule, kind)
    ]


def test_rules_say_what_they_match_and_make() -> None:
    merge = rules("qwen3_moe", WeightConverter)
    assert [(rule.source_patterns, rule.target_patterns) for rule in merge] == [
        (
            ["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            ["mlp.experts.gate_up_proj"],
        ),
        (["mlp.experts.*.down_proj.weight"], ["mlp.experts.down_proj"]),
    ]
    assert all(rule.operations for rule in merge)
    assert all(isinstance(rule.collected_tensors, dict) for rule in merge)
    assert not issubclass(WeightConverter, WeightRenaming)
    assert rules("kimi_linear", WeightRenaming), "renamings are of a class of their own"


def test_every_pattern_of_a_model_is_of_one_converter() -> None:
    """`Conversion` finds the converter by its pattern."""
    patterns = [p for rule in rules("qwen3_moe", WeightConverter) for p in rule.source_patterns]
    assert len(patterns) == len(set(patterns))


def test_a_key_is_renamed_and_the_pattern_named() -> None:
    model = meta_model()
    converters = rules("qwen3_moe", WeightConverter)
    state = model.state_dict()
    key = "model.layers.2.mlp.experts.3.up_proj.weight"
    assert rename_source_key(key, [], converters, "model", state) == (
        "model.layers.2.mlp.experts.gate_up_proj",
        "mlp.experts.*.up_proj.weight",
    )
    plain = "layers.0.self_attn.q_proj.weight"
    assert rename_source_key(plain, [], converters, "model", state) == (f"model.{plain}", None)
    assert rename_source_key("nonsense", [], converters, "model", state) == ("nonsense", None)


def test_a_converter_runs_on_what_it_is_given() -> None:
    """Lists of tensors by source pattern go in, parameters by their full names come out."""
    converter = rules("qwen3_moe", WeightConverter)[0]
    for number, pattern in enumerate(converter.source_patterns):
        tensors = [torch.full((2, 3), 10 * number + expert) for expert in range(4)]
        converter.collected_tensors[pattern] = tensors
    target = "model.layers.2.mlp.experts.gate_up_proj"
    result = converter.convert(target, model=None, config=tiny_config("qwen3_moe"))
    assert set(result) == {target}
    value = result[target][0] if isinstance(result[target], list) else result[target]
    assert value.shape == (4, 4, 3)
    assert value[3, :, 0].tolist() == [3, 3, 13, 13]


def test_transposition_tells_where_it_guesses() -> None:
    """An operation may look at dimensions; `is_ambiguous` asks it for which."""
    operations = [
        operation
        for rule in rules("qwen3_vl_moe", WeightConverter)
        for operation in rule.operations
        if isinstance(operation, Transpose)
    ]
    assert operations
    assert all({"dim0", "dim1", "check_dims"} <= vars(each).keys() for each in operations)


# --- loading ------------------------------------------------------------------------------------


def lazily(tensors: dict[str, Tensor], read: list[str]) -> dict[str, LazyTensor]:
    def reader(key: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            read.append(key)
            return tensors[key]

        return run

    return {key: LazyTensor(reader(key)) for key in tensors}


def checkpoint(name: str, written: Any) -> dict[str, Tensor]:
    return written(name)[1].raw


def test_a_part_is_loaded_and_the_rest_stays(written: Any) -> None:
    """Lazy tensors are asked by `[...]` alone, once each."""
    model, read = meta_model("deepseek_v3"), []
    raw = {k: v for k, v in checkpoint("deepseek_v3", written).items() if ".layers.1." in k}
    load_tensors(conversion_of(model), lazily(raw, read), device=CPU, dtype=torch.bfloat16)
    assert sorted(read) == sorted(raw)
    real = {name for name, value in model.named_parameters() if not value.is_meta}
    assert real == {name for name, _ in model.named_parameters() if ".layers.1." in name}
    layer = model.model.layers[1]
    assert layer.mlp.gate.e_score_correction_bias.dtype is torch.float32
    assert layer.input_layernorm.weight.dtype is torch.bfloat16
    number = "model.layers.1.mlp.experts.2.down_proj.weight"
    assert torch.equal(layer.mlp.experts.down_proj[2], raw[number])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_parameters_get_the_dtype_that_the_model_was_built_in(
    dtype: torch.dtype, written: Any
) -> None:
    model = meta_model(dtype=dtype)
    raw = checkpoint("qwen3_moe", written)
    load_tensors(conversion_of(model), lazily(raw, []), device=CPU, dtype=dtype)
    assert {value.dtype for value in model.parameters()} == {dtype}


def test_a_part_can_be_loaded_again(written: Any) -> None:
    model = meta_model()
    raw = {k: v for k, v in checkpoint("qwen3_moe", written).items() if ".layers.1." in k}
    for factor in (1, 2):
        values = {key: value * factor for key, value in raw.items()}
        load_tensors(conversion_of(model), lazily(values, []), device=CPU, dtype=torch.bfloat16)
        for key in ("input_layernorm.weight", "self_attn.q_proj.weight"):
            found = model.get_parameter(f"model.layers.1.{key}")
            assert torch.equal(found, raw[f"model.layers.1.{key}"] * factor)


BAD = {
    "a shape": (
        lambda raw: raw | {"model.norm.weight": torch.ones(3)},
        r"model\.norm\.weight: shape \(3,\), the architecture says \(64,\)",
    ),
    "no place": (
        lambda raw: raw | {"model.nonsense.weight": torch.ones(3)},
        r"model\.nonsense\.weight: the model has no place for it",
    ),
    "experts of two shapes": (
        lambda raw: raw | {"model.layers.1.mlp.experts.0.up_proj.weight": torch.ones(3, 64)},
        r"model\.layers\.1\.mlp\.experts",
    ),
    "an expert that is missing": (
        lambda raw: {k: v for k, v in raw.items() if "layers.1.mlp.experts.0.up" not in k},
        r"model\.layers\.1\.mlp\.experts",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_the_report_tells_what_did_not_fit(what: str, written: Any) -> None:
    change, message = BAD[what]
    raw = change(dict(checkpoint("qwen3_moe", written)))
    with pytest.raises(ModelError, match=message):
        load_tensors(conversion_of(meta_model()), lazily(raw, []), device=CPU, dtype=torch.bfloat16)


def test_an_error_while_reading_is_not_lost(written: Any) -> None:
    raw = dict.fromkeys(checkpoint("qwen3_moe", written), LazyTensor(_cannot_read))
    with pytest.raises((OSError, ModelError), match="the disk is gone"):
        load_tensors(conversion_of(meta_model()), raw, device=CPU, dtype=torch.bfloat16)


def _cannot_read() -> Tensor:
    raise OSError("the disk is gone")


# --- experts --------------------------------------------------------------------------------------


FLAGS = {"has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm"}


def decorated(name: str) -> Any:
    model = build_model(FAMILIES[name], dtype=torch.float32)
    return next(module for module in model.modules() if hasattr(module, "is_transposed"))


def test_the_interface_is_a_mapping() -> None:
    assert isinstance(ALL_EXPERTS_FUNCTIONS, MutableMapping)
    assert set(internals.ROW_KINDS) <= set(ALL_EXPERTS_FUNCTIONS)
    count = len(ALL_EXPERTS_FUNCTIONS)
    ALL_EXPERTS_FUNCTIONS["of a test"] = len
    assert ALL_EXPERTS_FUNCTIONS["of a test"] is len
    assert len(ALL_EXPERTS_FUNCTIONS) == count + 1
    del ALL_EXPERTS_FUNCTIONS["of a test"]
    assert "of a test" not in ALL_EXPERTS_FUNCTIONS


@pytest.mark.parametrize("kind", internals.ROW_KINDS)
def test_arguments_of_an_implementation(kind: str) -> None:
    names = parameters_of(ALL_EXPERTS_FUNCTIONS[kind])
    assert names == ["self", "hidden_states", "top_k_index", "top_k_weights"]


def test_a_decorated_class_says_how_it_holds_its_experts() -> None:
    module = decorated("qwen3_moe")
    assert vars(module).keys() >= FLAGS
    assert module.num_experts == 4
    assert module.config._experts_implementation == "grouped_mm", "the default"
    assert callable(module._apply_gate)
    assert callable(module.act_fn)


def test_the_configuration_says_which_function_runs() -> None:
    """The internal name, at any time, is what the next call asks the interface for."""
    module, seen = decorated("qwen3_moe"), []
    assert isinstance(PreTrainedConfig._experts_implementation, property)

    def ours(self: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        seen.append((self, tuple(index.shape)))
        return hidden

    ALL_EXPERTS_FUNCTIONS["of a test"] = ours
    before = module.config._experts_implementation_internal
    try:
        module.config._experts_implementation_internal = "of a test"
        assert module.config._experts_implementation == "of a test"
        x = torch.ones(3, 64)
        assert module(x, torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)) is x
    finally:
        del ALL_EXPERTS_FUNCTIONS["of a test"]
        module.config._experts_implementation_internal = before
    assert seen == [(module, (3, 2))]


class Spy:
    """In place of an experts module: notes what the activation gives, row by row."""

    def __init__(self, module: Any) -> None:
        self.module, self.given = module, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def _apply_gate(self, x: Tensor) -> Tensor:
        self.given.append(self.module._apply_gate(x))
        return self.given[-1]

    def act_fn(self, x: Tensor) -> Tensor:
        self.given.append(self.module.act_fn(x))
        return self.given[-1]


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "aria", "nemotron_h", "muse_spark"])
@pytest.mark.parametrize("kind", internals.ROW_KINDS)
def test_a_stand_in_for_the_module_sees_the_activation_once(kind: str, name: str) -> None:
    """Its result is what the second product reads; rows are sorted by expert, or as routed."""
    module = decorated(name)
    spy, function = Spy(module), ALL_EXPERTS_FUNCTIONS[kind]
    width = module.down_proj.shape[2 if not module.is_transposed else 1]
    hidden = module.down_proj.shape[1 if not module.is_transposed else 2]
    x = torch.randn(5, hidden, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([[2, 0], [1, 3], [0, 1], [3, 2], [2, 1]])
    weights = torch.rand(5, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = function(spy, x, index, weights)
        assert torch.equal(out, function(module, x, index, weights))
    assert [each.shape for each in spy.given] == [(10, width)]
    every = {(e, t): _alone(function, module, x[t], e) for t in range(5) for e in range(4)}
    for given, pair in zip(spy.given[0], _rows(kind, index), strict=True):
        assert min(every, key=lambda each: float((every[each] - given).norm())) == pair


def _alone(function: Any, module: Any, x: Tensor, expert: int) -> Tensor:
    """What the activation gives for one token and one expert."""
    spy = Spy(module)
    with torch.no_grad():
        function(spy, x[None], torch.tensor([[expert]]), torch.ones(1, 1))
    return spy.given[0][0]


def _rows(kind: str, index: Tensor) -> list[tuple[int, int]]:
    """Expert and token of each row, in the order of an implementation."""
    pairs = [(e, t) for t, experts in enumerate(index.tolist()) for e in experts]
    return sorted(pairs) if kind == "grouped_mm" else pairs


@pytest.mark.parametrize("kind", internals.ROW_KINDS)
def test_what_the_activation_gives_is_used(kind: str) -> None:
    class Zero(Spy):
        def _apply_gate(self, x: Tensor) -> Tensor:
            return torch.zeros_like(self.module._apply_gate(x))

    module, x = decorated("qwen3_moe"), torch.randn(5, 64)
    index, weights = torch.tensor([[2, 0]] * 5), torch.ones(5, 2)
    with torch.no_grad():
        assert not ALL_EXPERTS_FUNCTIONS[kind](Zero(module), x, index, weights).any()


def test_rows_are_sorted_as_torch_sorts_them() -> None:
    """Which row is whose token is found by the same sort; ties must fall the same way."""
    source = inspect.getsource(ALL_EXPERTS_FUNCTIONS["grouped_mm"])
    assert "torch.sort(expert_ids)" in source
    assert "perm // num_top_k" in source
    index = torch.randint(0, 4, (4000,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.sort(index)[1], torch.sort(index.clone())[1])


# --- caches, and models that are offloaded -------------------------------------------------------


def test_what_a_cache_is_given() -> None:
    names = parameters_of(DynamicCache.update)
    assert names[:4] == ["self", "key_states", "value_states", "layer_idx"]
    for name in ("update_conv_state", "update_recurrent_state"):
        assert parameters_of(getattr(DynamicCache, name))[2] == "layer_idx"
    assert parameters_of(DynamicCache.update_indexer)[1:] == ["indexer_key_states", "layer_idx"]
    assert "config" in parameters_of(DynamicCache.__init__)


def test_accelerates_hook_knows_where_offloaded_values_are() -> None:
    module = nn.Module()
    module.inner = nn.Linear(2, 2)
    values = {"weight": torch.ones(2, 2)}
    hook = AlignDevicesHook(execution_device="cpu", offload=True, weights_map=values)
    add_hook_to_module(module.inner, SequentialHook(hook))
    assert live_internals.offloaded_value(module, "inner.weight") is values["weight"]
    assert live_internals.offloaded_value(module, "inner.bias") is None


def test_raw_tensors_come_back_from_a_loaded_model(written: Any) -> None:
    """`_weight_conversions` is what the loader saw, and can be undone."""
    folder, truth = written("qwen3_moe")
    with quiet():
        model = transformers.Qwen3MoeForCausalLM.from_pretrained(folder)
    assert model._weight_conversions
    found = next(
        iter(live_internals.raw_tensors(model, live_internals.blueprint_of(model), fused=False))
    )
    assert {key: value.shape for key, value in found.items()} == {
        key: value.shape for key, value in truth.raw.items()
    }
