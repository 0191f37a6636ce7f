# SPDX-License-Identifier: Apache-2.0
"""A quantized KV cache: what recipes write, and what `load` and `generate` round.

Simulated models are compared with exact ones whose cache, an ordinary subclass of transformers',
rounds what it is given.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fourfold
from extending.reciprocal import Reciprocal
from families import FAMILIES, Truth, mostly_slow
from fourfold.calibration.reading import reads_text_twice
from fourfold.embedded import model_dir
from fourfold.formats.kv_cache import KVFormat, round_states
from fourfold.layouts import LAYOUTS
from fourfold.models.internals import runnable
from fourfold.sources.claims import kv_cache_format
from jobs import flat, ids_file
from numerics.activation_oracle import rounded
from nvfp4_folders import tensors_of

Written = Callable[[str], tuple[Path, Truth]]

EXPERTS = "quantize_if_present: [experts, mlp]\n"
CAST, CALIBRATED = "{format: fp8, scale: cast}", "{format: fp8, scale: calibrated}"
NVFP4 = "{format: nvfp4}"


def recipe(folder: Path, kv_cache: str, rest: str = EXPERTS) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(f"kv_cache: {kv_cache}\n{rest}")
    return file


def quantized(model: Path, folder: Path, kv_cache: str, rest: str = EXPERTS) -> Path:
    options: dict[str, Any] = {"threads": 1, "verify": False}
    if kv_cache == CALIBRATED:
        options |= {"calib": [ids_file(folder)], "calib_seq": 24}
    fourfold.quantize(model, folder / "out", recipe(folder, kv_cache, rest), **flat(**options))
    return folder / "out"


# --- recipes ------------------------------------------------------------------------------


def test_an_nvfp4_cache_is_stated_in_both_files(written: Written, tmp_path: Path) -> None:
    """As vLLM (config.json: bits and type) and TensorRT-LLM (the other file) read it."""
    chosen = recipe(tmp_path, NVFP4)
    plan = fourfold.plan(written("qwen3_moe")[0], chosen)
    assert not plan.needs_calibration
    assert any("vLLM" in note and "SGLang" in note for note in plan.notes)
    out = tmp_path / "out"
    result = fourfold.quantize(written("qwen3_moe")[0], out, chosen)
    assert result.clean, result.report
    stated = json.loads((out / "config.json").read_text())["quantization_config"]
    assert stated["kv_cache_scheme"] == {
        "type": "float",
        "num_bits": 4,
        "dynamic": False,
        "group_size": 16,
    }
    other = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    assert other["kv_cache_quant_algo"] == "NVFP4"
    assert not [name for name in tensors_of(out) if name.endswith(("k_scale", "v_scale"))]
    card = (out / "README.md").read_text()
    assert "| KV cache | NVFP4, scale 1 |" in card
    assert "--kv-cache-dtype nvfp4" in card
    assert not [x for x in fourfold.verify(out).findings if x.id.startswith("kv")]


@pytest.mark.parametrize(
    ("model", "word"),
    [("deepseek_v3", "MLA"), ("qwen3_moe", "heads of"), ("gpt_oss", "attention sinks")],
)
def test_the_plan_says_what_keeps_engines_from_it(
    model: str, word: str, written: Written, tmp_path: Path
) -> None:
    def notes(kv_cache: str) -> str:
        return "\n".join(fourfold.plan(written(model)[0], recipe(tmp_path, kv_cache)).notes)

    assert word in notes(NVFP4)
    assert "kv_cache" not in notes(CAST)


def test_heads_of_64(written: Written, tmp_path: Path) -> None:
    from fourfold.planning.activations import head_size

    assert head_size({"hidden_size": 512, "num_attention_heads": 8}) == 64
    assert head_size({"text_config": {"head_dim": 128}, "head_dim": 64}) == 128
    assert head_size({}) is None


def test_nvfp4_has_no_calibrated_scales(written: Written, tmp_path: Path) -> None:
    with pytest.raises(fourfold.RecipeError, match="scale: cast"):
        fourfold.plan(
            written("qwen3_moe")[0], recipe(tmp_path, "{format: nvfp4, scale: calibrated}")
        )


def test_a_layout_that_cannot_state_it(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LAYOUTS, "reciprocal", Reciprocal())
    chosen = recipe(tmp_path, NVFP4, f"layout: reciprocal\n{EXPERTS}")
    with pytest.raises(fourfold.PlanError, match="cannot state the format nvfp4"):
        fourfold.plan(written("qwen3_moe")[0], chosen)


@pytest.mark.parametrize(
    ("entry", "kv_format"),
    [
        ({"kv_cache_scheme": {"type": "float", "num_bits": 8, "dynamic": False}}, "fp8"),
        ({"kv_cache_scheme": {"type": "float", "num_bits": 4}}, "nvfp4"),
        ({"kv_cache_scheme": {"type": "int", "num_bits": 8}}, None),
        ({"kv_cache_scheme": None, "kv_cache_quant_algo": "FP8"}, "fp8"),
        ({"kv_cache_quant_algo": "nvfp4"}, "nvfp4"),
        ({"kv_cache_quant_algo": None}, None),
    ],
)
def test_formats_as_configurations_state_them(
    entry: dict[str, Any], kv_format: KVFormat | None
) -> None:
    assert kv_cache_format([{}, entry]) == kv_format


# --- numerics -----------------------------------------------------------------------------


def nearest_e4m3(value: float) -> float:
    """By search over all finite E4M3 numbers, ties to the even code."""
    if math.isnan(value):
        return math.nan
    codes = torch.arange(127, dtype=torch.uint8)
    numbers = codes.view(torch.float8_e4m3fn).double().tolist()
    best = min(range(127), key=lambda code: (abs(numbers[code] - abs(value)), code % 2))
    return math.copysign(numbers[best], value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 0.0137, 3.0])
def test_fp8_states(dtype: torch.dtype, scale: float) -> None:
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(40, 8, generator=generator) * torch.logspace(-4, 4, 40)[:, None]
    edges = [0.0, 448.0, 464.0, 1e4, -500.0, 2.0**-10, 1.0625, 1.1875]
    states = torch.cat([states, torch.tensor([edges])]).to(dtype)
    single = torch.tensor(scale, dtype=torch.float32)
    wanted = torch.tensor(
        [[nearest_e4m3(float(x.float() / single)) for x in row] for row in states],
        dtype=torch.float32,
    )
    assert torch.equal(round_states(states, "fp8", scale), (wanted * single).to(dtype))


def test_states_that_are_no_numbers() -> None:
    states = torch.tensor([math.nan, math.inf, -math.inf])
    read = round_states(states, "fp8")
    assert math.isnan(read[0])
    assert read[1:].tolist() == [448.0, -448.0]


def test_nvfp4_states() -> None:
    states = 5 * torch.randn(2, 3, 7, 32, generator=torch.Generator().manual_seed(4)).bfloat16()
    assert torch.equal(round_states(states, "nvfp4"), rounded(states, 1.0))


# --- load ---------------------------------------------------------------------------------


def exact_with_rounded_cache(
    out: Path, kv_format: KVFormat, scales: dict[int, tuple[float, float]]
) -> Callable[..., Tensor]:
    """Logits of the exact model with a cache that rounds what it is given."""
    from transformers import DynamicCache

    class Rounding(DynamicCache):
        def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kw: Any) -> Any:
            k_scale, v_scale = scales.get(layer, (1.0, 1.0))
            states = (
                round_states(keys, kv_format, k_scale),
                round_states(values, kv_format, v_scale),
            )
            return super().update(*states, layer, *args, **kw)

    model = fourfold.load(out)

    def logits(ids: Tensor) -> Tensor:
        cache = Rounding(config=model.config)
        with torch.no_grad():
            return model(ids, past_key_values=cache, use_cache=True).logits

    return logits


def ids_for(model: Any, length: int = 20) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(3, vocabulary, (2, length), generator=generator)


def logits_of(model: Any, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **options).logits


OTHERS = [
    name
    for name, family in FAMILIES.items()
    if not family.load_error and family.layout != "dense" and name != "jetmoe"
]
LATENT = {
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "longcat_flash",
    "axk1", "axk2", "bailing_hybrid", "dots3_note", "glm5_next", "kimi_linear", "deepseek_v4",
    "mistral_large4", "hy_v4", "mistral4", "deepseek_v3_mtp",
}  # fmt: skip
WITH_AN_ENCODER = {"switch_transformers", "nllb_moe"}
NO_CACHE = {"openai_privacy_filter"}


@pytest.mark.parametrize("name", mostly_slow(OTHERS, "inkling", "dbrx", "deepseek_v4", "nllb_moe"))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_family_runs(name: str, written: Written, tmp_path: Path) -> None:
    """With a rounded cache, the same with one of its own and without; or with a warning."""
    out = quantized(written(name)[0], tmp_path, CAST, "quantize: [experts]")
    model: Any = fourfold.load(out, simulate_activations=True)
    part, kv_cache = runnable(model), model.fourfold_simulation.sites.kv_cache
    assert (kv_cache is None) == (name in LATENT | WITH_AN_ENCODER)
    if kv_cache is None:
        return
    ids = torch.arange(1, 13)[None]
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if reads_text_twice(part) else {})
    first, second = (part(**inputs, **options) for options in ({}, {"use_cache": False}))
    assert torch.equal(first[0], second[0])
    counts = {n for path, n in model.fourfold_simulation.calls.items() if path.endswith(".kv")}
    assert counts == (set() if name in NO_CACHE else {2})


@pytest.mark.parametrize(
    ("name", "kv_cache"),
    [
        ("qwen3_moe", CAST),
        ("qwen3_moe", CALIBRATED),
        ("qwen3_moe", NVFP4),
        ("gpt_oss", CAST),
        ("qwen3_5_moe_text", CALIBRATED),
        ("nemotron_h", CALIBRATED),
    ],
)
def test_attention_reads_rounded_states(
    name: str, kv_cache: str, written: Written, tmp_path: Path
) -> None:
    """Windows, sinks, and hybrids, whose other layers have no keys."""
    out = quantized(written(name)[0], tmp_path, kv_cache)
    model: Any = fourfold.load(out, simulate_activations=True)
    ids, kv = ids_for(model), model.fourfold_simulation.sites.kv_cache
    layers = {int(path.rpartition(".")[2]): scales for path, scales in kv.scales.items()}
    stored = {name: float(x) for name, x in tensors_of(out).items() if name.endswith("k_scale")}
    assert sorted(k for k, _ in layers.values()) == sorted(stored.values())
    assert bool(layers) == (kv_cache == CALIBRATED)
    wanted = exact_with_rounded_cache(out, kv.format, layers)(ids)
    assert not torch.equal(wanted, logits_of(fourfold.load(out), ids))
    assert torch.equal(logits_of(model, ids), wanted)
    assert torch.equal(logits_of(model, ids, use_cache=False), wanted)
    counts = {n for path, n in model.fourfold_simulation.calls.items() if path.endswith(".kv")}
    assert counts == {2}


def test_steps_read_what_earlier_ones_stored(written: Written, tmp_path: Path) -> None:
    """With the caller's own cache, token by token; the cache is afterwards as it was."""
    from transformers import DynamicCache

    out = quantized(written("qwen3_moe")[0], tmp_path, CAST)
    model: Any = fourfold.load(out, simulate_activations=True, dtype=torch.float32)
    ids, cache = ids_for(model, 6), DynamicCache(config=model.config)
    steps = [logits_of(model, ids[:, [n]], past_key_values=cache, use_cache=True) for n in range(6)]
    torch.testing.assert_close(torch.cat(steps, dim=1), logits_of(model, ids))
    assert "update" not in vars(cache)
    keys = cache.layers[0].keys
    assert torch.equal(round_states(keys, "fp8"), keys)
    with pytest.raises(IndexError):
        model(ids + model.config.vocab_size, past_key_values=cache)
    assert "update" not in vars(cache)


def test_removed_it_is_exact(written: Written, tmp_path: Path) -> None:
    out = quantized(written("qwen3_moe")[0], tmp_path, CAST)
    model: Any = fourfold.load(out, simulate_activations=True)
    ids, exact = ids_for(model), fourfold.load(out)
    model.fourfold_simulation.remove()
    assert torch.equal(logits_of(model, ids), logits_of(exact, ids))
    assert not [x for x in model.modules() if x._forward_pre_hooks or x._forward_hooks]


def test_inputs_and_cache_together(written: Written, tmp_path: Path) -> None:
    rest = f"activations: {{format: nvfp4, amax: constant}}\n{EXPERTS}"
    out = quantized(written("qwen3_moe")[0], tmp_path, CAST, rest)
    model: Any = fourfold.load(out, simulate_activations=True)
    logits_of(model, ids_for(model))
    kinds = {path.rpartition(".")[2] for path in model.fourfold_simulation.calls}
    assert kinds >= {"kv", "gate_up", "down"}


def test_latent_caches_keep_their_precision(written: Written, tmp_path: Path) -> None:
    out = quantized(written("deepseek_v3")[0], tmp_path, CAST)
    with pytest.warns(UserWarning, match="latent cache of MLA is not simulated"):
        model: Any = fourfold.load(out, simulate_activations=True)
    ids = ids_for(model)
    assert torch.equal(logits_of(model, ids), logits_of(fourfold.load(out), ids))


def test_scales_that_engines_disagree_about(written: Written, tmp_path: Path) -> None:
    """A checkpoint of another tool: NVFP4 keys with a scale of their own."""
    out = quantized(written("qwen3_moe")[0], tmp_path, CALIBRATED)
    for name in ("config.json", "hf_quant_config.json"):
        text = (out / name).read_text().replace('"num_bits": 8', '"num_bits": 4')
        (out / name).write_text(text.replace('"FP8"', '"NVFP4"'))
    with pytest.warns(UserWarning, match="engines disagree"):
        fourfold.load(out, simulate_activations=True)


# --- generate -----------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_text_is_written_with_a_rounded_cache(stream: bool, tmp_path: Path) -> None:
    out = quantized(model_dir(), tmp_path, NVFP4)
    found = fourfold.generate(out, "import os\n", max_new_tokens=5, stream=stream)
    assert (found.simulated, found.kv_cache) == (False, "nvfp4")
    assert "weights alone, NVFP4 KV cache" in str(found)
    assert found.to_dict()["kv_cache"] == "nvfp4"
    ids = torch.tensor([list(b"import os\n")])
    logits = exact_with_rounded_cache(out, "nvfp4", {})
    for _ in range(5):
        ids = torch.cat([ids, logits(ids)[:, -1:].argmax(-1)], dim=1)
    assert found.quantized.tokens == tuple(ids[0, -5:].tolist())
    alone = fourfold.generate(out, "import os\n", max_new_tokens=2, simulate_activations=False)
    assert alone.kv_cache is None
