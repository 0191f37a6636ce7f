# SPDX-License-Identifier: Apache-2.0
"""Which families llama.cpp runs as `fourfold.load` does: random tiny checkpoints, on a CPU.

    make engines-llama
    PYTHONPATH=tests .venv/bin/python scripts/engines/llama_cpp.py FOLDER [FAMILY …]

Each family's checkpoint is quantized (W4A16 experts), converted by llama.cpp's own converter, and
run by a prebuilt library of llama.cpp (`llama_cpp_run.py`, in `.venv-llama`). Then

- every tensor in NVFP4 of the GGUF file must equal the dequantized weights of the checkpoint;
- the logits are compared with those of `fourfold.load` in FP32. llama.cpp rounds the inputs of
  NVFP4 weights to Q8_0 (32 values share a scale), so they are compared as well with a model whose
  experts read inputs that are rounded alike. What is left is the order of additions, which now and
  then turns one of these roundings;
- the checkpoint before quantization is converted and compared with transformers, too. Where that
  differs, the configuration means another model to llama.cpp, and nothing is said of NVFP4.

The table is printed and stored in FOLDER as `llama_cpp.json` and `llama_cpp.md`. The exit code is 1
if a family of `RUNS` did not run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

import fourfold
from families import FAMILIES, Family, quiet, write_checkpoint
from fourfold.models.expert_hooks import Rows, watch_experts
from fourfold.models.module_tree import build_tree
from nvfp4_folders import dequantized, tensors_of

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-llama"
RUN = Path(__file__).with_name("llama_cpp_run.py")
RECIPE = "w4a16_nvfp4_experts_only_mse"
TOKENS = 24
WIDTH = 64
"""llama.cpp stores 64 values of NVFP4 together, so input widths must be multiples of it."""
WEIGHTS_AGREE = 2**-22
"""Largest difference of a weight, relative to the largest of its tensor. Both multiply code, block
scale and global scale in FP32, in another order, with two roundings of 2⁻²⁴ each."""
LEFT = 0.5
"""The part of the KL divergence that may be left with inputs rounded to Q8_0. It is 1 if something
else makes the difference."""
SAME_MODEL = 1e-4
"""The KL divergence, in nats, up to which llama.cpp and transformers compute the same unquantized
model: llama.cpp takes some activation functions from tables in FP16."""

RUNS = (
    "cohere2_moe", "deepseek_v32", "gemma4", "glm_moe_dsa", "hy_v3", "nemotron_h", "qwen3_5_moe",
    "qwen3_5_moe_text", "qwen3_moe", "qwen3_next",
)  # fmt: skip
"""Families whose graphs use the experts' global scales."""
OTHERS = (
    "afmoe", "deepseek_v2", "deepseek_v3", "exaone_moe", "glm4_moe", "glm4_moe_lite", "granitemoe",
    "laguna", "mellum", "mixtral", "olmoe", "qwen2_moe", "qwen4_exp", "solar_open",
)  # fmt: skip
"""Families that do not run, each in its way."""
CHANGES: Mapping[str, Mapping[str, Any]] = {
    "deepseek_v32": {"scoring_func": "sigmoid", "index_head_dim": 64, "index_topk": 64},
    "exaone_moe": {"scoring_func": "sigmoid"},
    "glm4_moe_lite": {"first_k_dense_replace": 1},
    "glm_moe_dsa": {"index_head_dim": 64, "index_topk": 64},
    "mellum": {"layer_types": ["sliding_attention", "full_attention", "full_attention"]},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]},
    "olmoe": {"num_key_value_heads": 4},
    "qwen2_moe": {"mlp_only_layers": []},
    "qwen3_5_moe_text": {"rope_parameters": {"mrope_section": [2, 1, 1]}},
    "qwen3_moe": {"mlp_only_layers": [], "norm_topk_prob": True},
    "qwen4_exp": {"indexer_budget": 64},
}
"""What the text model's configuration must say for llama.cpp to know the model. Sparse attention
reads all tokens here: which ones an indexer chooses is not compared."""
WITHOUT_MTP = frozenset(
    {"deepseek_v32", "glm4_moe", "glm_moe_dsa", "hy_v3", "qwen3_5_moe", "qwen3_5_moe_text"}
    | {"qwen3_next"}
)
"""Families whose converter wants `--no-mtp` for a checkpoint without MTP layers."""


@dataclass
class Row:
    """The result of one family; numbers are None where nothing was computed."""

    family: str
    outcome: str
    tensors: int = 0
    """Tensors in NVFP4 in the GGUF file."""
    weights: float | None = None
    """Largest difference of a weight, relative to the largest of its tensor."""
    kl_unquantized: float | None = None
    """Mean KL divergence, in nats, of the unquantized model in llama.cpp from transformers."""
    kl: float | None = None
    """The same of the quantized one from `fourfold.load`."""
    kl_rounded: float | None = None
    """The same with inputs rounded to Q8_0."""
    largest_rounded: float | None = None
    """Largest difference of log probabilities then."""
    same_token: int = 0
    """Positions with the same most probable token, without that rounding."""


class LlamaCppError(Exception):
    """The converter or the library stopped; the message is its last line."""


class RoundedToQ8:
    """Rounds the inputs of experts as `quantize_row_q8_0` does: a `Watch`."""

    all_experts = False

    def __call__(self, rows: Rows, *, is_routed: bool) -> Tensor:
        blocks = rows.x.unflatten(-1, (-1, 32))
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        codes = torch.where(scale > 0, blocks / scale, 0).round()
        return (codes * scale.half().float()).flatten(-2)


def for_llama_cpp(family: Family) -> Family:
    """Return the family with widths that llama.cpp can store, and a configuration it knows."""

    def build_config() -> Any:
        config = family.build_config()
        text = config.get_text_config()
        for name, value in list(vars(text).items()):
            if name.endswith("intermediate_size") and isinstance(value, int):
                setattr(text, name, -(-value // WIDTH) * WIDTH)
        for name, value in CHANGES.get(family.name, {}).items():
            own = getattr(text, name, None)
            setattr(text, name, own | value if isinstance(own, dict) else value)
        return config

    return replace(family, build_config=build_config)


def judge(name: str, folder: Path) -> Row:
    """Quantize, convert, run and compare one family."""
    family = for_llama_cpp(FAMILIES[name])
    shutil.rmtree(folder, ignore_errors=True)
    source, out = folder / "source", folder / "out"
    write_checkpoint(family, source)
    fourfold.quantize(source, out, recipe=RECIPE)
    tokens = torch.randint(3, 100, (TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    try:
        plain, _ = run(name, source, tokens)
        theirs, values = run(name, out, tokens)
    except LlamaCppError as error:
        return Row(name, f"stopped: {error}")
    exact, rounded = predictions(out, tokens)
    row = Row(
        name,
        "ran",
        len(values),
        weights_difference(out, values),
        kl(unquantized(family, source, tokens), plain),
        kl(exact, theirs),
        kl(rounded, theirs),
        (rounded - theirs).abs().max().item(),
        int((exact.argmax(-1) == theirs.argmax(-1)).sum()),
    )
    row.outcome = outcome(row)
    return row


def outcome(row: Row) -> str:
    """Say what became of a family that llama.cpp computed."""
    assert row.weights is not None
    assert row.kl_unquantized is not None
    assert row.kl is not None
    assert row.kl_rounded is not None
    if not row.weights <= WEIGHTS_AGREE:
        return "other weights, without an error"
    if row.kl != row.kl:
        return "NaN, without an error"
    if not row.kl_unquantized <= SAME_MODEL:
        return "another model before quantization, too"
    return "ran" if row.kl_rounded <= LEFT * row.kl else "other logits, without an error"


def run(
    name: str, checkpoint: Path, tokens: Sequence[int]
) -> tuple[Tensor, Mapping[str, np.ndarray]]:
    """Return llama.cpp's log probabilities [T, V], and the tensors in NVFP4 of its GGUF file."""
    vocabulary = {f"<{n}>": n for n in range(128)}  # some converters count its entries
    tokenizer = {"model": {"vocab": vocabulary}, "added_tokens": []}
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    result = checkpoint.with_suffix(".npz")
    options = ["--no-mtp"] if name in WITHOUT_MTP else []
    ids = ",".join(map(str, tokens))
    done = subprocess.run(
        [ENVIRONMENT / "bin/python", RUN, checkpoint, ids, result, *options],
        env=os.environ
        | {"PYTHONPATH": f"{llama_cpp()}:{llama_cpp()}/gguf-py", "GGML_NO_BACKTRACE": "1"},
        capture_output=True,
        text=True,
    )
    checkpoint.with_suffix(".log").write_text(done.stdout + done.stderr)
    if not result.is_file():
        lines = [line for line in done.stderr.splitlines() if "rror" in line or "ASSERT" in line]
        raise LlamaCppError(lines[-1] if lines else f"exit code {done.returncode}")
    values = dict(np.load(result))
    return torch.from_numpy(values.pop("logits")).log_softmax(-1), values


def llama_cpp() -> Path:
    """Return llama.cpp's folder, which the source distribution of llama-cpp-python brings."""
    return next(ENVIRONMENT.glob("llama_cpp_python-*/vendor/llama.cpp"))


def predictions(out: Path, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the log probabilities [T, V] of `fourfold.load`: with exact inputs, and rounded."""
    model = fourfold.load(out, dtype=torch.float32)
    ids = torch.tensor([tokens])
    with torch.no_grad():
        exact = model(input_ids=ids).logits[0]
        with watch_experts(model, build_tree(out).experts, RoundedToQ8()):
            rounded = model(input_ids=ids).logits[0]
    return exact.log_softmax(-1), rounded.log_softmax(-1)


def unquantized(family: Family, source: Path, tokens: Sequence[int]) -> Tensor:
    """Return transformers' log probabilities [T, V] for the source."""
    with quiet(), torch.no_grad():
        kind = getattr(transformers, family.model_class)
        model = kind.from_pretrained(source, dtype=torch.float32).eval()
        return model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)


def kl(reference: Tensor, other: Tensor) -> float:
    """Return the mean KL divergence of log probabilities [T, V]."""
    return float((reference.exp() * (reference - other)).sum(-1).mean())


def weights_difference(out: Path, values: Mapping[str, np.ndarray]) -> float:
    """Compare the tensors [E, out, in] of the GGUF file with the checkpoint's weights."""
    worst = 0.0
    for name, stack in stacks(out):
        difference = (torch.from_numpy(values[name]) - stack).abs().max() / stack.abs().max()
        worst = max(worst, difference.item())
    return worst


def stacks(out: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the experts' dequantized weights [E, out, in] under the names of GGUF."""
    tensors = tensors_of(out)
    pattern = re.compile(r"(.*layers\.(\d+)\..*?)experts\.0\.(gate|up|down)_proj\.weight_scale_2")
    for found in filter(None, map(pattern.fullmatch, tensors)):
        prefix, layer, projection = found.groups()
        names = [f"{prefix}experts.{e}.{projection}_proj" for e in range(len(tensors))]
        stack = torch.stack([dequantized(tensors, x) for x in names if f"{x}.weight" in tensors])
        scale = tensors.get(f"{prefix}router.per_expert_scale")
        if scale is not None and projection == "down":  # Gemma 4: the converter multiplies by it
            stack = stack * scale.float().reshape(-1, 1, 1)
        yield f"blk.{layer}.ffn_{projection}_exps.weight", stack


def versions() -> str:
    """Name the versions of the converter and of the library."""
    found = {d.name: d.version for d in distributions(path=[str(packages())])}
    converter = llama_cpp().parents[1].name.replace("llama_cpp_python-", "llama-cpp-python ")
    return f"converter of {converter}, library of xllamacpp {found['xllamacpp']}"


def packages() -> Path:
    return next(ENVIRONMENT.glob("lib/python*/site-packages"))


def table(rows: Sequence[Row]) -> str:
    """Return the rows as Markdown."""
    names = [field.name for field in fields(Row)]
    lines = [names, ["---"] * len(names)]
    for row in rows:
        cells = asdict(row).values()
        lines.append([f"{x:.1e}" if isinstance(x, float) else str(x) for x in cells])
    return f"{versions()}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("families", nargs="*", default=[*RUNS, *OTHERS])
    options = parser.parse_args()
    rows = []
    for name in options.families:
        rows.append(judge(name, options.folder / name))
        print(f"{name}: {rows[-1].outcome}", flush=True)
    print(table(rows))
    (options.folder / "llama_cpp.md").write_text(table(rows))
    document = {"versions": versions(), "rows": [asdict(row) for row in rows]}
    (options.folder / "llama_cpp.json").write_text(json.dumps(document, indent=1))
    if any(row.family in RUNS and row.outcome != "ran" for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
