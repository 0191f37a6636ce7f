# SPDX-License-Identifier: Apache-2.0
"""The model card: front matter for the hub, what was done, commands, and the verification."""

from __future__ import annotations

import copy
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import fourfold
from fourfold.models.families import FAMILIES, Engine
from fourfold.reporting import QuantSummary, read_summary
from fourfold.reporting.card import draw_card, note_verification, render_card
from fourfold.reporting.serving import (
    EXPERTS_IN_LLAMA_CPP,
    LLAMA_CPP,
    Experts,
    Hardware,
    Served,
    closing_line,
    obstacle_in_llama_cpp,
    serve_commands,
    uses,
)
from fourfold.storage.names import hub_id

from .documents import document, weights_only

DOCS = Path(__file__).parents[2] / "docs"
SOURCE_CARD = """---
license: other
license_name: qwen
license_link: LICENSE
language:
- en
- zh
pipeline_tag: text-generation
library_name: transformers
tags: [chat]
---

# The source
"""


def card(raw: dict[str, Any], base_model: str = "Org/Model-30B", source_card: str = "") -> str:
    return render_card(
        QuantSummary.model_validate_json(json.dumps(raw)),
        base_model=base_model,
        source_card=source_card,
    )


def front_matter(text: str) -> dict[str, Any]:
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def test_front_matter_carries_the_licence_over() -> None:
    matter = front_matter(card(document(), source_card=SOURCE_CARD))
    assert matter == {
        "base_model": "Org/Model-30B",
        "base_model_relation": "quantized",
        "license": "other",
        "license_name": "qwen",
        "license_link": "LICENSE",
        "language": ["en", "zh"],
        "pipeline_tag": "text-generation",
        "tags": ["nvfp4", "modelopt", "fourfold"],
    }
    from huggingface_hub import ModelCardData

    assert ModelCardData(**matter).to_dict() == matter


@pytest.mark.parametrize(
    "source_card",
    [
        "",
        "# No front matter",
        "---\nlicense: [\n---\n",
        "---\n- a list\n---\n",
        "---\nlicense: {a: b}\nlanguage: 3\n---\n",
        "---\nlicense: ''\n---\n",
        "---\nnever ends",
        "---\n" + "a: &a [x, x]\nb: [*a, *a]\n" + "---\n",
    ],
)
def test_a_source_card_that_says_nothing_useful(source_card: str) -> None:
    text = card(document(), source_card=source_card)
    assert front_matter(text).keys() == {"base_model", "base_model_relation", "tags"}
    assert "names none" in text
    assert ("SOURCE_README.md" in text) == bool(source_card)


def test_it_says_what_was_done() -> None:
    raw = document()
    text = card(raw)
    for words in (
        "# Model-30B-NVFP4",
        "[Org/Model-30B](https://huggingface.co/Org/Model-30B)",
        "`nvfp4_default_mse-fp8_kv`",
        "4 bits (W4A4)",
        "FP8, calibrated scales",
        "65,536 tokens from the embedded mixed text",
        "| experts | NVFP4 | 192 |",
        "| embedding | as in the source | 1 |",
        "vllm serve Model-30B-NVFP4\n",
        "--quantization modelopt_fp4 --kv-cache-dtype fp8_e4m3\n",
        "trtllm-serve Model-30B-NVFP4\n",
        "convert_hf_to_gguf.py Model-30B-NVFP4",
        "weights: {format: nvfp4, scale: mse}",
        "Not verified.",
    ):
        assert words in text, words
    text = card(weights_only(raw), base_model="local")
    assert "16 bits (W4A16)" in text
    assert "none was needed" in text
    assert "kv-cache-dtype" not in text
    assert "huggingface.co" not in text
    assert front_matter(text)["base_model"] == "local"


def test_what_was_out_of_the_ordinary_is_told() -> None:
    ordinary = card(document())
    assert "repaired" not in ordinary
    assert "NaN" not in ordinary
    repairs = [{"name": "a.up_proj", "repair": "floor scales"}]
    assert "| repaired | 1 linear weight with" in card({**document(), "repairs": repairs})


def test_a_cost_that_was_measured_is_told_of_that_recipe_alone(tmp_path: Path) -> None:
    recipe = fourfold.Recipe.load("nvfp4_experts_only_mse").model_dump(mode="json")
    cost = "this recipe costs: KL 0.0106, top-1 96.0% (KL in nats a byte)"
    assert cost in card({**document(), "recipe": recipe})
    changed = {**recipe, "keep": ["*.layers.0.*"]}
    assert "costs" not in card({**document(), "recipe": changed})
    assert "costs" not in card({**document(), "recipe": {**recipe, "name": "mine"}})


def test_the_readme_has_the_commands() -> None:
    readme = (DOCS.parent / "README.md").read_text()
    for engine in (*Engine, LLAMA_CPP):
        assert f"    {' && '.join(serve_commands(engine, 'OUT', served('qwen3_moe')))}\n" in readme


def test_names_from_a_checkpoint_stay_text() -> None:
    raw = copy.deepcopy(document())
    raw["architecture"] = "<script>|`*x*`\x1b[31m\n# y"
    raw["calibration"]["origin"] = "a|b"
    text = card(raw, base_model="../we ird\n---\nlicense: mit")
    assert "<script>" not in text
    assert "\x1b" not in text
    assert "\n# y" not in text
    assert "a\\|b" in text
    assert "license" not in front_matter(text)
    assert re.fullmatch(r"[\w./-]+", front_matter(text)["base_model"])


def test_a_card_that_cannot_be_drawn_costs_a_warning_only() -> None:
    warnings: list[str] = []
    assert draw_card(None, "a", "", warnings.append) is None  # type: ignore[arg-type]
    assert "The checkpoint is not affected" in warnings[0]


def test_out_has_a_card_and_keeps_that_of_the_source(written: Any, tmp_path: Path) -> None:
    model = Path(shutil.copytree(written("qwen3_moe")[0], tmp_path / "Model"))
    (model / "README.md").write_text(SOURCE_CARD)
    (model / "SOURCE_README.md").write_text("older")
    out = tmp_path / "out"
    result = fourfold.quantize(model, out, progress=False)
    text = (out / "README.md").read_text()
    assert (out / "SOURCE_README.md").read_text() == SOURCE_CARD
    assert front_matter(text)["base_model"] == "Model"
    assert front_matter(text)["license_name"] == "qwen"
    assert "Verified after it was written, without an error: 24 linear weights" in text
    assert {"README.md", "SOURCE_README.md"} <= set(read_summary(out).files)
    report = fourfold.verify(out, source=model, progress=False)
    assert "side-file-missing" not in {finding.id for finding in report.findings}
    assert str(result).splitlines()[-1].startswith(f"serve it: vllm serve {out} ")
    merged = tmp_path / "merged"
    fourfold.merge([out], merged, progress=False)
    assert (merged / "README.md").read_text() == text
    assert (merged / "SOURCE_README.md").read_text() == SOURCE_CARD
    fourfold.quantize(
        model, out, output=fourfold.OutputConfig(overwrite=True, verify=False), progress=False
    )
    assert "Not verified." in (out / "README.md").read_text()


def test_where_the_source_comes_from_is_named(written: Any, tmp_path: Path) -> None:
    """By its name on the hub, if it lies in the hub's cache; a model in memory by its class."""
    from transformers import AutoModelForCausalLM

    snapshot = tmp_path / "models--Org--Model-30B" / "snapshots" / "0123abc"
    shutil.copytree(written("qwen3_moe")[0], snapshot)
    fourfold.quantize(snapshot, tmp_path / "out", progress=False)
    text = (tmp_path / "out" / "README.md").read_text()
    assert front_matter(text)["base_model"] == "Org/Model-30B"
    assert read_summary(tmp_path / "out").model == "Model-30B"
    assert "vllm serve Model-30B-NVFP4\n" in text
    model = AutoModelForCausalLM.from_pretrained(snapshot)
    fourfold.quantize(model, tmp_path / "live", progress=False)
    text = (tmp_path / "live" / "README.md").read_text()
    assert front_matter(text)["base_model"] == "Org/Model-30B"
    model.name_or_path = model.config._name_or_path = ""
    fourfold.quantize(model, tmp_path / "made", progress=False)
    text = (tmp_path / "made" / "README.md").read_text()
    assert front_matter(text)["base_model"] == "Qwen3MoeForCausalLM"


def test_a_card_that_was_removed_or_edited(written: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = fourfold.quantize(written("qwen3_moe")[0], out, progress=False)
    assert not (out / "SOURCE_README.md").exists()
    assert result.report is not None
    (out / "README.md").write_text("# mine")
    note_verification(out, result.report)
    assert (out / "README.md").read_text() == "# mine"
    (out / "README.md").unlink()
    note_verification(out, result.report)
    fourfold.merge([out], tmp_path / "merged", progress=False)
    assert not (tmp_path / "merged" / "README.md").exists()


def test_the_name_on_the_hub() -> None:
    snapshot = Path("/cache/models--Qwen--Qwen3-30B--A3B/snapshots/0123abc")
    assert hub_id(snapshot) == "Qwen/Qwen3-30B--A3B"
    assert hub_id(Path("/models/Qwen3")) is None
    assert hub_id(Path("/models--a--b/refs/main")) is None


# ------------------------------------------------------------------------------------- serving


def served(model_type: str, *, is_w4a4: bool = False, has_experts: bool = True) -> Served:
    return Served(model_type, has_experts, is_w4a4, None, frozenset({64, 128}))


@pytest.mark.parametrize(
    ("model_type", "word"),
    [
        ("qwen3_moe", ""),
        ("qwen3_5_moe_text", ""),
        ("gemma4", ""),
        ("glm4_moe", "ignored"),
        ("kimi_k25", "ignored"),
        ("mixtral", "w3 and w2"),
        ("minimax_m2", "w3 and w2"),
        ("llama4", "not known to be used"),
        ("nobody_knows", "not known to be used"),
    ],
)
def test_llama_cpp_by_family(model_type: str, word: str) -> None:
    obstacle = obstacle_in_llama_cpp(served(model_type))
    assert obstacle == "" if word == "" else word in obstacle


def test_llama_cpp_wants_widths_of_64() -> None:
    odd = Served("qwen3_moe", True, False, None, frozenset({96, 128}))
    assert "96" in obstacle_in_llama_cpp(odd)
    assert obstacle_in_llama_cpp(served("llama", has_experts=False)) == ""


def test_families_of_llama_cpp_are_families() -> None:
    assert EXPERTS_IN_LLAMA_CPP.keys() <= FAMILIES.keys()


def test_no_engine_no_command() -> None:
    assert "no engine" in closing_line("out", served("gpt_oss"))
    text = card({**document(), "model_type": "gpt_oss"})
    assert "No engine is known" in text
    assert "vllm serve" not in text


def test_commands_quote_the_folder() -> None:
    for name in (*Engine, LLAMA_CPP):
        assert any("'a b'" in line for line in serve_commands(name, "a b", served("qwen3_moe")))


def test_the_page_has_the_commands_and_the_table() -> None:
    page = (DOCS / "serving.md").read_text()
    for engine in (*Engine, LLAMA_CPP):
        for kv_cache in (None, "fp8", "nvfp4"):
            facts = Served("qwen3_moe", True, False, kv_cache, frozenset())
            for line in serve_commands(engine, "OUT", facts):
                assert f"    {line}\n" in page
    for is_w4a4 in (False, True):
        for row in uses(served("qwen3_moe", is_w4a4=is_w4a4)):
            assert f"| {' | '.join(row)} |\n" in page
    assert len(uses(served("qwen3_moe"))) == len(Hardware)
    for use in (Experts.USED, Experts.IGNORED):
        names = [f"`{name}`" for name, found in EXPERTS_IN_LLAMA_CPP.items() if found is use]
        assert f"| {', '.join(names)} |\n" in page


def test_the_other_layout_has_fewer_readers_and_other_commands() -> None:
    facts = replace(served("qwen3_moe"), layout="compressed-tensors")
    assert facts.engines == (Engine.VLLM, Engine.SGLANG)
    assert "--quantization" not in serve_commands(Engine.SGLANG, "OUT", facts)[0]
    page = (DOCS / "serving.md").read_text()
    assert f"    {serve_commands(Engine.SGLANG, 'OUT', facts)[0]}\n" in page
    assert not any("rounds activations all the same" in cell for row in uses(facts) for cell in row)
    assert "nobody has tried" in obstacle_in_llama_cpp(facts)
    raw = document()
    raw["recipe"] = {**raw["recipe"], "layout": "compressed-tensors"}
    text = card(raw)
    assert "trtllm-serve" not in text
    assert "TensorRT-LLM does not read this layout" in text
    assert "leaves out the global\nscales of experts" in text
    raw["linears"] = [x for x in raw["linears"] if x["role"] != "experts"]
    assert "CompressedTensorsConfig(dequantize=True)" in card(raw)
    raw["linears"] = [raw["linears"][0], *({**x, "format": "fp8"} for x in raw["linears"][1:])]
    assert "but not with `dequantize=True`" in card(raw)
    assert "- compressed-tensors" in text
    assert "trtllm-serve" in card(document())
