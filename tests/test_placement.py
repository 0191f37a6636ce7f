# SPDX-License-Identifier: Apache-2.0
"""The tensors are believed over the configuration: what does not fit is said before any work.

Each test makes one contradiction in a family's tiny checkpoint, as fine-tunes and hand-made
checkpoints bring them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fourfold
from families import Truth

Written = Callable[[str], tuple[Path, Truth]]
Tensors = dict[str, torch.Tensor]
Edited = Callable[..., Path]
EXPERTS = "w4a16_nvfp4_experts_only_mse"
LAYER = "model.layers.0."


@pytest.fixture
def edited(written: Written, tmp_path: Path) -> Edited:
    """A family's checkpoint after a change of its tensors, and of fields of config.json."""

    def make(name: str, change: Callable[[Tensors], object], **config: object) -> Path:
        folder = Path(shutil.copytree(written(name)[0], tmp_path / name))
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        fields = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps(fields))
        return folder

    return make


# ---------------------------------------------------------------- tensors without a place


def add_biases(tensors: Tensors) -> None:
    for letter in "qkv":
        weight = tensors[f"{LAYER}self_attn.{letter}_proj.weight"]
        tensors[f"{LAYER}self_attn.{letter}_proj.bias"] = weight[:, 0].clone()


def add_norm_bias(tensors: Tensors) -> None:
    tensors["model.norm.bias"] = tensors["model.norm.weight"].clone()


@pytest.mark.parametrize("change", [add_biases, add_norm_bias])
def test_a_bias_that_the_config_denies(edited: Edited, change: Callable[[Tensors], None]) -> None:
    folder = edited("qwen3_moe", change)
    with pytest.raises(fourfold.ModelError, match=r"bias in model.safetensors.*has no bias"):
        fourfold.plan(folder, EXPERTS)


def test_an_adapter_that_was_not_merged(edited: Edited) -> None:
    def add(tensors: Tensors) -> None:
        tensors[f"{LAYER}self_attn.q_proj.lora_A.weight"] = torch.ones(4, 64)
        tensors[f"{LAYER}self_attn.q_proj.lora_B.weight"] = torch.ones(64, 4)

    with pytest.raises(fourfold.ModelError, match=r"lora_A.*\(2 tensors\).*merge_and_unload"):
        fourfold.plan(edited("qwen3_moe", add), EXPERTS)


@pytest.mark.parametrize("key", ["v_head.summary.weight", f"{LAYER}self_attn.sinks"])
def test_other_tensors_are_named_in_a_note(edited: Edited, key: str) -> None:
    folder = edited("qwen3_moe", lambda tensors: tensors.update({key: torch.ones(8)}))
    plan = fourfold.plan(folder, EXPERTS)
    (note,) = [note for note in plan.notes if key in note]
    assert "no place in Qwen3MoeForCausalLM" in note
    assert "MTP" not in note
    assert {row.role for row in plan.rows if row.key == key} == {"other"}


def test_buffers_of_old_checkpoints_are_no_concern(edited: Edited) -> None:
    key = f"{LAYER}self_attn.rotary_emb.inv_freq"
    folder = edited("qwen3_moe", lambda tensors: tensors.update({key: torch.ones(8)}))
    assert not any(key in note for note in fourfold.plan(folder, EXPERTS).notes)


@pytest.mark.parametrize("name", ["deepseek_v3_mtp", "qwen3_5_moe_vl"])
def test_mtp_layers_are_called_so(written: Written, name: str) -> None:
    notes = [note for note in fourfold.plan(written(name)[0], EXPERTS).notes if "MTP" in note]
    assert len(notes) == 1
    assert "kept unless the recipe names mtp" in notes[0]


def test_blocks_of_a_deep_tower_are_not_mtp(edited: Edited) -> None:
    key = "visual.blocks.99.norm1.weight"
    folder = edited("qwen3_5_moe_vl", lambda tensors: tensors.update({key: torch.ones(8)}))
    plan = fourfold.plan(folder, EXPERTS)
    assert {row.role for row in plan.rows if row.key == key} == {"other"}


def test_a_decoder_layer_that_the_config_does_not_count(edited: Edited) -> None:
    def add(tensors: Tensors) -> None:
        last = max(key.split(".")[2] for key in tensors if key.startswith("model.layers."))
        for key in [key for key in tensors if key.startswith(f"model.layers.{last}.")]:
            more = key.replace(f".{last}.", f".{int(last) + 1}.", 1)
            tensors[more] = tensors[key].clone()

    folder = edited("qwen3_moe", add)
    assert any("num_hidden_layers" in note for note in fourfold.plan(folder, EXPERTS).notes)


# ------------------------------------------------------------------- one parameter, twice


def add_head(tensors: Tensors, factor: float = 3.0) -> None:
    tensors["lm_head.weight"] = factor * tensors["model.embed_tokens.weight"]


def test_another_head_than_the_tied_one(edited: Edited, tmp_path: Path) -> None:
    folder = edited("qwen3_moe_tied", add_head)
    with pytest.raises(fourfold.SourceError, match=r"lm_head.weight in .*has other values than"):
        fourfold.plan(folder, EXPERTS)


def test_the_class_ties_by_default(edited: Edited) -> None:
    """config.json says nothing, and Cohere's class ties."""
    folder = edited("cohere2_moe", add_head)
    fields = json.loads((folder / "config.json").read_text())
    del fields["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(fourfold.SourceError, match="ties the two"):
        fourfold.plan(folder, EXPERTS)


def test_a_copy_of_the_embedding_is_no_other_head(edited: Edited, tmp_path: Path) -> None:
    folder = edited("qwen3_moe_tied", lambda tensors: add_head(tensors, 1.0))
    assert not any("lm_head" in note for note in fourfold.plan(folder, EXPERTS).notes)
    file = tmp_path / "mine.yaml"
    file.write_text("quantize: [lm_head]")
    with pytest.raises(fourfold.PlanError, match=r"lm_head: config.json ties it"):
        fourfold.plan(folder, file)


def test_a_tie_that_only_the_text_model_has(edited: Edited, tmp_path: Path) -> None:
    """Engines differ in which field they read; transformers reads the whole model's."""
    text = edited("qwen3_vl_moe", lambda tensors: None)
    fields = json.loads((text / "config.json").read_text())
    fields["tie_word_embeddings"] = False
    fields["text_config"]["tie_word_embeddings"] = True
    (text / "config.json").write_text(json.dumps(fields))
    result = fourfold.quantize(text, tmp_path / "out", EXPERTS)
    assert any("lm_head.weight has other values" in note for note in result.plan.notes)
    with pytest.warns(UserWarning, match="lm_head.weight has other values"):
        model = fourfold.load(tmp_path / "out")
    head = load_file(text / "model.safetensors")["lm_head.weight"]
    assert torch.equal(model.lm_head.weight, head)


def test_load_does_not_put_the_embedding_over_a_head(edited: Edited, tmp_path: Path) -> None:
    folder = edited("qwen3_moe_tied", add_head, tie_word_embeddings=False)
    out = tmp_path / "out"
    fourfold.quantize(folder, out, EXPERTS)
    fields = json.loads((out / "config.json").read_text()) | {"tie_word_embeddings": True}
    (out / "config.json").write_text(json.dumps(fields))
    with pytest.raises(fourfold.SourceError, match="has other values than"):
        fourfold.load(out)


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_two_names_for_one_parameter(edited: Edited, factor: float) -> None:
    def add(tensors: Tensors) -> None:
        """The name in memory, which transformers reads as well as the published one."""
        norm = tensors["language_model.model.norm.weight"]
        tensors["model.language_model.norm.weight"] = factor * norm

    folder = edited("aria", add)
    if factor == 1.0:
        assert any("with equal values" in note for note in fourfold.plan(folder, EXPERTS).notes)
    else:
        with pytest.raises(fourfold.SourceError, match=r"norm.weight.* both are the same"):
            fourfold.plan(folder, EXPERTS)


def test_experts_stacked_and_one_by_one(edited: Edited) -> None:
    def add(tensors: Tensors) -> None:
        first = min(key for key in tensors if key.endswith(".experts.0.down_proj.weight"))
        stem = first.removesuffix(".0.down_proj.weight")
        downs = [value for key, value in tensors.items() if key.startswith(stem) and "down" in key]
        tensors[f"{stem}.down_proj"] = torch.stack(downs)

    with pytest.raises(fourfold.SourceError, match=r"experts.*holds what .*experts.* holds, too"):
        fourfold.plan(edited("qwen3_moe", add), EXPERTS)
