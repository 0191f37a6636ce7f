# SPDX-License-Identifier: Apache-2.0
"""Streamed calibration beside the same forward with the whole model in memory.

    python benchmarks/calibration.py [--folder DIR] [--layers 12] [--samples 16] [--seq 256]

Writes a Qwen3-MoE checkpoint of more than 3 GB (random weights, one tensor an expert, as upstream)
and runs each in processes of their own, in turn, medians of several:

    whole     from_pretrained, then model(**batch) for every batch
    streamed  the same batches, one layer in memory, with observers at every expert

Prints seconds and peak resident memory above the imports, and what the promise allows:
the largest unit twice, the activations, and 1 GB. The last line is the same as JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, HEADS, VOCAB = 2048, 768, 32, 8, 16, 32768
BATCH = 8

COMMON = """
import json, sys, time, torch
from pathlib import Path
from fourfold.distributed.machine import peak_resident
torch.set_num_threads({threads})
torch.manual_seed(0)
batches = [torch.randint(0, {vocab}, ({batch}, {seq})) for _ in range({samples} // {batch})]
"""

WHOLE = """
from transformers import AutoModelForCausalLM
from transformers.utils import logging
logging.disable_progress_bar()
base, begun = peak_resident(), time.perf_counter()
model = AutoModelForCausalLM.from_pretrained({model!r}, dtype=torch.bfloat16).eval()
loaded = time.perf_counter()
with torch.no_grad():
    for ids in batches:
        model.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
done = time.perf_counter()
print(json.dumps(dict(load=loaded - begun, forward=done - loaded, peak=peak_resident() - base)))
"""

STREAMED = """
from fourfold.calibration.layerwise import Calibration
from fourfold.calibration.data import Batch, CalibrationData
from fourfold.sources.safetensors import open_source
from fourfold.planning import make_plan
from fourfold.recipes import Recipe
import transformers.models.qwen3_moe.modeling_qwen3_moe
source = open_source({model!r})
plan = make_plan(source, Recipe.load("nvfp4_experts_only_mse"))
data = CalibrationData(
    tuple(Batch(ids, torch.ones_like(ids)) for ids in batches), "", {samples}, {seq},
    {samples} * {seq}, "random ids", False,
)
base, begun = peak_resident(), time.perf_counter()
run = Calibration(plan, source, data, activation_memory={activations}, scratch=Path({model!r}))
for layer in run.units():
    pass
done = time.perf_counter()
print(json.dumps(dict(
    total=done - begun, peak=peak_resident() - base, parked=run.store.peak,
    to_disk=run.store.written,
    outside=run.streamed.unit_bytes(None), layer=run.streamed.unit_bytes(0),
)))
"""


def write_model(folder: Path, layers: int) -> int:
    """A checkpoint in upstream's layout; its bytes."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE,
        moe_intermediate_size=INTERMEDIATE, num_hidden_layers=layers, num_experts=EXPERTS,
        num_experts_per_tok=TOP_K, num_attention_heads=HEADS, num_key_value_heads=4,
        head_dim=HIDDEN // HEADS, max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip
    config.architectures, config.dtype = ["Qwen3MoeForCausalLM"], torch.bfloat16
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).bfloat16()

    def layer(number: int) -> dict[str, torch.Tensor]:
        at, kv = f"model.layers.{number}", 4 * HIDDEN // HEADS
        tensors = {
            f"{at}.input_layernorm.weight": torch.ones(HIDDEN).bfloat16(),
            f"{at}.post_attention_layernorm.weight": torch.ones(HIDDEN).bfloat16(),
            f"{at}.self_attn.q_norm.weight": torch.ones(HIDDEN // HEADS).bfloat16(),
            f"{at}.self_attn.k_norm.weight": torch.ones(HIDDEN // HEADS).bfloat16(),
            f"{at}.self_attn.q_proj.weight": weight(HIDDEN, HIDDEN),
            f"{at}.self_attn.k_proj.weight": weight(kv, HIDDEN),
            f"{at}.self_attn.v_proj.weight": weight(kv, HIDDEN),
            f"{at}.self_attn.o_proj.weight": weight(HIDDEN, HIDDEN),
            f"{at}.mlp.gate.weight": weight(EXPERTS, HIDDEN),
        }
        for expert in range(EXPERTS):
            to = f"{at}.mlp.experts.{expert}"
            tensors[f"{to}.gate_proj.weight"] = weight(INTERMEDIATE, HIDDEN)
            tensors[f"{to}.up_proj.weight"] = weight(INTERMEDIATE, HIDDEN)
            tensors[f"{to}.down_proj.weight"] = weight(HIDDEN, INTERMEDIATE)
        return tensors

    outside_layers = {
        "model.embed_tokens.weight": weight(VOCAB, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN).bfloat16(),
        "lm_head.weight": weight(VOCAB, HIDDEN),
    }
    weight_map, total = {}, 0
    first = layer(0)  # all layers have its values: only shapes and bytes matter here
    others = (
        {key.replace("layers.0", f"layers.{n}"): value for key, value in first.items()}
        for n in range(layers)
    )
    for number, tensors in enumerate([outside_layers, *others]):
        name = f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(value.numel() * value.element_size() for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def run(program: str, **values: Any) -> dict[str, float]:
    """Run a program in a process of its own, and return the figures that it prints."""
    text = (COMMON + program).format(vocab=VOCAB, batch=BATCH, **values)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measure(model: Path, runs: int, options: dict[str, Any]) -> dict[str, float]:
    """Medians of both, taken in turn, so that a drift of the machine meets both."""
    figures: dict[str, list[dict[str, float]]] = {"whole": [], "streamed": [], "evicted": []}
    for _ in range(runs):
        figures["whole"].append(run(WHOLE, model=str(model), **options))
        for name, limit in (("streamed", None), ("evicted", 1 << 24)):
            figures[name].append(run(STREAMED, model=str(model), activations=limit, **options))
    return {
        f"{name}_{key}": statistics.median(result[key] for result in results)
        for name, results in figures.items()
        for key in results[0]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="bench-calibration-"))
    model = folder / "model"
    nbytes = write_model(model, arguments.layers)
    options = {"samples": arguments.samples, "seq": arguments.seq, "threads": arguments.threads}
    try:
        figures = measure(model, arguments.runs, options)
    finally:
        shutil.rmtree(model)
    unit = max(figures["streamed_layer"], figures["streamed_outside"])
    figures["allowed"] = 2 * unit + figures["streamed_parked"] + 1e9
    figures["ratio_to_forward"] = figures["streamed_total"] / figures["whole_forward"]
    figures["ratio_to_load_and_forward"] = figures["streamed_total"] / (
        figures["whole_forward"] + figures["whole_load"]
    )
    print(f"{platform.processor() or platform.machine()}, {arguments.threads} threads: "
          f"{nbytes / 1e9:.2f} GB, {arguments.layers} layers, "
          f"{arguments.samples} × {arguments.seq} tokens")  # fmt: skip
    print(f"  whole model  load {figures['whole_load']:.1f} s, "
          f"forward {figures['whole_forward']:.1f} s, "
          f"peak {figures['whole_peak'] / 1e9:.2f} GB")  # fmt: skip
    for name in ("streamed", "evicted"):
        print(f"  {name:<11}  {figures[f'{name}_total']:.1f} s in all, peak "
              f"{figures[f'{name}_peak'] / 1e9:.2f} GB; activations "
              f"{figures[f'{name}_parked'] / 1e9:.2f} GB in memory, "
              f"{figures[f'{name}_to_disk'] / 1e9:.2f} GB written to disk")  # fmt: skip
    print(
        f"  allowed      {figures['allowed'] / 1e9:.2f} GB: 2 × {unit / 1e9:.2f} + activations + 1"
    )
    print(f"  streamed / forward {figures['ratio_to_forward']:.2f}, streamed / (load + forward) "
          f"{figures['ratio_to_load_and_forward']:.2f}")  # fmt: skip
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
