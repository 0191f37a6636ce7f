# SPDX-License-Identifier: Apache-2.0
"""Proves that the embedded model is what its card says, and that the demo measures rightly.

The model: upstream's names and layout, every expert in use, an exact byte tokenizer, the card's
figure. The demo: what it measures is what its definitions say.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import fourfold
from fourfold.embedded import heldout_text, model_dir
from fourfold.errors import UsageError
from fourfold.evaluation.comparison import compare
from fourfold.evaluation.continuation import Sampling, continue_prompt, text_after
from fourfold.evaluation.demo import PROMPT, demonstrate
from fourfold.formats import nvfp4

LAYERS, EXPERTS, HIDDEN, INTERMEDIATE = 4, 16, 128, 64
WINDOW = 512
TOKENIZER = AutoTokenizer.from_pretrained(model_dir())


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(model_dir(), dtype=torch.float32)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.tensor(list(heldout_text().encode("utf-8")))


@pytest.fixture(scope="module")
def measured(model: Any, tokens: Tensor) -> tuple[float, Tensor]:
    """Bits per byte of the held-out text, and how often each expert was chosen [L, E]."""
    nats, predicted = 0.0, 0
    used_LE = torch.zeros(LAYERS, EXPERTS, dtype=torch.int64)
    with torch.no_grad():
        for window in tokens.split(WINDOW):
            output = model(window[None], output_router_logits=True, use_cache=False)
            nats += float(F.cross_entropy(output.logits[0, :-1], window[1:], reduction="sum"))
            predicted += len(window) - 1
            for layer, logits_TE in enumerate(output.router_logits):
                chosen = logits_TE.topk(model.config.num_experts_per_tok, dim=-1).indices
                used_LE[layer] += torch.bincount(chosen.flatten(), minlength=EXPERTS)
    return nats / math.log(2) / predicted, used_LE


# --- the checkpoint -----------------------------------------------------------------------


def test_loads_without_a_key_too_many_or_too_few() -> None:
    loaded, info = AutoModelForCausalLM.from_pretrained(model_dir(), output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert not info["error_msgs"]
    assert type(loaded).__name__ == "Qwen3MoeForCausalLM"
    assert loaded.dtype == torch.bfloat16


def upstream_shapes() -> dict[str, tuple[int, ...]]:
    """The keys of a Qwen3-MoE as Qwen publishes it."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (320, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (320, HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (HIDDEN,),
            f"{prefix}.post_attention_layernorm.weight": (HIDDEN,),
            f"{prefix}.self_attn.q_proj.weight": (128, HIDDEN),
            f"{prefix}.self_attn.k_proj.weight": (64, HIDDEN),
            f"{prefix}.self_attn.v_proj.weight": (64, HIDDEN),
            f"{prefix}.self_attn.o_proj.weight": (HIDDEN, 128),
            f"{prefix}.self_attn.q_norm.weight": (32,),
            f"{prefix}.self_attn.k_norm.weight": (32,),
            f"{prefix}.mlp.gate.weight": (EXPERTS, HIDDEN),
        }
        for expert in range(EXPERTS):
            experts = f"{prefix}.mlp.experts.{expert}"
            shapes[f"{experts}.gate_proj.weight"] = (INTERMEDIATE, HIDDEN)
            shapes[f"{experts}.up_proj.weight"] = (INTERMEDIATE, HIDDEN)
            shapes[f"{experts}.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
    return shapes


def test_keys_shapes_and_dtype_are_upstreams() -> None:
    tensors = load_file(model_dir() / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == upstream_shapes()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def test_config_uses_upstreams_keys() -> None:
    config = json.loads((model_dir() / "config.json").read_text())
    assert config["num_experts"] == EXPERTS
    assert config["rope_theta"] == 10000.0
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert "num_local_experts" not in config


def test_folder_is_whole_and_small() -> None:
    names = {path.name for path in model_dir().iterdir()}
    assert names == {
        "LICENSE",
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    package = model_dir().parent
    assert (package / "LICENSE.PSF.txt").is_file()
    files = [path for path in package.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8_000_000


def test_held_out_text_is_of_a_useful_size() -> None:
    assert 50_000 < len(heldout_text().encode("utf-8")) < 100_000


def test_import_does_not_load_torch() -> None:
    check = "import sys, fourfold.embedded as e; e.heldout_text(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.slow
def test_held_out_bits_per_byte_are_the_cards(measured: tuple[float, Tensor]) -> None:
    card = (model_dir() / "README.md").read_text(encoding="utf-8")
    stated = re.search(r"\*\*(\d\.\d+) bits per byte\*\*", card)
    assert stated is not None
    assert measured[0] == pytest.approx(float(stated[1]), abs=2e-3)


@pytest.mark.slow
def test_every_expert_is_reached(measured: tuple[float, Tensor]) -> None:
    assert int(measured[1].min()) > 0


# --- the tokenizer ------------------------------------------------------------------------


@given(st.text())
def test_tokens_are_the_bytes_of_any_text(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    assert ids == list(text.encode("utf-8"))
    assert TOKENIZER.decode(ids) == text


@given(st.binary())
def test_any_bytes_are_tokens(content: bytes) -> None:
    symbols = TOKENIZER.convert_ids_to_tokens(list(content))
    assert bytes(TOKENIZER.convert_tokens_to_ids(symbols)) == content
    assert TOKENIZER.decode(list(content)) == content.decode("utf-8", errors="replace")


def test_text_never_turns_into_the_end_of_text_token() -> None:
    assert TOKENIZER.eos_token_id == 256
    text = "a <|endoftext|> b"
    assert TOKENIZER(text)["input_ids"] == list(text.encode())


# --- the demo -----------------------------------------------------------------------------

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, its experts in the ModelOpt layout, as ModelOpt itself might have written it."""
    written: Tensors = {}
    for name, tensor in load_file(model_dir() / "model.safetensors").items():
        if ".experts." not in name:
            written[name] = tensor
            continue
        made = nvfp4.quantize(tensor, scale="max")
        module = name.removesuffix(".weight")
        written[name] = made.codes
        written[f"{module}.weight_scale"] = made.block_scale
        written[f"{module}.weight_scale_2"] = made.global_scale
    written["model.layers.0.self_attn.k_proj.k_scale"] = torch.tensor(1.0)
    written["model.layers.0.self_attn.v_proj.v_scale"] = torch.tensor(1.0)
    folder = tmp_path_factory.mktemp("demo") / "out"
    write_folder(folder, written)
    return folder


def write_folder(folder: Path, tensors: Tensors) -> None:
    folder.mkdir()
    config = json.loads((model_dir() / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4"}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_model_equals_itself(model: Any, tokens: Tensor) -> None:
    same = compare(model, model, tokens[:2000], WINDOW)
    assert same.kl == 0.0
    assert same.top1_agreement == 1.0
    assert same.reference_bits == same.quantized_bits
    assert same.positions == 3 * WINDOW


def test_compare_is_the_definition(model: Any, folded: Path) -> None:
    quantized = fourfold.load(folded, dtype=torch.float32)
    ids = TOKENIZER("def read(self, size=-1):\n    return self", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        p, q = (m(ids).logits[0].double().softmax(-1) for m in (model, quantized))
    found = compare(model, quantized, ids[0], ids.shape[1])
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-3)
    bits = -p[:-1].gather(1, ids[0, 1:, None]).log2().mean()
    assert found.reference_bits == pytest.approx(float(bits), rel=1e-5)


def test_compare_needs_a_window_of_text(model: Any, tokens: Tensor) -> None:
    with pytest.raises(UsageError, match="100 tokens in windows of 512"):
        compare(model, model, tokens[:100], WINDOW)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_text_repeats_itself(model: Any, temperature: float) -> None:
    sampling = Sampling(8, temperature, seed=3)
    tokens = continue_prompt(model, TOKENIZER, "import ", sampling)
    assert tokens == continue_prompt(model, TOKENIZER, "import ", sampling)
    assert text_after(TOKENIZER, "import ", tokens) == bytes(tokens).decode()


def test_special_tokens_are_not_shown() -> None:
    assert text_after(TOKENIZER, "ab", [99, 256, 100, 256]) == "cd"


def test_the_demo_shows_a_small_loss(folded: Path) -> None:
    text = heldout_text()[: 8 * WINDOW]
    result = demonstrate(model_dir(), folded, text=text, sampling=Sampling(16, 0.7, seed=1))
    assert result.reference_text.startswith(PROMPT)
    assert result.quantized_text.startswith(PROMPT)
    assert 0 < result.comparison.kl < 0.1
    assert result.comparison.top1_agreement > 0.85
    assert not result.simulated
    assert "--- after, from the dequantized weights and the same seed:" in str(result)


def test_the_demo_rounds_the_activations_of_w4a4(folded: Path, tmp_path: Path) -> None:
    tensors = load_file(folded / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".weight_scale_2")]:
        tensors[name.replace("weight_scale_2", "input_scale")] = torch.tensor(16 / 2688)
    write_folder(tmp_path / "w4a4", tensors)
    weights, both = (
        demonstrate(model_dir(), out, text=heldout_text()[: 4 * WINDOW], sampling=Sampling(4))
        for out in (folded, tmp_path / "w4a4")
    )
    assert both.simulated
    assert both.comparison.kl > weights.comparison.kl
    assert "from the dequantized weights, rounded activations and the same seed" in str(both)
