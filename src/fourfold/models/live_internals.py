# SPDX-License-Identifier: Apache-2.0
"""transformers' and accelerate's internals that a model in memory is asked through.

A live model's tensors are presented as they would lie on disk: transformers reverts its own
conversion (`revert_weight_conversion`) on a second instance of the architecture, built from the
model's configuration on the meta device (`blueprint_of`).

Internals used: `revert_weight_conversion`, `_weight_conversions`, `all_tied_weights_keys`,
`PrefixChange`, and accelerate's `module._hf_hook.weights_map`. `tests/test_internals.py` pins them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch

from fourfold.errors import ModelError
from fourfold.models.internals import LargeOnMeta, one_line, plain_class, quiet


def blueprint_of(model: Any) -> Any:
    """Build the architecture of a live model again, on the meta device, from its configuration.

    Raises:
        ModelError: if the configuration does not build the model's class.
    """
    from accelerate import init_empty_weights

    model_class: Any = plain_class(model)
    try:
        with quiet(), LargeOnMeta(), init_empty_weights(include_buffers=False):
            return model_class._from_config(deepcopy(model.config)).eval()
    except Exception as error:
        raise ModelError(
            f"{model_class.__name__}: its configuration does not build it again: {one_line(error)}"
        ) from error


def raw_tensors(model: Any, blueprint: Any, *, fused: bool) -> Iterator[dict[str, torch.Tensor]]:
    """Yield guesses of a live model's tensors on disk (on the meta device), the best first.

    Args:
        model: the live model. The layout that `from_pretrained` read comes first.
        blueprint: the same architecture on the meta device; its conversion rules are changed.
        fused: for a model that was not loaded from disk, whether the family's checkpoints hold
            stacked experts, not one tensor per expert.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    loaded_with = getattr(model, "_weight_conversions", None)
    if loaded_with is not None:
        yield _reversed(model, blueprint, loaded_with)
    known = get_model_conversion_mapping(blueprint, add_legacy=False)
    splits = [rule for rule in known if not (fused and _merges(rule))]
    kept = [rule for rule in splits if not isinstance(rule, PrefixChange)]
    yield _reversed(model, blueprint, kept)


def _reversed(model: Any, blueprint: Any, rules: Sequence[Any]) -> dict[str, torch.Tensor]:
    """The tensors on disk that `rules` turn into the model; empty if they cannot be reverted."""
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
    except Exception:  # an operation of transformers or of a quantizer may raise anything
        return {}


def _merges(rule: Any) -> bool:
    return any(re.search(r"experts\.\*\.", pattern) for pattern in rule.source_patterns)


def offloaded_value(model: Any, name: str) -> torch.Tensor | None:
    """Return the value of a parameter that accelerate offloaded, or None if no hook has it."""
    path = name
    while path:
        path = path.rpartition(".")[0]
        hook = getattr(model.get_submodule(path), "_hf_hook", None)
        for single_hook in getattr(hook, "hooks", (hook,)):
            values = getattr(single_hook, "weights_map", None) or {}
            try:  # `in` would read the value
                value: torch.Tensor = values[name.removeprefix(f"{path}.")]
            except KeyError:
                continue
            return value
    return None


def saved_config(model: Any) -> dict[str, Any]:
    """Return the config.json of a live model: as transformers saves it, plus older field names.

    transformers 5 renamed fields (`num_experts` → `num_local_experts`, `rope_theta` and
    `rope_scaling` → `rope_parameters`). Both names are written, for readers of either kind.
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


def reversed_renaming(model: Any) -> Callable[[str], str]:
    """Return the function from a parameter's name to that of the tensor that is renamed to it."""
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [rule for rule in _known_rules(model) if isinstance(rule, WeightRenaming)]
    rules = [rule.reverse_transform() for rule in reversed(renamings)]
    return lambda name: str(rename_source_key(name, rules, [], reverse=True)[0])


def made_by_converters(model: Any) -> Callable[[str], bool]:
    """Return the function that tells whether a parameter is made by converting other tensors."""
    from transformers.core_model_loading import WeightConverter, rename_source_key

    converters = [rule for rule in _known_rules(model) if isinstance(rule, WeightConverter)]
    rules = [rule.reverse_transform() for rule in converters]
    return lambda name: rename_source_key(name, [], rules, reverse=True)[1] is not None


def _known_rules(model: Any) -> list[Any]:
    """The rules of a model's family, without those for names of old and for whole prefixes."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    known = get_model_conversion_mapping(model, add_legacy=False)
    return [rule for rule in known if not isinstance(rule, PrefixChange)]
