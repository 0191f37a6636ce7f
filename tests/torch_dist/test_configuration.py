# SPDX-License-Identifier: Apache-2.0
"""A configuration is made from a checkpoint's arguments, or an error names the argument.

That what it says computes what Megatron computed is shown in `test_logits.py`.
"""

from __future__ import annotations

import enum
import json
import signal
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import fourfold
from fourfold import UsageError
from fourfold.config import Runtime
from fourfold.events import Resumed, ShardWritten
from fourfold.sources.megatron.arguments import DEFAULTS, OFF, Arguments
from fourfold.sources.megatron.configuration import REQUIRED, configuration_of
from jobs import flat, only, start_command

from .conftest import FAMILY
from .test_source import W4A16, digests

Made = Callable[..., tuple[Path, Path]]

ARGS: dict[str, Any] = {
    **REQUIRED,
    "num_layers": 3,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "kv_channels": 16,
    "max_position_embeddings": 256,
    "norm_epsilon": 1e-6,
    "rotary_base": 10000,
    "untie_embeddings_and_output_weights": True,
    "vocab_size": None,
    "padded_vocab_size": 128,
    "qk_layernorm": True,
    "tokenizer_model": "Qwen/Qwen3-30B-A3B",
}
"""Arguments of the family `qwen3`, as in tests/families."""

EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "moe_ffn_hidden_size": 48,
    "moe_router_topk": 2,
    "moe_router_pre_softmax": True,
    "moe_layer_freq": [0, 1, 1],
}
"""Further arguments of `qwen3_moe`."""

PLAIN = {
    "qk_layernorm": False, "moe_router_pre_softmax": False, "moe_layer_freq": 1,
    "norm_epsilon": 1e-5, "rotary_base": 1000000, "ffn_hidden_size": 48,
    "moe_ffn_hidden_size": None,
}  # fmt: skip
"""Arguments of `mixtral` that differ."""

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": ARGS,
    "qwen3_moe": ARGS | EXPERTS,
    "mixtral": ARGS | EXPERTS | PLAIN,
}


TOKENS = {"bos_token_id", "eos_token_id", "pad_token_id"}


def made_of(values: dict[str, Any] | None) -> dict[str, Any]:
    return configuration_of(Arguments(Path("iter_7/common.pt"), values), "BF16")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoint_needs_no_configuration(name: str, made: Made, tmp_path: Path) -> None:
    """The bytes are the same as with the configuration that the model was made with."""
    checkpoint, hf = made(name, common={"args": Namespace(**FAMILIES[name])})
    recipe = "w4a16_nvfp4_default_mse"
    fourfold.quantize(checkpoint, tmp_path / "given", recipe, hf_config=hf)
    result = fourfold.quantize(checkpoint, tmp_path / "made", recipe)
    assert result.clean
    given, own = (digests(tmp_path / name) for name in ("given", "made"))
    assert {file for file in given if given[file] != own[file]} == {"config.json"}
    config, theirs = (
        transformers.AutoConfig.from_pretrained(tmp_path / name).to_dict()
        for name in ("made", "given")
    )
    different = {key for key in config | theirs if config.get(key) != theirs.get(key)}
    window = {"sliding_window"} if name == "mixtral" else set()  # of which its arguments say none
    assert different <= TOKENS | window | {"_name_or_path", "dtype", "head_dim"}
    assert {config[key] for key in TOKENS & config.keys()} == {None}
    assert fourfold.verify(tmp_path / "made", source=checkpoint).clean


def test_what_is_missing_is_said(made: Made, tmp_path: Path) -> None:
    """There is no tokenizer: the plan says so, and calibration on text is refused."""
    checkpoint, _ = made(common={"args": Namespace(**ARGS | EXPERTS)})
    plan = fourfold.plan(checkpoint, W4A16)
    note = next(note for note in plan.notes if "made from the arguments" in note)
    assert "Qwen3MoeForCausalLM" in note
    assert "'Qwen/Qwen3-30B-A3B'" in note
    with pytest.raises(fourfold.FourfoldError) as error:
        fourfold.quantize(checkpoint, tmp_path / "out", "nvfp4_experts_only_mse")
    assert str(error.value) == (
        f"{checkpoint}: has no tokenizer. Give a folder with one as `hf_config`. "
        "JSONL with input_ids needs none."
    )
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_configuration_goes_on(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run resumes although the temporary configuration is another file each time."""
    checkpoint, _ = made(common={"args": Namespace(**ARGS | EXPERTS)})
    fourfold.quantize(checkpoint, tmp_path / "whole", W4A16, runtime=Runtime(threads=1))

    def stop(progress: Any) -> None:
        if progress.shards_done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fourfold.quantize(
            checkpoint,
            tmp_path / "out",
            W4A16,
            on_event=only(ShardWritten, stop),
            runtime=Runtime(threads=1),
        )
    found: list[Resumed] = []
    options: dict[str, Any] = {"on_event": only(Resumed, found.append)}
    fourfold.quantize(checkpoint, tmp_path / "out", W4A16, **flat(threads=1, **options))
    assert found
    assert found[0].finished >= 2
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_without_arguments_a_configuration_must_be_given(made: Made) -> None:
    with pytest.raises(UsageError, match=r"without training arguments.*`hf_config`"):
        fourfold.plan(made()[0], W4A16)


def test_nothing_temporary_is_left(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "temporary"
    own.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(own))
    checkpoint, _ = made(FAMILY, common={"args": Namespace(**ARGS | EXPERTS)})
    fourfold.plan(checkpoint, W4A16)
    (checkpoint / "common.pt").unlink()
    with pytest.raises(UsageError):
        fourfold.plan(checkpoint, W4A16)
    other, _ = made(
        FAMILY,
        common={"args": Namespace(**ARGS | EXPERTS | {"num_layers": 4, "moe_layer_freq": 1})},
    )
    with pytest.raises(fourfold.SourceError, match="num_hidden_layers 4"):
        fourfold.plan(other, W4A16)
    assert list(own.iterdir()) == []


SLOW_INVENTORY = """
import time
import fourfold.planning.plan as plan
take = plan.take_inventory
def slow(source):
    time.sleep(0.5)
    return take(source)
plan.take_inventory = slow
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_nothing_temporary_is_left_by_a_signal(
    number: signal.Signals, made: Made, tmp_path: Path
) -> None:
    """The signal comes while the model is planned."""
    own = tmp_path / "temporary"
    own.mkdir()
    environment = {"TMPDIR": str(own)}
    checkpoint, _ = made(common={"args": Namespace(**ARGS | EXPERTS)})
    with start_command(
        "quantize", checkpoint, tmp_path / "out", before=SLOW_INVENTORY, environment=environment
    ) as process:
        while not list(own.glob("fourfold-*/model")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate()
    assert process.returncode == 128 + number
    assert f"stopped by {number.name}; nothing was written" in err
    assert list(own.iterdir()) == []


REFUSED: list[tuple[str, Any]] = [
    *((name, "something else") for name in REQUIRED),
    *((name, 77) for name in DEFAULTS),
    *((name, True) for name in OFF),
    ("num_layers", 0),
    ("num_layers", 2.5),
    ("hidden_size", True),
    ("hidden_size", "64"),
    ("norm_epsilon", float("nan")),
    ("rotary_base", -1),
    ("num_experts", -4),
    ("moe_layer_freq", 0),
    ("qk_layernorm", 1),
    ("moe_router_pre_softmax", "yes"),
]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_what_these_families_do_not_do_is_refused(name: str, value: Any) -> None:
    with pytest.raises(UsageError) as error:
        made_of(ARGS | EXPERTS | {name: value})
    text = str(error.value)
    assert text.startswith(f"iter_7/common.pt: {name} is {value!r}"[:130])
    assert text.endswith("`hf_config`.")
    assert len(text.splitlines()) == 1


NEEDED = [
    name
    for name in ARGS | EXPERTS
    if name not in {"vocab_size", "tokenizer_model", "qk_layernorm", *EXPERTS} - {"moe_router_topk"}
]


@pytest.mark.parametrize("name", NEEDED)
def test_what_is_not_said_is_named(name: str) -> None:
    for values in ({**ARGS, **EXPERTS, name: None}, ARGS | EXPERTS):
        if values[name] is not None:
            values = {key: value for key, value in values.items() if key != name}
        with pytest.raises(UsageError, match=rf"do not say {name}\..*`hf_config`"):
            made_of(values)


class Rope(enum.Enum):
    YARN = 7


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("position_embedding_type", Rope.YARN, r"is Rope(\(7\)|\.YARN), and"),
        ("hidden_size", torch.tensor(64), r"is _rebuild_tensor_v2\("),
        ("hidden_size", np.int64(64), r"is scalar\("),
        ("normalization", "a\n\x1b[31m", r"is 'a\\n\\x1b\[31m', and"),
    ],
)
def test_objects_are_shown_as_what_they_were(name: str, value: Any, words: str, made: Made) -> None:
    checkpoint, _ = made(common={"args": Namespace(**ARGS | EXPERTS | {name: value})})
    with pytest.raises(UsageError, match=f"{name} {words}") as error:
        fourfold.plan(checkpoint, W4A16)
    assert len(str(error.value).splitlines()) == 1


def test_dense_models_without_normalized_queries_are_of_no_known_family() -> None:
    with pytest.raises(UsageError, match="qk_layernorm is False"):
        made_of(ARGS | {"qk_layernorm": False})


@pytest.mark.parametrize(("name", "value"), [("moe_router_pre_softmax", True),
                                             ("moe_layer_freq", [0, 1, 1])])  # fmt: skip
def test_what_mixtral_alone_does_not_do_is_refused(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=name):
        made_of(FAMILIES["mixtral"] | {name: value})


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({"moe_router_pre_softmax": False}, {"norm_topk_prob": True}),
        ({"moe_router_pre_softmax": True}, {"norm_topk_prob": False}),
        ({"moe_layer_freq": 1}, {"mlp_only_layers": []}),
        ({"moe_layer_freq": 2}, {"mlp_only_layers": [1]}),
        ({"moe_layer_freq": None}, {"mlp_only_layers": []}),
        ({"moe_layer_freq": [1, 0, 1]}, {"mlp_only_layers": [1]}),
        ({"moe_ffn_hidden_size": None}, {"moe_intermediate_size": 96}),
        ({"group_query_attention": False}, {"num_key_value_heads": 4}),
        ({"vocab_size": 100}, {"vocab_size": 128}),
        ({"vocab_size": None}, {"vocab_size": 128}),
        ({"untie_embeddings_and_output_weights": False}, {"tie_word_embeddings": True}),
        ({"rotary_percent": 1.0, "softmax_type": "vanilla"}, {"rope_theta": 10000}),
        ({"num_experts": None}, {"model_type": "qwen3"}),
        ({"qk_layernorm": None, **PLAIN}, {"model_type": "mixtral", "intermediate_size": 48}),
    ],
)  # fmt: skip
def test_what_arguments_mean(args: dict[str, Any], expected: dict[str, Any]) -> None:
    config = made_of(ARGS | EXPERTS | args)
    assert {key: config[key] for key in expected} == expected
    assert config["dtype"] == "bfloat16"
    json.dumps(config, allow_nan=False)
