# SPDX-License-Identifier: Apache-2.0
"""What people bring that cannot be quantized as it is: the cause and the remedy are named."""

from __future__ import annotations

import codecs
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fourfold
from families import Truth
from fourfold.errors import FourfoldError

Written = Callable[[str], tuple[Path, Truth]]
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def model(written: Written, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written("qwen3_moe")[0], tmp_path / "model"))


def message(model: str | Path, recipe: str = "w4a16_nvfp4_experts_only") -> str:
    with pytest.raises(FourfoldError) as raised:
        fourfold.plan(model, recipe)
    text = str(raised.value)
    assert len(text) < 500
    assert "\n" not in text
    return text


def change_config(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


def change_tensors(model: Path, change: Callable[[Tensors], Tensors]) -> None:
    file = model / "model.safetensors"
    tensors = {name: value.clone() for name, value in load_file(file).items()}
    save_file(change(tensors), file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("prefix", "cause"),
    [
        ("_orig_mod.", "compiled or wrapped model. Save the inner model"),
        ("module.", "compiled or wrapped model. Save the inner model"),
        ("language_model.", "is the config that of an inner model?"),
    ],
)
def test_a_prefix_of_every_name(prefix: str, cause: str, model: Path) -> None:
    change_tensors(model, lambda tensors: {prefix + name: x for name, x in tensors.items()})
    assert f"Names begin with '{prefix}' there" in (text := message(model))
    assert cause in text


def test_a_head_that_is_missing(model: Path) -> None:
    change_tensors(model, lambda x: {name: x[name] for name in x if name != "lm_head.weight"})
    assert "set tie_word_embeddings in config.json" in message(model)


def test_a_byte_order_mark(model: Path) -> None:
    config = model / "config.json"
    config.write_bytes(codecs.BOM_UTF8 + config.read_bytes())
    assert "config.json: begins with a byte-order mark" in message(model)
    config.write_text(config.read_text("utf-8-sig"), "utf-16")
    assert "config.json: is in UTF-16. Save it in UTF-8." in message(model)


def test_a_name_that_stands_there_twice(model: Path) -> None:
    config = model / "config.json"
    text = config.read_text()
    config.write_text(text.replace("{", '{"hidden_act": "silu", ', 1))
    fourfold.plan(model, "w4a16_nvfp4_experts_only")  # the same value: JSON readers do not mind
    config.write_text(text.replace("{", '{"vocab_size": 1, ', 1))
    assert "'vocab_size' stands there with two values. Remove one." in message(model)


def test_a_configuration_that_is_stale(model: Path) -> None:
    change_config(model, quantization_config={"quant_method": "fp8"})
    text = message(model)
    assert "says that the weights are quantized (fp8), but lm_head.weight is BF16" in text
    assert "remove its quantization_config" in text


@pytest.mark.parametrize("stated", [["fp8"], "fp8", 8, [], False])
def test_a_quantization_that_is_no_object(stated: object, model: Path) -> None:
    kind = type(stated).__name__
    change_config(model, quantization_config=stated)
    assert f"config.json: quantization_config holds a JSON {kind}, not an object" in message(model)


def test_modelopts_file_that_is_broken(model: Path, tmp_path: Path) -> None:
    """Beside weights that are quantized, it is not passed over."""
    fourfold.quantize(model, tmp_path / "out", "w4a16_nvfp4_experts_only")
    (tmp_path / "out" / "hf_quant_config.json").write_text('{"quantization": ')
    assert "hf_quant_config.json: not valid JSON" in message(tmp_path / "out")


def packed(dtype: torch.dtype, old: str, new: str, *more: str) -> Callable[[Tensors], Tensors]:
    """Experts' weights as another tool stores them, with tensors of more names beside them."""

    def change(tensors: Tensors) -> Tensors:
        result: Tensors = {}
        for name, value in tensors.items():
            if ".experts." not in name:
                result[name] = value
                continue
            stem = name.removesuffix(old)
            result[stem + new] = torch.zeros(value.shape[0], value.shape[1] // 2).to(dtype)
            result |= {stem + name: torch.ones(value.shape[0], 1) for name in more}
        return result

    return change


IN_3_BITS = {"config_groups": {"group_0": {"weights": {"num_bits": 3, "type": "int"}}}}


@pytest.mark.parametrize(
    ("config", "file", "change", "name"),
    [
        (
            {"quantization": {"bits": 4, "group_size": 64}},
            None,
            packed(torch.uint32, ".weight", ".weight", ".scales", ".biases"),
            "MLX, 4 bits",
        ),
        (
            {},
            "quantize_config.json",
            packed(torch.int32, ".weight", ".qweight", ".qzeros", ".scales"),
            "GPTQ",
        ),
        (
            {},
            "quant_config.json",
            packed(torch.int32, ".weight", ".qweight", ".qzeros", ".scales"),
            "AWQ",
        ),
        (
            {"compression_config": {"quant_method": "compressed-tensors", **IN_3_BITS}},
            None,
            packed(torch.int32, ".weight", ".weight_packed", ".weight_scale"),
            "compressed-tensors",
        ),
        (
            {},
            None,
            packed(torch.float8_e5m2, ".weight", ".weight", ".weight_scale_inv"),
            "FP8 in blocks",
        ),
        ({}, None, packed(torch.int8, ".weight", ".weight", ".SCB"), "bitsandbytes"),
    ],
)
def test_what_other_tools_have_quantized(
    config: dict[str, Any],
    file: str | None,
    change: Callable[[Tensors], Tensors],
    name: str,
    model: Path,
) -> None:
    change_config(model, **config)
    change_tensors(model, change)
    if file is not None:
        (model / file).write_text("{}")
    assert f"quantized already ({name}) in a form that cannot" in message(model)


def test_what_transformers_says_is_not_cut(model: Path) -> None:
    change_config(model, num_experts_per_tok="2")
    assert "'num_experts_per_tok' expected int, got str (value: '2')" in message(model)


def test_an_architecture_under_another_model_type(written: Written, tmp_path: Path) -> None:
    """Kimi K2 is a DeepSeek-V3 with a model_type and code of its own."""
    model = Path(shutil.copytree(written("deepseek_v3_mtp")[0], tmp_path / "model"))
    change_config(
        model, model_type="kimi_k2", auto_map={"AutoConfig": "configuration_deepseek.Config"}
    )
    result = fourfold.quantize(model, tmp_path / "out", "w4a16_nvfp4_experts_only")
    assert result.clean
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "kimi_k2"
    change_config(model, architectures=["KimiForCausalLM"])
    assert "pass `trust_remote_code=True` if you trust it" in message(model)


def test_folders_that_are_taken_for_a_checkpoints(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / ("0" * 40)
    shutil.copytree(model, snapshot)
    assert f"the root of a model in the hub's cache: give {snapshot}." in message(cache)
    above = tmp_path / "above"
    shutil.copytree(model, above / "inner")
    assert f"A checkpoint lies below it: give {above / 'inner'}." in message(above)
    gguf = tmp_path / "gguf"
    gguf.mkdir()
    (gguf / "model-Q4_K_M.gguf").touch()
    assert "It holds GGUF files, which are quantized already" in message(gguf)


def test_weights_in_another_format(model: Path) -> None:
    (model / "._model.safetensors").write_bytes(b"\0\5\x16\7")  # macOS leaves such files behind
    (model / "model.safetensors").rename(model / "other.safetensors")
    fourfold.plan(model, "w4a16_nvfp4_experts_only")
    (model / "other.safetensors").rename(model / "consolidated-00001-of-00002.safetensors")
    (model / "consolidated-00002-of-00002.safetensors").touch()
    assert "the model maker's own format (consolidated*.safetensors)" in message(model)


def test_a_name_that_is_misspelt(model: Path) -> None:
    assert f"Did you mean {model}?" in message(model.with_name("modell"))


def test_advice_on_uneven_rows_that_can_be_followed(written: Written, tmp_path: Path) -> None:
    """Keeping the uneven weights alone would be refused: engines fuse experts."""
    model = Path(shutil.copytree(written("qwen3_moe")[0], tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    width = config["moe_intermediate_size"] - 8
    change_config(model, moe_intermediate_size=width)

    def narrow(tensors: Tensors) -> Tensors:
        for name in tensors:
            if ".experts." in name:
                x = tensors[name]
                tensors[name] = x[:, :width] if "down_proj" in name else x[:width]
                tensors[name] = tensors[name].contiguous()
        return tensors

    change_tensors(model, narrow)
    assert "choose other roles" in message(model)
    text = message(model, "w4a16_nvfp4_default")
    assert f"input dimension {width} is not a multiple of 16" in text
    recipe = "quantize: [experts, attention]\n" + text.rpartition("recipe: ")[2].rstrip(".") + "\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert fourfold.plan(model, tmp_path / "recipe.yaml").linears
